"""Users' requests in a server, as a worker in another process sees them."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette")

from poc_kernels.engines.vllm.arrivals import Arrivals, ArrivalsOfServer, arrivals_at

LOOK = """
import sys
from poc_kernels.engines.vllm.arrivals import ArrivalsOfServer

seen = ArrivalsOfServer(sys.argv[1])
print("open", flush=True)
for _ in sys.stdin:
    print(seen(), flush=True)
"""


async def never(*_: Any) -> Any:
    raise AssertionError


def scope(kind: str = "http", path: str = "/user") -> dict[str, Any]:
    return {"type": kind, "path": path}


def is_user(of: Any) -> bool:
    return bool(of["path"] == "/user")


def test_the_memory_of_the_byte_is_taken_at_once() -> None:
    """A store to memory that a full /dev/shm cannot give would end the process."""
    arrivals = Arrivals()
    assert os.stat(arrivals.path).st_blocks > 0
    arrivals.opened()


def test_another_process_sees_who_is_there() -> None:
    arrivals = Arrivals()
    command = [sys.executable, "-c", LOOK, arrivals.path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdin is not None
        assert worker.stdout is not None
        pipe = worker.stdin, worker.stdout

        def seen() -> str:
            pipe[0].write("\n")
            pipe[0].flush()
            return pipe[1].readline().strip()

        assert pipe[1].readline() == "open\n"
        arrivals.opened()
        arrivals.opened()
        assert not os.path.exists(arrivals.path)
        assert seen() == "False"
        inside: list[str] = []

        async def app(of: Any, receive: Any, send: Any) -> None:
            inside.append(seen())
            if of.get("inner"):
                await counted({**of, "inner": False}, receive, send)
                inside.append(seen())
            if of.get("fails"):
                raise RuntimeError("the app failed")

        counted = arrivals.counted(app, is_user)
        asyncio.run(counted({**scope(), "inner": True}, never, never))
        assert inside == ["True"] * 3  # until the last of two has its answer
        assert seen() == "False"
        with pytest.raises(RuntimeError, match="the app failed"):
            asyncio.run(counted({**scope("websocket"), "fails": True}, never, never))
        assert seen() == "False"
        inside.clear()
        for other in (scope(path="/health"), scope("lifespan")):
            asyncio.run(counted(other, never, never))
        assert inside == ["False"] * 2
        pipe[0].close()


def test_where_nothing_can_be_seen_users_are_there_at_all_times(tmp_path: Path) -> None:
    assert arrivals_at(None)()
    assert arrivals_at(str(tmp_path / "gone"))()
    with pytest.raises(FileNotFoundError):
        ArrivalsOfServer(str(tmp_path / "gone"))
    arrivals = Arrivals()
    try:
        assert not arrivals_at(arrivals.path)()
    finally:
        arrivals.opened()
