"""kvmesh engines: the `Engine` contract and its implementations, `sglang` and `mock`."""
