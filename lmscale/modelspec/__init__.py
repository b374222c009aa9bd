"""The torch-free description of an architecture: parameters, activations and FLOPs."""
