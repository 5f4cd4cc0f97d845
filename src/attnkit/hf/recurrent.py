"""Linear layers of Transformers through our mechanisms: the delta rule of Qwen, Kimi and OLMo, MiniMax's lightning."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from attnkit.mechanisms.delta import delta_attention
from attnkit.mechanisms.retention import retention_attention_step


def delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    chunk_size: int = 64,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """What Transformers calls with all of a sequence, and for a step with one token of it.

    Parameters
    ----------
    query, key: (b, n, g, d). value: (b, n, h, e). beta: (b, n, h). g: log decays (b, n, h) or (b, n, h, d).
    initial_state: (b, h, d, e). use_qk_l2norm_in_kernel: queries and keys become of length 1.
    chunk_size, others: as theirs, which have no use for the others either.

    Returns
    -------
    o: (b, n, h, e), and the state after it or None.
    """
    if cu_seqlens is not None:
        raise NotImplementedError(
            "accelerated layers cannot keep packed sequences apart: call attnkit.hf.restore first"
        )
    wide = torch.promote_types(query.dtype, torch.float32)
    # Theirs computes in float32 whatever comes in; a key that is rounded after its norm would no longer have length 1.
    q, k, v, decay, rate = (x.transpose(1, 2).to(wide) for x in (query, key, value, g, beta))
    if use_qk_l2norm_in_kernel:
        q, k = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    if repeats := v.shape[1] // q.shape[1] - 1:
        q = q.repeat_interleave(repeats + 1, 1)
    state = None if initial_state is None else initial_state.to(wide)
    o, last = delta_attention(q, k, v, rate, decay, state, return_state=True)
    return o.transpose(1, 2).contiguous().to(query.dtype), last if output_final_state else None


DELTA: Mapping[str, Callable[..., Any]] = dict.fromkeys(
    (
        "chunk_kimi_delta_attention",
        "recurrent_kimi_delta_attention",
        "torch_chunk_gated_delta_rule",
        "torch_recurrent_gated_delta_rule",
    ),
    delta_rule,
)
"""By which names the modules of Transformers know the delta rule, and what stands in for it."""


def calls_delta_rule(layer: Any) -> bool:
    """Whether the layer's own ``forward`` calls one of those."""
    code = getattr(innermost(type(layer).forward), "__code__", None)
    return code is not None and not DELTA.keys().isdisjoint(code.co_names)


def innermost(function: Any) -> Any:
    """A function without its decorators."""
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function


def with_names(function: Any, names: Mapping[str, Any]) -> Any:
    """A copy of ``function`` for which ``names`` mean what they say there; its module and other callers see no change.

    A decorated function is copied with its decorators.
    """
    inner = getattr(function, "__wrapped__", None)
    if inner is None:
        cells, known = function.__closure__, {**function.__globals__, **names}
    else:
        made, known = with_names(inner, names), function.__globals__
        cells = tuple(types.CellType(made) if c.cell_contents is inner else c for c in function.__closure__)
    copy = types.FunctionType(function.__code__, known, function.__name__, function.__defaults__, cells)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def lightning(
    layer: Any,
    hidden_states: Tensor,
    position_embeddings: Any = None,
    attention_mask: Tensor | None = None,
    cache: Any = None,
    past_key_values: Any = None,  # its name before Transformers 5.24
    **others: Any,
) -> tuple[Tensor, Tensor]:
    """``MiniMaxLightningAttention.forward``: hidden states ``(b, n, width)`` to the same and the state after them."""
    cache = past_key_values if cache is None else cache
    b, n, _ = hidden_states.shape
    mixed = layer.act_fn(layer.qkv_proj(hidden_states))
    if attention_mask is not None:
        mixed = (mixed * attention_mask[:, :, None]).to(mixed.dtype)
    mixed = mixed.reshape(b, n, layer.num_attention_heads, 3 * layer.head_dim)
    q, k, v = (x.transpose(1, 2) for x in mixed.split(layer.head_dim, 3))
    wide = torch.promote_types(q.dtype, torch.float32)
    state = cache.get_linear_cache(layer.layer_idx) if cache is not None else None
    if state is None:
        state = q.new_zeros(b, layer.num_attention_heads, layer.head_dim, layer.head_dim, dtype=wide)
    rates = layer.slope_rate.flatten()
    o, state = retention_attention_step(q, k, v, -rates, state.to(wide), scale=1.0)
    o = layer.norm(o.transpose(1, 2).reshape(b, n, -1))
    o = layer.out_proj(torch.sigmoid(layer.output_gate(hidden_states)) * o)
    if cache is not None:
        cache.set_linear_cache(layer.layer_idx, state)
    return o, state
