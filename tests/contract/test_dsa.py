"""DeepSeek sparse attention: nested loops, ties, latent attention as its limit, its losses, DeepSeek-V3.2's model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import attnkit
from attnkit.mechanisms.dsa import (
    DSAConfig,
    DSAttention,
    chunk,
    dsa_attention,
    dsa_sparse_loss,
    dsa_warmup_loss,
    losses,
)
from attnkit.mechanisms.mla import mla_attention
from attnkit.positions import Rotary, YaRN
from attnkit.registry import get
from attnkit.spec import Sizes
from attnkit.testing.budgets import assert_within

MAIN = ("q", "latent", "kv_b")
WAYS = ("gathered", "hidden")


def sampled(n: int, m: int | None = None, top: int = 3, **sizes: int) -> dict[str, Any]:
    size = {"b": 2, "h": 4, "g": 1, "m": m or n, "n": n, "d": 7, "e": 3, **sizes}
    return get("dsa").sample(n, Sizes(**size), torch.float64) | {"top": top}


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of ``chunk``, in blocks of a few queries."""
    monkeypatch.setattr(chunk, "gathers", lambda *call: request.param == "gathered")
    monkeypatch.setattr(chunk, "NUMBERS", 2 * 8 * 40 * 3)
    return str(request.param)


def by_loops(call: dict[str, Any]) -> Tensor:
    """Score, sort by score and then by index, attend to the first ``top`` alone."""
    q, latent, index_q, index_k, index_w = (call[name] for name in ("q", "latent", "index_q", "index_k", "index_w"))
    (b, _, m, _), n = q.shape, latent.shape[2]
    rows = []
    for batch in range(b):
        for i in range(m):
            scores = []
            for s in range(n - m + i + 1):
                products = [float(index_q[batch, j, i] @ index_k[batch, 0, s]) for j in range(index_q.shape[1])]
                scores.append(sum(float(w) * max(p, 0.0) for w, p in zip(index_w[batch, :, i], products, strict=True)))
            chosen = sorted(range(len(scores)), key=lambda s: (-scores[s], s))[: call["top"]]
            few = latent[batch : batch + 1, :, chosen]
            rows.append(mla_attention(q[batch : batch + 1, :, i : i + 1], few, call["kv_b"], backend="reference"))
    return torch.cat(rows, 2).unflatten(2, (b, m)).squeeze(0).transpose(0, 1)


@pytest.mark.parametrize("m", [1, 4, 11])
def test_equals_nested_loops(way: str, m: int) -> None:
    call = sampled(11, m, top=4)
    for backend in ("chunk", "reference"):
        assert (dsa_attention(**call, backend=backend) - by_loops(call)).abs().max() < 1e-12


def test_of_equal_scores_the_first_are_chosen(way: str) -> None:
    """Two index heads that turn most keys away: scores of exactly 0, whole and token by token."""
    call = sampled(30, top=6)
    call["index_q"], call["index_w"] = call["index_q"][:, :2].abs(), call["index_w"][:, :2]
    call["index_k"] = torch.where(torch.rand(2, 1, 30, 1) < 0.8, -1.0, 1.0) * call["index_k"].abs()
    whole = dsa_attention(**call)
    assert (whole - dsa_attention(**call, backend="reference")).abs().max() < 1e-12
    assert (whole - by_loops(call)).abs().max() < 1e-12
    for t in range(30):
        now = {name: call[name][:, :, t : t + 1] for name in ("q", "index_q", "index_w")}
        past = {name: call[name][:, :, : t + 1] for name in ("latent", "index_k")}
        assert (dsa_attention(**{**call, **now, **past}) - whole[:, :, t : t + 1]).abs().max() < 1e-12, t


@pytest.mark.parametrize("m", [2, 40])
def test_blocks_equal_the_definition_with_gradients(way: str, m: int) -> None:
    call = sampled(40, m, top=7, g=2)
    leaves = {name: x.requires_grad_() for name, x in call.items() if isinstance(x, Tensor)}
    found, true = (dsa_attention(**call, backend=backend) for backend in ("chunk", "reference"))
    assert (found - true).abs().max() < 1e-12
    direction = torch.randn_like(found)
    slopes, exact = (torch.autograd.grad(o, list(leaves.values()), direction) for o in (found, true))
    for name, one, two in zip(leaves, slopes, exact, strict=True):
        assert (one - two).abs().max() < 1e-11, name
        assert bool(one.any()) == (name in MAIN), name


@pytest.mark.parametrize("backend", ["chunk", "reference"])
@pytest.mark.parametrize("top", [20, 100])
def test_choosing_all_is_latent_attention(backend: str, top: int) -> None:
    call = sampled(20, top=top)
    found = dsa_attention(**call, backend=backend)
    dense = mla_attention(*(call[name] for name in MAIN), mask=attnkit.causal())
    assert (found - dense).abs().max() < 1e-12


