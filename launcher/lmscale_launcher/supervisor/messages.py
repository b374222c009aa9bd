"""The messages between supervisors, and the check of every message that is received.

A message is one JSON object per line with a `kind`. A message that does not fit its kind ends the connection on
which it arrived, never the job. `greet` is checked by the rendezvous, which also answers other starts; kinds of a
later version are ignored by the receiver.
"""

import signal
from typing import Annotated, Any, Literal, NotRequired, TypedDict

from lmscale.base.decoding import Length, Limits, Range, RecordError, convert, decode
from lmscale_launcher.supervisor.stall import StepPace

Message = dict[str, Any]
RoundKind = Literal["stage", "ranks"]

MAX_MESSAGE_BYTES = 1 << 24
# What a supervisor forwards to its ranks; see signals.py.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
_LIMITS = Limits(max_bytes=MAX_MESSAGE_BYTES, max_depth=16)
_Rank = Annotated[int, Range(0, 1 << 32)]
_Code = Annotated[int, Range(0, 255)]


class _Kind(TypedDict):
    kind: str


class _Beat(TypedDict):
    pace: NotRequired[StepPace | None]  # of the sender's ranks


class _Died(TypedDict):
    rank: _Rank
    code: _Code


class _Stop(TypedDict):
    number: int  # one of STOP_SIGNALS


class _Stack(TypedDict):
    rank: _Rank
    text: str


class _Ended(TypedDict):
    codes: dict[str, _Code]  # by rank


class _Go(TypedDict):
    what: RoundKind
    start: Annotated[str, Length(1, 512)]
    port: Annotated[int, Range(0, 65535)]


class _LeaveMessage(TypedDict):
    code: _Code
    words: str


class _Examine(TypedDict):
    rank: _Rank


_SPECS: dict[str, Any] = {
    "beat": _Beat,
    "died": _Died,
    "stop": _Stop,
    "stack": _Stack,
    "ended": _Ended,
    "go": _Go,
    "leave": _LeaveMessage,
    "examine": _Examine,
}


def decode_message(line: bytes) -> Message:
    """One line as a message whose fields have their types. Raises RecordError."""
    where = "message of a supervisor"
    message: Message = dict(decode(_Kind, line, where=where, limits=_LIMITS))
    spec = _SPECS.get(message["kind"])
    if spec is not None:
        message = convert(spec, message, where=where)
    if message["kind"] == "stop" and message["number"] not in STOP_SIGNALS:
        raise RecordError(f"{where}: {message['number']} is not a signal that asks for a stop")
    if message["kind"] == "ended":
        message["codes"] = {_rank(rank, where): code for rank, code in message["codes"].items()}
    return message


def _rank(text: str, where: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= 10):
        raise RecordError(f"{where}: {text[:20]!r} is not the number of a rank")
    return int(text)
