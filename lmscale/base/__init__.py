"""The base layer: what every package may use, each thing once. No torch."""
