"""Make the calls: ``python -m attnkit.testing.fuzz [--calls 20000] [--seed 1] [family ...]``.

A process of its own makes them and names each before it starts, so that one which ends in a signal, or does not end at
all, is reported with its seed; another process then goes on with the next.
"""

from __future__ import annotations

import argparse
import faulthandler
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

MOST_SECONDS = 60
"""Of one call."""
BETWEEN_SIGNS_OF_LIFE = 10.0


@dataclass
class Outcome:
    """How many calls of each family ended how, and a line for each that ended badly."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        families = dict.fromkeys(family for family, _ in self.counts)
        return [
            f"{family}: " + ", ".join(f"{count} {word}s" for (of, word), count in self.counts.items() if of == family)
            for family in families
        ]


def work(families: Sequence[str], seed: int, calls: int) -> None:
    """Make the calls in this process, a line before and after each."""
    from attnkit.testing.fuzz import attempt

    faulthandler.enable()
    for family in families:
        for number in range(seed, seed + calls):
            print("try", family, number, flush=True)
            faulthandler.dump_traceback_later(MOST_SECONDS, exit=True)
            try:
                said = attempt(family, number)
            except Exception as error:
                said = "bad " + " ".join(f"{type(error).__name__}: {error}".split())
            faulthandler.cancel_dump_traceback_later()
            print(said, flush=True)


def watch(command: Sequence[str], families: Sequence[str], seed: int, calls: int, *, speak: bool = False) -> Outcome:
    """Run ``command`` with ``--work``, a seed, a count and families until every call was made."""
    outcome, started, spoke = Outcome(), time.monotonic(), time.monotonic()
    todo = [(family, seed, calls) for family in families]
    while todo:
        # After a call that ended its process its family goes on alone; then come the others.
        first, at, left = todo[0]
        alike = [family for family, *rest in todo if rest == [at, left]] if at == seed else [first]
        given = ["--work", "--seed", str(at), "--calls", str(left), *alike]
        process = subprocess.Popen([*command, *given], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout is not None and process.stderr is not None
        now: tuple[str, int] | None = None
        for line in process.stdout:
            word, *rest = line.split(maxsplit=2)
            if word == "try":
                now = rest[0], int(rest[1])
                continue
            assert now is not None
            outcome.counts[now[0], "mistake" if word == "bad" else word] += 1
            if word == "bad":
                outcome.bad.append(f"{now[0]} seed {now[1]}: {line.strip()[4:]}")
                print(outcome.bad[-1], flush=True)
            now = None
            if speak and time.monotonic() - spoke > BETWEEN_SIGNS_OF_LIFE:
                spoke = time.monotonic()
                print(f"{outcome.counts.total()} of {calls * len(families)} calls, {spoke - started:.0f} s", flush=True)
        why = process.stderr.read().strip()
        if process.wait() == 0:
            todo = [one for one in todo if one[0] not in alike]
            continue
        if now is None:
            raise RuntimeError(f"the fuzzing process ended with {process.returncode} before a call: {why}")
        family, number = now
        ended = f"signal {-process.returncode}" if process.returncode < 0 else f"exit {process.returncode}: {why}"
        outcome.counts[family, "crash"] += 1
        outcome.bad.append(f"{family} seed {number}: ended its process with {ended}")
        print(outcome.bad[-1], flush=True)
        done = alike[: alike.index(family)]
        after = (family, number + 1, at + left - number - 1)
        todo = [after, *(one for one in todo if one[0] not in [*done, family])]
        todo = [one for one in todo if one[2] > 0]
    return outcome


def main(words: Sequence[str] | None = None) -> int:
    from attnkit.testing.fuzz import FAMILIES

    parser = argparse.ArgumentParser(prog="python -m attnkit.testing.fuzz", description=__doc__)
    parser.add_argument("families", nargs="*", default=list(FAMILIES), metavar="family", help=", ".join(FAMILIES))
    parser.add_argument("--calls", type=int, default=20_000, help="in all, shared out to the families")
    parser.add_argument("--seed", type=int, default=1, help="of each family's first call; the next has the next number")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(words)
    if unknown := [name for name in given.families if name not in FAMILIES]:
        parser.error(f"there is no family {unknown[0]!r}: name some of {', '.join(FAMILIES)}")
    if given.work:
        work(given.families, given.seed, given.calls)
        return 0
    each = -(-given.calls // len(given.families))
    command = [sys.executable, "-m", "attnkit.testing.fuzz"]
    outcome = watch(command, given.families, given.seed, each, speak=True)
    print("\n".join(outcome.lines()))
    print(f"attnkit: {each} calls a family from seed {given.seed}, {len(outcome.bad)} ended badly")
    return 1 if outcome.bad else 0


if __name__ == "__main__":
    sys.exit(main())
