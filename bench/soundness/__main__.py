"""python -m bench.soundness RESULTS.json --model MODEL: how well proofs of a model can be guessed."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from bench.soundness import report
from bench.soundness.run import add_options, measure


def main() -> None:
    """Measure, and write RESULTS.json, RESULTS.md and RESULTS.png."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, help="JSON to write; the report goes next to it")
    add_options(parser)
    options = parser.parse_args()
    for name in ("nonces", "others"):
        if getattr(options, name) % options.batch_size or getattr(options, name) < options.batch_size:
            parser.error(
                f"--{name} must be a multiple of --batch-size {options.batch_size}, got {getattr(options, name)}"
            )
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    results = measure(options)
    options.results.write_text(json.dumps(results, indent=1) + "\n")
    report.write(options.results, results)


if __name__ == "__main__":
    main()
