"""Slurm's short form of host names."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmscale_launcher.slurm.states import expand


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("", []),
        ("n1", ["n1"]),
        ("n[1-3,07-10]", ["n1", "n2", "n3", "n07", "n08", "n09", "n10"]),
        ("gpu-[001-003]x", ["gpu-001x", "gpu-002x", "gpu-003x"]),
        ("a1,b[2,4]-ib", ["a1", "b2-ib", "b4-ib"]),
        ("r[1-2]n[08-09]", ["r1n08", "r1n09", "r2n08", "r2n09"]),
        ("n[9-11]", ["n9", "n10", "n11"]),
        ("n[98-101],m3.site.org", ["n98", "n99", "n100", "n101", "m3.site.org"]),
        ("n[1-2],n[1-2]", ["n1", "n2", "n1", "n2"]),
    ],
)
def test_lists_as_slurm_writes_them(text: str, hosts: list[str]) -> None:
    assert expand(text) == hosts


@pytest.mark.parametrize(
    "text", ["n[1-3", "n1-3]", "n[]", "n[a-b]", "n[3-1]", "n[1--3]", "n[1,,2]", "n[[1]]", "n[1-99999999]"]
)  # fmt: skip
def test_what_is_no_list_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"host|bracket|range"):
        expand(text)


def test_a_small_text_does_not_fill_the_memory() -> None:
    with pytest.raises(ValueError, match="more than"):
        expand("[1-1000][1-1000][1-1000]")


plain = st.text("abcxyz.-_", min_size=1, max_size=4)


@st.composite
def brackets(draw: st.DrawFn) -> tuple[str, list[str]]:
    """A bracket in Slurm's words, and what it stands for."""
    words, numbers = [], []
    for _ in range(draw(st.integers(1, 3))):
        first, count = draw(st.integers(0, 1200)), draw(st.integers(1, 12))
        text = str(first).zfill(draw(st.integers(1, 5)))
        last = str(first + count - 1).zfill(len(text))
        words.append(text if count == 1 else f"{text}-{last}")
        numbers += [str(number).zfill(len(text)) for number in range(first, first + count)]
    return f"[{','.join(words)}]", numbers


@st.composite
def names(draw: st.DrawFn) -> tuple[str, list[str]]:
    text = draw(plain)
    hosts = [text]
    for _ in range(draw(st.integers(0, 2))):
        written, numbers = draw(brackets())
        tail = draw(st.one_of(st.just(""), plain))
        text += written + tail
        hosts = [f"{host}{number}{tail}" for host in hosts for number in numbers]
    return text, hosts


@given(st.lists(names(), min_size=1, max_size=4))
def test_any_list_names_its_hosts_in_order(parts: list[tuple[str, list[str]]]) -> None:
    assert expand(",".join(text for text, _ in parts)) == [
        host for _, hosts in parts for host in hosts
    ]


@given(st.text("n0123456789[],- ", max_size=20))
def test_any_text_is_a_list_or_refused(text: str) -> None:
    try:
        hosts = expand(text)
    except ValueError:
        return
    assert all(host and "[" not in host and "," not in host for host in hosts)
