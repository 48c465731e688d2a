"""One proof form of one model: its true states, every guess of them, and how far each is from the truth."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.soundness import figures
from bench.soundness.figures import GATES, Array
from bench.soundness.forwards import Carried, Compute, Subject, honest, know, last_positions, without_layers
from bench.soundness.geometry import likeness
from bench.soundness.readers import READERS, Prepared, Read, Row
from poc_kernels.protocol import PoCConfig
from poc_kernels.protocol.distances.distance import FARTHEST
from poc_kernels.protocol.engine import Engine

FREE, PARTIAL, PRECISION, NOISE = "free", "partial", "precision", "noise"
MEAN, CARRIED = "mean of other nonces", "inputs carried through the transforms, and mean changes"
CHOSEN = 0.05
"""Of reads, the part that a prover chooses who may leave nonces out."""


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        nonces: that are guessed.
        others: that a prover knows the forwards of.
        reads: how often the states of each nonce are read, under as many keys.
        choices: reads from which the easiest are chosen.
        fewer: nonces of guesses that need a forward of their own.
        other_batch: rows of the forwards of another shape.
    """

    nonces: int = 64
    others: int = 64
    reads: int = 8
    choices: int = 50
    fewer: int = 32
    other_batch: int = 5


@dataclass(frozen=True)
class Guess:
    """What was seen of one guess.

    Attributes:
        name, kind: what it is.
        cost: share of the forward's compute, by layers and positions; None where it is not counted so.
        errors: L2 of artifacts from the true ones; of distances, what was guessed. [reads, nonces]
        cosines: of what the form reads, with the true one, [reads, nonces].
        doubt: where a prover chooses, how little it relies on each read, [reads, nonces].
        found: of distances, what they say of the true ones.
    """

    name: str
    kind: str
    cost: float | None
    errors: Array
    cosines: Array | None = None
    doubt: Array | None = None
    found: dict[str, Any] | None = None

    def figures(self, gates: Sequence[float]) -> dict[str, Any]:
        """Return what the result file has of it."""
        reads, nonces = self.errors.shape
        row: dict[str, Any] = {
            "name": self.name,
            "kind": self.kind,
            "cost": self.cost,
            "nonces": nonces,
            "reads": reads,
        }
        if self.cosines is not None:
            row["cosine"] = figures.mean(self.cosines)
        if self.found is not None:
            return row | self.found
        if self.doubt is not None:
            return row | figures.chosen_first(self.errors, self.doubt, CHOSEN, gates)
        return row | figures.of_artifacts(self.errors, gates)


