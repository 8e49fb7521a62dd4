"""`/ready` by each of its rules."""

from types import SimpleNamespace
from typing import Any

import orjson
import pytest

from server.engine.supervisor import EngineState
from server.handlers.readiness import Readiness
from server.process import Draining
from tests.server.conftest import of_vllm

READY, STARTING = EngineState.READY, EngineState.STARTING


class Models:
    """Two models."""

    def __init__(self, *states: EngineState) -> None:
        pairs = zip("ab", states, strict=True)
        self.all = [SimpleNamespace(name=name, state=state) for name, state in pairs]

    def names(self) -> Any:
        return SimpleNamespace(resolve=of_vllm)

    def get(self, name: str) -> Any:
        return next(each for each in self.all if each.name == name)


async def status(made: Readiness, model: str | None = None) -> tuple[int, str]:
    query = {} if model is None else {"model": model}
    answer = await made.answer(SimpleNamespace(query=query))
    return answer.status, orjson.loads(answer.body).get("error", {}).get("message", "")


@pytest.mark.parametrize("serve", [True, False])
@pytest.mark.parametrize(
    ("rule", "number", "lacks"),
    [("all", 2, ""), ("all", 1, "b"), ("all", 0, "a, b"), ("any", 1, ""), ("any", 0, "a, b")],
)
async def test_engines_decide(rule: Any, number: int, lacks: str, serve: bool) -> None:
    models = Models(*[READY] * number, *[STARTING] * (2 - number))
    made = Readiness(models, rule, Draining(), tiers_serve=lambda: serve)  # type: ignore[arg-type]
    assert await status(made) == ((503, f"Not ready: {lacks}.") if lacks else (200, ""))


async def test_tiers_decide_and_a_model_is_by_itself() -> None:
    serve, draining = False, Draining()
    models: Any = Models(STARTING, READY)
    made = Readiness(models, "tiers", draining, tiers_serve=lambda: serve)
    assert (await status(made))[0] == 503
    serve = True
    assert (await status(made))[0] == 200
    assert (await status(made, "a"))[0] == 503
    assert (await status(made, "b"))[0] == 200
    draining.begin()
    for model in (None, "b"):
        assert await status(made, model) == (503, "Not ready: the server is stopping.")
