"""Results of a demonstration, for the tests of its table and its report."""

from __future__ import annotations

from poc_kernels.demo.results import Band, Callback, Chat, Check, Claim, Judged, Results, Sample


def chat(state: str, began: float, gap: float = 0.01) -> Chat:
    """A served chat of three pieces, the first after twice the gap."""
    arrivals = (began + 2 * gap, began + 3 * gap, began + 4 * gap)
    return Chat(state, began, arrivals[-1], arrivals, "some text")


def results(**changes: object) -> Results:
    """A small, complete demonstration in which all checks passed."""
    block = "0x0000000000000000000263f1c9e3a7d5"
    values: dict[str, object] = {
        "about": {"model": "tiny", "round": f"forwards of 16 nonces, block {block}", "software": "poc_kernels 0.1.0"},
        "vocab_size": 2048,
        "r_target": 1.401,
        "expected_share": 0.2,
        "retained_bytes": 8,
        "stored_bytes": 2 * 256 * 256 * 4,
        "dist_threshold": 0.3,
        "noise": [0.1, 0.21],
        "fingerprints": 640,
        "judged": [
            Judged(Claim("honest, in bfloat16", "nothing", ("a", "b"), honest=True), (0.1, 0.2), 0, 1.0, False),
            Judged(Claim("4-bit weights", "memory", ("c", None)), (1.1, float("nan")), 2, 1e-4, True),
        ],
        "checked": 1000,
        "valid": 210,
        "checks": [
            Check("honest proofs are accepted", True, "3 batches"),
            Check("distances recomputed while users are served are bit-identical to the proofs", True),
            Check(
                "a batch with another block hash is refused with 400", True, f"must be the round's, '{block}', got ''"
            ),
        ],
        "chats": [
            chat("warm-up", 0.0, 0.5),
            chat("IDLE", 0.5),
            chat("IDLE", 1.0),
            Chat("GENERATING", 3.0, 3.1, status=503, retry_after="10", error="come back later"),
            chat("VALIDATING", 5.0, 0.05),
            chat("STOPPED", 6.5),
        ],
        "callbacks": [
            Callback(4.0, "/generated", 503, True, block, "key", (1, 2, 3), None),
            Callback(4.2, "/generated", 200, True, block, "key", (1, 2, 3), None),
            Callback(5.0, "/validated", 200, True, block, "key", (1, 2), False),
        ],
        "bands": [
            Band("IDLE", 0.0, 2.0),
            Band("GENERATING", 2.0, 4.5),
            Band("VALIDATING", 4.5, 6.0),
            Band("STOPPED", 6.0, 7.0),
        ],
        "samples": [
            Sample(2.0),
            Sample(2.0, 0, 0, 0),
            Sample(4.0, 1000, 210),
            Sample(4.5),
            Sample(4.5, 0, 0, 0),
            Sample(5.0, recomputed=120),
            Sample(6.0, recomputed=370),
        ],
        "survey": [1.38, 1.39, 1.4, 1.41, 1.42, 1.43, 1.44],
        "parts": {"inputs": 0.1, "projection": 0.02, "forward": 1.8, "mix": 0.08},
        "generating_rate": 500.0,
        "validating_rate": 250.0,
    }
    return Results(**{**values, **changes})  # type: ignore[arg-type]