class Study:
    """Guesses of one form's proofs, each compared with the truth.

    Args:
        engine: of the model.
        config: a round of the form. Its batch_size divides the numbers of nonces.
        norm: the model's final norm.
        sizes: how much is measured.
        log: called with a line of progress.

    Raises:
        RuntimeError: what is read of the true states is not what the form's prover gives.
    """

    def __init__(
        self,
        engine: Engine,
        config: PoCConfig,
        norm: Callable[[Tensor], Tensor],
        sizes: Sizes,
        log: Callable[[str], None],
    ) -> None:
        self.engine, self.config, self.sizes, self._log = engine, config, sizes, log
        self._guesses: list[Guess] = []
        self._reader = READERS[config.proof](config, engine)
        self._subject = Subject(engine, config)
        self._nonces = list(range(sizes.nonces))
        self._drawn: dict[int, list[Any]] = {}
        self._true: dict[int, list[Read]] = {}
        self._known = know(self._subject, range(sizes.nonces, sizes.nonces + sizes.others))
        layers = engine.layers
        self._left_out = sorted({max(1, round(part * layers)) for part in (0, 0.1, 0.23)})
        marks = sorted({0, layers // 2, *(layers - count for count in self._left_out)})
        carried = Carried(self._known, norm, marks)
        seen = self._subject.see(self._nonces, carried)
        self._states = seen.states
        self._prepared = self._reader.prepare(engine, self._states[:, self._reader.positions])
        if self._truth(sizes.nonces)[0].outcomes != seen.outcomes:
            raise RuntimeError(f"{config.proof}: what is read of the states is not what the prover gives")
        self._log(f"{config.proof}: truth")
        self._carried = {mark: torch.cat(states)[: sizes.nonces] for mark, states in carried.states.items()}

    @torch.inference_mode()
    def guess(self) -> None:
        """Judge all guesses that the model itself gives."""
        layers, seq_len, last = self.engine.layers, self.config.seq_len, self._reader.positions == slice(-1, None)
        few = self._known.few.expand(self.sizes.nonces, -1, -1)
        mean = self._known.mean.expand(self.sizes.nonces, -1, -1)
        self.judge_states("mean of 8 other nonces", FREE, 0, few)
        self.judge_states(f"{MEAN}, {self.sizes.others}", FREE, 0, mean)
        for mark, states in self._carried.items():
            name = f"first {mark} of {layers} layers, then the transforms and mean changes" if mark else CARRIED
            self.judge_states(name, PARTIAL if mark else FREE, mark / layers, states)
        for count in self._left_out:
            start = (layers - count) // 2
            name = f"without {count} of {layers} layers in the middle, with their transforms and mean changes"
            compute = without_layers(self._known, range(start, start + count))
            self.judge_forward(name, PARTIAL, 1 - count / layers, compute)
        if last:
            for count in (seq_len // 4, seq_len // 2):
                self.judge_forward(
                    f"last {count} of {seq_len} positions", PARTIAL, count / seq_len, last_positions(count)
                )
        else:
            for part in (0.5, 0.75, 0.9, 0.95):
                count = round(part * seq_len)
                states = self._states.clone()
                states[:, count:] = self._known.mean[count:].to(states.dtype)
                self.judge_states(f"first {count} of {seq_len} positions, then means", PARTIAL, count / seq_len, states)
        if self.config.proof != "distances":
            self._choose({f"{MEAN}, {self.sizes.others}": mean, CARRIED: self._carried[0]})

    @torch.inference_mode()
    def judge_forward(
        self,
        name: str,
        kind: str,
        cost: float | None,
        compute: Compute = honest,
        engine: Engine | None = None,
        batch_size: int | None = None,
    ) -> None:
        """Judge what a forward gives that is not the round's: another computation, engine or batch."""
        config = dataclasses.replace(self.config, batch_size=batch_size or self.config.batch_size)
        count = self.sizes.nonces if kind == NOISE and self._counts_noise else self.sizes.fewer
        subject = Subject(engine or self.engine, config)
        positions = self._reader.positions
        seen = subject.see(self._nonces[:count], compute, positions)
        self._judge(name, kind, cost, self._reader.prepare(subject.engine, seen.states))

    @property
    def _counts_noise(self) -> bool:
        """Whether noise is measured with all nonces: it decides the gate of the form that the project proposes."""
        return self.config.proof == "fingerprint"

    def figures(self) -> dict[str, Any]:
        """Return the figures of the form, as the result file has them."""
        result: dict[str, Any] = {"likeness": likeness(self._known.states)}
        gates = [*GATES]
        if self.config.proof != "distances":
            noise, precision = (
                [each.errors for each in self._guesses if each.kind == kind] for kind in (NOISE, PRECISION)
            )
            result["advice"] = figures.advice(noise, precision, self.config.fraud_threshold)
            gates = sorted({*GATES, result["advice"]["gate"]})
        result["guesses"] = [each.figures(gates) for each in self._guesses]
        return result

    def _reads(self, count: int) -> list[Any]:
        """Return what is drawn for each read of the first nonces: the first is the prover's own."""
        if count not in self._drawn:
            keys = [self.config.public_key, *(f"{self.config.public_key}-{n}" for n in range(1, self.sizes.reads))]
            self._drawn[count] = [self._reader.draw(_rows(key, self._nonces[:count])) for key in keys]
        return self._drawn[count]

    def _truth(self, count: int) -> list[Read]:
        if count not in self._true:
            prepared = self._prepared.first(count)
            self._true[count] = [self._reader.read(drawn, prepared) for drawn in self._reads(count)]
        return self._true[count]

    @torch.inference_mode()
    def judge_states(self, name: str, kind: str, cost: float | None, states: Tensor) -> None:
        """Judge hidden states [nonces, positions, hidden_size]; forms that read the last position take it alone."""
        states = states[:, self._reader.positions].to(self.engine.dtype)
        self._judge(name, kind, cost, self._reader.prepare(self.engine, states))

    def _judge(self, name: str, kind: str, cost: float | None, prepared: Prepared) -> None:
        count = len(prepared.hidden)
        truth = self._truth(count)
        guessed = [self._reader.read(drawn, prepared) for drawn in self._reads(count)]
        cosines = np.stack([_cosines(a.direction, b.direction) for a, b in zip(guessed, truth, strict=True)])
        if self.config.proof == "distances":
            values = [np.stack([read.values[:, 0] for read in reads]) for reads in (guessed, truth)]
            found = figures.of_distances(*values)
            self._guesses.append(Guess(name, kind, cost, values[0], cosines, found=found))
            self._log(f"distances: {name}: correlation {found['correlation']['value']:.2f}")
        else:
            errors = np.stack([apart(a, b) for a, b in zip(guessed, truth, strict=True)])
            self._guesses.append(Guess(name, kind, cost, errors, cosines))
            self._log(f"{self.config.proof}: {name}: L2 {np.median(errors):.3f}")

    def _choose(self, guesses: Mapping[str, Tensor]) -> None:
        """Judge, of many reads of each guess, those that are least in doubt."""
        prepared = {
            name: self._reader.prepare(self.engine, states[:, self._reader.positions].to(self.engine.dtype))
            for name, states in guesses.items()
        }
        errors: dict[str, list[Array]] = {name: [] for name in guesses}
        doubts: dict[str, list[Array]] = {name: [] for name in guesses}
        for place in range(self.sizes.choices):
            drawn = self._reader.draw(_rows(f"{self.config.public_key}-choice-{place}", self._nonces))
            truth = self._reader.read(drawn, self._prepared)
            for name, guess in prepared.items():
                guessed = self._reader.read(drawn, guess)
                errors[name].append(apart(guessed, truth))
                doubts[name].append(self._reader.doubt(drawn, guessed, self._known.spread))
        for name in guesses:
            chosen = f"{name}, best {CHOSEN:.0%} of reads"
            self._guesses.append(Guess(chosen, FREE, 0, np.stack(errors[name]), doubt=np.stack(doubts[name])))


def _rows(key: str, nonces: Sequence[int]) -> list[Row]:
    return [Row(key, nonce) for nonce in nonces]


def _cosines(a: Tensor, b: Tensor) -> Array:
    return torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=-1).cpu().numpy()


def apart(a: Read, b: Read) -> Array:
    """Return the L2 distances of artifacts [nonces], the largest that there is where one of them is none."""
    errors = np.linalg.norm(a.values - b.values, axis=1).astype(np.float64)
    return np.where(np.isnan(errors), FARTHEST, errors)
