"""A model that trains through the plug-in learns what it learns without: the same losses, step by step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainingArguments

import attnkit.hf
from attnkit.dispatch import watch
from attnkit.mechanisms.softmax import softmax_attention
from attnkit.testing.budgets import assert_within

IDS = torch.randint(3, 99, (3, 24), generator=torch.Generator().manual_seed(1))
KEPT = torch.ones_like(IDS)
KEPT[0, :9] = 0
WANTED = IDS[:, 1:].masked_fill(KEPT[:, :-1] == 0, -100)  # what follows padding is no token's guess


def losses(model: Any, steps: int) -> Tensor:
    """Of a padded batch that is learned by heart, before each step."""
    model.train()
    # Small steps: with ones of 0.2 the loss leaps about, and a rounding of the first grows to 1e-2 within twenty.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        logits = model(IDS, attention_mask=KEPT, use_cache=False).logits[:, :-1]
        loss = cross_entropy(logits.flatten(0, 1), WANTED.flatten())  # the model's own would be float32
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    return torch.stack(found)


@pytest.mark.parametrize(
    ("family", "steps"),
    [("llama", 100), ("gemma2", 20), ("gpt_oss", 20), ("deepseek_v3", 20), ("minimax", 20), ("qwen3_next", 20)],
)
def test_losses_are_those_of_eager_attention(
    family: str, steps: int, tiny: Callable[..., Any], softmax_in_float64: None
) -> None:
    naive = losses(tiny(family), steps)
    gold = losses(tiny(family).double(), steps)
    model = tiny(family, "attnkit")
    if family in ("deepseek_v3", "minimax", "qwen3_next"):
        attnkit.hf.accelerate(model)
    with watch() as ran:
        found = losses(model, steps)
    assert ran and gold[-1] < gold[0] - 1
    assert_within(found, gold, naive, torch.float32, what=family)


def test_attention_dropout_runs_natively_and_replays(tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The seed of each call comes from torch's generator: the definition draws the same, and so does a checkpoint."""

    def learn(model: Any) -> Tensor:
        for module in model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.3
        torch.manual_seed(5)
        return losses(model, 10)

    with watch() as ran:
        found = learn(tiny("llama", "attnkit"))
    assert set(ran) == {("softmax", "cpu")}
    model = tiny("llama", "attnkit")
    model.gradient_checkpointing_enable({"use_reentrant": False})  # its newer name is not in 5.23
    assert found.equal(learn(model))
    assert not found.equal(losses(tiny("llama", "attnkit"), 10))
    monkeypatch.setattr(attnkit.hf.attention, "softmax_attention", partial(softmax_attention, backend="reference"))
    gold, naive = learn(tiny("llama", "attnkit").double()), learn(tiny("llama", "attnkit"))
    assert_within(found, gold, naive, torch.float32, what="loss")


def trained(model: Any, folder: Path, steps: int) -> Tensor:
    """The loss that ``Trainer`` minimises, at each step over four texts in batches of two."""
    texts = torch.randint(3, 99, (4, 24), generator=torch.Generator().manual_seed(2))
    data = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in texts]
    found = []

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        made = cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        found.append(made.detach())
        return made

    settings = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=0.05,
        lr_scheduler_type="constant",
        optim="sgd",
        use_cpu=True,
        disable_tqdm=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
    )
    Trainer(model, settings, train_dataset=data, compute_loss_func=loss).train()
    return torch.stack(found)


def test_trainer_has_the_losses_of_sdpa(tiny: Callable[..., Any], tmp_path: Path) -> None:
    naive = trained(tiny("llama", "sdpa"), tmp_path, 100)
    gold = trained(tiny("llama", "sdpa").double(), tmp_path, 100)
    with watch() as ran:
        found = trained(tiny("llama", "attnkit"), tmp_path, 100)
    assert set(ran) == {("softmax", "cpu")} and len(found) == 100 and gold[-1] < gold[0] - 1
    assert_within(found, gold, naive, torch.float32, what="loss")
