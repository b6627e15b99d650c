"""A bound on every request body that the server reads, whichever route it is for."""

from __future__ import annotations

from starlette.responses import JSONResponse

ANY_BODY_BYTES = 16 * 1024 * 1024  # of a request to any route, Gradio's own included


class BodyTooLong(Exception):
    """Ends the reading of a body; BodyLimit answers in its place."""


class BodyLimit:
    """ASGI middleware: no request body longer than `most` bytes is read, whichever route it is for.

    Gradio bounds uploaded files but not its JSON bodies, which it holds and parses whole. A route may turn the error
    of its own reading into any answer (FastAPI says 400): what it sends after the bound was passed is thrown away.
    """

    def __init__(self, app, most: int = ANY_BODY_BYTES):
        self.app, self.most = app, most

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        length = dict(scope["headers"]).get(b"content-length", b"")
        if length.isdigit() and int(length) > self.most:
            return await self.refuse(f"{int(length)} bytes", scope, receive, send)
        read, answered = 0, False

        async def bounded():
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.most:
                raise BodyTooLong
            return message

        async def until_refused(message):
            nonlocal answered
            if read <= self.most or answered:
                answered = True
                await send(message)

        try:
            await self.app(scope, bounded, until_refused)
        except Exception:
            if read <= self.most or answered:
                raise
        if read > self.most and not answered:
            await self.refuse("more", scope, receive, send)

    async def refuse(self, came: str, scope, receive, send) -> None:
        message = f"body: at most {self.most} bytes are wanted, got {came}; send less at once"
        await JSONResponse({"error": message}, 413, {"connection": "close"})(scope, receive, send)
