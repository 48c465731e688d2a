"""A deterministic scheduler of real threads, and a search through every order in which it can run them.

Code under test is given stand-ins for `threading` and `time` (`Instruments.patch`). Exactly one thread runs at a time,
until its next operation on a stand-in: an acquire, wait, join or sleep. There the scheduler chooses which thread goes
on. A release and a notify are done at once: before them, other threads can do nothing that they could not also do
after them. Time is virtual: it passes when no thread can run before a deadline, or, where that is explored, any time.

`explore` runs a scenario once for every sequence of choices, depth first. Orders that differ only by operations on
different objects are run once (sleep sets), so what threads share without a lock must be marked with `World.at`.
"""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

_REAL_SECONDS = 60.0
"""How long a run may take before it is given up; it should take milliseconds."""
_MAIN = "main"
_TICK = "tick"


class Deadlock(AssertionError):  # noqa: N818 (a finding, like the assertions of a scenario)
    """Threads are left that nothing can wake."""


class Endless(AssertionError):  # noqa: N818
    """A scenario takes more operations or orders than it may."""


class _Abandoned(BaseException):
    """Ends the threads of a run that is over."""


class _Redundant(Exception):  # noqa: N818
    """Every way to go on was run in another order already."""


def _nothing() -> None:
    pass


@dataclasses.dataclass
class _Operation:
    kind: str
    target: str
    ready: Callable[[], bool] = lambda: True
    do: Callable[[], None] = _nothing
    deadline: float | None = None
    eager: bool = False

    def __str__(self) -> str:
        return f"{self.kind} {self.target}"


@dataclasses.dataclass(frozen=True)
class Candidate:
    """The name of a thread that may go on, and of the object that its next operation is on."""

    name: str
    target: str


