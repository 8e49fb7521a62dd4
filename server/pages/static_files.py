"""The pages' HTML, CSS and JavaScript files, read once, and their Content-Security-Policy.

The policy forbids inline code and other origins. The files hold no data, so anybody may read them;
their scripts fetch all data with the key that the user enters.
"""

from collections.abc import Mapping
from pathlib import Path

from aiohttp import web

from server.pages.resource import ETagResource
from server.web.request import HttpRequest

_FOLDER = Path(__file__).with_name("static")
_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_PREFIX = "/pages/"
# Trusted types: no API of the DOM may turn text into HTML or script.
_POLICY = (
    "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "object-src 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS = {"Content-Security-Policy": _POLICY, "Referrer-Policy": "no-referrer"}

FRONT_PAGES = {"/": "home.html", "/docs": "docs.html"}
ADMIN_PAGES = {"/admin": "admin.html"}


class StaticFiles:
    """A handler of the files under `/pages/`, and of HTML pages at their own paths.

    Args:
        pages: the HTML files by path.
    """

    def __init__(self, pages: Mapping[str, str]) -> None:
        resources = {
            file.name: ETagResource(file.read_bytes(), _TYPES[file.suffix], _HEADERS)
            for file in sorted(_FOLDER.iterdir())
        }
        shared = {f"{_PREFIX}{n}": r for n, r in resources.items() if not n.endswith(".html")}
        self._by_path = shared | {path: resources[name] for path, name in pages.items()}

    def __contains__(self, path: str) -> bool:
        return path in self._by_path

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths of all files and pages."""
        return tuple(self._by_path)

    async def answer(self, http: HttpRequest) -> web.Response:
        """Answer a request for one of the paths."""
        return self._by_path[http.path].response(http)
