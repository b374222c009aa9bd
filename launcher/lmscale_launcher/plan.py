"""`lmscale plan RUN.yaml`: print what a run will do, or which sample each step reads from where."""

import os
import sys
from collections.abc import Sequence

from lmscale.config.run_file import load
from lmscale_launcher.jobs.job_plan import unstaged
from lmscale_launcher.planner.data_plan import data_rows, row_text
from lmscale_launcher.planner.facts import build_plan
from lmscale_launcher.planner.plan_text import as_json as to_json
from lmscale_launcher.planner.plan_text import plan_lines


def plan_verb(
    source: str, overrides: Sequence[str], *, data: bool, steps: str | None, as_json: bool
) -> None:
    """Print the plan, or with `data` one line per sample of `steps`. Raises ConfigError."""
    cfg, env = load(source, overrides), dict(os.environ)
    if data:
        show = to_json if as_json else row_text
        for row in data_rows(cfg, steps, env):
            sys.stdout.write(show(row) + "\n")
        return
    plan = build_plan(cfg, env)
    plan["warnings"] += [{"key": w.path, "fact": w.fact, "hint": w.hint} for w in unstaged(cfg)]
    sys.stdout.write((to_json(plan) if as_json else "\n".join(plan_lines(plan))) + "\n")
