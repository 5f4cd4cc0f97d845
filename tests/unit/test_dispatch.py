"""The one chooser: order, reasons, no fallback, and ``explain`` that computes nothing."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch

import attnkit
from attnkit import dispatch
from attnkit.registry import get
from attnkit.spec import Backend, Mechanism
from attnkit.testing import samplers

SPEC = get("softmax")


def mechanism(*backends: Backend) -> Mechanism:
    return dataclasses.replace(SPEC, name="toy", backends=backends)


def backend(name: str, rejects: tuple[str, ...] = (), declines: tuple[str, ...] = ()) -> Backend:
    return Backend(name, lambda: lambda **call: name, lambda call: rejects, lambda call: declines)


def test_the_first_without_reasons_runs() -> None:
    spec = mechanism(backend("a", ("no",)), backend("b", declines=("slow",)), backend("c"), backend("d"))
    chosen, decision = dispatch.decide(spec, {})
    assert chosen.name == decision.chosen == "c"
    assert decision.rejected == {"a": ("no",), "b": ("slow",)}
    assert str(decision) == "toy: c runs\n  a: no\n  b: slow"
    assert dispatch.run(spec, {}) == "c"


def test_a_named_backend_runs_or_raises() -> None:
    spec = mechanism(backend("a", ("size is 3, at most 2", "no luck")), backend("b", declines=("slow",)), backend("c"))
    assert dispatch.run(spec, {}, "b") == "b"  # declining is only for those who did not ask
    with pytest.raises(NotImplementedError, match=r"a: size is 3, at most 2; no luck"):
        dispatch.run(spec, {}, "a")
    with pytest.raises(ValueError, match="toy has no backend 'z': name one of a, b, c"):
        dispatch.run(spec, {}, "z")


def test_nothing_can_run() -> None:
    with pytest.raises(NotImplementedError, match="no backend can run this"):
        dispatch.run(mechanism(backend("a", ("no",))), {})


def test_explain_computes_nothing_and_agrees_with_run() -> None:
    q = torch.randn(1, 2, 5, 8)
    decision = attnkit.explain(attnkit.softmax_attention, q.double(), q.double(), q.double())
    assert decision.chosen == "sdpa"
    assert "dtype is torch.float64" in decision.rejected["cpu"][0]
    refused = attnkit.explain(attnkit.softmax_attention, q, q, q, softcap=3.0, backend="sdpa")
    assert refused.chosen is None
    assert refused.rejected["sdpa"] == ("softcap is 3.0, torch SDPA has none",)
    meta = torch.zeros(1, 2, 5, 8, device="meta")
    assert attnkit.explain(attnkit.softmax_attention, meta, meta, meta).chosen == "sdpa"
    with pytest.raises(TypeError, match="explain got relu, expected the function of a mechanism"):
        attnkit.explain(torch.relu, q)


@pytest.mark.parametrize("feature", [None, *samplers.features(SPEC)])
def test_automatic_choice_is_never_a_refused_one(feature: str | None) -> None:
    """And what is chosen is what runs: every backend's entry is replaced by one that says its name."""
    import random

    named = dataclasses.replace(
        SPEC,
        backends=tuple(dataclasses.replace(b, load=lambda b=b: lambda **call: b.name) for b in SPEC.backends),
    )
    for seed in range(10):
        only = () if feature is None else (feature,)
        call = SPEC.call(**samplers.arguments(SPEC, random.Random(seed), only=only))
        chosen, _ = dispatch.decide(named, call)
        assert chosen.rejects(call) == ()
        assert dispatch.run(named, call) == chosen.name
        for other in named.backends:
            if not other.rejects(call):
                assert dispatch.run(named, call, other.name) == other.name


def test_reasons_have_values() -> None:
    x = torch.zeros(1, 1, 3, 600)
    call = SPEC.call(x, x, x, dropout=0.5)
    assert "key size is 600, the native kernel takes 1 to 576" in SPEC.backend("cpu").rejects(call)
    assert any("dropout is 0.5" in reason for reason in SPEC.backend("sdpa").rejects(call))


def run_with(environment: dict[str, str], body: str) -> subprocess.CompletedProcess[str]:
    import os

    return subprocess.run(
        [sys.executable, "-c", body],
        env={**os.environ, **environment}, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def test_environment_names_the_default_backend() -> None:
    body = "import torch, attnkit; x = torch.ones(1, 1, 2, 2); attnkit.softmax_attention(x, x, x)"
    done = run_with({"ATTNKIT_BACKEND": "reference", "ATTNKIT_LOG": "info"}, body)
    assert done.returncode == 0, done.stderr
    assert "softmax: reference runs" in done.stderr
    assert "no backend 'nonsense'" in run_with({"ATTNKIT_BACKEND": "nonsense"}, body).stderr
    assert "ATTNKIT_LOG is 'LOUD'" in run_with({"ATTNKIT_LOG": "loud"}, body).stderr
    assert "ATTNKIT_CPU_LEVEL is 'v9', expected one of" in run_with({"ATTNKIT_CPU_LEVEL": "v9"}, body).stderr
