"""The run folder: attempts and their fence, checkpoints, events, liveness, status."""
