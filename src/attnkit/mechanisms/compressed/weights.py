"""Names of released weights, as Hugging Face's ``DeepseekV4Attention`` has them, in ours."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

NAMES = {
    "q_a_proj.weight": "q_down.weight",
    "q_a_norm.weight": "q_norm.weight",
    "q_b_proj.weight": "q_up.weight",
    "kv_proj.weight": "kv.weight",
    "kv_norm.weight": "kv_norm.weight",
    "sinks": "sink",
    "o_a_proj.weight": "mix",
    "o_b_proj.weight": "o.weight",
    "compressor.indexer.q_b_proj.weight": "indexer.q.weight",
    "compressor.indexer.scorer.weights_proj.weight": "indexer.weights.weight",
} | {
    f"{theirs}.{part}": f"{ours}.{name}"
    for theirs, ours in (("compressor", "compressor"), ("compressor.indexer", "indexer.keys"))
    for part, name in (
        ("kv_proj.weight", "values.weight"),
        ("gate_proj.weight", "gates.weight"),
        ("position_bias", "bias"),
        ("kv_norm.weight", "norm.weight"),
    )
}


def from_deepseek(weights: Mapping[str, Tensor], groups: int) -> dict[str, Tensor]:
    """The same tensors under our names, with the output's blocks stacked."""
    if unknown := weights.keys() - NAMES.keys():
        raise ValueError(f"weights have {sorted(unknown)}, expected names of one DeepseekV4Attention: strip the prefix")
    found = {NAMES[name]: x for name, x in weights.items()}
    if "mix" in found:
        found["mix"] = found["mix"].unflatten(0, (groups, -1))
    return found