class World:
    """One run: its threads, its clock, and what was chosen.

    Args:
        choose: returns the next of the candidates, given in the order in which the threads were made, and the name of
            the thread that ran last.
        early_ticks: how often time may pass while a thread could run.
        max_operations: number of operations after which a run counts as endless.
    """

    def __init__(
        self, choose: Callable[[list[Candidate], str], Candidate], early_ticks: int = 0, max_operations: int = 20_000
    ) -> None:
        self.now = 0.0
        self.trace: list[str] = []
        self.observe: Callable[[], None] = _nothing
        self._choose = choose
        self._early_ticks = early_ticks
        self._operations_left = max_operations
        self._threads: list[Thread] = []
        self._current: Thread | None = None
        self._last = _MAIN
        self._made: dict[str, int] = {}
        self._over = threading.Lock()
        self._over.acquire()
        self._failure: BaseException | None = None
        self._abandoned = False

    # ---- for scenarios ----

    def spawn(self, name: str, target: Callable[[], Any]) -> Thread:
        """Start a thread of the scenario."""
        thread = Thread(self, target, name=name)
        thread.start()
        return thread

    def at(self, target: str) -> None:
        """Let others run here: what follows is an operation on ``target``."""
        self.reach(_Operation("at", target))

    def sleep(self, seconds: float) -> None:
        """Let this much time pass."""
        deadline = self.now + seconds
        self.reach(_Operation("sleep", "time", lambda: self.now >= deadline, deadline=deadline))

    def run(self) -> None:
        """Run all threads to their ends.

        Raises:
            Deadlock: some never end.
            BaseException: what a thread or ``observe`` raised.
        """
        self._go_on(None)
        finished = self._over.acquire(timeout=_REAL_SECONDS)
        self._current = None
        left = [thread for thread in self._threads if not thread.ended]
        waits = "; ".join(f"{thread.name}: {thread.operation}" for thread in left)
        self._abandoned = True
        for thread in left:
            thread.gate.release()
            thread.real.join(_REAL_SECONDS)
        self._abandoned = False
        if self._failure is not None:
            raise self._failure
        if not finished:
            raise Endless("a thread computes without an operation, or waits outside this scheduler")
        if left:
            raise Deadlock(f"nothing can wake {waits}")

    # ---- for stand-ins ----

    def name_of(self, kind: str) -> str:
        """Return a name for a new object, the same in every run that made the same choices."""
        self._made[kind] = self._made.get(kind, 0) + 1
        return f"{kind} {self._made[kind]}"

    @property
    def runner(self) -> Any:
        """The thread that runs, or the world itself while a scenario is set up or checked."""
        return self if self._current is None else self._current

    @property
    def abandoned(self) -> bool:
        """Whether the run is over and its threads only end."""
        return self._abandoned

    def begin(self, thread: Thread) -> None:
        self._threads.append(thread)
        thread.operation = _Operation("start", thread.name, eager=True)

    def reach(self, operation: _Operation) -> None:
        """Let the scheduler choose; return when ``operation`` was done."""
        if self._abandoned:
            raise _Abandoned
        me = self._current
        if me is None:
            assert operation.ready(), f"{operation} would wait for ever, no thread runs"
            operation.do()
            return
        me.operation = operation
        self._go_on(me)
        if self._abandoned:
            raise _Abandoned

    def finish(self, thread: Thread, error: BaseException | None) -> None:
        thread.ended, thread.operation = True, None
        if self._abandoned:
            return
        if error is not None:
            self._failure = error
            self._over.release()
        else:
            self._go_on(None)

    def _go_on(self, me: Thread | None) -> None:
        try:
            following = self._next()
        except BaseException as error:
            self._failure, following = error, None
        if following is not None and following is me:
            return
        if following is None:
            self._over.release()
        else:
            self._current = following
            following.gate.release()
        if me is not None:
            me.gate.acquire()

    def _next(self) -> Thread | None:
        while True:
            self.observe()
            pending = [(thread, thread.operation) for thread in self._threads if thread.operation is not None]
            enabled = {thread.name: thread for thread, operation in pending if operation.ready()}
            deadlines = [each.deadline for _, each in pending if each.deadline is not None and each.deadline > self.now]
            if not enabled and not deadlines:
                return None
            if not enabled:
                self.now = min(deadlines)
                self.trace.append(f"{self.now:.6g} s")
                continue
            self._operations_left -= 1
            if self._operations_left < 0:
                raise Endless(f"threads go on for ever: {self.trace[-20:]}")
            eager = next((thread for thread, operation in pending if operation.eager), None)
            if eager is not None:
                if self._do(eager):
                    return eager
                continue
            candidates = [
                Candidate(thread.name, operation.target) for thread, operation in pending if thread.name in enabled
            ]
            if deadlines and self._early_ticks > 0:
                candidates.append(Candidate(_TICK, _TICK))
            chosen = self._choose(candidates, self._last)
            if chosen.name == _TICK:
                self._early_ticks -= 1
                self.now = min(deadlines)
                self.trace.append(f"{self.now:.6g} s, early")
                continue
            if self._do(enabled[chosen.name]):
                return enabled[chosen.name]

    def _do(self, thread: Thread) -> bool:
        """Do what ``thread`` is about to do; return whether it runs on."""
        operation, thread.operation = thread.operation, None
        assert operation is not None
        self.trace.append(f"{thread.name}: {operation}")
        self._last, self._current = thread.name, thread
        operation.do()
        return thread.operation is None


# ---- stand-ins ------------------------------------------------------------------------------------------------------


class Thread:
    """`threading.Thread`."""

    def __init__(self, world: World, target: Callable[..., Any], args: tuple[Any, ...] = (), **options: Any) -> None:
        self.name: str = options.get("name") or world.name_of("thread")
        self.operation: _Operation | None = None
        self.gate = threading.Lock()
        self.gate.acquire()
        self.ended = False
        self._world, self._target, self._args = world, target, args
        self.real = threading.Thread(target=self._run, name=f"interleaved {self.name}", daemon=True)

    def _run(self) -> None:
        self.gate.acquire()
        error: BaseException | None = None
        try:
            if not self._world.abandoned:
                self._target(*self._args)
        except _Abandoned:
            pass
        except BaseException as caught:
            error = caught
        self._world.finish(self, error)

    def start(self) -> None:
        self._world.begin(self)
        self.real.start()

    def is_alive(self) -> bool:
        return not self.ended

    def join(self, timeout: float | None = None) -> None:
        deadline = None if timeout is None else self._world.now + timeout
        world = self._world
        world.reach(
            _Operation(
                "join",
                self.name,
                lambda: self.ended or (deadline is not None and world.now >= deadline),
                deadline=deadline,
            )
        )


