"""What make gpu-check runs, and its time: step after step within 10 minutes, with a result for each.

The 10 minutes, or --total seconds, count from --began, when the build began; the steps are planned to take less
(`PLAN`). The folder OUT gets a table and an archive of all results, which are renewed after each step. A step that
fails does not stop the others. --device cpu rehearses it with small cases.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shlex
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from bench import ROOT
from bench.gpu_check.steps import Check, Command, take_signals

TESTS = ("tests/test_*.py", "tests/kernels", "tests/protocol", "tests/engines/transformers/test_engine.py")
OVERLAP_TESTS = "tests/test_cuda_colocated.py"
"""These look at what runs at the same time, so nothing else may run."""
GPU_BACKENDS = "cuda,triton"
"""Those with kernels of their own for GPUs, the better one first."""
SHARDS = min(8, max(1, (os.cpu_count() or 1) // 2))
"""Processes that share the tests."""


class Suite(NamedTuple):
    """A benchmark and its report; its most important cases come first."""

    name: str
    target: str
    """The file of a suite of pytest, or the module of a script, in ``bench``."""
    report: str
    """The module of the report."""
    seconds: float
    """Planned for the suite."""
    case_seconds: float | None
    """The longest time of a case: none begins when less is left. None for a script, which takes --limit-seconds."""
    on_gpu: tuple[str, ...] = ()
    """Options on a GPU."""
    rehearsed: tuple[str, ...] = ()
    """Options in a rehearsal."""


SUITES = (
    Suite("projection", "projection/test_gpu.py", "projection.gpu_report", 75, 8),
    Suite(
        *("round", "round/test_overhead.py", "round.report", 50, 30),
        on_gpu=("--bench-cases", "qwen3-8b@32x256,qwen3-0.6b@32x256"),
    ),
    Suite(
        *("interference", "interference", "interference.report", 100, None),
        on_gpu=("--device", "cuda", "--short"),
        rehearsed=("--quick",),
    ),
)
REPORT_SECONDS = 8
TOTAL_SECONDS = 570
"""Less than 10 minutes, since some work follows the last step."""
SCRIPT_SECONDS, SCRIPT_END_SECONDS = 60.0, 30.0
"""Limit of a script on a GPU, after which it begins nothing; how long what it has begun may take."""


def _suite_plan(suite: Suite) -> dict[str, float]:
    return {suite.name: suite.seconds, f"{suite.name} report": REPORT_SECONDS}


# Seconds of the steps, in order. What a step leaves, and what the sum leaves of the total, the following may use.
# A new machine imports torch slowly, and compiles 54 kernels before it trusts them. The figures that have goals come
# before all else.
PLAN: dict[str, float] = {"torch": 45, "verify": 60}
PLAN |= _suite_plan(SUITES[0]) | {"tests": 90, "overlap tests": 40}
for _suite in SUITES[1:]:
    PLAN |= _suite_plan(_suite)
PLAN["compute-sanitizer"] = 45


def plan_of(total: float) -> dict[str, float]:
    """Return the plan; steps are shortened alike where the total is shorter than theirs."""
    scale = min(1.0, total / TOTAL_SECONDS)
    return {name: seconds * scale for name, seconds in PLAN.items()}


def _python(code: str, *arguments: str) -> list[str]:
    """Return what runs ``code`` with the installed package: importing ``bench`` takes the sources off the path."""
    return [sys.executable, "-c", f"import bench, sys; {code}", *arguments]


def _module(name: str, *arguments: str) -> list[str]:
    """Return what runs a module of ``bench``, likewise with the installed package."""
    return [sys.executable, "-m", f"bench.{name}", *arguments]


PYTEST = "import pytest; sys.exit(pytest.main())"
MARKED_GPU = ("-q", "-rs", "-m", "gpu", "-p", "no:cacheprovider")
GOES_ON = ("--continue-on-collection-errors",)
"""A file that takes a package that the machine lacks fails by itself."""


def _sanitizer() -> str | None:
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    bundled = Path(home, "bin", "compute-sanitizer")
    return shutil.which("compute-sanitizer") or (str(bundled) if bundled.exists() else None)


def _verify() -> Command:
    return Command(_python("from poc_kernels.cli import main; sys.exit(main(['verify']))"))


def _measure_what_is_wrong(check: Check) -> None:
    """Have the projection's suite measure the GPU's kernels even if the last step, `verify`, rejected them.

    The suite compares the bits of every case: what is right is measured, only what is wrong fails. A `verify` that
    found one of these backends right leaves it to serve. One that was late says nothing: they are measured without
    another trial, which would take as long.
    """
    if check.outcomes[-1].result.startswith("not done"):
        os.environ |= {"POC_BENCH_TRUST": GPU_BACKENDS, "POC_BENCH_VERDICT": "NOT VERIFIED IN TIME"}
    if check.outcomes[-1].result.startswith("FAILED with"):
        verdicts = (check.out / "verify.log").read_text()
        any_of_them = GPU_BACKENDS.replace(",", "|")
        if not re.search(rf"^({any_of_them}) +cuda:0 +gives the known answers", verdicts, re.MULTILINE):
            os.environ["POC_BENCH_TRUST"] = GPU_BACKENDS


def _sees_a_device(check: Check, command: Command) -> bool:
    """Return False if torch said that there is no CUDA device; a torch that imports too slowly has not said so."""
    return check.run("torch", command, must_end=False) or not check.outcomes[-1].result.startswith("FAILED")


def _overlap_tests() -> Command:
    return Command(_python(PYTEST, *MARKED_GPU, str(ROOT / OVERLAP_TESTS)))


def _tests(device: str) -> list[Command]:
    """Return the tests in several processes, and the short runs, so that the kernels of these are compiled."""
    paths = [path for pattern in TESTS for path in sorted(ROOT.glob(pattern))]
    files = [str(path) for path in paths if path != ROOT / OVERLAP_TESTS]
    shards = [
        _module("gpu_check.shard", f"{shard}/{SHARDS}", *GOES_ON, *MARKED_GPU, *files) for shard in range(1, SHARDS + 1)
    ]
    vllm = _module("gpu_check.short_vllm", device)
    return [Command(arguments) for arguments in (*shards, *_short_runs(device), vllm)]


def _short_runs(device: str) -> tuple[list[str], list[str]]:
    return _module("gpu_check.short_run", device), _module("gpu_check.short_forwards", device)


def _memcheck(check: Check) -> None:
    sanitizer = _sanitizer()
    if check.device == "cpu":
        check.skip("compute-sanitizer", "a rehearsal on a CPU")
    elif sanitizer is None:
        check.skip("compute-sanitizer", "not on this machine")
    else:
        # torch asks the driver for features that it may lack: such answers are no errors.
        options = ["--tool", "memcheck", "--error-exitcode", "1", "--report-api-errors", "no"]
        options += ["--target-processes", "application-only"]
        ops, forwards = ([sanitizer, *options, *arguments] for arguments in _short_runs(check.device))
        # Without torch's cache, which graphs need, an access beyond a tensor is one beyond its allocation.
        commands = Command(ops, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}), Command(forwards)
        check.run(
            "compute-sanitizer",
            *commands,
            must_end=False,
            error="=+ (Invalid|Misaligned) ",
            unsupported="=+ .*Device not supported",
        )


def _suite_command(check: Check, suite: Suite, json: Path, more: list[str]) -> Command:
    """Return what runs a suite, with more options, so that its results go to ``json``."""
    on_gpu = check.device == "cuda"
    options = [*(suite.on_gpu if on_gpu else suite.rehearsed), *more]
    if suite.case_seconds is None:
        if on_gpu:
            limit = min(SCRIPT_SECONDS, check.left(suite.name) - SCRIPT_END_SECONDS)
            options += ["--limit-seconds", f"{max(1.0, limit):.0f}"]
        return Command(_module(suite.target, str(json), *options))
    pytest = _python(PYTEST, "-q", "-rs", str(ROOT / "bench" / suite.target), "--bench-device", check.device)
    pytest += [*options, f"--benchmark-json={json}"]
    pytest.append(f"--bench-seconds={max(0.0, check.left(suite.name) - suite.case_seconds):.0f}")
    return Command(pytest, {} if on_gpu else {"POC_BENCH_QUICK": "1"})


def _benchmark(check: Check, suite: Suite, more: list[str]) -> str | None:
    """Run a suite and its report; returns a script's verdicts on its goals, then what the report prints."""
    json = check.out / f"{suite.name}-{'cuda' if check.device == 'cuda' else 'rehearsal'}.json"
    json.unlink(missing_ok=True)
    check.run(suite.name, _suite_command(check, suite, json, more))
    if not json.exists() or json.stat().st_size == 0:  # pytest's is made at the start and written at the end
        check.skip(f"{suite.name} report", "no results")
        return None
    done = check.run(f"{suite.name} report", Command(_module(suite.report, str(json))))
    if not done:
        return None
    report = (check.out / f"{suite.name}-report.log").read_text()
    if suite.case_seconds is None:
        lines = (check.out / f"{suite.name}.log").read_text().splitlines()
        report = "\n".join([line for line in lines if re.match("(met|MISSED|not measured): ", line)] + [report])
    return report


