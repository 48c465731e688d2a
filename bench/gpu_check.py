"""What make gpu-check runs, step after step within 10 minutes, and what came of each: ok, failed, or skipped and why.

    python bench/gpu_check.py OUT [--device cuda|cpu] [--began UNIX_TIME]

The 10 minutes count from --began, when the build before it began; the steps are planned to take less (`PLAN`).

Results go to the folder OUT. A step that fails does not stop the others. --device cpu rehearses it with small cases.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
BENCH = ROOT / "bench"
TESTS = ("tests/test_*.py", "tests/kernels", "tests/protocol", "tests/engines/transformers/test_engine.py")
OVERLAP_TESTS = "tests/test_cuda_beside.py"
"""Look at what runs at the same time, so nothing else may."""
SHARDS = min(8, max(1, (os.cpu_count() or 1) // 2))
"""Processes that share the tests."""


class Suite(NamedTuple):
    """A benchmark and its report; the cases that matter most come first in it."""

    name: str
    file: str
    report: str
    seconds: float
    """What is planned for it."""
    case_seconds: float | None
    """What a case may take: none begins when less is left. None: a script, not a suite of pytest, which sees to it."""
    on_gpu: tuple[str, ...] = ()
    """Its options on a GPU."""
    rehearsed: tuple[str, ...] = ()
    """Its options where it is rehearsed."""


SUITES = (
    Suite("projection", "test_projection_gpu.py", "gpu_report.py", 75, 8),
    Suite(
        *("round", "test_round_overhead.py", "round_report.py", 50, 30),
        on_gpu=("--bench-cases", "qwen3-8b@32x256,qwen3-0.6b@32x256"),
    ),
    Suite(
        *("beside", "beside.py", "beside_report.py", 100, None),
        on_gpu=("--device", "cuda", "--short", "--limit-seconds", "60"),
        rehearsed=("--quick",),
    ),
)
REPORT_SECONDS = 8
TOTAL_SECONDS = 570
"""Under 10 minutes with what ends after the last step."""
# Of the steps in their order. What a step leaves, and what the sum leaves of the total, the following may use.
# A new machine imports torch slowly, and compiles 54 kernels before it trusts them.
PLAN: dict[str, float] = {"torch": 45, "verify": 60, "tests": 90, "overlap tests": 40}
for _suite in SUITES:
    PLAN |= {_suite.name: _suite.seconds, f"{_suite.name} report": REPORT_SECONDS}
PLAN["compute-sanitizer"] = 45
LEAST_SECONDS = 2.0
"""No step begins with less."""
GRACE_SECONDS = 10.0
"""Between the interrupt that a late step gets, upon which pytest writes what it has, and its end; another is midway."""

SHORT_RUN = """
import sys, torch, poc_kernels
from poc_kernels import backends
from poc_kernels.protocol import nonce_inputs, permutations
device = torch.empty(0, device=sys.argv[1]).device
backends.trust("triton", device)  # "verify" has tried it, which takes too long under compute-sanitizer
seed = poc_kernels.seed_tensor(7, device)
for dtype in (torch.float32, torch.bfloat16):
    for rows, columns in ((1, 1000), (33, 1000), (300, 512)):
        x = torch.randn(rows, columns, device=device).to(dtype)
        mask = torch.arange(rows, device=device) % 3 != 0
        for bits in (16, 8):
            poc_kernels.residual_projection(x, seed, activation_bits=bits, row_mask=mask, column_start=5, columns=99)
            poc_kernels.random_projection(x, seed, 130, activation_bits=bits)
    poc_kernels.projection_matrix(seed, 1, 3, 100, 5, 77, dtype=dtype)
nonce_inputs("block", "key", [1, 2, 3], 7, 33, device, torch.bfloat16)
permutations("block", "key", [1, 2, 3], 1000, device)
if device.type == "cuda":
    torch.cuda.synchronize()
print("short run done")
"""
SHORT_FORWARDS = """
import sys, torch
try:
    import transformers
except ImportError as error:
    print(f"SKIPPED [1] forwards of a model: {error}")
    raise SystemExit
from poc_kernels.scheduling import PriorityLanes
from poc_kernels.scheduling.slices import MEASURED_FORWARDS
from poc_kernels.engines.transformers.engine import TransformersEngine
device = torch.device(sys.argv[1])
dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
config = transformers.Qwen3Config(
    vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=128, eos_token_id=None, pad_token_id=0)
engine = TransformersEngine(
    transformers.AutoModelForCausalLM.from_config(config).to(device, dtype).eval(), slice_seconds=1e-4)
