"""Measures a node over HTTP on loopback, writes NAME.json and NAME.md: see bench/README.md."""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench.common.conditions import conditions
from bench.common.report_text import figures, header, table
from bench.http.load import (
    Client,
    Waits,
    long_prompts,
    never_reading,
    requests_per_second,
    silent,
    waits_of_a_client,
)
from bench.http.node import served
from poc_kernels.demo import model as demo_model
from poc_kernels.node.connections import raise_descriptors

DELAYED, AT_ONCE = "Nagle's algorithm on, as before", "off, as now"
_CLIENTS = 8
_TOKENS = 32
_COLUMNS = {
    "first_p50_ms": "first token, median, ms",
    "between_p50_ms": "between tokens, median, ms",
    "between_p99_ms": "p99, ms",
    "health_p50_ms": "GET /health, median, ms",
    "health_max_ms": "largest, ms",
    "failed": "refused or cut off",
    "requests_per_second": f"requests/s, {_CLIENTS} clients",
}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of both nodes in turn, and of the one as it is now beside other clients."""
    raise_descriptors(options.silent + 1000)
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        demo_model.build(directory)
        ports = {
            DELAYED: stack.enter_context(served(directory, nagle=True)),
            AT_ONCE: stack.enter_context(served(directory)),
        }
        answers = _answers(ports, options)
        port = ports[AT_ONCE]
        beside = {
            "alone": contextlib.nullcontext(),
            f"{options.never_reading} clients that never read their streams": never_reading(
                port, options.never_reading, _TOKENS * 8
            ),
            f"{options.silent} connections that say nothing": silent(port, options.silent),
            "a prompt of 1 MB": long_prompts(port, 1, 10**6),
            "alone again": contextlib.nullcontext(),
        }
        loads = {}
        for name, load in beside.items():
            with load:
                loads[name] = waits_of_a_client(port, options.streams, _TOKENS).figures()
            print(f"{time.strftime('%H:%M:%S')} {name}: {loads[name]}", file=sys.stderr, flush=True)
            time.sleep(options.rest_seconds)
    return {**conditions(torch.device("cpu")), "answers": answers, "loads": loads}


def _answers(ports: dict[str, int], options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Return the figures of each node on kept connections; in each round all nodes have their turn."""
    waits = {name: Waits() for name in ports}
    rates: dict[str, list[float]] = {name: [] for name in ports}
    for turn in range(options.rounds):
        for name in list(ports)[:: 1 if turn % 2 == 0 else -1]:
            client = Client(ports[name])
            for _ in range(30):
                client.health(waits[name])
            for _ in range(5):
                client.stream(waits[name], _TOKENS)
            rates[name].append(requests_per_second(ports[name], _CLIENTS, options.loop_seconds))
    return {name: {**waits[name].figures(), "requests_per_second": statistics.median(rates[name])} for name in ports}


def report(results: dict[str, Any]) -> str:
    """Write the figures as Markdown."""

    def rows(of: dict[str, dict[str, float]], columns: list[str]) -> str:
        return table(
            ["", *(_COLUMNS[each] for each in columns)],
            [[name, *(figures(row[each]) for each in columns)] for name, row in of.items()],
        )

    common = list(_COLUMNS)[:5]
    return "\n\n".join(
        [
            "# A node over HTTP",
            header(results),
            "The demonstration's model on the CPU, answers of 32 tokens, one client on loopback.",
            "## Each token at once\n\nKept connections; both nodes in turn.",
            rows(results["answers"], [*common, "requests_per_second"]),
            "## Beside others\n\nA client that comes anew for each stream; the others have another address.",
            rows(results["loads"], [*common, "failed"]),
        ]
    )


def main() -> None:
    """Measure, and write the results next to each other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, help="JSON to write; the report goes next to it")
    add = parser.add_argument
    add("--rounds", type=int, default=6, help="turns of each node")
    add("--loop-seconds", type=float, default=4.0, help="length of a closed loop")
    add("--streams", type=int, default=40, help="streams beside each kind of other clients")
    add("--never-reading", type=int, default=300, help="clients that never read")
    add("--silent", type=int, default=3000, help="connections that say nothing")
    add("--rest-seconds", type=float, default=5.0, help="pause after each kind of other clients")
    options = parser.parse_args()
    results = measure(options)
    options.results.write_text(json.dumps(results, indent=1) + "\n")
    options.results.with_suffix(".md").write_text(report(results) + "\n")


if __name__ == "__main__":
    main()
