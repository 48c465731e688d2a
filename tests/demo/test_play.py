"""The acts of the demonstration, against a node of a few lines: a right one passes, a wrong one fails its check."""

from __future__ import annotations

import hashlib
import io
import threading
from dataclasses import replace

import numpy as np
import pytest
from records import results
from rich.console import Console

from poc_kernels.demo import fingerprints, stage, theory
from poc_kernels.demo import plan as blocks
from poc_kernels.demo import play as acts
from poc_kernels.demo.plan import Plan
from poc_kernels.demo.play import Play
from poc_kernels.demo.receiver import Receiver
from poc_kernels.demo.results import Chat, Claim
from poc_kernels.demo.show import Show
from poc_kernels.demo.stage import Stage
from poc_kernels.protocol import ArtifactBatch, ProofBatch, StatTest, validate_distances
from poc_kernels.protocol.artifacts.encoding import encode
from poc_kernels.protocol.artifacts.proofs import judge
from poc_kernels.service.callbacks import canonical_json, sign

KEY = b"key"
STATES = {"validate": "VALIDATING", "generate": "GENERATING"}
PLAN = Plan(
    warm_up_seconds=0.01,
    idle_seconds=0.05,
    generate_seconds=0.05,
    older_seconds=0.05,
    fingerprints=100,
    compared=96,
    proofs=64,
    survey=64,
    users=2,
)


def distance(batch: dict, nonce: int) -> float:
    """A distance distributed as geometry predicts, pseudo-random in block hash, public key and nonce."""
    text = f"{batch['block_hash']} {batch['public_key']} {nonce}"
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
    return 2 * float(np.random.default_rng(seed).beta(2047 / 2, 2047 / 2)) ** 0.5


def fingerprint(request: dict, nonce: int) -> str:
    """A fingerprint that has nothing to do with others, pseudo-random in block hash, public key and nonce."""
    text = f"{request['block_hash']} {request['public_key']} {nonce}"
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
    vector = np.random.default_rng(seed).standard_normal(64)
    return encode((vector / np.linalg.norm(vector)).astype(np.float16))


def claims() -> list[Claim]:
    """What an honest node and two cheats claim of the first 32 nonces."""
    own = {"block_hash": blocks.BLOCK_HASH, "public_key": blocks.PUBLIC_KEY}

    def of(**changed):
        return tuple(fingerprint({**own, **changed}, nonce) for nonce in range(32))

    return [
        Claim("honest, elsewhere", "nothing", of(), honest=True),
        Claim("another key's", "all", of(public_key="another")),
        Claim("nothing", "all", (None,) * 32),
    ]


