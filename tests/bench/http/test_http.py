"""The benchmark's clients before an app of a few lines, and its report."""

from __future__ import annotations

import asyncio
from typing import Any
from urllib.parse import urlsplit

import pytest
from bench_conditions import conditions
from web import serving

from bench.http.__main__ import AT_ONCE, DELAYED, report
from bench.http.load import Waits, long_prompts, never_reading, requests_per_second, silent, waits_of_a_client


class App:
    """Answers as a node does: with three tokens."""

    def __init__(self, status: int = 200) -> None:
        self.bodies: list[bytes] = []
        self._status = status

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        message, body = {"more_body": True}, b""
        while message.get("more_body"):
            message = await receive()
            body += message.get("body", b"")
        self.bodies.append(body)
        await send({"type": "http.response.start", "status": self._status, "headers": []})
        for _ in range(3 if b'"stream": true' in body else 0):
            await send({"type": "http.response.body", "body": b'data: {"content": "x"}\n\n', "more_body": True})
            await asyncio.sleep(0.002)
        await send({"type": "http.response.body", "body": b""})


def test_a_client_beside_others() -> None:
    app = App()
    with serving(app) as url:
        port = urlsplit(url).port
        assert port is not None
        with never_reading(port, 3, 8), silent(port, 3), long_prompts(port, 1, 10_000):
            waits = waits_of_a_client(port, 4, 8)
        assert requests_per_second(port, 2, 0.1) > 0
    assert (len(waits.first), len(waits.between), len(waits.health), waits.failed) == (4, 8, 4, 0)
    assert max(map(len, app.bodies)) > 9_000
    figures = waits.figures()
    assert figures["between_p50_ms"] >= 1.5
    assert figures["first_p50_ms"] > 0


def test_refusals_are_counted() -> None:
    with serving(App(status=429)) as url:
        waits = waits_of_a_client(urlsplit(url).port or 0, 3, 8)
    assert (waits.failed, waits.first) == (3, [])


@pytest.mark.parametrize("failed", [0, 2])
def test_the_report(failed: int) -> None:
    waits = Waits(first=[0.01, 0.02], between=[0.001, 0.003], health=[0.001, 0.004], failed=failed)
    text = report(
        {
            **conditions(),
            "answers": {name: {**waits.figures(), "requests_per_second": 12.5} for name in (DELAYED, AT_ONCE)},
            "loads": {"alone": waits.figures()},
        }
    )
    assert f"| {AT_ONCE} | 15 | 2 | 2.98 | 2.5 | 4 | 12.5 |" in text
    assert f"| alone | 15 | 2 | 2.98 | 2.5 | 4 | {failed} |" in text
