"""`/ready`: whether load balancers are to send requests here."""

from collections.abc import Callable

import orjson
from aiohttp import web

from server.config.schema import Ready
from server.engine.models import ServedModels
from server.engine.supervisor import EngineState
from server.process import Draining
from server.protocol.model_names import UnknownModelError
from server.web.request import HttpRequest
from server.web.responses import RETRY_AFTER_S, error_body, error_response


class Readiness:
    """The handler of `/ready`, which takes `?model=NAME`.

    Args:
        models: all of them.
        rule: what makes the server ready.
        draining: whether it is about to stop; then it isn't ready.
        tiers_serve: whether the tiers can be read, or never can.
    """

    def __init__(
        self,
        models: ServedModels,
        rule: Ready,
        draining: Draining,
        tiers_serve: Callable[[], bool],
    ) -> None:
        self._models, self._rule = models, rule
        self._draining, self._tiers_serve = draining, tiers_serve

    async def answer(self, http: HttpRequest) -> web.Response:
        """Answer 200 if the server is ready by its rule, or the model that the query names; or 503.

        The body has the states of the models. Hits are answered in any state.
        """
        rule = self._rule
        if name := http.query.get("model"):
            rule = "all"
            try:
                models = [self._models.get(self._models.names().resolve(name).name)]
            except UnknownModelError:
                # The names of models need a key, and this route needs none.
                return error_response(404, "There is no such model.", param="model")
        else:
            models = [*self._models.all]
        states = {model.name: model.state for model in models}
        body = {"models": states}
        lacks = "the server is stopping" if self._draining.has_begun else self._lacks(rule, states)
        if lacks is None:
            return web.Response(body=orjson.dumps(body), content_type="application/json")
        error = orjson.loads(error_body(503, f"Not ready: {lacks}."))
        return web.Response(
            status=503,
            body=orjson.dumps(error | body),
            content_type="application/json",
            headers={"Retry-After": str(RETRY_AFTER_S)},
        )

    def _lacks(self, rule: Ready, states: dict[str, EngineState]) -> str | None:
        """Return what a rule still needs, if anything."""
        if rule == "tiers":
            return None if self._tiers_serve() else "the tiers are being opened"
        not_ready = [name for name, state in states.items() if state is not EngineState.READY]
        if not not_ready or (rule == "any" and len(not_ready) < len(states)):
            return None
        return ", ".join(not_ready)
