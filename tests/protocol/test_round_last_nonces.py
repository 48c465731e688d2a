"""Where the nonces of a node end that validators take: a round ends generation there, and says why."""

from __future__ import annotations

from typing import Any

import pytest
from small_engine import SmallEngine

from poc_kernels.protocol import EngineProver, IllegalTransitionError, PoCConfig, PoCManager, PoCState, RoundEndedError

LAST = {"distances": 2**63 - 1, "vectors": 2**31 - 1, "fingerprint": 2**31 - 1}
BATCH = 4


def config(proof: str, **changes: Any) -> PoCConfig:
    values = {"block_hash": "block", "block_height": 7, "public_key": "key", "seq_len": 16, "batch_size": BATCH}
    target = {"r_target": 3.0} if proof == "distances" else {}
    return PoCConfig(**{**values, **target, "proof": proof, **changes})


def manager() -> PoCManager:
    return PoCManager(EngineProver(SmallEngine()))


def begun(proof: str, indices: int, stride: int) -> tuple[PoCManager, list[int]]:
    """A manager that generates, and the nonces that its node has left."""
    m, last = manager(), LAST[proof]
    if proof == "distances":  # no node's first nonce is near the last
        of = config(proof, node_id=last % stride, node_count=stride)
    else:
        node_id = last - (2 * indices - 1) * stride
        of = config(proof, node_id=node_id, node_count=stride, group_id=1, n_groups=2)
    m.start_round(of)
    count = of.nonces_up_to(last)
    assert m._round is not None
    m._round.tried = count - indices
    return m, [of.nonce(index) for index in range(count - indices, count)]


@pytest.mark.parametrize("proof", LAST)
@pytest.mark.parametrize("stride", [1, 3, 1000])
@pytest.mark.parametrize("indices", [1, BATCH - 1, BATCH, BATCH + 1, 2 * BATCH + 2])
def test_a_round_ends_with_the_last_nonce(
    proof: str, stride: int, indices: int, caplog: pytest.LogCaptureFixture
) -> None:
    m, left = begun(proof, indices, stride)
    told: list[PoCState] = []
    m.on_change(lambda: told.append(m.state))
    assert len(left) == indices
    assert left[-1] == LAST[proof]
    why = f"every nonce of this node up to {LAST[proof]} was tried"
    given: list[int] = []
    while m.state == PoCState.GENERATING:
        assert m.status()["generation_ended"] is None
        given += m.run_batch().nonces
    assert given == left
    status = m.status()
    assert (status["state"], status["generation_ended"]) == ("VALIDATING", why)
    assert told == [PoCState.VALIDATING]
    assert [record.message for record in caplog.records] == [f"the round generates no more: {why}"]
    with pytest.raises(IllegalTransitionError, match=f"the state is VALIDATING: {why}$"):
        m.run_batch()


@pytest.mark.parametrize("proof", LAST)
def test_what_was_generated_last_is_validated_as_ever(proof: str) -> None:
    """Though its forward was filled up: in a round of another node, and in this one."""
    m, _ = begun(proof, BATCH + 1, 1)
    batches = [m.run_batch(), m.run_batch()]
    assert [len(batch) for batch in batches] == [BATCH, 1]
    of = m.config
    assert of is not None
    other = manager()
    other.start_round(config(proof, public_key="other"), PoCState.VALIDATING)
    for validator in (m, other):
        for batch in batches:
            assert validator.validate(batch).n_invalid == 0


def test_the_same_round_generates_no_more_and_another_one_does() -> None:
    m, _ = begun("vectors", 2, 1)
    m.run_batch()
    of = m.config
    assert of is not None
    text = f"phase GENERATING needs another round: every nonce of this node up to {2**31 - 1} was tried"
    for again in (
        lambda: m.set_phase(PoCState.GENERATING),
        lambda: m.start_round(of),
        lambda: m.start_round(of, replace=False),
    ):
        with pytest.raises(IllegalTransitionError, match=text):
            again()
        assert m.state == PoCState.VALIDATING
    m.set_phase(PoCState.VALIDATING)
    m.init_round(of)
    assert m.status()["total_checked"] == 2
    m.stop_round()
    assert m.status()["generation_ended"] is not None
    m.start_round(config("vectors"))
    assert m.status()["generation_ended"] is None
    assert m.run_batch().nonces == [0, 1, 2, 3]


@pytest.mark.parametrize("proof", ["vectors", "fingerprint"])
@pytest.mark.parametrize(
    ("place", "first"),
    [
        ({"node_id": 2**31}, 2**31),
        ({"node_id": 2**30, "node_count": 2**30, "group_id": 1, "n_groups": 2}, 2**31),
        ({"node_id": 2**31 - 5, "node_count": 5, "group_id": 1, "n_groups": 2}, 2**31),
        ({"node_id": 2**62}, 2**62),
    ],
)
def test_a_node_without_a_nonce_that_validators_take(proof: str, place: dict[str, int], first: int) -> None:
    m = manager()
    must = f"node_id, node_count, group_id and n_groups must give nonces of at most {2**31 - 1}"
    text = f"{must}, got {first} as the first"
    with pytest.raises(ValueError, match=text):
        m.start_round(config(proof, **place))
    assert m.state == PoCState.IDLE
    m.init_round(config(proof, **place))  # it validates
    with pytest.raises(ValueError, match=text):
        m.set_phase(PoCState.GENERATING)
    m.set_phase(PoCState.VALIDATING)


def test_distances_have_nonces_that_artifacts_have_not() -> None:
    m = manager()
    m.start_round(config("distances", node_id=2**31 - 2))
    assert m.run_batch().nonces == [2**31 - 2, 2**31 - 1, 2**31, 2**31 + 1]


def test_forwards_that_are_likely_to_follow_end_there_too() -> None:
    m, left = begun("vectors", 2 * BATCH + 1, 1)
    of = m.config
    assert of is not None
    told: list[list[list[int]]] = []
    prove = m.prover.prove

    def proved(config: Any, rows: Any, pause: Any, then: Any) -> Any:
        told.append([[row.nonce for row in forward] for forward in (rows, *then)])
        return prove(config, rows, pause, then)

    m.prover.prove = proved  # type: ignore[method-assign]
    assert [[row.nonce for row in rows] for rows in m.upcoming(of, 5)] == [left[:4], left[4:8], left[8:]]
    while m.state == PoCState.GENERATING:
        m.run_batch()
    assert told == [[left[:4], left[4:8], left[8:]], [left[4:8], left[8:]], [left[8:]]]
    assert m.upcoming(of, 2) == []


def test_a_round_that_is_stopped_during_its_last_batch_did_not_end_by_itself() -> None:
    m, _ = begun("vectors", 2, 1)

    def stop() -> None:
        m.stop_round()

    with pytest.raises(RoundEndedError):
        m.run_batch(stop)
    assert (m.state, m.status()["generation_ended"]) == (PoCState.STOPPED, None)
