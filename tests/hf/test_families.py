"""Every family of decoders says the same with our attention as with Transformers' own, or says why it does not run.

What each of them does is in the table of docs/families.md, which has to be what the checks find.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import StaticCache

import attnkit.hf
from attnkit.dispatch import watch
from attnkit.parity.families import FAMILIES
from attnkit.parity.forward import left_padded
from attnkit.parity.subject import float64_softmax
from attnkit.parity.support import reason_line, support, table_line
from attnkit.testing.budgets import assert_within

PAGE = Path(__file__).resolve().parents[2] / "docs" / "families.md"
# Families that do not call an attention function, and keep their own attention whatever is asked for.
OWN_ATTENTION = {"bloom", "falcon", "mpt"}
NO_ATTENTION = {"mamba2", "rwkv"}
REFUSED = {"deepseek_v4"}
# All of these but attention is float64 in a float64 model, so that nothing blurs the comparison.
EXACT = ("gpt2", "opt", "starcoder2", "stablelm")

IDS = torch.randint(3, 99, (2, 24), generator=torch.Generator().manual_seed(1))
KEPT = left_padded(IDS)


@cache
def lines() -> list[str]:
    return PAGE.read_text(encoding="utf-8").splitlines()


def test_the_table_is_what_the_checks_find(each_family: str) -> None:
    found = support(each_family)
    assert "**wrong**" not in found.words, found.reasons
    wanted = [table_line(found), *([reason] if (reason := reason_line(found)) else [])]
    missing = [line for line in wanted if line not in lines()]
    assert not missing, f"docs/families.md is out of date, run python docs/family_table.py: {missing}"


def test_the_table_has_every_family_once() -> None:
    assert [line.split()[1] for line in lines() if line.startswith("| ")][2:] == list(FAMILIES)


@torch.no_grad()
def test_our_attention_is_what_runs(each_family: str, tiny: Callable[..., Any]) -> None:
    if each_family in REFUSED:
        return
    model = tiny(each_family)
    model.set_attn_implementation("attnkit")
    with watch() as ran:
        model(IDS, attention_mask=KEPT, use_cache=False)
    own = each_family in OWN_ATTENTION | NO_ATTENTION
    assert {mechanism for mechanism, _ in ran} == (set() if own else {"softmax"})


@torch.no_grad()
@pytest.mark.parametrize("family", EXACT)
def test_nothing_but_rounding_differs_in_float64(family: str, tiny: Callable[..., Any]) -> None:
    """Float32 budgets hide what is smaller than rounding; here 1e-12 is all that is left."""

    def decoded(model: Any, held: Any) -> torch.Tensor:
        """A prefill, single tokens, then several at once; the window of 8 is passed on the way."""
        logits, start = [], 0
        for end in (15, *range(16, 21), 24):
            logits.append(model(IDS[:, start:end], attention_mask=KEPT[:, :end], cache=held, use_cache=True).logits)
            start = end
        return torch.cat(logits, 1)[KEPT.bool()]

    plain, ours = tiny(family, "eager"), tiny(family, "attnkit", torch.float64)
    naive = plain(IDS, attention_mask=KEPT, use_cache=False).logits[KEPT.bool()]
    with float64_softmax():
        gold = plain.to(torch.float64)(IDS, attention_mask=KEPT, use_cache=False).logits[KEPT.bool()]
    for held in (StaticCache(config=ours.config, max_cache_len=33), attnkit.hf.Cache(ours.config)):
        assert_within(decoded(ours, held), gold, naive, torch.float64, what=f"{family}, {type(held).__name__}")
    whole = ours(IDS, attention_mask=KEPT, use_cache=False).logits[KEPT.bool()]
    assert_within(whole, gold, naive, torch.float64, what=f"{family}, no cache")
