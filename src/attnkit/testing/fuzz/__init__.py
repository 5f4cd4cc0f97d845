"""Calls of the native kernels that nobody means well: each ends in a right answer or in one sentence.

``python -m attnkit.testing.fuzz`` makes thousands in a process of its own, so that a signal ends that process alone and
is reported with the seed that replays it. ``csrc/tests`` does the same below Python, under the sanitizers.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from attnkit import native
from attnkit.masks import Mask, causal, symmetric_window, window
from attnkit.mechanisms.softmax import SPEC as SOFTMAX
from attnkit.mechanisms.softmax import softmax_attention_varlen
from attnkit.mechanisms.softmax.step import SPEC as STEP
from attnkit.mechanisms.softmax.step import reference as step_reference
from attnkit.registry import mechanisms
from attnkit.spec import Mechanism, Sizes
from attnkit.state import KVState, PagedKVState, PagePool, WindowState
from attnkit.testing import runs, samplers

LENGTHS = (0, 1, 2, 5, 9, 47, 48, 49, 64, 111, 200)
HEAD_SIZES = (1, 2, 3, 8, 16, 59, 64, 64, 96, 111, 128, 300)
TOO_LARGE = 577
DTYPES = (*native.DTYPES, *native.DTYPES, *native.DTYPES, torch.float64)
INTERVALS: tuple[Mask | None, ...] = (None, causal(), window(1), window(50), symmetric_window(7))
REFUSALS = (ValueError, TypeError, NotImplementedError)

ANSWER, REFUSAL = "answer", "refusal"


@contextmanager
def somewhere(rng: random.Random) -> Iterator[None]:
    """At one of the instruction levels that run here, with one thread or two."""
    with runs.threads(rng.choice((1, 2))), native.use_level(rng.choice(native.STATUS.levels)):
        yield


def attempt(family: str, seed: int) -> str:
    """Make the call that ``seed`` draws; ``ANSWER`` or ``REFUSAL``.

    Raises ``AssertionError`` for a wrong answer and for a refusal of many lines; any other error is the call's own.
    """
    rng = random.Random(f"{family} {seed}")
    torch.manual_seed(seed)
    with somewhere(rng):
        try:
            return FAMILIES[family](rng)
        except REFUSALS as refusal:
            text = str(refusal).strip()
            # A named backend that cannot run a call says so in a line of its own.
            lines = 2 if isinstance(refusal, NotImplementedError) else 1
            assert text and text.count("\n") < lines, f"a refusal of several lines: {text}"
            return REFUSAL


def described(arguments: runs.Arguments) -> str:
    """The call in a few words, for whoever replays it."""
    words = (
        f"{name} {str(x.dtype).removeprefix('torch.')} {tuple(x.shape)} strides {x.stride()}"
        if isinstance(x, Tensor)
        else f"{name} {x!r}"
        for name, x in arguments.items()
    )
    return "; ".join(words)


@contextmanager
def _saying(arguments: runs.Arguments) -> Iterator[None]:
    """Errors that are no refusals name the call."""
    try:
        yield
    except REFUSALS:
        raise
    except Exception as error:
        first = str(error).strip() or type(error).__name__
        raise AssertionError(f"{type(error).__name__}: {first} [{described(arguments)}]") from error


def of_mechanism(spec: Mechanism, rng: random.Random) -> str:
    """A call of a mechanism's function; the answer, or now and then its gradients, against the definition."""
    size, dtype = sizes(rng), rng.choice(DTYPES)
    try:
        arguments = samplers.arguments(spec, rng, of=size, dtype=dtype)
    except (IndexError, RuntimeError) as error:
        raise ValueError(f"{spec.name} has no sample of {size}") from error
    bad = rng.random() < 0.3
    if bad:
        spoil(rng, arguments)
    with _saying(arguments):
        if not bad and spec.backend("cpu").grad and rng.random() < 0.25:
            if runs.reasons(spec, "cpu", arguments) or not _differentiable(spec, arguments):
                return REFUSAL
            runs.assert_gradients_match(spec, "cpu", arguments)
        else:
            got = runs.run(spec, "cpu", arguments)
            _judge(spec, got, arguments, next(iter(runs.tensors(arguments).values())).dtype)
    return ANSWER


