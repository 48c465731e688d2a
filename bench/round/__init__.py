"""Batches of a round of proofs, with the random projection and without it."""
