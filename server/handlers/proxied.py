"""The routes whose answers aren't cached: requests that pass through to an engine."""

import re

from aiohttp import hdrs, web

from server.engine.models import ServedModels
from server.handlers.forwarding import Forwarding, forward
from server.handlers.model_routing import route_to_model
from server.handlers.websocket import forward_websocket, is_websocket_upgrade
from server.telemetry.served import OWN
from server.web.request import HttpRequest, Reply
from server.web.responses import error_response

# An engine keeps a Response under the id that it gave.
_kept_answer = re.compile(r"/v1/responses/([^/]+)").match


class ProxiedRoutes:
    """The handlers of these routes, which take `?model=NAME`.

    Args:
        models: the models that requests name.
        max_prompts: how many prompts one request may have.
    """

    def __init__(self, models: ServedModels, max_prompts: int) -> None:
        self._models, self._max_prompts = models, max_prompts

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
        kept = _kept_answer(http.path)
        forwarding = Forwarding(model=named.name, body=body, kept_id=kept and kept[1])
        return await forward(http, upstreams, forwarding)


async def refuse_adapters(_: HttpRequest) -> web.Response:
    """Refuse to change a running engine: keys would no longer identify what generates answers."""
    return error_response(
        403, "Adapters are those that the configuration names; they can't be changed while it runs."
    )
