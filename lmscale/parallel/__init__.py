"""Ordered passes over a built model: activation checkpointing, compilation, sharding."""
