"""The README's run file is a real one."""

import re
from pathlib import Path

from lmscale.config.run_file import load

README = Path(__file__).parents[3] / "README.md"


def test_the_run_file_of_the_readme_loads(tmp_path: Path) -> None:
    blocks = re.findall(r"(?:^    \S.*\n)+", README.read_text(encoding="utf-8"), re.MULTILINE)
    [text] = [block for block in blocks if block.lstrip().startswith("model:")]
    (tmp_path / "run.yaml").write_text(re.sub("^    ", "", text, flags=re.MULTILINE))
    cfg = load(tmp_path / "run.yaml", cwd=tmp_path)
    assert cfg.train.tokens == 20_000_000_000
    assert cfg.model.num_layers > 1