def main() -> int:
    """Run all steps; returns 1 if one failed or none was run."""
    parser = argparse.ArgumentParser("python -m bench.gpu_check", description=__doc__)
    parser.add_argument("out", type=Path, help="folder for the table and the archive of JSON, plots and logs")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--began", type=float, help="Unix time from which the time counts; the default is now")
    parser.add_argument("--total", type=float, default=TOTAL_SECONDS, help="seconds for all steps")
    parser.add_argument("--round-args", default="", help="options of the round's suite")
    arguments = parser.parse_args()
    take_signals()
    arguments.out.mkdir(parents=True, exist_ok=True)
    elapsed = 0.0 if arguments.began is None else time.time() - arguments.began
    check = Check(
        Path(tempfile.mkdtemp(prefix="gpu-check-")),
        arguments.device,
        plan_of(arguments.total),
        arguments.total,
        elapsed=elapsed,
        results=arguments.out.resolve(),
    )

    there = Command(_python("import torch; sys.exit(not torch.cuda.is_available())"))
    if check.device == "cuda" and not _sees_a_device(check, there):
        print("gpu-check: torch finds no CUDA device, so nothing of it ran (make gpu-check DEVICE=cpu rehearses it)")
        return 1

    check.run("verify", _verify(), must_end=False)
    _measure_what_is_wrong(check)
    more = {"round": shlex.split(arguments.round_args)}
    summaries = [_benchmark(check, SUITES[0], [])]
    check.run("tests", *_tests(check.device))
    if importlib.util.find_spec("transformers") is None:
        check.skip("overlap tests", "no transformers")
    else:
        check.run("overlap tests", _overlap_tests())
    summaries += [_benchmark(check, suite, more.get(suite.name, [])) for suite in SUITES[1:]]
    check.summary = "\n".join(filter(None, summaries))
    check.save()
    print(f"\n{check.summary}", flush=True)
    _memcheck(check)  # last: it may take whatever is left

    print(f"\n== results in {check.results}\n")
    print((check.out / f"gpu-check-{check.device}.txt").read_text())
    results = [outcome.result for outcome in check.outcomes]
    return 1 if "ok" not in results or any(result.startswith("FAILED") for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
