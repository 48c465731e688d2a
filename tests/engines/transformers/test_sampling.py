"""Each request's token is chosen as it asks, beside whatever others ask."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from served import load, started
from transformers import GenerationConfig
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from web import TIMEOUT

from poc_kernels.engines.transformers import sampling
from poc_kernels.engines.transformers.inference import Inference
from poc_kernels.engines.transformers.sampling import (
    BatchSampler,
    Row,
    Sampling,
    TokenLogprob,
    choose,
    sampling_of,
    without_warpers,
)

VOCABULARY = 40
DRAWS = 4000
PROMPT = [5, 6, 7]


def logits(rows: int = 1) -> torch.Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(1)) * 2


def row(prompt: Any = PROMPT, generated: Any = (), **fields: Any) -> Row:
    return Row(Sampling(**fields), prompt, generated)


class Grid(random.Random):
    """Draws the middles of equal parts of [0, 1), one after another."""

    def __init__(self, parts: int) -> None:
        super().__init__(0)
        self._values = iter([(n + 0.5) / parts for n in range(parts)])

    def random(self) -> float:
        return next(self._values)


def frequencies(scores: torch.Tensor, **fields: Any) -> torch.Tensor:
    """How often each token is drawn while the uniform number goes through all of [0, 1)."""
    rows = [row(**fields)] * DRAWS
    tokens, _ = choose(scores.expand(DRAWS, -1).contiguous(), rows, Grid(DRAWS))
    return torch.bincount(tokens, minlength=VOCABULARY) / DRAWS


@pytest.mark.parametrize(
    ("fields", "warpers"),
    [
        ({"temperature": 1.0}, []),
        ({"temperature": 0.5}, [TemperatureLogitsWarper(0.5)]),
        ({"temperature": 3.0, "top_k": 5}, [TemperatureLogitsWarper(3.0), TopKLogitsWarper(5)]),
        ({"temperature": 1.0, "top_k": 10**6}, []),
        ({"temperature": 1.0, "top_p": 0.7}, [TopPLogitsWarper(0.7)]),
        ({"temperature": 1.0, "min_p": 0.1}, [MinPLogitsWarper(0.1)]),
        (
            {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
            [TemperatureLogitsWarper(1.5), TopKLogitsWarper(20), TopPLogitsWarper(0.9), MinPLogitsWarper(0.05)],
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_tokens_are_drawn_with_the_probabilities_of_transformers_warpers(
    fields: dict[str, Any], warpers: list[Any]
) -> None:
    scores = logits()
    expected = LogitsProcessorList(warpers)(torch.tensor([PROMPT]), scores.clone()).softmax(-1)[0]
    # Each token has an interval of that length, of which a grid has as many points, give or take one at its ends.
    torch.testing.assert_close(frequencies(scores, **fields), expected, rtol=0, atol=1.5 / DRAWS)


@pytest.mark.parametrize("fields", [{"top_p": 0.9}, {"top_p": 0.999}, {"top_k": 300, "top_p": 0.8}, {"top_k": 900}])
def test_a_vocabulary_larger_than_what_is_looked_at_first(fields: dict[str, Any]) -> None:
    scores = torch.randn(2, 1000, generator=torch.Generator().manual_seed(3)) * torch.tensor([[0.1], [8.0]])
    warpers = [TopKLogitsWarper(fields["top_k"])] if "top_k" in fields else []
    warpers += [TopPLogitsWarper(fields["top_p"])] if "top_p" in fields else []
    kept = LogitsProcessorList(warpers)(torch.tensor([PROMPT] * 2), scores.clone()) > -torch.inf
    least = sampling._least(scores, [Sampling(temperature=1.0, **fields)] * 2, 256)
    assert torch.equal(scores >= least, kept)
    # A row has the same bound beside others, whatever these need.
    others = [Sampling(temperature=1.0, **fields), Sampling(temperature=1.0, top_p=0.1), Sampling(temperature=1.0)]
    three = torch.cat([scores[1:], scores[:1], scores[:1]])
    assert sampling._least(three, others, 256)[0] == least[1]
    assert sampling._least(three, others, 256)[2] == -torch.inf


def test_of_equal_logits_none_is_left_out() -> None:
    flat = torch.zeros(1, VOCABULARY)
    for fields in ({"top_k": 3}, {"top_p": 0.1}, {"min_p": 1.0}):
        assert frequencies(flat, temperature=1.0, **fields).count_nonzero() == VOCABULARY


@pytest.mark.parametrize("fields", [{"top_p": 0.0}, {"top_k": 1}, {"min_p": 1.0}])
def test_where_all_but_one_are_left_out_the_likeliest_is_drawn(fields: dict[str, Any]) -> None:
    scores = logits()
    assert frequencies(scores, temperature=5.0, **fields).argmax() == scores.argmax()
    assert frequencies(scores, temperature=5.0, **fields).count_nonzero() == 1


def test_greedy_and_drawn_rows_side_by_side() -> None:
    scores = logits(4)
    rows = [row(), row(temperature=1.0, seed=3), row(temperature=1e-9), row(temperature=1.0, seed=3, top_p=0.5)]
    tokens, _ = choose(scores, rows, random.Random(0))
    assert tokens[[0, 2]].tolist() == scores[[0, 2]].argmax(-1).tolist()
    for n in (1, 3):
        alone, _ = choose(scores[n : n + 1], [rows[n]], random.Random(9))
        assert alone.item() == tokens[n]
    torch.testing.assert_close(scores, logits(4), rtol=0, atol=0)  # left as they were


def test_a_seed_draws_the_same_tokens_and_others_draw_others() -> None:
    flat = torch.zeros(200, VOCABULARY)
    by_position = [row(generated=[0] * n, temperature=1.0, seed=1) for n in range(200)]
    tokens, _ = choose(flat, by_position, random.Random(0))
    assert torch.equal(choose(flat, by_position, random.Random(1))[0], tokens)
    another, _ = choose(flat, [row(generated=[0] * n, temperature=1.0, seed=2) for n in range(200)], random.Random(0))
    assert (another != tokens).sum() > 100
    assert len(Counter(tokens.tolist())) > VOCABULARY / 2
    unseeded = [row(temperature=1.0)] * 200
    assert not torch.equal(choose(flat, unseeded, random.Random(0))[0], choose(flat, unseeded, random.Random(1))[0])


def test_penalties_and_biases() -> None:
    scores = torch.zeros(1, VOCABULARY)
    scores[0, :4] = torch.tensor([3.0, 2.5, 2.0, -1.0])
    for fields, generated, expected in [
        ({"presence_penalty": 0.6}, [0], 1),
        ({"presence_penalty": 0.6}, [0, 0, 0], 1),
        ({"frequency_penalty": 0.4}, [0], 0),
        ({"frequency_penalty": 0.4}, [0, 0], 1),
        ({"logit_bias": {3: 5.0}}, [], 3),
        ({"logit_bias": {0: -100.0, 1: -100.0}}, [], 2),
        ({"logit_bias": {1: 1.0}, "presence_penalty": 2.0}, [1], 0),
        ({"repetition_penalty": 2.0}, [0], 1),
    ]:
        tokens, _ = choose(scores, [row(prompt=[39], generated=generated, **fields)], random.Random(0))
        assert tokens.item() == expected, fields
    # The prompt's tokens count for repetition alone, and a negative logit becomes more so.
    of_transformers = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([[0, 3, 1]]), scores.clone())
    rows = [row(prompt=[0, 3], generated=[1], repetition_penalty=1.7, logprobs=20)]
    assert choose(scores, rows, random.Random(0))[0].item() == of_transformers.argmax()
    assert choose(scores, [row(prompt=[0], presence_penalty=2.0)], random.Random(0))[0].item() == 0


def test_logprobs_are_the_models_own() -> None:
    scores = logits(3)
    scores[2, 7] = -torch.inf
    rows = [
        row(logprobs=3, temperature=2.0, seed=5, logit_bias={0: 3.0}),
        row(),
        row(logprobs=0, logit_bias={7: 100.0}),
    ]
    tokens, told = choose(scores, rows, random.Random(0))
    expected = scores.log_softmax(-1)
    assert told[1] is None
    assert isinstance(told[0], TokenLogprob)
    assert told[0].logprob == pytest.approx(expected[0, tokens[0]].item())
    assert [token for token, _ in told[0].top] == expected[0].topk(3).indices.tolist()
    assert [value for _, value in told[0].top] == pytest.approx(expected[0].topk(3).values.tolist())
    assert isinstance(told[2], TokenLogprob)
    assert told[2].top == ()
    impossible, told = choose(scores[2:], [row(prompt=[1], logprobs=20)], random.Random(0))
    assert all(value >= -9999.0 for _, value in told[0].top)  # type: ignore[union-attr]
    assert impossible.item() != 7


def test_what_a_generation_config_says() -> None:
    config = GenerationConfig(do_sample=True, temperature=0.6, top_k=20, top_p=0.95, min_p=0.1, repetition_penalty=1.1)
    expected = Sampling(temperature=0.6, top_k=20, top_p=0.95, min_p=0.1, repetition_penalty=1.1)
    assert sampling_of(config) == expected
    assert sampling_of(GenerationConfig(do_sample=True)).temperature == 1.0
    assert sampling_of(GenerationConfig(do_sample=False, temperature=0.6)).greedy
    left = without_warpers(config)
    assert sampling_of(left) == Sampling(temperature=1.0)
    assert config.top_k == 20


class CapturedRunner:
    """A model runner whose forward is replayed: it writes what it wrote when it was captured, where it wrote then."""

    def __init__(self, rows: int) -> None:
        self.pad_inputs = True
        self.cb_config = SimpleNamespace(max_requests_per_batch=rows)
        self.static = torch.empty(1, rows, VOCABULARY)
        self._sample: Any = None
        self._captured = False

    def compute_batch(self, model: torch.Tensor, _: Any) -> None:
        self.static.copy_(model)
        if not self._captured:
            self._sample(self.static, None)
            kept = self._sample.__self__._logits
            self._replay = lambda: kept.copy_(self.static[0])
            self._captured = True
        self._replay()


def state(generated: list[int], prompt: list[int] = PROMPT, restarted: int = 0, **fields: Any) -> Any:
    kwargs = BatchSampler.arguments(Sampling(**fields)) if fields else {}
    return SimpleNamespace(
        state=SimpleNamespace(
            initial_tokens=prompt,
            generated_tokens=generated,
            _true_initial_tokens=restarted,
            logit_processor_kwargs=kwargs,
        ),
        has_new_token=True,
    )


def processor_of(runner: Any, requests: list[Any]) -> Any:
    in_and_out = SimpleNamespace(
        requests_in_batch=requests, compute_stream=None, output_ids=torch.zeros(1, 9, dtype=torch.int32)
    )
    in_and_out.prepare_batch_update = lambda: (requests, in_and_out.output_ids[0, : len(requests)].tolist(), None)
    return SimpleNamespace(
        model_runner=runner, inputs_and_outputs=in_and_out, logit_processor=SimpleNamespace(supported_keys={})
    )


def test_sampling_follows_a_forward_that_is_replayed() -> None:
    requests = [state([]), SimpleNamespace(has_new_token=False), state([], temperature=1.0, seed=1, logprobs=1)]
    processor = processor_of(CapturedRunner(4), requests)
    BatchSampler(processor)
    seen = []
    for seed in (1, 2):
        scores = torch.randn(1, 4, VOCABULARY, generator=torch.Generator().manual_seed(seed))
        processor.model_runner.compute_batch(scores, {})
        _, tokens, told = processor.inputs_and_outputs.prepare_batch_update()
        assert tokens[0] == scores[0, 0].argmax()
        assert told[0] is None
        assert told[1].logprob == pytest.approx(scores[0, 1].log_softmax(-1)[tokens[1]].item())
        seen.append(tokens[:2])
    assert seen[0] != seen[1]


def test_a_request_that_begins_again_goes_on_as_if_it_had_not() -> None:
    fields = {"temperature": 1.0, "seed": 4, "presence_penalty": 1.0, "frequency_penalty": 0.5}
    chosen = []
    for request in (state([9, 9, 8], **fields), state([8], [*PROMPT, 9, 9], restarted=len(PROMPT), **fields)):
        runner = SimpleNamespace(pad_inputs=False, cb_config=None)
        runner.compute_batch = lambda model, _, runner=runner: runner._sample(model, None)
        processor = processor_of(runner, [request])
        BatchSampler(processor)
        for seed in range(20):
            request.state.logit_processor_kwargs = BatchSampler.arguments(Sampling(**{**fields, "seed": seed}))
            processor.model_runner.compute_batch(logits().unsqueeze(0), {})
            chosen.append(processor.inputs_and_outputs.prepare_batch_update()[1][0])
    assert chosen[:20] == chosen[20:]
    assert len(set(chosen)) > 5


@pytest.fixture(scope="module")
def inference(tiny_model_dir: Path) -> Iterator[Inference]:
    with started(*load(tiny_model_dir), max_new_tokens=64) as inference:
        yield inference


async def asked(inference: Inference, *samplings: Sampling | None) -> list[Any]:
    """The last outputs of requests that are in flight together."""
    loop = asyncio.get_running_loop()
    futures = []
    for n, how in enumerate(samplings):
        futures.append(loop.create_future())
        config = inference.generation_config(8)
        config.eos_token_id = []
        tell = futures[-1].set_result
        inference.submit(f"{n} {id(futures)}", PROMPT, config, False, tell, "max_tokens", how)
    return await asyncio.wait_for(asyncio.gather(*futures), TIMEOUT)


def test_requests_of_one_batch_are_sampled_each_as_it_asks(inference: Inference, tiny_model_dir: Path) -> None:
    samplings = [
        None,
        Sampling(temperature=1.0, seed=1),
        Sampling(temperature=1.0, seed=1, top_k=3, logprobs=3),
        Sampling(logit_bias={9: 100.0}),
        Sampling(logprobs=2),
    ]
    together = asyncio.run(asked(inference, *samplings))
    assert [len(output.generated_tokens) for output in together] == [8] * 5
    for output, how in zip(together, samplings, strict=True):
        (alone,) = asyncio.run(asked(inference, how))
        assert alone.generated_tokens == output.generated_tokens
    greedy, seeded, top, biased, told = together
    assert greedy.generated_tokens == told.generated_tokens != seeded.generated_tokens
    assert biased.generated_tokens == [9] * 8
    assert greedy.logprobs == seeded.logprobs == []
    assert all(t in [token for token, _ in p.top] for t, p in zip(top.generated_tokens, top.logprobs, strict=True))
    for token, logprob in zip(told.generated_tokens, told.logprobs, strict=True):
        assert logprob.top[0] == (token, logprob.logprob)
    with torch.no_grad():
        ids = torch.tensor([[*PROMPT, *told.generated_tokens]])
        plain = load(tiny_model_dir)[0](ids, use_cache=False).logits[0, len(PROMPT) - 1 : -1].log_softmax(-1)
    expected = plain.gather(1, torch.tensor(told.generated_tokens).unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(torch.tensor([each.logprob for each in told.logprobs]), expected, rtol=1e-3, atol=1e-3)
