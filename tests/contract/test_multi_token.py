"""Multi-token attention: nested loops, the identity's limit, what the convolution may see, block edges, its state."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import attnkit
from attnkit.mechanisms.multi_token import MultiTokenConfig, multi_token_attention, multi_token_attention_step
from attnkit.mechanisms.multi_token.chunk import BLOCK
from attnkit.positions import Rotary
from attnkit.registry import get
from attnkit.spec import Sizes

BACKENDS = ("chunk", "reference")


def sampled(n: int, m: int | None = None, **sizes: int) -> dict[str, Any]:
    size = {"b": 1, "h": 4, "g": 2, "m": m or n, "n": n, "d": 3, "e": 5, **sizes}
    return get("multi_token").sample(n, Sizes(**size), torch.float64)


def by_loops(
    q: Tensor, k: Tensor, v: Tensor, kernel: Tensor, mix_logits: Tensor, mix_weights: Tensor, scale: float
) -> Tensor:
    """One number at a time, straight from the definition."""
    (b, h, m, _), (g, n, e) = q.shape, v.shape[1:]
    rows, columns = kernel.shape[1:]
    o = q.new_zeros(b, h, m, e)

    def logit(batch: int, head: int, i: int, j: int) -> float:
        if i < 0 or not 0 <= j <= n - m + i:
            return 0.0
        return scale * float(q[batch, head, i] @ k[batch, head // (h // g), j])

    def convolved(batch: int, head: int, i: int, j: int) -> float:
        return sum(
            float(kernel[head, rows - 1 - back, columns // 2 + aside]) * logit(batch, head, i - back, j + aside)
            for back in range(rows)
            for aside in range(-(columns // 2), columns // 2 + 1)
        )

    def group(shares: Tensor, head: int) -> list[tuple[float, int]]:
        c = shares.shape[1]
        return [(float(shares[head, x]), head // c * c + x) for x in range(c)]

    def weights(batch: int, head: int, i: int) -> list[float]:
        known = [
            sum(share * convolved(batch, other, i, j) for share, other in group(mix_logits, head))
            for j in range(n - m + i + 1)
        ]
        powers = [math.exp(x) for x in known]
        return [x / sum(powers) for x in powers]

    for batch in range(b):
        for i in range(m):
            plain = [weights(batch, head, i) for head in range(h)]
            for head in range(h):
                for j in range(n - m + i + 1):
                    weight = sum(share * plain[other][j] for share, other in group(mix_weights, head))
                    o[batch, head, i] += weight * v[batch, head // (h // g), j]
    return o


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("m", [1, 3, 7])
def test_equals_nested_loops(backend: str, m: int) -> None:
    inputs = sampled(7, m)
    found = multi_token_attention(**inputs, scale=0.6, backend=backend)
    assert (found - by_loops(**inputs, scale=0.6)).abs().max() < 1e-12


@pytest.mark.parametrize("n", [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 1])
def test_blocks_equal_the_definition_with_gradients(n: int) -> None:
    inputs = {name: x.requires_grad_() for name, x in sampled(n, (n + 1) // 2 if n % 2 else n).items()}
    found, true = (multi_token_attention(**inputs, backend=backend) for backend in BACKENDS)
    assert (found - true).abs().max() < 1e-11
    direction = torch.randn_like(found)
    slopes, exact = (torch.autograd.grad(o, list(inputs.values()), direction) for o in (found, true))
    for name, one, two in zip(inputs, slopes, exact, strict=True):
        assert (one - two).abs().max() <= 1e-10 * max(1.0, float(two.abs().max())), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_neutral_kernel_and_mixtures_are_softmax_attention(backend: str) -> None:
    inputs = sampled(BLOCK + 9)
    plain = attnkit.softmax_attention(inputs["q"], inputs["k"], inputs["v"], mask=attnkit.causal())
    inputs["kernel"].zero_()
    inputs["kernel"][:, -1, 2] = 1
    for name, c in (("mix_logits", 4), ("mix_weights", 2)):
        inputs[name] = torch.eye(c, dtype=torch.float64).repeat(4 // c, 1)
    assert (multi_token_attention(**inputs, backend=backend) - plain).abs().max() < 1e-12
    for name in ("kernel", "mix_logits", "mix_weights"):
        inputs[name] = None
        assert (multi_token_attention(**inputs, backend=backend) - plain).abs().max() < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_kernel_that_looks_right_sees_nothing_of_the_future(backend: str) -> None:
    """All weight on keys right of the key: without the zeroed future, row i would read keys after i."""
    inputs = sampled(20)
    inputs["kernel"].zero_()
    inputs["kernel"][:, :, 3:] = 1
    clean = multi_token_attention(**inputs, backend=backend)
    for name in ("q", "k", "v"):
        inputs[name] = torch.cat([inputs[name][:, :, :11], 9 * torch.randn_like(inputs[name][:, :, 11:])], 2)
    assert torch.equal(multi_token_attention(**inputs, backend=backend)[:, :, :11], clean[:, :, :11])


@pytest.mark.parametrize("pieces", [[1] * 20, [3, 1, 10, 6], [1, BLOCK, 2, BLOCK + 1]])
def test_steps_equal_one_pass_at_every_position(pieces: list[int]) -> None:
    inputs = sampled(sum(pieces))
    whole, start = multi_token_attention(**inputs), 0
    q = torch.nn.functional.pad(inputs["q"], (0, 0, 2, 0))  # the kernel has three rows
    weights = {name: inputs[name] for name in ("kernel", "mix_logits", "mix_weights")}
    for piece in pieces:
        end = start + piece
        k, v = inputs["k"][:, :, :end], inputs["v"][:, :, :end]
        o = multi_token_attention_step(q[:, :, start : end + 2], k, v, **weights)
        assert (o - whole[:, :, start:end]).abs().max() < 1e-11, f"tokens {start} to {end}"
        start = end


def test_a_trained_layer_with_every_option_decodes() -> None:
    torch.manual_seed(0)
    config = MultiTokenConfig(16, 4, kv_heads=2, mixed_logits=4, rotary=Rotary(4), qk_norm=True, output_gate=True)
    layer = get("multi_token").layer(config).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    x = torch.randn(2, 30, 16, dtype=torch.float64)
    state, rows = layer.state(2, 30, dtype=torch.float64), []
    for part in x.split([1, 1, 7, 1, 12, 8], 1):
        y, state = layer.step(part, state)
        rows.append(y)
    assert (torch.cat(rows, 1) - layer(x)).abs().max() < 1e-11


def test_memory_is_one_block_of_logits() -> None:
    sizes = []
    for n in (4 * BLOCK, 8 * BLOCK):
        inputs = {name: x.float().requires_grad_() for name, x in sampled(n, h=2, g=1).items()}
        seen: dict[int, int] = {}  # by memory, as blocks keep views of one tensor

        def kept(x: Tensor, seen: dict[int, int] = seen) -> Tensor:
            seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(kept, lambda x: x):
            multi_token_attention(**inputs, backend="chunk")
        sizes.append(sum(seen.values()))
    assert sizes[1] < 2.2 * sizes[0]


REFUSALS = [
    ({"kernel": torch.zeros(2, 3, 5)}, ValueError, "query heads is 2 in kernel"),
    ({"kernel": torch.zeros(4, 3, 4)}, ValueError, "kernel has 3 rows and 4 columns, expected at least 1 row"),
    ({"mix_logits": torch.zeros(4, 3)}, ValueError, "mix_logits mixes 3 of 4 heads, expected a number that divides"),
    ({"q": torch.zeros(1, 4, 10, 3, dtype=torch.float64)}, ValueError, "got 10 queries and 9 keys"),
    ({"k": torch.zeros(1, 3, 9, 3, dtype=torch.float64), "v": torch.zeros(1, 3, 9, 5, dtype=torch.float64)},
     ValueError, "got 4 query heads and 3 KV heads"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "error", "said"), REFUSALS)
def test_refusals(wrong: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error) as caught:
        multi_token_attention(**{**sampled(9), **wrong})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_step_without_the_queries_before_it_is_refused() -> None:
    with pytest.raises(ValueError, match="got 1 queries and 9 keys, expected the 2 queries before the new tokens"):
        multi_token_attention_step(**sampled(9, 1))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"taps": (6, 10)}, r"taps are \(6, 10\), expected queries >= 1 and an odd number of keys"),
        ({"mixed_weights": 3}, "mixed_weights is 3, expected a divisor of 4 heads"),
        ({"rotary": Rotary(8)}, "rotary is made for head size 8, heads have 4"),
    ],
)
def test_configurations_that_cannot_be_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        MultiTokenConfig(16, 4, **wrong)
