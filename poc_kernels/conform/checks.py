"""All checks, in the order in which they are played."""

from . import callbacks, determinism, requests, rounds, verdicts

CHECKS = (*rounds.CHECKS, *requests.CHECKS, *determinism.CHECKS, *verdicts.CHECKS, *callbacks.CHECKS)
