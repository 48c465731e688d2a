"""Slices of a forward: where they are cut, and that no bit depends on it."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_same_bits
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig, MixtralConfig, Qwen3Config

from poc_kernels.scheduling import SlicedForward, Slices
from poc_kernels.scheduling.slices import MEASURED_FORWARDS, plan
from poc_kernels.scheduling.stopwatch import Span

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
CONFIGS = {
    "qwen3": Qwen3Config(**SMALL),
    "llama": LlamaConfig(**SMALL),
    "mixtral": MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2),
    "gemma2": Gemma2Config(**SMALL, sliding_window=8),
    "gpt2": GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=4, n_positions=64),
}
FINE, WHOLE = 1e-9, 1e9
"""Slices of single calls; one slice."""


class GivenUp(Exception):  # noqa: N818
    """What a pause raises."""


def never() -> None:
    pass


def decoder(name: str, dtype: torch.dtype = torch.float32) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name])).to(dtype).eval()
    return getattr(model, model.base_model_prefix)


def forward_of(module: Any, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    @torch.inference_mode()
    def forward() -> torch.Tensor:
        states: torch.Tensor = module(inputs_embeds=x, use_cache=False).last_hidden_state
        return states

    return forward


def inputs(seed: int = 0, batch: int = 2, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(batch, 12, 32, generator=torch.Generator().manual_seed(seed)).to(dtype)


# ---- plan() ----


def timings(**seconds: float) -> list[Span]:
    return [Span(name, length) for name, length in seconds.items()]


def test_consecutive_calls_are_put_together() -> None:
    forward = timings(start=1, a=2, b=1, c=5, d=1, e=3)
    assert plan([forward], 4.0) == Slices((3, 4), (4, 5, 4))
    assert plan([forward], 4.0).longest_seconds == 5
    assert plan([forward], 13.0) == Slices((), (13,))
    assert plan([forward], 0.5) == Slices((1, 2, 3, 4, 5), (1, 2, 1, 5, 1, 3))


def test_the_shortest_time_of_each_call_counts() -> None:
    assert plan([timings(a=1, b=9), timings(a=8, b=1), timings(a=2, b=2)], 2.0) == Slices((), (2,))


def test_calls_that_depend_on_data_are_those_of_the_first_forward() -> None:
    forward = timings(a=4, b=4, c=4)
    assert plan([forward, timings(a=1)], 4.0) == Slices((1, 2), (1, 4, 4))
    assert plan([forward, timings(a=2, x=1, c=3, d=9)], 4.0) == Slices((1, 2), (2, 4, 3))


def test_nothing_ran() -> None:
    assert plan([[]], 1.0) == Slices((), (0,))
    assert plan([[]], 1.0).longest_seconds == 0


@given(
    forwards=st.lists(
        st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 50)), min_size=1, max_size=25),
        min_size=1,
        max_size=4,
    ),
    slice_seconds=st.integers(1, 120),
)
def test_slices_are_as_long_as_asked_for_where_single_calls_allow(
    forwards: list[list[tuple[str, int]]], slice_seconds: int
) -> None:
    planned = plan([[Span(*each) for each in forward] for forward in forwards], slice_seconds)
    shortest = [
        min(forward[place][1] for forward in forwards if forward[place : place + 1] and forward[place][0] == name)
        for place, (name, _) in enumerate(forwards[0])
    ]
    edges = [0, *planned.cuts, len(shortest)]
    assert edges == sorted(set(edges))
    assert planned.seconds == tuple(sum(shortest[start:end]) for start, end in itertools.pairwise(edges))
    for start, end in itertools.pairwise(edges):
        assert sum(shortest[start:end]) <= slice_seconds or end - start == 1
        if end < len(shortest):
            assert sum(shortest[start : end + 1]) > slice_seconds  # no slice could have been longer


# ---- SlicedForward ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slice_seconds", [FINE, 1e-4, WHOLE])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_slices_change_no_bit(name: str, slice_seconds: float, dtype: torch.dtype) -> None:
    plain, module = decoder(name, dtype), decoder(name, dtype)
    sliced = SlicedForward(CPU, slice_seconds)
    for seed in range(MEASURED_FORWARDS + 2):  # other data every time: experts are chosen by it
        x = inputs(seed, dtype=dtype)
        pauses: list[None] = []
        states = sliced.run(forward_of(module, x), lambda pauses=pauses: pauses.append(None))
        assert_same_bits(states, forward_of(plain, x)())
        if seed < MEASURED_FORWARDS:
            assert len(pauses) > 10
            assert (sliced.slices is None) == (seed + 1 < MEASURED_FORWARDS)
            continue
        assert sliced.slices is not None
        if name != "mixtral":
            assert len(pauses) == len(sliced.slices.seconds) - 1
        assert (len(pauses) == 0) == (slice_seconds == WHOLE)


def test_a_forward_outside_run_does_not_stop() -> None:
    module = decoder("qwen3")
    sliced = SlicedForward(CPU, FINE)

    def stop() -> None:
        raise GivenUp

    with pytest.raises(GivenUp):
        sliced.run(forward_of(module, inputs()), stop)
    forward_of(module, inputs())()


@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("at", [1, 2, 7])
def test_a_pause_that_raises_gives_the_forward_up_and_the_next_is_right(measured: bool, at: int) -> None:
    plain, module = decoder("llama"), decoder("llama")
    sliced = SlicedForward(CPU, FINE)
    if measured:
        for _ in range(MEASURED_FORWARDS):
            sliced.run(forward_of(module, inputs()), never)
    pauses = 0

    def stop() -> None:
        nonlocal pauses
        pauses += 1
        if pauses == at:
            raise GivenUp

    with pytest.raises(GivenUp):
        sliced.run(forward_of(module, inputs(1)), stop)
    assert pauses == at
    assert (sliced.slices is not None) == measured
    for seed in range(4):
        x = inputs(seed)
        assert_same_bits(sliced.run(forward_of(module, x), never), forward_of(plain, x)())
    assert sliced.slices is not None
    assert len(sliced.slices.cuts) == len(sliced.slices.seconds) - 1  # what was given up is no part of it


def test_calls_are_not_longer_because_others_have_the_cores() -> None:
    """While users compute, a call may be preempted for long, which is not time of its own."""
    sliced = SlicedForward(CPU, 0.01)
    x = torch.ones(4)

    def forward() -> torch.Tensor:
        y = x + 1
        time.sleep(0.02)
        return y * 2

    for _ in range(MEASURED_FORWARDS):
        sliced.run(forward, lambda: None)
    assert sliced.slices is not None
    assert sliced.slices.cuts == ()
    assert sliced.slices.longest_seconds < 0.01


def test_a_module_called_twice_stops_each_time() -> None:
    shared, other = nn.Linear(4, 4), nn.Linear(4, 4)
    module = nn.Sequential(shared, other, shared, other)
    sliced = SlicedForward(CPU, FINE)
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    expected = other(shared(other(shared(x))))
    for _ in range(MEASURED_FORWARDS):
        assert_same_bits(sliced.run(lambda: module(x), never), expected)
    assert sliced.slices is not None
    assert sliced.slices.cuts == (1, 2, 3)
    pauses: list[None] = []
    assert_same_bits(sliced.run(lambda: module(x), lambda: pauses.append(None)), expected)
    assert len(pauses) == 3


def test_cuts_are_those_of_the_plan_in_order() -> None:
    ran: list[str] = []

    def noted(name: str) -> torch.Tensor:
        ran.append(name)
        return torch.zeros(2).add(1)

    def forward() -> list[torch.Tensor]:
        return [noted(str(place)) for place in range(3)]

    sliced = SlicedForward(CPU, FINE)
    sliced.slices = Slices((2, 4), (0.1, 0.1, 0.1))  # before the second and the third zeros()
    sliced.run(forward, lambda: ran.append("pause"))
    assert ran == ["0", "1", "pause", "2", "pause"]


def test_what_a_pause_computes_is_no_part_of_the_forward() -> None:
    sliced = SlicedForward(CPU, FINE)
    x = torch.ones(3)

    def compute_something_else() -> None:
        torch.zeros(3).add(1).sum()

    for _ in range(MEASURED_FORWARDS):
        sliced.run(lambda: x.add(1).mul(2).sub(3), compute_something_else)
    assert sliced.slices is not None
    assert sliced.slices.cuts == (1, 2)


def test_looks_at_attributes_are_no_calls() -> None:
    sliced = SlicedForward(CPU, FINE)
    x = torch.ones(3, 2)

    def forward() -> torch.Tensor:
        assert (x.shape, x.dtype, x.device, x.requires_grad) == ((3, 2), torch.float32, CPU, False)
        return x.add(1).T.mul(2)

    pauses: list[None] = []
    sliced.run(forward, lambda: pauses.append(None))
    assert len(pauses) == 1


def test_calls_that_depend_on_data_change_no_bit() -> None:
    sliced = SlicedForward(CPU, FINE)

    def forward(count: int) -> torch.Tensor:
        x = torch.ones(3)
        for _ in range(count):
            x = x.mul(3).sub(1)
        return x

    for count in (3, 1, 5, 2, 7, 0, 4):
        assert_same_bits(sliced.run(lambda count=count: forward(count), never), forward(count))


def test_forget_measures_anew() -> None:
    module = decoder("qwen3")
    sliced = SlicedForward(CPU, FINE)
    for batch in (2, 5):
        sliced.forget()
        assert sliced.slices is None
        for _ in range(MEASURED_FORWARDS):
            assert sliced.slices is None
            sliced.run(forward_of(module, inputs(batch=batch)), never)
        assert sliced.slices is not None
    sliced.forget()
    sliced.run(forward_of(module, inputs()), never)
    assert sliced.slices is None


@pytest.mark.parametrize("slice_seconds", [0, -1.0, float("nan")])
def test_lengths_that_are_none(slice_seconds: float) -> None:
    with pytest.raises(ValueError, match=f"slice_seconds must be positive, got {slice_seconds}"):
        SlicedForward(CPU, slice_seconds)
