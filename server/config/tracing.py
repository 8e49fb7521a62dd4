"""Tracing's part of the configuration."""

from importlib.util import find_spec
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, model_validator

from server.config.base import Section, is_http_url

_EXPORTERS = {
    "grpc": "opentelemetry.exporter.otlp.proto.grpc",
    "http": "opentelemetry.exporter.otlp.proto.http",
}


def _is_collector(url: str) -> str:
    if not is_http_url(url) or "@" in url:
        raise ValueError("should be as http://host:4318, without a password in it")
    return url


class TracingConfig(Section):
    """Where the spans of requests go: to an OpenTelemetry collector's `endpoint`, by OTLP.

    With `http`, an endpoint without a path means its path `/v1/traces`; with `grpc`, there is none.
    Of requests whose client has no trace of its own, the part `sample_ratio` is traced. All else,
    such as headers with a key, is taken from OpenTelemetry's own `OTEL_*` variables.
    """

    endpoint: Annotated[str, AfterValidator(_is_collector)]
    protocol: Literal["grpc", "http"] = "http"
    sample_ratio: Annotated[float, Field(ge=0, le=1)] = 1

    @model_validator(mode="after")
    def _can_be_sent(self) -> Self:
        if self.protocol == "grpc" and urlsplit(self.endpoint).path.strip("/"):
            raise ValueError("endpoint should be as http://host:4317, since grpc has no paths")
        if not all(map(_is_installed, ("opentelemetry.sdk", _EXPORTERS[self.protocol]))):
            raise ValueError("needs the extra tracing, as scripts/setup tracing installs it")
        return self


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False
