"""kvmesh prefill."""
