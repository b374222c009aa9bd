"""How a key of a run file is declared: its kind, description, limits, and the texts that it accepts.

Every key is either *identity* (what is being trained: a resume that differs is refused) or
*placement* (where and how it runs: free to change). Kind and description travel in the field, so
that checks, fingerprints, the editor schema, the reference and error messages have the same source.
"""

import re
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.fields import FieldInfo

from lmscale.base.units import parse_bytes, parse_count, parse_percent, parse_seconds

Kind = Literal["identity", "placement"]


class Section(BaseModel):
    """Part of a run file: frozen, strict, without unknown keys.

    Building is deferred because RunConfig compiles all sections in one go; compiling each alone as
    well would double the cost of `lmscale train bad.yaml`.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, defer_build=True
    )


def _field(kind: Kind, doc: str, *, schema: dict[str, Any] | None = None, **rest: Any) -> Any:
    extra = {"x-kind": kind, **(schema or {})}
    if "example" in rest:
        rest["examples"] = [rest.pop("example")]
    return Field(description=doc, json_schema_extra=extra, **rest)


# A key without `default` must be chosen by the user and has an `example`.
identity: Callable[..., Any] = partial(_field, "identity")
placement: Callable[..., Any] = partial(_field, "placement")


def kind_of(field: FieldInfo) -> Kind:
    """Identity or placement; a KeyError means that the field was not declared with either."""
    extra = field.json_schema_extra
    assert isinstance(extra, dict), "declare config fields with identity(...) or placement(...)"
    kind = extra["x-kind"]
    assert kind in ("identity", "placement")
    return "identity" if kind == "identity" else "placement"


def key_of(name: str, field: FieldInfo) -> str:
    """The key in the run file; differs from the attribute where Python reserves the word."""
    return field.alias or name


def shown(value: object) -> str:
    """A decoded value in plain English, for messages."""
    match value:
        case None:
            return "nothing (null)"
        case bool():
            return "true" if value else "false"
        case str():
            return f"the text {value!r}"
        case dict():
            return "a mapping"
        case list() | tuple():
            return "a list"
    return str(value)


def _cannot_read(value: object, hint: str) -> ValueError:
    named = repr(value) if isinstance(value, str) else shown(value)
    return ValueError(f"cannot read {named}; {hint}")


def _if_text(parse: Callable[[str], object]) -> BeforeValidator:
    """Parse texts; leave other types to the strict check that follows."""
    return BeforeValidator(lambda value: parse(value) if isinstance(value, str) else value)


def _steps_or_share(value: object) -> object:
    hint = 'write a number of steps, e.g. 200, or a share of all steps, e.g. "5%"'
    if isinstance(value, str):
        if value.strip().endswith("%"):
            parse_percent(value)
            return value.strip()
        try:
            return parse_count(value)
        except ValueError:
            raise _cannot_read(value, hint) from None
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise _cannot_read(value, hint)
    return value


def _size_or_auto(value: object) -> object:
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise _cannot_read(value, 'write a number of ranks from 1, or "auto" for all remaining ranks')


def _activation_checkpointing(value: object) -> object:
    plain = ("none", "full", "selective")
    if isinstance(value, str) and (value in plain or re.fullmatch(r"every:[1-9]\d*", value)):
        return value
    if isinstance(value, str) and (budget := re.fullmatch(r"budget:(\d*\.?\d+)", value)):
        if 0 < float(budget[1]) < 1:
            return value
        hint = "write a fraction between 0 and 1, e.g. budget:0.5; the ends are full and none"
        raise ValueError(f"{value!r} is not a part of the memory; {hint}")
    raise _cannot_read(value, "write none, full, selective, every:N or budget:0.5")


def _step_range(value: object) -> object:
    match = re.fullmatch(r"(\d+):(\d+)", value) if isinstance(value, str) else None
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise _cannot_read(value, 'write first and last step, e.g. "10:12"')
    return value


def _as_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _paths(value: object) -> object:
    """A path, a list of paths, or a list of {path: ...}, all as a tuple of paths."""
    entries = [value] if isinstance(value, (str, dict)) else value
    if not isinstance(entries, (list, tuple)):
        return value
    return tuple(e["path"] if isinstance(e, dict) and set(e) == {"path"} else e for e in entries)


def _corpora(value: object) -> object:
    """A path, a list of paths, or a list of {path, weight}, all as a tuple of {path, weight}."""
    entries = [value] if isinstance(value, (str, dict)) else value
    if not isinstance(entries, (list, tuple)):
        return value
    if not entries:
        raise ValueError("is empty; name the folder of a corpus, e.g. data/smoke")
    return tuple({"path": e} if isinstance(e, str) else e for e in entries)


Count = Annotated[int, _if_text(parse_count)]
Bytes = Annotated[int, _if_text(parse_bytes)]
Seconds = Annotated[int, _if_text(parse_seconds)]
StepsOrShare = Annotated[int | str, BeforeValidator(_steps_or_share)]
SizeOrAuto = Annotated[int | Literal["auto"], BeforeValidator(_size_or_auto)]
ActivationCheckpointing = Annotated[str, BeforeValidator(_activation_checkpointing)]
StepRange = Annotated[str, BeforeValidator(_step_range)]
Texts = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]
Paths = Annotated[tuple[str, ...], BeforeValidator(_paths)]
FloatPair = Annotated[tuple[float, float], BeforeValidator(_as_tuple)]
as_corpora = BeforeValidator(_corpora)

# What editors accept in addition to the type of the validated value.
NUMBER_OR_TEXT: dict[str, Any] = {"type": ["integer", "string"]}
NUMBER_TEXT_OR_NULL: dict[str, Any] = {"anyOf": [{"type": ["integer", "string"]}, {"type": "null"}]}
LIST_OR_TEXT: dict[str, Any] = {"type": ["array", "string"]}