class RightNode:
    """A node whose model is `fingerprint` and `distance`, and which does all that it should."""

    def __init__(self, receiver: Receiver) -> None:
        self.receiver = receiver
        self.state = "IDLE"
        self.config: dict = {}
        self.found: list[tuple[int, float]] = []
        self.checked = 0
        self.ever_checked = 0

    def begin(self, name, config):
        self.config, self.found, self.checked = config, [], 0
        self.state = STATES[name]

    def phase(self, name):
        self.state = STATES[name]

    def stop(self):
        self.state = "IDLE" if "params" in self.config else "STOPPED"

    def status(self):
        if "params" in self.config:
            return self.status_today()
        if self.state == "GENERATING":
            batch = self.batch([], [])
            for nonce in range(self.checked, self.checked + 100):
                made = self.distance(self.config, nonce)
                if made < self.config["r_target"]:
                    batch["nonces"].append(nonce)
                    batch["dist"].append(made)
            self.checked += 100
            self.ever_checked += 100
            self.found += zip(batch["nonces"], batch["dist"], strict=True)
            self.post("/generated", batch)
        return {
            "status": self.state,
            "valid_nonces": [nonce for nonce, _ in self.found],
            "valid_distances": [made for _, made in self.found],
            "total_checked": self.checked,
            "total_valid": len(self.found),
            "rate_per_second": 100.0,
        }

    def status_today(self):
        if self.state != "GENERATING":
            return {"status": self.state, "config": None, "stats": None}
        nonces = range(self.checked, self.checked + 50)
        self.checked, self.ever_checked = nonces.stop, self.ever_checked + 50
        self.post("/generated", {**self.told(self.config), "artifacts": self.artifacts(self.config, nonces)})
        stats = {"total_processed": self.checked, "nonces_per_second": 50.0}
        return {"status": self.state, "config": {}, "stats": stats}

    def artifacts(self, request, nonces):
        return [{"nonce": nonce, "vector_b64": self.fingerprint(request, nonce)} for nonce in nonces]

    def fingerprint(self, request, nonce):
        return fingerprint(request, nonce)

    def generate(self, request):
        assert request["wait"]
        made = self.artifacts(request, request["nonces"])
        if "validation" not in request:
            return {"status": "completed", "artifacts": made}
        claimed = [each["vector_b64"] for each in request["validation"]["artifacts"]]
        batch = ArtifactBatch(**self.told(request), nonces=request["nonces"], vectors=claimed)
        vectors = [each["vector_b64"] for each in made]
        verdict = self.judged(judge(batch, vectors, StatTest(**request["stat_test"]), k_dim=64, norm_tolerance=0.01))
        self.post("/validated", {**self.told(request), **verdict})
        return {"status": "completed", **verdict}

    def judged(self, verdict):
        names = ("n_total", "n_mismatch", "mismatch_nonces", "p_value", "fraud_detected")
        return {name: getattr(verdict, name) for name in names}

    @staticmethod
    def told(request):
        return {name: request[name] for name in ("public_key", "block_hash", "block_height", "node_id")}

    def batch(self, nonces, dist):
        return {**self.told(self.config), "nonces": nonces, "dist": dist}

    def post(self, path, batch):
        body = canonical_json(batch)
        while self.receiver.take(path, body, self.signature(body)) == 503:
            pass

    def signature(self, body):
        return sign(body, KEY)

    def recomputed(self, batch):
        return [self.distance(batch, nonce) for nonce in batch["nonces"]]

    def distance(self, batch, nonce):
        return distance(batch, nonce)

    def validate(self, batch):
        r_target, threshold = self.config["r_target"], self.config["fraud_threshold"]
        verdict = validate_distances(ProofBatch(**batch), self.recomputed(batch), r_target, threshold)
        self.post("/validated", verdict.to_dict())
        return {**verdict.to_dict(), "distances": verdict.dist}

    def refusal(self, batch):
        return (200, "OK") if batch["block_hash"] == self.config["block_hash"] else (400, "another block")

    def metrics(self, name):
        assert name == "poc_part_seconds_total"
        projection = 0.01 * self.ever_checked
        return {"inputs": projection, "projection": projection, "forward": 98 * projection, "mix": 0.0}


class RightUser:
    """A user who is served unless the node generates."""

    def __init__(self, node: RightNode) -> None:
        self.node = node

    def ask(self, question, state):
        threading.Event().wait(0.005)
        if self.node.state == "GENERATING":
            return Chat(state, 0.0, 0.0, status=503, retry_after="10", error="come back later")
        return Chat(state, 0.0, 0.3, (0.1, 0.2), "a text [with] brackets")


class LivingServer:
    def check(self):
        """Find it running."""


def played(monkeypatch, node_type=RightNode, user_type=RightUser, plan=PLAN, geometric=True):
    monkeypatch.setattr(stage, "_POLL_SECONDS", 0.005)
    for module in (acts, fingerprints):
        monkeypatch.setattr(module, "CALLBACK_SECONDS", 0.2)
    receiver = Receiver(KEY, lambda: 0.0, refuse=2)
    receiver.url = "http://127.0.0.1:1"
    node = node_type(receiver)
    r_target = theory.distance_at(0.2, 2048)
    lists = {name: [] for name in ("checks", "chats", "callbacks", "bands", "samples", "survey", "judged")}
    empty = results(**lists, parts={}, fingerprints=0, checked=0, valid=0, r_target=r_target, geometric=geometric)
    shown = io.StringIO()
    show = Show(Console(file=shown, width=120))
    users = [user_type(node) for _ in range(plan.users)]
    Play(Stage(plan, LivingServer(), node, receiver, users, empty, show, acts.time.monotonic), claims()).play()
    return empty, shown.getvalue()


