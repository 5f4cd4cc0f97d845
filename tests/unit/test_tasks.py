"""The generated tasks: every answer can be known from what came before, and nothing else is asked."""

from __future__ import annotations

import pytest
import torch

from attnkit.compare import setups, tasks
from attnkit.compare.tasks import KEYS, NOT_ASKED, VALUES, VOCABULARY, Batch, Exam

PAIRED = ("recall", "needle")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def asked(batch: Batch) -> list[list[int]]:
    """Places of each sequence where an answer counts."""
    return [row.nonzero().flatten().tolist() for row in batch.targets != NOT_ASKED]


@pytest.mark.parametrize("task", PAIRED)
@pytest.mark.parametrize(("length", "pairs"), [(4, 1), (32, 8), (33, 8), (64, 4), (128, 32)])
def test_every_fact_is_asked_for_once_and_was_stated_before(task: str, length: int, pairs: int) -> None:
    batch = Exam(task, length, pairs).batch(generator(), 20)
    assert batch.tokens.shape == batch.targets.shape == (20, length)
    for tokens, targets, places in zip(batch.tokens.tolist(), batch.targets.tolist(), asked(batch), strict=True):
        assert len(places) == pairs
        assert len({tokens[place] for place in places}) == pairs
        for place in places:
            stated = tokens.index(tokens[place])
            assert stated < places[0]
            assert tokens[stated + 1] == targets[place]


@pytest.mark.parametrize("pairs", [1, 3, 8, 31, 63])
def test_a_copy_repeats_and_only_the_repetition_counts(pairs: int) -> None:
    batch = Exam("copy", 128, pairs).batch(generator(), 20)
    for tokens, targets, places in zip(batch.tokens.tolist(), batch.targets.tolist(), asked(batch), strict=True):
        assert len(places) == (128 // (pairs + 1) - 1) * pairs
        for place in places:
            assert targets[place] == (tokens + [targets[-1]])[place - pairs]
        assert len(set(tokens[-pairs:])) == pairs


@pytest.mark.parametrize("task", ["recall", "needle", "copy"])
def test_inputs_are_the_targets_moved_by_one(task: str) -> None:
    batch = Exam(task, 64, 8).batch(generator(), 20)
    counts = batch.targets[:, :-1] != NOT_ASKED
    assert batch.targets[:, :-1][counts].tolist() == batch.tokens[:, 1:][counts].tolist()


def test_recall_can_ask_more_often_than_there_are_pairs() -> None:
    batch = tasks.recall(generator(), 20, 64, 4, asked=28)
    for tokens, targets, places in zip(batch.tokens.tolist(), batch.targets.tolist(), asked(batch), strict=True):
        assert len(places) == 28
        assert all(tokens[tokens.index(tokens[place]) + 1] == targets[place] for place in places)


def test_tokens_fit_the_vocabulary_and_kinds_do_not_mix() -> None:
    batch = Exam("recall", 64, 8).batch(generator(), 50)
    keys = batch.tokens[:, 1:17:2]
    values = batch.tokens[:, 2:18:2]
    assert 0 <= batch.tokens.min()
    assert batch.tokens.max() < VOCABULARY
    assert set(keys.flatten().tolist()).isdisjoint(values.flatten().tolist())


@pytest.mark.parametrize(("length", "pairs"), [(16, 2), (32, 8), (64, 16), (128, 32), (512, 64)])
def test_lessons_have_every_task_and_a_question_in_every_sequence(length: int, pairs: int) -> None:
    lessons = tasks.lessons(16, length, pairs, seed=1)
    for _, batch in zip(range(20), lessons, strict=False):
        assert batch.tokens.shape == (16, length)
        assert all(asked(batch))
        assert len(batch.tokens[:, 0].unique()) == 3


def test_lessons_repeat_with_their_seed() -> None:
    first, again, other = (next(tasks.lessons(8, 32, 8, seed)) for seed in (1, 1, 2))
    assert first.tokens.tolist() == again.tokens.tolist()
    assert first.targets.tolist() == again.targets.tolist()
    assert first.tokens.tolist() != other.tokens.tolist()


def test_lessons_leave_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    next(tasks.lessons(8, 32, 8, 0))
    assert before.tolist() == torch.get_rng_state().tolist()


@pytest.mark.parametrize(
    ("task", "length", "pairs", "message"),
    [
        ("sort", 64, 4, "task is 'sort', expected one of recall, copy, needle"),
        ("recall", 64, 17, "length 64, expected at least 68 for 17 pairs"),
        ("needle", 15, 4, "length 15, expected at least 16 for 4 pairs"),
        ("copy", 64, 32, "length 64, expected at least 66 for 32 pairs"),
        ("recall", 64, 0, f"0 pairs, expected 1 to {KEYS}"),
        ("needle", 512, KEYS + 1, f"{KEYS + 1} pairs, expected 1 to {KEYS}"),
        ("copy", 999, KEYS + VALUES + 1, f"{KEYS + VALUES + 1} pairs, expected 1 to {KEYS + VALUES}"),
    ],
)
def test_an_impossible_exam_is_refused(task: str, length: int, pairs: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Exam(task, length, pairs)


@pytest.mark.parametrize("setup", [setups.quick(), setups.full()], ids=["quick", "full"])
def test_exams_ask_nothing_longer_than_what_was_trained(setup: setups.Setup) -> None:
    longest = max(stage.length for stage in setup.tasks.training.stages)
    assert max(exam.length for exam in setup.tasks.exams) == longest
    assert {exam.task for exam in setup.tasks.exams} == {"recall", "copy", "needle"}
