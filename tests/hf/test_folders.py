"""Folders that are broken or hostile end in one sentence, before memory is taken and without running what they hold."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from attnkit.cli import main
from attnkit.parity.families import build
from attnkit.parity.folder import CONFIG, INDEX, TOKENIZER, WEIGHTS, read_folder
from attnkit.parity.loading import from_folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model as Transformers saves one."""
    folder = tmp_path_factory.mktemp("model")
    build("llama", num_hidden_layers=2).save_pretrained(folder)
    return folder


@pytest.fixture
def model(saved: Path, tmp_path: Path) -> Path:
    """A copy of it that may be broken."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in (CONFIG, WEIGHTS):
        (folder / name).write_bytes((saved / name).read_bytes())
    return folder


def configured(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**config, **changes}))

    return change


def text(content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / CONFIG).write_text(content) and None


def header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Rewrites the header of the weights."""

    def rewrite(folder: Path) -> None:
        data = (folder / WEIGHTS).read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        entries = json.loads(data[8 : 8 + length])
        changed = change(entries)
        new = json.dumps(entries if changed is None else changed).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(new)) + new + data[8 + length :])

    return rewrite


def first(entries: dict[str, Any]) -> dict[str, Any]:
    return next(entry for name, entry in entries.items() if name != "__metadata__")


def cut_short(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def only_a_pickle(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Canary(folder / "ran")))


def linked_out(folder: Path) -> None:
    outside = folder.parent / "outside.safetensors"
    (folder / WEIGHTS).rename(outside)
    (folder / WEIGHTS).symlink_to(outside)


def pipe(folder: Path) -> None:
    (folder / CONFIG).unlink()
    os.mkfifo(folder / CONFIG)


def circle(folder: Path) -> None:
    (folder / CONFIG).unlink()
    (folder / CONFIG).symlink_to(folder / CONFIG)


def index(**weight_map: Any) -> Callable[[Path], None]:
    return lambda folder: (folder / INDEX).write_text(json.dumps({"weight_map": weight_map})) and None