class Lock:
    """`threading.Lock` and `threading.RLock`."""

    def __init__(self, world: World, reentrant: bool) -> None:
        self._world, self._reentrant = world, reentrant
        self.name = world.name_of("lock")
        self.owner: Any = None
        self.count = 0

    def free(self) -> bool:
        return self.owner is None

    def take(self, owner: Any, count: int = 1) -> None:
        self.owner, self.count = owner, count

    def drop(self) -> None:
        self.owner, self.count = None, 0

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        world, owner = self._world, self._world.runner
        if self._reentrant and self.owner is owner:
            self.count += 1
            return True
        deadline = None if not blocking or timeout < 0 else world.now + timeout
        taken = False

        def take() -> None:
            nonlocal taken
            if self.free():
                self.take(owner)
                taken = True

        def ready() -> bool:
            return self.free() or not blocking or (deadline is not None and world.now >= deadline)

        world.reach(_Operation("acquire", self.name, ready, take, deadline))
        return taken

    def release(self) -> None:
        if self._world.abandoned:
            return
        if self.owner is not self._world.runner:
            raise RuntimeError("cannot release a lock that this thread does not have")
        if self.count > 1:
            self.count -= 1
            return
        self._world.reach(_Operation("release", self.name, do=self.drop, eager=True))

    def locked(self) -> bool:
        return not self.free()

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


@dataclasses.dataclass(eq=False)
class _Waiter:
    notified: bool = False


class Condition:
    """`threading.Condition`."""

    def __init__(self, world: World, lock: Lock | None = None) -> None:
        self._world = world
        self._lock = lock if lock is not None else Lock(world, reentrant=True)
        self._waiters: list[_Waiter] = []
        self.acquire, self.release = self._lock.acquire, self._lock.release

    def __enter__(self) -> bool:
        return self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def _check_owned(self) -> None:
        if self._lock.owner is not self._world.runner:
            raise RuntimeError("cannot wait or notify without the lock")

    def wait(self, timeout: float | None = None) -> bool:
        world, lock = self._world, self._lock
        if world.abandoned:
            raise _Abandoned
        self._check_owned()
        me, count, waiter = world.runner, lock.count, _Waiter()
        assert me is not world, "no thread runs that could notify"
        deadline = None if timeout is None else world.now + timeout

        def awake() -> bool:
            return (waiter.notified or (deadline is not None and world.now >= deadline)) and lock.free()

        def take_again() -> None:
            lock.take(me, count)
            self._waiters.remove(waiter)

        def give_up_and_wait() -> None:
            lock.drop()
            self._waiters.append(waiter)
            me.operation = _Operation("wake with", lock.name, awake, take_again, deadline)

        world.reach(_Operation("wait with", lock.name, do=give_up_and_wait))
        return waiter.notified

    def wait_for(self, predicate: Callable[[], Any], timeout: float | None = None) -> Any:
        deadline = None if timeout is None else self._world.now + timeout
        while not (result := predicate()):
            left = None if deadline is None else deadline - self._world.now
            if left is not None and left <= 0:
                break
            self.wait(left)
        return result

    def notify(self, n: int = 1) -> None:
        if self._world.abandoned:
            return
        self._check_owned()

        def wake() -> None:
            for waiter in [each for each in self._waiters if not each.notified][:n]:
                waiter.notified = True

        self._world.reach(_Operation("notify with", self._lock.name, do=wake, eager=True))

    def notify_all(self) -> None:
        self.notify(len(self._waiters) + 1)


