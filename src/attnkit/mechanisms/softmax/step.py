"""Softmax attention of the newest tokens over a decoding state, which the kernels read in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnkit import shapes
from attnkit.costs import softmax as cost
from attnkit.dispatch import run
from attnkit.masks import Mask, Moved, causal, checked
from attnkit.mechanisms.softmax import SPEC as WHOLE
from attnkit.mechanisms.softmax import checked_logits
from attnkit.mechanisms.softmax import sample as whole_sample
from attnkit.mechanisms.softmax.cached import native_step, rejects
from attnkit.mechanisms.softmax.reference import forward as whole_reference
from attnkit.spec import Backend, Laws, Mechanism, Sizes
from attnkit.state import KVState, PagedKVState, WindowState

__all__ = ["SPEC", "softmax_attention_step"]

Cache = KVState | PagedKVState | WindowState


def softmax_attention_step(
    q: Tensor,
    state: Cache,
    *,
    mask: Mask | None = None,
    scale: float | None = None,
    bias: Tensor | None = None,
    alibi: Tensor | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """Softmax attention of the newest ``m`` tokens over all that ``state`` holds, themselves included.

    Query ``i`` of a sequence of ``n`` tokens stands at position ``n - m + i`` and sees no later one. Quantised and
    paged states are read in place: their keys and values are never written out. The step of sequences of many lengths
    gives each the bits that it has alone.

    Parameters
    ----------
    q: (b, h, m, d), float64, float32, bfloat16 or float16: the state's dtype; the KV heads of the state divide ``h``.
    state: ``KVState`` (any codec), ``PagedKVState`` or ``WindowState``, to which the tokens of ``q`` were appended
        already. A ring is read as it is, so several tokens at once need that none they see was overwritten.
    mask: what may be seen of what is not later, such as ``attnkit.window(128)``; None is ``attnkit.causal()``.
    scale: multiplies ``q k^T``; ``d ** -0.5`` when None.
    bias: added to the logits; broadcasts to (b, h, m, n), ``n`` the tokens of the longest sequence, or a ring's slots.
    alibi, softcap, sink: as in ``attnkit.softmax_attention``.
    return_lse: also return the log-sum-exp of the logits, sink included, natural log.
    backend: "cpu" or "reference", which then runs or raises; None takes the first that can run.

    Returns
    -------
    o: (b, h, m, e) in q's dtype; with ``return_lse`` the pair (o, lse), lse (b, h, m) float32 (float64 for float64).

    Raises
    ------
    ValueError, TypeError: arguments that do not fit together; NotImplementedError: the named backend cannot run them.

    Source: flash-decoding; paged attention arXiv 2309.06180; KIVI arXiv 2402.02750.
    """
    checked_call = call(
        q,
        state,
        mask=mask,
        scale=scale,
        bias=bias,
        alibi=alibi,
        softcap=softcap,
        sink=sink,
        return_lse=return_lse,
    )
    return run(SPEC, checked_call, backend)


def call(
    q: Tensor,
    state: Cache,
    *,
    mask: Mask | None = None,
    scale: float | None = None,
    bias: Tensor | None = None,
    alibi: Tensor | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    return_lse: bool = False,
) -> dict[str, Any]:
    """Check the arguments of ``softmax_attention_step``; return them by name, defaults filled in."""
    where = "softmax_attention_step"
    if not isinstance(state, KVState | PagedKVState | WindowState):
        raise TypeError(f"{where}: state is a {type(state).__name__}, expected a KVState, PagedKVState or WindowState")
    b, h, m, d = (shapes.check(where, q=(q, "b h m d"))[axis] for axis in "bhmd")
    batch, groups, size, _, dtype, device = state.layout
    if (b, d) != (batch, size):
        raise ValueError(
            f"{where}: q has batch {b} and key size {d} but the state {batch} and {size}, expected the same"
        )
    shapes.check_groups(where, h, groups)
    if q.dtype != dtype or q.device != device:
        raise TypeError(f"{where}: q is {q.dtype} on {q.device} but the state {dtype} on {device}: cast one")
    lengths = state.lengths if isinstance(state, PagedKVState) else [state.length] * b
    if lengths and m > min(lengths):
        raise ValueError(
            f"{where}: got {m} queries and a sequence of {min(lengths)} tokens, expected at most as many queries: "
            f"append their tokens first"
        )
    n = max(lengths, default=0)
    if isinstance(state, WindowState):
        n = state.view().k.shape[2]
        if m > 1 and n != state.length:
            raise ValueError(
                f"{where}: got {m} queries and a ring that holds {n} of {state.length} tokens, expected 1 query: keys "
                f"that the first one sees are overwritten, feed one token at a time"
            )
    return {
        "q": q,
        "state": state,
        "mask": _checked_mask(where, mask, b, h, m, lengths),
        "scale": d**-0.5 if scale is None else float(scale),
        **checked_logits(where, q, n, bias=bias, alibi=alibi, softcap=softcap, sink=sink),
        "return_lse": return_lse,
    }


def _checked_mask(where: str, mask: Mask | None, b: int, h: int, m: int, lengths: list[int]) -> Mask:
    if mask is None:
        return causal()
    if not isinstance(mask, Mask):
        raise TypeError(
            f"{where}: mask is a {type(mask).__name__}, expected a mask such as attnkit.window(128) or None"
        )
    for n in set(lengths):
        checked(where, mask, b, h, m, n)
    return mask & causal()


def reference(
    q: Tensor,
    state: Cache,
    mask: Mask,
    scale: float,
    bias: Tensor | None,
    alibi: Tensor | None,
    softcap: float | None,
    sink: Tensor | None,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """Sequence by sequence over what the state's codes mean, in float32 at least."""
    work = torch.promote_types(q.dtype, torch.float32)
    b, _, m, _ = q.shape
    results: list[Any] = []
    for row in range(b):
        k, v, positions = _numbers(state, row, work)
        n = k.shape[2]
        own, distances = _of_row(mask, row), alibi
        extra = None if bias is None else bias[row : row + 1, ..., :n].to(work)
        if positions is not None:  # a ring
            queries = torch.arange(state.length - m, state.length, device=q.device)
            own = Moved(own, queries, positions)
            if alibi is not None:
                far = -alibi.to(work)[:, None, None] * (queries[:, None] - positions).abs()
                extra, distances = far[None] if extra is None else extra + far, None
        results.append(
            whole_reference(
                q[row : row + 1].to(work), k, v, own, scale, extra, distances, softcap, sink, 0.0, None, return_lse
            )
        )
    if return_lse:
        return torch.cat([o for o, _ in results]).to(q.dtype), torch.cat([lse for _, lse in results])
    return torch.cat(results).to(q.dtype)


