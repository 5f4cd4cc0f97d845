"""Families of latent attention (MLA), with an index (DSA) or compressed entries (CSA, HCA)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from attnkit.advise import weights
from attnkit.advise.fields import Fields
from attnkit.advise.model import Layer, Mixer, Model
from attnkit.advise.parts import FULL, WINDOW, Experts, Sizes, attention, kinds, known, model, sizes, sparse

DEEPSEEK = Experts(
    ("n_routed_experts", "num_experts"),
    shared=("n_shared_experts", "num_shared_experts"),
    chosen=("num_experts_per_tok", "num_experts_per_token", "moe_topk"),
    first_dense=("first_k_dense_replace",),
)


def latent(f: Fields, s: Sizes) -> Mixer:
    """A layer of latent attention."""
    c = f.integer("kv_lora_rank")
    nope, rotary = f.integer("qk_nope_head_dim"), f.integer("qk_rope_head_dim", least=0)
    value = f.integer("v_head_dim", default=nope)
    rank = f.integer("q_lora_rank", default=0, least=0) or None
    f.skip("qk_head_dim", "head_dim", "num_key_value_heads")
    count = weights.latent(s.width, s.heads, nope + rotary, value, c, rotary, rank)
    options = (("latent", c), ("rotary", rotary))
    return Mixer("mla", s.heads, 1, nope + rotary, value, options, weights=count)


def _sizes(f: Fields) -> Sizes:
    # One latent serves all heads: what such configurations say of KV heads and of a head's size is not used.
    f.data = {name: value for name, value in f.data.items() if name not in ("num_key_value_heads", "head_dim")}
    f.skip("num_key_value_heads", "head_dim")
    return sizes(f)


def parts(f: Fields, s: Sizes, experts: Experts = DEEPSEEK) -> list[dict[str, int]]:
    """The feed-forward part of each layer, as arguments of ``Layer``."""
    inner = f.integer("intermediate_size", default=4 * s.width)
    plain = {"dense": weights.feed_forward(s.width, inner)}
    if not f.has(*experts.count):
        return [plain] * s.layers
    routed, first = sparse(f, s.width, inner, experts)
    named = f.each("mlp_layer_types", length=s.layers)
    if named is not None:
        return [plain if kind == "dense" else routed for kind in named]
    return [plain if i < first else routed for i in range(s.layers)]


def joined(f: Fields, s: Sizes, mixers: Sequence[Mixer], feeds: Sequence[dict[str, int]], **more: Any) -> Model:
    """A layer for each mixer, with two norms."""
    layers = [
        Layer((mixer,), **{**feed, "dense": feed["dense"] + 2 * s.width})
        for mixer, feed in zip(mixers, feeds, strict=True)
    ]
    return model(f, s, layers, inner=f.integer("intermediate_size", default=4 * s.width), **more)


def deepseek(f: Fields) -> Model:
    """DeepSeek-V2 and V3, and those built like them."""
    s = _sizes(f)
    f.skip("num_nextn_predict_layers", "attention_bias", "mlp_bias")
    return joined(f, s, [latent(f, s)] * s.layers, parts(f, s))


def indexed(f: Fields) -> Model:
    """DeepSeek-V3.2, GLM-5 and HY-V4: latent attention to what an indexer picks, which some layers share."""
    s = _sizes(f)
    heads, size, top = f.heads("index_n_heads"), f.integer("index_head_dim"), f.integer("index_topk")
    plain = latent(f, s)
    named = f.each("indexer_types", length=s.layers) or ["full"] * s.layers
    f.skip("layer_types", "num_nextn_predict_layers", "attention_bias", "mlp_bias")
    mixers = []
    for kind in named:
        if kind not in ("full", "shared"):
            f.fail("indexer_types", f"has {kind!r}", "full or shared")
        own = heads if kind == "full" else 0
        options = (*plain.options, ("top", top), ("index", size), ("index_heads", own))
        count = weights.indexer(s.width, f.integer("q_lora_rank", default=0, least=0), heads, size) if own else 0
        mixers.append(replace(plain, mechanism="dsa", options=options, weights=plain.weights + count))
    found = joined(f, s, mixers, parts(f, s))
    if f.data["model_type"] != "hy_v4":
        return found
    # A sink a head, an output gate, and hyper-connections of several streams.
    streams = f.integer("hc_mult", default=4)
    gate = s.heads * (1 + plain.value_size * s.width)
    each = 2 * (2 * streams * (streams * s.width + 1) + 2)
    return _connected(found.map(lambda mixer, i: replace(mixer, weights=mixer.weights + gate)), streams, each)


def _connected(found: Model, streams: int, each: int) -> Model:
    """The same with ``each`` weights a layer that mix streams, and those that join them at the end."""
    layers = tuple(replace(layer, dense=layer.dense + each) for layer in found.layers)
    end = streams * streams * found.width + streams + 1
    return replace(found, layers=layers, embedding=found.embedding + end)


def longcat(f: Fields) -> Model:
    """LongCat-Flash: two attentions and two dense parts a layer, beside experts of which some do nothing."""
    count = f.integer("num_layers", "num_hidden_layers", most=4096)
    f.data = {name: value for name, value in f.data.items() if name not in ("num_key_value_heads", "head_dim")}
    f.skip("num_key_value_heads", "head_dim", "num_hidden_layers", "attention_bias")
    s = sizes(f, layers=count)
    mixer = latent(f, s)
    inner = f.integer("ffn_hidden_size", "intermediate_size")
    experts = Experts(("n_routed_experts",), ("expert_ffn_hidden_size",), ("moe_topk",))
    part, _ = sparse(f, s.width, inner, experts)
    part["dense"] += 2 * weights.feed_forward(s.width, inner) + 4 * s.width
    part["dense"] += s.width * f.integer("zero_expert_num", default=0, least=0)
    return model(f, s, [Layer((mixer, mixer), **part)] * s.layers, inner=inner)


def _legacy(f: Fields) -> dict[str, object]:
    """Rates under the names that older configurations have."""
    names = {"compressed_sparse_attention": "compress_rate_csa", "heavily_compressed_attention": "compress_rate_hca"}
    return {kind: f.raw(old) for kind, old in names.items() if f.has(old)}


def compressed(f: Fields) -> Model:
    """DeepSeek-V4: one vector a token is key and value; windows, and entries of 4 or 128 tokens."""
    s = replace(sizes(f), groups=1)
    window = f.integer("sliding_window")
    rates = f.inner("compress_rates")
    rates.data = {**_legacy(f), **rates.data}
    rank = f.integer("q_lora_rank")
    groups, out = f.integer("o_groups"), f.integer("o_lora_rank")
    heads, size, top = f.heads("index_n_heads"), f.integer("index_head_dim"), f.integer("index_topk")
    f.skip("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "mlp_bias", "attention_bias")
    f.skip("num_nextn_predict_layers", "num_hash_layers", "qk_head_dim", "first_k_dense_replace", "expert_dtype")
    sparse_kind, heavy_kind = "compressed_sparse_attention", "heavily_compressed_attention"
    ratios = f.each("compress_ratios")
    if ratios is not None and not f.has("layer_types"):
        names = {0: WINDOW, 4: sparse_kind, 128: heavy_kind}
        for ratio in ratios:
            if ratio not in names:
                f.fail("compress_ratios", f"has {ratio!r}", "0, 4 or 128")
        # The last entries are those of layers that predict more tokens at once, which decoding does not run.
        f.data = {**f.data, "layer_types": [names[ratio] for ratio in ratios[: s.layers]]}
    named = kinds(f, s.layers, lambda i: sparse_kind if i >= 2 and i % 2 else heavy_kind)
    mixers = []
    for kind in named:
        known(f, kind, (WINDOW, sparse_kind, heavy_kind))
        rate, index = None, None
        options: dict[str, Any] = {"window": window}
        if kind == sparse_kind:
            rate, index = rates.integer(sparse_kind, default=4), (heads, size)
            options |= {"rate": rate, "top": top, "overlap": True, "index": index}
        elif kind == heavy_kind:
            rate = rates.integer(heavy_kind, default=128)
            options |= {"rate": rate}
        else:
            options |= {"rate": None}
        count = weights.compressed(s.width, s.heads, s.head, rank, groups, out, rate, index)
        mixers.append(Mixer("compressed", s.heads, 1, s.head, s.head, tuple(options.items()), weights=count))
    experts = Experts(
        ("n_routed_experts",),
        shared=("n_shared_experts",),
        chosen=("num_experts_per_tok",),
        inner=("moe_intermediate_size",),
    )
    f.skip("mlp_layer_types", "num_experts", "num_shared_experts", "intermediate_size")
    routed, _ = sparse(f, s.width, 4 * s.width, experts)
    streams = f.integer("hc_mult", default=4)
    ways = streams * (streams + 2)
    return _connected(joined(f, s, mixers, [routed] * s.layers), streams, 2 * (ways * (streams * s.width + 1) + 3))


def mimo(f: Fields) -> Model:
    """MiMo-V2-Flash: windows with sinks beside a few layers that see everything, values of another size."""
    s = sizes(f)
    value = f.integer("v_head_dim", default=s.head)
    near = Sizes(
        s.width,
        s.layers,
        f.heads("swa_num_attention_heads", default=s.heads),
        f.heads("swa_num_key_value_heads", default=min(s.heads, 2 * s.groups)),
        f.integer("swa_head_dim", default=s.head),
        s.vocabulary,
    )
    near_value = f.integer("swa_v_head_dim", default=value)
    window = f.integer("sliding_window", "sliding_window_size")
    named = kinds(f, s.layers, lambda i: FULL if i % 6 == 0 else WINDOW)
    f.skip("attention_bias", "hybrid_layer_pattern")
    mixers = [
        attention(near, window=window, value=near_value, more=near.heads)
        if known(f, kind, (FULL, WINDOW)) == WINDOW
        else attention(s, value=value)
        for kind in named
    ]
    return joined(f, s, mixers, parts(f, s, replace(DEEPSEEK, shared=())))


TABLE = {
    "deepseek_v2": deepseek,
    "deepseek_v3": deepseek,
    "deepseek_v32": indexed,
    "deepseek_v4": compressed,
    "glm4_moe_lite": deepseek,
    "glm_moe_dsa": indexed,
    "hy_v4": indexed,
    "kimi_k2": deepseek,
    "longcat_flash": longcat,
    "mimo_v2_flash": mimo,
    "minicpm3": deepseek,
    "youtu": deepseek,
}
