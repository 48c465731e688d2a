"""How well the nonces of each proof form can be guessed without their forward, and how far honest nodes are apart."""
