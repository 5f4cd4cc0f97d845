"""Needle retrieval: what a model still finds in a long text with a quantised cache, or a quarter of it.

    python -m benchmarks.needle build/models/SmolLM2-135M-Instruct --out benchmarks/results/DATE-needle.jsonl

Five sentences, each with a number at its end, stand in Shakespeare's plays at five depths. The text and the beginning
of one of the sentences are read in bfloat16, and the five digits are asked for one by one, each after the right ones
before it. A needle is found when all five are likeliest, which is when greedy decoding writes them.

Caches that read a prompt as plain attention does are fed the keys and values of one and the same reading; those that do
not (int8, fp8, and policies for prompts) read it themselves. A policy that lets go of tokens, or reads some, has a
quarter of the text, chosen at the end of the question, whose last token is read after that: all digits come from what
is left. A policy for prompts sees a quarter of it while it reads. A file that is there already is completed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from benchmarks.lines import Lines
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache

import attnkit.hf
from attnkit.bench.host import provenance
from attnkit.bench.results import Line
from attnkit.compare.corpus import plays
from attnkit.hf.attention import attention
from attnkit.hf.chosen import CarriedTokens
from attnkit.hf.masks import attention_mask
from attnkit.parity.folder import read_folder
from attnkit.parity.loading import load
from attnkit.state.policies import (
    H2O,
    TOVA,
    AShape,
    BlockSparse,
    Policy,
    Prefill,
    PyramidKV,
    Quest,
    SnapKV,
    StreamingLLM,
    VerticalSlash,
    XAttention,
)

SECRETS = (
    "The captain locked his cabin with the code",
    "My grandmother's telephone number is",
    "A lottery ticket won yesterday, and its number was",
    "To open the garage of the school, dial",
    "In the year of the flood, the island had a population of",
)
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
LENGTHS = (1000, 2000, 4000, 8000)
CODES = ("int8", "fp8")


def policies(n: int) -> dict[str, Policy]:
    """Every policy with a quarter of ``n`` tokens: kept, read at each step, or seen of a prompt."""
    budget = n // 4
    return {
        "StreamingLLM": StreamingLLM(budget),
        "H2O": H2O(budget),
        "TOVA": TOVA(budget),
        "SnapKV": SnapKV(budget),
        "SnapKV 15 neighbours": SnapKV(budget, kernel=15, pool="max"),
        "PyramidKV": PyramidKV(budget, prompt=n),
        "Quest": Quest(budget // 16 * 16),
        "AShape": AShape(64, budget - 64),
        "VerticalSlash": VerticalSlash(budget // 2, budget // 2),
        "BlockSparse": BlockSparse(budget // 64),
        "XAttention": XAttention(0.9),
    }


@dataclass(frozen=True)
class Question:
    """A text with needles, and what is asked after it: tokens ``(1, n)``, ``(1, m)`` and the digits ``(1, 5)``."""

    depth: float
    asked: Tensor
    digits: Tensor


class Exam:
    """A text of ``n`` tokens with its five questions."""

    def __init__(self, tokenizer: Any, hay: Tensor, n: int, seed: int) -> None:
        drawn = torch.randint(10, (len(SECRETS), 5), generator=torch.Generator().manual_seed(1000 * seed + n))

        def tokens(text: str) -> Tensor:
            return torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids)

        needles = [
            tokens(f"\n{secret} {''.join(map(str, row.tolist()))}.\n")
            for secret, row in zip(SECRETS, drawn, strict=True)
        ]
        asked = [tokens(f"\n{secret} ") for secret in SECRETS]
        room = n - sum(map(len, needles)) - max(map(len, asked)) - 5
        cuts = [round(depth * room) for depth in DEPTHS]
        start = seed * room
        parts = [hay[start : start + cuts[0]]]
        for needle, one, two in zip(needles, cuts, [*cuts[1:], room], strict=True):
            parts += [needle, hay[start + one : start + two]]
        self.text = torch.cat(parts)[None]
        digit = {int(d): tokens(str(d)) for d in range(10)}
        self.questions = [
            Question(depth, ask[None], torch.cat([digit[int(d)] for d in row])[None])
            for depth, ask, row in zip(DEPTHS, asked, drawn, strict=True)
        ]


def answered(model: Any, cache: Any, question: Question) -> Line:
    """What the model says to the question, whose last token it has not read yet."""
    steps = torch.cat([question.asked[:, -1:], question.digits[:, :-1]], 1)
    said = [model(token, cache=cache, use_cache=True).logits[0, -1].float() for token in steps.split(1, 1)]
    logprobs = torch.stack(said).log_softmax(-1)
    right = logprobs.argmax(-1) == question.digits[0]
    chosen = logprobs.gather(1, question.digits.T)[:, 0]
    return {
        "depth": question.depth,
        "found": bool(right.all()),
        "digits": int(right.sum()),
        "logprob": round(float(chosen.sum()), 4),
    }


class Reading:
    """Queries, keys and values of every layer for all that a model has read, in order."""

    def __init__(self, model: Any) -> None:
        self.model, self.calls = model, [[] for _ in model.model.layers]
        self.cache: Any = attnkit.hf.Cache
        self.held = self.cache(model.config, max_length=8192)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """The model runs our attention, which notes its queries."""

        def listened(module: Any, query: Tensor, *others: Any, **options: Any) -> Any:
            self.calls[module.layer_idx].append(query)
            return attention(module, query, *others, **options)

        AttentionInterface.register("attnkit_listened", listened)
        AttentionMaskInterface.register("attnkit_listened", attention_mask)
        self.model.set_attn_implementation("attnkit_listened")
        try:
            yield
        finally:
            self.model.set_attn_implementation("attnkit")

    def read(self, ids: Tensor) -> None:
        with self.listening():
            self.model(ids, cache=self.held, use_cache=True, logits_to_keep=1)

    def forget(self, tokens: int) -> None:
        """The last ``tokens``, which were the last reading, were never read."""
        self.held.crop(-tokens)
        for calls in self.calls:
            calls.pop()

    def fed(self, cache: Any) -> Any:
        """``cache``, having read the same."""
        for layer, mine, calls in zip(cache.layers, self.held.layers, self.calls, strict=True):
            key, _ = layer.update(mine.keys, mine.values)
            if isinstance(key, CarriedTokens):
                key.waiting.taken(torch.cat(calls, 2), None)
        return cache


@torch.inference_mode()
def alone(model: Any, exam: Exam, cache: Any, name: str) -> Iterator[Line]:
    """Answers from a cache that reads the text itself, question by question."""
    model.set_attn_implementation(name)
    model(exam.text, cache=cache, use_cache=True, logits_to_keep=1)
    for question in exam.questions:
        if question.asked.shape[1] > 1:
            model(question.asked[:, :-1], cache=cache, use_cache=True, logits_to_keep=1)
        yield answered(model, cache, question) | {"bytes": nbytes(cache)}
        cache.crop(exam.text.shape[1] - cache.get_seq_length())


@torch.inference_mode()
def together(model: Any, exam: Exam, asked: Callable[[Question], dict[str, Callable[[], Any]]]) -> Iterator[Line]:
    """Answers from caches that read a prompt as plain attention does; ``asked`` says which are to answer a question."""
    reading = Reading(model)
    reading.read(exam.text)
    for question in exam.questions:
        if caches := asked(question):
            reading.read(question.asked[:, :-1])
            for name, made in caches.items():
                cache = reading.fed(made())
                yield {"form": name, **answered(model, cache, question), "bytes": nbytes(cache)}
                del cache
            reading.forget(question.asked.shape[1] - 1)


def nbytes(cache: Any) -> int:
    """Bytes of keys and values that a cache has allocated."""
    if isinstance(cache, attnkit.hf.Cache):
        return cache.nbytes
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


class Bench:
    """What is asked of one text, and where the answers go."""

    def __init__(self, model: Any, exam: Exam, lines: Lines, where: Line, forms: Sequence[str]) -> None:
        self.model, self.exam, self.lines, self.where, self.forms = model, exam, lines, where, forms

    def run(self) -> None:
        """Ask every cache that has not answered yet."""
        n, config = self.where["tokens"], self.model.config

        def made(**options: Any) -> Callable[[], Any]:
            ours: Any = attnkit.hf.Cache
            return lambda: ours(config, max_length=n + 64, **options)

        chosen = policies(n)
        self.by_itself("full", lambda: DynamicCache(config=config), "sdpa")
        for name in CODES:
            self.by_itself(name, made(dtype=name))
        shared = {"bf16": made(), "int4": made(dtype="int4")}
        shared |= {name: made(policy=one) for name, one in chosen.items() if not isinstance(one, Prefill)}
        self.of_one_reading(shared)
        for name, one in chosen.items():
            if isinstance(one, Prefill):
                self.by_itself(name, made(policy=one))

    def left(self, name: str, question: Question) -> bool:
        """Whether a cache has to be asked."""
        known = self.lines.found(kind="needle", form=name, depth=question.depth, **self.where)
        return not known and (not self.forms or name in self.forms)

    def by_itself(self, name: str, made: Callable[[], Any], implementation: str = "attnkit") -> None:
        if any(self.left(name, question) for question in self.exam.questions):
            for line in list(alone(self.model, self.exam, made(), implementation)):
                self.add({"form": name, **line})

    def of_one_reading(self, caches: dict[str, Callable[[], Any]]) -> None:
        def asked(question: Question) -> dict[str, Callable[[], Any]]:
            return {name: made for name, made in caches.items() if self.left(name, question)}

        if any(map(asked, self.exam.questions)):
            for line in together(self.model, self.exam, asked):
                self.add(line)

    def add(self, line: Line) -> None:
        self.lines.add({"kind": "needle", **self.where, **line})
        print(
            f"{self.where['tokens']} tokens, text {self.where['text']}, {line['form']}, at {line['depth']:.0%}: "
            f"{line['digits']} of 5 digits",
            flush=True,
        )


def measure(path: Path, lines: Lines, lengths: Sequence[int], texts: int, forms: Sequence[str]) -> None:
    folder = read_folder(path)
    assert folder.tokenizer is not None
    tokenizer = tokenizers.Tokenizer.from_file(str(folder.tokenizer))
    words = "".join(play.read_text(encoding="utf-8") for play in plays())[: 8 * max(lengths) * texts]
    hay = torch.tensor(tokenizer.encode(words, add_special_tokens=False).ids)
    model = load(folder, torch.bfloat16)
    attnkit.hf.register()
    for n in lengths:
        for text in range(texts):
            Bench(model, Exam(tokenizer, hay, n, text), lines, {"tokens": n, "text": text}, forms).run()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--lengths", type=lambda text: [int(n) for n in text.split(",")], default=list(LENGTHS))
    parser.add_argument("--texts", type=int, default=1, help="how many texts of each length")
    parser.add_argument("--forms", type=lambda text: text.split(","), default=[], help="some of the caches, else all")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    results = Path(__file__).parent / "results"
    parser.add_argument("--out", type=Path, default=results / f"{datetime.now(UTC):%Y-%m-%d}-needle.jsonl")
    chosen = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(chosen.threads)
    head = provenance({"model": chosen.model.name, "dtype": "bfloat16", "depths": list(DEPTHS)})
    lines = Lines(chosen.out, {**head, "transformers": transformers.__version__})
    measure(chosen.model, lines, chosen.lengths, chosen.texts, chosen.forms)


if __name__ == "__main__":
    main()
