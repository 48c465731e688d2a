"""What make gpu-check runs, step after step within 10 minutes, and what came of each: ok, failed, or skipped and why.

    python bench/gpu_check.py OUT [--device cuda|cpu]

Results go to the folder OUT. A step that fails does not stop the others. --device cpu rehearses it with small cases.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
TOTAL_SECONDS = 600
TESTS = ("tests/test_*.py", "tests/kernels", "tests/protocol", "tests/serving/test_engine.py")

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


class Outcome(NamedTuple):
    """What came of a step."""

    name: str
    result: str
    """"ok", "FAILED ..." or "skipped: ..."."""
    seconds: float
    skipped: tuple[str, ...] = ()
    """What it left out itself."""


class Check:
    """Runs steps and remembers what came of them."""

    def __init__(self, out: Path, device: str) -> None:
        self.out, self.device = out, device
        self.outcomes: list[Outcome] = []
        self._end = time.monotonic() + TOTAL_SECONDS

    def run(self, name: str, command: list[str], limit: float, **environment: str) -> bool:
        """Run a command for at most ``limit`` seconds, or what is left; its output goes to the terminal and to OUT."""
        left = min(limit, self._end - time.monotonic())
        if left < 5:
            self.skip(name, "the 10 minutes are over")
            return False
        print(f"\n== {name}: {' '.join(part if len(part) < 200 else '...' for part in command)}", flush=True)
        start = time.monotonic()
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env={**os.environ, **environment},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                timeout=left,
            )
            output, result = done.stdout, "ok" if done.returncode == 0 else f"FAILED with {done.returncode}"
        except subprocess.TimeoutExpired as error:
            printed = error.stdout or ""
            output = printed if isinstance(printed, str) else printed.decode(errors="replace")
            result = f"FAILED: not done after {left:.0f} s"
        print(output, flush=True)
        (self.out / f"{name.replace(' ', '-')}.log").write_text(output)
        skips = tuple(dict.fromkeys(re.findall(r"^SKIPPED (.*)$", output, re.MULTILINE)))
        self.outcomes.append(Outcome(name, result, time.monotonic() - start, skips))
        return result == "ok"

    def skip(self, name: str, reason: str) -> None:
        self.outcomes.append(Outcome(name, f"skipped: {reason}", 0.0))

    def table(self) -> str:
        lines = [f"{'step':<24}{'seconds':>8}  result"]
        for outcome in self.outcomes:
            lines.append(f"{outcome.name:<24}{outcome.seconds:>8.0f}  {outcome.result}")
            lines += [f"{'':<34}skipped {skip}" for skip in outcome.skipped]
        return "\n".join(lines)


def _sanitizer() -> str | None:
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    bundled = Path(home, "bin", "compute-sanitizer")
    return shutil.which("compute-sanitizer") or (str(bundled) if bundled.exists() else None)


def _benchmark(check: Check, name: str, suite: list[str], report: str, limit: float) -> str | None:
    """Run a suite and its report; returns what the report prints."""
    json = check.out / f"{name}-{'cuda' if check.device == 'cuda' else 'rehearsal'}.json"
    json.unlink(missing_ok=True)
    quick = {"POC_BENCH_QUICK": "1"} if check.device == "cpu" else {}
    pytest = [sys.executable, "-P", "-m", "pytest", "-q", "-rs", *suite, "--bench-device", check.device]
    check.run(name, [*pytest, f"--benchmark-json={json}"], limit, **quick)
    if not json.exists():
        check.skip(f"{name} report", "no results")
        return None
    done = check.run(f"{name} report", [sys.executable, report, str(json)], 60)
    return (check.out / f"{name.replace(' ', '-')}-report.log").read_text() if done else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for JSON, tables, plots and logs")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--round-args", default="", help="options of the round's suite")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    check = Check(arguments.out.resolve(), arguments.device)
    python = [sys.executable, "-P"]

    there = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    if check.device == "cuda" and subprocess.run([*python, "-c", there]).returncode != 0:
        print("gpu-check: torch finds no CUDA device, so nothing of it ran (make gpu-check DEVICE=cpu rehearses it)")
        return 1

    check.run("verify", [*python, "-m", "poc_kernels.cli", "verify"], 120)
    tests = [str(path) for pattern in TESTS for path in sorted(ROOT.glob(pattern))]
    if check.device == "cuda":
        check.run("tests", [*python, "-m", "pytest", "-q", "-m", "gpu", "-rs", *tests], 180)
    else:
        check.skip("tests", "marked gpu, and this is a rehearsal on a CPU")
    sanitizer = _sanitizer()
    short_run = [*python, "-c", SHORT_RUN, check.device]
    if check.device == "cpu":
        check.run("short run", short_run, 60)
    elif sanitizer is None:
        check.skip("compute-sanitizer", "not on this machine")
    else:
        options = ["--tool", "memcheck", "--error-exitcode", "1", "--target-processes", "application-only"]
        # Without torch's cache each tensor is an allocation of its own, beyond which an access is found.
        check.run("compute-sanitizer", [sanitizer, *options, *short_run], 120, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    summary = _benchmark(check, "projection", ["bench/test_projection_gpu.py"], "bench/gpu_report.py", 300)
    round_suite = ["bench/test_round_overhead.py", *shlex.split(arguments.round_args)]
    _benchmark(check, "round", round_suite, "bench/round_report.py", 240)

    print(f"\n== results in {check.out}\n")
    if summary:
        print(summary)
    print(check.table())
    (check.out / f"gpu-check-{check.device}.txt").write_text(f"{summary or ''}\n{check.table()}\n")
    return 1 if any(outcome.result.startswith("FAILED") for outcome in check.outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
