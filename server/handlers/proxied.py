"""The routes whose answers aren't cached: `/ready`, and requests that pass through to an engine."""

import orjson
from aiohttp import hdrs, web

from server.engine.models import Models
from server.engine.supervisor import EngineState
from server.handlers.forwarding import Forwarding, forward
from server.handlers.model_routing import route_to_model
from server.handlers.websocket import forward_websocket, is_websocket_upgrade
from server.protocol.model_names import UnknownModelError
from server.telemetry.served import OWN
from server.web.request import HttpRequest, Reply
from server.web.responses import RETRY_AFTER_S, error_body, error_response


class ProxiedRoutes:
    """The handlers of these routes, which all take `?model=NAME`.

    Args:
        models: the models that requests name.
        max_prompts: how many prompts one request may have.
    """

    def __init__(self, models: Models, max_prompts: int) -> None:
        self._models, self._max_prompts = models, max_prompts

    async def ready(self, http: HttpRequest) -> web.Response:
        """Answer 200 if every model is ready, or the one that the query names; else 503.

        The body has the states. Hits are answered in any state.
        """
        if name := http.query.get("model"):
            try:
                models = [self._models.get(self._models.names().resolve(name).name)]
            except UnknownModelError:
                # The names of models need a key, and this route needs none.
                return error_response(404, "There is no such model.", param="model")
        else:
            models = [*self._models.all]
        states = {model.name: model.state for model in models}
        body = {"models": states}
        if all(state is EngineState.READY for state in states.values()):
            return web.Response(body=orjson.dumps(body), content_type="application/json")
        not_ready = ", ".join(n for n, state in states.items() if state is not EngineState.READY)
        error = orjson.loads(error_body(503, f"Not ready: {not_ready}."))
        return web.Response(
            status=503,
            body=orjson.dumps(error | body),
            content_type="application/json",
            headers={"Retry-After": str(RETRY_AFTER_S)},
        )

    async def metrics(self, http: HttpRequest) -> Reply:
        """Answer with vLLM's own metrics, of one model."""
        model = self._models.names().resolve(http.query.get("model")).name
        forwarding = Forwarding(path="/metrics")
        return await forward(http, self._models.upstreams(model), forwarding)

    async def answer(self, http: HttpRequest) -> Reply:
        """Pass any other request through.

        Raises:
            UnknownModelError: it names an unknown model.
            BadRequestError: its body can't be sent to an engine, or has too many prompts.
        """
        if http.method == hdrs.METH_CONNECT or not http.rel_url.raw_path_qs.startswith("/"):
            # A CONNECT has no body for an engine, and `*` is no path.
            text = "A request needs a path here, and there are no tunnels."
            return error_response(400, text), OWN
        named, body, id_ = await route_to_model(http, self._models.names(), self._max_prompts)
        if id_ is not None or (body is None and http.body_exists):
            http.take_id_from_body(id_)
        upstreams = self._models.upstreams(named.name)
        if is_websocket_upgrade(http):
            return await forward_websocket(http, upstreams, named.name)
        return await forward(http, upstreams, Forwarding(model=named.name, body=body))


async def refuse_adapters(_: HttpRequest) -> web.Response:
    """Refuse to change a running engine: keys would no longer identify what generates answers."""
    return error_response(
        403, "Adapters are those that the configuration names; they can't be changed while it runs."
    )
