"""`lmscale plan RUN.yaml`: what a run will be. Its parts stand in launcher/lmscale_launcher/planner."""

from lmscale_launcher.planner.data_plan import data_rows, row_in_words
from lmscale_launcher.planner.facts import facts
from lmscale_launcher.planner.plan_text import as_json, in_words

__all__ = ["as_json", "data_rows", "facts", "in_words", "row_in_words"]
