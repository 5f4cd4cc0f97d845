"""Families of softmax attention: over everything, windows, chunks, with experts or without."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from attnkit.advise import weights
from attnkit.advise.fields import Fields
from attnkit.advise.model import Layer, Model
from attnkit.advise.parts import FULL, WINDOW, Experts, attention, kinds, known, model, routed, sizes, sparse

Reader = Callable[[Fields], Model]
Pattern = Callable[[int], str]

MIXTRAL = Experts(("num_local_experts", "num_experts"), ("intermediate_size",))
QWEN = Experts(("num_experts", "num_local_experts"))
DOTS = Experts(("n_routed_experts",), shared=("n_shared_experts",), first_dense=("first_k_dense_replace",))
CHUNK = "chunked_attention"


def every(period: int) -> Pattern:
    """Every ``period``-th layer sees everything, the others a window."""
    return lambda i: FULL if (i + 1) % period == 0 else WINDOW


def dense(
    *,
    pattern: Pattern | None = None,
    period: int | None = None,
    span: tuple[str, ...] = ("sliding_window",),
    gated: bool = True,
    norms: int = 2,
    qk: str = "",
    bias: bool | None = None,
    out_bias: bool | None = None,
    mlp_bias: bool = False,
    norm_bias: bool = False,
    tied: bool = False,
    experts: Experts | None = None,
    sinks: int = 0,
    more: int = 0,
    head_norm: bool = True,
    groups: bool = True,
    own: Callable[[int, int], int] = lambda width, inner: 0,
) -> Reader:
    """Decoders of softmax attention and a feed-forward part.

    ``pattern`` names the kind of layer ``i`` where there is no ``layer_types``; by default all have the window, if
    there is one, but for each last one of a ``period``. ``qk`` norms of queries and keys are of one "head" or of "all"
    of them. ``bias`` None is what ``attention_bias`` says. ``own`` is what else a layer has.
    """

    def read(f: Fields) -> Model:
        if not groups:
            _all_heads(f)
        s = sizes(f)
        inner = f.integer("intermediate_size", "ffn_dim", "n_inner", default=4 * s.width)
        window = f.integer(*span, default=0, least=0) or None
        repeated = _period(f, period) if period else None
        named = kinds(f, s.layers, pattern or repeated or (WINDOW if window else FULL))
        asked = f.flag("attention_bias", "use_qkv_bias", default=False)
        f.skip("experts_per_token")
        b = asked if bias is None else bias
        o = b if out_bias is None else out_bias
        extra = {"": 0, "head": 2 * s.head, "all": s.head * (s.heads + s.groups)}[qk] + more + sinks * s.heads
        if f.flag("qk_layernorm"):
            extra += s.head * (s.heads + s.groups)
        part, first = sparse(f, s.width, inner, experts) if experts else ({}, s.layers)
        plain = weights.feed_forward(s.width, inner, gated=gated, bias=f.flag("mlp_bias", "use_bias", default=mlp_bias))
        edges = norms * s.width * (2 if norm_bias else 1) + own(s.width, inner)
        chosen = routed(f, s.layers) if experts is QWEN else range(first, s.layers)
        layers = []
        for i, kind in enumerate(named):
            near = known(f, kind, (FULL, WINDOW, CHUNK)) != FULL
            if near and window is None:
                f.fail(span[0], "is missing", f"the window of the {named.count(kind)} layers of {kind}")
            mixer = attention(s, window=window if near else None, bias=b, out_bias=o, more=extra)
            layer = Layer((mixer,), **part) if i in chosen else Layer((mixer,), plain)
            layers.append(replace(layer, dense=layer.dense + edges))
        final = s.width * (2 if norm_bias else 1) if head_norm else 0
        return model(f, s, layers, tied=tied, inner=inner, final=final)

    return read


def _period(f: Fields, period: int) -> Pattern:
    names = ("sliding_window_pattern", "_sliding_window_pattern")
    if isinstance(f.data.get(names[0]), str):
        return every(len(f.text(names[0]) or " " * period))
    return every(f.integer(*names, default=period, least=0) or 1 << 20)


def _all_heads(f: Fields) -> None:
    """These families have as many KV heads as query heads, whatever else may be written."""
    f.skip("num_key_value_heads")
    f.data = {name: value for name, value in f.data.items() if name != "num_key_value_heads"}


def switched(reader: Reader, otherwise: bool = False) -> Reader:
    """Families that name a window which counts only where ``use_sliding_window`` says so, from some layer on."""

    def read(f: Fields) -> Model:
        used = f.flag("use_sliding_window", default=otherwise) and f.has("sliding_window")
        after = f.integer("max_window_layers", default=0, least=0)
        if not used:
            f.skip("sliding_window")
            f.data = {name: value for name, value in f.data.items() if name != "sliding_window"}
        elif not f.has("layer_types"):
            count = f.integer("num_hidden_layers")
            f.data = {**f.data, "layer_types": [WINDOW if i >= after else FULL for i in range(count)]}
        return reader(f)

    return read


def gpt2(f: Fields) -> Model:
    """GPT-2: learned positions, biases everywhere."""
    _all_heads(f)
    s = sizes(f)
    inner = f.integer("n_inner", default=4 * s.width)
    longest = f.integer("n_positions", default=1024, most=1 << 31)
    if f.flag("add_cross_attention"):
        f.fail("add_cross_attention", "is true", "false: a source is not counted for this family")
    mixer = attention(s, bias=True, out_bias=True)
    layer = Layer((mixer,), weights.feed_forward(s.width, inner, gated=False, bias=True) + 4 * s.width)
    return model(f, s, [layer] * s.layers, positions=longest * s.width, final=2 * s.width, tied=True, inner=inner)


def opt(f: Fields) -> Model:
    """OPT: learned positions with two places more, biases everywhere."""
    _all_heads(f)
    s = sizes(f)
    inner = f.integer("ffn_dim")
    narrow = f.integer("word_embed_proj_dim", default=s.width)
    if narrow != s.width:
        f.fail(
            "word_embed_proj_dim", f"is {narrow}", f"the hidden size {s.width}: other embeddings are not counted yet"
        )
    bias = f.flag("enable_bias", default=True)
    positions = (f.integer("max_position_embeddings", most=1 << 31) + 2) * s.width
    mixer = attention(s, bias=bias, out_bias=bias)
    layer = Layer((mixer,), weights.feed_forward(s.width, inner, gated=False, bias=bias) + 4 * s.width)
    return model(f, s, [layer] * s.layers, positions=positions, final=2 * s.width, tied=True, inner=inner)


def bloom(f: Fields) -> Model:
    """BLOOM: ALiBi, biases everywhere, a norm behind the embedding."""
    f.skip("num_key_value_heads", "head_dim", "intermediate_size")
    f.data = {k: v for k, v in f.data.items() if k not in ("num_key_value_heads", "head_dim")}
    s = sizes(f)
    inner = 4 * s.width
    layer = Layer(
        (attention(s, bias=True, out_bias=True),),
        weights.feed_forward(s.width, inner, gated=False, bias=True) + 4 * s.width,
    )
    return model(f, s, [layer] * s.layers, positions=2 * s.width, final=2 * s.width, tied=True, inner=inner)


def falcon(f: Fields) -> Model:
    """Falcon: one KV head, or some in the newer design."""
    newer = f.flag("new_decoder_architecture", default=False)
    single = f.flag("multi_query", default=True)
    heads = f.heads("num_attention_heads", "n_head")
    groups = f.heads("num_kv_heads", "n_head_kv", default=heads) if newer else 1 if single else heads
    f.skip("num_key_value_heads", "num_kv_heads", "intermediate_size")
    f.data = {k: v for k, v in f.data.items() if k not in ("num_kv_heads", "n_head_kv")} | {
        "num_key_value_heads": groups
    }
    s = sizes(f)
    inner = f.integer("ffn_hidden_size", default=4 * s.width)
    bias, parallel = f.flag("bias", default=False), bool(f.data.get("parallel_attn", True))
    norms = 2 if newer and f.data.get("num_ln_in_parallel_attn") != 1 else 1 if parallel else 2
    mixer = attention(s, bias=bias, out_bias=bias)
    layer = Layer((mixer,), weights.feed_forward(s.width, inner, gated=False, bias=bias) + 2 * norms * s.width)
    return model(f, s, [layer] * s.layers, final=2 * s.width, tied=True, inner=inner)


def mpt(f: Fields) -> Model:
    """MPT: ALiBi, no biases unless asked."""
    inside = f.inner("attn_config")
    inside.taken.update(inside.data)
    groups = inside.heads("kv_n_heads", default=f.heads("n_heads"))
    f.skip("num_key_value_heads", "head_dim", "intermediate_size", "embedding_fraction", "learned_pos_emb")
    f.data = {k: v for k, v in f.data.items() if k != "head_dim"} | {"num_key_value_heads": groups}
    s = sizes(f)
    inner = int(f.number("expansion_ratio", default=4) * s.width)
    f.flag("no_bias", default=True)
    layer = Layer((attention(s),), weights.feed_forward(s.width, inner, gated=False) + 2 * s.width)
    return model(f, s, [layer] * s.layers, tied=True, inner=inner)


def gemma4(f: Fields) -> Model:
    """Gemma-4: windows, larger heads where everything is seen, caches shared by the last layers, embeddings a layer."""
    s = sizes(f)
    inner = f.integer("intermediate_size")
    window = f.integer("sliding_window")
    named = kinds(f, s.layers, every(6))
    shared = f.integer("num_kv_shared_layers", default=0, least=0)
    far = f.integer("global_head_dim", default=s.head)
    per_layer = f.inner("per_layer_config")
    per_layer.taken.update(per_layer.data)
    same = f.flag("attention_k_eq_v", default=False)
    global_groups = f.heads("num_global_key_value_heads", default=s.groups) if same else s.groups
    f.skip("num_global_key_value_heads")
    small = f.integer("hidden_size_per_layer_input", default=0, least=0)
    table = f.integer("vocab_size_per_layer_input", default=0, least=0, most=1 << 26) * small * s.layers
    double = f.flag("use_double_wide_mlp", default=False)
    part: dict[str, int] = {}
    if f.flag("enable_moe_block", default=False):
        part, _ = sparse(f, s.width, inner, Experts(("num_experts",), chosen=("top_k_experts",)))
    f.skip("num_experts", "top_k_experts", "moe_intermediate_size")
    layers = []
    for i, kind in enumerate(named):
        near = known(f, kind, (FULL, WINDOW)) == WINDOW
        own = per_layer.data.get(str(i), {})
        head = s.head if near else own.get("head_dim", far) if isinstance(own, dict) else far
        groups = s.groups if near else global_groups
        keeps = i < s.layers - shared
        sized = replace(s, head=head, groups=groups)
        mixer = attention(sized, window=window if near else None, keeps=keeps, more=2 * head)
        if not keeps:
            mixer = replace(mixer, weights=2 * s.width * s.heads * head + head)
        elif not near and same:
            mixer = replace(mixer, weights=mixer.weights - s.width * groups * head)
        wide = inner * 2 if double and not keeps else inner
        always = weights.feed_forward(s.width, wide) + 4 * s.width
        always += 2 * s.width * small + s.width if small else 0
        layers.append(
            Layer((mixer,), always + part.get("dense", 0), *(part[k] for k in ("expert", "experts", "chosen") if part))
        )
    found = model(f, s, layers, tied=True, inner=inner)
    projection = s.width * small * s.layers + small if small else 0
    return replace(found, embedding=found.embedding + table + projection)


def llama4(f: Fields) -> Model:
    """Llama 4: chunks with everything every fourth layer, experts with a shared one beside them."""
    s = sizes(f)
    chunk = f.integer("attention_chunk_size", default=8192)
    named = kinds(f, s.layers, lambda i: FULL if (i + 1) % 4 == 0 else CHUNK)
    inner = f.integer("intermediate_size")
    wide = f.integer("intermediate_size_mlp", default=inner)
    step = f.integer("interleave_moe_layer_step", default=1)
    listed = f.each("moe_layers")
    f.skip("use_qk_norm", "moe_intermediate_size")
    routed = set(listed) if listed is not None else set(range(step - 1, s.layers, step))
    part, _ = sparse(f, s.width, inner, MIXTRAL)
    part["dense"] += weights.feed_forward(s.width, inner)
    bias = f.flag("attention_bias", default=False)
    layers = []
    for i, kind in enumerate(named):
        mixer = attention(s, window=chunk if known(f, kind, (FULL, CHUNK)) == CHUNK else None, bias=bias)
        layer = Layer((mixer,), **part) if i in routed else Layer((mixer,), weights.feed_forward(s.width, wide))
        layers.append(replace(layer, dense=layer.dense + 2 * s.width))
    note = f"a chunk of {chunk} tokens is counted as a window of as many, which is what its cache has at most"
    return model(f, s, layers, inner=inner, notes=[note])


def differential(f: Fields) -> Model:
    """DiffLlama: heads in pairs, whose weights are subtracted; a pair has two keys and one value twice as wide."""
    found = dense()(f)
    mixer = found.layers[0].mixers[0]
    for name, heads in (("num_attention_heads", mixer.heads), ("num_key_value_heads", mixer.groups)):
        if heads % 2:
            f.fail(name, f"is {heads}", "an even number: heads come in pairs")
    pairs = replace(
        mixer,
        mechanism="differential",
        heads=mixer.heads // 2,
        groups=mixer.groups // 2,
        value_size=2 * mixer.value_size,
        weights=mixer.weights + 4 * mixer.key_size,
    )
    return found.map(lambda mixer, i: pairs)


def doge(f: Fields) -> Model:
    """Doge: a mask made of the values, residuals with weights; experts, which few checkpoints have, are refused."""
    if f.flag("is_moe"):
        f.fail("is_moe", "is true", "false: its experts are not counted yet")
    f.skip("num_experts", "num_experts_per_tok", "keep_window_size")
    s = sizes(f)
    own = s.groups * (s.groups * s.head + 1)
    return dense(qk="head", more=own, norms=4)(f)


def modernbert(f: Fields) -> Model:
    """ModernBERT's decoder: every third layer sees everything; the first has no norm before its attention."""
    read = dense(
        pattern=lambda i: WINDOW if i % 3 else FULL, span=("sliding_window", "local_attention"), groups=False, tied=True
    )
    found = read(f)
    bias = found.vocabulary if f.flag("decoder_bias", default=True) else 0
    f.skip("local_attention", "global_attn_every_n_layers")
    first = replace(found.layers[0], dense=found.layers[0].dense - found.width)
    # A norm behind the embedding, and a map and a norm before the head.
    more = found.width + found.width * (found.width + 1) + bias
    if f.flag("norm_bias"):
        more += found.width * (2 * len(found.layers) + 2)
    return replace(found, layers=(first, *found.layers[1:]), embedding=found.embedding + more)


