"""Checkpoints that know neither engine nor topology: save, load, retain."""
