"""The drawing page and its interface over HTTP, for this machine alone.

| request | what it gives |
| --- | --- |
| ``GET /`` | the page |
| ``GET /api/index`` | ``photos``, ``weights``, ``folder`` |
| ``POST /api/search`` | ``{"strokes": [[[x, y], ...], ...], "top": 24}``: ``found``, in order |
| ``POST /api/ranks`` | ``{"strokes": ..., "photo_id": id}``: ``ranks`` of the photo by stroke |
| ``GET /photos/ID`` | a photo, as it is stored |

Strokes are in any units, x to the right and y down. What is wrong with a request is told in
``{"error": ...}`` with a status of 400 or more.
"""

from __future__ import annotations

import asyncio
import json
import signal
import traceback
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.resources import files
from time import perf_counter
from typing import Any, TypeVar

from aiohttp import web

from sbir_ray.data.formats import strokes_from_json
from sbir_ray.data.strokes import Strokes
from sbir_ray.errors import UserError
from sbir_ray.search.searcher import Searcher

HOST = "127.0.0.1"
MAX_TOP = 200
MAX_STROKES = 500
MAX_BODY = 2 << 20
"""Bytes of a request."""
SECONDS = 10.0
"""Within which a request has to have been sent."""
WAITING = 32
"""Searches that may wait for their turn; more are turned away."""
_PAGE = {"": "text/html", "page.css": "text/css", "page.js": "text/javascript"}
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}

T = TypeVar("T")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
SEARCH: web.AppKey[_Search] = web.AppKey("search")


class _Search:
    """Searches one after another, beside the server."""

    def __init__(self, searcher: Searcher) -> None:
        self.searcher = searcher
        self.thread = ThreadPoolExecutor(1, "search")
        self.waiting = 0

    async def run(self, work: Callable[[], T]) -> T:
        """``work`` in its turn.

        Raises:
            web.HTTPServiceUnavailable: too many wait.
        """
        if self.waiting >= WAITING:
            raise web.HTTPServiceUnavailable(text="too many searches are waiting; try again")
        self.waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self.thread, work)
        finally:
            self.waiting -= 1


def application(searcher: Searcher) -> web.Application:
    """The server's routes."""
    app = web.Application(client_max_size=MAX_BODY, middlewares=[_guarded])
    app[SEARCH] = _Search(searcher)
    app.router.add_get("/api/index", _about)
    app.router.add_post("/api/search", _find)
    app.router.add_post("/api/ranks", _ranks)
    app.router.add_get("/photos/{photo_id}", _photo)
    app.router.add_get("/{name:(page\\.css|page\\.js)?}", _page)
    return app


def serve(searcher: Searcher, port: int, begun: Callable[[str], None]) -> None:
    """Serve until the process is asked to end (Ctrl-C, SIGTERM).

    Args:
        port: 0 for a free one.
        begun: called with the page's address.

    Raises:
        UserError: the port is taken.
    """
    asyncio.run(_serve(searcher, port, begun))


