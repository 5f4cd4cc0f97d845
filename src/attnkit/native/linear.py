"""The declarations of csrc/abi/linear.h: sums over the past that fade, with and without the delta rule."""

from __future__ import annotations

from ctypes import c_char_p, c_float, c_int32, c_int64, c_void_p

SPAN = 256  # tokens between two states that are kept for gradients
DECAY_NONE, DECAY_TOKEN, DECAY_CHANNEL = 0, 1, 2
MAP_NONE, MAP_ELU, MAP_RELU = 0, 1, 2

ERRORS = {30: "decays, map, means, padding and the delta rule of a sum that fades do not go together"}

FIELDS: tuple[tuple[str, type], ...] = (
    *((name, c_void_p) for name in ("q", "k", "v", "decay", "beta", "keep", "state", "o", "last")),
    *((name, c_void_p) for name in ("states", "total", "lawful", "d_o", "d_last")),
    *((name, c_void_p) for name in ("dq", "dk", "dv", "d_decay", "d_beta", "d_state")),
    *((name, c_int64) for name in ("b", "h", "s", "k_heads", "v_heads", "m", "n", "d", "e")),
    *((name, c_int64) for name in ("q_b", "q_h", "q_m", "k_b", "k_h", "k_n", "v_b", "v_h", "v_n")),
    *((name, c_int64) for name in ("decay_b", "decay_s", "decay_n", "beta_b", "beta_s", "beta_n", "threads")),
    ("dtype", c_int32),
    ("decay_kind", c_int32),
    ("map", c_int32),
    ("scale", c_float),
)

FUNCTIONS: dict[str, tuple[type, tuple[type, ...]]] = {
    "attnkit_linear_forward_scratch_bytes": (c_int64, (c_char_p,)),
    "attnkit_linear_forward": (c_int32, (c_char_p, c_void_p, c_int64)),
    "attnkit_linear_backward_scratch_bytes": (c_int64, (c_char_p,)),
    "attnkit_linear_backward": (c_int32, (c_char_p, c_void_p, c_int64)),
}
