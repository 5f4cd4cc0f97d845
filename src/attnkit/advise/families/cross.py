"""Families whose decoder attends to another sequence: encoder-decoders, and language models that look at pictures."""

from __future__ import annotations

from dataclasses import replace

from attnkit.advise import weights
from attnkit.advise.families.dense import Reader, dense
from attnkit.advise.fields import Fields
from attnkit.advise.model import Layer, Mixer, Model
from attnkit.advise.parts import Sizes, attention, model


def _layers(encoder: Mixer, decoder: Mixer, feeds: tuple[int, int], norms: int) -> tuple[Layer, Layer]:
    """A layer of the encoder and one of the decoder, which attends to itself and to the source."""
    source = replace(decoder, source=True)
    own = replace(encoder, one_way=False)
    return Layer((own,), feeds[0] + 2 * norms), Layer((decoder, source), feeds[1] + 3 * norms)


def t5(f: Fields) -> Model:
    """T5: relative positions of the first layer, no biases."""
    width, inner = f.integer("d_model"), f.integer("d_ff")
    heads, size = f.heads("num_heads"), f.integer("d_kv")
    count = f.integer("num_layers", most=4096)
    vocabulary = f.integer("vocab_size", most=1 << 26)
    s = Sizes(width, f.integer("num_decoder_layers", default=count), heads, heads, size, vocabulary)
    gated = "gated" in (f.text("feed_forward_proj", default="relu") or "")
    buckets = f.integer("relative_attention_num_buckets", default=32)
    f.skip("n_positions", "num_hidden_layers")
    feed = weights.feed_forward(width, inner, gated=gated)
    mixer = attention(s)
    one, other = _layers(mixer, mixer, (feed, feed), width)
    return model(
        f,
        s,
        [other] * s.layers,
        encoder=[one] * count,
        positions=2 * buckets * heads + width,
        tied=True,
        inner=inner,
    )


def bart(offset: int, *, end_norms: bool, embedding_norm: bool) -> Reader:
    """BART and Marian, and what is built like them: biases everywhere, positions with ``offset`` places more."""

    def read(f: Fields) -> Model:
        width = f.integer("d_model")
        f.skip("num_hidden_layers", "hidden_size", "num_attention_heads")
        counts = [f.integer(f"{part}_layers", most=4096) for part in ("encoder", "decoder")]
        heads = [f.heads(f"{part}_attention_heads") for part in ("encoder", "decoder")]
        inner = [f.integer(f"{part}_ffn_dim") for part in ("encoder", "decoder")]
        vocabulary = f.integer("vocab_size", most=1 << 26)
        f.skip("decoder_vocab_size", "share_encoder_decoder_embeddings", "static_position_embeddings")
        for part, count in zip(("encoder", "decoder"), heads, strict=True):
            if width % count:
                f.fail(f"{part}_attention_heads", f"is {count}", f"a divisor of the width {width}")
        both = [Sizes(width, n, h, h, width // h, vocabulary) for n, h in zip(counts, heads, strict=True)]
        mixers = [attention(s, bias=True, out_bias=True) for s in both]
        feeds = [weights.feed_forward(width, size, gated=False, bias=True) for size in inner]
        one, other = _layers(mixers[0], mixers[1], (feeds[0], feeds[1]), 2 * width)
        places = f.integer("max_position_embeddings", default=1024, most=1 << 31) + offset
        positions = 2 * places * width
        norms = (2 * 2 * width if end_norms else 0) + (2 * 2 * width if embedding_norm else 0)
        return model(
            f,
            both[1],
            [other] * counts[1],
            encoder=[one] * counts[0],
            positions=positions + norms,
            final=0,
            tied=True,
            inner=inner[1],
        )

    return read


def mllama(f: Fields) -> Model:
    """Llama 3.2 Vision: some layers attend to the tokens of pictures instead of the text."""
    at = f.each("cross_attention_layers") or []
    found = dense()(f)
    for i in at:
        if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < len(found.layers):
            f.fail("cross_attention_layers", f"has {i!r}", f"numbers of the {len(found.layers)} layers")
    layers = list(found.layers)
    for i in at:
        (mixer,) = layers[i].mixers
        source = replace(mixer, source=True, weights=mixer.weights + 2 * mixer.key_size)
        layers[i] = replace(layers[i], mixers=(source,), dense=layers[i].dense + 2)
    # Eight tokens more than the vocabulary have an embedding and no logit.
    return replace(found, layers=tuple(layers), embedding=found.embedding + 8 * found.width)


TABLE = {
    "bart": bart(2, end_norms=False, embedding_norm=True),
    "marian": bart(0, end_norms=False, embedding_norm=False),
    "mbart": bart(2, end_norms=True, embedding_norm=True),
    "mllama_text_model": mllama,
    "t5": t5,
}
