"""The delta rule: three forms and explicit matrices, limits, golden rows, splits, extreme decay, padding, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from attnkit.mechanisms.delta import DeltaAttention, DeltaConfig, chunk, delta_attention
from attnkit.mechanisms.delta.lawful import spoiled_from
from attnkit.mechanisms.delta.walk import BLOCK, Run, Tokens
from attnkit.registry import get
from attnkit.spec import LayerPlace, Sizes
from attnkit.testing.runs import assert_gradients_match, assert_matches, gold, tensors

SPEC = get("delta")
BACKENDS = ("chunk", "reference")
CHANNEL, HEAD, NONE = GATES = range(3)
"""Seeds of ``sample``, which choose the decay."""


def sampled(n: int, gate: int, dtype: torch.dtype = torch.float64, **sizes: int) -> dict[str, Any]:
    size = {"b": 1, "h": 4, "g": 2, "m": n, "n": n, "d": 5, "e": 3, **sizes}
    return SPEC.sample(3 * n + gate, Sizes(**size), dtype)


def largest(one: Tensor, other: Tensor) -> float:
    return (one - other).abs().max().item()


def by_matrices(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, state: Tensor, scale: float
) -> Tensor:
    """``o_i`` as a sum over ``j`` of ``v_j`` times ``k_j`` moved by the explicit d x d matrix of every later token."""
    (b, h, n, d), g = q.shape, k.shape[1]
    o = torch.zeros_like(v)
    for batch in range(b):
        for head in range(h):
            moves = []
            for t in range(n):
                key = k[batch, head // (h // g), t]
                kept = torch.ones(d, dtype=q.dtype)
                if log_decay is not None:
                    kept = kept * log_decay[batch, head, t].exp()
                reflected = torch.eye(d, dtype=q.dtype) - beta[batch, head, t] * torch.outer(key, key)
                moves.append(reflected @ torch.diag(kept))
            for i in range(n):
                product = torch.eye(d, dtype=q.dtype)
                for j in range(i, -1, -1):
                    key = beta[batch, head, j] * k[batch, head // (h // g), j]
                    o[batch, head, i] += (q[batch, head, i] @ product @ key) * v[batch, head, j]
                    product = product @ moves[j]
                o[batch, head, i] += q[batch, head, i] @ product @ state[batch, head]
    return scale * o


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_products_of_explicit_matrices(backend: str, gate: int) -> None:
    inputs = sampled(9, gate)
    found, _ = delta_attention(**inputs, scale=0.6, backend=backend)
    del inputs["return_state"]
    assert largest(found, by_matrices(**{"log_decay": None, **inputs}, scale=0.6)) < 1e-12


def slopes_of(found: tuple[Tensor, Tensor], leaves: dict[str, Tensor]) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    total = sum((x * torch.randn_like(x)).sum() for x in found)
    assert isinstance(total, Tensor)
    return torch.autograd.grad(total, list(leaves.values()))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("n", [1, BLOCK - 1, BLOCK + 1, chunk.RUN * BLOCK, chunk.RUN * BLOCK + 2])
def test_recurrent_and_chunkwise_agree_with_gradients_of_all_inputs(n: int, gate: int) -> None:
    """Over the edges of blocks and of runs, state in and state out."""
    inputs = sampled(n, gate)
    leaves = {name: x.requires_grad_() for name, x in tensors(inputs).items()}
    found, true = (delta_attention(**inputs, backend=backend) for backend in BACKENDS)
    for one, two in zip(found, true, strict=True):
        assert largest(one, two) < 1e-12
    for name, one, two in zip(leaves, slopes_of(found, leaves), slopes_of(true, leaves), strict=True):
        assert largest(one, two) < 1e-11, name


@pytest.mark.parametrize("gate", GATES)
def test_one_block_for_all_is_the_parallel_form(gate: int) -> None:
    """Blocks of any power of 2 give the same, and so does a single one as long as the sequence."""
    inputs = sampled(100, gate)
    true = delta_attention(**inputs, scale=1.0, backend="reference")
    q, k, v, beta, log_decay = (inputs.get(name) for name in ("q", "k", "v", "beta", "log_decay"))
    tokens = Tokens(q, k, v, beta, log_decay, spoiled_from(k, v, beta, log_decay), 1.0)
    for block in (1, 8, 128):
        o, state = Run.of(tokens, 0, 100, block).walk(inputs["state"])[:2]
        assert largest(o, true[0]) < 1e-10
        assert largest(state, true[1]) < 1e-10


def golden(seed: float, *shape: int) -> Tensor:
    index = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return torch.sin(0.37 * index**2 + 1.1 * index + seed).reshape(1, 1, *shape)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("gated", "total", "absolute", "last"),
    [
        (False, -0.802415209, 6.414703783, [0.029861, 0.133600, -0.276231, -0.205785]),
        (True, -1.347296125, 5.054776383, [-0.070684, 0.345746, -0.380416, -0.097357]),
    ],
    ids=["DeltaNet", "Gated DeltaNet"],
)
def test_golden_rows(backend: str, gated: bool, total: float, absolute: float, last: list[float]) -> None:
    q, k, v = golden(1, 8, 4), normalize(golden(2, 8, 4), dim=-1), golden(3, 8, 4)
    decay = torch.nn.functional.logsigmoid(golden(25, 8, 4))[..., 0] if gated else None
    o = delta_attention(q, k, v, torch.sigmoid(golden(26, 8)), decay, scale=0.5, backend=backend)
    assert isinstance(o, Tensor)
    assert abs(o.sum().item() - total) < 1e-8
    assert abs(o.abs().sum().item() - absolute) < 1e-8
    assert largest(o[0, 0, -1], torch.tensor(last, dtype=torch.float64)) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_limits(backend: str) -> None:
    """No decay is a decay of 0, one a head is the same in all channels; keys that never meet add up."""
    inputs = sampled(BLOCK + 9, NONE)
    plain, _ = delta_attention(**inputs, backend=backend)
    for shape in ((1, 4, BLOCK + 9), (1, 4, BLOCK + 9, 5)):
        zeros = torch.zeros(shape, dtype=torch.float64)
        assert largest(delta_attention(**inputs, log_decay=zeros, backend=backend)[0], plain) < 1e-12
    inputs = sampled(BLOCK + 9, HEAD)
    wide = inputs["log_decay"][..., None].expand(-1, -1, -1, 5)
    found = delta_attention(**{**inputs, "log_decay": wide}, backend=backend)[0]
    assert largest(found, delta_attention(**inputs, backend=backend)[0]) < 1e-12
    q, v = torch.randn(2, 1, 1, 6, 6, dtype=torch.float64)
    k, beta = torch.eye(6, dtype=torch.float64)[None, None], torch.rand(1, 1, 6, dtype=torch.float64)
    o = delta_attention(q, k, v, beta, scale=1.0, backend=backend)
    assert largest(o, (q @ k.mT).tril() @ (beta[..., None] * v)) < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_key_seen_again_gives_its_newest_value(backend: str) -> None:
    torch.manual_seed(0)
    which = torch.randint(4, (100,))
    keys = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
    k, v = keys[which][None, None], torch.randn(1, 1, 100, 3, dtype=torch.float64)
    _, state = delta_attention(k, k, v, torch.ones(1, 1, 100).double(), return_state=True, backend=backend)
    newest = torch.stack([v[0, 0, (which == i).nonzero()[-1, 0]] for i in range(4)])
    assert largest(keys @ state[0, 0], newest) < 1e-12


@pytest.mark.parametrize("gate", GATES)
def test_any_split_hands_on_the_state_with_its_gradient(gate: int) -> None:
    n = 2 * BLOCK + 7
    inputs = sampled(n, gate)
    leaves = {name: x.requires_grad_() for name, x in tensors(inputs).items()}
    whole = delta_attention(**inputs, backend="chunk")
    exact = slopes_of(whole, leaves)
    for sizes in ([1, BLOCK, BLOCK + 6], [37, 1, 1, n - 39]):
        state, rows = inputs["state"], []
        for start, size in zip([0, *torch.tensor(sizes).cumsum(0).tolist()], sizes, strict=False):
            part = {x: y[:, :, start : start + size] for x, y in leaves.items() if x != "state"}
            o, state = delta_attention(**part, state=state, return_state=True)
            rows.append(o)
        parts = torch.cat(rows, 2), state
        assert max(largest(one, two) for one, two in zip(parts, whole, strict=True)) < 1e-12
        for name, one, two in zip(leaves, slopes_of(parts, leaves), exact, strict=True):
            assert largest(one, two) < 1e-11, name


@pytest.mark.parametrize("gate", [CHANNEL, HEAD])
@pytest.mark.parametrize("strength", [5.0, 50.0, torch.inf])
def test_extreme_decay_is_finite_and_costs_its_neighbours_no_digit(gate: int, strength: float) -> None:
    """Every third decay is this strong and those between are weak: sums that were subtracted would lose the weak."""
    inputs = sampled(150, gate, torch.float32)
    inputs["log_decay"][:, :, 1::3] = -strength
    assert all(x.isfinite().all() for x in gold(SPEC, inputs))
    assert_matches(SPEC, "chunk", inputs)
    assert_gradients_match(SPEC, "chunk", inputs)


@pytest.mark.parametrize("gate", GATES)
def test_64k_tokens_stay_finite_and_close(gate: int) -> None:
    """The recurrence's own gate for float32: a spread of 5e-6 of the result's."""
    n = 1 << 16
    inputs = sampled(n, gate, torch.float32, h=1, g=1, d=8, e=8)
    true, last = delta_attention(**{name: x.double() for name, x in tensors(inputs).items()}, return_state=True)
    for one, two in zip(delta_attention(**inputs), (true, last), strict=True):
        assert (one - two).square().mean().sqrt() < 5e-6 * two.square().mean().sqrt()


@pytest.mark.parametrize("gate", GATES)
def test_training_keeps_arguments_and_a_state_a_run_and_nothing_else(gate: int) -> None:
    """What autograd holds between forward and backward, in bytes."""
    runs = 5
    inputs = sampled(runs * chunk.RUN * BLOCK, gate, torch.float32, h=2, g=1)
    leaves = {name: x.requires_grad_() for name, x in tensors(inputs).items()}
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        delta_attention(**inputs, backend="chunk")
    arguments = sum(x.nbytes for x in leaves.values())
    spoiled = inputs["beta"].numel()
    assert sum(kept.values()) <= arguments + 2 * spoiled + runs * inputs["state"].nbytes


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("name", "value"),
    [("beta", -0.1), ("beta", 2.2), ("k", 3.0), ("k", torch.nan), ("v", torch.inf), ("log_decay", 0.1)],
)
def test_a_token_that_is_no_step_makes_results_nan_from_there_on(backend: str, name: str, value: float) -> None:
    inputs = sampled(40, CHANNEL, h=2, g=2)
    clean, _ = delta_attention(**inputs, backend=backend)
    inputs[name][:, 1, 17] = value
    o, state = delta_attention(**inputs, backend=backend)
    assert largest(o[:, :, :17], clean[:, :, :17]) == 0 == largest(o[:, 0], clean[:, 0])
    assert o[:, 1, 17:].isnan().all() and state[:, 1].isnan().all() and state[:, 0].isfinite().all()


def test_autocast_rounds_neither_state_nor_gradients() -> None:
    inputs = sampled(100, HEAD, torch.bfloat16)
    leaves = {name: x.requires_grad_() for name, x in tensors(inputs).items()}
    true = delta_attention(**inputs, backend="chunk")
    exact = slopes_of(true, leaves)
    with torch.autocast("cpu", torch.bfloat16):
        found = delta_attention(**inputs, backend="chunk")
        slopes = slopes_of(found, leaves)
    for one, two in zip((*found, *slopes), (*true, *exact), strict=True):
        assert torch.equal(one, two)


PADDINGS = {
    "left": [[False] * 4 + [True] * 9, [True] * 13],
    "right": [[True] * 9 + [False] * 4, [True] * 13],
    "holes": [[True, False, True, True, False, False, True] + [True, False] * 3, [False] * 13],
}


@pytest.mark.parametrize("preset", [preset.name for preset in SPEC.presets])
@pytest.mark.parametrize("where", PADDINGS)
def test_padding_never_advances_a_state(preset: str, where: str) -> None:
    """In one pass and continued: padding full of NaN is as if it were not there, for results and for what is kept."""
    torch.manual_seed(0)
    layer = DeltaAttention(SPEC.preset(preset).configure(LayerPlace(16, 4))).double()
    keep = torch.tensor(PADDINGS[where])
    x = torch.randn(2, 13, 16, dtype=torch.float64)
    junk = torch.where(keep[..., None], x, torch.nan)
    with torch.no_grad():
        once, state = layer(junk, keep=keep), layer.state(2, 13, dtype=torch.float64)
        parts = [layer.step(junk[:, part], state, keep=keep[:, part])[0] for part in (slice(6), slice(6, 13))]
        for row in range(2):
            alone = layer.state(1, 13, dtype=torch.float64)
            true, _ = layer.step(x[row : row + 1, keep[row]], alone)
            for found in (once, torch.cat(parts, 1)):
                assert (found[row, keep[row]] - true[0]).abs().sum() < 1e-12
                assert not found[row, ~keep[row]].any()
            for name, held in alone.view().items():
                assert largest(state.view()[name][row], held[0]) < 1e-12, name


def test_negative_eigenvalues_double_beta() -> None:
    torch.manual_seed(0)
    layers = [DeltaAttention(DeltaConfig(16, 4, negative=negative)) for negative in (False, True)]
    layers[1].load_state_dict(layers[0].state_dict())
    x = torch.randn(1, 1, 16)
    with torch.no_grad():
        states = [layer.step(x, layer.state(1, 1))[1].view()["state"] for layer in layers]
    assert torch.equal(2 * states[0], states[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_state_of_qwen3_next_takes_the_bytes_its_shapes_say(dtype: torch.dtype) -> None:
    """32 states of 128 x 128 in float32 and three rows of 8,192 channels, on no memory at all."""
    config = DeltaConfig(2048, 32, key_heads=16, key_size=128, value_size=128, decay="head", gate="silu")
    with torch.device("meta"):
        layer = DeltaAttention(config)
    state = layer.state(1, 262144, dtype=dtype, device="meta")
    assert state.nbytes == layer.cost(1, 1, dtype=dtype).state_bytes(262144) == 2 << 20 | 3 * 8192 * dtype.itemsize


REFUSALS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"beta": torch.zeros(1, 2, 9)}, ValueError, "query heads is 2 in beta (1, 2, 9) but 4 in q"),
    ({"log_decay": torch.zeros(1, 4, 9, 3)}, ValueError, "key size is 3 in log_decay (1, 4, 9, 3) but 5 in q"),
    ({"k": torch.zeros(1, 3, 9, 5).double()}, ValueError, "got 4 query heads and 3 KV heads"),
    ({"beta": torch.zeros(1, 4, 9, dtype=torch.int64)}, TypeError, "beta has dtype torch.int64, expected a floating"),
    ({"state": torch.zeros(1, 4, 5, 3)}, TypeError, "state has dtype torch.float32, expected torch.float64"),
    ({"state": torch.zeros(1, 4, 3, 3).double()}, ValueError, "key size is 3 in state (1, 4, 3, 3) but 5 in q"),
]


@pytest.mark.parametrize(("wrong", "error", "said"), REFUSALS)
def test_refusals(wrong: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error) as caught:
        delta_attention(**{**sampled(9, NONE), **wrong})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"heads": 3}, r"got width 16 and 3 heads, expected a width that heads divide"),
        ({"key_heads": 3}, r"got 4 query heads and 3 KV heads"),
        ({"decay": "token"}, r"decay is 'token', expected one of"),
        ({"rank": -1}, r"rank -1, expected"),
    ],
)
def test_refused_configurations(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        DeltaConfig(**{"width": 16, "heads": 4, **settings})


def test_a_mask_of_another_shape_is_refused() -> None:
    layer = DeltaAttention(DeltaConfig(16, 4))
    with pytest.raises(ValueError, match=r"keep is torch.bool \(1, 3\), expected bool \(1, 4\)"):
        layer(torch.zeros(1, 4, 16), keep=torch.ones(1, 3, dtype=torch.bool))
