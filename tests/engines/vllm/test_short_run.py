"""What a check of a GPU machine does beside vLLM, on this CPU."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")
from bench_processes import run_python


def test_the_short_run_in_vllm_proves_in_every_form() -> None:
    done = run_python("-m", "bench.gpu_check.short_vllm", "cpu")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].endswith("done: distances, vectors, fingerprint")
