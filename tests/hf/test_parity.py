"""``attnkit parity`` finds what is planted, by name, and says nothing of a model that is right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from attnkit import parity
from attnkit.hf import masks
from attnkit.hf.attention import attention
from attnkit.parity import Verdict

WRONG = "wrong"


@pytest.fixture
def plant() -> Any:
    """Registers a wrong attention, made from ours by changing its arguments, as ``wrong``."""

    def planted(change: Callable[..., tuple[Any, ...]]) -> None:
        def broken(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> Any:
            k, v, mask = change(q, k, v, mask, kwargs)
            return attention(module, q, k, v, mask, **kwargs)

        AttentionInterface.register(WRONG, broken)
        AttentionMaskInterface.register(WRONG, masks.attention_mask)

    yield planted
    for interface in (AttentionInterface, AttentionMaskInterface):
        interface._global_mapping.pop(WRONG, None)


def scale_off(q: Tensor, k: Tensor, v: Tensor, mask: Any, kwargs: dict[str, Any]) -> tuple[Any, ...]:
    kwargs["scaling"] *= 1.01
    return k, v, mask


def found(family: str, backend: str, *caches: str) -> dict[str, list[parity.Finding]]:
    """What each check says of a tiny model."""
    by_name: dict[str, list[parity.Finding]] = {}
    for row in parity.run(parity.tiny(family), parity.plan([backend], caches)):
        by_name.setdefault(row.check.name, []).append(row.finding)
    return by_name


def test_a_scale_one_percent_off_is_found_in_the_first_layer(plant: Any) -> None:
    plant(scale_off)
    for name, findings in found("llama", WRONG, "dynamic").items():
        for finding in findings:
            assert finding.verdict is Verdict.CHANGED, name
            assert finding.layer == "model.layers.0"


def test_a_clean_model_is_within_rounding() -> None:
    for name, findings in found("gpt_oss", "attnkit", "dynamic", "static", "attnkit").items():
        assert {finding.verdict for finding in findings} <= {Verdict.SAME, Verdict.ROUNDING}, name