x, square = torch.randn(2, 16, 64, device=device).to(dtype), torch.randn(512, 512, device=device).to(dtype)
streams = PriorityLanes(device)
for _ in range(MEASURED_FORWARDS + 2):
    with streams.inference():
        product = square @ square
    with streams.validation():
        states = engine.forward(x)
assert engine.slices is not None, "not measured"
if device.type == "cuda":
    torch.cuda.synchronize()
    assert engine._captured is not None, "not captured"
print(f"forwards in {len(engine.slices.seconds)} slices done")
"""


class Command(NamedTuple):
    """What a process runs, and what is set in its environment."""

    arguments: list[str]
    environment: Mapping[str, str] = {}


def _python(code: str, *arguments: str) -> list[str]:
    """What runs ``code`` by this Python with the installed package.

    The folder that it starts in, where the package's sources lie, is no part of its path: Python 3.11's -P, by hand.
    """
    return [sys.executable, "-c", f"import sys; sys.path[:] = filter(None, sys.path)\n{code}", *arguments]


PYTEST = "import pytest; sys.exit(pytest.console_main())"


class Outcome(NamedTuple):
    """What came of a step."""

    name: str
    result: str
    """"ok", "FAILED ...", "not done ..." or "skipped: ..."."""
    seconds: float
    skipped: tuple[str, ...] = ()
    """What it left out itself."""


class _Process:
    """A command in a process group of its own; its output goes to the terminal and a log while it runs."""

    def __init__(self, command: Command, log: Path, label: str) -> None:
        self._process = subprocess.Popen(
            command.arguments,
            cwd=ROOT,
            env={**os.environ, **command.environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._copy, args=(log, label), daemon=True)
        self._reader.start()

    def _copy(self, log: Path, label: str) -> None:
        assert self._process.stdout is not None
        with log.open("a", buffering=1) as file:
            for line in self._process.stdout:
                self.lines.append(line.rstrip("\n"))
                file.write(label + line)
                print(label + line, end="", flush=True)

    @property
    def ended(self) -> bool:
        # Not reaped before `finish`, so that the group keeps its number.
        return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def interrupt(self) -> None:
        """What control-C does, for the whole group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGINT)

    def finish(self) -> int:
        """End what is left of the group; returns the command's exit status."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        status = self._process.wait()
        self._reader.join(5)
        return status


class Check:
    """Runs steps and remembers what came of them.

    Args:
        out: folder for the logs and the table, which is written after every step.
        device: "cuda" or "cpu".
        plan: seconds for each step, in their order.
        total: seconds that all steps have together.
        grace: seconds between the interrupt of a late step and its end.
        elapsed: seconds of the total that are over. If less than the plan is left, all steps get less alike.

    Raises:
        ValueError: the plan is longer than the total.
    """

    def __init__(
        self,
        out: Path,
        device: str,
        plan: Mapping[str, float] = PLAN,
        total: float = TOTAL_SECONDS,
        grace: float = GRACE_SECONDS,
        elapsed: float = 0.0,
    ) -> None:
        planned = sum(plan.values())
        if planned > total:
            raise ValueError(f"plan must add up to at most total, {total:g} s, got {planned:g} s")
        self.out, self.device = out, device
        self.outcomes: list[Outcome] = []
        self.summary = ""
        """What goes before the table."""
        self._grace = grace
        self._ends: dict[str, float] = {}
        left = max(0.0, total - elapsed)
        end = time.monotonic() + max(0.0, left - planned)
        for name, seconds in plan.items():
            self._ends[name] = end = end + seconds * min(1.0, left / planned)

    def left(self, name: str) -> float:
        """Seconds that the step may take before it is interrupted."""
        left = self._ends[name] - time.monotonic()
        return left - min(self._grace, left / 4)

    def run(self, name: str, *commands: Command, must_end: bool = True, error: str | None = None) -> bool:
        """Run a step, its commands at once, until the time planned for it is over; True if all of them succeed.

        A step that is not done by then has failed if it ``must_end``; one with a line that matches ``error``, a regular
        expression, has failed in any case.
        """
        limit = self.left(name)
        if limit < LEAST_SECONDS:
            self.skip(name, "no time left")
            return False
        start, end = time.monotonic(), self._ends[name]
        # Twice: what is deep in a library at the first may swallow it.
        interrupts = [start + limit, (start + limit + end) / 2]
        log = self.out / f"{name.replace(' ', '-')}.log"
        log.unlink(missing_ok=True)
        print(f"\n== {name}, at most {limit:.0f} s", flush=True)
        processes: list[_Process] = []
        late = False
        try:
            for number, command in enumerate(commands, 1):
                print(" ".join(part if len(part) < 200 else "..." for part in command.arguments), flush=True)
                with _signals_wait():
                    processes.append(_Process(command, log, f"[{number}] " if len(commands) > 1 else ""))
            while not all(process.ended for process in processes) and time.monotonic() < end:
                if interrupts and time.monotonic() > interrupts[0]:
                    interrupts.pop(0)
                    late = True
                    for process in processes:
                        if not process.ended:
                            process.interrupt()
                time.sleep(0.05)
        finally:
            statuses = [process.finish() for process in processes]
        failed = [str(status) for status in statuses if status != 0]
        result = f"FAILED with {', '.join(failed)}" if failed else "ok"
        if late:
            result = f"{'FAILED: ' if must_end else ''}not done after {limit:.0f} s"
        errors = [line for process in processes for line in process.lines if error and re.match(error, line)]
        if errors:
            result = f"FAILED: {errors[0]}"
        self._add(Outcome(name, result, time.monotonic() - start, _skips(processes)))
        return result == "ok"

    def skip(self, name: str, reason: str) -> None:
        """Note that a step does not run."""
        self._add(Outcome(name, f"skipped: {reason}", 0.0))

    def _add(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        self.save()

    def save(self) -> None:
        """Write the table so far, after the summary."""
        (self.out / f"gpu-check-{self.device}.txt").write_text(f"{self.summary}\n{self.table()}\n".lstrip())

    def table(self) -> str:
        """A line for each step, and for what it skipped."""
        lines = [f"{'step':<24}{'seconds':>8}  result"]
        for outcome in self.outcomes:
            lines.append(f"{outcome.name:<24}{outcome.seconds:>8.0f}  {outcome.result}")
            lines += [f"{'':<34}skipped {skip}" for skip in outcome.skipped]
        return "\n".join(lines)


def _skips(processes: list[_Process]) -> tuple[str, ...]:
    """pytest's lines on skipped tests, the numbers of all processes added."""
    counts: Counter[str] = Counter()
    for process in processes:
        for line in process.lines:
            if found := re.match(r"SKIPPED \[(\d+)\] (.*)", line):
                counts[found[2]] += int(found[1])
    return tuple(f"[{count}] {reason}" for reason, count in counts.items())


