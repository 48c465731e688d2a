"""Chat, validation, changes of state, stop and restart at random, all at once, for as long as POC_STRESS_SECONDS says.

Every distance is the one computed alone and every text the one generated alone, bit for bit; every wait ends.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
from nodes import POW, Alone, begin, checked, claim, posted, running, status
from web import CHAT, TIMEOUT, chat, events, eventually, pieces, text_of

pytest_plugins = ["round_fixtures"]

SECONDS = float(os.environ.get("POC_STRESS_SECONDS", "12"))
SEED = int(os.environ.get("POC_STRESS_SEED", "0"))
LIVES = 3
"""Nodes, one after another."""
NONCES = range(48)
BLOCKS = [{"block_hash": "block 0"}, {"block_hash": "block 1", "use_random_projection": True}]
BODIES = [chat(f"What is {n} times {n}?", max_tokens=4 + 3 * n, stream=n % 2 == 0) for n in range(6)]


class Truth:
    """What is computed and generated alone."""

    def __init__(self, model_dir: Path, alone: Alone) -> None:
        self._alone = alone
        self.distances = {
            block["block_hash"]: dict(zip(NONCES, alone.distances(NONCES, **block), strict=True)) for block in BLOCKS
        }
        with running(model_dir) as (_, http):
            self.texts = [_said(http.post(CHAT, json=body)) for body in BODIES]

    def check(self, generated: dict[str, dict[int, float]]) -> None:
        """Every distance that a node said it found."""
        for block in BLOCKS:
            known, found = self.distances[block["block_hash"]], generated[block["block_hash"]]
            new = sorted(set(found) - set(known))
            known.update(zip(new, self._alone.distances(new, **block), strict=True))
            assert found == {nonce: known[nonce] for nonce in found}


def _said(answer: httpx2.Response) -> str | None:
    """What a chat says; None if it ended in an error."""
    if not answer.headers["content-type"].startswith("text/event-stream"):
        return text_of(answer)
    *lines, done = [line for line in answer.text.splitlines() if line]
    assert done == "data: [DONE]"
    chunks = list(events(iter(lines)))
    return None if any("error" in chunk for chunk in chunks) else "".join(pieces(iter(chunks)))


class Life:
    """One node, and everyone who uses it until ``ending`` is set."""

    def __init__(self, http: httpx2.Client, truth: Truth, seed: int) -> None:
        self._http, self._truth, self._seed = http, truth, seed
        self.ending = threading.Event()
        self.closing = threading.Event()
        self._lock = threading.Lock()
        self.outcomes: Counter[str] = Counter()
        self.generated: dict[str, dict[int, float]] = {block["block_hash"]: {} for block in BLOCKS}

    def _count(self, outcome: str) -> None:
        with self._lock:
            self.outcomes[outcome] += 1

    def play(self, body: Callable[[random.Random], str], number: int) -> None:
        """Do ``body`` again and again, and count what comes of it."""
        generator = random.Random(f"{self._seed} {number}")
        while not self.ending.is_set():
            try:
                self._count(body(generator))
            except httpx2.TransportError:
                if not self.closing.is_set():
                    raise
                self._count("cut off")

    def ask(self, generator: random.Random) -> str:
        """A user."""
        number = generator.randrange(len(BODIES))
        answer = self._http.post(CHAT, json=BODIES[number])
        if answer.status_code != 200:
            assert answer.status_code in (429, 503), answer.text
            assert int(answer.headers["retry-after"]) > 0
            self.ending.wait(0.02)
            return "chat refused"
        said = _said(answer)
        if said is None:
            assert self.closing.is_set(), answer.text
            return "chat cut off"
        assert said == self._truth.texts[number]
        return "chat"

    def validate(self, generator: random.Random) -> str:
        """A validator that waits for its verdict, or asks for it again and again."""
        block = generator.choice(BLOCKS)["block_hash"]
        nonces = generator.sample(NONCES, generator.randint(1, 14))
        body = claim(nonces, block_hash=block)
        submitter = {"x-forwarded-for": f"10.0.0.{generator.randrange(3)}"}
        if generator.random() < 0.5:
            answer = self._http.post(f"{POW}/validate", json=body, headers=submitter)
        else:
            answer = self._http.post(f"{POW}/validate", params={"wait": "false"}, json=body, headers=submitter)
            deadline, place = time.monotonic() + TIMEOUT, answer.headers.get("location", "")
            while answer.status_code == 202:
                assert time.monotonic() < deadline, "no verdict"
                self.ending.wait(0.01)
                answer = self._http.get(place)
                if answer.status_code == 404:  # so few verdicts are kept that others have taken its place
                    return "verdict forgotten"
        if answer.status_code != 200:
            # Another block's, none begun, ended meanwhile, too many, or shutting down.
            assert answer.status_code in (400, 409, 429, 503), answer.text
            assert answer.status_code != 503 or self.closing.is_set(), answer.text
            self.ending.wait(0.01)
            return "validation refused"
        expected = [self._truth.distances[block][nonce] for nonce in nonces]
        assert answer.json()["distances"] == expected
        return "validation"

    def operate(self, generator: random.Random) -> str:
        """Whoever begins and ends rounds and changes their phases."""
        action = generator.choice(["/phase/generate", "/phase/validate", "/stop", "begin", "begin", "watch", "watch"])
        if action == "watch":
            self.ending.wait(generator.random() * 0.3)
            return self.watch()
        if self.closing.is_set():
            return "nothing to operate"
        if action == "begin":
            path = generator.choice(["/init", "/init/generate", "/init/validate", "/init/validate"])
            changes = generator.choice(BLOCKS)
            body = {**claim(()), **changes, "r_target": 1.4, "node_count": 1, "batch_size": 4, "seq_len": 16}
            self._http.post(f"{POW}/stop")
            answer = self._http.post(POW + path, json=body)
        else:
            answer = self._http.post(POW + action)
        if answer.status_code == 503:
            assert self.closing.is_set(), answer.text
            return "operation refused"
        assert answer.status_code in (200, 400, 409), answer.text
        return action

    def watch(self) -> str:
        """What the status says is right."""
        report = status(self._http)
        if report["config"] is None:
            return "nothing to see"
        seen = self.generated[report["config"]["block_hash"]]
        for nonce, distance in zip(report["valid_nonces"], report["valid_distances"], strict=True):
            assert seen.setdefault(nonce, distance) == distance
        return "generated" if report["valid_nonces"] else "nothing to see"


@pytest.mark.timeout(LIVES * (SECONDS + 6 * TIMEOUT))
def test_everything_at_once(model_dir: Path, alone: Alone, record_property: Any) -> None:
    truth = Truth(model_dir, alone)
    total: Counter[str] = Counter()
    for number in range(LIVES):
        with running(model_dir, max_in_flight=6, max_queued_nonces=40, drain_seconds=0.02) as (node, http):
            life = Life(http, truth, SEED * LIVES + number)
            bodies = [life.ask] * 8 + [life.validate] * 4 + [life.operate]
            with ThreadPoolExecutor(len(bodies)) as pool:
                players = [pool.submit(life.play, body, place) for place, body in enumerate(bodies)]
                deadline = time.monotonic() + SECONDS / LIVES
                while time.monotonic() < deadline and not any(player.done() for player in players):
                    life.ending.wait(0.05)
                if number < LIVES - 1 and not any(player.done() for player in players):  # this one is ended in full use
                    life.closing.set()
                    node.close()
                life.ending.set()
                players[-1].result(2 * TIMEOUT)
                if not life.closing.is_set():
                    posted(http, "/stop")  # users that were paused go on
                for player in players:
                    player.result(2 * TIMEOUT)
            total += life.outcomes
            truth.check(life.generated)
            if life.closing.is_set():
                continue
            # The last node serves and proves as if nothing had been.
            begin(http, **BLOCKS[1])
            checked(http, 8)
            posted(http, "/phase/validate")
            verdict = posted(http, "/validate", claim([5, 1], block_hash="block 1"))
            assert verdict["distances"] == [truth.distances["block 1"][nonce] for nonce in (5, 1)]
            eventually(lambda http=http: http.post(CHAT, json=BODIES[0]).status_code == 200)
            posted(http, "/stop")
            eventually(lambda http=http: status(http)["queued_nonces"] == 0)
            assert http.get("/health").status_code == 200
            assert node.inference.restarts == 0
    record_property("outcomes", dict(total))
    assert {"chat", "chat refused", "validation", "validation refused", "generated"} <= set(total), total
