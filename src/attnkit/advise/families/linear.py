"""Families with a recurrent state: delta rules, lightning attention, Mamba, short convolutions, and their hybrids."""

from __future__ import annotations

from dataclasses import replace

from attnkit.advise import weights
from attnkit.advise.families.dense import MIXTRAL, every
from attnkit.advise.families.latent import DEEPSEEK, joined, latent, parts
from attnkit.advise.fields import Fields
from attnkit.advise.model import Layer, Mixer, Model
from attnkit.advise.parts import (
    FULL,
    LINEAR,
    WINDOW,
    Experts,
    Sizes,
    attention,
    kinds,
    known,
    model,
    routed,
    sizes,
    sparse,
)


def _periodic(f: Fields, s: Sizes, period: int) -> list[str]:
    period = f.integer("full_attention_interval", default=period)
    return kinds(f, s.layers, lambda i: every(period)(i).replace(WINDOW, LINEAR))


def gated_delta(f: Fields, s: Sizes) -> Mixer:
    """A layer of Gated DeltaNet."""
    g, h = f.heads("linear_num_key_heads"), f.heads("linear_num_value_heads")
    d, e = f.integer("linear_key_head_dim"), f.integer("linear_value_head_dim")
    taps = f.integer("linear_conv_kernel_dim", default=4, least=2)
    if h % g:
        f.fail("linear_num_key_heads", f"is {g}", f"a divisor of the {h} value heads")
    options = (("tail", (taps - 1) * (2 * g * d + h * e)),)
    return Mixer("delta", h, g, d, e, options, weights=weights.gated_delta(s.width, g, h, d, e, taps))


def qwen_next(f: Fields) -> Model:
    """Qwen3-Next and Qwen3.5: three layers of Gated DeltaNet, then one of softmax attention with an output gate."""
    s = sizes(f)
    linear = gated_delta(f, s)
    bias = f.flag("attention_bias", default=False)
    # The output gate makes the map of queries twice as wide.
    far = attention(s, bias=bias, more=s.width * s.heads * s.head + 2 * s.head)
    named = _periodic(f, s, 4)
    inner = f.integer("intermediate_size", default=4 * s.width)
    f.skip("use_sliding_window")
    feed = plain = {"dense": weights.feed_forward(s.width, inner)}
    if f.data.get("model_type") != "qwen3_5_text":
        experts = Experts(("num_experts",), shared_inner=("shared_expert_intermediate_size",), shared_gate=True)
        feed, _ = sparse(f, s.width, inner, experts)
    chosen = routed(f, s.layers)
    mixers = [linear if known(f, kind, (LINEAR, FULL)) == LINEAR else far for kind in named]
    return joined(f, s, mixers, [feed if i in chosen else plain for i in range(s.layers)])


def olmo_hybrid(f: Fields) -> Model:
    """OLMo hybrid: Gated DeltaNet with softmax attention every fourth layer."""
    s = sizes(f)
    linear, far = gated_delta(f, s), attention(s, more=s.head * (s.heads + s.groups))
    f.skip("attention_bias")
    inner = f.integer("intermediate_size")
    mixers = [linear if known(f, kind, (LINEAR, FULL)) == LINEAR else far for kind in _periodic(f, s, 4)]
    return joined(f, s, mixers, [{"dense": weights.feed_forward(s.width, inner)}] * s.layers)


