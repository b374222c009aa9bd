"""lmscale: train language models so that the result can be trusted."""

__version__ = "0.1.0"
