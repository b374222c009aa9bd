"""The YAML reader follows the 1.2 core schema, and what is written reads back."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmscale.config.yaml import parse, render


def value_of(text: str) -> object:
    document = parse(text, name="t.yaml")
    assert document.problems == []
    return document.value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1E+3", 1000.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("010", 10),
        ("0o10", 8),
        ("0xfF", 255),
        ("-7", -7),
        ("on", "on"),
        ("yes", "yes"),
        ("No", "No"),
        ("1:30", "1:30"),
        ("20_000", "20_000"),
        ("2024-01-01", "2024-01-01"),
        ("True", True),
        ("FALSE", False),
        ("~", None),
        ("", None),
        ("'1'", "1"),
        ("!!str 1", "1"),
        ("!!float 1", 1.0),
        ("-.INF", -math.inf),
        ("0b1", "0b1"),
        ("<<", "<<"),
        ("5%", "5%"),
        ("every:2", "every:2"),
        ("[1, {a: b}]", [1, {"a": "b"}]),
        ("a: &x [1]\nb: *x", {"a": [1], "b": [1]}),
    ],
)
def test_scalars_are_those_of_the_core_schema(text: str, value: object) -> None:
    decoded = value_of(text)
    assert decoded == value
    assert type(decoded) is type(value)


def test_not_a_number_is_a_float() -> None:
    assert math.isnan(value_of(".NaN"))  # type: ignore[arg-type]


def test_repeated_keys_name_both_lines_and_all_are_found() -> None:
    document = parse("a:\n  b: 1\n  b: 2\nc: 1\na: 3\nc: 4\n", name="t.yaml")
    assert [(p.path, p.fact) for p in document.problems] == [
        ("a.b", "repeated key, first on line 2 (t.yaml:3)"),
        ("a", "repeated key, first on line 1 (t.yaml:5)"),
        ("c", "repeated key, first on line 4 (t.yaml:6)"),
    ]


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("a: [1", "t.yaml:"),
        ("a: b: c", "t.yaml:1: not YAML"),
        ("a: 1\n\tb: 2", "t.yaml:2: not YAML"),
        ("a: 1\n---\nb: 2", "t.yaml:"),
        ("1: a", "the key 1 is not text"),
        ("? [a]\n: 1", "the key a list or mapping is not text"),
        ("a: !!int x", "cannot read 'x' as a whole number"),
        ("a: !!bool 1", "cannot read '1' as true or false"),
        ("a: !!python/object:os.system x", "unknown tag"),
        ("a: !!timestamp 2024-01-01", "unknown tag"),
        ("a: " + "1" * 5000, "as a whole number"),
        ("a: &x [*x]", "an alias inside its own anchor"),
        ("a: *nobody", "not YAML"),
        ("a: \x01", "not YAML"),
    ],
)
def test_what_is_not_core_yaml_is_a_problem(text: str, fact: str) -> None:
    problems = parse(text, name="t.yaml").problems
    assert len(problems) == 1
    assert fact in problems[0].fact


def test_aliases_cannot_unfold_without_end() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    problems = parse("\n".join(lines), name="t.yaml").problems
    assert len(problems) == 1
    assert "unfold to more than" in problems[0].fact


def test_lines_of_keys_are_known() -> None:
    lines = parse("a:\n  b: 1\n\n  c: [1,\n   2]\n", name="t.yaml").lines
    assert lines["a", "b"] == 2
    assert lines["a", "c", 1] == 5


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8) | st.sampled_from(
    [
        "1e-3",
        "on",
        "null",
        "~",
        "",
        "0o7",
        "1_0",
        "1:30",
        " x ",
        "a: b",
        "# c",
        "- d",
        "\n",
        "é",
        "=",
    ]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None)
@given(JSON)
def test_what_is_written_reads_back(value: object) -> None:
    assert value_of(render(value)) == value


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=30) | st.text("ab:-[]{}&*!'\"#\n ,", max_size=30))
def test_any_text_gives_a_value_or_problems(text: str) -> None:
    parse(text, name="t.yaml")
