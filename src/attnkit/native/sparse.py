"""The declarations of csrc/abi/sparse.h: block lists of masks and learned-sparse attention."""

from __future__ import annotations

from ctypes import c_char_p, c_float, c_int32, c_int64, c_void_p

STRUCTS: dict[str, tuple[tuple[str, type], ...]] = {
    "mask_node": (
        ("data", c_void_p),
        *((name, c_int64) for name in ("kind", "a", "b", "batches", "heads")),
    ),
    "block_list": (
        *((name, c_void_p) for name in ("nodes", "offsets", "columns", "pattern", "patterns", "table", "found")),
        *((name, c_int64) for name in ("count", "batches", "heads", "m", "n", "block_q", "block_k")),
        *((name, c_int64) for name in ("entries", "room", "slots")),
    ),
    "selected": (
        *((name, c_void_p) for name in ("q", "k", "v", "o", "chosen", "lse", "lse_rest")),
        *((name, c_int64) for name in ("b", "h", "g", "lists", "m", "n", "d", "e", "s")),
        *((name, c_int64) for name in ("q_b", "q_h", "q_m", "k_b", "k_g", "k_n", "v_b", "v_g", "v_n")),
        *((name, c_int64) for name in ("o_b", "o_h", "o_m", "block", "threads")),
        ("dtype", c_int32),
        ("causal", c_int32),
        ("scale", c_float),
    ),
    "coarse": (
        *((name, c_void_p) for name in ("q", "k", "v", "o", "chosen")),
        *((name, c_int64) for name in ("b", "h", "g", "m", "n", "c", "d", "e", "s")),
        *((name, c_int64) for name in ("q_b", "q_h", "q_m", "k_b", "k_g", "k_n", "v_b", "v_g", "v_n")),
        *((name, c_int64) for name in ("length", "stride", "block", "threads")),
        ("dtype", c_int32),
        ("causal", c_int32),
        ("scale", c_float),
    ),
    "indexer": (
        *((name, c_void_p) for name in ("q", "k", "w", "chosen")),
        *((name, c_int64) for name in ("b", "h", "g", "m", "n", "d", "top")),
        *((name, c_int64) for name in ("q_b", "q_h", "q_m", "k_b", "k_g", "k_n", "w_b", "w_h", "w_m", "threads")),
        ("dtype", c_int32),
    ),
    "gates": (
        *((name, c_void_p) for name in ("q", "means", "chosen")),
        *(
            (name, c_int64)
            for name in ("b", "h", "g", "m", "n", "c", "d", "s", "q_b", "q_h", "q_m", "block", "threads")
        ),
        ("dtype", c_int32),
    ),
    "topk": (("kept", c_void_p), ("most", c_int64)),
}

FUNCTIONS: dict[str, tuple[type, tuple[type, ...]]] = {}
for _name in (
    "block_bounds",
    "block_list_fill",
    "selected_forward",
    "coarse_forward",
    "indexer_forward",
    "gates_forward",
):
    FUNCTIONS[f"attnkit_{_name}_scratch_bytes"] = c_int64, (c_char_p,)
    FUNCTIONS[f"attnkit_{_name}"] = c_int32, (c_char_p, c_void_p, c_int64)

FUNCTIONS["attnkit_topk_forward_scratch_bytes"] = c_int64, (c_char_p, c_char_p)
FUNCTIONS["attnkit_topk_forward"] = c_int32, (c_char_p, c_char_p, c_void_p, c_int64)

# What a node of a mask means: ATTNKIT_MASK_*.
(AND, OR, NOT, INTERVAL, DILATED, STRIDED, FIXED, CHUNKED, PREFIX, GLOBAL, DOCUMENTS, PADDING, BLOCK_SPARSE) = range(13)
