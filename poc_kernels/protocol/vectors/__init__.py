"""Proof form 2: the network's vectors, some rotated coordinates of a nonce's last hidden state."""
