"""Proof form 1: the distance of a nonce's permuted logits to the round's target."""
