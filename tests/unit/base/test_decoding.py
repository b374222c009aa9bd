"""The strict typed decoder: what fits comes back, everything else is one typed error."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmscale.base.console import escape_foreign
from lmscale.base.decoding import (
    Length,
    Limits,
    Range,
    RecordError,
    convert,
    decode,
    decode_file,
    parse_json,
)
from lmscale.base.errors import DataError
from lmscale.base.fs import UnsuitableFile

Attempt = TypedDict(
    "Attempt", {"attempt": int, "from": int | None, "placement": NotRequired[dict[str, Any]]}
)


@dataclass(frozen=True)
class Inner:
    """A nested record."""

    name: str
    sums: tuple[int, ...] = ()


@dataclass(frozen=True)
class Record:
    """One field of each kind."""

    number: Annotated[int, Range(0, 10)]
    share: float
    kind: Literal["a", "b"]
    inner: Inner
    table: Mapping[str, Sequence[Inner]]
    pair: tuple[int, str]
    flag: bool = False
    text: Annotated[str | None, Length(1, 5)] = "x"
    free: Mapping[str, Any] = field(default_factory=dict)


GOOD: dict[str, Any] = {
    "number": 3,
    "share": 1,
    "kind": "b",
    "inner": {"name": "i", "sums": [1, 2]},
    "table": {"k.1": [{"name": "j"}]},
    "pair": [1, "x"],
    "flag": True,
    "free": {"deep": [[{}]]},
}


def refused(spec: Any, text: bytes | str, **options: Any) -> str:
    """The message of the one typed error."""
    with pytest.raises(RecordError) as caught:
        decode(spec, text, where="file.json", hint="do this", **options)
    assert isinstance(caught.value, DataError)
    message = str(caught.value)
    assert message.startswith("file.json: ")
    assert message.endswith("; do this")
    return message.removeprefix("file.json: ").removesuffix("; do this")


def test_a_good_record() -> None:
    found = decode(Record, json.dumps(GOOD), where="x")
    assert found == Record(
        number=3,
        share=1.0,
        kind="b",
        inner=Inner("i", (1, 2)),
        table={"k.1": (Inner("j"),)},
        pair=(1, "x"),
        flag=True,
        free={"deep": [[{}]]},
    )
    assert type(found.share) is float


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        ({"number": True}, "number: expected a whole number, got true"),
        ({"number": 3.0}, "number: expected a whole number, got 3.0"),
        ({"number": "3"}, "number: expected a whole number, got the text '3'"),
        ({"number": 11}, "number: expected at most 10, got 11"),
        ({"number": -1}, "number: expected at least 0, got -1"),
        ({"share": None}, "share: expected a number, got null"),
        ({"share": False}, "share: expected a number, got false"),
        ({"kind": "c"}, "kind: expected one of 'a', 'b', got the text 'c'"),
        ({"kind": []}, "kind: expected one of 'a', 'b', got a list of 0"),
        ({"inner": []}, "inner: expected an object, got a list of 0"),
        ({"inner": {}}, "inner: the key 'name' is missing"),
        ({"inner": {"name": "i", "sums": [1, 2, "3"]}}, "inner.sums[2]: expected a whole number"),
        ({"table": {"k.1": [{"name": "j"}, {"name": 2}]}}, "table['k.1'][1].name: expected a text"),
        ({"table": {"k": {}}}, "table.k: expected a list, got an object with 0 keys"),
        ({"pair": [1]}, "pair: expected a list of 2, got a list of 1"),
        ({"pair": [1, 2]}, "pair[1]: expected a text, got 2"),
        ({"text": ""}, "text: expected of length 1 to 5"),
        ({"flag": 1}, "flag: expected true or false, got 1"),
        ({"free": 1}, "free: expected an object, got 1"),
    ],
)
def test_a_wrong_type_is_named_with_its_place(change: dict[str, Any], fact: str) -> None:
    assert refused(Record, json.dumps(GOOD | change)).startswith(fact)


def test_missing_and_unknown_keys() -> None:
    body = dict(GOOD)
    del body["pair"]
    assert refused(Record, json.dumps(body)) == "the key 'pair' is missing"
    later = json.dumps(GOOD | {"later": 1})
    assert decode(Record, later, where="x").number == 3
    assert refused(Record, later, closed=True) == "the key 'later' is not known"
    kept = decode(Attempt, '{"attempt": 1, "from": null, "host": "h"}', where="x")
    assert kept == {"attempt": 1, "from": None, "host": "h"}
    assert refused(Attempt, '{"from": 1}') == "the key 'attempt' is missing"
    assert refused(Attempt, "{}\n{}").startswith("not JSON")


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff", "not UTF-8 at byte 0"),
        (b'\xef\xbb\xbf{"a": 1}', "not JSON"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
        (b"[NaN]", "NaN is not JSON"),
        (b"[-Infinity]", "-Infinity is not JSON"),
        (b"[1e999]", "the number 1e999 is beyond 64 bits"),
        (b"[18446744073709551616]", "the number 18446744073709551616 is beyond 64 bits"),
        (b"[-9223372036854775809]", "the number -9223372036854775809 is beyond 64 bits"),
        (b"[" + b"9" * 5000 + b"]", "the number 9999"),
        (b"[0." + b"1" * 5000 + b"]", "the number 0.1111"),
        (b'{"a": 1, "b": 2, "a": 3}', "the key 'a' is given twice"),
        (b"[" * 100_000, "nested more than 64 levels deep"),
        (b'{"a":' * 100_000, "nested more than 64 levels deep"),
        (b"[" * 65 + b"]" * 65, "nested more than 64 levels deep"),
    ],
)
def test_texts_beyond_the_limits(text: bytes, fact: str) -> None:
    assert refused(Any, text).startswith(fact)


def test_the_limits_themselves_are_allowed() -> None:
    assert parse_json(b"[18446744073709551615, -9223372036854775808]", where="x") == [
        (1 << 64) - 1,
        -(1 << 63),
    ]
    assert parse_json(b"[%d]" % 10**30, where="x", limits=Limits(wide_integers=True)) == [10**30]
    assert "beyond" in refused(Any, b"9" * 65, limits=Limits(wide_integers=True))
    parse_json(b"[" * 64 + b"]" * 64, where="x")
    parse_json(json.dumps(["[{" * 1000, '\\"[[' * 1000, "[]"] * 40), where="x")
    assert refused(Any, b"[1, 2]", limits=Limits(max_bytes=5)) == "6 bytes, at most 5 are allowed"


def test_messages_are_short_and_safe_for_a_terminal() -> None:
    text = "\x1b[31m" + "x" * 10_000 + "\u202e"
    message = refused(dict[str, int], json.dumps({text: text}))
    assert len(message) < 300
    assert message == escape_foreign(message)


def test_a_value_that_was_not_parsed_is_checked_as_well() -> None:
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]

    @dataclass(frozen=True)
    class Node:
        """A tree."""

        more: list["Any"]

    assert convert(Node, {"more": deep}, where="x").more is deep
    for value in (math.nan, math.inf, 10**5000):
        with pytest.raises(RecordError):
            convert(float, value, where="x")


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(b'{"attempt": 1, "from": 2}')
    assert decode_file(Attempt, path)["from"] == 2
    with pytest.raises(UnsuitableFile):
        decode_file(Attempt, path, limits=Limits(max_bytes=10))
    with pytest.raises(FileNotFoundError):
        decode_file(Attempt, tmp_path / "absent")


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(json_values)
def test_any_json_value_comes_back(value: Any) -> None:
    assert parse_json(json.dumps(value), where="x") == value
    assert parse_json(json.dumps(value, ensure_ascii=True).encode(), where="x") == value


def outcome_of(spec: Any, text: bytes | str) -> str:
    """The message of the typed error; empty where the text was decoded. Nothing else is raised."""
    try:
        decode(spec, text, where="x")
    except RecordError as error:
        return str(error)
    return ""


@given(json_values)
def test_any_other_value_is_a_record_or_the_typed_error(value: Any) -> None:
    for spec in (Record, Attempt, list[int], dict[str, Inner], tuple[int, str]):
        assert outcome_of(spec, json.dumps(value)).isprintable()


@given(st.data())
def test_a_mutated_record_is_a_record_or_the_typed_error(data: st.DataObject) -> None:
    text = bytearray(json.dumps(GOOD).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(text) - 1))
        match data.draw(st.sampled_from(["flip", "cut", "double", "insert"])):
            case "flip":
                text[at] ^= data.draw(st.integers(1, 255))
            case "cut":
                del text[at : at + data.draw(st.integers(1, 30))]
            case "double":
                text[at:at] = text[at : at + 20]
            case "insert":
                text[at:at] = data.draw(st.sampled_from([b"NaN", b"1e999", b"[", b'"', b"9" * 30]))
        if not text:
            break
    assert outcome_of(Record, bytes(text)).isprintable()


@given(st.text(alphabet='[]{}"\\a', max_size=200))
def test_the_depth_is_that_of_the_value(text: str) -> None:
    def depth(value: Any) -> int:
        inner = (
            value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        )
        return (not isinstance(value, str)) + max(map(depth, inner), default=0)

    try:
        want = depth(json.loads(text))
    except ValueError:
        return
    if want:
        parse_json(text, where="x", limits=Limits(max_depth=want))
    if want > 1:
        with pytest.raises(RecordError):
            parse_json(text, where="x", limits=Limits(max_depth=want - 1))
