"""A whole round, played against a real server by a validator and its users, on any machine."""
