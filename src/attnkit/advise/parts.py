"""What families have in common: sizes of a decoder, which kind each layer is, and feed-forward parts with experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from attnkit.advise import weights
from attnkit.advise.fields import MOST_LAYERS, Fields
from attnkit.advise.model import ITEMSIZE, Layer, Mixer, Model

FULL, WINDOW, LINEAR = "full_attention", "sliding_attention", "linear_attention"


@dataclass(frozen=True)
class Sizes:
    """Sizes that every decoder has."""

    width: int
    layers: int
    heads: int
    groups: int
    head: int
    vocabulary: int


def sizes(f: Fields, *, layers: int | None = None, groups: int | None = None) -> Sizes:
    """Read them, with the names that older configurations use."""
    width = f.integer("hidden_size", "n_embd", "d_model")
    count = layers or f.integer("num_hidden_layers", "n_layer", "n_layers", "num_layers", most=MOST_LAYERS)
    heads = f.heads("num_attention_heads", "n_head", "n_heads")
    shared = f.heads("num_key_value_heads", "num_kv_heads", "n_head_kv", default=groups or heads)
    if shared > heads or heads % shared:
        f.fail("num_key_value_heads", f"is {shared}", f"a divisor of the {heads} query heads")
    if width % heads and not f.has("head_dim"):
        f.fail("num_attention_heads", f"is {heads}", f"a divisor of the hidden size {width}, or a head_dim beside it")
    head = f.integer("head_dim", default=max(1, width // heads), most=1 << 14)
    return Sizes(width, count, heads, shared, head, f.integer("vocab_size", most=1 << 26))


def kinds(f: Fields, count: int, otherwise: Callable[[int], str] | str = FULL) -> list[str]:
    """The kind of each layer: ``layer_types``, or what the family does without it."""
    named = f.each("layer_types", length=count)
    if named is None:
        return [otherwise if isinstance(otherwise, str) else otherwise(i) for i in range(count)]
    for i, kind in enumerate(named):
        if not isinstance(kind, str):
            f.fail("layer_types", f"has {kind!r} at {i}", "the name of a kind of layer")
    return [str(kind) for kind in named]


def known(f: Fields, kind: str, names: Sequence[str]) -> str:
    """``kind``, if it is one of these."""
    if kind not in names:
        f.fail("layer_types", f"has {kind!r}", f"one of {', '.join(names)}")
    return kind


def attention(s: Sizes, *, window: int | None = None, **more: Any) -> Mixer:
    """A layer of softmax attention; ``more`` goes to the count of its weights."""
    value = more.pop("value", s.head)
    keeps = more.pop("keeps", True)
    return Mixer(
        "softmax",
        s.heads,
        s.groups,
        s.head,
        value,
        window=window,
        keeps=keeps,
        weights=weights.softmax(s.width, s.heads, s.groups, s.head, value, **more),
    )


@dataclass(frozen=True)
class Experts:
    """The names under which a family has its experts; ``shared`` counts experts, or is their whole width."""

    count: tuple[str, ...]
    inner: tuple[str, ...] = ("moe_intermediate_size",)
    chosen: tuple[str, ...] = ("num_experts_per_tok",)
    shared: tuple[str, ...] = ()
    shared_inner: tuple[str, ...] = ()
    shared_gate: bool = False
    first_dense: tuple[str, ...] = ()
    router_bias: bool = False
    bias: bool = False


def sparse(f: Fields, width: int, dense: int, experts: Experts) -> tuple[dict[str, int], int]:
    """A layer with experts, as arguments of ``Layer``, and how many layers in front have none."""
    count = f.integer(*experts.count, most=1 << 16)
    chosen = f.integer(*experts.chosen, most=1 << 16)
    if chosen > count:
        f.fail(experts.chosen[0], f"is {chosen}", f"at most the {count} experts there are")
    inner = f.integer(*experts.inner, default=dense)
    always = width * count + (count if experts.router_bias else 0)
    if experts.shared_inner:
        always += weights.feed_forward(width, f.integer(*experts.shared_inner, default=0, least=0))
    elif experts.shared:
        always += weights.feed_forward(width, inner * f.integer(*experts.shared, default=0, least=0))
    always += width if experts.shared_gate else 0
    one = weights.feed_forward(width, inner) + (2 * inner + width if experts.bias else 0)
    first = f.integer(*experts.first_dense, default=0, least=0) if experts.first_dense else 0
    return {"dense": always, "expert": one, "experts": count, "chosen": chosen}, first


def routed(f: Fields, layers: int) -> set[int]:
    """Layers that have experts, in families that say every how many layers they come and which have none."""
    step = f.integer("decoder_sparse_step", default=1)
    without = f.each("mlp_only_layers") or []
    return {i for i in range(layers) if (i + 1) % step == 0 and i not in without}


def model(
    f: Fields,
    s: Sizes,
    layers: Sequence[Layer],
    *,
    positions: int = 0,
    final: int | None = None,
    tied: bool = False,
    head_bias: bool = False,
    inner: int = 0,
    encoder: Sequence[Layer] = (),
    notes: Sequence[str] = (),
) -> Model:
    """Put the layers together with embeddings, the final norm and the head."""
    tied = f.flag("tie_word_embeddings", default=tied)
    name = f.text("torch_dtype", "dtype", default="bfloat16")
    if name not in ITEMSIZE:
        f.fail("dtype", f"is {name!r}", f"one of {', '.join(ITEMSIZE)}")
    assert name is not None
    table = s.vocabulary * s.width
    dtype = name if ITEMSIZE[name] > 1 else "bfloat16"
    end = s.width if final is None else final
    return Model(
        name=f.text("_name_or_path", default="") or "",
        family="",
        width=s.width,
        vocabulary=s.vocabulary,
        layers=tuple(layers),
        embedding=table + positions + end + (s.vocabulary if head_bias else 0),
        head=0 if tied else table,
        tied=tied,
        itemsize=ITEMSIZE[dtype],
        dtype=dtype,
        weight_bits=_weight_bits(f, ITEMSIZE[name] * 8),
        longest=_longest(f),
        hidden=inner,
        encoder=tuple(encoder),
        notes=tuple(notes),
    )


def _longest(f: Fields) -> int | None:
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "model_max_length", "max_sequence_length")
    found = f.integer(*names, default=0, least=0, most=1 << 31)
    scaling = f.data.get("rope_scaling")
    original = scaling.get("original_max_position_embeddings") if isinstance(scaling, dict) else None
    factor = scaling.get("factor") if isinstance(scaling, dict) else None
    if isinstance(original, int) and isinstance(factor, int | float) and original == found and factor >= 1:
        found = int(found * factor)  # older configurations name the length before the scaling
    return found or None


def _weight_bits(f: Fields, otherwise: float) -> float:
    """Bits of a stored weight. Scales of blocks are not counted: they are a part in some hundreds."""
    if not f.has("quantization_config"):
        f.skip("quantization_config")
        return otherwise
    q = f.inner("quantization_config")
    q.taken.update(q.data)
    method = str(q.data.get("quant_method", "")).lower()
    bits = q.data.get("bits") or q.data.get("num_bits")
    if isinstance(bits, int) and not isinstance(bits, bool) and 1 <= bits <= 16:
        return bits
    known_bits = {"fp8": 8, "mxfp4": 4.25, "awq": 4, "gptq": 4, "bitnet": 2, "fbgemm_fp8": 8, "modelopt": 8}
    if q.data.get("load_in_4bit"):
        return 4.5
    if q.data.get("load_in_8bit"):
        return 8
    if method not in known_bits:
        f.fail(
            "quantization_config.quant_method", f"is {method!r}", f"one of {', '.join(known_bits)}, or bits beside it"
        )
    return known_bits[method]
