"""Messages between supervisors: what fits is decoded, everything else ends the connection."""

import json
import signal
import socket
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmscale.base.decoding import RecordError
from lmscale_launcher.supervisor.event_loop import EventLoop
from lmscale_launcher.supervisor.messages import decode_message
from lmscale_launcher.supervisor.protocol import Channel
from lmscale_launcher.supervisor.rendezvous import JoinRequest
from lmscale_launcher.supervisor.stall import StepPace, Suspect

PACE = StepPace(1.5, 30.0, Suspect(0, 3, "step", "S"))
GOOD: list[dict[str, Any]] = [
    {"kind": "beat"},
    {"kind": "beat", "pace": None},
    {"kind": "beat", "pace": PACE.as_json()},
    {"kind": "died", "rank": 3, "code": 137},
    {"kind": "stop", "number": int(signal.SIGTERM)},
    {"kind": "stack", "rank": 0, "text": "File ..."},
    {"kind": "ended", "codes": {"0": 0, "1": 75}},
    {"kind": "go", "what": "ranks", "start": "slurm-1-0", "port": 29500},
    {"kind": "leave", "code": 75, "words": ""},
    {"kind": "examine", "rank": 1},
    {"kind": "end"},
    {"kind": "welcome"},
]
BAD: list[Any] = [
    1, [], None, {}, {"kind": 1}, {"kind": "died"}, {"kind": "died", "rank": "0", "code": 1},
    {"kind": "died", "rank": 0, "code": -9}, {"kind": "died", "rank": -1, "code": 1},
    {"kind": "died", "rank": 0, "code": 10**30}, {"kind": "stop", "number": 9},
    {"kind": "stop", "number": 10_000}, {"kind": "stop", "number": "TERM"}, {"kind": "stop"},
    {"kind": "ended", "codes": []}, {"kind": "ended", "codes": {"x": 1}},
    {"kind": "ended", "codes": {"²": 1}}, {"kind": "ended", "codes": {"1": None}},
    {"kind": "go", "what": "shell", "start": "s", "port": 1},
    {"kind": "go", "what": "ranks", "start": "", "port": 1},
    {"kind": "go", "what": "ranks", "start": "s", "port": 1 << 20},
    {"kind": "beat", "pace": {}}, {"kind": "beat", "pace": [1]},
    {"kind": "beat", "pace": PACE.as_json() | {"quiet_s": "long"}},
    {"kind": "beat", "pace": PACE.as_json() | {"suspect": {"rank": 0}}},
    {"kind": "leave", "code": 0}, {"kind": "stack", "rank": 0, "text": None},
]  # fmt: skip
RAW = [
    b"",
    b"\xff",
    b"{",
    b"[" * 100_000,
    b'{"kind": "stop", "number": NaN}',
    b'{"kind": "a", "kind": "b"}',
]


def test_good_messages() -> None:
    for body in GOOD:
        message = decode_message(json.dumps(body).encode())
        assert message["kind"] == body["kind"]
        if body.get("pace"):
            assert message["pace"] == PACE
        if "codes" in body:
            assert message["codes"] == {0: 0, 1: 75}


@pytest.mark.parametrize("line", [*(json.dumps(body).encode() for body in BAD), *RAW])
def test_a_bad_message_closes_the_connection_and_raises_nothing(line: bytes) -> None:
    with EventLoop() as loop:
        here, there = socket.socketpair()
        channel = Channel(here, loop)
        there.sendall(b'{"kind": "beat"}\n' + line + b"\n")
        loop.turn(1.0)
        assert [message["kind"] for message in channel.take()] == ["beat"]
        assert not channel.open
        there.close()


@given(st.data())
def test_mutated_messages_are_decoded_or_the_typed_error(data: st.DataObject) -> None:
    text = bytearray(json.dumps(data.draw(st.sampled_from(GOOD))).encode())
    for _ in range(data.draw(st.integers(1, 3))):
        text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    try:
        decode_message(bytes(text))
    except RecordError:
        return


def test_a_greeting_of_wrong_types_is_none() -> None:
    good = {"kind": "greet", "start": "s", "node": 1, "nodes": 2, "ranks": 2, "host": "h",
            "lmscale": "0", "python": "3", "clock": 1.0, "unhealthy": ["no GPU"]}  # fmt: skip
    found = JoinRequest.read(good)
    assert found is not None
    assert found.unhealthy == ("no GPU",)
    for key in good.keys() - {"kind", "unhealthy"}:
        assert JoinRequest.read({**good, key: [good[key]]}) is None
        assert (
            JoinRequest.read({name: value for name, value in good.items() if name != key}) is None
        )
    assert JoinRequest.read({**good, "unhealthy": "no GPU"}) is None
