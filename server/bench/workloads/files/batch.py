"""OpenAI's batch files: JSONL with `method`, `url` and `body`, which are sent as they are.

The model, the stream and the longest answer are those of the command line. A body without
`temperature` and `seed` gets the command line's temperature.
"""

from typing import Any

from server.bench.workload import Session, Step
from server.bench.workloads.base import Options
from server.bench.workloads.files.fields import text_of
from server.bench.workloads.files.finite import PieceWorkload
from server.bench.workloads.files.pieces import Piece
from server.bench.workloads.requests import PATHS, Route, step_of

_LIMITS = ("max_completion_tokens", "max_output_tokens", "max_tokens")
_BEGINNINGS = ("system", "instructions", "messages", "input", "prompt")
"""The fields that a prompt may begin with, in their order."""
_ROUTES: dict[str, Route] = {path: route for route, path in PATHS.items()}


class BatchOptions(Options):
    """There are none."""


class Batch(PieceWorkload[BatchOptions]):
    """One request a session, to the route that its line names."""

    holds = "lines with method, url and body"

    def _add(self, piece: Piece) -> bool:
        self._request(piece.fields)
        return True

    def session(self, number: int) -> Session:
        return Session((self._request(self._pieces.fields(number)),))

    def _request(self, fields: dict[str, Any]) -> Step:
        if fields.get("method", "POST") != "POST":
            raise ValueError(f"method should be POST, not {fields['method']!r}")
        route = _ROUTES.get(text_of(fields, "url"))
        if route is None:
            raise ValueError(f"url should be one of {', '.join(_ROUTES)}, not {fields['url']!r}")
        body = fields.get("body")
        if not isinstance(body, dict):
            raise ValueError("body should be an object")
        body = {k: v for k, v in body.items() if k not in ("stream", "stream_options")}
        body["model"] = self.common.model
        if route != "embeddings":
            self._bound(route, body)
        if self.common.nonce:
            body = _told_apart(body, self.common.nonce)
        return step_of(self.common, route, body)

    def _bound(self, route: Route, body: dict[str, Any]) -> None:
        """Set the longest answer and the temperature."""
        own = next((name for name in _LIMITS if isinstance(body.get(name), int)), None)
        if own is not None:
            body[own] = self._limit(body[own])
        elif self.common.max_tokens is not None or route == "messages":
            name = "max_output_tokens" if route == "responses" else "max_tokens"
            body[name] = self._limit(None)
        if "seed" not in body:
            body.setdefault("temperature", self.common.temperature)


def _told_apart(body: dict[str, Any], nonce: str) -> dict[str, Any]:
    """Return a body whose prompt begins with the nonce.

    Raises:
        ValueError: it doesn't begin with text.
    """
    name = next((each for each in _BEGINNINGS if body.get(each)), None)
    if name is None:
        raise ValueError(f"body should have one of {', '.join(_BEGINNINGS)}")
    return body | {name: _prefixed(body[name], nonce)}


def _prefixed(value: Any, nonce: str) -> Any:
    if isinstance(value, str):
        return f"{nonce} {value}"
    if isinstance(value, list) and value:
        if all(isinstance(each, str) for each in value):
            return [_prefixed(each, nonce) for each in value]
        return [_prefixed(value[0], nonce), *value[1:]]
    if isinstance(value, dict):
        name = "content" if "content" in value else "text"
        return value | {name: _prefixed(value.get(name), nonce)}
    raise ValueError("body should begin with text, which --cache cold and warm prefix; or steady")
