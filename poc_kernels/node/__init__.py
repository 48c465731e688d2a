"""A node of our own: one model of transformers, its users and its rounds in one process."""
