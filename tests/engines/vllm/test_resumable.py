"""A computation in slices: its state and its caller's are apart, and it can end anywhere."""

from __future__ import annotations

import contextlib
import gc
import random
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

pytest.importorskip("greenlet")

from poc_kernels.engines.vllm.resumable import Cancelled, Resumable
from poc_kernels.scheduling import SlicedForward


class Calls(TorchFunctionMode):
    """Counts the calls of torch that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def state() -> tuple[Any, ...]:
    """Torch's state of this thread, as far as it decides what is computed."""
    return (
        torch.is_inference_mode_enabled(),
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch._C._len_torch_function_stack(),
    )


STATES: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "none": contextlib.nullcontext,
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast float16": lambda: torch.autocast("cpu", torch.float16),
    "modes": lambda: nested(Calls(), Calls()),
    "device": lambda: torch.device("meta"),
}


@contextlib.contextmanager
def nested(*managers: contextlib.AbstractContextManager[Any]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for manager in managers:
            stack.enter_context(manager)
        yield


def test_it_runs_from_pause_to_pause() -> None:
    seen: list[int] = []

    def body(pause: Callable[[], None]) -> str:
        for number in range(3):
            seen.append(number)
            pause()
        return "done"

    resumable = Resumable(body)
    assert not resumable.begun
    for number in range(3):
        assert not resumable.step()
        assert (seen, resumable.begun) == (list(range(number + 1)), True)
        with pytest.raises(RuntimeError, match="no result"):
            _ = resumable.result
    assert resumable.step()
    assert (resumable.result, resumable.error, resumable.begun) == ("done", None, False)
    with pytest.raises(RuntimeError, match="has ended"):
        resumable.step()


def test_what_it_raises_is_kept_and_ends_no_step() -> None:
    def body(pause: Callable[[], None]) -> None:
        pause()
        raise SystemExit("of the body")

    resumable = Resumable(body)
    assert not resumable.step()
    assert resumable.step()
    assert isinstance(resumable.error, SystemExit)
    with pytest.raises(RuntimeError, match="no result"):
        _ = resumable.result


def test_it_computes_in_the_thread_that_steps() -> None:
    threads = []
    resumable = Resumable(lambda pause: (threads.append(threading.get_ident()), pause(), threads.append(1)))
    resumable.step()
    assert threads == [threading.get_ident()]
    resumable.cancel()


# ---- state of torch ----


@pytest.mark.parametrize("inner", STATES)
@pytest.mark.parametrize("outer", STATES)
def test_neither_side_sees_the_others_state(outer: str, inner: str) -> None:
    plain = state()
    inside: list[tuple[Any, ...]] = []

    def body(pause: Callable[[], None]) -> None:
        inside.append(state())
        with STATES[inner]():
            within = state()
            for _ in range(3):
                pause()
                assert state() == within
        assert state() == plain

    with STATES[inner]():
        wanted_inside = state()
    resumable = Resumable(body)
    with STATES[outer]():
        before = state()
        assert not resumable.step()
        assert state() == before
    assert state() == plain
    assert not resumable.step()  # from another state than it began in
    assert state() == plain
    with STATES[outer]():
        assert not resumable.step()
        assert resumable.step()
        assert state() == before
    assert resumable.error is None
    assert inside == [plain]
    assert wanted_inside != plain or inner in ("none", "enable_grad")
    assert state() == plain


def test_a_mode_sees_its_own_sides_calls_alone() -> None:
    """Also where the body pauses inside of its mode, which torch has taken off the stack meanwhile."""
    ours, theirs = Calls(), Calls()

    class Pausing(Calls):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            pause()
            return super().__torch_function__(func, types, args, kwargs)

    pauses: list[Callable[[], None]] = []

    def pause() -> None:
        pauses[0]()

    pausing = Pausing()

    def body(pause: Callable[[], None]) -> torch.Tensor:
        pauses.append(pause)
        with theirs, pausing:
            x = torch.ones(3)
            return x * 2 + x

    resumable = Resumable(body)
    with ours:
        while not resumable.step():
            torch.zeros(2).sin()
    assert resumable.error is None
    assert resumable.result.tolist() == [3.0, 3.0, 3.0]
    assert set(ours.names) == {"zeros", "sin"}
    assert pausing.names == theirs.names == ["ones", "mul", "add"]


def test_tensors_of_steps_are_no_inference_tensors() -> None:
    weight = torch.ones(2, requires_grad=True)

    @torch.inference_mode()
    def body(pause: Callable[[], None]) -> torch.Tensor:
        x = weight * 2
        pause()
        return x * 3

    resumable = Resumable(body)
    assert not resumable.step()
    y = (weight * 2).sum()
    assert y.requires_grad
    y.backward()
    with torch.no_grad():
        assert resumable.step()
    assert resumable.result.is_inference()
    assert weight.grad is not None


@pytest.mark.parametrize("seed", range(20))
def test_forwards_in_slices_between_steps_give_their_bits(seed: int) -> None:
    """With measured slices and before that, steps and slices in any order."""
    choose = random.Random(seed)
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.GELU(), torch.nn.Linear(32, 16)).eval()
    sliced = SlicedForward(torch.device("cpu"), 1e-6)
    x, tokens = torch.randn(4, 16), torch.randn(2, 16)
    with torch.inference_mode():
        wanted, step = model(x), model(tokens)

    @torch.inference_mode()
    def body(pause: Callable[[], None]) -> torch.Tensor:
        return sliced.run(lambda: model(x), pause)

    for _ in range(6):
        resumable, slices = Resumable(body), 1
        while not resumable.step():
            slices += 1
            if choose.random() < 0.5:
                with STATES[choose.choice(["inference", "no_grad", "modes"])]():
                    assert torch.equal(model(tokens), step)
        assert torch.equal(resumable.result, wanted)
        assert slices > 1
    assert sliced.slices is not None