def kimi(f: Fields) -> Model:
    """Kimi Linear and Bailing hybrids: Kimi Delta Attention with latent attention every few layers."""
    heads = ("num_key_value_heads", "head_dim")
    f.data = {name: value for name, value in f.data.items() if name not in heads}
    f.skip(*heads, "attention_bias", "num_nextn_predict_layers")
    s = sizes(f)
    nested = f.inner("linear_attn_config")
    h = nested.heads("num_heads", default=f.heads("linear_num_heads", "num_attention_heads"))
    d = nested.integer("head_dim", default=f.integer("linear_head_dim", default=128))
    taps = nested.integer(
        "short_conv_kernel_size", default=f.integer("linear_conv_kernel_dim", "short_conv_kernel_size", default=4)
    )
    full = nested.each("full_attn_layers")
    nested.skip("kda_layers")
    # Numbers of layers start at 1 there.
    named = kinds(f, s.layers, lambda i: FULL if (i + 1 in full if full else i and i % 4 == 0) else LINEAR)
    bailing = f.data["model_type"] == "bailing_hybrid"
    count = weights.kimi_delta(s.width, h, d, taps, low_rank=not bailing)
    linear = Mixer("delta", h, h, d, d, (("tail", (taps - 1) * 3 * h * d),), weights=count)
    far = latent(f, s)
    far = replace(far, weights=far.weights + (s.width * s.heads if bailing else 0))
    mixers = [linear if known(f, kind, (LINEAR, FULL)) == LINEAR else far for kind in named]
    return joined(f, s, mixers, parts(f, s, replace(DEEPSEEK, shared=("num_shared_experts", "n_shared_experts"))))


def minimax(f: Fields) -> Model:
    """MiniMax-01: seven layers of lightning attention, then one of softmax attention, experts everywhere."""
    s = sizes(f)
    listed = f.each("attn_type_list")
    named = kinds(f, s.layers, lambda i: (FULL if listed[i] else LINEAR) if listed else (LINEAR if i % 2 else FULL))
    if listed is not None and len(listed) != s.layers:
        f.fail("attn_type_list", f"has {len(listed)} entries", f"{s.layers}, one a layer")
    f.skip("sliding_window", "shared_intermediate_size")
    inner = f.integer("intermediate_size")
    part, _ = sparse(f, s.width, inner, MIXTRAL)
    linear = Mixer("retention", s.heads, s.heads, s.head, s.head, weights=weights.lightning(s.width, s.heads, s.head))
    far = attention(s)
    mixers = [linear if known(f, kind, (LINEAR, FULL)) == LINEAR else far for kind in named]
    return joined(f, s, mixers, [part] * s.layers)


def _mamba2(f: Fields, width: int, *, norm: bool = True) -> Mixer:
    heads = f.heads("mamba_n_heads", "mamba_num_heads", "num_heads")
    size = f.integer("mamba_d_head", "mamba_head_dim", "head_dim")
    states = f.integer("mamba_d_state", "ssm_state_size", "state_size")
    groups = f.integer("mamba_n_groups", "n_groups", default=1)
    taps = f.integer("mamba_d_conv", "conv_kernel", default=4)
    bias = f.flag("mamba_conv_bias", "use_conv_bias", default=True)
    f.skip("mamba_proj_bias", "mamba_expand", "expand", "use_bias", "time_step_rank")
    inner = heads * size
    count = weights.mamba2(width, inner, states, groups, heads, taps, bias=bias, norm=norm)
    # A head's state is states x size: what linear attention calls key size and value size.
    return Mixer(
        "gla", heads, heads, states, size, (("tail", (taps - 1) * (inner + 2 * groups * states)),), weights=count
    )


def mamba2(f: Fields) -> Model:
    """Mamba-2: nothing but recurrent layers."""
    width = f.integer("hidden_size", "d_model")
    count = f.integer("num_hidden_layers", "n_layer", most=4096)
    vocabulary = f.integer("vocab_size", most=1 << 26)
    f.skip("num_attention_heads", "num_key_value_heads", "intermediate_size", "max_position_embeddings")
    s = Sizes(width, count, 1, 1, width, vocabulary)
    return model(f, s, [Layer((_mamba2(f, width),), width)] * count, tied=True)


