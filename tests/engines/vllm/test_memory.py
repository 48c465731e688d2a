"""A round that would not find its memory on a GPU is told so with the number to change; torch's figures are given."""

import pytest
import torch
from vllm_stand_ins import Model, worker

from poc_kernels.engines.vllm.engine import VllmEngine
from poc_kernels.engines.vllm.memory import lacking_memory
from poc_kernels.protocol import EngineProver, PoCConfig, Row

pytestmark = pytest.mark.usefixtures("stand_ins")

GIB = 2**30


class Device:
    """A GPU whose forwards take ``base`` bytes and ``per_row`` for each row; the tensors lie on the CPU."""

    type = "cuda"

    def __init__(self, monkeypatch, free, base=GIB, per_row=GIB):
        self.rows, self.emptied = 0, 0
        for name, answer in {
            "memory_allocated": lambda device: 70 * GIB,
            "reset_peak_memory_stats": lambda device: None,
            "max_memory_allocated": lambda device: 70 * GIB + base + self.rows * per_row,
            "mem_get_info": lambda device: (free, 80 * GIB),
            "empty_cache": self.empty,
        }.items():
            monkeypatch.setattr(torch.cuda, name, answer)

    def empty(self):
        self.emptied += 1

    def __str__(self):
        return "cuda:0"


class Counting(Model):
    device = None

    def forward(self, *arguments, **named):
        self.device.rows = int((named["positions"] == 0).sum())
        return super().forward(*arguments, **named)


class Rig:
    """An engine on such a device, and its prover; a CPU computes."""

    def __init__(self, monkeypatch, free, **forward):
        self.device, model = Device(monkeypatch, free, **forward), Counting()
        Counting.device = self.device
        self.monkeypatch, self.engine = monkeypatch, VllmEngine(worker(model, max_model_len=16))
        self.prover = EngineProver(self.engine)

    def capture(self, config):
        """Take it that graphs of a round's forward are there."""
        with torch.inference_mode():
            self.prover.prove(config, [Row("key", 1)])
        (transform,) = self.prover.transforms(config)
        repeated = self.engine.repeated
        assert next(reversed(repeated._kinds)) == ((config.batch_size, min(16, config.seq_len), 32), transform)
        repeated.captured, repeated._captured_kind = "graphs", next(reversed(repeated._kinds))

    def lacking(self, config=None):
        """What is said, and whether graphs stay."""
        compute, zeros, emptied = self.engine.compute_states, torch.zeros, self.device.emptied
        captured = self.engine.repeated.captured
        with self.monkeypatch.context() as patch:
            patch.setattr(self.engine, "device", self.device)
            patch.setattr(torch, "zeros", lambda *shape, **named: zeros(*shape, dtype=named["dtype"]))
            patch.setattr(self.engine, "compute_states", lambda x: self.on_cpu(compute, x))
            said = lacking_memory(self.engine, self.prover, config)
        holds = captured is not None and self.engine.repeated.captured is not None
        assert (self.device.emptied == emptied) == holds
        return said, holds

    def on_cpu(self, compute, x):
        device, self.engine.device = self.engine.device, torch.device("cpu")
        try:
            return compute(x)
        finally:
            self.engine.device = device


@pytest.fixture
def rig(monkeypatch):
    return lambda free, **forward: Rig(monkeypatch, free, **forward)


def config(proof="distances", **changes):
    target = {"r_target": 1.4} if proof == "distances" else {}
    values = {"block_hash": "block", "block_height": 7, "public_key": "key", "proof": proof, "seq_len": 16, **target}
    return PoCConfig(**{**values, **changes})


FORMS = ["distances", "vectors", "fingerprint"]


def test_a_round_that_fits(rig):
    assert rig(42 * GIB).lacking() == (None, False)  # 1.25 times 33 GiB
    assert rig(42 * GIB).lacking(config()) == (None, False)


def test_a_round_that_does_not_fit(rig):
    assert rig(38 * GIB).lacking()[0] == (
        "proofs of 32 x 16 tokens need 41.25 GiB, 38.00 GiB are free on cuda:0: take 0.05 off --gpu-memory-utilization"
    )
    assert rig(3 * GIB).lacking(config(batch_size=2, seq_len=8))[0] == (
        "proofs of 2 x 8 tokens need 3.75 GiB, 3.00 GiB are free on cuda:0: take 0.01 off --gpu-memory-utilization"
    )


@pytest.mark.parametrize("form", FORMS)
def test_what_graphs_hold_need_not_be_free_once_more(rig, form):
    """Those of a round's default shape are captured at start, on what was found to be free for them then."""
    tight = rig(1 * GIB)
    captured = config(form)
    tight.capture(captured)
    assert tight.lacking(captured) == (None, True)
    assert tight.lacking(config(form, block_hash="next")) == (None, True)
    # Of another shape, they are given back before it is measured.
    said, holds = tight.lacking(config(form, seq_len=15, batch_size=31))
    assert not holds
    assert said.startswith("proofs of 31 x 15 tokens need 40.00 GiB, 1.00 GiB are free")


def test_a_sequence_is_no_longer_than_the_model_takes(rig):
    tight = rig(1 * GIB)
    tight.capture(config())
    assert tight.lacking(config(seq_len=256)) == (None, True)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("before", FORMS)
def test_what_graphs_of_one_form_hold_is_no_other_form_s(rig, before, form):
    tight = rig(1 * GIB)
    tight.capture(config(before))
    said, holds = tight.lacking(config(form))
    assert (holds, said is None) == (form == before, form == before)


@pytest.mark.parametrize("form", FORMS)
def test_graphs_of_other_rows_of_fingerprints_are_those_of_no_round(rig, form):
    tight = rig(1 * GIB)
    tight.capture(config("fingerprint", batch_size=31))
    assert not tight.lacking(config(form))[1]


@pytest.mark.parametrize("form", FORMS)
def test_no_round_is_refused_for_signs_that_are_kept(rig, monkeypatch, form):
    """They are drawn anew for each forward; those that the next round takes are in what it needs."""
    large = config("fingerprint", batch_size=64)
    tight = rig(42 * GIB)
    with torch.inference_mode():
        values = tight.prover.prove(large, [Row("key", 1)]).values
    (flips,) = tight.prover.transforms(large)
    kept = 10 * GIB
    monkeypatch.setattr(
        torch.cuda, "mem_get_info", lambda device: (42 * GIB - (kept if flips.masks.numel() else 0), 80 * GIB)
    )
    assert tight.lacking(config(form)) == (None, False)
    assert tight.prover.transforms(large) == []
    with torch.inference_mode():
        assert tight.prover.prove(large, [Row("key", 1)]).values == values


def test_signs_are_kept_where_there_is_room(rig):
    wide = rig(42 * GIB)
    fingerprints = config("fingerprint")
    with torch.inference_mode():
        wide.prover.prove(fingerprints, [Row("key", 1)])
    transforms = wide.prover.transforms(fingerprints)
    assert wide.lacking(config()) == (None, False)
    assert wide.prover.transforms(fingerprints) == transforms != []


def test_a_cpu_has_what_there_is():
    engine = VllmEngine(worker())
    assert lacking_memory(engine, EngineProver(engine)) is None
