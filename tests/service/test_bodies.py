"""The bodies of the PoC routes: whose is read next."""

from __future__ import annotations

import asyncio
import threading

from pydantic import BaseModel
from starlette.requests import Request
from starlette.types import Message

from poc_kernels.service.wires.bodies import Bodies, always


class Body(BaseModel):
    name: str


def test_clients_take_turns_to_have_their_bodies_read() -> None:
    """A client whose bodies take seconds to parse delays others by one of them."""
    read: list[str] = []

    async def main() -> None:
        bodies, free = Bodies(), threading.Event()

        def then(body: Body) -> None:
            free.wait()
            read.append(body.name)

        async def post(address: str, name: str) -> None:
            async def receive() -> Message:
                return {"type": "http.request", "body": b'{"name": "%s"}' % name.encode()}

            scope = {"type": "http", "method": "POST", "headers": [], "client": (address, 1)}
            await bodies.read(Request(scope, receive), always(Body), then)

        names = [("::1", "first"), ("192.0.2.1", "a1"), ("192.0.2.1", "a2"), ("192.0.2.1", "a3"), ("192.0.2.2", "b1")]
        posts = [asyncio.create_task(post(*each)) for each in names]
        await asyncio.sleep(0)  # each has come to where it waits for its turn
        free.set()
        await asyncio.gather(*posts)

    asyncio.run(main())
    assert read == ["first", "a1", "b1", "a2", "a3"]
