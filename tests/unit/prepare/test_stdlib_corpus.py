import json
import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).parents[3] / "tools/stdlib_corpus.py"


def test_the_library_is_written_once_in_a_mixed_but_fixed_order(tmp_path: Path) -> None:
    out = tmp_path / "data/stdlib.jsonl"
    first = subprocess.run([sys.executable, TOOL, out], capture_output=True, text=True, check=True)
    written = out.stat().st_mtime_ns
    again = subprocess.run([sys.executable, TOOL, out], capture_output=True, text=True, check=True)
    assert "up to date" not in first.stdout
    assert "up to date" in again.stdout and out.stat().st_mtime_ns == written
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    paths = [row["path"] for row in rows]
    assert {"argparse.py", "json/decoder.py", "email/message.py"} <= set(paths)
    assert not any("site-packages" in path or path.startswith("test/") for path in paths)
    assert 5e6 < sum(len(row["text"].encode()) for row in rows) < 40e6
    # the first tenth holds files of many packages, not those of "a..."
    assert len({path.split("/")[0] for path in paths[: len(paths) // 10]}) > 20
    assert paths != sorted(paths)


def test_wrong_use_is_a_usage_error() -> None:
    done = subprocess.run([sys.executable, TOOL], capture_output=True, text=True, check=False)
    assert (done.returncode, "usage:" in done.stderr) == (2, True)