def failures(outcome):
    return [check.name for check in outcome.checks if not check.passed]


def test_a_right_node_passes(monkeypatch):
    outcome, shown = played(monkeypatch)
    assert failures(outcome) == []
    assert outcome.passed
    assert len(outcome.checks) == 23
    assert shown.count("ok  ") == 23
    assert "FAILED" not in shown
    assert "with [brackets]" not in shown
    assert "a text [with] brackets" in shown
    states = [band.state for band in outcome.bands]
    fingerprint_states, distance_states = states[:3], states[3:]
    assert fingerprint_states == ["IDLE", "GENERATING", "VALIDATING"]
    assert distance_states == ["GENERATING", "STOPPED", "GENERATING", "VALIDATING", "STOPPED"]
    assert all(before.ended == after.began for before, after in zip(outcome.bands, outcome.bands[1:], strict=False))
    assert len(outcome.survey) == 64
    assert outcome.checked >= 100
    assert outcome.valid >= 64
    assert outcome.projection_share == pytest.approx(0.01)
    assert {chat.state for chat in outcome.chats} == {"warm-up", "IDLE", "GENERATING", "VALIDATING", "STOPPED"}
    assert outcome.chats[0].state == "warm-up"


def test_every_phase_has_samples(monkeypatch):
    outcome, _ = played(monkeypatch)

    def counts(name, band):
        inside = [sample for sample in outcome.samples if band.began <= sample.at <= band.ended]
        return [getattr(sample, name) for sample in inside if getattr(sample, name) > 0]

    first, compared, earlier, generating, validating = (band for band in outcome.bands if band.state in STATES.values())
    assert counts("checked", first)[-1] == counts("valid", first)[-1] == outcome.fingerprints
    assert counts("recomputed", compared)[-1] == 2 * PLAN.compared + 3 * PLAN.batch_nonces
    assert counts("checked", earlier) == counts("valid", earlier)
    assert (counts("checked", generating)[-1], counts("valid", generating)[-1]) == (outcome.checked, outcome.valid)
    recomputed = counts("recomputed", validating)
    assert recomputed == sorted(set(recomputed))
    assert recomputed[-1] == outcome.valid + len(outcome.survey) + 3 * PLAN.batch_nonces


def test_users_chat_alone_before_and_after_the_round(monkeypatch):
    outcome, _ = played(monkeypatch)
    waits = {(wait.what, wait.when): len(wait.milliseconds) for wait in outcome.latencies()}
    alone = sum(chat.state in ("IDLE", "STOPPED") for chat in outcome.chats)
    assert waits["first token", "users alone"] == alone
    assert {"IDLE", "STOPPED"} <= {chat.state for chat in outcome.chats}


def test_claims_are_compared_with_the_nodes_own_fingerprints(monkeypatch):
    outcome, shown = played(monkeypatch)
    honest, other, nothing = outcome.judged
    assert (honest.distances, honest.mismatches, honest.fraud_detected) == ((0.0,) * 32, 0, False)
    assert 1.3 < other.median < 1.5
    assert (other.below(outcome.dist_threshold), other.mismatches, other.fraud_detected) == (0, 32, True)
    assert np.isnan(nothing.distances).all()
    assert (nothing.mismatches, nothing.fraud_detected) == (32, True)
    assert (outcome.accepted, outcome.caught, outcome.forged) == (1, 2, 2)
    assert "1 of 1 honest claims accepted, 2 of 2 cheats caught" in " ".join(map(str, outcome.summary()))
    assert "threshold 0.300: honest nodes with other arithmetic are at most 0.210 apart" in shown


