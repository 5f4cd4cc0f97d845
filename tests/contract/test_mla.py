"""Latent attention: nested loops, absorbed against expanded, its limit (GQA), golden numbers, DeepSeek's models."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import attnkit
from attnkit import native
from attnkit.dispatch import watch
from attnkit.mechanisms.mla import MLAConfig, MLAttention, mla_attention
from attnkit.positions import Rotary, YaRN
from attnkit.registry import get
from attnkit.spec import Sizes
from attnkit.state import LatentState
from attnkit.testing.budgets import assert_within

FORMS = ("absorbed", "expanded", "reference")
V3 = MLAConfig(
    7168, 128, latent=512, query_latent=1536, nope_size=128, rope_size=64, value_size=128,
    rotary=Rotary(64, style="interleaved", scaling=YaRN(40.0, 4096, mscale=1.0, mscale_all=1.0)),
)  # fmt: skip


def sampled(n: int, m: int | None = None, **sizes: int) -> dict[str, Any]:
    size = {"b": 2, "h": 4, "g": 1, "m": m or n, "n": n, "d": 7, "e": 3, **sizes}
    return get("mla").sample(n, Sizes(**size), torch.float64)


def by_loops(q: Tensor, latent: Tensor, kv_b: Tensor, mask: attnkit.Mask, scale: float) -> Tensor:
    """One pair at a time, each key made anew from its latent."""
    (b, h, m, d), (_, g, n, w), c = q.shape, latent.shape, kv_b.shape[2]
    nope = d - (w - c)
    sees, o = mask.dense(m, n), q.new_zeros(b, h, m, kv_b.shape[1] - nope)
    for batch in range(b):
        for head in range(h):
            to_key, to_value = kv_b[head, :nope], kv_b[head, nope:]
            for i in range(m):
                rows = [latent[batch, head // (h // g), j] for j in range(n) if sees[0, 0, i, j]]
                query = q[batch, head, i]
                logits = [query[:nope] @ (to_key @ row[:c]) + query[nope:] @ row[c:] for row in rows]
                weights = (torch.stack(logits) * scale).softmax(0)
                o[batch, head, i] = weights @ torch.stack([to_value @ row[:c] for row in rows])
    return o


@pytest.mark.parametrize("backend", FORMS)
@pytest.mark.parametrize(("m", "g"), [(1, 1), (4, 2), (9, 1), (9, 4)])
def test_equals_nested_loops(backend: str, m: int, g: int) -> None:
    inputs = sampled(9, m, g=g)
    found = mla_attention(**inputs, scale=0.6, backend=backend)
    assert (found - by_loops(**inputs, scale=0.6)).abs().max() < 1e-12


@pytest.mark.parametrize("mask", [attnkit.causal(), attnkit.window(5), None])
@pytest.mark.parametrize("m", [1, 3, 40])
def test_absorbed_equals_expanded_with_gradients(
    monkeypatch: pytest.MonkeyPatch, mask: attnkit.Mask | None, m: int
) -> None:
    """In float64, in blocks of three queries."""
    from attnkit.mechanisms.mla import absorbed

    monkeypatch.setattr(absorbed, "LOGITS", 3 * 2 * 4 * 40)
    inputs = sampled(40, m, g=2) | {"mask": mask}
    leaves = {name: inputs[name].requires_grad_() for name in ("q", "latent", "kv_b")}
    one, two = (mla_attention(**inputs, backend=backend) for backend in ("absorbed", "expanded"))
    assert (one - two).abs().max() < 1e-12
    direction = torch.randn_like(one)
    slopes, exact = (torch.autograd.grad(o, list(leaves.values()), direction) for o in (one, two))
    for name, found, true in zip(leaves, slopes, exact, strict=True):
        assert (found - true).abs().max() < 1e-11, name


@pytest.mark.parametrize("m", [1, 3, 12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_576_run_on_the_kernels(m: int, dtype: torch.dtype) -> None:
    """DeepSeek's sizes, few queries and many, against the definition."""
    inputs = get("mla").sample(0, Sizes(b=1, h=6, g=1, m=m, n=70, d=192, e=128), torch.float64)
    generator = torch.Generator().manual_seed(m)
    inputs["latent"] = torch.randn(1, 1, 70, 576, generator=generator, dtype=torch.float64)
    inputs["kv_b"] = torch.randn(6, 256, 512, generator=generator, dtype=torch.float64) * 512**-0.5
    inputs = {name: x.to(dtype) if isinstance(x, Tensor) else x for name, x in inputs.items()}
    with watch() as ran:
        found = mla_attention(**inputs, backend="absorbed")
    assert ("softmax", "cpu") in ran or not native.STATUS.available
    exact = {name: x.double() if isinstance(x, Tensor) else x for name, x in inputs.items()}
    naive = mla_attention(**inputs, backend="reference")
    assert_within(found, mla_attention(**exact, backend="reference"), naive, dtype)


