"""Quantities as people write them: "1 GiB", "20B", "5%", "90m"."""

import re

_NUMBER = r"(\d[\d_]*(?:\.\d+)?)"
_BYTES = {"": 1, "B": 1, **{f"{p}iB": 1 << (10 * i) for i, p in enumerate("KMGT", 1)},
          **{f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)}}  # fmt: skip
_COUNTS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_SECONDS = {"": 1, "s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}


def parse_bytes(text: str | int) -> int:
    """A size in bytes: 4096, "4096", "64 KiB", "1 GiB", "1.5 GB". Raises ValueError."""
    return _scaled(text, _BYTES, 'write e.g. "64 MiB"')


def parse_count(text: str | int) -> int:
    """A count: 20_000_000, "20M", "20B tokens". Raises ValueError."""
    if isinstance(text, str):
        text = re.sub(r"\s*(tokens|samples|steps)$", "", text.strip())
    return _scaled(text, _COUNTS, 'write e.g. 20_000_000 or "20M"')


def parse_seconds(text: str | int) -> int:
    """A duration in seconds: 90, "90s", "15m", "2h", "1d", "1:30:00" (h:m:s). Raises ValueError."""
    if isinstance(text, str) and (
        clock := re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)", text.strip())
    ):
        days, hours, minutes, seconds = (int(part or 0) for part in clock.groups())
        return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    return _scaled(text, _SECONDS, 'write e.g. "90m" or "1:30:00"')


def parse_percent(text: str) -> float:
    """A share between 0 and 1, written "5%" or "0.5%". Raises ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", text.strip())
    if not match or float(match[1]) > 100:
        raise ValueError(f'cannot read {text!r} as a percentage; write e.g. "5%"')
    return float(match[1]) / 100


def show_bytes(size: float) -> str:
    """A size for people: 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1023.5:
            whole = unit == "B" or abs(size) >= 999.5  # .3g would show 1e+03
            return f"{size:.0f} {unit}" if whole else f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} TiB" if abs(size) < 999.5 else f"{size:.0f} TiB"


def show_seconds(seconds: float) -> str:
    """A duration for people: 42s, 3m05s, 2h07m, 3d04h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def show_count(count: float) -> str:
    """A count for people: 950, 12.3K, 1.24B."""
    for unit in ("", "K", "M", "B"):
        if abs(count) < 999.5:  # from there on it would be shown as 1e+03
            return f"{count:.0f}" if unit == "" else f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g}T" if abs(count) < 999.5 else f"{count:.0f}T"


def _scaled(text: str | int, factors: dict[str, int], hint: str) -> int:
    if isinstance(text, bool):
        raise ValueError(f"cannot read {text!r}; {hint}")
    if isinstance(text, int):
        if text < 0:
            raise ValueError(f"cannot be negative: {text}")
        return text
    match = re.fullmatch(rf"{_NUMBER}\s*([A-Za-z]*)", text.strip())
    if not match or match[2] not in factors:
        raise ValueError(f"cannot read {text!r}; {hint}")
    value = float(match[1].replace("_", "")) * factors[match[2]]
    if value != int(value):
        raise ValueError(f"{text!r} is not a whole number; {hint}")
    return int(value)
