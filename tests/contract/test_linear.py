"""Linear attention: nested loops, golden rows, no order, random features, streaming without a look ahead, refusals."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from attnkit.mechanisms.linear import LinearConfig, linear_attention, linear_attention_step, random_features
from attnkit.recurrence import CHUNK
from attnkit.registry import get
from attnkit.spec import Sizes

BACKENDS = ("chunk", "reference")
MAPS = ("elu", "relu", "taylor", "favor")


def sampled(feature_map: str, n: int, m: int | None = None, seed: int = 1) -> dict[str, Any]:
    size = Sizes(b=2, h=4, g=2, m=m or n, n=n, d=5, e=3)
    inputs = get("linear").sample(seed, size, torch.float64)
    projection = inputs.pop("projection")
    return {**inputs, "feature_map": feature_map, **({"projection": projection} if feature_map == "favor" else {})}


def kernel(feature_map: str, projection: Tensor | None) -> Callable[[Tensor, Tensor], float]:
    """The weight of one key for one query, from the definition and without any scaling against overflow."""

    def elu(x: Tensor) -> Tensor:
        return torch.nn.functional.elu(x) + 1

    def favor(x: Tensor) -> Tensor:
        assert projection is not None
        x = x * len(x) ** -0.25
        return torch.tensor([math.exp(float(w @ x - x @ x / 2)) for w in projection], dtype=x.dtype)

    def taylor(q: Tensor, k: Tensor) -> float:
        s = float(q @ k) / math.sqrt(len(q))
        return 1 + s + s * s / 2

    phi = {"elu": elu, "relu": torch.relu, "favor": favor}.get(feature_map)
    return taylor if phi is None else lambda q, k: float(phi(q) @ phi(k))


def by_loops(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_map: str,
    projection: Tensor | None = None,
    causal: bool = True,
    keep: Tensor | None = None,
) -> Tensor:
    (b, h, m, _), (g, n, e) = q.shape, v.shape[1:]
    weight, o = kernel(feature_map, projection), q.new_zeros(b, h, m, e)
    for batch in range(b):
        for head in range(h):
            for i in range(m):
                keys = [j for j in range(n - m + i + 1 if causal else n) if keep is None or keep[batch, j]]
                at = head // (h // g)
                weights = [weight(q[batch, head, i], k[batch, at, j]) for j in keys]
                for j, w in zip(keys, weights, strict=True):
                    o[batch, head, i] += w / sum(weights) * v[batch, at, j] if sum(weights) else 0
    return o


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("feature_map", MAPS)
@pytest.mark.parametrize(("m", "causal"), [(6, True), (2, True), (4, False), (9, False)])
def test_equals_nested_loops(backend: str, feature_map: str, m: int, causal: bool) -> None:
    inputs = {**sampled(feature_map, 6, m), "causal": causal}
    keep = torch.tensor([[True, True, False, True, True, False], [False, False, True, True, False, True]])
    for given in (inputs, {**inputs, "keep": keep}):
        assert (linear_attention(**given, backend=backend) - by_loops(**given)).abs().max() < 1e-12


@pytest.mark.parametrize("n", [1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 1])
@pytest.mark.parametrize("feature_map", MAPS)
def test_chunks_and_steps_equal_the_definition_with_gradients(feature_map: str, n: int) -> None:
    """Across chunk edges in float64; steps go through a state and gradients through all of it."""
    inputs = sampled(feature_map, n)
    leaves = [x.requires_grad_() for x in inputs.values() if isinstance(x, Tensor)]
    found = [linear_attention(**inputs, backend=backend) for backend in BACKENDS]
    settings = {name: x for name, x in inputs.items() if name not in "qkv"}
    found.append(torch.cat(stepped(inputs, [min(n, 5), (n - min(n, 5)) // 2, -1], settings), 2))
    direction = torch.randn_like(found[0])
    slopes = [torch.autograd.grad(o, leaves, direction) for o in found]
    for o, slope in zip(found[1:], slopes[1:], strict=True):
        assert (o - found[0]).abs().max() < 1e-10
        for one, two in zip(slope, slopes[0], strict=True):
            assert (one - two).abs().max() < 1e-10 * (1 + two.abs().max())


def stepped(inputs: dict[str, Any], sizes: list[int], settings: dict[str, Any]) -> list[Tensor]:
    q, k, v = (inputs[name] for name in "qkv")
    sizes = [*sizes[:-1], q.shape[2] - sum(sizes[:-1])]
    f = {"taylor": 31, "favor": len(settings.get("projection", ()))}.get(settings["feature_map"], 5)
    held = {"state": q.new_zeros(2, 2, f, 4)}
    held |= {"largest": q.new_zeros(2, 2, 1)} if settings["feature_map"] == "favor" else {}
    rows = []
    for part in zip(*(x.split(sizes, 2) for x in (q, k, v)), strict=True):
        o, held = linear_attention_step(*part, held, **settings)
        rows.append(o)
    return rows


def generated(seed: int, *shape: int) -> Tensor:
    at = torch.arange(math.prod(shape), dtype=torch.float64)
    return (0.37 * at.square() + 1.1 * at + seed).sin().view(shape)


GOLDEN = [
    ({}, -5.702327177, 10.194843895, (0.025327, -0.400789, -0.364772, 0.033995)),
    ({"causal": False}, -5.443637953, 6.956518373, (0.025327, -0.400789, -0.364772, 0.033995)),
    ({"feature_map": "favor", "projection": generated(27, 6, 4)}, -6.247407150, 10.447943674,
     (-0.057549, -0.414814, -0.349259, -0.039553)),
]  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("settings", "total", "size", "row"), GOLDEN, ids=["elu", "elu without order", "favor"])
def test_golden_rows(backend: str, settings: dict[str, Any], total: float, size: float, row: tuple[float, ...]) -> None:
    q, k, v = (generated(seed, 1, 1, 8, 4) for seed in (1, 2, 3))
    o = linear_attention(q, k, v, **settings, backend=backend)
    assert abs(o.sum() - total) < 1e-8
    assert abs(o.abs().sum() - size) < 1e-8
    assert (o[0, 0, -1] - torch.tensor(row)).abs().max() < 1e-6


def test_random_features_are_orthogonal_seeded_and_unbiased() -> None:
    w = random_features(10, 4, seed=3).double()
    assert torch.equal(w, random_features(10, 4, seed=3).double())
    assert not torch.equal(w, random_features(10, 4, seed=4).double())
    for block in w.split(4):
        between = block @ block.T
        assert (between - between.diagonal().diag()).abs().max() < 1e-5
    assert (random_features(10, 4, normed=True).norm(dim=1) - 2).abs().max() < 1e-6
    # The mean over many draws is softmax's kernel; 64,000 features bring the standard error below a hundredth of it.
    q, k = torch.randn(2, 1, 1, 1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) / 2
    v = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]], dtype=torch.float64)
    o = linear_attention(q, torch.cat([k, -k], 2), v, random_features(64_000, 4), feature_map="favor")
    s = float(q.flatten() @ k.flatten()) / 2
    assert abs(o[0, 0, 0, 0] / o[0, 0, 0, 1] - math.exp(2 * s)) < 0.05


def test_random_features_of_huge_inputs_stay_finite() -> None:
    """Exponents of thousands, whose units grow along the sequence: no infinity, and rows still add up to 1."""
    inputs = {name: x.float() if isinstance(x, Tensor) else x for name, x in sampled("favor", 70).items()}
    inputs |= {"k": inputs["k"] * torch.linspace(60, 1, 70)[:, None], "v": torch.ones_like(inputs["v"])}
    for backend in BACKENDS:
        o = linear_attention(**inputs, backend=backend)
        assert ((o - 1).abs().lt(1e-5) | (o == 0)).all()
        assert (o[:, :, 0] - 1).abs().max() < 1e-5


@pytest.mark.parametrize("preset", ["elu_linear", "performer"])
def test_padding_never_advances_a_state(preset: str) -> None:
    """Left, right and between: what is held, and the rows of tokens, are those without padding."""
    from attnkit.spec import LayerPlace

    torch.manual_seed(0)
    spec = get("linear")
    layer = spec.layer(spec.preset(preset).configure(LayerPlace(16, 2))).double()
    x = torch.randn(1, 9, 16, dtype=torch.float64)
    state = layer.state(1, 9, dtype=torch.float64)
    rows, _ = layer.step(x, state)
    keep = torch.tensor([[False] * 3 + [True] * 4 + [False] * 2 + [True] * 5 + [False]])
    padded = torch.full((1, 15, 16), 7.0, dtype=torch.float64)
    padded[keep] = x[0]
    assert (layer(padded, keep=keep)[keep] - rows[0]).abs().max() < 1e-12
    other, parts = layer.state(1, 15, dtype=torch.float64), []
    for part, kept in zip(padded.split([2, 1, 5, 7], 1), keep.split([2, 1, 5, 7], 1), strict=True):
        y, other = layer.step(part, other, keep=kept)
        parts.append(y)
    assert (torch.cat(parts, 1)[keep] - rows[0]).abs().max() < 1e-12
    for name, held in state.view().items():
        assert (other.view()[name] - held).abs().max() < 1e-12, name


def test_an_encoder_layer_has_no_order_and_does_not_decode() -> None:
    torch.manual_seed(0)
    layer = get("linear").layer(LinearConfig(16, 4, kv_heads=2, causal=False, qk_norm=True)).double()
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    assert (layer(x.flip(1)).flip(1) - layer(x)).abs().max() < 1e-12
    with pytest.raises(ValueError, match="a bidirectional layer cannot decode"):
        layer.state(1, 5)


def test_redrawn_features_are_others_and_are_saved() -> None:
    config = LinearConfig(16, 4, feature_map="favor", random=9)
    one, two = (get("linear").layer(config) for _ in range(2))
    one.redraw(5)
    assert not torch.equal(one.projection, two.projection)
    two.load_state_dict(one.state_dict())
    x = torch.randn(1, 6, 16)
    assert torch.equal(one(x), two(x))
    with pytest.raises(ValueError, match="feature_map is 'elu', expected 'favor'"):
        get("linear").layer(LinearConfig(16, 4)).redraw(1)


W = torch.zeros(7, 5, dtype=torch.float64)
REFUSALS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"feature_map": "selu"}, ValueError, "feature_map is 'selu', expected one of elu, relu, taylor, favor"),
    ({"projection": W}, ValueError, "feature_map 'elu' with a projection, expected one for 'favor' alone"),
    ({"feature_map": "favor"}, ValueError, "feature_map 'favor' with no projection"),
    ({"feature_map": "favor", "projection": W[:, :4]}, ValueError, "key size is 4 in projection"),
    ({"keep": torch.ones(2, 9)}, TypeError, "keep has dtype torch.float32, expected bool"),
    ({"keep": torch.ones(2, 8, dtype=torch.bool)}, ValueError, "keys is 8 in keep"),
    ({"q": torch.zeros(2, 4, 10, 5, dtype=torch.float64)}, ValueError, "got 10 queries and 9 keys"),
]


@pytest.mark.parametrize(("wrong", "error", "said"), REFUSALS)
def test_refusals(wrong: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error) as caught:
        linear_attention(**{**sampled("elu", 9), **wrong})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_state_of_another_size_is_refused() -> None:
    inputs = sampled("elu", 3)
    with pytest.raises(ValueError, match=r"held is .*\(2, 2, 5, 3\).*, expected .*\(2, 2, 5, 4\)"):
        linear_attention_step(*(inputs[name] for name in "qkv"), {"state": torch.zeros(2, 2, 5, 3)})
    with pytest.raises(ValueError, match="random is 4 with feature_map 'elu'"):
        LinearConfig(16, 4, random=4)
