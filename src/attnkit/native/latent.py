"""The declarations of csrc/abi/latent.h."""

from __future__ import annotations

from ctypes import c_char_p, c_float, c_int32, c_int64, c_void_p

FIELDS: tuple[tuple[str, type], ...] = (
    *((name, c_void_p) for name in ("q", "latent", "kv_b", "o", "places")),
    *((name, c_int64) for name in ("b", "h", "g", "m", "n", "nope", "r", "c", "e", "stored")),
    *((name, c_int64) for name in ("q_b", "q_h", "q_m", "latent_b", "latent_g", "latent_n", "kv_b_h", "kv_b_row")),
    *((name, c_int64) for name in ("o_b", "o_h", "o_m", "left", "right", "threads")),
    ("dtype", c_int32),
    ("scale", c_float),
)

FUNCTIONS: dict[str, tuple[type, tuple[type, ...]]] = {
    "attnkit_latent_forward_scratch_bytes": (c_int64, (c_char_p,)),
    "attnkit_latent_forward": (c_int32, (c_char_p, c_void_p, c_int64)),
}
