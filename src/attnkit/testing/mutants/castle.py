"""Wrong programs of CASTLE: who is taken up by whom, what stands under the SiLU, keys and queries of the state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from attnkit.masks import causal
from attnkit.mechanisms.castle import CastleAttention, layer
from attnkit.mechanisms.softmax import softmax_attention
from attnkit.state import RewrittenState
from attnkit.testing.mutants import Mutants

MUTANTS = Mutants()


def _add(name: str, mistake: str, **wrong: Any) -> None:
    """A mutant that runs the equation with one of its parts replaced."""
    MUTANTS.running(name, mistake, lambda spec: lambda **call: _equation(call, **wrong))


def _equation(
    call: dict[str, Any],
    open_: Callable[[Tensor], Tensor] = torch.sigmoid,
    later: Callable[[Tensor, int], Tensor] = lambda taken, window: taken.triu(1).tril(window),
    met: Callable[[Tensor, int], Tensor] = lambda products, past: products.tril(past),
    bias: Callable[[Tensor, float], Tensor] = lambda s, scale: -silu(s),
    lookahead_scale: float | None = None,
) -> Tensor:
    q, k, v = (call[name] for name in "qkv")
    lookahead_q, lookahead_k, lookahead_v = (call[f"lookahead_{name}"].float() for name in "qkv")
    scale = call["lookahead_scale"]
    products = lookahead_q @ lookahead_k.mT * (lookahead_scale or scale)
    taken = later(open_(products), call["window"])
    s = met(q.float() @ lookahead_v.mT * scale, k.shape[2] - q.shape[2]) @ taken.mT
    o: Tensor = softmax_attention(q, k, v, mask=causal(), scale=call["scale"], bias=bias(s, scale))
    return o


def _keys_stay(right: Any) -> Any:
    def rewrite(self: RewrittenState, **tensors: Tensor) -> None:
        pass

    return rewrite


def _queries_late(right: Any) -> Any:
    def step(q: Tensor, k: Tensor, v: Tensor, lookahead_q: Tensor, *rest: Any, **options: Any) -> Any:
        return right(q, k, v, lookahead_q.roll(1, 2), *rest, **options)

    return step


def _positions_again(right: Any) -> Any:
    return lambda self, x, start: right(self, x, 0)


_add("own_token", "a lookahead key takes up its own token", later=lambda taken, window: taken.triu(0).tril(window))
_add("transposed_mask", "a lookahead key takes up earlier tokens", later=lambda taken, window: taken.tril(-1))
_add("no_window", "the window has no end", later=lambda taken, window: taken.triu(1))
_add("window_counts_itself", "the window ends one early", later=lambda taken, window: taken.triu(1).tril(window - 1))
_add("future", "a query meets what later tokens add", met=lambda products, past: products)
_add("softmax_gates", "softmax over later tokens in place of the sigmoid", open_=lambda products: products.softmax(-1))
_add("gates_unscaled", "the sigmoid's argument lacks the scale", lookahead_scale=1.0)
_add("silu_before_scale", "SiLU before the scale", bias=lambda s, scale: -silu(s / scale) * scale)
_add("plus_sign", "lookahead logits are added", bias=lambda s, scale: silu(s))
_add("no_silu", "lookahead logits without SiLU", bias=lambda s, scale: -s)
MUTANTS.replacing("keys_stay", "cached lookahead keys are not rewritten", RewrittenState, "rewrite", _keys_stay)
MUTANTS.replacing("queries_late", "cached queries are one token off", layer, "castle_attention_step", _queries_late)
MUTANTS.replacing(
    "positions_again", "rotary starts again with each step", CastleAttention, "_project", _positions_again
)
