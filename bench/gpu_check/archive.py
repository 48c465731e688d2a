"""One file of all results: what comes back from a machine that returns only a few."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path


def pack(folder: Path, archive: Path) -> None:
    """Write everything in ``folder`` to ``archive``, a .tgz, in one step: whoever reads it finds a whole one."""
    partial = archive.with_suffix(".partial")
    with tarfile.open(partial, "w:gz") as file:
        file.add(folder, arcname=archive.stem)
    os.replace(partial, archive)
