"""The round of fingerprints, on today's wire: what the chain's node, a validator, honest nodes and cheats do."""

from __future__ import annotations

from typing import Any

from ..protocol import PoCConfig
from ..protocol.fingerprint.form import FINGERPRINT
from . import cheats
from .plan import BLOCK_HASH, BLOCK_HEIGHT, FRAUD_THRESHOLD, PUBLIC_KEY, Plan
from .results import Claim, Judged
from .server import SERVED_NAME
from .stage import CALLBACK_SECONDS, Stage


def config(plan: Plan) -> PoCConfig:
    """Return the round's configuration, for who computes its fingerprints in this process."""
    return PoCConfig(
        BLOCK_HASH,
        BLOCK_HEIGHT,
        PUBLIC_KEY,
        batch_size=plan.rows,
        seq_len=plan.seq_len,
        use_random_projection=True,
        proof=FINGERPRINT.name,
    )


class Fingerprints:
    """Plays the round: generates, and has claims validated while users chat.

    Args:
        stage: where it plays.
        claims: what is claimed, beside what the node itself computes, to be its first fingerprints.
    """

    def __init__(self, stage: Stage, claims: list[Claim]) -> None:
        self.stage, self.claims = stage, claims
        self._found: dict[int, str] = {}

    def play(self) -> None:
        """Play it."""
        self.generating()
        self.validating()

    def _request(self, **more: Any) -> dict[str, Any]:
        plan = self.stage.plan
        params = {
            "model": SERVED_NAME,
            "seq_len": plan.seq_len,
            "proof": FINGERPRINT.name,
            "use_random_projection": True,
        }
        return {
            "block_hash": BLOCK_HASH,
            "block_height": BLOCK_HEIGHT,
            "public_key": PUBLIC_KEY,
            "node_id": 0,
            "node_count": 1,
            "batch_size": plan.rows,
            "params": params,
            "url": self.stage.receiver.url,
            **more,
        }

    def generating(self) -> None:
        """Let the node compute fingerprints; users are told to come back later."""
        stage, results, plan = self.stage, self.stage.results, self.stage.plan
        stage.show.act("GENERATING", f"fingerprints of block {BLOCK_HASH}; its seed of 8 bytes gives a new P")
        before = stage.node.metrics("poc_part_seconds_total")
        stage.node.begin("generate", self._request())
        stage.enter("GENERATING")
        progress = stage.generate_until(plan.generate_seconds, plan.fingerprints)
        stage.node.stop()
        # From now on the node has no round: each of a validator's requests brings its own.
        stage.enter("VALIDATING", reported="IDLE")
        after = stage.node.metrics("poc_part_seconds_total")
        taken = {part: seconds - before.get(part, 0.0) for part, seconds in after.items()}
        results.parts = {part: taken.get(part, 0.0) for part in FINGERPRINT.parts}
        results.fingerprints, results.generating_rate = progress.checked, progress.rate
        refused = [chat for chat in results.chats if chat.state == "GENERATING"]
        stage.check(
            "chats are refused with 503 and Retry-After while GENERATING",
            bool(refused) and all(chat.status == 503 and chat.retry_after for chat in refused),
            f"{len(refused)} chats, Retry-After {', '.join(sorted({str(chat.retry_after) for chat in refused}))} s",
        )
        stage.check(
            "both projections ran",
            results.parts["projection"] > 0,
            f"they took {results.projection_share:.2%} of the round's compute",
        )
        expected = set(range(results.fingerprints))
        stage.receiver.wait_for(lambda: expected <= set(stage.receiver.fingerprints(BLOCK_HASH)), CALLBACK_SECONDS)
        self._found = stage.receiver.fingerprints(BLOCK_HASH)
        received = stage.receiver.nonces("/generated", BLOCK_HASH, fingerprints=True)
        stage.check(
            "a fingerprint of every nonce reached the callback receiver exactly once",
            bool(expected) and expected <= set(received) and sorted(received) == list(range(len(received))),
            f"{len(expected & set(received))} of {len(expected)}",
        )

    def validating(self) -> None:
        """Act as a validator that has the node's fingerprints, and those of cheats, compared while users chat."""
        stage = self.stage
        stage.show.act("VALIDATING", "a validator has fingerprints recomputed while users chat")
        with stage.chats("VALIDATING"):
            began = stage.clock()
            recomputed = self._recompute()
            recomputed += self._honest()
            stage.results.validating_rate = recomputed / (stage.clock() - began)
            self._claims()

    def _generate(self, nonces: range, **more: Any) -> dict[str, Any]:
        answer = self.stage.node.generate(self._request(nonces=list(nonces), wait=True, **more))
        self.stage.recomputed(len(nonces))
        return answer

    def _validated(self, nonces: range, vectors: list[str | None]) -> dict[str, Any]:
        """Have the fingerprints that are claimed for nonces compared, and return the verdict."""
        # What is no fingerprint is claimed as an empty text: it must be there, and does not agree.
        claimed = [{"nonce": nonce, "vector_b64": vector or ""} for nonce, vector in zip(nonces, vectors, strict=True)]
        p_mismatch = FINGERPRINT.stat_test.p_mismatch
        test = {
            "dist_threshold": self.stage.results.dist_threshold,
            "p_mismatch": p_mismatch,
            "fraud_threshold": FRAUD_THRESHOLD,
        }
        return self._generate(nonces, validation={"artifacts": claimed}, stat_test=test)

    def _recompute(self) -> int:
        """Have fingerprints recomputed without a verdict, compare their bits, and return their number."""
        sent = same = 0
        for nonces in self.stage.batches(min(self.stage.plan.compared, len(self._found))):
            answer = self._generate(nonces, url=None)
            sent += len(nonces)
            same += sum(self._found.get(each["nonce"]) == each["vector_b64"] for each in answer["artifacts"])
        self.stage.check(
            "fingerprints recomputed while users are served are bit-identical to those of the round",
            sent > 0 and same == sent,
            f"{same} of {sent} equal",
        )
        return sent

    def _honest(self) -> int:
        """Have the node's own fingerprints judged, and return their number."""
        sent = mismatches = frauds = batches = 0
        for nonces in self.stage.batches(min(self.stage.plan.compared, len(self._found))):
            verdict = self._validated(nonces, [self._found.get(nonce) for nonce in nonces])
            sent, batches = sent + len(nonces), batches + 1
            mismatches += verdict["n_mismatch"]
            frauds += verdict["fraud_detected"]
        self.stage.check(
            "honest fingerprints are accepted",
            sent > 0 and frauds == 0 and mismatches == 0,
            f"{batches} batches, {sent} nonces, {mismatches} mismatches, {frauds} batches judged fraud",
        )
        return sent

    def _claims(self) -> None:
        """Have every claim judged by the threshold of this model."""
        stage, results = self.stage, self.stage.results
        threshold, noise = results.dist_threshold, max(results.noise)
        stage.show.note(f"threshold {threshold:.3f}: honest nodes with other arithmetic are at most {noise:.3f} apart")
        nonces = range(stage.plan.batch_nonces)
        own = [self._found.get(nonce) for nonce in nonces]
        for claim in self.claims:
            verdict = self._validated(nonces, list(claim.vectors))
            judged = Judged(
                claim,
                tuple(cheats.distances(claim.vectors, own)),
                verdict["n_mismatch"],
                verdict["p_value"],
                verdict["fraud_detected"],
            )
            results.judged.append(judged)
            stage.check(
                f"{claim.name}: {'accepted' if claim.honest else 'fraud detected'}",
                judged.fraud_detected != claim.honest,
                f"median {judged.median:.3f} apart, {judged.below(threshold)} of {len(nonces)} within the threshold; "
                f"an honest node has {judged.mismatches} mismatches with p = {judged.p_value:.1g}, fraud is below "
                f"{FRAUD_THRESHOLD}",
            )
