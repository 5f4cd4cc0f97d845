"""Make the calls: ``python -m attnkit.testing.fuzz [--calls 20000] [--seed 1] [--minutes 5] [family ...]``.

A process of its own makes them and names each before it starts, so that one which ends in a signal, or does not end at
all, is reported with its seed; another process then goes on with the next. Each seed is a call of every family: a run
that was stopped goes on with the seed it names.
"""

from __future__ import annotations

import argparse
import faulthandler
import math
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

MOST_SECONDS = 60
"""Of one call."""
BETWEEN_SIGNS_OF_LIFE = 10.0
WORDS = {"answer": "right answers", "refusal": "refusals", "mistake": "wrong", "crash": "signals or hangs"}


@dataclass
class Outcome:
    """How many calls of each family ended how, a line for each that ended badly, and the seed that comes next."""

    next: int
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """A line for each family, and one for all."""
        families = dict.fromkeys(family for family, _ in self.counts)
        return [self._line(family, [family]) for family in families] + [self._line("attnkit", list(families))]

    def _line(self, name: str, families: Sequence[str]) -> str:
        found = {word: sum(self.counts[family, word] for family in families) for word in WORDS}
        return f"{name}: {sum(found.values())} calls, " + ", ".join(f"{found[word]} {WORDS[word]}" for word in WORDS)


def work(families: Sequence[str], seed: int, calls: int, skip: int) -> None:
    """Make the calls in this process, a line before and after each; the first ``skip`` families had the first seed."""
    from attnkit.testing.fuzz import attempt

    faulthandler.enable()
    for number in range(seed, seed + calls):
        for family in families[skip if number == seed else 0 :]:
            print("try", family, number, flush=True)
            faulthandler.dump_traceback_later(MOST_SECONDS, exit=True)
            try:
                said = attempt(family, number)
            except Exception as error:
                said = "bad " + " ".join(f"{type(error).__name__}: {error}".split())
            faulthandler.cancel_dump_traceback_later()
            print(said, flush=True)


def watch(
    command: Sequence[str],
    families: Sequence[str],
    seed: int,
    calls: int,
    *,
    seconds: float = math.inf,
    speak: bool = False,
) -> Outcome:
    """Run ``command`` with ``--work`` and what to do until every family had its ``calls``, or the time is over."""
    outcome, started, spoke, skip = Outcome(seed), time.monotonic(), time.monotonic(), 0

    def report(line: str) -> None:
        outcome.bad.append(line)
        print(line, flush=True)

    while outcome.next < seed + calls:
        left = seed + calls - outcome.next
        given = ["--work", "--seed", str(outcome.next), "--calls", str(left), "--skip", str(skip), *families]
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
                report(f"{now[0]} seed {now[1]}: {line.strip()[4:]}")
            skip, now = (skip + 1) % len(families), None
            outcome.next += skip == 0
            if skip == 0 and time.monotonic() - started > seconds:
                process.kill()
                process.communicate()
                return outcome
            if speak and time.monotonic() - spoke > BETWEEN_SIGNS_OF_LIFE:
                spoke = time.monotonic()
                print(f"{outcome.counts.total()} of {calls * len(families)} calls, {spoke - started:.0f} s", flush=True)
        why = process.stderr.read().strip()
        if process.wait() == 0:
            break
        if now is None:
            raise RuntimeError(f"the fuzzing process ended with {process.returncode} before a call: {why}")
        family, number = now
        ended = f"signal {-process.returncode}" if process.returncode < 0 else f"exit {process.returncode}: {why}"
        outcome.counts[family, "crash"] += 1
        report(f"{family} seed {number}: ended its process with {ended}")
        skip = (skip + 1) % len(families)
        outcome.next += skip == 0
    return outcome


def main(words: Sequence[str] | None = None) -> int:
    from attnkit.testing.fuzz import FAMILIES

    parser = argparse.ArgumentParser(prog="python -m attnkit.testing.fuzz", description=__doc__)
    parser.add_argument("families", nargs="*", default=list(FAMILIES), metavar="family", help=", ".join(FAMILIES))
    parser.add_argument("--calls", type=int, default=20_000, help="in all, shared out to the families")
    parser.add_argument("--seed", type=int, default=1, help="of each family's first call; the next has the next number")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after these, and say which seed is next")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--skip", type=int, default=0, help=argparse.SUPPRESS)
    given = parser.parse_args(words)
    if unknown := [name for name in given.families if name not in FAMILIES]:
        parser.error(f"there is no family {unknown[0]!r}: name some of {', '.join(FAMILIES)}")
    if given.work:
        work(given.families, given.seed, given.calls, given.skip)
        return 0
    each = -(-given.calls // len(given.families))
    command = [sys.executable, "-m", "attnkit.testing.fuzz"]
    outcome = watch(command, given.families, given.seed, each, seconds=60 * given.minutes, speak=True)
    print("\n".join(outcome.lines()))
    left = given.seed + each - outcome.next
    if left:
        print(f"attnkit: stopped, go on with --seed {outcome.next} --calls {left * len(given.families)}")
    return 1 if outcome.bad else 0


if __name__ == "__main__":
    sys.exit(main())
