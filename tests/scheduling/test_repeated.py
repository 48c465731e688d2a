"""Forwards of several kinds, by shape and option: each is measured once, and one at a time has graphs."""

import pytest
import torch
from helpers import assert_same_bits

from poc_kernels.scheduling import RepeatedForward
from poc_kernels.scheduling.repeated import CapturedForward
from poc_kernels.scheduling.slices import MEASURED_FORWARDS


class Repeated(RepeatedForward):
    """The path of CUDA graphs on a CPU; what is captured is recorded."""

    def __init__(self, cuda_graphs=True, no_room=()):
        super().__init__(self.compute, torch.device("cpu"), slice_seconds=1e-9, cuda_graphs=False)
        self._cuda_graphs = cuda_graphs
        self.captures, self.no_room, self.computed = [], no_room, 0

    def compute(self, inputs, option):
        self.computed += 1
        for _ in range(1 if option is None else option):
            inputs = torch.tanh(inputs) * 2
        return inputs

    def _capture(self, example, option):
        self.captures.append((len(example), option))
        if option in self.no_room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        static_input, static_output = example.clone(), example.clone()
        compute = self.compute

        class Graph:
            def replay(self):
                static_output.copy_(compute(static_input, option))

        return CapturedForward([Graph()], static_input, static_output)


def run(repeated, kinds):
    """Compute forwards of these lengths and options; return of which of them there were pauses."""
    paused = []
    for seed, (length, option) in enumerate(kinds):
        inputs = torch.randn(length, generator=torch.Generator().manual_seed(seed))
        pauses = []
        result = repeated(inputs, lambda pauses=pauses: pauses.append(1), option)
        assert_same_bits(result, RepeatedForward.__call__(Repeated(False), inputs, lambda: None, option))
        paused.append(len(pauses))
    return paused


def test_each_kind_is_measured_once():
    repeated = Repeated(cuda_graphs=False)
    kinds = [(5, 1), (5, 3), (7, 3)]
    for number in range(MEASURED_FORWARDS + 1):
        for kind in kinds:
            assert run(repeated, [kind]) == [2 * kind[1] - 1]
            assert (repeated.slices is not None) == (number >= MEASURED_FORWARDS - 1)
    assert len(repeated.slices.cuts) == 5
    run(repeated, [(5, 1)])
    assert len(repeated.slices.cuts) == 1


def test_a_new_kind_takes_the_place_of_the_one_before():
    repeated = Repeated()
    run(repeated, [(5, 1), (5, 1), (5, 3), (5, 3), (7, 3)])
    assert repeated.captures == [(5, 1), (5, 3), (7, 3)]
    assert repeated.holds((7,), 3)
    assert not repeated.holds((5,), 3)
    assert not repeated.holds((7,), 1)
    assert not repeated.holds((7,))


def test_two_kinds_that_alternate_are_not_captured_again_and_again():
    repeated = Repeated()
    run(repeated, [(5, 1), (5, 3)] * 5)
    assert repeated.captures == [(5, 1), (5, 3)]
    assert repeated.captured is None  # nor does one of them keep memory while the other computes
    run(repeated, [(5, 1), (5, 1), (5, 1)])
    assert repeated.captures == [(5, 1), (5, 3), (5, 1)]
    computed = repeated.computed
    run(repeated, [(5, 1)])
    assert repeated.computed == computed + 1


def test_graphs_are_made_with_the_slices_that_are_known():
    repeated = Repeated()
    run(repeated, [(5, 1), (5, 3), (5, 1)])
    computed = repeated.computed
    run(repeated, [(5, 1)])
    assert repeated.captures[-1] == (5, 1)
    assert repeated.computed == computed + 3  # what is expected, the check of the replay, and the replay


def test_a_kind_without_room_is_not_tried_again(caplog):
    repeated = Repeated(no_room=(3,))
    run(repeated, [(5, 3), (5, 3), (5, 1), (5, 3), (5, 3), (5, 1)])
    assert repeated.captures == [(5, 3), (5, 1)]
    assert ["no memory to capture" in record.message for record in caplog.records] == [True]


def test_few_kinds_are_remembered():
    repeated = Repeated()
    run(repeated, [(length, 1) for length in range(1, 20)])
    assert len(repeated._kinds) == 8
    assert repeated.holds((19,), 1)
    repeated.forget()
    assert repeated.slices is None
    assert not repeated.holds((19,), 1)
    run(repeated, [(19, 1)])
    assert repeated.captures[-2:] == [(19, 1), (19, 1)]


def test_graphs_that_were_given_back_are_made_again():
    repeated = Repeated()
    run(repeated, [(5, 1)] * 2)
    repeated.release()
    assert repeated.captured is None
    assert repeated.slices is not None
    run(repeated, [(5, 1)] * 2)
    assert repeated.captures == [(5, 1)] * 2


def test_options_have_to_be_hashable():
    with pytest.raises(TypeError, match="unhashable"):
        Repeated()(torch.ones(3), lambda: None, [])
