"""A demonstration for any machine: a whole round on a real server, with a validator and users."""