def _differentiable(spec: Mechanism, arguments: runs.Arguments) -> bool:
    """Whether the backend takes the call when a gradient of every floating argument is wanted."""
    leaves = {name: x.detach().requires_grad_() for name, x in runs.tensors(arguments).items()}
    return not runs.reasons(spec, "cpu", {**arguments, **leaves})


def _judge(spec: Mechanism, got: runs.Results, arguments: runs.Arguments, dtype: torch.dtype) -> None:
    try:
        true, plain = runs.gold(spec, arguments), runs.naive(spec, arguments)
    except REFUSALS as refusal:
        raise AssertionError(f"answered what the definition refuses: {refusal}") from refusal
    runs.assert_results_within(got, true, plain, dtype)


def sizes(rng: random.Random) -> Sizes:
    """Sizes that are seldom tried; as many keys as queries, more, or fewer."""
    g = rng.choice((1, 2))
    n = rng.choice(LENGTHS)
    m = rng.choice((n, n, rng.choice(LENGTHS), min(n, 1)))
    return Sizes(
        b=rng.choice((1, 1, 2, 3, 0)),
        h=g * rng.choice((1, 2, 3)),
        g=g,
        m=m,
        n=n,
        d=head_size(rng),
        e=head_size(rng),
    )


def head_size(rng: random.Random) -> int:
    return TOO_LARGE if rng.random() < 0.03 else rng.choice(HEAD_SIZES)


def spoil(rng: random.Random, arguments: dict[str, Any]) -> None:
    """Make one thing wrong with a call, or strange: what is left may still have an answer."""
    numbers = [name for name, x in arguments.items() if isinstance(x, int | float) and not isinstance(x, bool)]
    if numbers and rng.random() < 0.3:
        number = rng.choice(numbers)
        strange: tuple[Any, ...] = (-1, 0, 2**31, 2**62, 1.5, "7")
        if isinstance(arguments[number], float):
            strange = (-1, 0, 3.0, 2.0**15, 2.0**62, math.nan, "7")
        arguments[number] = rng.choice(strange)
        return
    name = rng.choice([name for name, x in arguments.items() if isinstance(x, Tensor)])
    if "mask" in arguments and rng.random() < 0.2:
        name = "mask"
        arguments["mask"] = torch.ones(rng.choice(LENGTHS), rng.choice(LENGTHS), dtype=torch.bool)
    x: Tensor = arguments[name]
    axis = rng.randrange(x.dim()) if x.dim() else 0
    other = rng.randrange(x.dim()) if x.dim() else 0
    ways: tuple[Callable[[], Any], ...] = (
        lambda: x.narrow(axis, 0, 0),
        lambda: x.narrow(axis, 0, min(1, x.shape[axis])),
        lambda: torch.cat([x, x.narrow(axis, 0, min(1, x.shape[axis]))], axis),
        lambda: torch.cat([x] * 7, axis),
        lambda: x.flatten(0, 1) if x.dim() > 1 else x[None],
        lambda: x[None],
        lambda: x.transpose(axis, other),
        lambda: x.double(),
        lambda: x.half(),
        lambda: x.int(),
        lambda: x.bool(),
        lambda: x.to("meta"),
        lambda: x.to_sparse(),
        lambda: x.tolist(),
        lambda: None,
    )
    arguments[name] = rng.choice(ways)()


def _features(rng: random.Random, h: int, dtype: torch.dtype) -> dict[str, Any]:
    some = [name for name in ("alibi", "softcap", "sink") if rng.random() < 0.25]
    return {"mask": rng.choice(INTERVALS)} | {name: samplers.DRAW[name](rng, Sizes(h=h), dtype) for name in some}


