"""What import-linter and ruff cannot check: sizes, import cycles, packages without torch, one README per package."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAUNCHER = ROOT / "launcher" / "lmscale_launcher"
SOURCES = sorted([*ROOT.glob("lmscale/**/*.py"), *LAUNCHER.glob("**/*.py")])
PACKAGES = sorted(
    path.parent for path in [*ROOT.glob("lmscale/*/__init__.py"), LAUNCHER / "__init__.py"]
)
TORCH_FREE = ["base", "tokenizer", "modelspec", "config", "corpus", "run_folder", "checks"]
MAX_LINES_PER_FILE, MAX_LINES_PER_FUNCTION = 500, 80


def module_of(path: Path) -> str:
    """The dotted name of a source file."""
    root = ROOT / "launcher" if LAUNCHER in path.parents else ROOT
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in SOURCES}


def run_python(*argv: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *argv], cwd=cwd, capture_output=True, text=True, check=False
    )


def imported_modules(*argv: str, cwd: Path) -> tuple[set[str], subprocess.CompletedProcess[str]]:
    """All modules that a Python command imports, and how the command ended."""
    done = run_python("-X", "importtime", *argv, cwd=cwd)
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return {line.rsplit("|", 1)[-1].strip() for line in lines}, done


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_can_be_read_in_one_sitting(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    count = text.count("\n")
    assert count <= MAX_LINES_PER_FILE, f"{count} lines: split the module by what it describes"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= MAX_LINES_PER_FUNCTION, f"{node.name} has {length} lines"


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_package_has_a_readme(package: Path) -> None:
    assert (package / "README.md").read_text(encoding="utf-8").strip()


@pytest.mark.parametrize("folder", ["configs", "cluster", "tools", "tests"])
def test_folders_beside_the_code_have_a_readme(folder: str) -> None:
    assert (ROOT / folder / "README.md").read_text(encoding="utf-8").strip()


def imports_of(path: Path) -> Iterator[str]:
    """Modules of the project that a file imports anywhere, functions included, except for type checking only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and id(node) not in for_types:
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                if submodule in MODULES:
                    yield submodule
                elif node.module in MODULES:
                    yield node.module


def test_no_modules_import_each_other_not_even_lazily() -> None:
    """A cycle of imports inside of functions works by luck of the order in which they are called."""
    graph = {module: set(imports_of(path)) for module, path in MODULES.items()}
    removed = True
    while removed:  # remove what is in no cycle: modules that import none of the rest
        removed = False
        for module in [name for name, imports in graph.items() if not imports & graph.keys()]:
            del graph[module]
            removed = True
    # What remains are cycles and the modules that lead into them; importers outside of cycles are not named.
    imported = {name for imports in graph.values() for name in imports}
    cycle = sorted(
        f"{name} -> {', '.join(sorted(imports & graph.keys()))}"
        for name, imports in graph.items()
        if name in imported
    )
    assert not cycle, "these modules import each other:\n" + "\n".join(cycle)


def test_the_torch_free_layers_never_load_torch() -> None:
    modules = ["lmscale_launcher"] + [
        module_of(path)
        for package in TORCH_FREE
        for path in sorted((ROOT / "lmscale" / package).glob("*.py"))
    ]
    code = f"import sys, {', '.join(modules)}; sys.exit('torch' in sys.modules)"
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr or "torch was imported"


def test_help_loads_only_what_it_shows(tmp_path: Path) -> None:
    """Seconds depend on the machine; what costs them is what is imported. docs/benchmarks.md has the seconds."""
    loaded, done = imported_modules("-m", "lmscale", "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert "train" in done.stdout
    assert not loaded & {"torch", "numpy", "pydantic", "tokenizers", "yaml", "ruamel", "psutil"}
    assert len([name for name in loaded if name.startswith(("lmscale", "lmscale_launcher"))]) < 20


def test_a_config_error_loads_neither_torch_nor_numpy(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model: llama-1b\noptim: {lrr: 1e-3}\n")
    argv = ("-m", "lmscale", "train", str(tmp_path / "run.yaml"))
    loaded, done = imported_modules(*argv, cwd=tmp_path)
    assert done.returncode == 78, done.stderr[-400:]
    assert "optim.lrr" in done.stderr
    assert not loaded & {"numpy", "torch", "tokenizers"}


def test_only_one_file_imports_deepspeed() -> None:
    importers = [
        path
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (
            isinstance(node, ast.Import) and any(n.name.startswith("deepspeed") for n in node.names)
        )
        or (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("deepspeed"))
    ]
    assert {os.fspath(path.relative_to(ROOT)) for path in importers} == {
        "lmscale/engine/deepspeed/setup.py"
    }


def test_the_model_never_sees_a_process_group() -> None:
    for path in sorted((ROOT / "lmscale" / "model").glob("*.py")):
        assert "torch.distributed" not in path.read_text(encoding="utf-8"), path
