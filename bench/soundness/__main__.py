"""python -m bench.soundness [RESULTS.json] --model MODEL: how well proofs of a model can be guessed."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from bench.soundness import report
from bench.soundness.run import add_options, measure
from poc_kernels.engines.transformers.load import model_name


def main() -> None:
    """Measure, and write RESULTS.json, RESULTS.md and RESULTS.png."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "results",
        type=Path,
        nargs="?",
        help=f"JSON to write; the report goes next to it; {_results_of('MODEL')} by default",
    )
    add_options(parser)
    options = parser.parse_args()
    for name in ("nonces", "others"):
        if getattr(options, name) % options.batch_size or getattr(options, name) < options.batch_size:
            parser.error(
                f"--{name} must be a multiple of --batch-size {options.batch_size}, got {getattr(options, name)}"
            )
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    path = options.results or _results_of(model_name(options.model))
    path.parent.mkdir(parents=True, exist_ok=True)  # before what takes minutes
    results = measure(options)
    path.write_text(json.dumps(results, indent=1) + "\n")
    report.write(path, results)


def _results_of(model: str) -> Path:
    """Return where `make bench-soundness` writes the results of a model."""
    return Path("bench", "results", f"soundness-{Path(model).name}.json")


if __name__ == "__main__":
    main()
