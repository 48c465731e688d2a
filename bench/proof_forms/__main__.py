"""Measures what vectors and fingerprints add to a forward on a CPU, writes NAME.json and NAME.md: see bench/README.md.

Seconds are CPU time of one thread, so that other programs on the cores count little.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.common.conditions import conditions
from bench.common.models import Case, build, parse_cases
from bench.common.report_text import figures, model_header, table
from bench.common.spread import spread
from poc_kernels import seed_tensor
from poc_kernels.engines.transformers.engine import TransformersEngine
from poc_kernels.protocol import Row, nonce_inputs
from poc_kernels.protocol.artifacts.tensors import texts
from poc_kernels.protocol.fingerprint.flips import Flips
from poc_kernels.protocol.fingerprint.form import FINGERPRINT
from poc_kernels.protocol.fingerprint.mix import FIRST_POSITION, mixed, pairs_of, read
from poc_kernels.protocol.fingerprint.signs import flips_seed, mix_seed
from poc_kernels.protocol.vectors.form import VECTORS
from poc_kernels.protocol.vectors.reflections import Reflections
from poc_kernels.protocol.vectors.vector import picks, rotation_axes, vectors

_CASES = "smollm2-135m@8x64,qwen3-0.6b:14@8x64,qwen3-8b:2@8x64"
_QUICK_CASES = "demo@2x16"
_BLOCK = "0x00ab"
_CACHE_BYTES = 2**28
"""States are taken from this much memory in turn, so that none of them are in the caches from the time before."""

FORWARD = "forward"
PER_LAYER = {"flips", "signs", "reflections"}
"""What grows with the layers, as the forward does. The rest comes once per forward."""
FINGERPRINTS = ("signs", "flips", "mix", "read")
VECTOR_STEPS = ("reflections", "vector")


class Steps:
    """The steps of both forms on one batch of an engine."""

    def __init__(self, engine: TransformersEngine, case: Case) -> None:
        self.engine = engine
        self.rows = [Row("key", nonce) for nonce in range(case.batch_size)]
        nonces = [row.nonce for row in self.rows]
        self.x = nonce_inputs(_BLOCK, "key", nonces, case.seq_len, engine.hidden_size, dtype=engine.dtype)
        self.flips = Flips(engine, case.batch_size)
        self.reflections = Reflections(engine)
        self.reflections.set_block(_BLOCK)
        self.seed = seed_tensor(7)
        copies = max(2, _CACHE_BYTES // self.x.nbytes)
        self._states = [self.x.clone() for _ in range(copies)]
        self._taken = 0
        self.hidden = engine.forward(self.x).clone()
        self.u = self.mix()

    def forward(self) -> Tensor:
        return self.engine.forward(self.x)

    def signs(self) -> None:
        self.flips.draw(slice(0, len(self.rows)), [flips_seed(_BLOCK, *row) for row in self.rows])

    def _after_layers(self, transform: Callable[[int, Tensor], Tensor]) -> None:
        for layer in range(self.engine.layers):
            self._taken = (self._taken + 1) % len(self._states)
            transform(layer, self._states[self._taken])

    def mix(self) -> Tensor:
        end = FIRST_POSITION + 2 * pairs_of(self.x.shape[1])
        return mixed(self.hidden[:, FIRST_POSITION:end], [mix_seed(_BLOCK, *row) for row in self.rows])

    def vector(self) -> None:
        k = VECTORS.k_dim
        axes = rotation_axes(_BLOCK, self.rows, k)
        texts(vectors(self.hidden[:, -1], picks(_BLOCK, self.rows, self.engine.hidden_size, k), axes))

    def all(self) -> dict[str, Callable[[], Any]]:
        """Return the steps by their names."""
        return {
            FORWARD: self.forward,
            "signs": self.signs,
            "flips": lambda: self._after_layers(self.flips),
            "mix": self.mix,
            "read": lambda: texts(read(self.u, self.seed)),
            "reflections": lambda: self._after_layers(self.reflections),
            "vector": self.vector,
        }


@torch.inference_mode()
def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Return the CPU seconds of each step of a case, those of a round one after the other."""
    with tempfile.TemporaryDirectory() as directory:
        built = build(case, torch.bfloat16, torch.device("cpu"), Path(directory))
    engine = TransformersEngine(built.model, slice_seconds=1e9)
    steps = Steps(engine, case).all()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for place in range(rounds + 1):  # the first is not counted
        for name, step in steps.items():
            began = time.thread_time()
            step()
            if place > 0:
                seconds[name].append(time.thread_time() - began)
    return {
        "case": str(case),
        "hidden_size": engine.hidden_size,
        "layers": built.layers,
        "whole_layers": built.whole_layers,
        "seconds": seconds,
        "shares": _shares(seconds, built.whole_layers / built.layers),
    }


