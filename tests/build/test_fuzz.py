"""Random calls of every native kernel end in a right answer or a sentence; what does not is reported with its seed."""

from __future__ import annotations

import sys

import pytest

from attnkit import native
from attnkit.testing.fuzz import ANSWER, FAMILIES
from attnkit.testing.fuzz.__main__ import watch

pytestmark = pytest.mark.skipif(not native.STATUS.available, reason=native.STATUS.reason)
COMMAND = [sys.executable, "-m", "attnkit.testing.fuzz"]

# Places for a crash, a wrong answer, a refusal of two lines, an error that is no refusal; and a good family.
PLANTED = """
import os
import torch
from attnkit.testing import fuzz
from attnkit.testing.fuzz import __main__ as runner

def planted(rng):
    at = torch.initial_seed()
    if at == 3:
        os.kill(os.getpid(), 11)
    assert at != 5, "got 1, allowed 0"
    if at == 6:
        raise ValueError("one line\\nand another")
    if at == 7:
        raise RuntimeError("out of sorts")
    return fuzz.ANSWER

fuzz.FAMILIES |= {"planted": planted, "good": lambda rng: fuzz.ANSWER}
runner.main()
"""
FAULTY = [sys.executable, "-c", PLANTED]


def test_every_call_ends_in_an_answer_or_a_sentence(full: bool) -> None:
    outcome = watch(COMMAND, list(FAMILIES), 1, -(-20_000 // len(FAMILIES)) if full else 12)
    assert not outcome.bad, "\n".join(outcome.bad)
    for family in FAMILIES:
        assert outcome.counts[family, ANSWER] >= 3, f"{family} answered next to nothing: {outcome.lines()}"


@pytest.mark.parametrize("families", [["planted", "good"], ["good", "planted"]])
def test_what_ends_badly_is_reported_with_its_seed(families: list[str]) -> None:
    outcome = watch(FAULTY, families, 1, 9)
    seeds = [line.partition(":")[0] for line in outcome.bad]
    assert seeds == [f"planted seed {seed}" for seed in (3, 5, 6, 7)]
    assert "signal 11" in outcome.bad[0] and "allowed 0" in outcome.bad[1]
    assert "several lines" in outcome.bad[2] and "out of sorts" in outcome.bad[3]
    assert outcome.counts["planted", ANSWER] == 5 and outcome.counts["good", ANSWER] == 9
    assert outcome.lines()[-1] == "attnkit: 18 calls, 14 right answers, 0 refusals, 3 wrong, 1 signals or hangs"


def test_a_run_that_was_stopped_can_be_taken_up() -> None:
    first = watch(FAULTY, ["good"], 1, 9, seconds=0)
    assert first.next == 2 and first.counts["good", ANSWER] == 1
    rest = watch(FAULTY, ["good"], first.next, 8)
    assert rest.next == 10 and rest.counts["good", ANSWER] == 8
