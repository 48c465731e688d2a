"""Results of a demonstration, for the tests of its table and its report."""

from __future__ import annotations

from poc_kernels.demo.results import Band, Callback, Chat, Check, Results, Sample


def chat(state: str, began: float, gap: float = 0.01) -> Chat:
    """A served chat of three pieces, the first after twice the gap."""
    arrivals = (began + 2 * gap, began + 3 * gap, began + 4 * gap)
    return Chat(state, began, arrivals[-1], arrivals, "some text")


def results(**changes: object) -> Results:
    """A small, complete demonstration in which all checks passed."""
    values: dict[str, object] = {
        "about": {"model": "tiny", "device": "cpu"},
        "vocab_size": 2048,
        "r_target": 1.401,
        "expected_share": 0.2,
        "retained_bytes": 8,
        "stored_bytes": 2 * 256 * 256 * 4,
        "checks": [Check("honest proofs are accepted", True, "3 batches")],
        "chats": [
            chat("IDLE", 0.0),
            chat("IDLE", 1.0),
            Chat("GENERATING", 3.0, 3.1, status=503, retry_after="10", error="come back later"),
            chat("VALIDATING", 5.0, 0.05),
        ],
        "callbacks": [Callback(4.0, "/generated", 200, True, "0xabc", "key", (1, 2, 3), None)],
        "bands": [Band("IDLE", 0.0, 2.0), Band("GENERATING", 2.0, 4.5), Band("VALIDATING", 4.5, 6.0)],
        "samples": [Sample(2.0, 0, 0), Sample(4.0, 1000, 210)],
        "survey": [1.38, 1.39, 1.4, 1.41, 1.42, 1.43, 1.44],
        "parts": {"inputs": 0.1, "projection": 0.02, "forward": 1.8, "distance": 0.08},
        "generating_rate": 500.0,
        "validating_rate": 250.0,
    }
    return Results(**{**values, **changes})  # type: ignore[arg-type]
