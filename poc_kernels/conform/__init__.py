"""Whether an endpoint speaks the network's wire: plays the chain's node and a validator against it, check by check.

The checks are written from what is published of the wire, and not from the service of this package, which is one of the
implementations that they judge.
"""