def of_varlen(rng: random.Random) -> str:
    """Packed documents, empty ones among them, against the definition document by document."""
    g, d, e, dtype = rng.choice((1, 2)), head_size(rng), head_size(rng), rng.choice(DTYPES)
    h = g * rng.choice((1, 3))
    lengths = [rng.choice(LENGTHS[:-1]) for _ in range(rng.randint(1, 5))]
    key_lengths = lengths if rng.random() < 0.6 else [rng.choice(LENGTHS[:-1]) for _ in lengths]
    drawn = (
        torch.randn(*shape).to(dtype) for shape in ((h, sum(lengths), d), *((g, sum(key_lengths), x) for x in (d, e)))
    )
    arguments: dict[str, Any] = dict(zip("qkv", (samplers.laid_out(rng, x[None])[0] for x in drawn), strict=True))
    arguments["q_offsets"] = torch.tensor([0, *lengths]).cumsum(0)
    arguments["k_offsets"] = torch.tensor([0, *key_lengths]).cumsum(0)
    arguments |= _features(rng, h, dtype)
    if rng.random() < 0.3:
        spoil(rng, arguments)
        if rng.random() < 0.3 and isinstance(arguments["q_offsets"], Tensor):
            arguments["q_offsets"] = arguments["q_offsets"] * rng.choice((-1, 2, 2**40))
    with _saying(arguments):
        o = softmax_attention_varlen(**arguments, backend="cpu")
        q_edges = arguments["q_offsets"].tolist()
        k_edges = q_edges if arguments["k_offsets"] is None else arguments["k_offsets"].tolist()
        settings = {name: arguments[name] for name in ("mask", "alibi", "softcap", "sink") if name in arguments}
        for i in range(len(q_edges) - 1):
            rows, keys = slice(q_edges[i], q_edges[i + 1]), slice(k_edges[i], k_edges[i + 1])
            alone = {"q": arguments["q"][None, :, rows]} | {name: arguments[name][None, :, keys] for name in "kv"}
            _judge(SOFTMAX, (o[None, :, rows].clone(),), runs.copies(alone | settings), o.dtype)
    return ANSWER


def of_step(rng: random.Random) -> str:
    """A few queries over a decoding state of every form: plain, quantised, a ring, pages in any order."""
    b, g, d, e = rng.choice((1, 2, 3)), rng.choice((1, 2)), head_size(rng), head_size(rng)
    if rng.random() < 0.5:
        d, e = 32 * rng.randint(1, 5), 32 * rng.randint(1, 5)
    h, n, m, dtype = g * rng.choice((1, 2, 4)), rng.choice(LENGTHS), rng.choice((1, 1, 2, 16, 49)), rng.choice(DTYPES)
    k, v = (samplers.laid_out(rng, torch.randn(b, g, n, size).to(dtype)) for size in (d, e))
    form = rng.choice(("plain", "int8", "fp8", "int4", "ring", "pages"))
    state: Any
    codec: Any
    if form == "pages":
        codec, page = rng.choice((None, None, "int8", "fp8", "int4")), rng.choice((1, 7, 16))
        page = page if codec is None else 32 * page
        pool = PagePool(b * (n // page + 2), page, g, d, e, dtype=dtype, codec=codec)
        rng.shuffle(pool._free)
        for x in pool.tensors:
            x.fill_(torch.nan if x.is_floating_point() else 0x7F)
        state = PagedKVState(pool, b)
        state.append(k, v, [rng.randint(min(m, n), n) for _ in range(b)])
    elif form == "ring":
        state = WindowState(b, g, rng.choice((1, 16, 50)), d, e, dtype=dtype)
        state.append(k, v)
    else:
        codec = None if form == "plain" else form
        state = KVState(b, g, max(1, n), d, e, dtype=dtype, codec=codec)
        state.store(k, v)
    arguments: dict[str, Any] = {"q": samplers.laid_out(rng, torch.randn(b, h, m, d).to(dtype)), "state": state}
    arguments |= _features(rng, h, dtype)
    if rng.random() < 0.25:
        spoil(rng, arguments)
    with _saying(arguments):
        call = STEP.call(**arguments, return_lse=True)
        got = runs.run(STEP, "cpu", arguments | {"return_lse": True})
        true = step_reference(**{**call, "q": call["q"].double()})
        plain = step_reference(**call)
        assert isinstance(true, tuple) and isinstance(plain, tuple)
        runs.assert_results_within(got, true, tuple(x.clone() for x in plain), call["q"].dtype)
    return ANSWER


def _of(spec: Mechanism) -> Callable[[random.Random], str]:
    return lambda rng: of_mechanism(spec, rng)


FAMILIES: dict[str, Callable[[random.Random], str]] = {
    **{
        name: _of(spec)
        for name, spec in mechanisms().items()
        if any(backend.name == "cpu" for backend in spec.backends)
    },
    "varlen": of_varlen,
    "step": of_step,
}
"""Every mechanism that has native kernels, packed documents, and decoding over states."""
