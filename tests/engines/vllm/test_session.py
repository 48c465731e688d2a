"""A worker's proofs on stand-ins: slices between calls and steps, jobs, errors, and several ranks in lockstep."""

from __future__ import annotations

import dataclasses
import os
import random
import threading
import types
import uuid
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("greenlet")

from vllm_stepping import (
    CONFIG,
    CONFIGS,
    OPEN,
    Request,
    WithoutLayers,
    Worker,
    distances,
    install,
    outcomes,
    rows,
    scheduled,
    small_session,
    text_of,
)

from poc_kernels.engines.vllm import session as session_module
from poc_kernels.engines.vllm import trial
from poc_kernels.engines.vllm.messages import Begin, Progress, Run, Trial, pack, unpack
from poc_kernels.engines.vllm.session import Session
from poc_kernels.protocol import PoCConfig, Row
from poc_kernels.scheduling import Slices

ROUND = "round"
PLENTY = 10**6


class Clock:
    """A clock of the test's own: each look at it takes a second."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


class Rig:
    """A session on a worker, and what tells it to run."""

    def __init__(self, worker: Worker | None = None, config: PoCConfig = CONFIG, **options: Any) -> None:
        self.worker = worker or Worker()
        self.session = small_session(self.worker, **options)
        assert self.session.begin(Begin(round=ROUND, config=dataclasses.asdict(config))).refusal is None

    def run(self, jobs: dict[str, list[Row]], **fields: Any) -> Progress:
        message = Run(round=ROUND, jobs=[*jobs], rows={job: [(*row,) for row in of] for job, of in jobs.items()})
        packed = pack(self.session.run(dataclasses.replace(message, **fields)))
        return unpack(Progress, packed)

    def values(self, job: str) -> list[float]:
        return self.run({job: []}).outcomes[job]["values"]

    def steps(self, request: Request, count: int) -> None:
        for _ in range(count):
            self.worker.execute_model(scheduled([request]))

    def users_leave(self) -> None:
        self.worker.execute_model(scheduled([]))


@pytest.fixture
def small_engine_in_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)


# ---- slices in calls ----


def test_jobs_are_computed_in_order_and_their_outcomes_kept_until_nobody_wants_them() -> None:
    rig = Rig()
    jobs = {"a": rows(0), "b": rows(4, 3), "c": rows(7, 1)}
    first = rig.run(jobs)
    assert (first.jobs, first.outcomes, first.counters["slices"]) == (["a", "b", "c"], {}, 0)
    done: list[str] = []
    while len(done) < 3:
        progress = rig.run(jobs, slices=1)
        assert progress.jobs == ["a", "b", "c"]
        done = [*progress.outcomes]
        assert done == ["a", "b", "c"][: len(done)]
    again = rig.run(jobs)  # the answer before may have been lost
    assert {job: outcome["values"] for job, outcome in again.outcomes.items()} == {
        job: distances(of) for job, of in jobs.items()
    }
    parts = {"inputs", "projection", "forward", "distance"}
    assert all(set(outcome["part_seconds"]) == parts for outcome in again.outcomes.values())
    assert rig.run({"b": jobs["b"]}).jobs == ["b"]
    assert rig.run({}).jobs == []
    slices = again.counters["slices"]
    assert slices >= 3 * 6
    assert rig.run({}, slices=PLENTY).counters["slices"] == slices


def test_a_call_is_bounded_by_its_seconds() -> None:
    """A slice takes some looks at the clock, each of a second."""
    rig = Rig(clock=Clock())
    of = {"a": rows(0), "b": rows(4)}
    assert rig.run(of, seconds=0.0).counters["slices"] == 0
    assert rig.run(of, seconds=0.5).counters["slices"] == 0  # the first look is later
    assert rig.run(of, seconds=1.5).counters["slices"] == 1
    assert rig.run(of, seconds=9.0).counters["slices"] < 5
    assert rig.run(of, seconds=1e6).outcomes.keys() == {"a", "b"}


def test_a_long_call_ends_as_soon_as_a_user_comes() -> None:
    looks: list[int] = []

    def users_are_there() -> bool:
        looks.append(rig.session.counters.slices)
        return len(looks) > 3

    rig = Rig(clock=Clock(), users_are_there=users_are_there)
    of = {"a": rows(0), "b": rows(4)}
    assert rig.run(of, seconds=1e6, seconds_without_users=1e6).counters["slices"] == 2  # however long with users
    assert looks == [0, 0, 1, 2]
    assert rig.run(of, seconds_without_users=1e6).counters["slices"] == 2  # still there
    assert rig.run(of, seconds=1.5, seconds_without_users=1e6).counters["slices"] == 3
    assert rig.run(of, slices=2, seconds_without_users=1e6).counters["slices"] == 5
    looks.clear()
    assert rig.run(of, seconds=1e6).outcomes.keys() == {"a", "b"}
    assert looks == []


def test_one_that_has_begun_goes_on_before_those_that_are_wanted_first() -> None:
    rig = Rig()
    rig.run({"a": rows(0), "b": rows(4)}, slices=3)
    progress = rig.run({"b": rows(4), "a": rows(0)})
    while not progress.outcomes:
        progress = rig.run({"b": rows(4), "a": rows(0)}, slices=1)
    assert [*progress.outcomes] == ["a"]


@pytest.mark.parametrize("slices", [0, 1, 4, PLENTY])
def test_jobs_are_cancelled_in_every_state(slices: int) -> None:
    rig = Rig()
    unwound: list[int] = []
    prove = rig.session.prover.prove

    def recorded(config: PoCConfig, of: list[Row], pause: Callable[[], None]) -> Any:
        try:
            return prove(config, of, pause)
        finally:
            unwound.append(of[0].nonce)

    rig.session.prover.prove = recorded  # type: ignore[method-assign]
    rig.run({"a": rows(0), "b": rows(4)}, slices=slices)
    assert rig.run({"b": rows(4)}).jobs == ["b"]
    assert unwound[:1] == ([0] if slices else [])
    assert rig.run({"b": rows(4)}, slices=PLENTY).outcomes["b"]["values"] == distances(rows(4))
    assert rig.run({"a": rows(0)}, slices=PLENTY).outcomes["a"]["values"] == distances(rows(0))


def test_an_error_is_the_jobs_result() -> None:
    rig = Rig()
    layers = 0

    def fail_once() -> None:
        nonlocal layers
        layers += 1
        if layers == 3:
            raise MemoryError("of one layer")

    rig.worker.engine.before_layer = fail_once
    progress = rig.run({"a": rows(0), "b": rows(4)}, slices=PLENTY)
    assert progress.outcomes["a"] == {"error": "MemoryError: of one layer"}
    assert progress.outcomes["b"]["values"] == distances(rows(4))


def test_a_round_that_begins_ends_the_one_before() -> None:
    rig = Rig()
    rig.run({"a": rows(0), "b": rows(4)}, slices=3)
    other = dataclasses.replace(CONFIG, block_hash="another")
    assert rig.session.begin(Begin(round="other", config=dataclasses.asdict(other))).refusal is None
    old = rig.run({"a": rows(0)}, slices=PLENTY)
    assert (old.round, old.jobs) == ("other", [])
    message = Run(round="other", jobs=["a"], rows={"a": [(*row,) for row in rows(0)]}, slices=PLENTY)
    assert rig.session.run(message).outcomes["a"]["values"] == distances(rows(0), other)


def test_a_round_that_cannot_be_computed_is_refused() -> None:
    rig = Rig()
    refusal = rig.session.begin(Begin(round="x", config={**dataclasses.asdict(CONFIG), "seq_len": 65})).refusal
    assert refusal == "ValueError: seq_len must be at most the 64 positions of the model, got 65"
    progress = rig.run({"a": rows(0)}, slices=PLENTY)
    assert (progress.round, progress.jobs) == (None, [])

    def fail() -> bool:
        raise RuntimeError("a module has no twin")

    rig.worker.engine.refresh = fail  # type: ignore[method-assign]
    refusal = rig.session.begin(Begin(round="y", config=dataclasses.asdict(CONFIG))).refusal
    assert refusal == "RuntimeError: a module has no twin"


def test_a_form_that_the_model_does_not_allow_is_refused(small_engine_in_workers: None) -> None:
    worker = Worker()
    worker.engine, why = WithoutLayers(), "model must call its layers in order"
    opened = worker.poc_kernels_call("open", pack(OPEN))
    assert (opened["refusal"], opened["layers"], opened["no_layers"]) == (None, 0, why)
    for proof, config in CONFIGS.items():
        begun = worker.poc_kernels_call("begin", pack(Begin(round=proof, config=dataclasses.asdict(config))))
        assert begun["refusal"] == (None if proof == "distances" else f"ValueError: {why}")


def test_memory_that_is_lacking_is_told_before_anything_is_computed(
    monkeypatch: pytest.MonkeyPatch, small_engine_in_workers: None
) -> None:
    lacking = "take 0.02 off --gpu-memory-utilization"
    rig = Rig()
    asked: list[tuple[object, ...]] = []
    monkeypatch.setattr(session_module, "lacking_memory", lambda engine, *of: asked.append(of) or lacking)
    assert rig.session.begin(Begin(round="x", config=dataclasses.asdict(CONFIG))).refusal == lacking
    assert rig.run({"a": rows(0)}, slices=PLENTY).round is None
    assert asked == [(rig.session.prover, CONFIG)]
    assert Worker().poc_kernels_call("open", pack(OPEN))["refusal"] == lacking
    assert len(asked[1]) == 1


def test_weights_that_were_replaced_are_told_of() -> None:
    rig = Rig()
    begin = Begin(round="next", config=dataclasses.asdict(CONFIG))
    assert not rig.session.begin(begin).refreshed
    rig.worker.engine.replaced = True
    assert rig.session.begin(begin).refreshed
    assert not rig.session.begin(begin).refreshed


# ---- slices between steps ----


def test_steps_owe_slices_and_first_steps_wait_for_none() -> None:
    rig = Rig()
    rig.run({str(number): rows(4 * number) for number in range(100)}, share=0.5)
    counters = rig.session.counters
    request = Request(3, PLENTY)
    rig.steps(request, 1)
    assert counters.slices == 0
    rig.steps(request, 200)
    assert counters.slices_between_steps == counters.slices > 0
    assert (counters.steps, counters.tokens) == (201, 201)
    assert 0 < counters.mean_slice_seconds <= counters.longest_slice_seconds
    # By clocks, at most what is owed and one slice more.
    owed = counters.step_seconds * 1.0
    assert counters.seconds_between_steps <= owed + 2 * counters.longest_slice_seconds
    rig.users_leave()
    before = counters.slices
    rig.steps(Request(4, PLENTY), 1)
    assert counters.slices == before


def test_slices_wait_for_steps_without_prompts() -> None:
    """A slice takes a second, and a step of 6 owes two thirds of it."""
    clock = Clock()
    rig = Rig(clock=clock)
    rig.worker.in_step = lambda: setattr(clock, "now", clock.now + 5.0)
    jobs = {str(number): rows(4 * number) for number in range(100)}
    rig.run(jobs, share=0.1)
    counters, request = rig.session.counters, Request(3, PLENTY)
    with_slices = {True: 0, False: 0}
    for step in range(200):
        if step % 50 == 0:
            rig.run(jobs, share=0.1)
        before, has_prompt = counters.slices, step % 3 == 2
        rig.worker.execute_model(scheduled([request], prompt_tokens=50 * has_prompt))
        with_slices[has_prompt] += counters.slices > before
    assert with_slices[True] == 0
    assert with_slices[False] > 60
    assert counters.seconds_between_steps == pytest.approx(counters.step_seconds / 9, rel=0.1)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.8])
def test_steps_that_all_have_prompts_leave_proofs_their_share(share: float) -> None:
    clock = Clock()
    rig = Rig(clock=clock)
    rig.worker.in_step = lambda: setattr(clock, "now", clock.now + 5.0)
    rig.run({str(number): rows(4 * number) for number in range(1000)}, share=share)
    request = Request(3, PLENTY)
    tokens = 1
    for _ in range(60):  # more in each than usual
        tokens += tokens // 2 + 1
        rig.worker.execute_model(scheduled([request], prompt_tokens=tokens))
    counters = rig.session.counters
    assert counters.seconds_between_steps == pytest.approx(counters.step_seconds * share / (1 - share), rel=0.15)


def test_users_of_one_token_each_leave_proofs_their_share() -> None:
    """Each of their steps is the first of somebody, and no step without tokens comes in between."""
    clock = Clock()
    rig = Rig(clock=clock)
    rig.worker.in_step = lambda: setattr(clock, "now", clock.now + 100.0)
    rig.run({str(number): rows(4 * number) for number in range(1000)}, share=0.5)
    for number in range(50):
        rig.steps(Request(number % 32, 1), 1)
    counters = rig.session.counters
    assert counters.slices_between_steps == counters.slices > 1000
    assert counters.seconds_between_steps == pytest.approx(counters.step_seconds, rel=0.1)


def test_no_share_no_slice_and_while_users_step_calls_compute_nothing() -> None:
    rig = Rig()
    of = {"a": rows(0)}
    rig.run(of, share=0.0)
    request = Request(3, PLENTY)
    rig.steps(request, 50)
    assert rig.run(of, slices=PLENTY, seconds=1.0, share=0.0).counters["slices"] == 0
    rig.users_leave()
    assert rig.run(of, slices=1, share=0.0).counters["slices"] == 1
    rig.steps(request, 2)
    # Whoever knows that users compute nothing says so: their requests may wait for something else than steps.
    assert "a" in rig.run(of, slices=PLENTY, alone=True).outcomes


def test_proofs_that_nobody_asks_for_any_more_cost_users_nothing() -> None:
    rig = Rig()
    of = {str(number): rows(4 * number) for number in range(1000)}
    rig.run(of, share=0.9)
    request = Request(3, PLENTY)
    rig.steps(request, 300)
    slices = rig.session.counters.slices
    assert slices > 0
    rig.steps(request, 50)
    assert rig.session.counters.slices == slices
    rig.run(of, share=0.9)
    rig.steps(request, 50)
    assert rig.session.counters.slices > slices


def test_a_failure_between_steps_is_not_the_users() -> None:
    clock = Clock()
    rig = Rig(clock=clock)
    rig.worker.in_step = lambda: setattr(clock, "now", clock.now + 1.0)  # slices are owed after each step
    unwound: list[int] = []
    prove = rig.session.prover.prove

    def recorded(config: PoCConfig, of: list[Row], pause: Callable[[], None]) -> Any:
        try:
            return prove(config, of, pause)
        finally:
            unwound.append(of[0].nonce)

    rig.session.prover.prove = recorded  # type: ignore[method-assign]
    rig.run({"a": rows(0)}, share=0.9, slices=2)

    def fail() -> None:
        raise RuntimeError("no context")

    rig.worker.engine.context = fail  # type: ignore[method-assign]
    request = Request(3, 40)
    rig.steps(request, 40)
    assert request.tokens == text_of(3, 40)
    assert unwound == [0]
    del rig.worker.engine.context
    rig.users_leave()
    progress = rig.run({"a": rows(0), "b": rows(4)}, slices=PLENTY)
    assert progress.outcomes["a"] == {"error": "RuntimeError: no context"}
    assert progress.outcomes["b"]["values"] == distances(rows(4))


def test_step_seconds_leave_slices_out() -> None:
    clock = Clock()
    rig = Rig(clock=clock)
    rig.worker.in_step = lambda: setattr(clock, "now", clock.now + 100.0)
    rig.run({str(number): rows(4 * number) for number in range(100)}, share=0.5)
    rig.steps(Request(3, PLENTY), 50)
    counters = rig.session.counters
    assert counters.slices > 1000
    assert counters.mean_step_seconds == pytest.approx(101.0, abs=5.0)


def schedules(count: int) -> list[tuple[int, str]]:
    """Seeds of schedules, with a form of proofs: most of them with distances."""
    return [*((seed, "distances") for seed in range(count)), (count, "vectors"), (count + 1, "fingerprint")]


@pytest.mark.parametrize(("seed", "proof"), schedules(10))
def test_users_text_and_proofs_are_those_alone_in_every_schedule(seed: int, proof: str) -> None:
    choose = random.Random(seed)
    rig = Rig(config=CONFIGS[proof])
    wanted: dict[str, list[Row]] = {}
    found: dict[str, list[Any]] = {}
    requests: list[Request] = []
    ended: list[Request] = []
    for _ in range(400):
        action = choose.random()
        if action < 0.2 and len(wanted) < 3:
            wanted[uuid.uuid4().hex] = rows(choose.randrange(100), choose.randint(1, 4))
        if action < 0.1:
            requests.append(Request(choose.randrange(32), choose.randint(1, 12)))
        if action > 0.4:
            output = scheduled(requests)
            rig.worker.execute_model(output)
            ended += [request for request in requests if len(request.tokens) > request.count]
            requests = [request for request in requests if request not in ended]
            if not requests:
                rig.users_leave()
        elif action < 0.35:
            share = choose.choice([0.0, 0.1, 0.5, 0.9])
            progress = rig.run(wanted, slices=choose.randint(0, 5), share=share, alone=choose.random() < 0.1)
            for job, outcome in progress.outcomes.items():
                if choose.random() < 0.7:  # else the answer is lost
                    found[job] = outcome["values"]
                    assert outcome["values"] == outcomes(wanted.pop(job), CONFIGS[proof])
        elif wanted and action < 0.36:
            del wanted[choose.choice([*wanted])]
    assert len(found) > 3
    assert len(ended) > 3
    assert all(request.tokens == text_of(request.tokens[0], request.count) for request in ended)


@pytest.mark.parametrize("measured", [False, True])
def test_on_a_gpu_slices_count_as_long_as_they_are_computed(measured: bool) -> None:
    """And not as long as their launch takes, which is all that happens between two steps."""
    rig = Rig(clock=Clock())
    engine, counters = rig.worker.engine, rig.session.counters
    rig.session.engine = types.SimpleNamespace(device=torch.device("cuda"), context=engine.context)
    engine.slices = Slices((1,), (2.0, 6.0)) if measured else None
    rig.run({str(number): rows(4 * number) for number in range(100)}, slices=5, share=0.9)
    in_calls = counters.mean_slice_seconds
    assert in_calls == pytest.approx(4.0 if measured else 1.0)
    rig.session._clock = lambda: 0.0  # between steps the clock sees nothing
    rig.session._debt.owe(50.0)
    rig.steps(Request(3, PLENTY), 20)
    assert counters.slices_between_steps > 0
    assert counters.seconds_between_steps == pytest.approx(counters.slices_between_steps * in_calls)


# ---- the RPC method ----


def test_commands(small_engine_in_workers: None) -> None:
    worker = Worker()
    execute_model = worker.execute_model
    with pytest.raises(ValueError, match="'run' needs a session"):
        worker.poc_kernels_call("run", pack(Run(round=ROUND)))
    opened = worker.poc_kernels_call("open", pack(OPEN))
    assert opened == {
        "refusal": None,
        "model_type": "small",
        "hidden_size": 24,
        "vocab_size": 101,
        "max_positions": 64,
        "layers": 5,
        "no_layers": None,
        "windows": [16],
        "dtype": "float32",
        "device": "cpu",
    }
    assert worker.execute_model != execute_model
    begin = pack(Begin(round=ROUND, config=dataclasses.asdict(CONFIG)))
    assert worker.poc_kernels_call("begin", begin) == {"refusal": None, "refreshed": False}
    message = Run(round=ROUND, jobs=["a"], rows={"a": [(*row,) for row in rows(0)]}, slices=3)
    assert worker.poc_kernels_call("run", pack(message))["jobs"] == ["a"]
    with pytest.raises(ValueError, match="command must be open, trial"):
        worker.poc_kernels_call("dance", {})
    worker.poc_kernels_call("open", pack(OPEN))  # in place of the one before, which ends
    assert worker.poc_kernels_call("run", pack(message))["round"] is None
    worker.poc_kernels_call("close", {})
    assert worker.execute_model == execute_model
    with pytest.raises(ValueError, match="'close' needs a session"):
        worker.poc_kernels_call("close", {})


def test_a_model_that_is_not_supported_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(worker: Worker, **options: Any) -> None:
        raise ValueError("proofs do not support alibi: serve another model")

    monkeypatch.setattr(session_module, "VllmEngine", refuse)
    worker = Worker()
    assert worker.poc_kernels_call("open", pack(OPEN))["refusal"] == "proofs do not support alibi: serve another model"
    with pytest.raises(ValueError, match="needs a session"):
        worker.poc_kernels_call("run", pack(Run(round=ROUND)))


# ---- several ranks ----


class Ended(BaseException):
    """Raised where a process would end."""


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have processes that end at once raise `Ended` instead: nothing after it runs, as nothing would."""

    def end(code: int) -> None:
        raise Ended(code)

    monkeypatch.setattr(os, "_exit", end)