# ---- the end ----


def cancelled_after(steps: int, body: Callable[[Callable[[], None]], Any]) -> Resumable[Any]:
    resumable = Resumable(body)
    for _ in range(steps):
        resumable.step()
    with torch.inference_mode():
        before = state()
        resumable.cancel()
        assert state() == before
    return resumable


@pytest.mark.parametrize("steps", range(5))
def test_cancelled_in_any_state_it_unwinds(steps: int) -> None:
    events: list[str] = []

    def body(pause: Callable[[], None]) -> str:
        try:
            with torch.inference_mode(), Calls():
                for _ in range(3):
                    pause()
            return "done"
        except Exception:
            events.append("no fault")
            raise
        finally:
            events.append("unwound")
            with contextlib.suppress(Cancelled):
                pause()  # what unwinds may not stop
            events.append("to the end")

    plain = state()
    resumable = cancelled_after(steps, body)
    assert state() == plain
    assert resumable.done
    assert resumable.error is None
    assert events == ([] if steps == 0 else ["unwound", "to the end"])
    with pytest.raises(RuntimeError, match="no result"):
        _ = resumable.result
    resumable.cancel()
    with pytest.raises(RuntimeError, match="has ended"):
        resumable.step()


def test_one_that_ended_is_not_cancelled() -> None:
    resumable = Resumable(lambda pause: 7)
    assert resumable.step()
    resumable.cancel()
    assert resumable.result == 7


def test_an_error_while_it_unwinds_is_kept() -> None:
    def body(pause: Callable[[], None]) -> None:
        try:
            pause()
        finally:
            raise KeyError("unwinding")

    assert isinstance(cancelled_after(1, body).error, KeyError)


def test_nothing_of_it_stays_in_memory() -> None:
    class Large:
        pass

    large = Large()
    gone = weakref.ref(large)

    def body(pause: Callable[[], None], large: Large) -> None:
        pause()
        del large

    resumable = Resumable(lambda pause, large=large: body(pause, large))
    resumable.step()
    del large
    resumable.cancel()
    del resumable
    gc.collect()
    assert gone() is None


def test_many_one_after_another() -> None:
    for number in range(300):
        resumable = Resumable(lambda pause, number=number: (torch.ones(3).sum(), pause(), number)[-1])
        resumable.step()
        if number % 3:
            assert resumable.step()
            assert resumable.result == number
        else:
            resumable.cancel()
