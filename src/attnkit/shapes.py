"""Shape checks whose messages a person can act on. Axis letters are those of design: see ``docs/concepts``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

AXES = {
    "b": "batch",
    "h": "query heads",
    "g": "KV heads",
    "m": "queries",
    "n": "keys",
    "d": "key size",
    "e": "value size",
    "c": "latent size",
    "p": "page size",
    "s": "chunk",
    "x": "model width",
    "t": "packed tokens",
}
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check(where: str, **tensors: tuple[Any, str]) -> dict[str, int]:
    """Sizes of the axes named in each pattern, such as ``check("f", q=(q, "b h m d"), k=(k, "b g n d"))``.

    Raises ``TypeError`` for a value that is not a tensor and ``ValueError`` for a wrong number of dimensions or two
    sizes for one axis.
    """
    sizes: dict[str, int] = {}
    for name, (tensor, pattern) in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{where}: {name} is a {type(tensor).__name__}, expected a tensor ({_axes(pattern)})")
        if tensor.layout != torch.strided:
            raise TypeError(f"{where}: {name} has layout {tensor.layout}, expected torch.strided: call its to_dense()")
        axes, shape = pattern.split(), tensor.shape
        if len(shape) != len(axes):
            raise ValueError(
                f"{where}: {name} has {len(shape)} dimensions {_shape(tensor)}, expected {len(axes)} ({_axes(pattern)})"
            )
        for axis, size in zip(axes, shape, strict=True):
            if sizes.setdefault(axis, size) != size:
                owner = next(other for other, (_, axes) in tensors.items() if axis in axes.split())
                raise ValueError(
                    f"{where}: {AXES.get(axis, axis)} is {size} in {name} {_shape(tensor)} but {sizes[axis]} in "
                    f"{owner} {_shape(tensors[owner][0])}, expected one size"
                )
    return sizes


def check_call(where: str, **tensors: tuple[Any, str]) -> dict[str, int]:
    """``check``, and what any tensors ``q``, ``k``, ``v`` and others beside them have to be.

    The three share one floating dtype, all are on one device, and the KV heads ``g`` divide the query heads ``h``.
    """
    sizes = check(where, **tensors)
    check_same(where, **{name: tensors[name][0] for name in "qkv"})
    check_device(where, **{name: tensor for name, (tensor, _) in tensors.items()})
    check_groups(where, sizes["h"], sizes["g"])
    return sizes


def check_attention(where: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[int, int, int, int, int, int, int]:
    """``check_call`` of ``q`` (b, h, m, d), ``k`` (b, g, n, d), ``v`` (b, g, n, e) and nothing else; the sizes b to e.

    For calls as short as a decode step: between the layers of a model Python itself is cold, and every object and line
    of code it has to fetch counts. What fits passes in a few comparisons, what does not gets its sentence.
    """
    if (
        isinstance(q, Tensor)
        and isinstance(k, Tensor)
        and isinstance(v, Tensor)
        and q.ndim == k.ndim == v.ndim == 4
        and q.dtype is k.dtype is v.dtype
        and q.dtype in FLOATS
        and q.is_cpu
        and k.is_cpu
        and v.is_cpu
    ):
        (b, h, m, d), (_, g, n, e) = q.shape, v.shape
        if (b, g, n) == v.shape[:3] and k.shape == (b, g, n, d) and g and h and h % g == 0:
            return b, h, g, m, n, d, e
    sizes = check_call(where, q=(q, "b h m d"), k=(k, "b g n d"), v=(v, "b g n e"))
    b, h, g, m, n, d, e = (sizes[axis] for axis in "bhgmnde")
    return b, h, g, m, n, d, e


def check_same(where: str, **tensors: Tensor) -> None:
    """All tensors share one floating dtype and one device."""
    (first, lead), *rest = tensors.items()
    if lead.dtype not in FLOATS:
        raise TypeError(f"{where}: {first} has dtype {lead.dtype}, expected float64, float32, bfloat16 or float16")
    for name, tensor in rest:
        if tensor.dtype != lead.dtype:
            raise TypeError(
                f"{where}: {name} has dtype {tensor.dtype} but {first} {lead.dtype}, expected one: cast one"
            )
    check_device(where, **tensors)


def check_device(where: str, **tensors: Tensor) -> None:
    """All tensors are on one device."""
    (first, lead), *rest = tensors.items()
    for name, tensor in rest:
        if tensor.device != lead.device:
            raise ValueError(
                f"{where}: {name} is on {tensor.device} but {first} on {lead.device}, expected one: move one"
            )


def check_floating(where: str, **tensors: Tensor) -> None:
    """Each tensor has a floating dtype."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise TypeError(f"{where}: {name} has dtype {tensor.dtype}, expected a floating one")


def check_keep(where: str, keep: Tensor | None) -> None:
    """Marks of padding are bool."""
    if keep is not None and keep.dtype != torch.bool:
        raise TypeError(f"{where}: keep has dtype {keep.dtype}, expected bool: True for tokens, False for padding")


def check_padded(where: str, keys: str, keep: Tensor | None, **tensors: tuple[Any, str]) -> dict[str, int]:
    """``check_call``, and ``keep`` bool (b, keys): False for padding; None keeps every token."""
    marks = {} if keep is None else {"keep": (keep, f"b {keys}")}
    sizes = check_call(where, **tensors, **marks)
    check_keep(where, keep)
    return sizes


def kept(where: str, q: Tensor, keep: Tensor | None) -> Tensor:
    """``keep`` once it fits queries ``(b, h, n, d)``; all True when None."""
    if keep is None:
        return torch.ones(q.shape[0], q.shape[2], dtype=torch.bool, device=q.device)
    check(where, q=(q, "b h n d"), keep=(keep, "b n"))
    check_device(where, q=q, keep=keep)
    check_keep(where, keep)
    return keep


def check_groups(where: str, h: int, g: int) -> None:
    """The KV heads divide the query heads, of which there are some."""
    if g == 0 or h == 0 or h % g:
        raise ValueError(
            f"{where}: got {h} query heads and {g} KV heads, expected KV heads that divide the query heads"
        )


def check_last(where: str, m: int, n: int) -> None:
    """The queries are the last ``m`` of ``n`` positions, and each has a position."""
    if m > n:
        raise ValueError(
            f"{where}: got {m} queries and {n} keys, expected at most as many queries: they are the last positions"
        )


def _axes(pattern: str) -> str:
    return ", ".join(AXES.get(axis, axis) for axis in pattern.split())


def _shape(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)}"
