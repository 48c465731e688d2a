"""What a node answers is the plain model's text, whatever the architecture, or the node says why it cannot."""

from __future__ import annotations

import contextlib
import copy
import gc
import itertools
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, VOCABULARY, plain_tokens, served_tokens, tiny
from served import NAME, limits_of, load, started
from transformers import GenerationConfig
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus

from poc_kernels.engines.transformers.batching import Router
from poc_kernels.engines.transformers.eager import EagerGeneration
from poc_kernels.engines.transformers.inference import Inference
from poc_kernels.engines.transformers.sampling import TokenLogprob
from poc_kernels.engines.transformers.trial import Trial, TrialFailedError
from poc_kernels.scheduling import PriorityLanes, Turns
from poc_kernels.service.errors import AdmissionError

# Of these, transformers' continuous batching gives the right text in every version that is supported.
BATCHED = {"gemma2", "gpt2", "llama", "mixtral", "opt", "phi3", "qwen3"}
REFUSED = {"xlnet"}  # each token sees a placeholder after it, which the plain forward has not
PROMPTS = [
    torch.randint(3, VOCABULARY, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (5, 2, 19, 11)
]
SAMPLING = GenerationConfig(do_sample=False)


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> Any:
    return load(tiny_model_dir)[1]


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_model_is_served_with_its_own_text(tokenizer: Any, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny(kind)
    expected = [plain_tokens(model, prompt, 10) for prompt in PROMPTS]
    if kind in REFUSED:
        with pytest.raises(
            ValueError, match=r"its own text, \w+ is not: continuous batching failed .* plain generation"
        ):
            Inference(model, tokenizer, NAME, Turns(), limits_of(), temperature=0).start()
        return
    with started(model, tokenizer) as inference:
        assert served_tokens(inference, PROMPTS[:1], 10) == expected[:1]
        assert served_tokens(inference, PROMPTS, 10) == expected
        assert inference.restarts == 0
        assert inference.trouble() is None
        assert inference.batched or kind not in BATCHED
    warnings = [record for record in caplog.records if "one at a time" in record.message]
    assert len(warnings) == (0 if inference.batched else 1)
    assert all(record.reason for record in warnings)  # type: ignore[attr-defined]
    assert not [record for record in caplog.records if record.exc_info]


def test_no_request_is_so_long_that_its_neighbours_get_other_positions(tokenizer: Any) -> None:
    """LongRoPE would turn a whole step to its long factors."""
    model = tiny("phi3")
    assert model.config.max_position_embeddings == 256
    with started(model, tokenizer) as inference:
        assert inference.batched
        longest = list(range(3, 3 + 30))
        assert served_tokens(inference, [PROMPTS[0], longest], 10) == [
            plain_tokens(model, prompt, 10) for prompt in (PROMPTS[0], longest)
        ]
        with pytest.raises(AdmissionError, match="40 tokens") as refusal:
            served_tokens(inference, [PROMPTS[0], [*longest, 3]], 10)
        assert refusal.value.code == "context_length_exceeded"


@pytest.mark.parametrize("std", [0.02, 0.08])
@pytest.mark.parametrize(("kind", "batched"), [("llama", True), ("gptj", False), ("openai-gpt", False)])
def test_roundings_neither_refuse_nor_hide(tokenizer: Any, kind: str, batched: bool, std: float) -> None:
    """Small bfloat16 weights give logits of which many are nearly equal."""
    with started(tiny(kind, std, torch.bfloat16), tokenizer) as inference:
        assert inference.batched is batched


# ---- ways of generation that are wrong ----


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("llama")


def eager(model: Any, _: GenerationConfig, router: Router, turns: Turns) -> EagerGeneration:
    return EagerGeneration(model, router, turns, PriorityLanes("cpu"))


@contextlib.contextmanager
def nothing_left() -> Iterator[None]:
    """What a trial changes for its time is as before."""
    threads, frozen = set(threading.enumerate()), gc.get_freeze_count()
    yield
    assert set(threading.enumerate()) <= threads
    assert gc.get_freeze_count() == frozen
    assert not logging.getLogger("ContinuousBatchingLogger").disabled


def prove(model: Any, start: Callable[..., Any], **options: Any) -> None:
    with nothing_left():
        Trial(model, SAMPLING, **options).prove(start)
    assert not [module for module in model.modules() if module._forward_hooks]


def test_the_right_way_passes(model: Any) -> None:
    prove(model, eager)


def test_other_weights_are_another_text(model: Any) -> None:
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight[0, 0] += 0.05
    with pytest.raises(TrialFailedError, match=r"its text is not the plain model's: .* asked alone"):
        prove(model, lambda _, *rest: eager(other, *rest))


class Changed(Router):
    """Changes outputs on their way to ``router``."""

    def __init__(self, router: Router, change: Callable[[GenerationOutput], None]) -> None:
        super().__init__()
        self._to, self._change = router, change

    def register(self, request_id: str, on_output: Any) -> None:
        self._to.register(request_id, on_output)

    def knows(self, request_id: str) -> bool:
        return self._to.knows(request_id)

    def deliver(self, output: GenerationOutput) -> None:
        self._change(output)
        self._to.deliver(output)


def misreported(output: GenerationOutput) -> None:
    output.logprobs[-1] = TokenLogprob(output.logprobs[-1].logprob + 0.001, ())


def unlikely(output: GenerationOutput) -> None:
    output.generated_tokens[-1] = (output.generated_tokens[-1] + 1) % VOCABULARY


def neighbours(output: GenerationOutput) -> None:
    if output.request_id.endswith(".3"):
        misreported(output)


def not_a_number(output: GenerationOutput) -> None:
    output.logprobs[2] = TokenLogprob(float("nan"), ())


def short(output: GenerationOutput) -> None:
    del output.generated_tokens[-1]


def failed(output: GenerationOutput) -> None:
    output.status, output.error = RequestStatus.FAILED, "no such kernel"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (misreported, "asked alone, log-probabilities are off by up to 0.001"),
        (unlikely, "asked alone"),
        (neighbours, "after a prompt of 9 tokens asked beside others"),
        (not_a_number, "off by up to nan"),
        (short, "7 tokens came where 8 were asked for"),
        (failed, "no such kernel"),
    ],
)
def test_a_wrong_answer_is_found(model: Any, change: Callable[[GenerationOutput], None], reason: str) -> None:
    with pytest.raises(TrialFailedError, match=reason):
        prove(model, lambda made, sampling, router, turns: eager(made, sampling, Changed(router, change), turns))


