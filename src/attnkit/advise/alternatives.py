"""What could be done instead: other caches, other heads, other mechanisms, each as a model whose cost is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from attnkit.advise import weights
from attnkit.advise.lengths import Lengths
from attnkit.advise.model import Mixer, Model

SWITCH, CONVERSION, TRAINING = "a switch", "conversion and healing", "retraining"
EFFORTS = ("nothing", SWITCH, CONVERSION, TRAINING)

PAGE = 16
"""Tokens of a page: vLLM's default, and few enough that hardly anything of the last one is wasted."""
SINKS, STREAMED = 4, 4096
LATENT, ROTARY = 512, 64
NEAR = 4096
INDEX = (64, 128, 2048)


@dataclass(frozen=True)
class Alternative:
    """One thing to do: what it is, what it takes, what it costs in quality, and the model that it makes.

    ``risk`` orders what may be lost: 0 nothing, 1 rounding, 2 and more what training has to bring back or what cannot
    come back. ``forgets`` says that tokens of the past are gone for good; ``near`` that far ones are seen by some
    layers only. ``page`` is that of the cache, None for buffers as long as the worst case.
    """

    name: str
    title: str
    effort: str
    risk: float
    quality: str
    how: str
    model: Model
    page: int | None = PAGE
    forgets: bool = False
    near: bool = False
    shares: bool = False
    table: bool = False
    design: float | None = None
    trained: str = ""
    endless: bool = True


@dataclass(frozen=True)
class Unsuited:
    """An alternative that this model cannot have, and why."""

    name: str
    title: str
    why: str


def alternatives(model: Model, lengths: Lengths) -> Iterator[Alternative | Unsuited]:
    """The model as it is and everything else that it could be."""
    yield Alternative(
        "as-is", "as it is", "nothing", 0, "the same numbers", "buffers as long as the worst case", model, page=None
    )
    yield Alternative(
        "paged", "paged cache", SWITCH, 0, "the same numbers", f"pages of {PAGE} tokens (PagedKVState)", model
    )
    yield Alternative(
        "prefix",
        "paged cache, shared prefix kept once",
        SWITCH,
        0,
        "the same numbers",
        f"pages of {PAGE} tokens that forks share (PagedKVState.fork)",
        model,
        shares=True,
    )
    yield from _caches(model, lengths)
    yield from _fewer_heads(model)
    yield from _mechanisms(model)


def trainings(model: Model) -> Iterator[Alternative | Unsuited]:
    """Ways to train the model, and what else could be trained."""
    held = "every score of a layer is in memory at once (backend reference)"
    tiles = "scores are made tile by tile and never kept (backends sdpa, flex and cpu)"
    yield Alternative("as-is", "a table of all scores", "nothing", 0, "the same numbers", held, model, table=True)
    yield Alternative("tiled", "a tiled kernel", SWITCH, 0, "the same numbers", tiles, model)
    yield from (*_fewer_heads(model), *_mechanisms(model))


def softmax_layers(model: Model) -> list[Mixer]:
    """The mixers whose keys and values of every token are kept, one a layer."""
    return [m for layer in model.layers for m in layer.mixers if _dense(m)]


def _dense(mixer: Mixer) -> bool:
    return mixer.mechanism == "softmax" and mixer.window is None and not mixer.source and mixer.keeps


def _changed(model: Model, change: Callable[[Mixer], Mixer]) -> Model:
    return model.map(lambda mixer, i: change(mixer) if _dense(mixer) else mixer)


