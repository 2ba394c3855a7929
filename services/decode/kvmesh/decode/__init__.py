"""kvmesh decode."""
