"""The optimizer and the learning rate of a step."""
