"""The native kernels: one plain C library, found beside this file and called through ``ctypes``.

What is known about the library is settled at import and kept in ``STATUS``: a look-up at every call would cost time,
and ``torch.compile`` would trace it. Without the library the package works on, and backends that need it say why not.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import c_char_p, c_double, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# First of all: the library then shares torch's OpenMP threads instead of starting its own.
import torch

from attnkit.native import cache, latent, linear, projection, rotation, sparse

__all__ = [
    "BLOCK_KEYS",
    "BLOCK_QUERIES",
    "STATUS",
    "Status",
    "bf16_dot_gflops",
    "fma_gflops",
    "get_level",
    "read_gigabytes",
    "run",
    "run_alone",
    "set_level",
    "use_level",
]

LIBRARY = "attnkit_native.so"

# The declarations of csrc/abi.h and csrc/abi/; a test compares the two.
ABI_VERSION = 2
BLOCK_QUERIES = 48
BLOCK_KEYS = 64
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
PREFILL, DECODE = 0, 1

SOFTMAX_FIELDS: tuple[tuple[str, type], ...] = (
    *((name, c_void_p) for name in ("q", "k", "v", "o", "lse", "lse_rest", "bias", "alibi", "sink", "total")),
    *((name, c_void_p) for name in ("offsets", "columns", "pattern", "patterns")),
    *((name, c_int64) for name in ("b", "h", "g", "m", "n", "d", "e")),
    *((name, c_int64) for name in ("q_b", "q_h", "q_m", "k_b", "k_g", "k_n", "v_b", "v_g", "v_n")),
    *((name, c_int64) for name in ("o_b", "o_h", "o_m", "bias_b", "bias_h", "bias_m", "bias_n")),
    *((name, c_int64) for name in ("total_b", "total_h")),
    *((name, c_int64) for name in ("left", "right", "mask_batches", "mask_heads", "threads", "seed")),
    *((name, c_int32) for name in ("dtype", "kernel", "drop_below")),
    *((name, c_float) for name in ("scale", "softcap", "keep_scale")),
)

SOFTMAX_GRADIENT_FIELDS: tuple[tuple[str, type], ...] = (
    *((name, c_void_p) for name in ("d_o", "d_lse", "d_q", "d_k", "d_v", "d_bias", "d_sink", "d_alibi", "d_total")),
    *((name, c_int64) for name in ("d_o_b", "d_o_h", "d_o_m", "d_bias_b", "d_bias_h", "d_bias_m", "d_bias_n")),
    *((name, c_int64) for name in ("d_q_h", "d_k_g", "d_v_g")),
)

DOCUMENTS_FIELDS: tuple[tuple[str, type], ...] = (
    *((name, c_void_p) for name in ("q_offsets", "k_offsets")),
    *((name, c_int64) for name in ("count", "decode_queries")),
)

# A struct goes over as packed bytes: making them is one C call, filling a ctypes.Structure is one for each field.
FUNCTIONS: dict[str, tuple[type, tuple[type, ...]]] = {
    "attnkit_abi_version": (c_int32, ()),
    "attnkit_openmp": (c_int32, ()),
    "attnkit_compiler": (c_char_p, ()),
    "attnkit_level_count": (c_int32, ()),
    "attnkit_level_name": (c_char_p, (c_int32,)),
    "attnkit_level_runs_here": (c_int32, (c_int32,)),
    "attnkit_get_level": (c_int32, ()),
    "attnkit_set_level": (c_int32, (c_int32,)),
    "attnkit_softmax_forward_scratch_bytes": (c_int64, (c_char_p,)),
    "attnkit_softmax_forward": (c_int32, (c_char_p, c_void_p, c_int64)),
    "attnkit_softmax_backward_scratch_bytes": (c_int64, (c_char_p, c_char_p)),
    "attnkit_softmax_backward": (c_int32, (c_char_p, c_char_p, c_void_p, c_int64)),
    "attnkit_documents_forward_scratch_bytes": (c_int64, (c_char_p, c_char_p)),
    "attnkit_documents_forward": (c_int32, (c_char_p, c_char_p, c_void_p, c_int64)),
    "attnkit_documents_backward_scratch_bytes": (c_int64, (c_char_p, c_char_p, c_char_p)),
    "attnkit_documents_backward": (c_int32, (c_char_p, c_char_p, c_char_p, c_void_p, c_int64)),
    **cache.FUNCTIONS,
    **latent.FUNCTIONS,
    **linear.FUNCTIONS,
    **projection.FUNCTIONS,
    **rotation.FUNCTIONS,
    **sparse.FUNCTIONS,
    "attnkit_fma_gflops": (c_double, (c_int64, c_double)),
    "attnkit_bf16_dot_gflops": (c_double, (c_int64, c_double)),
    "attnkit_read_gigabytes": (c_double, (c_void_p, c_int64, c_int64, c_double)),
}

ERRORS = {
    1: "the dtype is none of float32, bfloat16 and float16",
    2: "a size, a stride or the threads are out of range, an array is missing, or KV heads do not divide query heads",
    3: "the mask is made for other sizes than the call's, its window is out of range, or its blocks are not in order",
    4: "the decode kernel takes at most 48 queries with a block list",
    5: "the instruction level is not built or does not run on this processor",
    6: "the scratch memory is too small or does not start at a multiple of 64 bytes",
    **cache.ERRORS,
    **linear.ERRORS,
}

_FORMATS: dict[Any, str] = {c_void_p: "P", c_int64: "q", c_int32: "i", c_float: "f"}
STRUCTS = {
    "softmax": SOFTMAX_FIELDS,
    "softmax_gradients": SOFTMAX_GRADIENT_FIELDS,
    "documents": DOCUMENTS_FIELDS,
    "cache": cache.FIELDS,
    "latent": latent.FIELDS,
    "linear": linear.FIELDS,
    "projection": projection.FIELDS,
    "rotation": rotation.FIELDS,
    **sparse.STRUCTS,
}


def _packer(fields: tuple[tuple[str, type], ...]) -> Callable[..., bytes]:
    return struct.Struct("@" + "".join(_FORMATS[kind] for _, kind in fields)).pack


pack_softmax = _packer(SOFTMAX_FIELDS)
pack_linear = _packer(linear.FIELDS)
pack_latent = _packer(latent.FIELDS)
pack_projection = _packer(projection.FIELDS)
pack_rotation = _packer(rotation.FIELDS)
pack_softmax_gradients = _packer(SOFTMAX_GRADIENT_FIELDS)
pack_documents = _packer(DOCUMENTS_FIELDS)
pack_cache = _packer(cache.FIELDS)
pack_mask_node, pack_block_list, pack_selected, pack_coarse, pack_indexer, pack_gates, pack_topk = map(
    _packer, sparse.STRUCTS.values()
)


@dataclass(frozen=True)
class Status:
    """What is known about the native library: whether it can be used, why not, and what it was built with."""

    available: bool
    reason: str
    """Why it is not available; empty when it is."""
    path: str = ""
    abi: int = 0
    openmp: bool = False
    compiler: str = ""
    level: str = ""
    """The instruction level chosen at import: the fastest that runs here, or the one ATTNKIT_CPU_LEVEL names."""
    levels: tuple[str, ...] = ()
    """The levels that run on this processor, slowest first."""
    built: tuple[str, ...] = ()


def _find() -> Path | None:
    # An editable install leaves the library among the installed files, away from this source.
    places = (Path(__file__).parent, Path(sysconfig.get_path("platlib"), "attnkit", "native"))
    return next((place / LIBRARY for place in places if (place / LIBRARY).is_file()), None)


def _load() -> tuple[Any, Status]:
    path = _find()
    if path is None:
        why = "it was not built at install: install a C++ compiler, then attnkit again with ATTNKIT_REQUIRE_NATIVE=1"
        return None, Status(False, f"the native library is missing, {why}")
    try:
        library = ctypes.CDLL(str(path))
        version = library.attnkit_abi_version()
    except (OSError, AttributeError) as error:
        return None, Status(False, f"the native library does not load: {error}", str(path))
    if version != ABI_VERSION:
        why = f"the native library has interface {version}, expected {ABI_VERSION}: install attnkit again"
        return None, Status(False, why, str(path), version)
    for name, (result, arguments) in FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    built = tuple(library.attnkit_level_name(i).decode() for i in range(library.attnkit_level_count()))
    runnable = tuple(name for i, name in enumerate(built) if library.attnkit_level_runs_here(i))
    wanted = os.environ.get("ATTNKIT_CPU_LEVEL") or None
    if wanted is not None:
        if wanted not in runnable:
            why = (
                f"ATTNKIT_CPU_LEVEL is {wanted!r}, expected one of {', '.join(runnable)}, which this processor runs: "
                "name one of these or unset it"
            )
            warnings.warn(why, stacklevel=2)
            return None, Status(False, why, str(path), version, levels=runnable, built=built)
        library.attnkit_set_level(built.index(wanted))
    return library, Status(
        available=True,
        reason="",
        path=str(path),
        abi=version,
        openmp=bool(library.attnkit_openmp()),
        compiler=library.attnkit_compiler().decode(),
        level=built[library.attnkit_get_level()],
        levels=runnable,
        built=built,
    )


_LIBRARY, STATUS = _load()


def _needed() -> Any:
    if _LIBRARY is None:
        raise NotImplementedError(STATUS.reason)
    return _LIBRARY


def get_level() -> str:
    """The instruction level that runs now."""
    level: int = _needed().attnkit_get_level()
    return STATUS.built[level]


def set_level(name: str) -> None:
    """Run the kernels compiled for another instruction level of this processor, from now on and for all threads."""
    library = _needed()
    if name not in STATUS.levels:
        raise ValueError(
            f"set_level got {name!r}, expected one of {', '.join(STATUS.levels)}, which this processor runs"
        )
    library.attnkit_set_level(STATUS.built.index(name))


@contextmanager
def use_level(name: str) -> Iterator[None]:
    """``set_level`` for the length of a ``with`` block."""
    before = get_level()
    set_level(name)
    try:
        yield
    finally:
        set_level(before)


def run(function: str, *call: bytes) -> None:
    """Run ``attnkit_<function>`` on a packed call, such as ``softmax_forward`` on what ``pack_softmax`` gave.

    Scratch memory is torch's, so that its allocator and profiler see it.
    """
    size = getattr(_LIBRARY, f"attnkit_{function}_scratch_bytes")(*call)
    if size < 0:
        raise RuntimeError(f"the native kernel {function} refused a call: {ERRORS[-size]}")
    scratch = torch.empty(size, dtype=torch.uint8)
    status = getattr(_LIBRARY, f"attnkit_{function}")(*call, scratch.data_ptr(), size)
    if status:
        raise RuntimeError(f"the native kernel {function} refused a call: {ERRORS[status]}")


def run_alone(function: str, call: bytes) -> None:
    """Run ``attnkit_<function>``, which needs no scratch memory, on a packed call: "project" or "rotate"."""
    if status := getattr(_LIBRARY, f"attnkit_{function}")(call):
        raise RuntimeError(f"the native kernel {function} refused a call: {ERRORS[status]}")


def fma_gflops(threads: int, seconds: float = 0.2) -> float:
    """Most float32 multiply-adds a second (counted as two operations each, in units of 1e9) at the level that runs."""
    return float(_needed().attnkit_fma_gflops(threads, seconds))


def bf16_dot_gflops(threads: int, seconds: float = 0.2) -> float:
    """The same for bfloat16 dot products; 0 when the level has no such instruction."""
    return float(_needed().attnkit_bf16_dot_gflops(threads, seconds))


def read_gigabytes(buffer: torch.Tensor, threads: int, seconds: float = 0.5) -> float:
    """Most gigabytes (1e9 bytes) a second that threads read from ``buffer``, which should be larger than all caches."""
    size = buffer.numel() * buffer.element_size()
    return float(_needed().attnkit_read_gigabytes(buffer.data_ptr(), size, threads, seconds))