def sharded(change: Callable[[Path, Path], Any]) -> Callable[[Path], None]:
    """Splits the weights over two files with an index, and breaks that."""

    def split(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        names = sorted(tensors)
        shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
        for file, held in shards.items():
            save_file({name: tensors[name] for name in held}, folder / file)
        index(**{name: file for file, held in shards.items() for name in held})(folder)
        change(folder / "a.safetensors", folder / "b.safetensors")

    return split


def swapped(a: Path, b: Path) -> None:
    held = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(held)


def moved_out(a: Path, b: Path) -> None:
    outside = a.parent.parent / "outside.safetensors"
    a.rename(outside)
    a.symlink_to(outside)


def a_pipe_for(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return change


def long_header(folder: Path) -> None:
    """A header of 100 MB, which is there: nothing but zeros, of which the file system keeps none."""
    with (folder / WEIGHTS).open("wb") as opened:
        opened.write(struct.pack("<Q", 100 << 20))
        opened.truncate(200 << 20)


class Canary:
    """A pickle of it writes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


HOSTILE = {
    "only a pickle": (only_a_pickle, "never read"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "expected a model saved by save_pretrained"),
    "no config": (lambda folder: (folder / CONFIG).unlink(), "No such file"),
    "an adapter": (lambda folder: (folder / "adapter_config.json").write_text("{}"), "merge it"),
    "weights cut short": (cut_short, "cut short"),
    "weights empty": (lambda folder: (folder / WEIGHTS).write_bytes(b""), "cut short"),
    "weights too long": (lambda folder: (folder / WEIGHTS).open("ab").write(b"0"), "was changed"),
    "header of 2**63 bytes": (
        lambda folder: (folder / WEIGHTS).write_bytes(b"\xff" * 7 + b"\x7f" + b"x" * 64),
        "cut short or no safetensors",
    ),
    "header no JSON": (lambda folder: (folder / WEIGHTS).write_bytes(struct.pack("<Q", 2) + b"{{"), "as JSON"),
    "overlapping tensors": (header(lambda e: first(e).update(data_offsets=[1, 1 + _bytes(first(e))])), "overlap or"),
    "shape unlike bytes": (header(lambda e: first(e).update(shape=[3, 3])), "bytes for shape"),
    "negative shape": (header(lambda e: first(e).update(shape=[-1])), "no dtype, shape and range"),
    "unknown dtype": (header(lambda e: first(e).update(dtype="F4")), "is of F4"),
    "link out of the folder": (linked_out, "a link out of the folder"),
    "a pipe": (pipe, "not a regular file"),
    "a link to itself": (circle, ""),
    "index to the parent": (index(a="../x.safetensors"), "in the same folder"),
    "index to a pickle": (index(a="x.bin"), "expected the name of a safetensors file"),
    "index to the parent's parent": (index(a="../../x.safetensors"), "in the same folder"),
    "a shard cut short": (sharded(lambda a, b: a.write_bytes(a.read_bytes()[:-100])), "cut short"),
    "a shard swapped for another": (sharded(swapped), "which it does not"),
    "a shard twice": (sharded(lambda a, b: b.write_bytes(a.read_bytes())), "which it does not"),
    "a shard missing": (sharded(lambda a, b: b.unlink()), "No such file"),
    "a shard linked out of the folder": (sharded(moved_out), "a link out of the folder"),
    "weights a pipe": (a_pipe_for(WEIGHTS), "not a regular file"),
    "a tokenizer that is a pipe": (a_pipe_for(TOKENIZER), "not a regular file"),
    "header of 100 MB": (long_header, "cut short or no safetensors"),
    "index that lies": (index(a=WEIGHTS), "which it does not"),
    "config no JSON": (text("{"), "cannot be read as JSON"),
    "config a list": (text("[]"), "expected an object"),
    "config with NaN": (text('{"a": NaN}'), "it has NaN"),
    "config with a key twice": (text('{"a": 1, "a": 2}'), "a key occurs twice"),
    "config too deep": (text('{"a":' * 100_000 + "1" + "}" * 100_000), "cannot be read as JSON"),
    "config with a number of 5000 digits": (text('{"a": ' + "9" * 5000 + "}"), "cannot be read as JSON"),
    "config no text": (lambda folder: (folder / CONFIG).write_bytes(b"\xff\xfe"), "cannot be read as JSON"),
    "no model type": (text("{}"), "model_type is None"),
    "unknown model type": (configured(model_type="evil"), "never run"),
    "2**31 heads": (configured(num_attention_heads=1 << 31), "expected less than 2**31"),
    "0 heads": (configured(num_attention_heads=0), "expected a whole number above 0"),
    "-1 heads": (configured(num_attention_heads=-1), "expected a whole number above 0"),
    "heads as text": (configured(num_attention_heads="4"), "expected a whole number above 0"),
    "a billion layers": (configured(num_hidden_layers=10**9), "which the weights do not hold"),
    "one layer more": (configured(num_hidden_layers=3), "the weights hold"),
    "one layer fewer": (configured(num_hidden_layers=1), "unexpected are"),
    "a larger vocabulary": (configured(vocab_size=1 << 30), "the weights hold"),
    "another width": (configured(intermediate_size=95), ""),
    "quantised": (configured(quantization_config={"quant_method": "gptq"}), "quantised"),
}


def _bytes(entry: dict[str, Any]) -> int:
    start, end = entry["data_offsets"]
    return int(end - start)


@pytest.mark.parametrize(("break_it", "says"), HOSTILE.values(), ids=HOSTILE.keys())
def test_a_broken_folder_ends_in_one_sentence(
    model: Path, capsys: pytest.CaptureFixture[str], break_it: Callable[[Path], Any], says: str
) -> None:
    break_it(model)
    assert main(["parity", str(model)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1, captured.err
    assert captured.err.startswith("attnkit: ") and says in captured.err
    assert not (model / "ran").exists()


def test_code_that_a_folder_brings_is_not_run(model: Path) -> None:
    canary = model / "ran"
    (model / "modeling_evil.py").write_text(f"open({str(canary)!r}, 'w')")
    configured(
        auto_map={"AutoModelForCausalLM": "modeling_evil.Evil", "AutoConfig": "modeling_evil.Evil"},
        trust_remote_code=True,
        attn_implementation="someone/kernels",
        _attn_implementation="someone/kernels",
    )(model)
    subject = from_folder(model, against=None, dtype=torch.float32, text=None)
    assert type(subject.model).__module__.startswith("transformers.models.llama")
    assert subject.model.config._attn_implementation == "eager"
    assert not canary.exists()


def test_a_folder_says_what_the_model_said(model: Path) -> None:
    subject = from_folder(model, against=None, dtype=torch.float32, text=None)
    want = build("llama", num_hidden_layers=2)
    with torch.no_grad():
        assert torch.equal(subject.model(subject.ids).logits, want(subject.ids).logits)


def test_the_hubs_own_cache_is_read_through_its_links(saved: Path, tmp_path: Path) -> None:
    home = tmp_path / "models--a--b"
    snapshot = home / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (home / "blobs").mkdir()
    for i, name in enumerate((CONFIG, WEIGHTS)):
        (home / "blobs" / str(i)).write_bytes((saved / name).read_bytes())
        (snapshot / name).symlink_to(Path("../../blobs") / str(i))
    assert read_folder(snapshot).elements == read_folder(saved).elements
