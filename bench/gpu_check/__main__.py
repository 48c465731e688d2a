"""``python -m bench.gpu_check OUT``, as ``make gpu-check`` runs it once the package is installed."""

import sys

from bench.gpu_check.run import main

sys.exit(main())
