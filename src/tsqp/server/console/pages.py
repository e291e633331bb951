"""The page and its parts: files of the package, read when the server starts, and found by their whole path alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

if TYPE_CHECKING:
    from tsqp.server.service import Service

TYPES = {
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "svg": "image/svg+xml",
    "png": "image/png",
}
FIRST = "index.html"
# A script that an answer may have in it cannot run, whatever the page does with it; nothing comes from elsewhere.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


@dataclass(frozen=True)
class Page:
    """One file."""

    content: bytes
    type: str


def read_pages() -> Mapping[str, Page]:
    """All of them by path: ``/``, and ``/console/NAME`` of each file whose type is known."""
    pages: dict[str, Page] = {}
    for file in (files(__package__) / "static").iterdir():
        kind = TYPES.get(file.name.rpartition(".")[2])
        if kind is not None and file.is_file():
            pages[f"/console/{file.name}"] = Page(file.read_bytes(), kind)
    return {"/": pages[f"/console/{FIRST}"], **pages}


async def show(service: Service, request: Request) -> Response:
    """The page at a path. It is the same for everybody: there is nothing of a user in it."""
    page = None if service.console is None else service.console.pages.get(request.url.path)
    if page is None:
        raise HTTPException(404)
    return Response(page.content, headers={**HEADERS, "content-type": page.type})
