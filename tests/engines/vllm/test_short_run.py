"""What a check of a GPU machine does beside vLLM, on this CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import poc_kernels

pytest.importorskip("vllm")


def test_the_short_run_in_vllm_proves_in_every_form() -> None:
    package = str(Path(poc_kernels.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu_check.short_vllm", "cpu"],
        cwd=Path(__file__).parents[3],
        env={**os.environ, "PYTHONPATH": package},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].endswith("done: distances, vectors, fingerprint")