def bamba(f: Fields) -> Model:
    """Bamba: Mamba-2, with softmax attention in the layers listed."""
    s = sizes(f)
    listed = f.each("attn_layer_indices") or []
    inner = f.integer("intermediate_size")
    mamba, far = _mamba2(f, s.width), attention(s, bias=f.flag("attention_bias"))
    feed = {"dense": weights.feed_forward(s.width, inner, bias=f.flag("mlp_bias"))}
    return joined(f, s, [far if i in listed else mamba for i in range(s.layers)], [feed] * s.layers)


def falcon_h1(f: Fields) -> Model:
    """Falcon-H1: attention and Mamba-2 side by side in every layer."""
    s = sizes(f)
    inner = f.integer("intermediate_size")
    mamba = _mamba2(f, s.width, norm=f.flag("mamba_rms_norm"))
    f.skip("mamba_d_ssm", "projectors_bias")
    layer = Layer(
        (attention(s, bias=f.flag("attention_bias")), mamba),
        weights.feed_forward(s.width, inner, bias=f.flag("mlp_bias")) + 2 * s.width,
    )
    return model(f, s, [layer] * s.layers, inner=inner)


def nemotron(f: Fields) -> Model:
    """Nemotron-H: each layer is one thing: Mamba-2, attention, a feed-forward part, or experts."""
    named = f.each("layers_block_type")
    pattern = f.text("hybrid_override_pattern")
    if named is None and pattern is not None:
        letters = {"M": LINEAR, "*": FULL, "-": "mlp", "E": "moe"}
        named = [letters.get(letter, letter) for letter in pattern]
    if named is None:
        f.fail("layers_block_type", "is missing", "the kind of each layer")
    assert named is not None
    f.skip(
        "num_hidden_layers", "mtp_layers_block_type", "num_nextn_predict_layers", "sliding_window", "moe_latent_size"
    )
    s = sizes(f, layers=len(named))
    inner = f.integer("intermediate_size")
    bias = f.flag("mlp_bias")
    layers = []
    for kind in named:
        match kind:
            case "linear_attention" | "mamba":
                layers.append(Layer((_mamba2(_without(f, "head_dim"), s.width),), s.width))
            case "full_attention" | "attention":
                layers.append(Layer((attention(s, bias=f.flag("attention_bias")),), s.width))
            case "mlp":
                layers.append(Layer((), weights.feed_forward(s.width, inner, gated=False, bias=bias) + s.width))
            case "moe":
                layers.append(_nemotron_experts(f, s))
            case _:
                f.fail("layers_block_type", f"has {kind!r}", "linear_attention, full_attention, mlp or moe")
    f.skip("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "n_shared_experts")
    f.skip("moe_shared_expert_intermediate_size", "intermediate_size")
    return model(f, s, layers, inner=inner)


def _without(f: Fields, name: str) -> Fields:
    other = Fields({key: value for key, value in f.data.items() if key != name}, f.file, f.where)
    other.taken = f.taken
    return other


def _nemotron_experts(f: Fields, s: Sizes) -> Layer:
    count, chosen = f.integer("n_routed_experts"), f.integer("num_experts_per_tok")
    inner = f.integer("moe_intermediate_size")
    shared = f.integer("moe_shared_expert_intermediate_size", default=0, least=0)
    shared *= f.integer("n_shared_experts", default=1, least=0)
    always = s.width * count + weights.feed_forward(s.width, shared, gated=False) + s.width
    return Layer((), always, weights.feed_forward(s.width, inner, gated=False), count, chosen)


def jamba(f: Fields) -> Model:
    """Jamba: Mamba with softmax attention, and experts, every few layers."""
    s = sizes(f)
    inner = f.integer("intermediate_size")
    at, far = f.integer("attn_layer_offset", default=4, least=0), f.integer("attn_layer_period", default=8)
    shift, step = f.integer("expert_layer_offset", default=1, least=0), f.integer("expert_layer_period", default=2)
    wide = f.integer("mamba_expand", default=2) * s.width
    states, taps = f.integer("mamba_d_state", default=16), f.integer("mamba_d_conv", default=4)
    rank = f.integer("mamba_dt_rank", default=-(-s.width // 16))
    f.skip("mamba_conv_bias", "mamba_proj_bias")
    count = weights.mamba(s.width, wide, states, rank, taps) + rank + 2 * states
    # Each channel is a head of its own, with one value.
    mamba = Mixer("gla", wide, wide, states, 1, (("tail", (taps - 1) * wide),), weights=count)
    part, _ = sparse(f, s.width, inner, replace(MIXTRAL, count=("num_experts",)))
    plain = {"dense": weights.feed_forward(s.width, inner)}
    mixers = [attention(s) if i % far == at else mamba for i in range(s.layers)]
    return joined(f, s, mixers, [part if i % step == shift else plain for i in range(s.layers)])


def lfm2(f: Fields) -> Model:
    """LFM2: short convolutions, and softmax attention in some layers."""
    s = sizes(f)
    taps = f.integer("conv_L_cache", default=3, least=2)
    inner = f.integer("intermediate_size", "block_ff_dim")
    if f.flag("block_auto_adjust_ff_dim", default=True):
        multiple = f.integer("block_multiple_of", default=256)
        inner = int(2 * inner / 3)
        inner = int(f.number("block_ffn_dim_multiplier", default=1.0) * inner)
        inner = multiple * -(-inner // multiple)
    f.skip("block_multiple_of", "block_ffn_dim_multiplier", "conv_bias", "conv_dim", "block_dim", "conv_dim_out")
    listed = f.each("full_attn_idxs")
    named = kinds(f, s.layers, lambda i: FULL if listed is None or i in listed else "conv")
    count = s.width * 3 * s.width + s.width * taps + s.width * s.width
    short = Mixer("convolution", 1, 1, s.width, s.width, (("tail", (taps - 1) * s.width),), weights=count)
    far = attention(s, more=2 * s.head)
    mixers = [short if known(f, kind, ("conv", FULL)) == "conv" else far for kind in named]
    return joined(f, s, mixers, [{"dense": weights.feed_forward(s.width, inner)}] * s.layers, tied=True)


def recurrent_gemma(f: Fields) -> Model:
    """RecurrentGemma: gated recurrences of one number a channel, with a window every third layer."""
    f.data = {"num_key_value_heads": 1, **f.data}
    s = sizes(f)
    wide, taps = f.integer("lru_width", default=s.width), f.integer("conv1d_width", default=4, least=2)
    blocks = f.each("block_types") or ["recurrent", "recurrent", "attention"]
    window = f.integer("attention_window_size", default=2048)
    inner = f.integer("intermediate_size") // 2
    f.skip("attention_bias")
    gates = 2 * (wide * wide // s.heads + wide) + wide
    count = 2 * (s.width * wide + wide) + wide * s.width + s.width + wide * (taps + 1) + gates
    lru = Mixer("gla", wide, wide, 1, 1, (("tail", (taps - 1) * wide),), weights=count)
    near = attention(s, window=window, out_bias=True)
    mixers = [near if blocks[i % len(blocks)] == "attention" else lru for i in range(s.layers)]
    feed = {"dense": weights.feed_forward(s.width, inner, bias=True) + inner}
    return joined(f, s, mixers, [feed] * s.layers, tied=True)


TABLE = {
    "bailing_hybrid": kimi,
    "bamba": bamba,
    "falcon_h1": falcon_h1,
    "jamba": jamba,
    "kimi_linear": kimi,
    "lfm2": lfm2,
    "mamba2": mamba2,
    "minimax": minimax,
    "minimax_text_01": minimax,
    "nemotron_h": nemotron,
    "olmo_hybrid": olmo_hybrid,
    "qwen3_5_text": qwen_next,
    "qwen3_5_moe_text": qwen_next,
    "qwen3_next": qwen_next,
    "recurrent_gemma": recurrent_gemma,
}
