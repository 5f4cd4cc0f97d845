"""Every law on every lane: each mechanism of the registry, each of its backends, each CPU level of this machine."""

from __future__ import annotations

import pytest
import torch

from attnkit.registry import mechanisms
from attnkit.spec import Backend
from attnkit.testing import Lane, lanes
from attnkit.testing.laws import LAWS, Law

LANES = [lane for spec in mechanisms().values() for lane in lanes(spec)]
PAIRS = [(lane, law) for lane in LANES for law in LAWS.values() if law.applies(lane.mechanism, lane.backend)]
# What a backend declares that it never runs: these laws then try nothing on it, and only on it. No native kernel has
# double precision.
REFUSED = {
    "cpu": {"definition_in_double_precision"},
    # Intervals are all it takes; tests/contract/test_mla_native.py repeats calls and hides keys with those.
    "mla-cpu": {"deterministic", "documents", "empty_rows", "neutral_features", "padding"},
    "softmax-sdpa": {"parts_merge", "dropout"},
    "softmax-flex": {"definition_in_double_precision", "parts_merge", "dropout", "gradients"},
}


@pytest.mark.parametrize(("lane", "law"), PAIRS, ids=[f"{lane}-{law.name}" for lane, law in PAIRS])
def test_law(lane: Lane, law: Law, full: bool) -> None:
    examples = law.full if full else law.examples
    # Uncompiled FlexAttention makes a mask afresh for every size, and the definition is what results are judged by.
    if lane.backend in ("flex", "reference"):
        examples = min(examples, 80 if full else 8)
    tried = 0
    with lane.entered():
        for seed in range(examples):
            torch.manual_seed(seed)
            try:
                tried += law(lane.mechanism, lane.backend, seed)
            except AssertionError as error:
                raise AssertionError(f"{lane} breaks {law.name} with seed {seed}: {error}") from error
    refused = (REFUSED.get(name, set()) for name in (lane.backend, f"{lane.mechanism.name}-{lane.backend}"))
    never = law.name in set().union(*refused)
    # Of many calls one may be drawn that such a backend takes.
    assert bool(tried) != never or (full and never), f"{law.name} tried {tried} of {examples} calls on {lane}"


@pytest.mark.parametrize("name", mechanisms())
def test_reference_is_last_and_refuses_nothing(name: str) -> None:
    spec = mechanisms()[name]
    last = spec.backends[-1]
    assert last.name == "reference"
    assert last.load() is spec.reference
    assert last.rejects is Backend("any", last.load).rejects


@pytest.mark.parametrize("name", mechanisms())
def test_reference_gradcheck(name: str) -> None:
    """Analytic against numerical gradients in float64, of every floating argument of a small call.

    Of a hard choice only that of the values is a derivative.
    """
    from attnkit.testing.runs import tensors

    spec = mechanisms()[name]
    from attnkit.spec import Sizes

    arguments = spec.sample(0, Sizes(b=1, h=2, g=1, m=3, n=3, d=2, e=3), torch.float64)
    names = tensors(arguments) if spec.laws.soft else ["v"]
    leaves = {key: arguments[key].requires_grad_() for key in names}

    def run(*values: torch.Tensor) -> torch.Tensor:
        return spec.reference(**spec.call(**{**arguments, **dict(zip(leaves, values, strict=True))}))

    assert torch.autograd.gradcheck(run, tuple(leaves.values()))
