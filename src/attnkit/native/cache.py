"""Declarations of csrc/abi/cache.h: attention over every form of a decoding state."""

from __future__ import annotations

from ctypes import c_char_p, c_float, c_int32, c_int64, c_void_p

FORMS = {None: 0, "int8": 1, "fp8": 2, "int4": 3}

FIELDS: tuple[tuple[str, type], ...] = (
    *((name, c_void_p) for name in ("q", "k", "v", "o", "lse", "bias", "alibi", "sink")),
    *((name, c_void_p) for name in ("offsets", "columns", "pattern", "patterns", "lengths", "pages")),
    *((name, c_void_p) for name in ("k_scale", "k_zero", "v_scale", "v_zero", "recent")),
    *((name, c_int64) for name in ("b", "h", "g", "m", "n", "d", "e")),
    *((name, c_int64) for name in ("q_b", "q_h", "q_m", "k_b", "k_g", "k_n", "v_b", "v_g", "v_n")),
    *((name, c_int64) for name in ("o_b", "o_h", "o_m", "bias_b", "bias_h", "bias_m", "bias_n")),
    *((name, c_int64) for name in ("k_scale_b", "k_scale_g", "v_scale_b", "v_scale_g", "recent_b", "recent_g")),
    *((name, c_int64) for name in ("left", "right", "mask_batches", "mask_heads")),
    *((name, c_int64) for name in ("page", "page_count", "pages_b", "group", "channels", "threads")),
    ("dtype", c_int32),
    ("form", c_int32),
    ("scale", c_float),
    ("softcap", c_float),
)

FUNCTIONS: dict[str, tuple[type, tuple[type, ...]]] = {
    "attnkit_cache_forward_scratch_bytes": (c_int64, (c_char_p,)),
    "attnkit_cache_forward": (c_int32, (c_char_p, c_void_p, c_int64)),
}

ERRORS = {
    20: "a quantised cache lacks scales, or its groups have another size",
    21: "a page table has too few pages or names one that does not exist, or pages of codes cut a tile or group",
}
