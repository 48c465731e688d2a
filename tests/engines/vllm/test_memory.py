"""A round that would not find its memory on a GPU is told so with the number to change; torch's figures are given."""

import pytest
import torch
from vllm_stand_ins import Model, worker

from poc_kernels.engines.vllm.engine import VllmEngine
from poc_kernels.engines.vllm.memory import lacking_memory

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


@pytest.fixture
def lacking(monkeypatch):
    def ask(free, captured=None, **sizes):
        device, model = Device(monkeypatch, free), Counting()
        Counting.device = device
        engine = VllmEngine(worker(model, max_model_len=16))
        engine.repeated.captured = captured and "graphs"
        engine.repeated._captured_kind = captured and (captured, None)
        compute, zeros = engine.compute_states, torch.zeros
        with monkeypatch.context() as patch:
            patch.setattr(engine, "device", device)
            patch.setattr(torch, "zeros", lambda *shape, **named: zeros(*shape, dtype=named["dtype"]))
            patch.setattr(engine, "compute_states", lambda x: on_cpu(engine, compute, x))
            said = lacking_memory(engine, **sizes)
        holds = captured is not None and engine.repeated.captured is not None
        assert device.emptied == (0 if holds else 1)
        return said, holds

    def on_cpu(engine, compute, x):
        device, engine.device = engine.device, torch.device("cpu")
        try:
            return compute(x)
        finally:
            engine.device = device

    return ask


def test_a_round_that_fits(lacking):
    assert lacking(42 * GIB) == (None, False)  # 1.25 times 33 GiB


def test_a_round_that_does_not_fit(lacking):
    assert lacking(38 * GIB)[0] == (
        "proofs of 32 x 16 tokens need 41.25 GiB, 38.00 GiB are free on cuda:0: take 0.05 off --gpu-memory-utilization"
    )
    assert lacking(3 * GIB, batch_size=2, seq_len=8)[0] == (
        "proofs of 2 x 8 tokens need 3.75 GiB, 3.00 GiB are free on cuda:0: take 0.01 off --gpu-memory-utilization"
    )


def test_what_graphs_hold_need_not_be_free_once_more(lacking):
    """Those of a round's default shape are captured at start, on what was found to be free for them then."""
    assert lacking(1 * GIB, captured=(32, 16, 32)) == (None, True)
    assert lacking(1 * GIB, captured=(32, 16, 32), seq_len=256) == (None, True)  # of 16 positions at most
    # Of another shape, they are given back before it is measured.
    said, holds = lacking(1 * GIB, captured=(32, 15, 32))
    assert not holds
    assert said.startswith("proofs of 32 x 16 tokens need 41.25 GiB, 1.00 GiB are free")


def test_a_cpu_has_what_there_is():
    assert lacking_memory(VllmEngine(worker())) is None