def _numbers(state: Cache, row: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys ``(1, g, n, d)`` and values of one sequence, and where they stand if not in order."""
    if isinstance(state, PagedKVState):
        k, v = state.numbers(row)
        return k[None].to(dtype), v[None].to(dtype), None
    if isinstance(state, KVState):
        k, v = state.numbers()
        return k[row : row + 1].to(dtype), v[row : row + 1].to(dtype), None
    view = state.view()
    return view.k[row : row + 1].to(dtype), view.v[row : row + 1].to(dtype), view.positions


def _of_row(mask: Mask, row: int) -> Mask:
    """``mask`` for a call of sequence ``row`` alone."""
    return mask if mask.batches == 1 else _Row(mask, row)


class _Row(Mask):
    """One batch entry of a mask."""

    def __init__(self, inner: Mask, row: int) -> None:
        self.inner, self.row, self.heads, self.length = inner, row, inner.heads, inner.length

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return self.inner.visible(b + self.row, h, q, k)


def sample(
    seed: int = 0,
    sizes: Sizes | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Arguments for ``softmax_attention_step``: one query of grouped heads over a plain state."""
    whole = whole_sample(seed, sizes, dtype, device)
    b, g, n, d = whole["k"].shape
    state = KVState(b, g, n, d, whole["v"].shape[3], dtype=dtype, device=device)
    state.store(whole["k"], whole["v"])
    return {"q": whole["q"][:, :, -1:], "state": state}


def _cpu() -> Any:
    return native_step


def _reference() -> Any:
    return reference


SPEC = Mechanism(
    name="softmax_step",
    title="Softmax attention over a decoding state",
    equation=WHOLE.equation,
    papers=("arXiv 2309.06180", "arXiv 2402.02750"),
    call=call,
    function=softmax_attention_step,
    sample=sample,
    reference=reference,
    backends=(Backend("cpu", _cpu, rejects, grad=False), Backend("reference", _reference)),
    laws=Laws(causal=True, stateful=True, step_equals_prefill=True, length_invariant=True),
    cost=cost,
    layer=WHOLE.layer,
    state=KVState,
)
