"""``python -m bench.interference OUT.json``; then ``python -m bench.interference.report OUT.json``."""

import sys

from bench.interference.run import main

sys.exit(main())
