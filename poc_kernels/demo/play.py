"""The round itself: what the chain's node, a validator, users and cheats do, one after the other, and what they see."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import theory
from .client import QUESTIONS, Chatter, Node, chatting
from .receiver import Receiver
from .results import Band, Check, Results, Sample
from .server import Server
from .show import Show

EARLIER_HASH = "0x00000000000000000001a2b3c4d5e6f7"
BLOCK_HASH = "0x0000000000000000000263f1c9e3a7d5"
UNKNOWN_HASH = "0x00000000000000000000ffffffffffff"
EARLIER_HEIGHT = 1_000_000
BLOCK_HEIGHT = EARLIER_HEIGHT + 1
PUBLIC_KEY = "demo-node"
OTHER_KEY = "another-node"
FRAUD_THRESHOLD = 0.01

_FAR = 10**9
"""First nonce of the survey; no round of the demonstration comes so far."""
_FARTHER = 2 * _FAR
"""First forged nonce."""
_FARTHEST = 3 * _FAR
"""First nonce of the survey that sets r_target."""
_EVERY_NONCE = 2.0
"""An r_target that all distances are below."""
_LEAST_P = 1e-6
"""Agreement with theory is denied only to what happens by chance once in a million times."""
_POLL_SECONDS = 0.25
_CALLBACK_SECONDS = 30.0


@dataclass(frozen=True)
class Plan:
    """How long and how much.

    Args:
        idle_seconds: chats before the round.
        generate_seconds: least time in GENERATING, which goes on until ``proofs`` are found.
        generate_most_seconds: most time in GENERATING, of either round.
        validate_seconds: after so long no further batch is sent, of the honest ones and in each survey, once two were.
        proofs: least valid nonces to find; at least one batch.
        earlier: nonces checked in the round of the block before, the best of which are replayed.
        calibrate: nonces recomputed to set r_target, where geometry does not.
        survey: nonces recomputed for the distribution of distances.
        batch: nonces of a proof batch.
        rows: of every forward; less of them let tokens of chats pass sooner.
        seq_len: positions of a nonce's inputs.
        share: of nonces that are to be valid; sets r_target.
        users, max_tokens: chats at once, and the most tokens of an answer.
    """

    idle_seconds: float = 6.0
    generate_seconds: float = 12.0
    generate_most_seconds: float = 300.0
    validate_seconds: float = 20.0
    proofs: int = 64
    earlier: int = 256
    calibrate: int = 128
    survey: int = 512
    batch: int = 32
    rows: int = 16
    seq_len: int = 64
    share: float = 0.2
    users: int = 3
    max_tokens: int = 32


class Play:
    """Plays the demonstration against a server and fills in the results.

    Raises:
        httpx2.HTTPError, ServerFailedError: the server does not answer, or not as a server does; from every method.
    """

    def __init__(
        self, plan: Plan, server: Server, node: Node, receiver: Receiver, users: list[Chatter], results: Results,
        show: Show, clock: Callable[[], float],
    ) -> None:  # fmt: skip
        self.plan = plan
        self.server = server
        self.node = node
        self.receiver = receiver
        self.users = users
        self.results = results
        self.show = show
        self.clock = clock
        self._state = "IDLE"
        self._since = clock()
        self._earlier: list[tuple[float, int]] = []
        self._round: dict[str, Any] = {}

    def play(self) -> None:
        """The whole of it."""
        self.idle()
        if not self.results.geometric:
            self.calibrating()
        self.earlier_round()
        self.generating()
        self.validating()
        self.stopped()
        self.callbacks()

    # ---- what every act needs ----

    def check(self, name: str, held: bool, detail: str = "") -> None:
        """Note something that should hold, and show it."""
        check = Check(name, held, detail)
        self.results.checks.append(check)
        self.show.check(check)

    def _enter(self, state: str) -> None:
        """Note that the node is in ``state`` from now on, and check that it says so."""
        now = self.clock()
        self.results.bands.append(Band(self._state, self._since, now))
        self._state, self._since = state, now
        said = self.node.status()["state"]
        if said != state:
            self.check(f"the node is {state}", False, f"it says {said}")

    def _config(self, block_hash: str, height: int, r_target: float) -> dict[str, Any]:
        return {
            "block_hash": block_hash,
            "block_height": height,
            "public_key": PUBLIC_KEY,
            "r_target": r_target,
            "fraud_threshold": FRAUD_THRESHOLD,
            "node_id": 0,
            "node_count": 1,
            "batch_size": self.plan.rows,
            "seq_len": self.plan.seq_len,
            "callback_url": self.receiver.url,
        }

    @staticmethod
    def _batch(
        nonces: list[int], dist: list[float], block_hash: str = BLOCK_HASH, public_key: str = PUBLIC_KEY
    ) -> dict[str, Any]:
        return {
            "public_key": public_key,
            "block_hash": block_hash,
            "block_height": BLOCK_HEIGHT,
            "nonces": nonces,
            "dist": dist,
            "node_id": 0,
        }

    @contextlib.contextmanager
    def _chats(self, state: str) -> Iterator[None]:
        """Users chat while the block runs; all of them must be served."""
        before = len(self.results.chats)
        with chatting(self.users, state, self.results.chats):
            yield
        chats = self.results.chats[before:]
        failed = [chat for chat in chats if not chat.served]
        detail = f"{len(chats)} streamed to {len(self.users)} users"
        if failed:
            detail += f", {len(failed)} failed: {failed[0].status} {failed[0].error}"
        self.check(f"chats stream while {state}", bool(chats) and not failed, detail)
        if len(failed) < len(chats):
            text = next(chat.text for chat in chats if chat.served)
            self.show.note(f'"{" ".join(text.split())[:90]}..." says the model')

    # ---- the acts ----

    def idle(self) -> None:
        """Users chat with a node that has nothing else to do."""
        self.show.act("IDLE", "users chat")
        self.users[0].ask(QUESTIONS[0], "warm-up")  # not counted: what is loaded only once is loaded now
        with self._chats("IDLE"):
            time.sleep(self.plan.idle_seconds)

    def calibrating(self) -> None:
        """A survey of the block's distances sets r_target, so that the plan's share of nonces is below it."""
        self.show.act("VALIDATING", "a survey of this model's distances sets r_target")
        self.node.begin("validate", self._config(BLOCK_HASH, BLOCK_HEIGHT, _EVERY_NONCE))
        self._enter("VALIDATING")
        surveyed = self._recomputed(_FARTHEST, self.plan.calibrate)
        self.results.r_target = float(np.quantile(surveyed, self.plan.share))
        self.results.expected_share = self.plan.share
        self.show.note(f"r_target {self.results.r_target:.4f}, after {len(surveyed)} nonces")
        self.node.stop()
        self._enter("STOPPED")

    def earlier_round(self) -> None:
        """A short round of the block before, every nonce kept: the best are what a cheat replays later."""
        self.show.act("GENERATING", f"a short round of the block before, {EARLIER_HASH}")
        self.node.begin("generate", self._config(EARLIER_HASH, EARLIER_HEIGHT, _EVERY_NONCE))
        self._enter("GENERATING")
        status = self._generate_until(0.0, self.plan.earlier, record=False)
        self._earlier = sorted(zip(status["valid_distances"], status["valid_nonces"], strict=True))[: self.plan.batch]
        self.node.stop()
        self._enter("STOPPED")

    def generating(self) -> None:
        """The node looks for nonces; users are told to come back."""
        self.show.act("GENERATING", f"block {BLOCK_HASH}; P is drawn anew by setting 8 bytes")
        before = self.node.metrics("poc_part_seconds_total")
        chats = len(self.results.chats)
        self.node.begin("generate", self._config(BLOCK_HASH, BLOCK_HEIGHT, self.results.r_target))
        self._enter("GENERATING")
        self._generate_until(self.plan.generate_seconds, self.plan.proofs, record=True)
        self.node.phase("validate")
        self._enter("VALIDATING")
        self._round = self.node.status()
        after = self.node.metrics("poc_part_seconds_total")
        results = self.results
        self._sample(self._round)
        results.parts = {part: seconds - before.get(part, 0.0) for part, seconds in after.items()}
        results.generating_rate = self._round["rate_per_second"]
        refused = results.chats[chats:]
        self.check(
            "chats are refused with 503 and Retry-After while GENERATING",
            bool(refused) and all(chat.status == 503 and chat.retry_after for chat in refused),
            f"{len(refused)} asked, Retry-After {', '.join(sorted({str(chat.retry_after) for chat in refused}))} s",
        )
        self.check(
            "both projections ran",
            results.parts.get("projection", 0.0) > 0,
            f"they took {results.projection_share:.2%} of the round's compute",
        )
        if results.geometric:
            p = theory.share_agreement(results.valid, max(1, results.checked), results.expected_share)
            self.check(
                "as many nonces are valid as geometry says",
                results.checked > 0 and p > _LEAST_P,
                f"{results.valid} of {results.checked}, {results.expected_share:.1%} expected, p = {p:.2g}",
            )

    def _generate_until(self, seconds: float, proofs: int, *, record: bool) -> dict[str, Any]:
        """Follow /status until both the time is over and the proofs are found; the last status."""
        began = self.clock()
        next_chat = began
        with self.show.progress(seconds, proofs) as update:
            while True:
                self.server.check()
                status, elapsed = self.node.status(), self.clock() - began
                update(elapsed, status)
                if record:
                    self._sample(status)
                    if self.clock() >= next_chat:
                        chat = self.users[0].ask(QUESTIONS[0], "GENERATING")
                        self.results.chats.append(chat)
                        if next_chat == began:
                            self.show.note(f"a user asks: {chat.status}, Retry-After {chat.retry_after}: {chat.error}")
                        next_chat = self.clock() + max(1.0, seconds / 6)
                if elapsed >= seconds and status["total_valid"] >= proofs:
                    return status
                if elapsed > self.plan.generate_most_seconds:
                    name = f"{proofs} proofs are found within {self.plan.generate_most_seconds:.0f} s"
                    self.check(name, False, f"{status['total_valid']} found")
                    return status
                time.sleep(_POLL_SECONDS)

    def _sample(self, status: dict[str, Any]) -> None:
        self.results.samples.append(Sample(self.clock(), status["total_checked"], status["total_valid"]))

    def validating(self) -> None:
        """A validator sends batches, honest ones and others, while users chat."""
        self.show.act("VALIDATING", "a validator recomputes proofs, and users chat")
        with self._chats("VALIDATING"):
            began = time.perf_counter()
            recomputed = self._honest() + self._survey()
            self.results.validating_rate = recomputed / (time.perf_counter() - began)
            self._cheats()

    def _honest(self) -> int:
        """Send the proofs that were found, batch by batch; the number of nonces that were recomputed."""
        nonces, dist = self._round["valid_nonces"], self._round["valid_distances"]
        deadline = time.monotonic() + self.plan.validate_seconds
        sent = invalid = frauds = same = 0
        for start in range(0, len(nonces), self.plan.batch):
            if sent >= 2 * self.plan.batch and time.monotonic() > deadline:
                break
            chosen = slice(start, start + self.plan.batch)
            verdict = self.node.validate(self._batch(nonces[chosen], dist[chosen]))
            sent += len(verdict["nonces"])
            invalid += verdict["n_invalid"]
            frauds += verdict["fraud_detected"]
            same += sum(ours == theirs for ours, theirs in zip(verdict["distances"], dist[chosen], strict=True))
        batches = -(-sent // self.plan.batch)
        self.check(
            "honest proofs are accepted",
            sent > 0 and frauds == 0 and invalid == 0,
            f"{batches} batches, {sent} nonces, {invalid} invalid, {frauds} batches judged fraud",
        )
        self.check(
            "recomputed beside chats, distances have the very bits of the proofs",
            sent > 0 and same == sent,
            f"{same} of {sent} equal",
        )
        return sent

    def _recomputed(self, first: int, count: int) -> list[float]:
        """Distances of nonces that nobody selected, recomputed without a verdict."""
        deadline = time.monotonic() + self.plan.validate_seconds
        distances: list[float] = []
        for start in range(first, first + count, self.plan.batch):
            if len(distances) >= 2 * self.plan.batch and time.monotonic() > deadline:
                break
            nonces = list(range(start, min(start + self.plan.batch, first + count)))
            distances += self.node.validate(self._batch(nonces, []))["distances"]
        return distances

    def _survey(self) -> int:
        """How distances are distributed; the number of nonces that were recomputed."""
        results = self.results
        survey = results.survey = self._recomputed(_FAR, self.plan.survey)
        p = theory.agreement(survey, results.vocab_size)
        test = f"Kolmogorov-Smirnov test of {len(survey)} nonces in {results.vocab_size} dimensions, p = {p:.2g}"
        if results.geometric:
            self.check("distances lie where geometry says", p > _LEAST_P, test)
        else:
            self.show.note(f"against logits of mean zero: {test}")
            below = sum(distance < results.r_target for distance in survey)
            p = theory.same_share(results.valid, results.checked, below, len(survey))
            self.check(
                "as many nonces are valid as in a survey",
                p > _LEAST_P,
                f"{results.valid} of {results.checked}, and {below} of {len(survey)}, p = {p:.2g}",
            )
        return len(survey)

    def _cheats(self) -> None:
        plan, r_target = self.plan, self.results.r_target
        nonces = self._round["valid_nonces"][: plan.batch]
        dist = self._round["valid_distances"][: plan.batch]
        old_dist, old_nonces = [made for made, _ in self._earlier], [nonce for _, nonce in self._earlier]
        made_up = [r_target * (0.9 + 0.09 * row / plan.batch) for row in range(plan.batch)]
        self._caught("made-up distances", self._batch(list(range(_FARTHER, _FARTHER + plan.batch)), made_up))
        self._caught("proofs of another public key", self._batch(nonces, dist, public_key=OTHER_KEY))
        self._caught("proofs of the block before, under this block's hash", self._batch(old_nonces, old_dist))
        status, text = self.node.refusal(self._batch(nonces, dist, block_hash=UNKNOWN_HASH))
        self.check("a batch of another block hash is refused with 400", status == 400, f"{status}: {text}")

    def _caught(self, what: str, batch: dict[str, Any]) -> None:
        verdict = self.node.validate(batch)
        self.check(
            f"{what}: fraud detected",
            bool(verdict["fraud_detected"]),
            f"{verdict['n_invalid']} of {len(batch['nonces'])} invalid; from an honest node with probability "
            f"{verdict['probability_honest']:.1g}, and fraud below {FRAUD_THRESHOLD}",
        )

    def stopped(self) -> None:
        """The round is over, and the node serves users alone."""
        self.node.stop()
        self._enter("STOPPED")
        self.show.act("STOPPED", "the round is over")
        chat = self.users[0].ask(QUESTIONS[0], "STOPPED")
        self.results.chats.append(chat)
        self.check("a chat is served after the round", chat.served, chat.error)
        self.results.bands.append(Band(self._state, self._since, self.clock()))

    def callbacks(self) -> None:
        """What the chain's node was told meanwhile."""
        receiver, found = self.receiver, set(self._round["valid_nonces"])

        def complete() -> bool:
            frauds = sum(bool(call.fraud_detected) for call in receiver.calls if call.answered == 200)
            return frauds >= 3 and found <= set(receiver.nonces("/generated", BLOCK_HASH))

        receiver.wait_for(complete, _CALLBACK_SECONDS)
        calls = self.results.callbacks = receiver.calls
        got = receiver.nonces("/generated", BLOCK_HASH)
        again = sum(call.answered != 200 for call in calls)
        self.check(
            "every proof reached the callback's receiver, once",
            bool(found) and sorted(got) == sorted(found),
            f"{len(set(got) & found)} of {len(found)}; {len(calls)} posts in all, {again} refused by it and repeated",
        )
        verdicts = [call for call in calls if call.path == "/validated" and call.answered == 200]
        frauds = sum(bool(call.fraud_detected) for call in verdicts)
        self.check(
            "the verdicts reached it, three frauds among them", frauds == 3, f"{len(verdicts)}, {frauds} of them fraud"
        )
        self.check(
            "every callback was signed with the shared key",
            bool(calls) and all(call.signed for call in calls),
            f"{sum(call.signed for call in calls)} of {len(calls)} signatures right",
        )
