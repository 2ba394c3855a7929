"""kvmesh frontend."""