TABLE: dict[str, Reader] = {
    "apertus": dense(gated=False, qk="head", more=2),
    "arcee": dense(gated=False),
    "bitnet": dense(own=lambda width, inner: width + inner),
    "bloom": bloom,
    "cohere2": dense(period=4, norms=1, tied=True),
    "diffllama": differential,
    "doge": doge,
    "dots1": switched(dense(qk="head", experts=DOTS), otherwise=True),
    "exaone4": dense(period=4, qk="head"),
    "falcon": falcon,
    "gemma": dense(tied=True),
    "gemma2": dense(period=2, norms=4, tied=True),
    "gemma3_text": dense(period=6, norms=4, qk="head", tied=True),
    "gemma4_text": gemma4,
    "gpt2": gpt2,
    "gpt_neox": dense(gated=False, bias=True, mlp_bias=True, norm_bias=True, groups=False),
    "gpt_oss": dense(
        period=2,
        bias=True,
        sinks=1,
        experts=Experts(("num_local_experts",), ("intermediate_size",), router_bias=True, bias=True),
    ),
    "granite": dense(),
    "helium": dense(),
    "llama": dense(),
    "llama4_text": llama4,
    "minimax_m2": dense(qk="all", experts=MIXTRAL),
    "ministral": dense(),
    "ministral3": dense(),
    "mistral": dense(),
    "mixtral": dense(experts=MIXTRAL),
    "modernbert-decoder": modernbert,
    "mpt": mpt,
    "nanochat": dense(gated=False, norms=0, head_norm=False),
    "olmo2": dense(qk="all"),
    "olmo3": dense(period=4, qk="all"),
    "opt": opt,
    "phi3": dense(),
    "qwen2": switched(dense(bias=True, out_bias=False)),
    "qwen3": switched(dense(qk="head")),
    "qwen3_moe": switched(dense(qk="head", experts=QWEN)),
    "smollm3": switched(dense()),
    "stablelm": dense(norm_bias=True),
    "starcoder2": dense(gated=False, bias=True, mlp_bias=True, norm_bias=True, tied=True),
}