def take_signals() -> None:
    """SIGTERM ends this process by an exception, so that the step that runs ends too.

    SIGINT is taken as well: a shell has jobs in the background ignore it, their steps would inherit that, and one out
    of time could not be told to write down what it has.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def _signals_wait() -> Iterator[None]:
    """Signals that raise do so after the block: a process that starts in it is then known, and ends too."""
    came: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    before = {number: handler for number, handler in before.items() if callable(handler)}  # not what is ignored
    for number in before:
        signal.signal(number, lambda number, _: came.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for late in came:
            signal.raise_signal(late)


def _sanitizer() -> str | None:
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    bundled = Path(home, "bin", "compute-sanitizer")
    return shutil.which("compute-sanitizer") or (str(bundled) if bundled.exists() else None)


def _verify() -> Command:
    return Command(_python("from poc_kernels.cli import main; sys.exit(main(['verify']))"))


def _measure_what_is_wrong(check: Check) -> None:
    """Have the projection's suite take the Triton kernels though the last step, `verify`, did not find them right.

    It compares the bits of every case: what is right is measured, what is wrong fails alone. A verify that failed by
    another backend alone, or that was late, has not rejected them.
    """
    if check.outcomes[-1].result.startswith("FAILED with"):
        verdicts = (check.out / "verify.log").read_text()
        if not re.search(r"^triton +cuda:0 +gives the known answers", verdicts, re.MULTILINE):
            os.environ["POC_BENCH_TRUST"] = "triton"


def _sees_a_device(check: Check, command: Command) -> bool:
    """False if torch said that there is no CUDA device; one that takes long to import has not said so."""
    return check.run("torch", command, must_end=False) or not check.outcomes[-1].result.startswith("FAILED")


def _pytest(*arguments: str, **environment: str) -> Command:
    """The tests marked gpu of the files among ``arguments``."""
    options = ["-q", "-rs", "-m", "gpu", "-p", "no:cacheprovider"]
    return Command(_python(PYTEST, *options, *arguments), environment)


def _tests(device: str) -> list[Command]:
    """The tests in several processes, and the short runs, whose kernels are then compiled."""
    paths = [path for pattern in TESTS for path in sorted(ROOT.glob(pattern))]
    files = [str(path) for path in paths if path != ROOT / OVERLAP_TESTS]
    path = os.pathsep.join(filter(None, [str(BENCH), os.environ.get("PYTHONPATH")]))
    shards = [
        _pytest("-p", "gpu_shard", *files, PYTHONPATH=path, POC_TEST_SHARD=f"{shard}/{SHARDS}")
        for shard in range(1, SHARDS + 1)
    ]
    return [*shards, _script(SHORT_RUN, device), _script(SHORT_FORWARDS, device)]


def _script(code: str, device: str, *before: str, **environment: str) -> Command:
    return Command([*before, *_python(code, device)], environment)


def _memcheck(check: Check) -> None:
    sanitizer = _sanitizer()
    if check.device == "cpu":
        check.skip("compute-sanitizer", "a rehearsal on a CPU")
    elif sanitizer is None:
        check.skip("compute-sanitizer", "not on this machine")
    else:
        # torch asks the driver for what it may lack: such answers are no errors.
        options = ["--tool", "memcheck", "--error-exitcode", "1", "--report-api-errors", "no"]
        options += ["--target-processes", "application-only"]
        watch = (check.device, sanitizer, *options)
        # Without torch's cache, which graphs need, an access beyond a tensor is one beyond its allocation.
        commands = _script(SHORT_RUN, *watch, PYTORCH_NO_CUDA_MEMORY_CACHING="1"), _script(SHORT_FORWARDS, *watch)
        check.run("compute-sanitizer", *commands, must_end=False, error="=+ (Invalid|Misaligned) ")


def _suite_command(check: Check, suite: Suite, json: Path, more: list[str]) -> Command:
    """What runs a suite, with more options, so that its results go to ``json``."""
    on_gpu = check.device == "cuda"
    options = [*(suite.on_gpu if on_gpu else suite.rehearsed), *more]
    if suite.case_seconds is None:
        return Command([sys.executable, str(BENCH / suite.file), str(json), *options])
    pytest = _python(PYTEST, "-q", "-rs", str(BENCH / suite.file), "--bench-device", check.device)
    pytest += [*options, f"--benchmark-json={json}"]
    pytest.append(f"--bench-seconds={max(0.0, check.left(suite.name) - suite.case_seconds):.0f}")
    return Command(pytest, {} if on_gpu else {"POC_BENCH_QUICK": "1"})


def _benchmark(check: Check, suite: Suite, more: list[str]) -> str | None:
    """Run a suite and its report; returns what the report prints, after a script's verdicts on its goals."""
    json = check.out / f"{suite.name}-{'cuda' if check.device == 'cuda' else 'rehearsal'}.json"
    json.unlink(missing_ok=True)
    check.run(suite.name, _suite_command(check, suite, json, more))
    if not json.exists() or json.stat().st_size == 0:  # pytest's is made at the start and written at the end
        check.skip(f"{suite.name} report", "no results")
        return None
    done = check.run(f"{suite.name} report", Command([sys.executable, str(BENCH / suite.report), str(json)]))
    if not done:
        return None
    report = (check.out / f"{suite.name}-report.log").read_text()
    if suite.case_seconds is None:
        lines = (check.out / f"{suite.name}.log").read_text().splitlines()
        report = "\n".join([line for line in lines if re.match("(met|MISSED|not measured): ", line)] + [report])
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for JSON, tables, plots and logs")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--began", type=float, help="Unix time from which the 10 minutes count: now")
    parser.add_argument("--round-args", default="", help="options of the round's suite")
    arguments = parser.parse_args()
    take_signals()
    arguments.out.mkdir(parents=True, exist_ok=True)
    elapsed = 0.0 if arguments.began is None else time.time() - arguments.began
    check = Check(arguments.out.resolve(), arguments.device, elapsed=elapsed)

    there = Command(_python("import torch; sys.exit(not torch.cuda.is_available())"))
    if check.device == "cuda" and not _sees_a_device(check, there):
        print("gpu-check: torch finds no CUDA device, so nothing of it ran (make gpu-check DEVICE=cpu rehearses it)")
        return 1

    check.run("verify", _verify())
    _measure_what_is_wrong(check)
    check.run("tests", *_tests(check.device))
    if importlib.util.find_spec("transformers") is None:
        check.skip("overlap tests", "no transformers")
    else:
        check.run("overlap tests", _pytest(str(ROOT / OVERLAP_TESTS)))
    more = {"round": shlex.split(arguments.round_args)}
    summaries = [_benchmark(check, suite, more.get(suite.name, [])) for suite in SUITES]
    check.summary = "\n".join(filter(None, summaries))
    check.save()
    print(f"\n{check.summary}", flush=True)
    _memcheck(check)  # last: it may take whatever is left

    print(f"\n== results in {check.out}\n")
    print((check.out / f"gpu-check-{check.device}.txt").read_text())
    results = [outcome.result for outcome in check.outcomes]
    return 1 if "ok" not in results or any(result.startswith("FAILED") for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
