"""The run folder: attempts and their fence, checkpoints, lines, events, restart budget."""
