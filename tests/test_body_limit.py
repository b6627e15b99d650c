"""No route of the server reads a body over the bound, whatever it makes of the error."""

import asyncio
import re

import httpx
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.routing import Route

from sana_app.body_limit import BodyLimit


async def a_route_that_hides_why(request):
    try:
        return JSONResponse(len(await request.body()))
    except Exception:  # as FastAPI does
        return JSONResponse("There was an error parsing the body", 400)


@pytest.mark.parametrize("streamed", [False, True])
def test_no_route_reads_a_body_over_the_bound(streamed):
    app = Starlette(routes=[Route("/", a_route_that_hides_why, methods=["POST"])], middleware=[Middleware(BodyLimit, most=4096)])
    pulled = []

    async def parts(count):
        for _ in range(count):
            pulled.append(1024)
            yield b"x" * 1024

    async def ask(count):
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://testserver") as client:
            return await client.post("/", content=parts(count) if streamed else b"x" * (1024 * count))

    assert asyncio.run(ask(4)).json() == 4096
    pulled.clear()
    reply = asyncio.run(ask(1000))
    assert reply.status_code == 413 and len(pulled) <= 5
    assert re.fullmatch("body: at most 4096 bytes are wanted, got (more|1024000 bytes); send less at once", reply.json()["error"])
