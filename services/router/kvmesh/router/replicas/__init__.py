"""Replicas of the router: each tells the others of its leases, so that all decide on the same load."""
