"""Reports, at the end of a run, a gradient table of older code; `make release-check` fails on it."""

import pytest

from tests.gradients.provenance import outdated_lines


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    outdated, lines = outdated_lines()
    if outdated or not lines:
        terminalreporter.write_sep("-", "gradient table")
        terminalreporter.write_line(
            f"docs/gradients.jsonl: {outdated} of {lines} lines were measured on other code. "
            "Before a release run `make matrix`, then `make release-check`."
        )
