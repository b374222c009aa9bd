"""The peers' environments: made once under build/peers-venv, from lists with every version."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
FOLDER = HERE.parents[1] / "build" / "peers-venv"


def python_of(venv: str) -> str:
    """The interpreter of an environment; makes it where it is missing or its list has changed. Minutes, once.

    Two, because litgpt wants a huggingface-hub that is too old for transformers; and none of them is lmscale's,
    which shall not get a dependency for the sake of a benchmark.
    """
    if not venv:
        return sys.executable
    wanted, folder = HERE / f"{venv}.txt", FOLDER / venv
    digest = hashlib.sha256(wanted.read_bytes()).hexdigest()
    mark = folder / ".ready"
    if not mark.exists() or mark.read_text() != digest:
        print(f"making {folder} from {wanted.name}", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        install = [folder / "bin" / "pip", "install", "--quiet", "-r", wanted]
        subprocess.run(
            install, check=True, env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        )
        mark.write_text(digest)
    return str(folder / "bin" / "python")
