"""`lmscale plan RUN.yaml`: what a run will be. Its parts stand in launcher/planning."""

from launcher.planning.data import data_rows, row_in_words
from launcher.planning.facts import facts
from launcher.planning.words import as_json, in_words

__all__ = ["as_json", "data_rows", "facts", "in_words", "row_in_words"]
