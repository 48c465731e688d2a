"""Validation while users are served on a GPU: two streams of two priorities that overlap, each with the bits alone."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from poc_kernels.engines.transformers.batching import ContinuousBatching, Router
from poc_kernels.engines.transformers.config import InferenceLimits, batching_config, generation_config
from poc_kernels.engines.transformers.engine import TransformersEngine
from poc_kernels.protocol import DistanceProver, PoCConfig, PoCManager, PoCState, ProofBatch
from poc_kernels.scheduling import InFlight, Pacing, PriorityLanes, Turns

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

TIMEOUT = 60
CONFIG = PoCConfig(
    block_hash="block",
    block_height=1,
    public_key="key",
    r_target=2.0,
    batch_size=16,
    seq_len=128,
    use_random_projection=True,  # its kernels have streams too
)
NEW_TOKENS = 24


class _NoTokenizer:
    """All that a generation config asks a tokenizer."""

    eos_token_id = None


class Rig:
    """Continuous batching and a manager on one model, as a node has them, without a server."""

    def __init__(self, *, pacing: Pacing | None, cuda_graphs: bool = True) -> None:
        config = transformers.Qwen3Config(
            vocab_size=2048,
            hidden_size=512,
            intermediate_size=1536,
            num_hidden_layers=6,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=64,
            max_position_embeddings=1024,
            eos_token_id=None,
            pad_token_id=0,
        )
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).to("cuda", torch.bfloat16).eval()
        self.turns = Turns(pacing)
        self.engine = TransformersEngine(model, cuda_graphs=cuda_graphs, slice_seconds=3e-4, alone=self.turns.alone)
        self.alone = TransformersEngine(model, cuda_graphs=False, slice_seconds=1e9)
        self.streams = PriorityLanes(model.device)
        self.manager = PoCManager(DistanceProver(self.engine))
        self.manager.start_round(CONFIG, PoCState.VALIDATING)
        self.router = Router()
        self._sampling = generation_config(model, _NoTokenizer(), 0)
        limits = InferenceLimits(
            max_new_tokens=1024, stall_seconds=60.0, kv_blocks=256, kv_block_size=32, max_batch_tokens=512
        )
        self.batching = ContinuousBatching(
            model, self._sampling, batching_config(limits, "cuda"), self.router, self.turns, self.streams
        )

    def chat(self, requests: int) -> list[list[int]]:
        """Tokens that are answered to some prompts, all asked at once."""
        answers: dict[str, list[int]] = {}

        async def ask() -> None:
            done = asyncio.Event()

            def take(output: Any) -> None:
                assert output.error is None, output.error
                if output.is_finished():
                    answers[output.request_id] = list(output.generated_tokens)
                    if len(answers) == requests:
                        done.set()

            for number in range(requests):
                config = generation_config(self.alone._twin, _NoTokenizer(), 0)
                config.max_new_tokens = NEW_TOKENS
                prompt = [(number * 37 + place * 11) % 2000 + 3 for place in range(20)]
                assert self.batching.submit(f"request {number}", prompt, config, False, take)
            await asyncio.wait_for(done.wait(), TIMEOUT)

        asyncio.run(ask())
        return [answers[f"request {number}"] for number in range(requests)]

    def validate(self, batches: int) -> list[list[float]]:
        """Distances of some batches, in slices, on the stream of validation."""
        turn, in_flight = self.turns.proof(), InFlight(self.engine.device, 2)

        def pause() -> None:
            in_flight.mark()
            turn.pause()

        found = []
        with self.streams.validation(), turn:
            for number in range(batches):
                validation = self.manager.validation(claim(number))
                while validation.left:
                    self.manager.recompute([(validation, min(validation.left, CONFIG.batch_size))], pause)
                found.append(self.manager.verdict(validation).dist)
        return found

    def expected(self, batches: int) -> list[list[float]]:
        """The same distances by an engine that computes in one go, with nothing beside it."""
        manager = PoCManager(DistanceProver(self.alone))
        manager.start_round(CONFIG, PoCState.VALIDATING)
        return [manager.validate(claim(number)).dist for number in range(batches)]

    def close(self) -> None:
        self.turns.close()
        assert self.batching.stop(TIMEOUT)


def claim(number: int) -> ProofBatch:
    nonces = list(range(16 * number, 16 * (number + 1)))
    return ProofBatch("key", "block", 1, nonces, [])


@contextlib.contextmanager
def rig(**options: Any) -> Iterator[Rig]:
    made = Rig(**options)
    try:
        yield made
    finally:
        made.close()


def together(rig: Rig, requests: int, batches: int) -> tuple[list[list[int]], list[list[float]]]:
    """Answers and distances, asked for at once."""
    with ThreadPoolExecutor(1) as pool:
        validating = pool.submit(rig.validate, batches)
        answers = rig.chat(requests)
        return answers, validating.result(TIMEOUT)


def test_priorities() -> None:
    streams = PriorityLanes("cuda")
    assert streams.inference_stream.priority < streams.validation_stream.priority <= 0  # lower is greater
    default = torch.cuda.default_stream()
    assert default not in (streams.inference_stream, streams.validation_stream)
    assert torch.cuda.current_stream() == default


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_distances_beside_inference_are_those_alone(cuda_graphs: bool) -> None:
    with rig(pacing=Pacing(), cuda_graphs=cuda_graphs) as made:
        expected = made.expected(8)
        assert made.validate(1) == expected[:1]  # measures, and captures
        if cuda_graphs:
            assert made.engine.repeated.captured is not None
            assert len(made.engine.repeated.captured.graphs) == len(made.engine.slices.seconds) > 1
        made.chat(1)
        answers, distances = together(made, 6, 8)
        assert distances == expected
        assert all(len(answer) == NEW_TOKENS for answer in answers)
        assert made.validate(2) == expected[:2]


def test_the_streams_of_continuous_batching_are_the_partition_s() -> None:
    with rig(pacing=Pacing()) as made:
        ours = made.streams.inference_stream
        inputs_and_outputs = made.batching._manager.batch_processor.inputs_and_outputs
        assert inputs_and_outputs.compute_stream == ours


def test_validation_never_waits_for_the_whole_device(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[str] = []
    synchronize = torch.cuda.synchronize

    def watched(*arguments: Any) -> None:
        threads.append(threading.current_thread().name)
        synchronize(*arguments)

    with rig(pacing=Pacing()) as made:
        made.chat(1)
        monkeypatch.setattr(torch.cuda, "synchronize", watched)
        made.validate(8)  # measures and captures, too
    assert threading.current_thread().name not in threads


Spans = list[tuple[float, float]]
"""Begins and ends of kernels, in microseconds."""


class Trace:
    """The kernels that the profiler sees while ``work`` runs, by stream; skips where it sees none."""

    def __init__(self, rig: Rig, path: Path, work: Callable[[], Any]) -> None:
        mark = torch.zeros(1, device="cuda")
        torch.cuda.synchronize()
        try:
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                # Kernels that no model has: they tell which of the profiler's streams is which.
                with rig.streams.inference():
                    torch.asinh(mark)
                with rig.streams.validation():
                    torch.atanh(mark)
                work()
                torch.cuda.synchronize()
        except RuntimeError as error:
            pytest.skip(f"no profiling here: {error}")
        profile.export_chrome_trace(str(path))
        kernels = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("cat") == "kernel"]
        if not kernels:
            pytest.skip("the profiler records no kernels here")
        streams: dict[int, Spans] = {}
        for event in kernels:
            start = float(event["ts"])
            streams.setdefault(int(event["args"]["stream"]), []).append((start, start + float(event["dur"])))
        (inference,) = {int(event["args"]["stream"]) for event in kernels if "asinh" in event["name"]}
        (validation,) = {int(event["args"]["stream"]) for event in kernels if "atanh" in event["name"]}
        self.inference, self.validation = sorted(streams[inference]), sorted(streams[validation])
        self.count = len(kernels)


def test_a_trace_shows_each_side_on_its_stream_and_that_they_overlap(tmp_path: Path) -> None:
    with rig(pacing=None) as made:
        made.validate(6)  # measures, and captures
        made.chat(2)
        chat = Trace(made, tmp_path / "chat.json", lambda: made.chat(6))
        validation = Trace(made, tmp_path / "validation.json", lambda: made.validate(4))
        both = Trace(made, tmp_path / "both.json", lambda: together(made, 6, 12))
    # All but little, such as what a library sets up; one kernel is the mark.
    assert len(chat.inference) > 0.95 * chat.count
    assert len(chat.validation) == 1
    assert len(validation.validation) > 0.95 * validation.count
    assert len(validation.inference) == 1
    assert len(both.inference) + len(both.validation) > 0.95 * both.count
    assert min(len(both.inference), len(both.validation)) > 100
    assert _overlap(both.inference, both.validation) > 0


def _overlap(one: Spans, other: Spans) -> float:
    """Microseconds in which a span of each runs."""
    total, place = 0.0, 0
    for begin, end in one:
        while place < len(other) and other[place][1] <= begin:
            place += 1
        later = place
        while later < len(other) and other[later][0] < end:
            total += min(end, other[later][1]) - max(begin, other[later][0])
            later += 1
    return total


def test_a_partition_of_sms_changes_no_bit() -> None:
    count = torch.cuda.get_device_properties(0).multi_processor_count
    with rig(pacing=Pacing()) as made:
        expected = made.expected(2)
        try:
            made.streams = PriorityLanes("cuda", validation_sms=count // 4 // 8 * 8)
        except ValueError as error:
            pytest.skip(str(error))
        assert made.validate(2) == expected