def test_long_input_builds_no_square() -> None:
    """The most numbers that a block holds do not grow with the text, and blocks are computed again in the backward."""
    sizes = []
    for n in (256, 512):
        drawn = get("dsa").sample(0, Sizes(b=1, h=2, g=1, m=n, n=n, d=7, e=3), torch.float32) | {"top": 16}
        call = {name: x.requires_grad_() if isinstance(x, Tensor) else x for name, x in drawn.items()}
        seen: dict[int, int] = {}  # by memory, as blocks keep views of one tensor

        def kept(x: Tensor, seen: dict[int, int] = seen) -> Tensor:
            seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        for name in ("chunk", "losses"):
            with pytest.MonkeyPatch.context() as patch, torch.autograd.graph.saved_tensors_hooks(kept, lambda x: x):
                patch.setattr({"chunk": chunk, "losses": losses}[name], "NUMBERS", 8 * n * 32)
                (dsa_attention if name == "chunk" else dsa_sparse_loss)(**call)
        sizes.append(sum(seen.values()))
    assert sizes[1] < 2.2 * sizes[0]


@pytest.mark.parametrize("top", [None, 5])
@pytest.mark.parametrize("m", [4, 12])
def test_losses_are_divergences_from_the_weights_of_all_heads(
    monkeypatch: pytest.MonkeyPatch, top: int | None, m: int
) -> None:
    """One query at a time, and gradients for the indexer alone."""
    monkeypatch.setattr(losses, "NUMBERS", 2 * 8 * 12 * 5)
    call = sampled(12, m, top=top or 12)
    leaves = {name: x.requires_grad_() for name, x in call.items() if isinstance(x, Tensor)}
    found = dsa_sparse_loss(**call) if top else dsa_warmup_loss(**{k: x for k, x in call.items() if k != "top"})
    # Values that are the unit vectors give the weights themselves; latents of all heads carry their key's number.
    (b, h, _, d), (n, w), c = call["q"].shape, call["latent"].shape[2:], call["kv_b"].shape[2]
    nope = d - (w - c)
    numbered = torch.cat(
        [call["latent"][..., :c], torch.eye(n).expand(b, 1, n, n), call["latent"][..., c:]], -1
    ).double()
    kv_b = torch.zeros(h, nope + n, c + n, dtype=torch.float64)
    kv_b[:, :nope, :c], kv_b[:, nope:, c:] = call["kv_b"][:, :nope], torch.eye(n)
    given = {**call, "latent": numbered, "kv_b": kv_b}
    weights = dsa_attention(**given, backend="reference").mean(1).detach()
    products = torch.einsum("bjmi,bni->bjmn", call["index_q"], call["index_k"][:, 0]).relu()
    scores = (call["index_w"][..., None] * products).sum(1)
    total = torch.zeros((), dtype=torch.float64)
    for batch in range(b):
        for i in range(m):
            seen = weights[batch, i] > 0
            p, log = weights[batch, i][seen], scores[batch, i][seen].log_softmax(0)
            total = total + (p * (p.log() - log)).sum() / (b * m)
    assert abs((found - total).item()) < 1e-12
    index = [leaves[name] for name in ("index_q", "index_k", "index_w")]
    for one, two in zip(torch.autograd.grad(found, index), torch.autograd.grad(total, index), strict=True):
        assert (one - two).abs().max() < 1e-12


def tiny(**settings: Any) -> DSAConfig:
    sizes = {"latent": 6, "nope_size": 5, "rope_size": 4, "value_size": 3, "query_latent": 7}
    index = {"index_heads": 8, "index_size": 6, "top": 5}
    return DSAConfig(16, 4, **{"rotary": Rotary(4, style="interleaved")} | sizes | index | settings)


def test_training_reaches_the_indexer_by_its_own_loss_alone() -> None:
    torch.manual_seed(0)
    layer = DSAttention(tiny()).double().train()
    x = torch.randn(2, 12, 16, dtype=torch.float64)
    layer(x).square().sum().backward()
    got = {name: p.grad for name, p in layer.named_parameters()}
    layer.zero_grad()
    layer.loss(x).backward()
    for name, parameter in layer.named_parameters():
        assert (parameter.grad is not None) == name.startswith("index"), name
        if parameter.grad is not None:
            assert (parameter.grad - got[name]).abs().max() < 1e-12, name
    layer.eval()
    before = layer.loss(x, dense=True).item()
    optimizer = torch.optim.Adam([p for name, p in layer.named_parameters() if name.startswith("index")], lr=0.02)
    for _ in range(30):
        optimizer.zero_grad()
        layer.loss(x, dense=True).backward()
        optimizer.step()
    assert layer.loss(x, dense=True).item() < 0.7 * before


