"""kvmesh cli."""
