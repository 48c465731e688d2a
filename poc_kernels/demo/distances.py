"""Rounds of distances, on the older wire: what the chain's node, a validator and cheats do, in short."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..protocol import ProofBatch
from . import theory
from .client import Progress
from .plan import (
    BLOCK_HASH,
    BLOCK_HEIGHT,
    EARLIER_HASH,
    EARLIER_HEIGHT,
    FRAUD_THRESHOLD,
    OTHER_KEY,
    PUBLIC_KEY,
    UNKNOWN_HASH,
)
from .stage import MIN_P, Stage

FORGED = 3
"""Forged batches that the cheats send."""
_SURVEY_START = 1_000_000_000
"""First nonce of the survey; no round of the demonstration reaches it."""
_FORGED_START = 2_000_000_000
"""First forged nonce."""
_CALIBRATION_START = 3_000_000_000
"""First nonce of the survey that sets r_target where geometry does not."""
_EVERY_NONCE = 2.0
"""An r_target that every distance is below."""


class Distances:
    """Plays the rounds: a short one of an earlier block, then one that generates and has proofs validated.

    Args:
        stage: where it plays.
    """

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self._earlier: list[tuple[float, int]] = []
        self._round: dict[str, Any] = {}

    def play(self) -> None:
        """Play them."""
        if not self.stage.results.geometric:
            self.calibrating()
        self.earlier_round()
        self.generating()
        self.validating()

    @property
    def found(self) -> set[int]:
        """The nonces that the round found."""
        return set(self._round["valid_nonces"])

    def _config(self, block_hash: str, height: int, r_target: float) -> dict[str, Any]:
        plan = self.stage.plan
        return {
            "block_hash": block_hash,
            "block_height": height,
            "public_key": PUBLIC_KEY,
            "r_target": r_target,
            "fraud_threshold": FRAUD_THRESHOLD,
            "node_id": 0,
            "node_count": 1,
            "batch_size": plan.rows,
            "seq_len": plan.seq_len,
            "callback_url": self.stage.receiver.url,
        }

    @staticmethod
    def _batch(
        nonces: list[int], dist: list[float], block_hash: str = BLOCK_HASH, public_key: str = PUBLIC_KEY
    ) -> dict[str, Any]:
        return ProofBatch(public_key, block_hash, BLOCK_HEIGHT, nonces, dist, node_id=0).to_dict()

    def calibrating(self) -> None:
        """Set r_target by a survey of the block's distances, so that the plan's share of nonces is valid."""
        stage, results = self.stage, self.stage.results
        stage.show.act("VALIDATING", "the older form: a survey of this model's distances sets r_target")
        stage.node.begin("validate", self._config(BLOCK_HASH, BLOCK_HEIGHT, _EVERY_NONCE))
        stage.enter("VALIDATING")
        surveyed = self._surveyed(_CALIBRATION_START, stage.plan.calibrate)
        results.r_target = float(np.quantile(surveyed, stage.plan.valid_share))
        results.expected_share = stage.plan.valid_share
        stage.show.note(f"r_target {results.r_target:.4f}, after {len(surveyed)} nonces")
        stage.node.stop()
        stage.enter("STOPPED")

    def earlier_round(self) -> None:
        """Run a short round of the previous block in which every nonce is valid; a cheat replays the best later."""
        stage = self.stage
        stage.show.act("GENERATING", f"the older form, distances: a short round of the previous block, {EARLIER_HASH}")
        stage.node.begin("generate", self._config(EARLIER_HASH, EARLIER_HEIGHT, _EVERY_NONCE))
        stage.enter("GENERATING")
        stage.generate_until(0.0, stage.plan.earlier)
        status = stage.node.status()
        found = zip(status["valid_distances"], status["valid_nonces"], strict=True)
        self._earlier = sorted(found)[: stage.plan.batch_nonces]
        stage.node.stop()
        stage.enter("STOPPED")

    def generating(self) -> None:
        """Let the node search for nonces whose distance is below r_target."""
        stage, results = self.stage, self.stage.results
        stage.show.act("GENERATING", f"distances of block {BLOCK_HASH}")
        stage.node.begin("generate", self._config(BLOCK_HASH, BLOCK_HEIGHT, results.r_target))
        stage.enter("GENERATING")
        stage.generate_until(stage.plan.older_seconds, stage.plan.proofs)
        stage.node.phase("validate")
        self._round = stage.node.status()
        progress = Progress.of(self._round)
        stage.sample(progress)
        stage.enter("VALIDATING")
        results.checked, results.valid = progress.checked, progress.valid
        if results.geometric:
            p = theory.share_agreement(results.valid, max(1, results.checked), results.expected_share)
            stage.check(
                "the share of valid nonces is what geometry predicts",
                results.checked > 0 and p > MIN_P,
                f"{results.valid} of {results.checked}, {results.expected_share:.1%} expected, p = {p:.2g}",
            )

    def validating(self) -> None:
        """Act as a validator that sends honest and forged batches, while users chat."""
        self.stage.show.act("VALIDATING", "a validator has distances recomputed while users chat")
        with self.stage.chats("VALIDATING"):
            self._honest()
            self._survey()
            self._cheats()

    def _validated(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Have a batch recomputed, count its nonces, and return the verdict."""
        verdict = self.stage.node.validate(batch)
        self.stage.recomputed(len(batch["nonces"]))
        return verdict

    def _honest(self) -> None:
        """Send the proofs that were found, batch by batch."""
        nonces, dist = self._round["valid_nonces"], self._round["valid_distances"]
        sent = invalid = frauds = same = batches = 0
        for chosen in self.stage.batches(len(nonces)):
            claimed = dist[chosen.start : chosen.stop]
            verdict = self._validated(self._batch(nonces[chosen.start : chosen.stop], claimed))
            sent, batches = sent + len(verdict["nonces"]), batches + 1
            invalid += verdict["n_invalid"]
            frauds += verdict["fraud_detected"]
            same += sum(ours == theirs for ours, theirs in zip(verdict["distances"], claimed, strict=True))
        self.stage.check(
            "honest distances are accepted",
            sent > 0 and frauds == 0 and invalid == 0,
            f"{batches} batches, {sent} nonces, {invalid} invalid, {frauds} batches judged fraud",
        )
        self.stage.check(
            "distances recomputed while users are served are bit-identical to the proofs",
            sent > 0 and same == sent,
            f"{same} of {sent} equal",
        )

    def _surveyed(self, first: int, count: int) -> list[float]:
        """Have consecutive nonces recomputed without a verdict, and return their distances."""
        distances: list[float] = []
        for chosen in self.stage.batches(count):
            distances += self._validated(self._batch([first + place for place in chosen], []))["distances"]
        return distances

    def _survey(self) -> None:
        """Check how distances are distributed."""
        stage, results = self.stage, self.stage.results
        survey = results.survey = self._surveyed(_SURVEY_START, stage.plan.survey)
        p = theory.agreement(survey, results.vocab_size)
        test = f"Kolmogorov-Smirnov test of {len(survey)} nonces in {results.vocab_size} dimensions, p = {p:.2g}"
        if results.geometric:
            stage.check("distances are distributed as geometry predicts", p > MIN_P, test)
        else:
            stage.show.note(f"compared with logits of mean zero: {test}")
            below = sum(distance < results.r_target for distance in survey)
            p = theory.same_share(results.valid, results.checked, below, len(survey))
            stage.check(
                "the share of valid nonces is that of a survey",
                p > MIN_P,
                f"{results.valid} of {results.checked}, and {below} of {len(survey)}, p = {p:.2g}",
            )

    def _cheats(self) -> None:
        count, r_target = self.stage.plan.batch_nonces, self.stage.results.r_target
        nonces, dist = self._round["valid_nonces"][:count], self._round["valid_distances"][:count]
        old_dist, old_nonces = [made for made, _ in self._earlier], [nonce for _, nonce in self._earlier]
        made_up = [r_target * (0.9 + 0.09 * row / count) for row in range(count)]
        made_up_nonces = list(range(_FORGED_START, _FORGED_START + count))
        self._caught("made-up distances", self._batch(made_up_nonces, made_up))
        self._caught("distances of another public key", self._batch(nonces, dist, public_key=OTHER_KEY))
        self._caught("distances of the previous block, under this block's hash", self._batch(old_nonces, old_dist))
        status, text = self.stage.node.refusal(self._batch(nonces, dist, block_hash=UNKNOWN_HASH))
        self.stage.check("a batch with another block hash is refused with 400", status == 400, f"{status}: {text}")

    def _caught(self, what: str, batch: dict[str, Any]) -> None:
        verdict = self._validated(batch)
        self.stage.check(
            f"{what}: fraud detected",
            bool(verdict["fraud_detected"]),
            f"{verdict['n_invalid']} of {len(batch['nonces'])} invalid: an honest node has that many with "
            f"probability {verdict['probability_honest']:.1g}, and fraud is below {FRAUD_THRESHOLD}",
        )
