"""What make gpu-check runs, step after step within 10 minutes, and what came of each: ok, failed, or skipped and why.

    python bench/gpu_check.py OUT [--device cuda|cpu]

Results go to the folder OUT. A step that fails does not stop the others. --device cpu rehearses it with small cases.
"""

from __future__ import annotations

import argparse
import contextlib
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
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
BENCH = ROOT / "bench"
TESTS = ("tests/test_*.py", "tests/kernels", "tests/protocol", "tests/serving/test_engine.py")
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
    Suite("projection", "test_projection_gpu.py", "gpu_report.py", 120, 8),
    Suite(
        *("round", "test_round_overhead.py", "round_report.py", 100, 30),
        on_gpu=("--bench-cases", "qwen3-8b@32x256,qwen3-0.6b@32x256"),
    ),
    Suite(
        *("beside", "beside.py", "beside_report.py", 135, None),
        on_gpu=("--device", "cuda", "--short", "--limit-seconds", "90"),
        rehearsed=("--quick",),
    ),
)
REPORT_SECONDS = 15
TOTAL_SECONDS = 600
# Of the steps in their order. What a step leaves, and what the sum leaves of the total, the following may use.
PLAN: dict[str, float] = {"torch": 10, "verify": 35, "tests": 105, "compute-sanitizer": 50}
for _suite in SUITES:
    PLAN |= {_suite.name: _suite.seconds, f"{_suite.name} report": REPORT_SECONDS}
LEAST_SECONDS = 2.0
"""No step begins with less."""
GRACE_SECONDS = 10.0
"""Between the interrupt that a late step gets, upon which pytest writes what it has, and its end."""

SHORT_RUN = """
import sys, torch, poc_kernels
from poc_kernels.protocol import nonce_inputs, permutations
device = torch.device(sys.argv[1])
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


class Command(NamedTuple):
    """What a process runs, and what is set in its environment."""

    arguments: list[str]
    environment: Mapping[str, str] = {}


class Outcome(NamedTuple):
    """What came of a step."""

    name: str
    result: str
    """"ok", "FAILED ..." or "skipped: ..."."""
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
        total: seconds that all steps have together, from now on.
        grace: seconds between the interrupt of a late step and its end.

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
    ) -> None:
        planned = sum(plan.values())
        if planned > total:
            raise ValueError(f"plan must add up to at most total, {total:g} s, got {planned:g} s")
        self.out, self.device = out, device
        self.outcomes: list[Outcome] = []
        self._grace = grace
        self._ends: dict[str, float] = {}
        end = time.monotonic() + total - planned
        for name, seconds in plan.items():
            self._ends[name] = end = end + seconds

    def left(self, name: str) -> float:
        """Seconds that the step may take before it is interrupted."""
        left = self._ends[name] - time.monotonic()
        return left - min(self._grace, left / 4)

    def run(self, name: str, *commands: Command) -> bool:
        """Run a step, its commands at once, until the time planned for it is over; True if all of them succeed."""
        limit = self.left(name)
        if limit < LEAST_SECONDS:
            self.skip(name, "no time left")
            return False
        start, end = time.monotonic(), self._ends[name]
        log = self.out / f"{name.replace(' ', '-')}.log"
        log.unlink(missing_ok=True)
        print(f"\n== {name}, at most {limit:.0f} s", flush=True)
        processes: list[_Process] = []
        late = False
        try:
            for number, command in enumerate(commands, 1):
                print(" ".join(part if len(part) < 200 else "..." for part in command.arguments), flush=True)
                processes.append(_Process(command, log, f"[{number}] " if len(commands) > 1 else ""))
            while not all(process.ended for process in processes) and time.monotonic() < end:
                if not late and time.monotonic() > start + limit:
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
            result = f"FAILED: not done after {limit:.0f} s"
        self._add(Outcome(name, result, time.monotonic() - start, _skips(processes)))
        return result == "ok"

    def skip(self, name: str, reason: str) -> None:
        """Note that a step does not run."""
        self._add(Outcome(name, f"skipped: {reason}", 0.0))

    def _add(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        self.save()

    def save(self, summary: str = "") -> None:
        """Write the table so far, after ``summary``."""
        (self.out / f"gpu-check-{self.device}.txt").write_text(f"{summary}\n{self.table()}\n".lstrip())

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


def end_with_sigterm() -> None:
    """SIGTERM ends this process by an exception, so that the step that runs ends too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def _sanitizer() -> str | None:
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    bundled = Path(home, "bin", "compute-sanitizer")
    return shutil.which("compute-sanitizer") or (str(bundled) if bundled.exists() else None)


def _tests(device: str) -> list[Command]:
    """The tests marked gpu in several processes, and the short run, whose kernels are then compiled."""
    files = [str(path) for pattern in TESTS for path in sorted(ROOT.glob(pattern))]
    pytest = [
        sys.executable,
        "-P",
        "-m",
        "pytest",
        "-q",
        "-rs",
        "-m",
        "gpu",
        "-p",
        "no:cacheprovider",
        "-p",
        "gpu_shard",
    ]
    path = os.pathsep.join(filter(None, [str(BENCH), os.environ.get("PYTHONPATH")]))
    shards = [
        Command([*pytest, *files], {"PYTHONPATH": path, "POC_TEST_SHARD": f"{shard}/{SHARDS}"})
        for shard in range(1, SHARDS + 1)
    ]
    return [*shards, _short_run(device)]


def _short_run(device: str, *before: str, **environment: str) -> Command:
    return Command([*before, sys.executable, "-P", "-c", SHORT_RUN, device], environment)


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
        # Without torch's cache each tensor is an allocation of its own, beyond which an access is found.
        command = _short_run(check.device, sanitizer, *options, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        check.run("compute-sanitizer", command)


def _suite_command(check: Check, suite: Suite, json: Path, more: list[str]) -> Command:
    """What runs a suite, with more options, so that its results go to ``json``."""
    on_gpu = check.device == "cuda"
    options = [*(suite.on_gpu if on_gpu else suite.rehearsed), *more]
    if suite.case_seconds is None:
        return Command([sys.executable, str(BENCH / suite.file), str(json), *options])
    pytest = [
        sys.executable,
        "-P",
        "-m",
        "pytest",
        "-q",
        "-rs",
        str(BENCH / suite.file),
        "--bench-device",
        check.device,
    ]
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
    parser.add_argument("--round-args", default="", help="options of the round's suite")
    arguments = parser.parse_args()
    end_with_sigterm()
    arguments.out.mkdir(parents=True, exist_ok=True)
    check = Check(arguments.out.resolve(), arguments.device)

    there = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    python = [sys.executable, "-P"]
    if check.device == "cuda" and not check.run("torch", Command([*python, "-c", there])):
        print("gpu-check: torch finds no CUDA device, so nothing of it ran (make gpu-check DEVICE=cpu rehearses it)")
        return 1

    check.run("verify", Command([*python, "-m", "poc_kernels.cli", "verify"]))
    check.run("tests", *_tests(check.device))
    _memcheck(check)
    more = {"round": shlex.split(arguments.round_args)}
    summaries = [_benchmark(check, suite, more.get(suite.name, [])) for suite in SUITES]

    check.save("\n".join(filter(None, summaries)))
    print(f"\n== results in {check.out}\n")
    print((check.out / f"gpu-check-{check.device}.txt").read_text())
    return 1 if any(outcome.result.startswith("FAILED") for outcome in check.outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
