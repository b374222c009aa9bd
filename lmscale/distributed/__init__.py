"""Processes as one machine: process group, mesh, reductions, seeds, device."""
