"""The declarations of csrc/abi/rotation.h."""

from __future__ import annotations

from ctypes import c_char_p, c_int32, c_int64, c_void_p

FIELDS: tuple[tuple[str, type], ...] = (
    *((name, c_void_p) for name in ("x", "cos", "sin", "y")),
    *((name, c_int64) for name in ("b", "h", "m", "d", "x_b", "x_h", "x_m")),
    *((name, c_int64) for name in ("cos_b", "cos_m", "sin_b", "sin_m", "y_b", "y_h", "y_m")),
    ("dtype", c_int32),
    ("threads", c_int32),
)

FUNCTIONS: dict[str, tuple[type, tuple[type, ...]]] = {"attnkit_rotate": (c_int32, (c_char_p,))}
