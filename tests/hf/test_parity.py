"""``attnkit parity`` finds what is planted, by name, and says nothing of a model that is right."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

import attnkit
from attnkit import parity
from attnkit.hf import masks
from attnkit.hf.attention import attention
from attnkit.masks.patterns import Interval
from attnkit.parity import Verdict
from attnkit.parity.families import FAMILIES
from attnkit.state import codec

WRONG = "wrong"
RIGHT = {Verdict.SAME, Verdict.ROUNDING, Verdict.NOTHING}
# Small, and of every kind: full, windows, chunks, sinks, soft-cap, latent, experts, linear layers beside full ones.
CLEAN = ("llama", "mistral", "gemma2", "gpt_oss", "deepseek_v2", "llama4_text", "mixtral", "qwen3_next", "gpt2", "phi3")


def carried(mask: Any, pattern: Any) -> Any:
    return masks.CarriedMask(pattern, tuple(mask.shape), mask.keys, mask.device, None)


def wider(mask: Any) -> Any:
    left, right = mask.mask.interval() or (None, None)
    return mask if left is None or mask.window is None else carried(mask, Interval(left + 1, right))


def change(kind: str, q: Tensor, k: Tensor, v: Tensor, mask: Any, kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """The arguments with one of the mistakes that wrappers really make."""
    match kind:
        case "sinks dropped":
            kwargs["s_aux"] = torch.full_like(kwargs["s_aux"], -torch.inf)
        case "window off by one":
            kwargs["sliding_window"], mask = None, wider(mask)
        case "scale 1 % off":
            kwargs["scaling"] *= 1.01
        case "heads tiled":
            k, v = (x.repeat(1, q.shape[1] // k.shape[1], 1, 1) for x in (k, v))
        case "mask missing":
            kwargs["sliding_window"], mask = None, carried(mask, attnkit.causal())
        case "softcap dropped":
            kwargs["softcap"] = None
        case "NaN for a query that sees nothing":
            pass
    return k, v, mask


@pytest.fixture
def plant() -> Iterator[Callable[[str], None]]:
    """Registers our attention with a mistake in it as ``wrong``."""

    def planted(kind: str) -> None:
        def broken(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> Any:
            k, v, mask = change(kind, q, k, v, mask, kwargs)
            o = attention(module, q, k, v, mask, **kwargs)[0]
            return (o / (o != 0) if kind.startswith("NaN") else o), None

        AttentionInterface.register(WRONG, broken)
        if kind != "no mask function":
            AttentionMaskInterface.register(WRONG, masks.attention_mask)

    yield planted
    for interface in (AttentionInterface, AttentionMaskInterface):
        interface._global_mapping.pop(WRONG, None)


def found(family: str, backend: str, *caches: str, seed: int = 0) -> dict[str, list[parity.Finding]]:
    """What each check says of a tiny model."""
    by_name: dict[str, list[parity.Finding]] = {}
    for row in parity.run(parity.tiny(family, seed=seed), parity.plan([backend], caches)):
        by_name.setdefault(row.check.name, []).append(row.finding)
    return by_name


@pytest.mark.parametrize(
    ("kind", "family", "check", "says"),
    [
        ("sinks dropped", "gpt_oss", "attention", "the sinks are dropped"),
        ("window off by one", "mistral", "attention", "the window is one wider"),
        ("window off by one", "mistral", "window edges", "sees 9 keys where it has to see 8"),
        ("scale 1 % off", "llama", "attention", "the scale is 1.01 times what it has to be"),
        ("heads tiled", "llama", "attention", "KV heads are tiled where each has to be repeated"),
        ("mask missing", "llama", "attention", "the mask is missing but for being causal"),
        ("mask missing", "llama", "visible keys", "query 6 sees key 0"),
        ("no mask function", "llama", "visible keys", "query 6 sees key 0"),
        ("softcap dropped", "gemma2", "attention", "the soft-cap is dropped"),
        ("NaN for a query that sees nothing", "llama", "fully masked rows", "NaN or infinity"),
    ],
)
def test_a_planted_fault_is_found_and_named(plant: Any, kind: str, family: str, check: str, says: str) -> None:
    plant(kind)
    chosen = [one for one in parity.CHECKS if one.name == check]
    (row,) = parity.run(parity.tiny(family), parity.plan([WRONG], ["dynamic"], chosen))
    assert row.finding.verdict is Verdict.CHANGED
    assert says in row.finding.says
    assert row.finding.layer == "model.layers.0.self_attn"


def test_a_scale_one_percent_off_is_seen_by_every_check_of_tensors(plant: Any) -> None:
    plant("scale 1 % off")
    findings = found("llama", WRONG, "dynamic")
    for name in ("layers", "left padding", "right padding", "packed", "alone", "chunked prefill", "decode"):
        (finding,) = findings[name]
        assert (finding.verdict, finding.layer) == (Verdict.CHANGED, "model.layers.0"), name
    (gradients,) = findings["gradients"]  # which go backwards
    assert (gradients.verdict, gradients.layer) == (Verdict.CHANGED, "lm_head.weight")


def test_text_that_reads_otherwise_is_seen(plant: Any) -> None:
    plant("heads tiled")
    findings = found("llama", WRONG, "dynamic")
    for name in ("text", "text through the cache", "greedy"):
        assert findings[name][0].verdict is Verdict.CHANGED, name


@pytest.mark.parametrize("family", CLEAN)
def test_a_clean_model_raises_no_alarm(family: str, full: bool) -> None:
    """20 random runs in all, or 20 of each family."""
    for seed in range(1, 21 if full else 3):
        for name, findings in found(family, "attnkit", "attnkit", seed=seed).items():
            for finding in findings:
                assert finding.verdict in RIGHT, f"seed {seed}, {name}: {finding.says}"


def test_the_implementation_compared_with_is_the_same_as_itself() -> None:
    for name, findings in found("gemma2", "eager", "dynamic", "static").items():
        assert {f.verdict for f in findings} <= RIGHT, name
    assert found("llama", "eager", "dynamic")["layers"][0].verdict is Verdict.SAME


@pytest.mark.parametrize(
    ("family", "verdict", "says"),
    [
        ("bloom", Verdict.NOTHING, "has its own attention"),
        ("deepseek_v4", Verdict.REFUSED, "computes cat with its attention mask"),
        ("mamba2", Verdict.NOTHING, "calls no attention function"),
    ],
)
def test_what_cannot_be_compared_says_why(family: str, verdict: Verdict, says: str) -> None:
    chosen = [one for one in parity.CHECKS if one.name == "attention"]
    (row,) = parity.run(parity.tiny(family), parity.plan(["attnkit"], ["dynamic"], chosen))
    assert row.finding.verdict is verdict
    assert says in row.finding.says


def test_an_implementation_that_crashes_has_no_output(plant: Any) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise IndexError("past the end")

    AttentionInterface.register(WRONG, broken)
    AttentionMaskInterface.register(WRONG, masks.attention_mask)
    for name, findings in found("llama", WRONG, "dynamic").items():
        if name != "window edges":
            assert findings[0].verdict is Verdict.CHANGED and "past the end" in findings[0].says, name


def test_every_family_can_be_named() -> None:
    assert len(FAMILIES) >= 63 and list(FAMILIES) == sorted(FAMILIES)


CODED = {"chunked prefill", "decode", "text through the cache", "greedy"}


def coded(family: str, *caches: str) -> dict[str, list[parity.Finding]]:
    """What the checks of caches say of our attention with quantised ones."""
    checks = [check for check in parity.CHECKS if check.name in CODED]
    found: dict[str, list[parity.Finding]] = {}
    for row in parity.run(parity.tiny(family), parity.plan(["attnkit"], caches, checks)):
        found.setdefault(row.check.name, []).append(row.finding)
    assert found.keys() == CODED
    return found


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "qwen3_next"])
def test_a_right_quantised_cache_raises_no_alarm(family: str) -> None:
    for name, findings in coded(family, "int8", "fp8", "int4").items():
        for finding in findings:
            assert finding.verdict in RIGHT, (name, finding)


def test_a_quantised_cache_that_loses_more_than_its_form_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """int8 of which only six bits are used, and int4 of which two."""
    scaled, affine = codec.encode_scaled, codec.encode_affine
    monkeypatch.setattr(codec, "encode_scaled", lambda form, x: (scaled(form, x)[0] & 252, scaled(form, x)[1]))
    monkeypatch.setattr(codec, "encode_affine", lambda x, dim: (*affine(x, dim)[:2], affine(x, dim)[2] & 12))
    found = coded("llama", "int8", "int4")
    for name in ("decode", "text through the cache"):
        assert [finding.verdict for finding in found[name]] == [Verdict.CHANGED] * 2, found[name]