class Silent:
    """Takes requests, and never answers."""

    max_tokens = 100
    taken = True
    death: str | None = None

    def __init__(self) -> None:
        self.stopped = False

    def submit(self, *_: Any) -> bool:
        return self.taken

    def died_of(self) -> str | None:
        return self.death

    def stop(self, timeout_seconds: float) -> bool:
        self.stopped = True
        return True


def test_a_request_that_does_not_end_is_given_up(model: Any) -> None:
    way, seconds = Silent(), itertools.chain([0.0, 0.0, 0.1], itertools.count(10.0, 30.0))
    with pytest.raises(TrialFailedError, match="1 of 1 requests did not end in time"):
        prove(model, lambda *_: way, clock=lambda: next(seconds))
    assert way.stopped


@pytest.mark.parametrize("taken", [True, False])
def test_a_way_that_dies_says_what_of(model: Any, taken: bool) -> None:
    way = Silent()
    way.taken, way.death = taken, "RuntimeError: gone"
    with pytest.raises(TrialFailedError, match="RuntimeError: gone"):
        prove(model, lambda *_: way)
    assert way.stopped


def test_a_way_that_cannot_be_started_says_why(model: Any) -> None:
    def start(*_: Any) -> Any:
        raise AttributeError("no such layer")

    with pytest.raises(TrialFailedError, match="AttributeError: no such layer"):
        prove(model, start)


def test_the_nodes_own_sampling_has_to_end(model: Any) -> None:
    samplings = []

    def start(made: Any, sampling: GenerationConfig, router: Router, turns: Turns) -> Any:
        samplings.append(sampling)
        return eager(made, sampling, Changed(router, failed if sampling.do_sample else lambda _: None), turns)

    with pytest.raises(TrialFailedError, match="no such kernel"), nothing_left():
        Trial(model, GenerationConfig(do_sample=True, temperature=0.5)).prove(start)
    assert [sampling.do_sample for sampling in samplings] == [False, True]


def test_a_ban_that_is_dropped_is_another_text(model: Any) -> None:
    def start(made: Any, sampling: GenerationConfig, router: Router, turns: Turns) -> Any:
        way, submit = eager(made, sampling, router, turns), EagerGeneration.submit
        way.submit = lambda name, prompt, _, *rest: submit(way, name, prompt, plain, *rest)  # type: ignore[method-assign]
        return way

    banning = GenerationConfig(do_sample=False, no_repeat_ngram_size=1, eos_token_id=2)
    plain = GenerationConfig(do_sample=False, max_new_tokens=8, pad_token_id=0)
    with nothing_left():
        Trial(model, banning).prove(eager)
        with pytest.raises(TrialFailedError, match="its text is not the plain model's"):
            Trial(model, banning).prove(start)


@pytest.mark.parametrize("positions", [2, 9, 20])
def test_a_model_of_few_positions_is_tried(positions: int) -> None:
    model = tiny("llama")
    model.config.max_position_embeddings = positions
    trial = Trial(model, SAMPLING)
    assert trial.tokens <= positions * trial.requests
    trial.prove(eager)


def test_prompts_leave_special_tokens_out_and_exceed_windows() -> None:
    model = tiny("gemma2")
    special = range(VOCABULARY - 2)
    trial = Trial(model, SAMPLING, special)
    assert {token for prompt in trial._prompts for token in prompt} <= {VOCABULARY - 2, VOCABULARY - 1}
    model.config.sliding_window = 100
    assert max(len(prompt) for prompt in Trial(model, SAMPLING)._prompts) > 100
