"""One JSON object, read key by key: every key is taken, known to be of no consequence, or reported.

A mistake is one ``ValueError`` that names the file and the field. Nothing but JSON is read: no code of a checkpoint.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LARGEST_FILE = 16 << 20
# Past these a number is a lie or a mistake: the largest model known has 1.6e12 weights in 61 layers 7,168 wide.
MOST = 1 << 24
MOST_LAYERS = 4096
MOST_HEADS = 1 << 16


class Fields:
    """The keys of one object of ``file``; ``where`` is the path of keys to it, such as ``text_config.``."""

    def __init__(self, data: Mapping[str, Any], file: str, where: str = "") -> None:
        self.data, self.file, self.where = data, file, where
        self.taken: set[str] = set()

    def has(self, *names: str) -> bool:
        """Whether one of these keys is there and not null."""
        return any(self.data.get(name) is not None for name in names)

    def raw(self, *names: str) -> Any:
        """The first of these keys that is there, and None when none is; all of them count as taken."""
        self.taken.update(names)
        return next((self.data[name] for name in names if self.data.get(name) is not None), None)

    def skip(self, *names: str) -> None:
        """Take these keys without a look: what they say is known from elsewhere."""
        self.taken.update(names)

    def integer(self, *names: str, default: int | None = None, least: int = 1, most: int = MOST) -> int:
        """A whole number under one of these names; ``default`` where there is none, an error if that is None."""
        value = self.raw(*names)
        if value is None:
            if default is None:
                self.fail(names[0], "is missing", f"a whole number from {least:,} to {most:,}")
            return default  # type: ignore[return-value]
        if isinstance(value, bool) or not isinstance(value, int):
            self.fail(self._present(names), f"is {_shown(value)}", f"a whole number from {least:,} to {most:,}")
        if not least <= value <= most:
            self.fail(self._present(names), f"is {value}", f"{least:,} to {most:,}")
        return int(value)

    def heads(self, *names: str, default: int | None = None, least: int = 1) -> int:
        """A number of heads."""
        return self.integer(*names, default=default, least=least, most=MOST_HEADS)

    def number(self, *names: str, default: float) -> float:
        """A number."""
        value = self.raw(*names)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            self.fail(self._present(names), f"is {_shown(value)}", "a number")
        return float(value)

    def flag(self, *names: str, default: bool = False) -> bool:
        """True or false."""
        value = self.raw(*names)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.fail(self._present(names), f"is {_shown(value)}", "true or false")
        return bool(value)

    def text(self, *names: str, default: str | None = None) -> str | None:
        """A string."""
        value = self.raw(*names)
        if value is not None and not isinstance(value, str):
            self.fail(self._present(names), f"is {_shown(value)}", "text")
        return default if value is None else value

    def each(self, *names: str, length: int | None = None) -> list[Any] | None:
        """A list, of ``length`` entries where one is given."""
        value = self.raw(*names)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) > MOST_LAYERS * 4:
            self.fail(self._present(names), f"is {_shown(value)}", "a list")
        if length is not None and len(value) != length:
            self.fail(self._present(names), f"has {len(value)} entries", f"{length}, one a layer")
        return list(value)

    def inner(self, *names: str) -> Fields:
        """The object under one of these names; an empty one where there is none."""
        value = self.raw(*names)
        if value is not None and not isinstance(value, dict):
            self.fail(self._present(names), f"is {_shown(value)}", "an object")
        return Fields(value or {}, self.file, f"{self.where}{self._present(names)}.")

    def fail(self, name: str, got: str, expected: str) -> None:
        """Raise the one sentence of a user's error."""
        raise ValueError(f"{self.file}: {self.where}{name} {got}, expected {expected}")

    def rest(self) -> list[str]:
        """Keys that nobody has taken."""
        return [f"{self.where}{name}" for name in self.data if name not in self.taken]

    def _present(self, names: Sequence[str]) -> str:
        return next((name for name in names if self.data.get(name) is not None), names[0])


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else f"{text[:37]}..."


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ``ValueError`` in one sentence for anything else."""
    if path.is_dir():
        path = path / "config.json"
    if path.is_file() and path.stat().st_size > LARGEST_FILE:
        raise ValueError(
            f"{path} has {path.stat().st_size:,} bytes, expected a config.json of at most {LARGEST_FILE:,}"
        )
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no text, expected a config.json") from None
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply, expected a config.json") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON at line {error.lineno} ({error.msg}), expected a config.json") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds {_shown(found)}, expected an object with a model_type")
    return found