@pytest.mark.parametrize("backend", FORMS)
def test_keys_and_values_as_latents_are_grouped_query_attention(backend: str) -> None:
    """Maps that pick a group's key and value out of a latent that holds them all."""
    g, h, n, d = 2, 4, 11, 3
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, h, n, d, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, 2, g, n, d, generator=generator, dtype=torch.float64)
    latent = torch.cat([*k.unbind(1), *v.unbind(1)], -1)[:, None]
    kv_b = torch.zeros(h, 2 * d, 2 * g * d, dtype=torch.float64)
    for head in range(h):
        group = head // (h // g)
        kv_b[head, :d, group * d : (group + 1) * d] = torch.eye(d)
        kv_b[head, d:, (g + group) * d : (g + group + 1) * d] = torch.eye(d)
    found = mla_attention(q, latent, kv_b, mask=attnkit.causal(), backend=backend)
    assert (found - attnkit.softmax_attention(q, k, v, mask=attnkit.causal())).abs().max() < 1e-12


def test_the_form_is_the_one_with_fewer_multiply_adds() -> None:
    latent, kv_b = torch.zeros(1, 1, 400, 40), torch.zeros(2, 16, 36)
    native_form = "cpu" if native.STATUS.available else "absorbed"
    for m, dtype, form in (
        (1, torch.float32, native_form),
        (1, torch.float64, "absorbed"),
        (400, torch.float32, "expanded"),
    ):
        q = torch.zeros(1, 2, m, 12, dtype=dtype)
        decision = attnkit.explain(mla_attention, q, latent.to(dtype), kv_b.to(dtype))
        assert decision.chosen == form, decision
    assert "400 queries of 400 latents take" in decision.rejected["absorbed"][0]


def test_golden_numbers_of_deepseek() -> None:
    """Scales of the logits, YaRN's frequencies, sizes of states."""
    v2 = YaRN(40.0, 4096, mscale=0.707, mscale_all=0.707)
    assert V3.logit_scale == pytest.approx(0.1352337789, abs=1e-10)
    assert 192**-0.5 * v2.logit_factor == pytest.approx(0.1147213868, abs=1e-10)
    assert V3.rotary is not None and V3.rotary.scaling is not None
    assert V3.rotary.scaling.attention_factor == v2.attention_factor == 1.0
    wanted = [1, 0.1, 0.0562341325, 0.0390069266, 0.0055, 0.000177827941, 3.33380358e-05, 3.33380358e-06]
    assert V3.rotary.frequencies()[[0, 8, 10, 11, 16, 22, 23, 31]].tolist() == pytest.approx(wanted, rel=1e-8)
    with torch.device("meta"):
        layer = MLAttention(V3)
    state = layer.state(2, 100, dtype=torch.bfloat16, device="meta")
    assert isinstance(state, LatentState)
    assert state.nbytes == 2 * 100 * 576 * 2
    assert layer.cost(1, 100, dtype=torch.bfloat16).state_bytes(100) == 100 * 576 * 2
    assert 61 * layer.cost(1, 1, dtype=torch.bfloat16).state_bytes_per_token == 70_272


