"""All that is measured of a model: each form's guesses, lower precision, and noise."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from bench.common.conditions import conditions
from bench.soundness import figures
from bench.soundness.blocks import over_blocks
from bench.soundness.forwards import KEY, final_norm
from bench.soundness.geometry import blocks_of, of_blocks
from bench.soundness.precision import PRECISIONS, rounded_copy
from bench.soundness.readers import READERS
from bench.soundness.study import FREE, NOISE, PRECISION, Sizes, Study
from poc_kernels.engines.transformers.engine import TransformersEngine
from poc_kernels.engines.transformers.load import load_model, model_name
from poc_kernels.protocol import PoCConfig
from poc_kernels.protocol.vectors.form import VECTORS

_BLOCK = "soundness"


def _log(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


def _engine(model: Any) -> TransformersEngine:
    # Transforms here have state of their own, which a captured graph would not change.
    return TransformersEngine(model, cuda_graphs=False)


def _config(form: str, options: argparse.Namespace) -> PoCConfig:
    return PoCConfig(
        block_hash=f"{_BLOCK}-0",
        block_height=0,
        public_key=KEY,
        r_target=2.0 if form == "distances" else None,
        batch_size=options.batch_size,
        seq_len=options.seq_len,
        proof=form,
    )


def measure(options: argparse.Namespace, log: Callable[[str], None] = _log) -> dict[str, Any]:
    """Return the results of a run: see bench/README.md.

    Raises:
        OSError, ValueError: the model cannot be loaded, or the forms cannot be computed with it.
    """
    sizes = Sizes(options.nonces, options.others, options.reads, options.choices, options.fewer, options.other_batch)
    model, _ = load_model(options.model, options.device, options.dtype)
    engine = _engine(model)
    found = conditions(engine.device)  # before the run makes load
    began = time.monotonic()
    studies = {}
    for form in options.forms:
        studies[form] = Study(engine, _config(form, options), final_norm(model), sizes, log)
        studies[form].guess()
        studies[form].judge_forward(
            f"batch of {sizes.other_batch} rows instead of {options.batch_size}", NOISE, 1, batch_size=sizes.other_batch
        )
    for precision in PRECISIONS:
        rounded = _engine(rounded_copy(model, precision))
        for study in studies.values():
            study.judge_forward(precision, PRECISION, None, engine=rounded)
        del rounded
    other_dtype = "float32" if engine.dtype != torch.float32 else "bfloat16"
    other = _engine(load_model(options.model, options.device, other_dtype)[0])
    for study in studies.values():
        name = f"{other_dtype} instead of {str(engine.dtype).removeprefix('torch.')}"
        study.judge_forward(name, NOISE, 1, engine=other)
    of_form: dict[str, dict[str, Any]] = {form: {} for form in studies}
    blocks = [f"{_BLOCK}-{number}" for number in range(1, options.blocks + 1)]
    if "distances" in studies and options.blocks:
        log(f"distances: {options.blocks} blocks")
        distances, states = blocks_of(engine, _config("distances", options), blocks, range(options.block_nonces))
        other_block = states[0][:8].float().mean(0).expand(sizes.nonces, 1, -1)
        studies["distances"].judge_states("mean of 8 nonces of another block", FREE, 0, other_block)
        of_form["distances"]["geometry"] = of_blocks(distances, engine.vocab_size)
    if VECTORS.name in studies and options.blocks:
        log(f"{VECTORS.name}: {options.blocks} blocks")
        of_form[VECTORS.name]["over_blocks"] = over_blocks(
            engine,
            _config(VECTORS.name, options),
            blocks,
            nonces=options.block_nonces,
            reads=sizes.reads,
            choices=sizes.choices,
        )
    return {
        **found,
        "model": {
            "name": model_name(options.model),
            "layers": engine.layers,
            "hidden_size": engine.hidden_size,
            "vocab_size": engine.vocab_size,
            "dtype": str(engine.dtype).removeprefix("torch."),
        },
        "seconds": time.monotonic() - began,
        "plan": {name: getattr(options, name) for name in _PLANNED},
        "gates": list(figures.GATES),
        "forms": {form: {**study.figures(), **of_form[form]} for form, study in studies.items()},
    }


_PLANNED = (
    "batch_size", "seq_len", "nonces", "others", "reads", "choices", "fewer", "other_batch", "blocks", "block_nonces",
)  # fmt: skip


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a run."""
    add = parser.add_argument
    add("--model", required=True, help="directory, or id on the Hugging Face hub, of a causal language model")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"], help="of the model that is guessed")
    add("--forms", nargs="+", default=[*READERS], choices=[*READERS], help="proof forms to measure")
    add("--threads", type=int, help="threads of torch on a CPU; all cores by default")
    add("--seq-len", type=int, default=64, help="positions of an input")
    add("--batch-size", type=int, default=32, help="rows of a forward; nonces and others fill whole batches")
    add("--nonces", type=int, default=64, help="nonces that are guessed")
    add("--others", type=int, default=64, help="nonces whose forwards a prover knows")
    add("--reads", type=int, default=8, help="reads of each nonce's states, under as many keys")
    add("--choices", type=int, default=50, help="reads of which the easiest are chosen")
    add("--fewer", type=int, default=32, help="nonces of each guess that needs a forward of its own")
    add("--other-batch", type=int, default=5, help="rows of the forwards of another shape")
    add("--blocks", type=int, default=24, help="blocks for distances' geometry and vectors' guesses; 0 for none")
    add("--block-nonces", type=int, default=32, help="nonces of each block")
