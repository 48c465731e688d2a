"""Validations with a configuration of their own: they need no round, and end with none."""

from typing import Any

import pytest
from small_engine import SmallEngine

from poc_kernels.protocol import DistanceProver, IllegalTransitionError, PoCConfig, PoCManager, PoCState, ProofBatch


def config(**changes: Any) -> PoCConfig:
    values = {"block_hash": "block", "block_height": 7, "public_key": "key", "r_target": 1.4, "batch_size": 5}
    return PoCConfig(**{**values, "seq_len": 6, **changes})


def manager() -> PoCManager:
    return PoCManager(DistanceProver(SmallEngine()))


def claim(nonces: range | list[int], dist: tuple[float, ...] = (), block_hash: str = "block") -> ProofBatch:
    return ProofBatch("key", block_hash, 7, list(nonces), list(dist))


def distances(nonces: range | list[int]) -> list[float]:
    """Those of a round."""
    m = manager()
    m.init_round(config())
    computed: list[float] = m.validate(claim(nonces)).dist
    return computed


def test_requests_need_no_round_and_outlive_all_rounds() -> None:
    m = manager()
    request = m.validation(claim(range(7)), config(public_key="its key", callback_url="http://host"))
    assert (m.state, m.config) == (PoCState.IDLE, None)
    m.recompute([(request, 5)])
    m.start_round(config(block_hash="another"))
    m.run_batch()
    m.stop_round()
    m.recompute([(request, 2)])
    assert m.verdict(request).dist == distances(range(7))
    assert request.config.callback_url == "http://host"


def test_requests_share_forwards_while_there_are_any_of_one_kind() -> None:
    m = manager()
    first, second = (m.validation(claim([nonce]), config(public_key=key)) for nonce, key in ((1, "a"), (2, "b")))
    assert first.round is second.round
    for changes in ({"block_hash": "other"}, {"seq_len": 5}, {"batch_size": 2}, {"use_random_projection": True}):
        other = m.validation(claim([1], block_hash=str(changes.get("block_hash", "block"))), config(**changes))
        assert other.round is not first.round
    m.recompute([(first, 1), (second, 1)])
    assert len(m.prover.engine.shapes) == 1  # type: ignore[attr-defined]
    del other
    assert list(m._requested.values()) == [first.round]
    del first, second
    assert list(m._requested.values()) == []


def test_requests_are_judged_by_their_own_configuration() -> None:
    m = manager()
    (distance,) = distances([3])
    requests = [m.validation(claim([3], (distance / 3,)), config(r_target=distance * factor)) for factor in (0.5, 2)]
    m.recompute([(request, 1) for request in requests])
    assert [m.verdict(request).n_invalid for request in requests] == [1, 0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"proof": "other"}, "proof must be one of distances, got 'other'"),
        ({"r_target": None}, "r_target must be a positive number"),
        ({"block_height": 8}, "Block height mismatch: block_height of the batch must be the round's, 8, got 7"),
        ({"seq_len": 2**20}, "seq_len"),
    ],
)
def test_requests_that_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        manager().validation(claim([1]), config(**changes))


def test_a_round_that_generates_may_be_kept() -> None:
    m = manager()
    m.start_round(config(), replace=False)
    for again in (config(), config(block_hash="another")):
        with pytest.raises(IllegalTransitionError, match="Already generating"):
            m.start_round(again, replace=False)
    assert m.config is not None
    assert m.config.block_hash == "block"
    m.set_phase(PoCState.VALIDATING)
    m.start_round(config(block_hash="another"), replace=False)
    assert (m.state, m.config.block_hash) == (PoCState.GENERATING, "another")
