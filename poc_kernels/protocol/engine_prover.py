"""Proofs of every form on one engine in this process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..scheduling.slices import Pause, Slices
from .config import PoCConfig
from .distances.form import DISTANCES
from .engine import Engine, LayerTransform, never
from .form import ProofForm, form_of
from .forms import FORMS, FormProver
from .limits import NO_BOUNDS, Bounds
from .prover import Outcomes, Row
from .shared_work import SharedWork


class EngineProver:
    """Computes proofs of every form on an engine in this process: a `Prover`.

    Every forward has the round's shape, [batch_size, seq_len]: fewer rows are filled up with some that are thrown away.
    So an outcome depends neither on its place in a forward nor on its neighbours, whatever nodes they are of.

    Args:
        engine: the model that serves users.
        slice_seconds: how long to compute between two pauses, outside the engine's forward.
        bounds: on what the rows of a forward take.

    Raises:
        ValueError: the engine's hidden size is not one that projections take, or slice_seconds is not positive.
    """

    forms: Mapping[str, ProofForm] = {name: entry.form for name, entry in FORMS.items()}

    def __init__(self, engine: Engine, *, slice_seconds: float = 0.002, bounds: Bounds = NO_BOUNDS) -> None:
        self.engine = engine
        self.work = SharedWork(engine, slice_seconds=slice_seconds, bounds=bounds)
        self._provers: Mapping[str, FormProver] = {name: FORMS[name].prover(self.work) for name in self.forms}

    @property
    def slices(self) -> Slices | None:
        """The slices of the engine's forward; None until they are measured."""
        return self.engine.slices

    def check(self, config: PoCConfig) -> None:
        """Raise a ValueError if there is no such form, or the round does not fit it or the engine."""
        form_of(config, self.forms)
        self._provers[config.proof].check(config)

    def prove(
        self, config: PoCConfig, rows: Sequence[Row], pause: Pause = never, then: Sequence[Sequence[Row]] = ()
    ) -> Outcomes:
        """Compute the outcomes of 1 to batch_size rows, and nothing of ``then``: see `Prover.prove`."""
        for name, prover in self._provers.items():
            if name != config.proof:
                prover.passed()
        return self._provers[config.proof].prove(config, rows, pause)

    def transforms(self, config: PoCConfig) -> list[LayerTransform | None]:
        """Return what a round's forwards go through after each layer: see `FormProver.transforms`."""
        return self._provers[config.proof].transforms(config)

    def release(self) -> None:
        """Give back the memory that is kept from forward to forward, between two of them. No bit changes."""
        for prover in self._provers.values():
            prover.release()

    def compile_kernels(self) -> None:
        """Have a GPU's kernels for rounds checked and compiled: see `SharedWork.compile_kernels`."""
        self.work.compile_kernels()

    def measure_slices(self) -> None:
        """Measure and capture a GPU's forward of a round's default shape: see `SharedWork.measure_slices`."""
        self.work.measure_slices()


class DistanceProver(EngineProver):
    """An `EngineProver` of distances alone."""

    forms: Mapping[str, ProofForm] = {DISTANCES.name: DISTANCES}
