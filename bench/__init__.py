"""Benchmarks of the installed package, run from the repository's root: ``python -m bench.interference`` and others.

Python puts the folder that it starts in first on its path. There lie the package's sources, which have no native core:
so the root leaves the path, and what is measured is the installed package. A root in PYTHONPATH stays.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1].resolve()

if ROOT not in {Path(entry).resolve() for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry}:
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != ROOT]
