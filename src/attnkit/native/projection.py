"""The declarations of csrc/abi/projection.h."""

from __future__ import annotations

from ctypes import c_char_p, c_int32, c_int64, c_void_p

FIELDS: tuple[tuple[str, type], ...] = (
    *((name, c_void_p) for name in ("x", "w", "bias", "y")),
    *((name, c_int64) for name in ("m", "n", "d", "x_m", "w_n", "y_m")),
    ("dtype", c_int32),
    ("threads", c_int32),
)

FUNCTIONS: dict[str, tuple[type, tuple[type, ...]]] = {"attnkit_project": (c_int32, (c_char_p,))}
