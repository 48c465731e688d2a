"""Interference: what validating proofs costs users who are served by the same device, and what it leaves to proofs."""
