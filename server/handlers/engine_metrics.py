"""`/metrics/engine`: the engines' own metrics, those of all models and upstreams in one text.

Each sample gets the labels `model` and `upstream`. What an engine itself labels so becomes
`exported_model` and `exported_upstream`, as where Prometheus scrapes. An engine that doesn't answer
in time is left out; `tierserve_upstream_up` tells.
"""

import asyncio
import re
from collections.abc import Iterable
from typing import NamedTuple

import aiohttp
from aiohttp import web

from server.engine.models import ServedModels
from server.engine.upstream import Upstream
from server.handlers.upstream_headers import forwarded_headers
from server.telemetry.served import OWN
from server.web.offload import offload
from server.web.request import HttpRequest, Reply
from server.web.responses import RETRY_AFTER_S, error_response

# Prometheus waits for 10 seconds by default, and an engine of ours answers within milliseconds.
_DEADLINE_S = 5
# A vLLM's have some 100 kB.
_MAX_BYTES = 4 * 1024**2
_FORMAT = "text/plain; version=0.0.4"

_comment = re.compile(r"# (?:HELP|TYPE) ([a-zA-Z_:][\w:]*)").match
_sample = re.compile(
    r"([a-zA-Z_:][\w:]*)(?:\{(.*)\})?[ \t]+([-+]?(?:[0-9.]|NaN|Inf)[-+0-9.eE \t]*)"
).fullmatch
# A quote within a label's value has a backslash before it, so none of these is within one.
_named_as_ours = re.compile(r"(^|,)[ \t]*(model|upstream)=(?=\")").sub


class _Told(NamedTuple):
    """What one engine tells of itself."""

    model: str
    upstream: str
    text: str


class EngineMetrics:
    """The handler of that route.

    Args:
        models: all of them.
    """

    def __init__(self, models: ServedModels) -> None:
        self._models = models

    async def answer(self, http: HttpRequest) -> Reply:
        """Answer with the metrics of all engines, or of those of the model that the query names.

        Raises:
            UnknownModelError: the query names an unknown model.
        """
        models = list(self._models.all)
        if name := http.query.get("model"):
            models = [self._models.get(self._models.names().resolve(name).name)]
        asked = (
            _ask(http, model.name, upstream) for model in models for upstream in model.upstreams.all
        )
        told = [each for each in await asyncio.gather(*asked) if each is not None]
        if not told:
            text = "No engine tells its metrics: all are starting or down, or have none."
            return error_response(503, text, retry_after_s=RETRY_AFTER_S), OWN
        merged = await offload(sum(len(each.text) for each in told), _merge, told)
        return web.Response(text=merged, headers={"Content-Type": _FORMAT}), OWN


async def _ask(http: HttpRequest, model: str, upstream: Upstream) -> _Told | None:
    """Return an engine's metrics; `None` if it doesn't tell them."""
    headers = forwarded_headers(http)
    headers["Accept"] = _FORMAT
    text = bytearray()
    try:
        async with (
            asyncio.timeout(_DEADLINE_S),
            upstream.unpooled.get(
                upstream.url_of("/metrics"),
                headers=upstream.with_credentials(headers),
                allow_redirects=False,
            ) as reply,
        ):
            if reply.status != 200:
                return None
            async for piece in reply.content.iter_any():
                text += piece
                if len(text) > _MAX_BYTES:
                    return None
    except (aiohttp.ClientError, OSError):
        return None
    return _Told(model, upstream.label, text.decode(errors="replace"))


def _merge(told: Iterable[_Told]) -> str:
    """Return the metrics of all, those of one name together, as the format demands."""
    comments: dict[str, dict[str, str]] = {}
    samples: dict[str, list[str]] = {}
    for model, upstream, text in told:
        labels = f'model="{_escaped(model)}",upstream="{_escaped(upstream)}"'
        family = ""
        for line in text.splitlines():
            if (comment := _comment(line)) is not None:
                family = comment[1]
                # The first one's are as good as the others'.
                comments.setdefault(family, {}).setdefault(line[:6], line)
            elif (sample := _sample(line)) is not None:
                name, own, value = sample.groups()
                if not name.startswith(family):
                    family = name
                own = _named_as_ours(r"\1exported_\2=", own or "").rstrip(",")
                all_labels = f"{own},{labels}" if own else labels
                samples.setdefault(family or name, []).append(f"{name}{{{all_labels}}} {value}")
    return "".join(
        f"{line}\n"
        for family, lines in samples.items()
        for line in (*comments.get(family, {}).values(), *lines)
    )


def _escaped(value: str) -> str:
    """Return a label's value as it stands in quotes."""
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
