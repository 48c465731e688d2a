"""The table of proof forms: a further form is a folder, and an entry here."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..scheduling.slices import Pause
from .config import PoCConfig
from .distances.form import DISTANCES
from .distances.prover import Distances
from .engine import LayerTransform
from .fingerprint.form import FINGERPRINT
from .fingerprint.prover import Fingerprints
from .form import ProofForm
from .prover import Outcomes, Row
from .shared_work import SharedWork
from .vectors.form import VECTORS
from .vectors.prover import Vectors


class FormProver(Protocol):
    """Computes proofs of one form on an engine: what `poc_kernels.protocol.EngineProver` calls."""

    def check(self, config: PoCConfig) -> None:
        """Raise a ValueError if the engine cannot prove a round of this configuration."""

    def transforms(self, config: PoCConfig) -> list[LayerTransform | None]:
        """Return what a round's forwards go through after each layer, None for nothing; empty if it is yet to be made.

        An engine knows by it, and by the shape, whether it has captured such a forward.
        """

    def passed(self) -> None:
        """Count a forward of another form: what is kept for this one from forward to forward may be given back."""

    def release(self) -> None:
        """Give back the memory that is kept from forward to forward. No bit changes."""

    def prove(self, config: PoCConfig, rows: Sequence[Row], pause: Pause) -> Outcomes:
        """Compute the outcomes of one forward: see `Prover.prove`."""


@dataclass(frozen=True)
class FormEntry:
    """A proof form with what proves it and what tells it.

    Attributes:
        form: what a round knows of it.
        prover: makes what proves it on an engine.
        wire: module that has its bodies in the older wire of HTTP; None for a form that this wire does not know. It
            needs pydantic, which a round alone does not.
    """

    form: ProofForm
    prover: Callable[[SharedWork], FormProver]
    wire: str | None = None

    def load_wire(self) -> Any:
        """Import and return the module that ``wire`` names, or None."""
        return None if self.wire is None else importlib.import_module(self.wire, __package__)


FORMS: Mapping[str, FormEntry] = {
    entry.form.name: entry
    for entry in (
        FormEntry(DISTANCES, Distances, ".distances.wire"),
        FormEntry(VECTORS, Vectors),
        FormEntry(FINGERPRINT, Fingerprints),
    )
}
"""By the name that `PoCConfig.proof` has; the first is the default."""
