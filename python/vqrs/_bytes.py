"""Numbers of bytes as people write and read them."""

from __future__ import annotations

import re
from numbers import Integral

_UNITS = {"": 1, "b": 1} | {
    f"{prefix}{infix}b": base**power
    for power, prefix in enumerate("kmgt", start=1)
    for infix, base in (("", 1000), ("i", 1024))
}


def parse_bytes(value: int | str) -> int:
    """A number of bytes, from an int or a text such as ``"64MiB"`` (1024² each) or ``"1.5GB"`` (1000³ each).

    Raises
    ------
    ValueError
        Not a positive number with a known unit.
    TypeError
        Neither an int nor a text.

    Examples
    --------
    >>> from vqrs._bytes import parse_bytes
    >>> parse_bytes("64MiB"), parse_bytes("1.5 kB"), parse_bytes(4096)
    (67108864, 1500, 4096)
    """
    if isinstance(value, Integral) and not isinstance(value, bool):
        number = int(value)
    elif isinstance(value, str):
        number = _parse_text(value)
    else:
        raise TypeError(f"a number of bytes is an int or a text such as '64MiB', not {value!r}")
    if number < 1:
        raise ValueError(f"a number of bytes must be positive, got {value!r}")
    return number


def _parse_text(text: str) -> int:
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-z]*)\s*", text, re.IGNORECASE)
    unit = _UNITS.get(found[2].lower()) if found else None
    if found is None or unit is None:
        raise ValueError(f"cannot read {text!r} as a number of bytes: write for example 4096, '64MiB' or '1.5GB'")
    number = float(found[1]) * unit
    if number > 1 << 63:
        raise ValueError(f"{text!r} is more than any machine holds")
    return int(number)


def format_bytes(n_bytes: float) -> str:
    """Bytes in the unit that keeps the number short.

    Examples
    --------
    >>> from vqrs._bytes import format_bytes
    >>> format_bytes(100), format_bytes(46_881_792)
    ('100 B', '44.7 MiB')
    """
    if n_bytes < 1024:
        return f"{n_bytes:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        n_bytes /= 1024
        if n_bytes < 1024:
            return f"{n_bytes:.1f} {unit}"
    return f"{n_bytes / 1024:.1f} TiB"