def _shares(seconds: dict[str, list[float]], depth: float) -> dict[str, dict[str, float]]:
    """Return each step, and those of each form, as a share of the forward with all layers of the model."""
    whole = [depth * forward for forward in seconds[FORWARD]]
    added = {
        name: [(depth if name in PER_LAYER else 1.0) * value for value in values]
        for name, values in seconds.items()
        if name != FORWARD
    }
    for form, names in ((FINGERPRINT.name, FINGERPRINTS), (VECTORS.name, VECTOR_STEPS)):
        added[form] = [sum(values) for values in zip(*(added[name] for name in names), strict=True)]
    return {
        name: spread([value / forward for value, forward in zip(values, whole, strict=True)])._asdict()
        for name, values in added.items()
    }


def report(results: dict[str, Any]) -> str:
    """Return the report in Markdown."""
    steps = [*FINGERPRINTS, FINGERPRINT.name, *VECTOR_STEPS, VECTORS.name]
    rows = [
        [
            case["case"],
            str(case["hidden_size"]),
            f"{case['layers']} of {case['whole_layers']}",
            figures(sorted(case["seconds"][FORWARD])[len(case["seconds"][FORWARD]) // 2]),
            *(
                f"{100 * case['shares'][name]['median']:.2f} ({100 * case['shares'][name]['p90']:.2f})"
                for name in steps
            ),
        ]
        for case in results["cases"]
    ]
    columns = ["case", "D", "layers measured", "forward, s", *(f"{name}, %" for name in steps)]
    return "\n\n".join(
        [
            "# What vectors and fingerprints add to a forward",
            model_header(results),
            "CPU seconds of one thread; steps in percent of the forward with all layers: the median, and in brackets "
            "the 90th percentile. The columns fingerprint and vectors are the sums of those before them. States that "
            "are flipped or reflected come from memory, not from the caches; weights are random, in bfloat16.",
            table(columns, rows),
        ]
    )


def main() -> int:
    """Measure the cases of the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.proof_forms", description=__doc__)
    parser.add_argument("results", type=Path, help="NAME.json to write; NAME.md goes beside it")
    parser.add_argument("--cases", default=None, help=f"see bench/README.md; default {_CASES}")
    parser.add_argument("--rounds", type=int, default=7, help="rounds that are counted, at least 2; default 7")
    parser.add_argument("--quick", action="store_true", help="a small model, to try the bench itself")
    options = parser.parse_args()
    try:
        cases = parse_cases(options.cases or (_QUICK_CASES if options.quick else _CASES))
        if options.rounds < 2:
            raise ValueError(f"--rounds must be at least 2, got {options.rounds}")
    except ValueError as error:
        parser.error(str(error))
    torch.set_num_threads(1)
    results = {**conditions(torch.device("cpu")), "cases": [measure(case, options.rounds) for case in cases]}
    options.results.write_text(json.dumps(results, indent=1) + "\n")
    options.results.with_suffix(".md").write_text(report(results) + "\n")
    print(report(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
