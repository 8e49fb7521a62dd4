"""Which handler answers which request."""

from collections.abc import Awaitable, Callable, Mapping

from aiohttp import web
from prometheus_client import generate_latest

from server.admin.handler import Admin
from server.engine.models import Models
from server.handlers.cached import CachedRoutes
from server.handlers.model_list import PATH as MODELS
from server.handlers.model_list import ModelList, is_one_model
from server.handlers.proxied import ProxiedRoutes, refuse_adapters
from server.pages.document import Document
from server.pages.files import ADMIN, Files
from server.pages.overview import Overview
from server.protocol.routes import CACHED_ROUTES, REFUSED_PATHS
from server.telemetry.metrics import Metrics
from server.web.access import AccessCheck, AccessControl, allow_anyone
from server.web.middleware import read_only
from server.web.request import Handler, HttpRequest, Traced

_Wrapped = Callable[[Handler, AccessCheck], Handler]


_Routes = dict[tuple[str, str], Handler]


def _owned(
    others: ProxiedRoutes, wrapped: _Wrapped, metrics: Metrics, readers: AccessCheck
) -> dict[str, Handler]:
    """Return the handlers of our own paths for machines; `readers` may read metrics."""

    async def health(_: HttpRequest) -> web.Response:
        return web.Response()

    async def own_metrics(_: HttpRequest) -> web.Response:
        text = generate_latest(metrics.registry)
        return web.Response(body=text, headers={"Content-Type": "text/plain; version=0.0.4"})

    return {
        "/health": wrapped(read_only(health), allow_anyone),
        "/ready": wrapped(read_only(others.ready), allow_anyone),
        "/metrics": wrapped(read_only(own_metrics), readers),
        "/metrics/engine": wrapped(read_only(others.metrics), readers),
    }


def _pages(
    files: Files, overview: Overview, about: Document, wrapped: _Wrapped, door: AccessControl
) -> dict[str, Handler]:
    """Return the handlers of what browsers ask for."""
    return dict.fromkeys(files.paths, wrapped(read_only(files.answer), allow_anyone)) | {
        "/openapi.json": wrapped(read_only(about.answer), door.identify_tenant),
        "/overview": wrapped(read_only(overview.answer), door.identify_tenant),
    }


def _routes(
    road: CachedRoutes, models: Models, wrapped: _Wrapped, traced: Traced, door: AccessControl
) -> _Routes:
    """Return the handlers of an engine's routes that aren't passed through."""
    routes = {
        ("POST", path): traced(wrapped(road.answer, door.for_engine_path(path)), path)
        for path in CACHED_ROUTES
    }
    routes |= {
        ("POST", path): wrapped(refuse_adapters, door.require_tenant) for path in REFUSED_PATHS
    }
    routes["GET", MODELS] = wrapped(ModelList(models).all, door.require_tenant)
    return routes


def _router(
    routes: _Routes,
    owned: Mapping[str, Handler],
    others: ProxiedRoutes,
    models: Models,
    wrapped: _Wrapped,
    traced: Traced,
    door: AccessControl,
) -> Handler:
    """Return the handler of all requests; `owned` are ours, whatever the method."""
    one = wrapped(ModelList(models).one, door.require_tenant)
    rest = traced(wrapped(others.answer, door.for_request_path))

    def route(http: HttpRequest) -> Awaitable[web.StreamResponse]:
        # Most paths are found as they were sent, which spares making URLs of them.
        handler = routes.get((http.method, http.raw_path)) or routes.get((http.method, http.path))
        if handler is None:
            is_one = http.method == "GET" and is_one_model(http.path)
            handler = owned.get(http.path) or (one if is_one else rest)
        return handler(http)

    return route


def _admin_door(admin: Admin, wrapped: _Wrapped) -> Callable[[AccessCheck], Handler]:
    """Return what makes the admin listeners' handlers: the pages' files need no key."""
    files = Files(ADMIN)
    open_to_all = wrapped(read_only(files.answer), allow_anyone)

    def handler(enter: AccessCheck) -> Handler:
        api = wrapped(admin.answer, enter)
        return lambda http: (open_to_all if http.path in files else api)(http)

    return handler
