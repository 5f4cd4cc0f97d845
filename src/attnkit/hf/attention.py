"""The attention function that Transformers calls: every argument is honoured or refused."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attnkit.hf.carried import plain, state_of
from attnkit.hf.chosen import check_plain, waiting_of
from attnkit.hf.latent import latents_of
from attnkit.hf.masks import CarriedMask
from attnkit.masks import UNBOUNDED, Mask, causal, explicit, joined
from attnkit.masks.patterns import Interval
from attnkit.mechanisms.softmax import softmax_attention, softmax_attention_step
from attnkit.native import BLOCK_QUERIES

# What reaches an attention function and says nothing about attention, or says again what its mask and tensors say.
HARMLESS = frozenset(
    {
        "cache_position",
        "deterministic",
        "labels",
        "logits_to_keep",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
        "return_dict",
        "tokenizer",
        "use_cache",
    }
)
# What is refused gets its own advice where there is any.
ADVICE = {
    "output_attentions": "attnkit keeps no attention weights: use attn_implementation='eager' to see them",
    "cache": "call model.generate_batch inside attnkit.hf.continuous_batching(model)",
    "cu_seq_lens_q": "packed sequences are found by position_ids that restart: pass those and no cu_seq_lens",
    "cu_seq_lens_k": "packed sequences are found by position_ids that restart: pass those and no cu_seq_lens",
    "sinks": "sinks that differ by token are not supported: use attn_implementation='eager'",
}


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    indices: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What ``AttentionInterface`` calls, after rotary embedding and the cache.

    Parameters
    ----------
    module: the attention layer; ``is_causal`` is read from it when it is not passed and there is no mask.
    query: (b, h, m, d). key: (b, g, n, d). value: (b, g, n, e). Keys and values that ``Cache`` handed on are read where
        they lie, by queries that are few and see none that are later; for others they are converted.
    attention_mask: a ``CarriedMask``, a bool tensor (True may attend) or a floating one to add, both (b, 1 | h, m, n).
        None means causal from the upper left when ``is_causal`` and m > 1, as torch's ``is_causal`` does, else nothing.
    dropout: probability of dropping a weight, drawn from torch's generator.
    scaling, softcap, s_aux: ``scale``, ``softcap`` and ``sink`` of ``softmax_attention``.
    sliding_window: has to agree with the mask, which is what applies it.
    position_bias: (b | 1, h, m, n), added to the logits.
    indices: (b, m, k) keys that each query may see besides what the mask says (DeepSeek's sparse attention).
    others: refused unless they are None, False or known to change nothing.

    Returns
    -------
    o: (b, m, h, e) contiguous, and None for the weights.

    Raises
    ------
    NotImplementedError: an argument that would change the result is not known. ValueError: arguments disagree.
    """
    refuse(module, s_aux, others)
    keys = key.shape[2]
    mask: Mask | None
    bias = position_bias
    if isinstance(attention_mask, CarriedMask):
        if attention_mask.shape[-1] != keys:
            raise ValueError(
                f"attnkit got a mask for {attention_mask.shape[-1]} keys and {keys} keys: the cache's get_mask_sizes "
                "and update have to agree"
            )
        mask, keys = attention_mask.mask, attention_mask.keys
        check_window(sliding_window, attention_mask.window, keys)
    elif attention_mask is None:
        mask, keys = _mask_of_none(module, query.shape[2], keys, is_causal)
        check_window(sliding_window, None, keys)
    elif attention_mask.dtype == torch.bool:
        mask = explicit(attention_mask)
    else:
        mask, bias = None, attention_mask if bias is None else bias + attention_mask
    if indices is not None:
        chosen = torch.zeros(*indices.shape[:2], key.shape[2], dtype=torch.bool, device=key.device)
        mask = joined(mask, explicit(chosen.scatter_(-1, indices.long(), True)[..., :keys]))
    waiting = waiting_of(key, value)
    if waiting is not None:
        others = {"softcap": softcap, "s_aux": s_aux, "a bias": bias, "dropout": dropout or None}
        check_plain(mask, query.shape[2], others)
        view, mask = waiting.taken(query, scaling)
        o = softmax_attention(query, view.k, view.v, mask=mask, scale=scaling)
        return o.transpose(1, 2).contiguous(), None
    latents = latents_of(key, value)
    if latents is not None and keys == key.shape[2] and not (dropout or softcap) and bias is None and s_aux is None:
        absorbed = latents.attend(query, mask, scaling)
        if absorbed is not None:
            return absorbed.transpose(1, 2).contiguous(), None
    few = query.shape[2] == 1 or (query.shape[2] <= BLOCK_QUERIES and _sees_none_later(attention_mask, mask))
    state = state_of(key, value) if few and keys == key.shape[2] and not dropout else None
    if state is not None:
        o = softmax_attention_step(query, state, mask=mask, scale=scaling, bias=bias, softcap=softcap, sink=s_aux)
        return o.transpose(1, 2).contiguous(), None
    if keys < key.shape[2]:
        key, value = key[:, :, :keys], value[:, :, :keys]
        bias = None if bias is None else bias[..., :keys]
    o = softmax_attention(
        query,
        plain(key),
        plain(value),
        mask=mask,
        scale=scaling,
        bias=bias,
        softcap=softcap,
        sink=s_aux,
        dropout=dropout,
    )
    return o.transpose(1, 2).contiguous(), None


def _mask_of_none(module: nn.Module, queries: int, keys: int, is_causal: bool | None) -> tuple[Mask | None, int]:
    """What a missing mask means in Transformers, and how many of the keys any query sees."""
    wanted = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if not wanted or queries == 1:
        return None, keys
    if keys >= queries:
        return causal(), queries  # upper-left: the rest is the room of a static cache
    return Interval(UNBOUNDED, queries - keys), keys


def _sees_none_later(given: Tensor | None, mask: Mask | None) -> bool:
    """Whether it is known that no query sees a key after it."""
    interval = mask.interval() if mask is not None else None
    return (isinstance(given, CarriedMask) and not given.later) or (interval is not None and interval[1] <= 0)


def check_window(asked: int | None, applied: int | None, keys: int) -> None:
    """Raise ``ValueError`` unless a layer's window is the mask's, or reaches over all ``keys`` anyway."""
    if asked is None or asked >= keys or asked == applied:
        return
    got = "none" if applied is None else str(applied)
    raise ValueError(
        f"attnkit got sliding_window={asked} and a mask whose window is {got}, for {keys} keys: pass a mask made by "
        "create_sliding_window_causal_mask with the same window"
    )


def refuse(module: nn.Module, s_aux: Tensor | None, others: dict[str, Any]) -> None:
    """Raise ``NotImplementedError`` for an argument that says something and is not known, or sinks that are missing."""
    for name, value in others.items():
        if value is None or value is False or name in HARMLESS:
            continue
        advice = ADVICE.get(name, "attnkit does not know it and will not drop it: use attn_implementation='eager'")
        raise NotImplementedError(f"attention got {name} ({type(value).__name__}); {advice}")
    if s_aux is None and isinstance(getattr(module, "sinks", None), Tensor):
        raise NotImplementedError(
            f"{type(module).__name__} has sinks but does not pass them as s_aux: use attn_implementation='eager'"
        )
