"""The free guess of vectors in many blocks: what their nonces have in common depends on the block's reflections."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from bench.soundness import figures
from bench.soundness.figures import GATES, Array
from bench.soundness.forwards import Subject
from bench.soundness.geometry import likeness
from bench.soundness.readers import READERS, ArtifactReader
from bench.soundness.study import CHOSEN, MEAN, apart
from poc_kernels.protocol import PoCConfig
from poc_kernels.protocol.engine import Engine
from poc_kernels.protocol.prover import Row


@torch.inference_mode()
def over_blocks(
    engine: Engine, config: PoCConfig, blocks: Sequence[str], *, nonces: int, reads: int, choices: int
) -> dict[str, Any]:
    """Guess nonces of each block by the mean of as many others; return what the result file has of it.

    Args:
        engine: of the model.
        config: a round of a form that reads the last position.
        blocks: block hashes.
        nonces: of each block that are guessed, and that are known.
        reads: how often each is read, under as many keys.
        choices: reads of each from which the easiest are chosen.
    """
    names = (MEAN, f"{MEAN}, best {CHOSEN:.0%} of reads")
    shares: dict[str, dict[str, list[float]]] = {name: {f"{gate:.2f}": [] for gate in GATES} for name in names}
    alike = []
    for block_hash in blocks:
        of_block = dataclasses.replace(config, block_hash=block_hash)
        subject, reader = Subject(engine, of_block), READERS[config.proof](of_block, engine)
        states = subject.see(range(2 * nonces), positions=reader.positions).states
        alike.append(likeness(states[:, -1]))
        all_reads = _of_block(engine, of_block, reader, states, reads)
        easiest = _of_block(engine, of_block, reader, states, choices, "-choice")
        for name, (errors, doubt), part in zip(shares, (all_reads, easiest), (1.0, CHOSEN), strict=True):
            taken = figures.least_in_doubt(errors, doubt, part)
            for gate, found in shares[name].items():
                found.append(float((taken <= float(gate)).mean()))
    return {
        "blocks": len(blocks),
        "nonces": nonces,
        "reads": reads,
        "choices": choices,
        "likeness": alike,
        "guesses": {
            name: {gate: figures.of_shares(np.array(found)) for gate, found in of_guess.items()}
            for name, of_guess in shares.items()
        },
    }


def _of_block(
    engine: Engine, config: PoCConfig, reader: ArtifactReader, states: torch.Tensor, reads: int, name: str = ""
) -> tuple[Array, Array]:
    """Return errors and doubts [reads, nonces] of the first half of nonces, guessed by the mean of the others."""
    count = len(states) // 2
    others = states[count:].float()
    true = reader.prepare(engine, states[:count])
    guess = reader.prepare(engine, others.mean(0).to(engine.dtype).expand_as(states[:count]))
    errors, doubts = [], []
    for place in range(reads):
        drawn = reader.draw([Row(f"{config.public_key}{name}-{place}", nonce) for nonce in range(count)])
        guessed = reader.read(drawn, guess)
        errors.append(apart(guessed, reader.read(drawn, true)))
        doubts.append(reader.doubt(drawn, guessed, others[:, -1].var(0)))
    return np.stack(errors), np.stack(doubts)
