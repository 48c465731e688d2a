"""``python -m poc_kernels`` is the ``poc-kernels`` command."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
