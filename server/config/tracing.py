"""Section `tracing` of the configuration."""

from importlib.util import find_spec
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, model_validator

from server.config.base import Section, is_http_url

_EXPORTERS = {
    "grpc": "opentelemetry.exporter.otlp.proto.grpc",
    "http": "opentelemetry.exporter.otlp.proto.http",
}


def _check_collector(url: str) -> str:
    if not is_http_url(url) or "@" in url:
        raise ValueError("should be as http://host:4318, without a password in it")
    return url


class TracingConfig(Section):
    """Where spans of requests are sent: to an OpenTelemetry collector, by OTLP.

    It needs the extra `tracing`. Other settings, such as headers with a key, are OpenTelemetry's
    own variables `OTEL_*`. There is none by default.
    """

    endpoint: Annotated[
        str, AfterValidator(_check_collector), Field(examples=["http://127.0.0.1:4318"])
    ]
    """Address of the collector. With `http`, the path is `/v1/traces` unless it has another; with
    `grpc`, it has none."""
    protocol: Literal["grpc", "http"] = "http"
    """OTLP's transport."""
    sample_ratio: Annotated[float, Field(ge=0, le=1)] = 1
    """Part of the requests that is traced, of those whose client sent no trace of its own."""

    @model_validator(mode="after")
    def _can_be_sent(self) -> Self:
        if self.protocol == "grpc" and urlsplit(self.endpoint).path.strip("/"):
            raise ValueError("endpoint should be as http://host:4317, since grpc has no paths")
        if not all(map(_is_installed, ("opentelemetry.sdk", _EXPORTERS[self.protocol]))):
            raise ValueError("needs the extra tracing: install tierserve[tracing]")
        return self


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False
