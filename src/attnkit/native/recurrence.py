"""The native form of ``attnkit.recurrence``, and of the delta rule, with its gradients.

One call serves linear attention, retention, gated linear attention and the delta rule: they differ in what fades and
in ``beta``. The forward pass keeps one state for each 256 tokens when a gradient is wanted, and nothing else.
"""

from __future__ import annotations

from ctypes import c_void_p
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from attnkit import native
from attnkit.native import linear
from attnkit.native.memory import empty

# Scratch memory grows with d * e; no head is near this.
MOST_SIZE = 1 << 16

POINTERS = tuple(name for name, kind in linear.FIELDS if kind is c_void_p)
MAPS = {"elu": linear.MAP_ELU, "relu": linear.MAP_RELU}

# q, k, v, log_decay, beta, state
Given = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]


class Options(NamedTuple):
    """What is no tensor that has a gradient; see ``recurrence``."""

    scale: float
    keep: Tensor | None
    feature_map: str | None
    means: bool


def _options(scale: float, keep: Tensor | None, feature_map: str | None, means: bool) -> Options:
    return Options(scale, None if keep is None else keep.contiguous(), feature_map, means)


def reasons(q: Tensor, d: int, e: int) -> tuple[str, ...]:
    """Why the native kernels cannot run queries like ``q`` with ``d`` channels of keys and ``e`` of values."""
    found = []
    if not native.STATUS.available:
        found.append(native.STATUS.reason)
    if q.device.type != "cpu":
        found.append(f"device is {q.device.type}, the native kernel needs cpu")
    if q.dtype not in native.DTYPES:
        found.append(f"dtype is {q.dtype}, the native kernel takes float32, bfloat16 and float16")
    for name, size in (("key", d), ("value", e)):
        if not 1 <= size <= MOST_SIZE:
            found.append(f"{name} size is {size}, the native kernel takes 1 to {MOST_SIZE}")
    return tuple(found)


def recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    state: Tensor | None = None,
    *,
    beta: Tensor | None = None,
    keep: Tensor | None = None,
    scale: float = 1.0,
    feature_map: str | None = None,
    means: bool = False,
) -> tuple[Tensor, Tensor]:
    """``o`` (b, h, m, e) in q's dtype and the state (b, s, d, e) float32 after the last token.

    q: (b, h, m, d), float32, bfloat16 or float16, the last ``m`` of the ``n`` positions. k: (b, ., n, d) and v: (b, .,
    n, e), same dtype; the numbers of their heads divide ``s``, which divides ``h``.
    log_decay: (s,), (b, s, n) or (b, s, n, d), at most 0; None never fades.
    beta: (b, s, n) for the delta rule, whose tokens have to be lawful: see ``attnkit.mechanisms.delta.lawful``.
    state: (b, s, d, e); None is zeros. ``s`` is the most heads that any of k, v, log_decay, beta and state has.
    keep: (b, n) bool, False for padding, which neither adds to the state nor lets it fade; not with ``beta``.
    feature_map: "elu" or "relu", which queries and keys pass through first, as in ``attnkit.mechanisms.linear``.
    means: divide results by the sum of their weights, or by 1 where it is 0; states then have one more column, of the
        keys' sums, and so has what is given. Not with ``beta``, as little as a map.
    """
    if log_decay is not None:
        log_decay = log_decay.float()
        if log_decay.dim() == 1:
            log_decay = log_decay[None, :, None].expand(q.shape[0], -1, k.shape[2])
    beta = None if beta is None else beta.float()
    state = None if state is None else state.float()
    given: Given = (q, k, v, log_decay, beta, state)
    options = _options(scale, keep, feature_map, means)
    trains = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given)
    if torch.compiler.is_compiling():
        o, last, *_ = _operator(*given, *options, trains)
        return o, last
    if trains:
        o, last = _Recurrence.apply(*given, options)  # type: ignore[no-untyped-call]
        return o, last
    found = _forward(given, options, keep_states=False)
    return found.o, found.last


class Found(NamedTuple):
    """Results and the last state; for gradients states before every span, divisors, and how many tokens count."""

    o: Tensor
    last: Tensor
    states: Tensor
    total: Tensor | None
    lawful: Tensor