@pytest.mark.parametrize("backend", ["absorbed", "expanded"])
def test_training_keeps_no_square(backend: str) -> None:
    """Nothing that autograd keeps for the backward grows faster than the input."""
    sizes = []
    for n in (256, 512):
        drawn = sampled(n, b=1)
        inputs = {name: x.float().requires_grad_() if isinstance(x, Tensor) else x for name, x in drawn.items()}
        seen: dict[int, int] = {}  # by memory, as blocks keep views of one tensor

        def kept(x: Tensor, seen: dict[int, int] = seen) -> Tensor:
            seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        from attnkit.mechanisms.mla import absorbed

        with pytest.MonkeyPatch.context() as patch, torch.autograd.graph.saved_tensors_hooks(kept, lambda x: x):
            patch.setattr(absorbed, "LOGITS", 4 * n * 64)
            mla_attention(**inputs, backend=backend)
        sizes.append(sum(seen.values()))
    assert sizes[1] < 2.2 * sizes[0]


def test_padding_joins_the_mask_of_the_layer() -> None:
    torch.manual_seed(0)
    layer = get("mla").layer(tiny(query_latent=5)).double()
    x = torch.randn(2, 6, 16, dtype=torch.float64)
    keep = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    found = layer(x, mask=attnkit.padding(keep))
    assert (found[1, :4] - layer(x[1:, :4])[0]).abs().max() < 1e-12


def test_a_cropped_state_goes_on_as_if_nothing_had_been_drafted() -> None:
    torch.manual_seed(0)
    layer = MLAttention(tiny()).double()
    x, draft = torch.randn(2, 2, 9, 16, dtype=torch.float64)
    state = layer.state(2, 12, dtype=torch.float64)
    layer.step(x[:, :5], state)
    layer.step(draft[:, :3], state)
    state.crop(5)
    y, _ = layer.step(x[:, 5:], state)
    assert (y - layer(x)[:, 5:]).abs().max() < 1e-12


@pytest.mark.parametrize("n", [9, 150])
def test_trains_under_autocast(n: int) -> None:
    """Norms and parameters are float32 there, and what linear maps return is not."""
    layer = MLAttention(tiny(query_latent=5)).train()
    x = torch.randn(1, n, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    exact = copy.deepcopy(layer).double()(x.double())
    rounding = 4 * torch.finfo(torch.bfloat16).eps
    assert (y - exact).square().mean().sqrt() < rounding * exact.square().mean().sqrt()


def tiny(**settings: Any) -> MLAConfig:
    sizes = {"latent": 6, "nope_size": 5, "rope_size": 4, "value_size": 3} | settings
    return MLAConfig(16, 4, **{"rotary": Rotary(4, style="interleaved")} | sizes)


YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 16,
    "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 0.8, "mscale_all_dim": 0.6,
}  # fmt: skip
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
MODELS = [
    ("deepseek_v3.DeepseekV3", {"q_lora_rank": 20, "rope_parameters": YARN}),
    ("deepseek_v3.DeepseekV3", {"q_lora_rank": None, "rope_parameters": PLAIN}),
    ("deepseek_v3.DeepseekV3", {"q_lora_rank": 20, "rope_parameters": PLAIN, "rope_interleave": False}),
    ("deepseek_v2.DeepseekV2", {"q_lora_rank": 20, "rope_parameters": YARN}),
    ("deepseek_v2.DeepseekV2", {"q_lora_rank": None, "rope_parameters": PLAIN}),
    ("kimi_linear.KimiLinear", {"q_lora_rank": None}),
]