class Gullible(RightNode):
    def validate(self, batch):
        return {**super().validate(batch), "fraud_detected": False}


class Distrustful(RightNode):
    def validate(self, batch):
        return {**super().validate(batch), "fraud_detected": True, "n_invalid": 1}


class GullibleToday(RightNode):
    """Calls no claim of fingerprints fraud."""

    def judged(self, verdict):
        return {**super().judged(verdict), "fraud_detected": False}


class DistrustfulToday(RightNode):
    def judged(self, verdict):
        return {**super().judged(verdict), "fraud_detected": True}


class ImpreciseToday(RightNode):
    """Recomputes other fingerprints than it generates, though near enough to agree."""

    def fingerprint(self, request, nonce):
        made = super().fingerprint(request, nonce)
        return made if self.state == "GENERATING" else made[:8] + ("A" if made[8] != "A" else "B") + made[9:]


class Repeating(RightNode):
    """Sends fingerprints twice."""

    def post(self, path, batch):
        super().post(path, batch)
        if "artifacts" in batch:
            super().post(path, batch)


class Forgetful(RightNode):
    """Accepts batches of any block."""

    def refusal(self, batch):
        return 200, "OK"


class Imprecise(RightNode):
    def recomputed(self, batch):
        return [value * (1 - 1e-7) for value in super().recomputed(batch)]


class Lazy(RightNode):
    """Ignores the public key."""

    def recomputed(self, batch):
        return super().recomputed({**batch, "public_key": blocks.PUBLIC_KEY})


class Replayed(RightNode):
    """Ignores the block hash."""

    def distance(self, batch, nonce):
        return distance({**batch, "block_hash": blocks.BLOCK_HASH}, nonce)


class Unprojected(RightNode):
    def metrics(self, name):
        return {**super().metrics(name), "projection": 0.0}


class Biased(RightNode):
    def recomputed(self, batch):
        return [value * 0.9 for value in super().recomputed(batch)]


class Silent(RightNode):
    def post(self, path, batch):
        """Send no callback."""


class Unsigned(RightNode):
    def signature(self, body):
        return ""


class Stubborn(RightNode):
    """Stays in GENERATING."""

    def phase(self, name):
        """Do nothing."""


class Rude(RightUser):
    def ask(self, question, state):
        chat = super().ask(question, state)
        return chat if chat.served else Chat(state, 0.0, 0.0, status=503, error="no")


class Served(RightUser):
    def ask(self, question, state):
        threading.Event().wait(0.005)
        return Chat(state, 0.0, 0.3, (0.1, 0.2), "text")


class CutOff(RightUser):
    def ask(self, question, state):
        chat = super().ask(question, state)
        return Chat(state, 0.0, 0.0, status=0, error="gone") if state == "VALIDATING" else chat


REFUSED = "chats are refused with 503 and Retry-After while GENERATING"
ARRIVED = "a fingerprint of every nonce reached the callback receiver exactly once"
BITS_TODAY = "fingerprints recomputed while users are served are bit-identical to those of the round"
HONEST_TODAY = "honest fingerprints are accepted"
ELSEWHERE = "honest, elsewhere: accepted"
CHEATS_TODAY = ["another key's: fraud detected", "nothing: fraud detected"]
HONEST = "honest distances are accepted"
BITS = "distances recomputed while users are served are bit-identical to the proofs"
SURVEY = "distances are distributed as geometry predicts"
MADE_UP = "made-up distances: fraud detected"
OTHER_KEY = "distances of another public key: fraud detected"
REPLAY = "distances of the previous block, under this block's hash: fraud detected"
PROOFS = "every proof reached the callback receiver exactly once"
VERDICTS = "the verdicts reached the receiver, including those on every cheat"
SIGNED = "every callback was signed with the shared key"


