"""Proof form 3: fingerprints, which cannot be guessed: a mix of all positions of a forward with seeded sign flips."""
