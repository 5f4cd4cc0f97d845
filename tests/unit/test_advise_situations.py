"""Twelve situations, the answer to each, and the reason for which others lose: the articles' and ours."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from attnkit.advise import advise


def shape(layers: int, width: int, heads: int, groups: int, inner: int, vocabulary: int = 128256) -> dict[str, Any]:
    """A decoder that is only planned."""
    return {
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "intermediate_size": inner,
        "vocab_size": vocabulary,
        "max_position_embeddings": 1 << 20,
    }


@dataclass(frozen=True)
class Situation:
    config: Any
    asked: dict[str, Any]
    chosen: str
    lost: dict[str, str] = field(default_factory=dict)
    """Words in the reasons of those that lost."""


SITUATIONS = {
    "a small model from scratch": Situation(
        shape(12, 768, 12, 12, 3072, 50304),
        {"hardware": "rtx-4090", "lengths": "p50=512,p99=2k,max=2k", "concurrency": 8, "planned": True},
        "as-is",
        {"gqa-4": "4 KV heads hold less than 12", "paged": "no gain (72.0 MiB"},
    ),
    "mid-size serving with little memory": Situation(
        "llama-3.1-8b",
        {"hardware": "a10", "lengths": "p50=2k,p99=6k,max=8k", "concurrency": 14, "most": "a switch"},
        "int8",
        {
            "paged": "14 requests at p99 need 10.5 GiB of cache, and 5.9 GiB are free",
            "as-is": "of the worst case need 14.0 GiB",
            "int4": "rounded to 4 bits",
        },
    ),
    "30B and more at long context": Situation(
        shape(64, 8192, 64, 64, 28672),
        {
            "hardware": "8xh100-sxm",
            "lengths": "p50=16k,p99=128k",
            "concurrency": 16,
            "planned": True,
            "target": "itl=50ms",
        },
        "mla",
        {"as-is": "asked for 50 ms", "gqa-8": "need 512 GiB", "gqa-4": "4 KV heads hold less than 64"},
    ),
    "documents of a million tokens": Situation(
        shape(48, 6144, 48, 8, 16384),
        {
            "hardware": "4xh200",
            "lengths": "p50=512k,p99=1M",
            "concurrency": 32,
            "planned": True,
            "target": "ttft=10min,itl=50ms",
            "quality_words": "recall",
        },
        "compressed",
        {"mla": "need 1.7 TiB", "linear-hybrid": "need 1.5 TiB", "linear": "recall is asked for"},
    ),
    "long documents with strong locality": Situation(
        shape(32, 4096, 32, 8, 14336),
        {
            "hardware": "h100-sxm",
            "lengths": "p50=32k,p99=128k,max=128k",
            "concurrency": 12,
            "planned": True,
            "quality_words": "strong locality",
        },
        "window",
        {"paged": "need 192 GiB", "linear-hybrid": "as a sum by the others"},
    ),
    "streaming on an edge CPU": Situation(
        "smollm2-135m",
        {
            "hardware": "raspberry-pi-5",
            "lengths": "p50=2k,p99=8k",
            "quality_words": "streaming",
            "most": "a switch",
            "target": "itl=100ms",
        },
        "streaming",
        {"as-is": "grows by 22.5 KiB a token", "snapkv": "of a prompt only", "linear": "takes retraining"},
    ),
    "encoder-decoder translation": Situation(
        "opus-mt-en-de",
        {"hardware": "epyc-9654", "lengths": "p50=32,p99=256", "source": 512, "concurrency": 32, "target": "itl=20ms"},
        "as-is",
        {"int8": "takes a switch where nothing has to change"},
    ),
    "multimodal conditioning": Situation(
        "llama-3.2-11b-vision",
        {"hardware": "l40s", "lengths": "p50=512,p99=4k,max=8k", "source": 6404, "concurrency": 8},
        "as-is",
        {"linear-hybrid": "takes retraining where nothing has to change"},
    ),
    "fast decoding of an MHA checkpoint without training": Situation(
        "llama-2-7b",
        {
            "hardware": "a100-80gb",
            "lengths": "p50=1k,p99=4k",
            "concurrency": 32,
            "most": "a switch",
            "target": "itl=30ms",
        },
        "int8",
        {"paged": "takes at least 40.2 ms", "gqa-8": "takes conversion and healing, and at most a switch is wanted"},
    ),
    "retrieval-heavy prompts with a shared prefix": Situation(
        "llama-3.1-8b",
        {
            "hardware": "h100-sxm",
            "lengths": "p50=26k,p99=32k,max=32k",
            "shared": 24576,
            "concurrency": 40,
            "quality_words": "retrieval-heavy",
            "target": "ttft=1s",
        },
        "prefix",
        {"paged": "need 160 GiB", "snapkv": "recall is asked for"},
    ),
    "training at 64k": Situation(
        "llama-3.1-8b",
        {"hardware": "8xh100-sxm", "lengths": "64k", "train": True},
        "tiled",
        {"as-is": "of activations, and 456 GiB are free", "window": "takes conversion and healing"},
    ),
    "agents for whom recall is critical": Situation(
        "llama-3.1-8b",
        {
            "hardware": "h100-sxm",
            "lengths": "p50=16k,p99=96k,max=128k",
            "concurrency": 6,
            "quality_words": "recall-critical agents",
        },
        "int8",
        {"paged": "need 72.0 GiB", "snapkv": "gone for good", "streaming": "recall", "window": "takes conversion"},
    ),
}


@pytest.mark.parametrize("name", SITUATIONS)
def test_a_situation_has_its_answer_and_its_reasons(name: str) -> None:
    one = SITUATIONS[name]
    answer = advise(one.config, **one.asked)
    assert answer.decision.chosen == one.chosen
    assert answer.chosen.meets
    for loser, words in one.lost.items():
        assert words in answer.decision.rejected[loser][0]


def test_what_a_source_keeps_does_not_grow_with_the_answer() -> None:
    answer = advise("opus-mt-en-de", hardware="epyc-9654", lengths="p50=32,p99=256", source=512)
    short, long = answer.base.estimate.column("p50"), answer.base.estimate.column("p99")
    assert short.cache == 6 * 2 * 8 * 64 * 4 * (32 + 512)
    assert long.cache == 6 * 2 * 8 * 64 * 4 * (answer.load.lengths.columns["p99"] + 512)


def test_nothing_that_meets_is_said_so() -> None:
    answer = advise("llama-3-70b", hardware="t4", lengths="4k")
    assert not answer.chosen.meets
    assert "weights and activations take" in answer.chosen.short[0][0]
