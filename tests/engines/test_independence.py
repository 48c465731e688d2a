"""An engine whose rows depend on anything but their input is refused, wherever any form would read it."""

import pytest
import torch
from small_engine import SmallEngine

from poc_kernels.engines.independence import refusal
from poc_kernels.protocol import PoCConfig
from poc_kernels.protocol.fingerprint.flips import Flips
from poc_kernels.protocol.fingerprint.mix import FIRST_POSITION
from poc_kernels.protocol.vectors.reflections import Reflections

NEEDS = "proofs need rows whose bits depend on nothing else, here they depend on "


class Depending(SmallEngine):
    """Its states are changed by what may look at the whole batch.

    Args:
        change: ``change(states, transform, calls)``, with the class of the transform.
    """

    def __init__(self, change, **options):
        super().__init__(**options)
        self.change = change

    def forward(self, inputs_embeds, pause=lambda: None, after_layer=None):
        states = super().forward(inputs_embeds, pause, after_layer).clone()
        return self.change(states, after_layer and type(after_layer), len(self.shapes))


def said(change, transforms=True, **options):
    return refusal(Depending(change, **options), "serve another", transforms=transforms)


def neighbours(states):
    return states + states.amax(0, keepdim=True) * 2.0**-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transforms", [True, False])
def test_rows_that_depend_on_nothing_else(dtype, transforms):
    engine = SmallEngine(dtype=dtype)
    assert refusal(engine, "serve another", transforms=transforms) is None
    assert set(engine.shapes) == {(4, 16, 24)}, "one shape, as in a round"
    assert len(engine.shapes) == (15 if transforms else 5)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda states, _, calls: states * (1 + calls * 2.0**-20), "the call"),
        (lambda states, *_: states * (1 + torch.arange(4).view(4, 1, 1) * 2.0**-20), "its place in the batch"),
        (lambda states, *_: neighbours(states), "the rows beside it"),
        (lambda states, *_: states + (states[:1] == states[1:2]).all() * 2.0**-10, "the rows beside it"),
    ],
    ids=["call", "place", "neighbours", "fill"],
)
@pytest.mark.parametrize("transforms", [True, False])
def test_rows_that_depend_on_something(change, what, transforms):
    assert said(change, transforms) == f"{NEEDS}{what}: serve another"


@pytest.mark.parametrize("position", [FIRST_POSITION, 11, 14])
def test_rows_that_depend_on_others_at_an_earlier_position_alone(position):
    def change(states, *_):
        states[:, position] = neighbours(states)[:, position]
        return states

    assert said(change) == f"{NEEDS}the rows beside it where signs are flipped after its layers: serve another"
    assert said(change, transforms=False) is None, "distances read the last position alone"


def test_positions_that_no_form_reads_may_depend_on_anything():
    def change(states, *_):
        states[:, :FIRST_POSITION] = neighbours(states)[:, :FIRST_POSITION]
        return states

    assert said(change) is None


@pytest.mark.parametrize(
    ("alone", "where"),
    [(Flips, "signs are flipped after its layers"), (Reflections, "states are reflected after its layers")],
)
def test_rows_that_depend_on_others_with_a_transform_alone(alone, where):
    def change(states, transform, _):
        return neighbours(states) if transform is alone else states

    assert said(change) == f"{NEEDS}the rows beside it where {where}: serve another"
    assert said(change, transforms=False) is None


def test_vectors_read_the_last_position_alone():
    def change(states, transform, _):
        if transform is Reflections:
            states[:, :-1] = neighbours(states)[:, :-1]
        return states

    assert said(change) is None


def test_rows_that_depend_on_others_without_a_transform_alone():
    def change(states, transform, _):
        return states if transform else neighbours(states)

    assert said(change) == f"{NEEDS}the rows beside it: serve another"


def test_logits_that_depend_on_others():
    class Logits(SmallEngine):
        def compute_logits(self, hidden_states):
            return neighbours(super().compute_logits(hidden_states))

    assert refusal(Logits(), "serve another", transforms=True) == f"{NEEDS}the rows beside it: serve another"


@pytest.mark.parametrize("value", ["inf", "nan"])
def test_results_that_are_not_finite(value):
    def change(states, transform, _):
        return states if transform else states * float(value)

    assert said(change).startswith("proofs need finite logits, which this model does not compute of random inputs")


@pytest.mark.parametrize("value", ["inf", "nan"])
@pytest.mark.parametrize(
    ("of", "form", "where"),
    [(Flips, "fingerprint", "signs are flipped"), (Reflections, "vectors", "states are reflected")],
)
def test_a_form_that_will_have_no_proofs_is_warned_of(caplog, value, of, form, where):
    """The other forms are served; of a round of this one, its operator would see only that it posts nothing."""
    assert said(lambda states, transform, _: states * float(value) if transform is of else states) is None
    what = f"hidden states of random inputs are not finite where {where} after its layers"
    assert [record.getMessage() for record in caplog.records] == [f"rounds of {form} will have no proofs: {what}"]


def test_a_short_model_is_tried_in_its_length(monkeypatch):
    assert PoCConfig.seq_len > 8
    monkeypatch.setattr(SmallEngine, "max_positions", 8)
    engine = SmallEngine()
    assert refusal(engine, "serve another", transforms=True) is None
    assert set(engine.shapes) == {(4, 8, 24)}
