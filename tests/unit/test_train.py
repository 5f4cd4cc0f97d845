"""Training: it learns, it repeats, every row gets the same batches, rates and parameters."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from attnkit.compare import rows, setups, tasks, train
from attnkit.compare.setups import Shape, Stage, TaskSetup, Training
from attnkit.compare.tasks import Batch, Exam
from attnkit.models.decoder import parameters

SHAPE = Shape(width=32, layers=2, heads=4, hidden=64, window=8, qk_norm=True)
TRAINING = Training((Stage(steps=30, rows=8, length=16, pairs=2), Stage(steps=10, rows=4, length=32, pairs=4)))
SETUP = TaskSetup(SHAPE, TRAINING, (Exam("recall", 16, 2), Exam("copy", 32, 8)), rows=16)


def nothing(done: float) -> None:
    pass


def layer(name: str) -> train.Layer:
    (row,) = rows.select([name])
    return row.layer


def curve(seed: int) -> tuple[tuple[int, float], ...]:
    """The losses of a short training."""
    model = train.build(layer("mha"), SHAPE, tasks.VOCABULARY, seed)
    batches = islice(tasks.lessons(8, 16, 2, seed), TRAINING.steps)
    return train.fit(model, batches, TRAINING, progress=nothing).curve


def test_a_training_repeats_with_its_seed_whatever_the_global_generator_did() -> None:
    first = curve(1)
    torch.rand(7)
    assert curve(1) == first
    assert curve(2) != first


def test_a_training_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    train.task(layer("mha"), SETUP, seed=1, progress=nothing)
    assert before.tolist() == torch.get_rng_state().tolist()


def test_what_was_trained_on_is_counted() -> None:
    told: list[float] = []
    result = train.task(layer("mha"), SETUP, seed=0, progress=told.append)
    assert result.tokens == TRAINING.tokens == 30 * 8 * 16 + 10 * 4 * 32
    assert len(told) == TRAINING.steps == 40
    assert told == sorted(told)
    assert told[-1] == 1.0
    assert [exam for exam, _ in result.points] == list(SETUP.exams)


def test_loss_falls_and_the_curve_ends_with_the_training() -> None:
    losses = curve(0)
    assert losses[-1][1] < losses[0][1]
    assert losses[-1][0] == TRAINING.steps * 8 * 16
    assert len(losses) <= train.CURVE_POINTS


@pytest.mark.parametrize("shape", [setups.quick().text.shape, setups.quick().tasks.shape], ids=["text", "tasks"])
def test_every_row_has_the_parameters_of_mha(shape: Shape) -> None:
    counts = {row.name: parameters(train.build(row.layer, shape, 2048, 0)) for row in rows.known()}
    assert all(abs(count - counts["mha"]) <= 0.005 * counts["mha"] for count in counts.values())


def test_rates_rise_then_fall_to_nothing() -> None:
    training = Training((Stage(100, 1, 1),), warmup=0.1, decay=0.5)
    rates = [train.rate(step, training) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:50] == [1.0] * 41
    assert rates[-1] == pytest.approx(0.02)
    assert rates == [*sorted(rates[:10]), *sorted(rates[10:], reverse=True)]


def test_linear_maps_go_to_muon_and_nothing_is_forgotten() -> None:
    model = train.build(layer("t5"), SHAPE, tasks.VOCABULARY, 0)
    muon, adamw = (
        {id(weight) for group in optimiser.param_groups for weight in group["params"]}
        for optimiser in train.optimisers(model, TRAINING)
    )
    assert not muon & adamw
    assert muon | adamw == {id(weight) for weight in model.parameters()}
    assert id(model.embedding.weight) in adamw
    assert all(id(block.mixer.t5_table) in adamw and id(block.mixer.q.weight) in muon for block in model.layers)


def test_judging_counts_only_what_is_asked() -> None:
    model = train.build(layer("mha"), SHAPE, tasks.VOCABULARY, 0)
    batch = Exam("recall", 16, 2).batch(torch.Generator().manual_seed(0), 4)
    nats, right = train.judge(model, batch)
    with torch.no_grad():
        chosen = model(batch.tokens).argmax(-1)
    asked = batch.targets != tasks.NOT_ASKED
    assert right == float((chosen[asked] == batch.targets[asked]).float().mean())
    _, all_right = train.judge(model, Batch(batch.tokens, batch.targets.where(~asked, chosen)))
    assert all_right == 1.0
    assert nats > 0


@pytest.mark.timeout(600)
def test_quick_tasks_are_learned() -> None:
    """What the quick set-up promises; half a minute on an idle core, and with more threads longer."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        result = train.task(layer("mha"), setups.quick().tasks, seed=0, progress=nothing)
    finally:
        torch.set_num_threads(threads)
    assert all(accuracy > 0.95 for _, accuracy in result.points)