def _caches(model: Model, lengths: Lengths) -> Iterator[Alternative | Unsuited]:
    """Other forms of the cache, which take no training."""
    forms = (
        ("int8", 1.0, "keys and values rounded to 8 bits, a scale a token and head"),
        ("fp8", 1.2, "keys and values rounded to 8 bits, 3 of them of mantissa"),
        ("int4", 1.8, "keys and values rounded to 4 bits, a scale for 32 numbers: measure it on your task"),
    )
    found = softmax_layers(model)
    for name, risk, quality in forms:
        title = f"{name} cache"
        if not found:
            yield Unsuited(name, title, _none(model))
            continue
        changed = _changed(model, lambda mixer, codec=name: replace(mixer, codec=codec))  # type: ignore[misc]
        yield Alternative(name, title, SWITCH, risk, quality, f"KVState(..., codec={name!r})", changed)
    if not found:
        yield Unsuited("snapkv", "a quarter of the prompt kept", _none(model))
        yield Unsuited("streaming", "first tokens and a window kept", _none(model))
        return
    budget = max(1024, lengths.at(0.99) // 4)
    yield Alternative(
        "snapkv",
        f"{budget:,} tokens of a prompt kept",
        SWITCH,
        3,
        "tokens that the end of the prompt did not look at are gone for good",
        "a policy such as SnapKV (arXiv 2404.14469), once the prompt has been read",
        _changed(model, lambda mixer: replace(mixer, budget=budget)),
        forgets=True,
        endless=False,
    )
    yield Alternative(
        "streaming",
        f"first {SINKS} tokens and a window of {STREAMED:,} kept",
        SWITCH,
        4,
        f"whatever is more than {STREAMED:,} tokens back is gone for good",
        "StreamingLLM (arXiv 2309.17453): WindowState(..., sinks=4)",
        _changed(model, lambda mixer: replace(mixer, window=STREAMED, sinks=SINKS)),
        page=None,
        forgets=True,
    )


def _fewer_heads(model: Model) -> Iterator[Alternative | Unsuited]:
    found = softmax_layers(model)
    least = min((mixer.groups for mixer in found), default=1)
    offered = [g for g in (8, 4, 1) if g < least and all(mixer.heads % g == 0 for mixer in found)]
    if not offered:
        why = _none(model) if not found else f"it has {least} KV head already" if least == 1 else _odd(found)
        yield Unsuited("gqa", "fewer KV heads", why)
    for g in offered:
        title = "one KV head (MQA)" if g == 1 else f"{g} KV heads (GQA)"
        yield Alternative(
            "mqa" if g == 1 else f"gqa-{g}",
            title,
            CONVERSION,
            2.6 if g == 1 else 2.0,
            f"heads averaged from {least} to {g}, then trained on 5 % of the first training (arXiv 2305.13245)",
            "the mean of the heads that are joined",
            _changed(model, lambda mixer, g=g: _grouped(model, mixer, g)),  # type: ignore[misc]
            design={8: 0.5, 4: 0.8}.get(g, 1.3),
            trained=f"{g} KV heads hold less than {least}" if g > 1 else f"one KV head holds less than {least}",
        )


def _odd(found: list[Mixer]) -> str:
    return f"its {found[0].heads} query heads have no smaller number of KV heads among 8, 4 and 1 to share"


def _grouped(model: Model, mixer: Mixer, g: int) -> Mixer:
    saved = model.width * (mixer.groups - g) * (mixer.key_size + mixer.value_size)
    return replace(mixer, groups=g, weights=mixer.weights - saved)


def _mechanisms(model: Model) -> Iterator[Alternative | Unsuited]:
    """Other mechanisms, which take training."""
    found = softmax_layers(model)
    latent = any(mixer.mechanism == "mla" for mixer in model.mixers)
    if found:
        yield Alternative(
            "mla",
            f"latent attention of {LATENT} + {ROTARY}",
            CONVERSION,
            2.2,
            "keys and values rebuilt from a latent; TransMLA (arXiv 2502.07864), then training",
            "attnkit.mechanisms.mla, LatentState",
            _changed(model, lambda mixer: _latent(model, mixer)),
            design=0.6,
            trained=f"all heads share a latent of {LATENT} numbers, more to compute for less to keep",
        )
    else:
        yield Unsuited("mla", "latent attention", "it has latent attention already" if latent else _none(model))
    if found or latent:
        yield Alternative(
            "dsa",
            f"latent attention to the {INDEX[2]:,} tokens that an indexer picks",
            TRAINING,
            2.8,
            "a query reads the tokens that a trained indexer picks for it; the rest is kept",
            "attnkit.mechanisms.dsa, LatentState(index=128)",
            model.map(lambda mixer, i: _indexed(model, mixer)),
            design=1.2,
        )
    else:
        yield Unsuited("dsa", "latent attention with an indexer", _none(model))
    if not found:
        for name, title in (
            ("window", "windows in three layers of four"),
            ("linear-hybrid", "Gated DeltaNet in three layers of four"),
            ("compressed", "compressed entries (CSA, HCA)"),
            ("linear", "Gated DeltaNet in every layer"),
        ):
            yield Unsuited(name, title, _none(model))
        return
    yield Alternative(
        "window",
        f"window of {NEAR:,} in three layers of four",
        CONVERSION,
        2.4,
        "far tokens are seen by a quarter of the layers",
        f"softmax_attention(..., mask=window({NEAR})), WindowState",
        model.map(lambda mixer, i: replace(mixer, window=NEAR) if _dense(mixer) and (i + 1) % 4 else mixer),
        near=True,
        design=1.0,
    )
    yield Alternative(
        "linear-hybrid",
        "Gated DeltaNet in three layers of four",
        TRAINING,
        2.5,
        "far tokens are seen exactly by a quarter of the layers, and as a sum by the others",
        "attnkit.mechanisms.delta, RecurrentState",
        model.map(lambda mixer, i: _linear(model, mixer) if _dense(mixer) and (i + 1) % 4 else mixer),
        near=True,
        design=1.1,
    )
    yield Alternative(
        "compressed",
        "a window and entries of 4 or 128 tokens (CSA, HCA)",
        TRAINING,
        3.2,
        "far tokens are seen as entries that were pooled from 4 or 128 of them",
        "attnkit.mechanisms.compressed, CompressedState",
        model.map(lambda mixer, i: _compressed(model, mixer, i) if _dense(mixer) else mixer),
        design=1.6,
    )
    yield Alternative(
        "linear",
        "Gated DeltaNet in every layer",
        TRAINING,
        3.6,
        "all of the past is one sum: what it does not hold any more is gone for good",
        "attnkit.mechanisms.delta, RecurrentState",
        _changed(model, lambda mixer: _linear(model, mixer)),
        page=None,
        forgets=True,
        design=2.2,
    )


def _none(model: Model) -> str:
    kinds = {mixer.mechanism for mixer in model.mixers}
    if kinds <= {"softmax"}:
        return "no layer keeps keys and values of every token"
    return f"no layer is softmax attention over every token, they are {', '.join(sorted(kinds))}"


def _latent(model: Model, mixer: Mixer) -> Mixer:
    d, e = mixer.key_size + ROTARY, mixer.value_size
    return Mixer(
        "mla",
        mixer.heads,
        1,
        d,
        e,
        (("latent", LATENT), ("rotary", ROTARY)),
        weights=weights.latent(model.width, mixer.heads, d, e, LATENT, ROTARY, None),
    )


def _indexed(model: Model, mixer: Mixer) -> Mixer:
    if _dense(mixer):
        mixer = _latent(model, mixer)
    if mixer.mechanism != "mla":
        return mixer
    heads, size, top = INDEX
    options = (*mixer.options, ("top", top), ("index", size), ("index_heads", heads))
    more = weights.indexer(model.width, None, heads, size)
    return replace(mixer, mechanism="dsa", options=options, weights=mixer.weights + more)


def _linear(model: Model, mixer: Mixer) -> Mixer:
    g, h, d, taps = max(1, mixer.heads // 2), mixer.heads, 128, 4
    g = next(g for g in range(g, 0, -1) if h % g == 0)
    options = (("tail", (taps - 1) * (2 * g * d + h * d)),)
    return Mixer("delta", h, g, d, d, options, weights=weights.gated_delta(model.width, g, h, d, d, taps))


def _compressed(model: Model, mixer: Mixer, i: int) -> Mixer:
    heads, size, top = INDEX
    c, rate = 512, 128 if i % 2 == 0 else 4
    index = None if rate == 128 else (heads, size)
    options: dict[str, object] = {"window": 128, "rate": rate}
    options |= {"top": top // 4, "overlap": True, "index": index} if index else {}
    count = weights.compressed(model.width, mixer.heads, c, 1024, 8, 1024, rate, index)
    return Mixer("compressed", mixer.heads, 1, c, c, tuple(options.items()), weights=count)


def presets(model: Model, names: str) -> Iterator[Alternative | Unsuited]:
    """Layers of attnkit by the names of their presets, in the place of softmax attention: what a record costs is all
    that has to be known, so that a mechanism of another package is an alternative like those above.
    """
    import torch

    from attnkit.registry import presets as named
    from attnkit.spec import LayerPlace

    for name in filter(None, (word.strip() for word in names.split(","))):
        found = named(name)
        if not found:
            raise ValueError(f"also has {name!r}, expected names of presets: see attnkit list")
        spec, preset = found[0]
        mixers = softmax_layers(model)
        if not mixers:
            yield Unsuited(name, preset.title, _none(model))
            continue
        try:
            place = LayerPlace(model.width, mixers[0].heads, NEAR, layers=len(model.layers))
            with torch.device("meta"):
                layer = spec.layer(preset.configure(place))
            layer.cost(1, 1 << 10)
        except (ValueError, NotImplementedError, AttributeError) as error:
            yield Unsuited(name, preset.title, f"no layer of {model.width} with {mixers[0].heads} heads: {error}")
            continue
        count = sum(weight.numel() for weight in layer.parameters())
        mixer = Mixer(f"{spec.name}/{preset.name}", mixers[0].heads, weights=count, layer=layer)
        title, how = preset.title, f"attnkit.mechanisms.{spec.name}, preset {preset.name}"
        quality = "another mechanism: attnkit compare says what it learns"
        changed = _changed(model, lambda _, mixer=mixer: mixer)  # type: ignore[misc]
        yield Alternative(name, title, TRAINING, 3.0, quality, how, changed, design=1.5)
