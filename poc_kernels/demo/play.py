"""The acts of the demonstration in their order, and what is checked at their end."""

from __future__ import annotations

import time

from .client import chatting
from .distances import FORGED, Distances
from .fingerprints import Fingerprints
from .plan import BLOCK_HASH
from .results import Claim
from .stage import CALLBACK_SECONDS, Stage


class Play:
    """Plays the demonstration against a server, and fills in the results.

    Every method raises httpx2.HTTPError or ServerFailedError if the server does not answer, or not with success.

    Args:
        stage: the server, and those who call it.
        claims: what is claimed to be the node's fingerprints.
    """

    def __init__(self, stage: Stage, claims: list[Claim]) -> None:
        self.stage = stage
        self.fingerprints = Fingerprints(stage, claims)
        self.distances = Distances(stage)

    def play(self) -> None:
        """Play all acts."""
        self.idle()
        self.fingerprints.play()
        self.distances.play()
        self.stopped()
        self.callbacks()

    def idle(self) -> None:
        """Let users chat with a node that has nothing else to do."""
        stage = self.stage
        stage.show.act("IDLE", "users chat")
        with chatting(stage.users, "warm-up", stage.results.chats):  # what is loaded on first use is loaded now
            time.sleep(stage.plan.warm_up_seconds)
        with stage.chats("IDLE"):
            time.sleep(stage.plan.idle_seconds)

    def stopped(self) -> None:
        """End the last round, after which the node only serves users."""
        stage = self.stage
        stage.node.stop()
        stage.enter("STOPPED")
        stage.show.act("STOPPED", "the rounds are over; users chat")
        with stage.chats("STOPPED"):
            time.sleep(stage.plan.idle_seconds)
        stage.close_band()

    def callbacks(self) -> None:
        """Check what the chain's node received meanwhile."""
        stage, receiver = self.stage, self.stage.receiver
        found, frauds = self.distances.found, stage.results.forged + FORGED

        def detected() -> int:
            return sum(bool(call.fraud_detected) for call in receiver.calls if call.answered == 200)

        def complete() -> bool:
            return detected() >= frauds and found <= set(receiver.nonces("/generated", BLOCK_HASH))

        receiver.wait_for(complete, CALLBACK_SECONDS)
        calls = stage.results.callbacks = receiver.calls
        got = receiver.nonces("/generated", BLOCK_HASH)
        again = sum(call.answered != 200 for call in calls)
        stage.check(
            "every proof reached the callback receiver exactly once",
            bool(found) and sorted(got) == sorted(found),
            f"{len(set(got) & found)} of {len(found)}; {len(calls)} posts in total, {again} refused and repeated",
        )
        verdicts = [call for call in calls if call.path == "/validated" and call.answered == 200]
        stage.check(
            "the verdicts reached the receiver, including those on every cheat",
            detected() == frauds,
            f"{len(verdicts)} verdicts, {detected()} frauds",
        )
        stage.check(
            "every callback was signed with the shared key",
            bool(calls) and all(call.signed for call in calls),
            f"{sum(call.signed for call in calls)} of {len(calls)} signatures are valid",
        )
