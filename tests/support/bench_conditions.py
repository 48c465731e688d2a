"""What a result file of a benchmark says of its run, for the tests of reports."""

from __future__ import annotations

from typing import Any


def conditions(**machine: Any) -> dict[str, Any]:
    """Return machine_info, with these changes, commit_info and datetime, as `bench.common.conditions` gives them."""
    machine_info = {
        "cpu": "a CPU",
        "architecture": "x86_64",
        "logical_cores": 2,
        "bfloat16_instructions": [],
        "backend": "reference",
        "threads": 2,
        "load_before": 0.0,
        "os": "an OS",
        "python": "CPython 3.11",
        "torch": "2.13.0",
        "transformers": "5.23.0",
        "triton": None,
        "gpu": None,
        **machine,
    }
    commit_info = {"id": "abc", "time": None, "dirty": False}
    return {"machine_info": machine_info, "commit_info": commit_info, "datetime": "2026-11-22T12:00:00+00:00"}