class Collective:
    """Meets all ranks, and fails where they come for different reasons."""

    def __init__(self, ranks: int) -> None:
        self._barrier = threading.Barrier(ranks)
        self._reasons: list[str] = [""] * ranks
        self.met: list[str] = []

    def meet(self, rank: int, reason: str) -> None:
        self._reasons[rank] = reason
        self._barrier.wait(20)
        assert len(set(self._reasons)) == 1, f"ranks meet for {self._reasons}"
        self._barrier.wait(20)
        if rank == 0:
            self.met.append(reason)


@pytest.mark.parametrize(("seed", "proof"), schedules(6))
def test_ranks_run_the_same_slices_between_the_same_steps(seed: int, proof: str) -> None:
    """Whatever their clocks say: each rank has one of its own, at its own speed."""
    ranks, collective = 2, Collective(2)
    choose = random.Random(seed)
    script: list[Callable[[Rig], Any]] = []
    jobs: dict[str, list[Row]] = {}
    for number in range(150):
        action = choose.random()
        if action < 0.5:
            output = scheduled([Request(1, PLENTY)])
            script.append(lambda rig, output=output: rig.worker.execute_model(output))
        elif action < 0.55:
            script.append(lambda rig: rig.users_leave())
        else:
            if len(jobs) < 3:
                jobs[str(number)] = rows(number)
            elif action < 0.6:
                del jobs[choose.choice([*jobs])]
            fields = {
                "slices": choose.randint(0, 4),
                "alone": choose.random() < 0.1,
                "slices_per_1000_steps": choose.randrange(3000),
            }
            script.append(lambda rig, jobs=dict(jobs), fields=fields: rig.run(jobs, **fields))
    told: list[list[Any]] = [[] for _ in range(ranks)]
    errors: list[BaseException] = []

    def play(rank: int) -> None:
        clock = random.Random(rank)
        worker = Worker(world_size=ranks, rank=rank)
        rig = Rig(worker, CONFIGS[proof], lockstep=True, clock=lambda: clock.random() * 100)
        rig.worker.engine.before_layer = lambda: collective.meet(rank, "slice")
        rig.worker.in_step = lambda: collective.meet(rank, "step")
        try:
            for act in script:
                answer = act(rig)
                if isinstance(answer, Progress):
                    values = {job: outcome["values"] for job, outcome in answer.outcomes.items()}
                    told[rank].append((answer.jobs, values, answer.counters["slices"]))
        except BaseException as error:
            errors.append(error)
            collective._barrier.abort()

    threads = [threading.Thread(target=play, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
    assert told[0] == told[1]
    assert {"step", "slice"} == set(collective.met)
    for _, values, _ in told[0]:
        for job, of in values.items():
            assert of == outcomes(rows(int(job)), CONFIGS[proof])
    assert any(values for _, values, _ in told[0])


def test_ranks_with_pauses_by_time_would_fail_the_test_above() -> None:
    """So the collective of the test notices: here one rank computes slices that the other does not."""
    collective = Collective(2)
    errors: list[str] = []

    def play(rank: int) -> None:
        try:
            for reason in (["slice", "step"], ["step", "slice"])[rank]:
                collective.meet(rank, reason)
        except (AssertionError, threading.BrokenBarrierError) as error:
            errors.append(str(error))
            collective._barrier.abort()

    threads = [threading.Thread(target=play, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert any("ranks meet for" in error for error in errors)


@pytest.mark.parametrize("where", ["call", "steps", "context", "mark"])
def test_a_rank_that_fails_alone_computes_nothing_any_more(where: str, ends: None) -> None:
    """Its next step would meet the others' slices: an engine that is dead is better than one that says wrong things."""
    rig = Rig(Worker(world_size=2), lockstep=True)
    steps: list[int] = []
    rig.worker.in_step = lambda: steps.append(1)
    rig.run({"a": rows(0), "b": rows(4)}, slices_per_1000_steps=1000)
    rig.steps(Request(3, PLENTY), 2)

    def fail() -> Any:
        raise MemoryError("of one rank")

    if where == "context":
        rig.worker.engine.context = fail  # type: ignore[method-assign]
    elif where == "mark":  # where errors of work that was launched come to light
        rig.session._in_flight.mark = fail  # type: ignore[method-assign]
    else:
        rig.worker.engine.before_layer = fail
    rig.worker.engine.others_fail = False
    go_on = dict.fromkeys(("call", "mark"), lambda: rig.run({"a": [], "b": []}, slices=PLENTY, alone=True))
    with pytest.raises(Ended, match="1"):
        go_on.get(where, lambda: rig.steps(Request(3, PLENTY), PLENTY))()
    assert len(steps) < 20
    # An error of its own round is that of one that computes for itself.
    alone = Rig()
    alone.worker.engine.others_fail = False
    alone.worker.engine.before_layer = fail
    assert alone.run({"a": rows(0)}, slices=PLENTY).outcomes["a"] == {"error": "MemoryError: of one rank"}


def out_of_memory(*_: Any, **__: Any) -> Any:
    raise MemoryError("of one rank")


@pytest.mark.parametrize("command", ["open", "layers", "trial", "begin"])
def test_a_rank_that_fails_alone_before_a_proof_leaves_no_other_waiting(
    command: str, monkeypatch: pytest.MonkeyPatch, small_engine_in_workers: None, ends: None
) -> None:
    """Opening, trying and measuring compute on all ranks too: the others are in a forward, and cannot be told."""
    begin = Begin(round=ROUND, config=dataclasses.asdict(CONFIG))
    messages = {"open": OPEN, "layers": OPEN, "trial": Trial(texts=[], served=[], transforms=True), "begin": begin}

    def outcome(world_size: int, others_fail: bool) -> Any:
        worker = Worker(world_size)
        worker.engine = WithoutLayers() if command == "layers" else worker.engine
        worker.engine.others_fail = others_fail
        with monkeypatch.context() as patch:
            if command in ("trial", "begin"):
                assert worker.poc_kernels_call("open", pack(OPEN))["refusal"] is None
                worker.engine.device = torch.device("cuda")  # where memory is measured
            patch.setattr(trial, "independence", out_of_memory)
            if command != "layers":
                patch.setattr(session_module, "lacking_memory", out_of_memory)
            try:
                return worker.poc_kernels_call(command.replace("layers", "open"), pack(messages[command]))
            except (MemoryError, Ended) as error:
                return type(error)

    assert outcome(2, others_fail=False) is Ended
    as_one = outcome(2, others_fail=True)
    assert as_one == outcome(1, others_fail=False)
    told = {"layers": "no_layers", "begin": "refusal"}
    assert as_one[told[command]] if command in told else as_one is MemoryError


def test_a_session_ends_what_runs_when_it_is_closed() -> None:
    rig = Rig()
    rig.run({"a": rows(0), "b": rows(4)}, slices=3)
    rig.session.close()
    rig.session.close()
    assert rig.worker.engine.forgotten > 0
    assert rig.run({"a": rows(0)}, slices=PLENTY).round is None
    assert isinstance(rig.session, Session)
