"""What a training came to, in a few words for whoever watches."""

from __future__ import annotations

from attnkit.compare.store import Line


def words(line: Line) -> str:
    """``2.055 bits per byte``, or ``recall 98%`` at the hardest of its points."""
    if line["kind"] == "text":
        bits = line["bits_per_byte"]
        return "diverged" if bits is None else f"{bits:.3f} bits per byte"
    hardest = max(line["points"], key=lambda point: (point["length"], point.get("pairs", 0)))
    right = hardest["accuracy"]
    return f"{line['task']} " + ("diverged" if right is None else f"{right:.0%}")
