"""What computes proofs: one folder per serving stack."""
