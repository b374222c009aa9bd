"""The language model, written for one device: architecture, attention, loss, initial values."""
