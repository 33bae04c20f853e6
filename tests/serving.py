"""The server of the drawing page in a thread of the tests, and requests to it."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading

from aiohttp import web

from sbir_ray.search import server
from sbir_ray.search.searcher import Searcher


class Serving:
    """A server in a thread for the length of a ``with`` block; gives its port."""

    def __init__(self, searcher: Searcher) -> None:
        self.app = server.application(searcher)
        self.loop = asyncio.new_event_loop()
        self.begun = threading.Event()
        self.thread = threading.Thread(target=self._run)

    def _run(self):
        self.loop.run_until_complete(self._serve())
        self.loop.close()

    async def _serve(self):
        self.ended = asyncio.Event()
        runner = web.AppRunner(self.app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, server.HOST, 0).start()
        self.port = runner.addresses[0][1]
        self.begun.set()
        await self.ended.wait()
        await runner.cleanup()

    def __enter__(self):
        self.thread.start()
        assert self.begun.wait(30)
        return self.port

    def __exit__(self, *_):
        self.loop.call_soon_threadsafe(self.ended.set)
        self.thread.join()


JSON = {"Content-Type": "application/json"}


def ask(port, method, path, body=None, **headers):
    """Status, headers and body of an answer."""
    connection = http.client.HTTPConnection(server.HOST, port, timeout=30)
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, data, {**(JSON if body is not None else {}), **named})
    answer = connection.getresponse()
    found = answer.read()
    connection.close()
    kind = answer.headers["Content-Type"]
    return answer.status, answer.headers, json.loads(found) if "json" in kind else found
