"""A round as a service: routes, gate, queue, worker, callbacks and metrics, around whatever computes proofs."""
