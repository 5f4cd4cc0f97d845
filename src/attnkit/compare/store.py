"""Results on disk: one JSON line for every finished row, safe from the moment it is written."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

FORMAT = 1
RESULTS, REPORT = "results.jsonl", "report.html"

Line = dict[str, Any]

_PLACE = ("kind", "id", "work", "task", "row", "title", "seed")
# What makes two runs comparable; the commit too, because numbers of two versions of the code do not mix.
_SAME = ("format", "attnkit", "commit", "torch", "machine", "settings")


def key(line: Line) -> tuple[Any, ...]:
    """What a line is about: a finished one with the same key is not measured again."""
    return tuple(line.get(name) for name in _PLACE)


class Store:
    """The lines of one run in ``folder/results.jsonl``; appended, flushed and synced one by one.

    A run that is already in the folder is continued with ``resume``; without it its files move to a folder of their
    own. ``notices`` says, for the user, what was found. One process at a time may write to a folder.
    """

    def __init__(self, folder: Path, header: Line, *, resume: bool) -> None:
        self.path = folder / RESULTS
        self.notices: list[str] = []
        self.lines: list[Line] = []
        self._file = -1
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self._open()
            if resume:
                self._read(header)
            else:
                self._put_aside()
            self._end = os.lseek(self._file, 0, os.SEEK_END)
        except OSError as error:
            self.close()
            raise _sentence(error, self.path) from error
        except ValueError:
            self.close()
            raise
        if not self.lines:
            self.add([header])

    @property
    def header(self) -> Line:
        return self.lines[0]

    def __contains__(self, line: Line) -> bool:
        return key(line) in {key(known) for known in self.lines}

    def add(self, lines: Iterable[Line]) -> None:
        """Append lines that belong together; when this returns they survive a kill and a power cut."""
        new = list(lines)
        data = "".join(json.dumps(line, allow_nan=False) + "\n" for line in new).encode()
        written = 0
        try:
            while written < len(data):
                written += os.write(self._file, data[written:])
            os.fsync(self._file)
        except OSError as error:
            with suppress(OSError):  # no half line; if even this fails, --resume drops it
                os.ftruncate(self._file, self._end)
            raise _sentence(error, self.path) from error
        self._end += len(data)
        self.lines += new

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _open(self) -> int:
        file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            raise ValueError(
                f"another attnkit compare is writing to {self.path}: wait for it, or choose another folder with --out"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):  # some network folders have no locks
                os.close(file)
                raise
        _sync_folder(self.path.parent)
        return file

    def _read(self, header: Line) -> None:
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        for number, text in enumerate(whole.splitlines(), 1):
            try:
                line = json.loads(text)
            except ValueError as error:
                raise ValueError(
                    f"line {number} of {self.path} is not JSON ({error}): repair it, or leave out --resume"
                ) from error
            if not isinstance(line, dict) or (number == 1) != (line.get("kind") == "run"):
                raise ValueError(
                    f"line {number} of {self.path} is no line of attnkit compare: choose another folder with --out"
                )
            self.lines.append(line)
        if self.lines:
            self._check(header)
            self.notices.append(f"going on with {self.path}, begun {self.header.get('started')}")
        else:
            self.notices.append(f"{self.path} holds nothing to go on with: starting from the beginning")
        if len(whole) < len(data):
            os.ftruncate(self._file, len(whole))
            self.notices.append("its last line was cut off when the run stopped, and is measured again")

    def _check(self, header: Line) -> None:
        for name in _SAME:
            ours, theirs = header[name], self.header.get(name)
            if ours == theirs:
                continue
            if isinstance(ours, dict) and isinstance(theirs, dict):
                inner = next(k for k in (*ours, *theirs) if ours.get(k) != theirs.get(k))
                name, ours, theirs = f"{name} {inner}", ours.get(inner), theirs.get(inner)
            raise ValueError(
                f"{self.path} was begun with {name} {_shown(theirs)}, this run has {_shown(ours)}: "
                "run it as it was begun, or leave out --resume to start anew (the old results are kept)"
            )

    def _put_aside(self) -> None:
        """Move the files of an earlier run into a folder named by its start, from which it can still be resumed."""
        if os.fstat(self._file).st_size == 0:
            return
        folder = self.path.parent
        with self.path.open("rb") as file:
            try:
                started = str(json.loads(file.readline())["started"])
            except (ValueError, KeyError, TypeError):
                started = "earlier"
        name = "".join(c if c.isalnum() or c in "-+" else "-" for c in started)
        aside = folder / name
        for count in range(2, 1000):
            if not aside.exists():
                break
            aside = folder / f"{name}-{count}"
        aside.mkdir()
        for file_name in (REPORT, RESULTS):
            with suppress(FileNotFoundError):
                (folder / file_name).rename(aside / file_name)
        os.close(self._file)
        self._file = self._open()
        self.notices.append(
            f"the results of an earlier run are now in {aside} (--resume --out {aside} goes on with them)"
        )


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Have ``write`` make a file beside ``path`` and put it in its place when complete: all of it or nothing."""
    part = path.with_name(f".{path.name}.part")
    try:
        write(part)
        file = os.open(part, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)
        part.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise _sentence(error, path) from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _sentence(error: OSError, path: Path) -> OSError:
    reason = error.strerror or str(error)
    advice = {
        errno.ENOSPC: "free some space, then go on with --resume",
        errno.EDQUOT: "free some space, then go on with --resume",
    }.get(error.errno or 0, "choose a folder that can be written with --out")
    return OSError(f"cannot write {path} ({reason}): {advice}")


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