@pytest.mark.parametrize("n", [9, 150])
def test_trains_under_autocast(n: int) -> None:
    """Norms and the indexer's scores are float32 there, and what linear maps return is not."""
    layer = DSAttention(tiny(top=200)).train()
    x = torch.randn(1, n, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    exact = copy.deepcopy(layer).double()(x.double())
    rounding = 4 * torch.finfo(torch.bfloat16).eps
    assert (y - exact).square().mean().sqrt() < rounding * exact.square().mean().sqrt()


def test_a_state_has_an_index_key_beside_the_latent() -> None:
    """DeepSeek-V3.2: 576 + 128 numbers a token and layer."""
    yarn = YaRN(40.0, 4096, mscale=1.0, mscale_all=1.0)
    config = DSAConfig(
        7168, 128, latent=512, query_latent=1536, nope_size=128, rope_size=64, value_size=128,
        rotary=Rotary(64, style="interleaved", scaling=yarn),
    )  # fmt: skip
    with torch.device("meta"):
        layer = DSAttention(config)
    state = layer.state(1, 100, dtype=torch.bfloat16, device="meta")
    assert state.nbytes == layer.cost(1, 100, dtype=torch.bfloat16).state_bytes(100) == 100 * (576 + 128) * 2


@pytest.mark.parametrize(
    ("model", "top"), [("deepseek_v32.DeepseekV32", 6), ("deepseek_v32.DeepseekV32", 40), ("glm_moe_dsa.GlmMoeDsa", 6)]
)
def test_equals_hugging_face(model: str, top: int) -> None:
    """The layers of DeepSeek-V3.2 and GLM-5, whose weights ours takes: all tokens at once, and token by token."""
    transformers = pytest.importorskip("transformers", reason="transformers, the oracle of DSA, is not installed")
    from importlib import import_module

    module, _, name = model.partition(".")
    code = import_module(f"transformers.models.{module}.modeling_{module}")
    torch.manual_seed(0)
    n = 23
    rope = {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 16,
        "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
    }  # fmt: skip
    config = getattr(transformers, f"{name}Config")(
        hidden_size=64, num_attention_heads=4, num_key_value_heads=4, kv_lora_rank=24, q_lora_rank=20,
        qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12, index_n_heads=16, index_head_dim=16, index_topk=top,
        num_hidden_layers=1, rope_parameters=rope, attn_implementation="eager",
    )  # fmt: skip
    theirs = getattr(code, f"{name}Attention")(config, 0).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter) if parameter.dim() == 1 else 0)
    ours = DSAttention(DSAConfig.deepseek(config.to_dict())).eval()
    ours.load_deepseek(theirs.state_dict())
    x, positions = torch.randn(2, n, 64), torch.arange(n)[None]
    hidden = torch.zeros(1, 1, n, n).masked_fill(~attnkit.causal().dense(n, n), torch.finfo(torch.float32).min)
    turn = getattr(code, f"{name}RotaryEmbedding")(config)

    def run(layer: Any, x: Tensor, start: int, cache: Any = None) -> Tensor:
        end = start + x.shape[1]
        mask = hidden[:, :, start:end, :end].to(x.dtype)
        return layer(x, turn(x, positions[:, start:end]), mask, past_key_values=cache)[0]

    with torch.no_grad():
        gold, naive = run(copy.deepcopy(theirs).double(), x.double(), 0), run(theirs, x, 0)
        assert_within(ours(x), gold, naive, torch.float32)
        state, rows, their_rows = ours.state(2, n), [], []
        cache = transformers.DynamicCache(config=config)
        for t in range(n):
            y, state = ours.step(x[:, t : t + 1], state)
            their_rows.append(run(theirs, x[:, t : t + 1], t, cache))
            rows.append(y)
    assert_within(torch.cat(rows, 1), gold, torch.cat(their_rows, 1), torch.float32)


REFUSALS: list[tuple[Any, type[Exception], str]] = [
    (lambda: dsa_attention(**{**sampled(9), "top": 0}), ValueError, "top is 0, expected at least 1"),
    (lambda: dsa_attention(**{**sampled(9), "top": 0.5}), TypeError, "top is a float"),
    (lambda: dsa_attention(**{**sampled(9), "index_k": torch.zeros(2, 1, 8, 6)}), ValueError, "keys is 8 in index_k"),
    (lambda: dsa_attention(**{**sampled(9), "index_k": torch.zeros(2, 3, 9, 6)}), ValueError, "8 index heads and 3"),
    (lambda: dsa_attention(**{**sampled(9), "index_w": torch.zeros(2, 4, 9)}), ValueError, "in index_w (2, 4, 9)"),
    (lambda: tiny(index_size=3), ValueError, "8 index heads of 3 channels"),
    (lambda: tiny(mask=attnkit.window(3)), ValueError, "expected causal()"),
    (lambda: DSAttention(tiny())(torch.zeros(1, 2, 16), mask=attnkit.full()), NotImplementedError, "expected none"),
]


@pytest.mark.parametrize(("act", "error", "said"), REFUSALS)
def test_refusals(act: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error) as caught:
        act()
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
