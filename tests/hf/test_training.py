"""A model that trains through the plug-in learns what it learns without: the same losses, step by step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainingArguments

import attnkit.hf
from attnkit.dispatch import watch
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
