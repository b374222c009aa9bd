"""An installed wheel, outside its checkout, trains: configs and templates are inside."""

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from lmscale.config.yaml import render
from tests.support.jobs import clean_env, small_run

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment that has the wheel, and of the tests' own environment only the dependencies.

    A path file names that environment's packages; path files inside it, the editable install's
    among them, are not followed, so the checkout is out of reach.
    """
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(ROOT)]
    subprocess.run(build, check=True, timeout=120)
    wheel = next(folder.glob("lmscale-*.whl"))
    venv.create(folder / "env", with_pip=False)
    python = folder / "env" / "bin" / "python"
    site = next((folder / "env" / "lib").glob("python*/site-packages"))
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    install = [*pip, f"--python={python}", "install", "--no-deps", "--ignore-installed", str(wheel)]
    subprocess.run(install, check=True, timeout=120)
    where = subprocess.run(
        [python, "-c", "import lmscale; print(lmscale.__file__)"], cwd=folder,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert where.stdout.startswith(str(site))
    return folder / "env" / "bin"


def run(installed: Path, *argv: str, cwd: Path) -> str:
    done = subprocess.run(
        [installed / "lmscale", *argv], cwd=cwd, env=clean_env(), timeout=120,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_wheel_trains_and_knows_the_shipped_configs(
    installed: Path, corpus: Path, tmp_path: Path
) -> None:
    run_file = small_run(corpus, train={"steps": 6})
    run_file["model"] = "smoke"
    (tmp_path / "mine.yaml").write_text(render(run_file))
    said = run(installed, "train", "mine.yaml", cwd=tmp_path)
    assert "finished 6 steps" in said
    assert (tmp_path / "runs" / "mine" / "report.html").exists()
    planned = run(
        installed, "plan", "smoke", f"data.corpora={corpus}", "train.seq_len=32", cwd=tmp_path
    )
    assert "steps" in planned