@pytest.mark.parametrize(
    ("node_type", "user_type", "expected"),
    [
        (Gullible, RightUser, [MADE_UP, OTHER_KEY, REPLAY]),
        (Distrustful, RightUser, [HONEST]),
        (GullibleToday, RightUser, [*CHEATS_TODAY, VERDICTS]),
        (DistrustfulToday, RightUser, [HONEST_TODAY, ELSEWHERE, VERDICTS]),
        (ImpreciseToday, RightUser, [BITS_TODAY]),
        (Repeating, RightUser, [ARRIVED]),
        (Forgetful, RightUser, ["a batch with another block hash is refused with 400"]),
        (Imprecise, RightUser, [BITS]),
        (Lazy, RightUser, [OTHER_KEY, VERDICTS]),
        (Replayed, RightUser, [REPLAY, VERDICTS]),
        (Unprojected, RightUser, ["both projections ran"]),
        (Biased, RightUser, [BITS, SURVEY, MADE_UP, OTHER_KEY, REPLAY, VERDICTS]),
        (Silent, RightUser, [ARRIVED, BITS_TODAY, HONEST_TODAY, PROOFS, VERDICTS, SIGNED]),
        (Unsigned, RightUser, [ARRIVED, BITS_TODAY, HONEST_TODAY, PROOFS, VERDICTS, SIGNED]),
        (RightNode, Rude, [REFUSED]),
        (RightNode, Served, [REFUSED]),
        (RightNode, CutOff, 2 * ["chats stream while VALIDATING"]),
    ],
)
def test_what_is_wrong_fails_its_check_and_no_other(monkeypatch, node_type, user_type, expected):
    outcome, shown = played(monkeypatch, node_type, user_type)
    assert failures(outcome) == expected
    assert not outcome.passed
    assert shown.count("FAILED") == len(expected)


class Shifted(RightNode):
    """Its logits have a mean other than zero: distances lie closer together, around another centre."""

    def distance(self, batch, nonce):
        return 1.43 + 0.5 * (super().distance(batch, nonce) - 2**0.5)


def test_a_model_whose_logits_have_a_mean_passes_by_a_survey(monkeypatch):
    outcome, shown = played(monkeypatch, Shifted, geometric=False)
    assert failures(outcome) == []
    assert len(outcome.checks) == 22
    assert 1.41 < outcome.r_target < 1.43
    assert outcome.expected_share == 0.2
    assert 0.1 < outcome.valid / outcome.checked < 0.35
    assert "the share of valid nonces is that of a survey" in shown
    assert [band.state for band in outcome.bands][3:5] == ["VALIDATING", "STOPPED"]


def test_a_node_that_finds_more_than_the_survey_is_noticed(monkeypatch):
    class Generous(Shifted):
        def distance(self, batch, nonce):
            return super().distance(batch, nonce) - (0.008 if nonce < 10**8 else 0)

    plan = replace(PLAN, proofs=64, survey=256)
    outcome, _ = played(monkeypatch, Generous, plan=plan, geometric=False)
    assert failures(outcome) == ["the share of valid nonces is that of a survey"]


def test_a_node_that_stays_in_a_state_is_noticed(monkeypatch):
    outcome, shown = played(monkeypatch, Stubborn)
    assert "the node is VALIDATING" in failures(outcome)
    assert "it reports GENERATING" in shown


def test_generating_ends_where_nothing_is_found(monkeypatch):
    class Fruitless(RightNode):
        def begin(self, name, config):
            super().begin(name, config if config["block_hash"] == blocks.EARLIER_HASH else {**config, "r_target": 0.1})

    outcome, _ = played(monkeypatch, Fruitless, plan=replace(PLAN, max_generate_seconds=0.1, survey=32))
    assert "64 proofs are found within 0 s" in failures(outcome)
    assert HONEST in failures(outcome)


def test_long_validation_is_cut_short_after_two_batches(monkeypatch):
    plan = replace(PLAN, proofs=200, validate_seconds=0.0, survey=32)
    outcome, shown = played(monkeypatch, plan=plan)
    assert failures(outcome) == []
    assert "2 batches, 64 nonces, 0 mismatches" in shown
    assert "2 batches, 64 nonces, 0 invalid" in shown