async def _serve(searcher: Searcher, port: int, begun: Callable[[str], None]) -> None:
    ended, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, ended.set)
    runner = web.AppRunner(application(searcher), access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    try:
        site = web.TCPSite(runner, HOST, port)
        try:
            await site.start()
        except OSError as error:
            raise UserError(
                f"--port {port}: cannot be used ({error.strerror}); choose another one, or 0"
            ) from error
        begun(f"http://{HOST}:{runner.addresses[0][1]}/")
        await ended.wait()
    finally:
        await runner.cleanup()


# --------------------------------------------------------------------------- who may ask


@web.middleware
async def _guarded(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Refuse what comes from other pages, and tell errors as JSON."""
    try:
        _refuse_strangers(request)
        response = await handler(request)
    except web.HTTPException as error:
        response = _told(error.status, error.text or error.reason)
    except TimeoutError:
        response = _told(408, f"the request took longer than {SECONDS:g} s to arrive")
    except UserError as error:
        response = _told(400, str(error))
    except Exception as error:  # a fault of this program's: the server goes on
        traceback.print_exc()
        response = _told(500, f"{type(error).__name__}: see what `sbir-ray serve` printed")
    response.headers.update(_HEADERS)
    return response


def _refuse_strangers(request: web.Request) -> None:
    """A page elsewhere may know this address, and may call itself by another name of it."""
    host = request.headers.get("Host", "")
    if host.rpartition(":")[0] not in (HOST, "localhost"):
        raise web.HTTPForbidden(text=f"{host}: this server is for this machine alone")
    origin = request.headers.get("Origin")
    if origin is not None and origin != f"http://{host}":
        raise web.HTTPForbidden(text=f"{origin}: another page may not ask")


def _told(status: int, text: str) -> web.Response:
    return web.json_response({"error": text}, status=status)


async def _body(request: web.Request) -> dict[str, Any]:
    if request.content_type != "application/json":
        raise web.HTTPUnsupportedMediaType(text="send JSON, as application/json")
    async with asyncio.timeout(SECONDS):
        data = await request.read()
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"request: not valid JSON ({error})") from error
    if not isinstance(found, dict):
        raise UserError('request: not an object; send {"strokes": [[[x, y], ...], ...]}')
    return found


def _strokes(body: dict[str, Any]) -> Strokes:
    strokes = strokes_from_json(body, "request")
    if len(strokes) > MAX_STROKES:
        raise UserError(f"request: more than {MAX_STROKES} strokes; simplify the drawing")
    return strokes


# --------------------------------------------------------------------------- answers


async def _page(request: web.Request) -> web.Response:
    name = request.match_info["name"]
    text = (files("sbir_ray.search") / "page" / (name or "page.html")).read_text("utf-8")
    return web.Response(text=text, content_type=_PAGE[name])


async def _about(request: web.Request) -> web.Response:
    search = request.app[SEARCH]
    fits = await search.run(search.searcher.refresh)
    index = search.searcher.index
    return web.json_response(
        {
            "photos": len(index),
            "weights": search.searcher.weights,
            "folder": str(index.folder),
            "fits": fits,
        }
    )


async def _find(request: web.Request) -> web.Response:
    body = await _body(request)
    strokes, top = _strokes(body), body.get("top", 24)
    if isinstance(top, bool) or not isinstance(top, int) or not 1 <= top <= MAX_TOP:
        raise UserError(f"request: top is a whole number from 1 to {MAX_TOP}")
    search = request.app[SEARCH]

    def find() -> dict[str, Any]:
        search.searcher.refresh()
        begun = perf_counter()
        hits = search.searcher.find(search.searcher.raster_of(strokes), top)
        return {
            "found": [hit._asdict() for hit in hits],
            "photos": len(search.searcher.index),
            "seconds": perf_counter() - begun,
        }

    return web.json_response(await search.run(find))


async def _ranks(request: web.Request) -> web.Response:
    body = await _body(request)
    strokes, photo_id = _strokes(body), body.get("photo_id")
    if not isinstance(photo_id, str):
        raise UserError("request: photo_id is missing")
    search = request.app[SEARCH]
    found = await search.run(partial(search.searcher.ranks, strokes, photo_id))
    if found is None:
        raise web.HTTPNotFound(text="no such photo")
    return web.json_response({"ranks": found})


async def _photo(request: web.Request) -> web.Response:
    image = request.app[SEARCH].searcher.index.image(request.match_info["photo_id"])
    if image is None:
        raise web.HTTPNotFound(text="no such photo")
    return web.Response(
        body=image,
        content_type=_kind(image),
        headers={"Cache-Control": "private, max-age=31536000, immutable"},
    )


def _kind(image: bytes) -> str:
    """Of a stored picture, by its first bytes."""
    if image.startswith(b"\x89PNG"):
        return "image/png"
    return "image/webp" if image[8:12] == b"WEBP" else "image/jpeg"
