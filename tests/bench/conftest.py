"""Lets tests import `bench`, which is not installed."""

import sys
from pathlib import Path

# Last, so that the sources of the package do not hide the installed one.
sys.path.append(str(Path(__file__).parents[2]))
