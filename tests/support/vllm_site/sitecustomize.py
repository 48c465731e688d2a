"""Processes of vLLM that wait for each other leave the cores to others.

They poll and call `os.sched_yield` meanwhile. Under Linux 6.18, on 2 cores, that kept another process, which slept for
10 ms at a time, from a core for up to 18 s; with this, which vLLM itself does on older releases of Python, never for
0.1 s.
"""

import os
import time

os.sched_yield = lambda: time.sleep(0)
