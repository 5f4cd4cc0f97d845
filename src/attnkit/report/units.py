"""Numbers as people read them; one place, so that the table, the charts and the sentences agree."""

from __future__ import annotations


def rounded(value: float, digits: int = 3) -> str:
    """``digits`` significant digits, never with an exponent: 1234 -> "1230", 0.98765 -> "0.988"."""
    text = f"{value:.{digits}g}"
    return f"{float(text):.0f}" if "e" in text else text


def count(value: float) -> str:
    """Thousands and millions: 18734 -> "18.7k"."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * size:
            return f"{rounded(value / size)}{unit}"
    return rounded(value)


def size(value: float) -> str:
    """Bytes in binary units: 65536 -> "64 KiB"."""
    for unit_size, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= 0.9995 * unit_size:
            return f"{rounded(value / unit_size)} {unit}"
    return f"{rounded(value)} B"


def points(value: float) -> str:
    """A share in percent, without the sign; only what is all or nothing reads 100 or 0."""
    text = f"{100 * value:.0f}"
    if value not in (0, 1) and (text == "100" or value < 0.1):
        text = f"{min(99.9, max(0.1, 100 * value)):.1f}"
    return text


def percent(value: float) -> str:
    return f"{points(value)} %"


def milliseconds(value: float) -> str:
    return f"{rounded(value)} ms"


def bits(value: float) -> str:
    return f"{value:.3f}"
