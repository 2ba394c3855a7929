"""The way to routers and workers: placements and their leases, and one stream to each process."""
