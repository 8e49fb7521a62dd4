"""Which endpoint answers which request, and which access check precedes it."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from aiohttp import web

from server.admin.handler import AdminHandler
from server.handlers.cached import CachedRoutes
from server.handlers.engine_metrics import EngineMetrics
from server.handlers.model_list import PATH as MODELS
from server.handlers.model_list import ModelList, is_one_model
from server.handlers.proxied import ProxiedRoutes, refuse_adapters
from server.handlers.readiness import Readiness
from server.pages.openapi_handler import OpenApiHandler
from server.pages.static_files import ADMIN_PAGES, FRONT_PAGES, StaticFiles
from server.protocol.routes import CACHED_ROUTES, REFUSED_PATHS
from server.web.access import AccessCheck, AccessControl, allow_anyone
from server.web.cors import answer_preflight, with_cors
from server.web.middleware import Middleware, own, read_only
from server.web.request import Endpoint, HttpRequest, Traced


@dataclass(frozen=True, slots=True)
class Handlers:
    """The handlers of requests to the front."""

    cached: CachedRoutes
    proxied: ProxiedRoutes
    readiness: Readiness
    model_list: ModelList
    metrics: Endpoint
    engine_metrics: EngineMetrics
    overview: Endpoint
    document: OpenApiHandler


class Router:
    """Makes the endpoints of the front.

    Args:
        handlers: of the front.
        middleware: surrounds all of them.
        access: decides who is allowed.
        traced: adds spans to endpoints that use engines.
        open_metrics: whether anyone may read metrics.
    """

    def __init__(
        self,
        handlers: Handlers,
        middleware: Middleware,
        access: AccessControl,
        traced: Traced,
        *,
        open_metrics: bool,
    ) -> None:
        self._handlers, self._middleware, self._access = handlers, middleware, access
        self._traced, self._open_metrics = traced, open_metrics

    def front(self, allowed_origins: tuple[str, ...]) -> Endpoint:
        """Return the endpoint of all requests to the front."""
        engine, ours = self._engine_endpoints(), self._own_endpoints() | self._page_endpoints()
        wrap, access, handlers = self._middleware.wrap, self._access, self._handlers
        one_model = wrap(own(handlers.model_list.one), access.require_tenant)
        other = self._traced(wrap(handlers.proxied.answer, access.for_request_path))

        def endpoint(http: HttpRequest) -> Awaitable[web.StreamResponse]:
            # Most paths are found as they were sent, which spares parsing the URL.
            found = engine.get((http.method, http.raw_path)) or engine.get((http.method, http.path))
            if found is None:
                is_one = http.method == "GET" and is_one_model(http.path)
                found = ours.get(http.path) or (one_model if is_one else other)
            return found(http)

        preflight = wrap(own(answer_preflight), allow_anyone)
        return with_cors(allowed_origins, endpoint, preflight)

    def _read_only(self, endpoint: Endpoint, check: AccessCheck) -> Endpoint:
        return self._middleware.wrap(read_only(own(endpoint)), check)

    def _engine_endpoints(self) -> dict[tuple[str, str], Endpoint]:
        """Return the endpoints of those engine routes that aren't just passed through."""
        wrap, access, handlers = self._middleware.wrap, self._access, self._handlers
        endpoints = {
            ("POST", path): self._traced(
                wrap(handlers.cached.answer, access.for_engine_path(path)), path
            )
            for path in CACHED_ROUTES
        }
        endpoints |= {
            ("POST", path): wrap(own(refuse_adapters), access.require_tenant)
            for path in REFUSED_PATHS
        }
        endpoints["GET", MODELS] = wrap(own(handlers.model_list.all), access.require_tenant)
        return endpoints

    def _own_endpoints(self) -> dict[str, Endpoint]:
        """Return the endpoints of our own paths that serve no page."""
        handlers = self._handlers
        readers = allow_anyone if self._open_metrics else self._access.require_operator

        async def health(_: HttpRequest) -> web.Response:
            return web.Response()

        return {
            "/health": self._read_only(health, allow_anyone),
            "/ready": self._read_only(handlers.readiness.answer, allow_anyone),
            "/metrics": self._read_only(handlers.metrics, readers),
            "/metrics/engine": self._middleware.wrap(
                read_only(handlers.engine_metrics.answer), readers
            ),
        }

    def _page_endpoints(self) -> dict[str, Endpoint]:
        """Return the endpoints of the pages, and of the JSON that they show."""
        files, known = StaticFiles(FRONT_PAGES), self._access.identify_tenant
        page = self._read_only(files.answer, allow_anyone)
        return dict.fromkeys(files.paths, page) | {
            "/openapi.json": self._read_only(self._handlers.document.answer, known),
            "/overview": self._read_only(self._handlers.overview, known),
        }


def admin_endpoints(
    admin: AdminHandler, middleware: Middleware
) -> Callable[[AccessCheck], Endpoint]:
    """Return what makes an admin listener's endpoint; the pages' files need no key."""
    files = StaticFiles(ADMIN_PAGES)
    pages = middleware.wrap(read_only(own(files.answer)), allow_anyone)

    def endpoint_for(check: AccessCheck) -> Endpoint:
        api = middleware.wrap(own(admin.answer), check)
        return lambda http: (pages if http.path in files else api)(http)

    return endpoint_for
