"""One name has one meaning: no class and no file of the product has a name that another one has too."""

import ast
from collections import defaultdict

from tests.arch.test_layers import SOURCES

# Modules that have the same name in several packages because they have the same meaning there.
SHARED_FILE_NAMES = {
    "__init__.py",
    "__main__.py",
    "base.py",  # what the siblings of a package share
    "build.py",  # from the run file to the package's main object
}


def test_no_class_name_has_two_meanings() -> None:
    places = defaultdict(list)
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(str(path))
    repeated = {name: where for name, where in places.items() if len(where) > 1}
    assert not repeated


def test_no_file_name_has_two_meanings() -> None:
    places = defaultdict(list)
    for path in SOURCES:
        if path.name not in SHARED_FILE_NAMES:
            places[path.name].append(str(path))
    repeated = {name: where for name, where in places.items() if len(where) > 1}
    assert not repeated


def test_no_module_is_a_collection_of_leftovers() -> None:
    refused = {"utils.py", "helpers.py", "common.py", "misc.py", "manager.py", "registry.py"}
    assert not {path.name for path in SOURCES} & refused