class Event:
    """`threading.Event`."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._name = world.name_of("event")
        self._set = False

    def is_set(self) -> bool:
        self._world.reach(_Operation("look at", self._name))
        return self._set

    def _become(self, value: bool) -> None:
        def become() -> None:
            self._set = value

        self._world.reach(_Operation("set" if value else "clear", self._name, do=become))

    def set(self) -> None:
        self._become(True)

    def clear(self) -> None:
        self._become(False)

    def wait(self, timeout: float | None = None) -> bool:
        world = self._world
        deadline = None if timeout is None else world.now + timeout
        world.reach(
            _Operation(
                "wait for",
                self._name,
                lambda: self._set or (deadline is not None and world.now >= deadline),
                deadline=deadline,
            )
        )
        return self._set


class EventLoop(asyncio.BaseEventLoop):
    """An asyncio event loop of one thread, without files: other threads reach it only by `call_soon_threadsafe`."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world
        self._name = world.name_of("event loop")
        self._called = False
        self._selector = self

    def time(self) -> float:
        return self._world.now

    def call_soon_threadsafe(
        self, callback: Callable[..., Any], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        self._world.reach(_Operation("call from", self._name))
        handle = self.call_soon(callback, *args, context=context)
        self._called = True
        return handle

    def select(self, timeout: float | None = None) -> list[Any]:
        """Wait for a call, or until something is due: the only method of a selector that the loop calls."""
        world = self._world
        deadline = None if timeout is None else world.now + timeout

        def ready() -> bool:
            return self._called or (deadline is not None and world.now >= deadline)

        world.reach(_Operation("look for calls from", self._name, ready, deadline=deadline))
        self._called = False
        return []

    def _process_events(self, events: list[Any]) -> None:
        assert not events


class Instruments:
    """Stand-ins for `threading` and `time` in modules under test, in the world that runs now."""

    TIMEOUT_MAX = threading.TIMEOUT_MAX

    def __init__(self) -> None:
        self.world = World(_first)

    def patch(self, monkeypatch: pytest.MonkeyPatch, *modules: Any) -> None:
        """Replace `threading` and `time` in ``modules`` by the stand-ins."""
        for module in modules:
            for name in ("threading", "time"):
                if hasattr(module, name):
                    monkeypatch.setattr(module, name, self)

    def Lock(self) -> Lock:  # noqa: N802 (threading's names)
        return Lock(self.world, reentrant=False)

    def RLock(self) -> Lock:  # noqa: N802
        return Lock(self.world, reentrant=True)

    def Condition(self, lock: Lock | None = None) -> Condition:  # noqa: N802
        return Condition(self.world, lock)

    def Event(self) -> Event:  # noqa: N802
        return Event(self.world)

    def Thread(self, *, target: Callable[..., Any], args: tuple[Any, ...] = (), **options: Any) -> Thread:  # noqa: N802
        return Thread(self.world, target, args, **options)

    def EventLoop(self) -> EventLoop:  # noqa: N802 (as the others)
        return EventLoop(self.world)

    def monotonic(self) -> float:
        return self.world.now

    perf_counter = thread_time = monotonic

    def sleep(self, seconds: float) -> None:
        self.world.sleep(seconds)


# ---- the search -----------------------------------------------------------------------------------------------------

Scenario = Callable[[World], Callable[[], None]]
"""Sets a world up, including its threads, and returns what checks it at the end."""


def _first(candidates: list[Candidate], last: str) -> Candidate:
    """Choose the thread that ran last, else the first."""
    return next((each for each in candidates if each.name == last), candidates[0])


@dataclasses.dataclass
class _Node:
    """A point of the search: which threads could go on, need not be tried, were tried, and which is tried now."""

    candidates: list[Candidate]
    last: str
    asleep: dict[str, Candidate]
    preemptions: int
    done: dict[str, Candidate] = dataclasses.field(default_factory=dict)
    chosen: Candidate | None = None

    def preempts(self, candidate: Candidate) -> bool:
        return candidate.name != self.last and any(each.name == self.last for each in self.candidates)

    def choose(self, max_preemptions: int | None) -> bool:
        """Choose a candidate that was not tried yet; return False if there is none."""
        order = sorted(self.candidates, key=lambda each: each.name != self.last)
        for candidate in order:
            if candidate.name in self.done or candidate.name in self.asleep:
                continue
            if max_preemptions is not None and self.preemptions + self.preempts(candidate) > max_preemptions:
                continue
            self.chosen = candidate
            return True
        return False


def _independent(one: Candidate, other: Candidate) -> bool:
    return _TICK not in (one.target, other.target) and one.target != other.target


class _Search:
    """Makes the choices of a run: those of the stack again, then the first that is left."""

    def __init__(self, max_preemptions: int | None) -> None:
        self._stack: list[_Node] = []
        self._depth = 0
        self._max_preemptions = max_preemptions

    def begin(self) -> None:
        self._depth = 0

    def choose(self, candidates: list[Candidate], last: str) -> Candidate:
        if self._depth == len(self._stack):
            self._stack.append(self._new_node(candidates, last))
            if not self._stack[-1].choose(self._max_preemptions):
                self._stack.pop()
                raise _Redundant
        node = self._stack[self._depth]
        assert node.candidates == candidates, f"not deterministic: {candidates}, before {node.candidates}"
        self._depth += 1
        assert node.chosen is not None
        return node.chosen

    def _new_node(self, candidates: list[Candidate], last: str) -> _Node:
        if not self._stack:
            return _Node(candidates, last, {}, 0)
        parent = self._stack[-1]
        assert parent.chosen is not None
        asleep: dict[str, Candidate] = {}
        if self._max_preemptions is None:  # with a bound, the order that stands for a left out one may be out of reach
            before = {**parent.asleep, **parent.done}
            asleep = {name: each for name, each in before.items() if _independent(each, parent.chosen)}
        return _Node(candidates, last, asleep, parent.preemptions + parent.preempts(parent.chosen))

    def advance(self) -> bool:
        """Go to the next sequence of choices; return False if there is none."""
        while self._stack:
            node = self._stack[-1]
            assert node.chosen is not None
            node.done[node.chosen.name] = node.chosen
            if node.choose(self._max_preemptions):
                return True
            self._stack.pop()
        return False


@contextmanager
def _told(world: World) -> Iterator[None]:
    try:
        yield
    except _Redundant:
        raise
    except BaseException as error:
        error.add_note("in this order:\n  " + "\n  ".join(world.trace)) if hasattr(error, "add_note") else None
        raise


def explore(
    instruments: Instruments,
    scenario: Scenario,
    *,
    max_preemptions: int | None = None,
    early_ticks: int = 0,
    max_runs: int | None = None,
) -> int:
    """Run ``scenario`` in every order, and check each.

    Args:
        max_preemptions: leave out orders in which a thread that could go on has to wait more often than this.
        early_ticks: how often in a run time may pass although a thread could run.
        max_runs: fail rather than run more orders.

    Returns:
        How many orders were run to their end.

    Raises:
        Endless: there are more than max_runs orders.
        BaseException: what a run or its check raised, with the order as a note.
    """
    search = _Search(max_preemptions)
    runs = 0
    while True:
        search.begin()
        world = instruments.world = World(search.choose, early_ticks)
        with _told(world):
            check = scenario(world)
            try:
                world.run()
            except _Redundant:
                pass
            else:
                check()
                runs += 1
        if max_runs is not None and runs > max_runs:
            raise Endless(f"more than {max_runs} orders")
        if not search.advance():
            return runs


def simulate(instruments: Instruments, scenario: Scenario, seed: int | None = None) -> World:
    """Run ``scenario`` once: each thread goes on until it waits, or, with a seed, in a random order."""
    source = None if seed is None else random.Random(seed)

    def at_random(candidates: list[Candidate], _: str) -> Candidate:
        assert source is not None
        return source.choice(candidates)

    world = instruments.world = World(_first if source is None else at_random, max_operations=10**6)
    with _told(world):
        check = scenario(world)
        world.run()
        check()
    return world