class _Recurrence(Function):
    """The kernels with their gradients, which have none themselves."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        beta: Tensor | None,
        state: Tensor | None,
        options: Options,
    ) -> tuple[Tensor, Tensor]:
        found = _forward((q, k, v, log_decay, beta, state), options, keep_states=True)
        ctx.options = options
        o = found.o if options.means else None
        ctx.save_for_backward(q, k, v, log_decay, beta, state, o, found.states, found.total, found.lawful)
        return found.o, found.last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_o: Tensor, d_last: Tensor) -> tuple[Tensor | None, ...]:
        *given, o, states, total, lawful = ctx.saved_tensors
        saved = {"o": o, "states": states, "total": total, "lawful": lawful}
        slopes = _backward(tuple(given), ctx.options, saved, d_o, d_last, ctx.needs_input_grad[3])
        return *slopes, None


@torch.library.custom_op("attnkit::recurrence", mutates_args=(), device_types="cpu")
def _operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    state: Tensor | None,
    scale: float,
    keep: Tensor | None,
    feature_map: str | None,
    means: bool,
    trains: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``Found``, with an empty tensor for what there is not."""
    options = _options(scale, keep, feature_map, means)
    found = _forward((q, k, v, log_decay, beta, state), options, keep_states=trains)
    return found.o, found.last, found.states, _or_empty(found.total, q), found.lawful


@_operator.register_fake
def _shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    state: Tensor | None,
    scale: float,
    keep: Tensor | None,
    feature_map: str | None,
    means: bool,
    trains: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    found = _found((q, k, v, log_decay, beta, state), means, keep_states=trains)
    return found.o, found.last, found.states, _or_empty(found.total, q), found.lawful


@torch.library.custom_op("attnkit::recurrence_backward", mutates_args=(), device_types="cpu")
def _backward_operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    state: Tensor | None,
    scale: float,
    keep: Tensor | None,
    feature_map: str | None,
    means: bool,
    o: Tensor,
    states: Tensor,
    total: Tensor,
    lawful: Tensor,
    d_o: Tensor,
    d_last: Tensor,
    decays: bool,
) -> list[Tensor]:
    """Gradients of the first six, those of decays if they are wanted; an empty tensor for what there is not."""
    options = _options(scale, keep, feature_map, means)
    saved = {"o": o, "states": states, "total": total if means else None, "lawful": lawful}
    slopes = _backward((q, k, v, log_decay, beta, state), options, saved, d_o, d_last, decays)
    return [_or_empty(x, q) for x in slopes]


@_backward_operator.register_fake
def _backward_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    state: Tensor | None,
    scale: float,
    keep: Tensor | None,
    feature_map: str | None,
    means: bool,
    o: Tensor,
    states: Tensor,
    total: Tensor,
    lawful: Tensor,
    d_o: Tensor,
    d_last: Tensor,
    decays: bool,
) -> list[Tensor]:
    given = (q, k, v, log_decay if decays else None, beta, state)
    return [_or_empty(None if x is None else x.new_empty(x.shape), q) for x in given]


def _or_empty(x: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0, dtype=torch.float32) if x is None else x


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *given, ctx.scale, keep, ctx.feature_map, ctx.means, _ = inputs
    o, _, states, total, lawful = output
    ctx.save_for_backward(*given, keep, o, states, total, lawful)


