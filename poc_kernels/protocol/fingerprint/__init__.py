"""Proof form 3: fingerprints, hard to guess: a mix of all positions of a forward with seeded sign flips."""
