"""The acts of the demonstration: what the chain's node, a validator, users and cheats do, and the checks of it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..protocol import ProofBatch
from . import theory
from .client import QUESTIONS, Chatter, NodeClient, chatting
from .receiver import Receiver
from .results import Band, Check, Results, Sample
from .server import ServerProcess
from .show import Show

EARLIER_HASH = "0x00000000000000000001a2b3c4d5e6f7"
BLOCK_HASH = "0x0000000000000000000263f1c9e3a7d5"
UNKNOWN_HASH = "0x00000000000000000000ffffffffffff"
EARLIER_HEIGHT = 1_000_000
BLOCK_HEIGHT = EARLIER_HEIGHT + 1
PUBLIC_KEY = "demo-node"
OTHER_KEY = "another-node"
FRAUD_THRESHOLD = 0.01

_SURVEY_START = 1_000_000_000
"""First nonce of the survey; no round of the demonstration reaches it."""
_FORGED_START = 2_000_000_000
"""First forged nonce."""
_CALIBRATION_START = 3_000_000_000
"""First nonce of the survey that sets r_target where geometry does not."""
_EVERY_NONCE = 2.0
"""An r_target that every distance is below."""
_MIN_P = 1e-6
"""The p-value down to which a check of a distribution passes: an honest node fails once in a million runs."""
_POLL_SECONDS = 0.25
_CALLBACK_SECONDS = 30.0


@dataclass(frozen=True)
class Plan:
    """Durations and amounts.

    Args:
        warm_up_seconds: how long users chat before anything is measured.
        idle_seconds: how long users chat before the round, and again after it.
        generate_seconds: minimum time in GENERATING, which continues until ``proofs`` are found.
        max_generate_seconds: maximum time in GENERATING, in each of the two rounds.
        validate_seconds: how long batches of honest proofs, and of each survey, are sent; at least two are.
        proofs: minimum number of valid nonces to find; at least one batch.
        earlier: nonces checked in the round of the previous block, the best of which are replayed.
        calibrate: nonces recomputed to set r_target, where geometry does not.
        survey: nonces recomputed for the distribution of distances.
        batch_nonces: nonces per ProofBatch.
        rows: nonces per forward; with fewer, tokens of chats wait for less time.
        seq_len: positions of a nonce's inputs.
        valid_share: share of nonces that are to be valid; sets r_target.
        users: chats at the same time.
        max_tokens: maximum number of tokens of an answer.
    """

    warm_up_seconds: float = 4.0
    idle_seconds: float = 6.0
    generate_seconds: float = 12.0
    max_generate_seconds: float = 300.0
    validate_seconds: float = 20.0
    proofs: int = 64
    earlier: int = 256
    calibrate: int = 128
    survey: int = 512
    batch_nonces: int = 32
    rows: int = 16
    seq_len: int = 64
    valid_share: float = 0.2
    users: int = 3
    max_tokens: int = 32


@dataclass
class Play:
    """Plays the demonstration against a server, and fills in the results.

    Every method raises httpx2.HTTPError or ServerFailedError if the server does not answer, or not with success.
    """

    plan: Plan
    server: ServerProcess
    node: NodeClient
    receiver: Receiver
    users: list[Chatter]
    results: Results
    show: Show
    clock: Callable[[], float]

    def __post_init__(self) -> None:
        self._state = "IDLE"
        self._since = self.clock()
        self._recomputed = 0
        self._earlier: list[tuple[float, int]] = []
        self._round: dict[str, Any] = {}

    def play(self) -> None:
        """Play all acts."""
        self.idle()
        if not self.results.geometric:
            self.calibrating()
        self.earlier_round()
        self.generating()
        self.validating()
        self.stopped()
        self.callbacks()

    # ---- what every act needs ----

    def check(self, name: str, passed: bool, detail: str = "") -> None:
        """Record and show whether something that should be true is true."""
        check = Check(name, passed, detail)
        self.results.checks.append(check)
        self.show.check(check)

    def _enter(self, state: str) -> None:
        """Record that the node is in ``state`` from now on, and check that it reports so."""
        now = self.clock()
        self.results.bands.append(Band(self._state, self._since, now))
        self._state, self._since, self._recomputed = state, now, 0
        self.results.samples += [Sample(now), Sample(now, 0, 0, 0)]
        reported = self.node.status()["state"]
        if reported != state:
            self.check(f"the node is {state}", False, f"it reports {reported}")

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
        return ProofBatch(public_key, block_hash, BLOCK_HEIGHT, nonces, dist, node_id=0).to_dict()

    @contextlib.contextmanager
    def _chats(self, state: str) -> Iterator[None]:
        """Let users chat while the block runs, and check that all of them are served."""
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
            self.show.note(f'the model says: "{" ".join(text.split())[:90]}..."')

    # ---- the acts ----

    def idle(self) -> None:
        """Let users chat with a node that has nothing else to do."""
        self.show.act("IDLE", "users chat")
        with chatting(self.users, "warm-up", self.results.chats):  # what is loaded on first use is loaded now
            time.sleep(self.plan.warm_up_seconds)
        with self._chats("IDLE"):
            time.sleep(self.plan.idle_seconds)

    def calibrating(self) -> None:
        """Set r_target by a survey of the block's distances, so that the plan's share of nonces is valid."""
        self.show.act("VALIDATING", "a survey of this model's distances sets r_target")
        self.node.begin("validate", self._config(BLOCK_HASH, BLOCK_HEIGHT, _EVERY_NONCE))
        self._enter("VALIDATING")
        surveyed = self._surveyed(_CALIBRATION_START, self.plan.calibrate)
        self.results.r_target = float(np.quantile(surveyed, self.plan.valid_share))
        self.results.expected_share = self.plan.valid_share
        self.show.note(f"r_target {self.results.r_target:.4f}, after {len(surveyed)} nonces")
        self.node.stop()
        self._enter("STOPPED")

    def earlier_round(self) -> None:
        """Run a short round of the previous block in which every nonce is valid; a cheat replays the best later."""
        self.show.act("GENERATING", f"a short round of the previous block, {EARLIER_HASH}")
        self.node.begin("generate", self._config(EARLIER_HASH, EARLIER_HEIGHT, _EVERY_NONCE))
        self._enter("GENERATING")
        status = self._generate_until(0.0, self.plan.earlier)
        found = zip(status["valid_distances"], status["valid_nonces"], strict=True)
        self._earlier = sorted(found)[: self.plan.batch_nonces]
        self.node.stop()
        self._enter("STOPPED")

    def generating(self) -> None:
        """Let the node search for valid nonces; users are told to come back later."""
        self.show.act("GENERATING", f"block {BLOCK_HASH}; setting a seed of 8 bytes gives a new P")
        before = self.node.metrics("poc_part_seconds_total")
        self.node.begin("generate", self._config(BLOCK_HASH, BLOCK_HEIGHT, self.results.r_target))
        self._enter("GENERATING")
        self._generate_until(self.plan.generate_seconds, self.plan.proofs)
        self.node.phase("validate")
        self._round = self.node.status()
        self._sample(self._round)
        self._enter("VALIDATING")
        after = self.node.metrics("poc_part_seconds_total")
        results = self.results
        results.checked, results.valid = self._round["total_checked"], self._round["total_valid"]
        results.parts = {part: seconds - before.get(part, 0.0) for part, seconds in after.items()}
        results.generating_rate = self._round["rate_per_second"]
        refused = [chat for chat in results.chats if chat.state == "GENERATING"]
        self.check(
            "chats are refused with 503 and Retry-After while GENERATING",
            bool(refused) and all(chat.status == 503 and chat.retry_after for chat in refused),
            f"{len(refused)} chats, Retry-After {', '.join(sorted({str(chat.retry_after) for chat in refused}))} s",
        )
        self.check(
            "both projections ran",
            results.parts.get("projection", 0.0) > 0,
            f"they took {results.projection_share:.2%} of the round's compute",
        )
        if results.geometric:
            p = theory.share_agreement(results.valid, max(1, results.checked), results.expected_share)
            self.check(
                "the share of valid nonces is what geometry predicts",
                results.checked > 0 and p > _MIN_P,
                f"{results.valid} of {results.checked}, {results.expected_share:.1%} expected, p = {p:.2g}",
            )

    def _generate_until(self, seconds: float, proofs: int) -> dict[str, Any]:
        """Poll /status, and try to chat, until the time is over and the proofs are found; return the last status."""
        began = next_chat = self.clock()
        with self.show.progress() as update:
            while True:
                self.server.check()
                status, elapsed = self.node.status(), self.clock() - began
                update(status)
                self._sample(status)
                if self.clock() >= next_chat:
                    chat = self.users[0].ask(QUESTIONS[0], "GENERATING")
                    self.results.chats.append(chat)
                    if next_chat == began:
                        self.show.note(f"a user gets {chat.status}, Retry-After {chat.retry_after}: {chat.error}")
                    next_chat = self.clock() + max(1.0, seconds / 6)
                if elapsed >= seconds and status["total_valid"] >= proofs:
                    return status
                if elapsed > self.plan.max_generate_seconds:
                    name = f"{proofs} proofs are found within {self.plan.max_generate_seconds:.0f} s"
                    self.check(name, False, f"{status['total_valid']} found")
                    return status
                time.sleep(_POLL_SECONDS)

    def _sample(self, status: dict[str, Any]) -> None:
        self.results.samples.append(Sample(self.clock(), status["total_checked"], status["total_valid"]))

    def validating(self) -> None:
        """Act as a validator that sends honest and forged batches, while users chat."""
        self.show.act("VALIDATING", "a validator has proofs recomputed while users chat")
        with self._chats("VALIDATING"):
            began = self.clock()
            self._honest()
            self._survey()
            self.results.validating_rate = self._recomputed / (self.clock() - began)
            self._cheats()

    def _validated(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Have a batch recomputed, count its nonces, and return the verdict."""
        verdict = self.node.validate(batch)
        self._recomputed += len(batch["nonces"])
        self.results.samples.append(Sample(self.clock(), recomputed=self._recomputed))
        return verdict

    def _honest(self) -> None:
        """Send the proofs that were found, batch by batch."""
        nonces, dist = self._round["valid_nonces"], self._round["valid_distances"]
        deadline = time.monotonic() + self.plan.validate_seconds
        sent = invalid = frauds = same = 0
        for start in range(0, len(nonces), self.plan.batch_nonces):
            if sent >= 2 * self.plan.batch_nonces and time.monotonic() > deadline:
                break
            chosen = slice(start, start + self.plan.batch_nonces)
            verdict = self._validated(self._batch(nonces[chosen], dist[chosen]))
            sent += len(verdict["nonces"])
            invalid += verdict["n_invalid"]
            frauds += verdict["fraud_detected"]
            same += sum(ours == theirs for ours, theirs in zip(verdict["distances"], dist[chosen], strict=True))
        batches = -(-sent // self.plan.batch_nonces)
        self.check(
            "honest proofs are accepted",
            sent > 0 and frauds == 0 and invalid == 0,
            f"{batches} batches, {sent} nonces, {invalid} invalid, {frauds} batches judged fraud",
        )
        self.check(
            "distances recomputed while users are served are bit-identical to the proofs",
            sent > 0 and same == sent,
            f"{same} of {sent} equal",
        )

    def _surveyed(self, first: int, count: int) -> list[float]:
        """Have consecutive nonces recomputed without a verdict, and return their distances."""
        deadline = time.monotonic() + self.plan.validate_seconds
        distances: list[float] = []
        for start in range(first, first + count, self.plan.batch_nonces):
            if len(distances) >= 2 * self.plan.batch_nonces and time.monotonic() > deadline:
                break
            nonces = list(range(start, min(start + self.plan.batch_nonces, first + count)))
            distances += self._validated(self._batch(nonces, []))["distances"]
        return distances

    def _survey(self) -> None:
        """Check how distances are distributed."""
        results = self.results
        survey = results.survey = self._surveyed(_SURVEY_START, self.plan.survey)
        p = theory.agreement(survey, results.vocab_size)
        test = f"Kolmogorov-Smirnov test of {len(survey)} nonces in {results.vocab_size} dimensions, p = {p:.2g}"
        if results.geometric:
            self.check("distances are distributed as geometry predicts", p > _MIN_P, test)
        else:
            self.show.note(f"compared with logits of mean zero: {test}")
            below = sum(distance < results.r_target for distance in survey)
            p = theory.same_share(results.valid, results.checked, below, len(survey))
            self.check(
                "the share of valid nonces is that of a survey",
                p > _MIN_P,
                f"{results.valid} of {results.checked}, and {below} of {len(survey)}, p = {p:.2g}",
            )

    def _cheats(self) -> None:
        plan, r_target = self.plan, self.results.r_target
        nonces = self._round["valid_nonces"][: plan.batch_nonces]
        dist = self._round["valid_distances"][: plan.batch_nonces]
        old_dist, old_nonces = [made for made, _ in self._earlier], [nonce for _, nonce in self._earlier]
        made_up = [r_target * (0.9 + 0.09 * row / plan.batch_nonces) for row in range(plan.batch_nonces)]
        made_up_nonces = list(range(_FORGED_START, _FORGED_START + plan.batch_nonces))
        self._caught("made-up distances", self._batch(made_up_nonces, made_up))
        self._caught("proofs of another public key", self._batch(nonces, dist, public_key=OTHER_KEY))
        self._caught("proofs of the previous block, under this block's hash", self._batch(old_nonces, old_dist))
        status, text = self.node.refusal(self._batch(nonces, dist, block_hash=UNKNOWN_HASH))
        self.check("a batch with another block hash is refused with 400", status == 400, f"{status}: {text}")

    def _caught(self, what: str, batch: dict[str, Any]) -> None:
        verdict = self._validated(batch)
        self.check(
            f"{what}: fraud detected",
            bool(verdict["fraud_detected"]),
            f"{verdict['n_invalid']} of {len(batch['nonces'])} invalid: an honest node has that many with "
            f"probability {verdict['probability_honest']:.1g}, and fraud is below {FRAUD_THRESHOLD}",
        )

    def stopped(self) -> None:
        """End the round, after which the node only serves users."""
        self.node.stop()
        self._enter("STOPPED")
        self.show.act("STOPPED", "the round is over; users chat")
        with self._chats("STOPPED"):
            time.sleep(self.plan.idle_seconds)
        self.results.bands.append(Band(self._state, self._since, self.clock()))

    def callbacks(self) -> None:
        """Check what the chain's node received meanwhile."""
        receiver, found = self.receiver, set(self._round["valid_nonces"])

        def complete() -> bool:
            frauds = sum(bool(call.fraud_detected) for call in receiver.calls if call.answered == 200)
            return frauds >= 3 and found <= set(receiver.nonces("/generated", BLOCK_HASH))

        receiver.wait_for(complete, _CALLBACK_SECONDS)
        calls = self.results.callbacks = receiver.calls
        got = receiver.nonces("/generated", BLOCK_HASH)
        again = sum(call.answered != 200 for call in calls)
        self.check(
            "every proof reached the callback receiver exactly once",
            bool(found) and sorted(got) == sorted(found),
            f"{len(set(got) & found)} of {len(found)}; {len(calls)} posts in total, {again} refused and repeated",
        )
        verdicts = [call for call in calls if call.path == "/validated" and call.answered == 200]
        frauds = sum(bool(call.fraud_detected) for call in verdicts)
        self.check(
            "the verdicts reached the receiver, including three frauds",
            frauds == 3,
            f"{len(verdicts)} verdicts, {frauds} frauds",
        )
        self.check(
            "every callback was signed with the shared key",
            bool(calls) and all(call.signed for call in calls),
            f"{sum(call.signed for call in calls)} of {len(calls)} signatures are valid",
        )