def _slopes(ctx: Any, d_o: Tensor, d_last: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    *given, keep, o, states, total, lawful = ctx.saved_tensors
    needs = ctx.needs_input_grad[:6]
    found = torch.ops.attnkit.recurrence_backward(
        *given, ctx.scale, keep, ctx.feature_map, ctx.means, o, states, total, lawful, d_o, d_last, needs[3]
    )
    return *(x if need else None for x, need in zip(found, needs, strict=True)), *[None] * 5


_operator.register_autograd(_slopes, setup_context=_keep)


def _found(given: Given, means: bool, *, keep_states: bool) -> Found:
    """Room for what a call finds."""
    q, k, v, _, beta, _ = given
    (b, h, m, d), n, e, s = q.shape, k.shape[2], v.shape[3], _states(given)
    columns = e + means
    spans = -(-n // linear.SPAN) if keep_states else 0
    return Found(
        o=empty(q, b, h, m, e),
        last=empty(q, b, s, d, columns, dtype=torch.float32),
        states=empty(q, b, s, spans, d, columns, dtype=torch.float32),
        total=empty(q, b, h, max(m, 1), dtype=torch.float32)
        if means
        else None,  # never null: it says that there are means
        lawful=q.new_empty(0 if beta is None else b * s, dtype=torch.int64),
    )


def _forward(given: Given, options: Options, *, keep_states: bool) -> Found:
    given = _laid_out(given)
    found, state = _found(given, options.means, keep_states=keep_states), given[5]
    if given[1].shape[2] == 0:
        found.last.zero_() if state is None else found.last.copy_(state)
    results = found._asdict() | {"states": found.states if keep_states else None}
    native.run("linear_forward", _packed(given, options, results))
    return found


def _backward(
    given: Given,
    options: Options,
    saved: dict[str, Tensor | None],
    d_o: Tensor,
    d_last: Tensor,
    decays: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of what was given, those of decays if they are wanted."""
    q, k, v, log_decay, beta, state = given = _laid_out(given)
    (b, h, m, d), n, e, s = q.shape, k.shape[2], v.shape[3], _states(given)
    slopes = {
        "dq": empty(q, b, h, m, d),
        "dk": empty(k, b, s, n, d),
        "dv": empty(v, b, s, n, e),
        "d_decay": empty(q, *log_decay.shape, dtype=torch.float32) if log_decay is not None and decays else None,
        "d_beta": None if beta is None else q.new_empty(b, s, n, dtype=torch.float32),
        "d_state": d_last.clone(memory_format=torch.contiguous_format),  # what it is without a token
    }
    more = saved | {"d_o": d_o.to(q.dtype).contiguous(), "d_last": d_last.contiguous()}
    native.run("linear_backward", _packed(given, options, more | slopes))
    for name, x in (("dk", k), ("dv", v)):
        slope = slopes[name]
        if slope is not None and x.shape[1] != s:
            slopes[name] = slope.unflatten(1, (x.shape[1], -1)).sum(2)
    if state is None:
        slopes["d_state"] = None
    return tuple(slopes.values())


def _states(given: Given) -> int:
    return max(x.shape[1] for x in given[1:] if x is not None)


def _laid_out(given: Given) -> Given:
    """With what the kernels ask of a layout: numbers of a row without gaps, and states without any."""
    q, k, v, log_decay, beta, state = given
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    if log_decay is not None and log_decay.dim() == 4 and log_decay.stride(3) != 1:
        log_decay = log_decay.contiguous()
    return q, k, v, log_decay, beta, None if state is None else state.contiguous()


def _packed(given: Given, options: Options, more: dict[str, Tensor | None]) -> bytes:
    q, k, v, log_decay, beta, state = given
    (b, h, m, d), n, e = q.shape, k.shape[2], v.shape[3]
    tensors: dict[str, Tensor | None] = {"q": q, "k": k, "v": v, "decay": log_decay, "beta": beta, "state": state}
    tensors |= more | {"keep": options.keep}
    decays = linear.DECAY_NONE
    if log_decay is not None and log_decay.numel():  # torch has no address for nothing
        decays = linear.DECAY_CHANNEL if log_decay.dim() == 4 else linear.DECAY_TOKEN
    return native.pack_linear(
        *(0 if x is None else x.data_ptr() for x in (tensors.get(name) for name in POINTERS)),
        *(b, h, _states(given), k.shape[1], v.shape[1], m, n, d, e),
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *((0, 0, 0) if log_decay is None else log_decay.stride()[:3]),
        *((0, 0, 0) if beta is None else beta.stride()),
        torch.get_num_threads(),
        native.DTYPES[q.dtype],
        decays,
        MAPS.get(options.feature_map or "", linear.MAP_NONE),
        options.scale,
    )