@pytest.mark.parametrize(
    ("model", "settings"), MODELS, ids=[f"{m.partition('.')[0]}-{i}" for i, (m, _) in enumerate(MODELS)]
)
def test_equals_hugging_face(model: str, settings: dict[str, Any]) -> None:
    """The weights of their layer in ours: all tokens at once, and token by token."""
    transformers = pytest.importorskip("transformers", reason="transformers, the oracle of MLA, is not installed")
    from importlib import import_module

    module, _, name = model.partition(".")
    code = import_module(f"transformers.models.{module}.modeling_{module}")
    torch.manual_seed(0)
    n, width = 19, 64
    sizes = {"kv_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12, "hidden_size": width}
    config = getattr(transformers, f"{name}Config")(
        num_attention_heads=4, num_key_value_heads=4, attn_implementation="eager", **sizes, **settings
    )
    theirs = getattr(code, f"{name}Attention")(config, 0).eval()
    rotates = hasattr(code, f"{name}RotaryEmbedding")
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter) if parameter.dim() == 1 else 0)
    described = config.to_dict() | ({} if rotates else {"rope_parameters": None})
    ours = MLAttention(MLAConfig.deepseek(described)).eval()
    if not rotates:  # Kimi Linear has the rotary channels and does not turn them
        ours.config = MLAConfig(**{**vars(ours.config), "rotary": None})
    ours.load_deepseek({f"self_attn.{key}": x for key, x in theirs.state_dict().items()}, "self_attn.")
    x, positions = torch.randn(2, n, width), torch.arange(n)[None]
    hidden = torch.zeros(1, 1, n, n).masked_fill(~attnkit.causal().dense(n, n), torch.finfo(torch.float32).min)

    def run(layer: Any, x: Tensor, start: int, cache: Any = None) -> Tensor:
        end = start + x.shape[1]
        given = {"attention_mask": hidden[:, :, start:end, :end].to(x.dtype), "past_key_values": cache}
        if rotates:
            given["position_embeddings"] = getattr(code, f"{name}RotaryEmbedding")(config)(x, positions[:, start:end])
        return layer(x, **given)[0]

    with torch.no_grad():
        gold, naive = run(copy.deepcopy(theirs).double(), x.double(), 0), run(theirs, x, 0)
        assert_within(ours(x), gold, naive, torch.float32)
        state, cache, rows, their_rows = ours.state(2, n), transformers.DynamicCache(), [], []
        for t in range(n):
            y, state = ours.step(x[:, t : t + 1], state)
            their_rows.append(run(theirs, x[:, t : t + 1], t, cache))
            rows.append(y)
    assert_within(torch.cat(rows, 1), gold, torch.cat(their_rows, 1), torch.float32)


X = torch.zeros
REFUSALS: list[tuple[Any, type[Exception], str]] = [
    (lambda: mla_attention(X(1, 4, 2, 7), X(1, 3, 2, 8), X(4, 8, 6)), ValueError, "got 4 query heads and 3 KV heads"),
    (lambda: mla_attention(X(1, 4, 2, 7), X(1, 1, 2, 5), X(4, 8, 6)), ValueError, "rotary keys of -1"),
    (lambda: mla_attention(X(1, 4, 2, 7), X(1, 1, 2, 8), X(4, 5, 6)), ValueError, "values of 0"),
    (lambda: mla_attention(X(1, 4, 2, 7), X(1, 1, 2, 8), X(3, 8, 6)), ValueError, "query heads is 3 in kv_b"),
    (lambda: mla_attention(X(1, 4, 2, 7), X(1, 1, 2, 8).double(), X(4, 8, 6)), TypeError, "latent has dtype"),
    (lambda: tiny(rotary=Rotary(8)), ValueError, "rotary is made for head size 8, rope_size is 4"),
    (lambda: tiny(latent=0), ValueError, "latent is 0, expected at least 1"),
    (lambda: MLAttention(tiny(mask=None)).state(1, 5), ValueError, "a bidirectional layer cannot decode"),
    (lambda: LatentState(1, 5, 0), ValueError, "latent size 0"),
    (lambda: MLAConfig.deepseek({"attention_bias": True}), NotImplementedError, "attention_bias is true"),
    (lambda: MLAttention(tiny()).load_deepseek({}), ValueError, "there is no 'kv_b_proj.weight'"),
]


@pytest.mark.parametrize(("act", "error", "said"), REFUSALS)
def test_refusals(act: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error) as caught:
        act()
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
