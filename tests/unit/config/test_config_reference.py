"""The configuration reference follows the schema."""

from pathlib import Path

import pytest

from lmscale.base.errors import ConfigError
from lmscale.config.identity import kinds
from lmscale.config.reference import key_references, page, reference_text
from lmscale.config.run_file import load
from lmscale.config.yaml import parse

ROOT = Path(__file__).parents[3]
ENTRIES = [entry for _, _, keys in key_references() for entry in keys]


def test_the_page_in_docs_is_current() -> None:
    """Renew it with: python -m lmscale.config.reference > docs/configuration.md."""
    assert (ROOT / "docs" / "configuration.md").read_text() == page()


def test_every_key_has_an_entry_with_a_sentence() -> None:
    documented = {entry.key: entry for entry in ENTRIES}
    assert kinds().keys() <= documented.keys()
    for entry in ENTRIES:
        assert entry.kind in ("identity", "placement")
        assert entry.meaning[0].isupper(), entry.key
        assert entry.meaning.endswith("."), entry.key
        assert entry.type, entry.key


@pytest.mark.parametrize(
    "key", [entry.key for entry in ENTRIES if entry.key in kinds()], ids=lambda key: key
)
def test_examples_and_defaults_are_yaml_that_the_key_accepts(key: str) -> None:
    """Some examples conflict with other keys of the run; then no problem is about the value itself."""
    entry = next(entry for entry in ENTRIES if entry.key == key)
    for value in {entry.example, entry.default} - {"required", "the defaults of its keys"}:
        assert parse(value, name="example").problems == []
        try:
            load("smoke", [f"{key}={value}"])
        except ConfigError as error:
            facts = [problem.fact for problem in error.problems if problem.path.startswith(key)]
            assert not [f for f in facts if "expected" in f or "cannot" in f or "unknown" in f]


def test_the_text_of_a_key_names_default_kind_and_example() -> None:
    text = reference_text("optim.warmup_steps")
    assert text.splitlines()[0] == "optim.warmup_steps"
    assert "default: 0" in text
    assert "kind:    identity" in text
    assert 'example: optim.warmup_steps="5%"' in text


def test_a_section_and_no_key_list_their_keys() -> None:
    assert [line.split("=")[0] for line in reference_text("objective").splitlines()] == [
        "objective.kind"
    ]
    assert len(reference_text().splitlines()) == len(ENTRIES)
    assert "cluster.slurm.partition=null" in reference_text("cluster.slurm")


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("optim.lrr", "did you mean 'optim.lr'?"),
        ("model.n_layers", "rename it to model.num_layers"),
        ("zzz", "lmscale config prints all keys"),
    ],
)
def test_an_unknown_key_is_refused_with_the_key_to_use(key: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        reference_text(key)
    assert caught.value.problems[0].hint == hint
