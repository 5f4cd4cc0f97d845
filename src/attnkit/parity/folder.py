"""A model's folder, read as data: nothing in it is run, and its claims are checked before memory is taken for them.

Weights are safetensors, never pickles. ``config.json`` becomes the configuration class that Transformers has for its
``model_type``; code that a folder brings along is not looked at. Transformers is given tensors, never the folder.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

CONFIG, INDEX, WEIGHTS, TOKENIZER = "config.json", "model.safetensors.index.json", "model.safetensors", "tokenizer.json"
MOST_JSON = 1 << 24  # bytes of config.json, the index, and the header of a file of weights
MOST_TOKENIZER = 1 << 28
MOST_TENSORS = 100_000
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
# Keys that choose code instead of describing the model.
CHOOSES_CODE = ("auto_map", "attn_implementation", "experts_implementation", "trust_remote_code", "use_kernels")
COUNTED = re.compile(r"layer|expert|block|codebook")
WHOLE = ("hidden_size", "vocab_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")


@dataclass(frozen=True)
class Folder:
    """What a model's folder says, checked.

    config: of ``config.json``, without what chooses code. weights: the files that hold tensors.
    shapes: of every tensor by name. tokenizer: its file, if there is one.
    """

    path: Path
    config: dict[str, Any]
    weights: tuple[Path, ...]
    shapes: dict[str, tuple[int, ...]]
    tokenizer: Path | None

    @property
    def elements(self) -> int:
        """Numbers in all tensors."""
        return sum(prod(shape) for shape in self.shapes.values())


def read_folder(path: Path) -> Folder:
    """The folder's contents; raises ValueError or OSError in one sentence that names the file and what is wrong."""
    if (path / "adapter_config.json").exists():
        raise ValueError(f"{path} holds an adapter, expected a whole model: merge it into its model first")
    config = _json(path, CONFIG)
    files = _weight_files(path)
    shapes: dict[str, tuple[int, ...]] = {}
    for file, named in files.items():
        found = _header(file)
        if named is not None and (missing := sorted(named - found.keys())):
            raise ValueError(f"{INDEX} says that {file.name} holds {missing[0]!r}, which it does not")
        if twice := sorted(shapes.keys() & found.keys()):
            raise ValueError(f"{file.name} holds {twice[0]!r}, which another file holds too")
        shapes |= found
    if len(shapes) > MOST_TENSORS:
        raise ValueError(f"{path} holds {len(shapes)} tensors, expected at most {MOST_TENSORS}")
    _check_sizes(config, shapes)
    has_tokenizer = (path / TOKENIZER).exists()
    tokenizer = _regular(path, TOKENIZER, MOST_TOKENIZER) if has_tokenizer else None
    return Folder(path, _described(config), tuple(files), shapes, tokenizer)


def _weight_files(path: Path) -> dict[Path, set[str] | None]:
    """The files of weights, each with the names that the index says it holds, where there is an index."""
    if (path / INDEX).exists():
        where = _json(path, INDEX).get("weight_map")
        if not isinstance(where, dict) or not where or not all(isinstance(f, str) for f in where.values()):
            raise ValueError(f"{INDEX} has no weight_map from names to files")
        held: dict[str, set[str]] = {}
        for name, file in where.items():
            held.setdefault(file, set()).add(name)
        for file in held:
            if Path(file).name != file or not file.endswith(".safetensors"):
                raise ValueError(f"{INDEX} names {file!r}, expected the name of a safetensors file in the same folder")
        return {_regular(path, file): names for file, names in held.items()}
    if (path / WEIGHTS).exists():
        return {_regular(path, WEIGHTS): None}
    pickled = sorted(p.name for p in path.iterdir() if p.suffix in PICKLES)
    if pickled:
        raise ValueError(
            f"{path} holds {pickled[0]} and no {WEIGHTS}: pickled weights can run code and are never read, so save the "
            "model again with save_pretrained, which writes safetensors"
        )
    raise ValueError(f"{path} holds no {WEIGHTS} and no {INDEX}, expected a model saved by save_pretrained")


def _regular(path: Path, name: str, most: int | None = None) -> Path:
    """The file ``name`` of the folder, which has to be a regular file that lies in it."""
    home, file = (Path(os.path.realpath(p)) for p in (path, path / name))
    inside = [home]
    if home.parent.name == "snapshots":  # the hub's own cache keeps files beside its snapshots
        inside.append(home.parents[1] / "blobs")
    if not any(file.is_relative_to(folder) for folder in inside):
        raise ValueError(f"{path / name} is a link out of the folder, expected a file in it")
    status = file.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path / name} is not a regular file")
    if most is not None and status.st_size > most:
        raise ValueError(f"{path / name} has {status.st_size} bytes, expected at most {most}")
    return file


def _json(path: Path, name: str) -> dict[str, Any]:
    text = _regular(path, name, MOST_JSON).read_bytes()
    return _parsed(text, name)


def _parsed(text: bytes, name: str) -> dict[str, Any]:
    def constant(word: str) -> Any:
        raise ValueError(f"it has {word}")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a key occurs twice")
        return found

    try:
        value = json.loads(text.decode("utf-8"), parse_constant=constant, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{name} holds a {type(value).__name__}, expected an object")
    return value


def _header(file: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a safetensors file, whose bytes have to be exactly those that its header describes."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if size < 8 or length > min(MOST_JSON, size - 8):
            raise ValueError(
                f"{file.name} has a header of {length} bytes in a file of {size}, expected at most {MOST_JSON} and a "
                "whole file: it is cut short or no safetensors"
            )
        header = _parsed(opened.read(length), f"the header of {file.name}")
    header.pop("__metadata__", None)
    spans, shapes = [], {}
    for name, entry in header.items():
        shape, dtype, (start, end) = _entry(file, name, entry)
        if end - start != prod(shape) * ITEM_BYTES[dtype]:
            raise ValueError(f"{file.name}: {name!r} has {end - start} bytes for shape {list(shape)} of {dtype}")
        spans.append((start, end))
        shapes[name] = shape
    reached = 0
    for start, end in sorted(spans):
        if start != reached:
            raise ValueError(f"{file.name}: tensors overlap or leave a hole at byte {min(start, reached)}")
        reached = end
    if reached != size - 8 - length:
        raise ValueError(
            f"{file.name} holds {size - 8 - length} bytes of tensors and its header describes {reached}: it is cut "
            "short or was changed"
        )
    return shapes


def _entry(file: Path, name: str, entry: Any) -> tuple[tuple[int, ...], str, tuple[int, int]]:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(start), int(end)]}:
            if dtype not in ITEM_BYTES:
                raise ValueError(f"{file.name}: {name!r} is of {dtype}, expected one of {', '.join(ITEM_BYTES)}")
            if all(type(n) is int and 0 <= n < 1 << 48 for n in shape) and 0 <= start <= end:
                return tuple(shape), dtype, (start, end)
    raise ValueError(f"{file.name}: the header's entry for {name!r} is no dtype, shape and range")


def _check_sizes(config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
    """Numbers of a configuration that are no numbers of anything, or count more than there can be."""
    most = max([len(shapes), *(n for shape in shapes.values() for n in shape)])
    for name, value in _numbers(config):
        if name in WHOLE and not (type(value) is int and value > 0):
            raise ValueError(f"{CONFIG}: {name} is {value!r}, expected a whole number above 0")
        if isinstance(value, int) and abs(value) >= 1 << 31:
            raise ValueError(f"{CONFIG}: {name} is {value}, expected less than 2**31")
        if isinstance(value, int) and COUNTED.search(name) and value > most:
            raise ValueError(f"{CONFIG}: {name} is {value}, which the weights do not hold")


def _numbers(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Names and values of a configuration and those within it; None is left out, which stands for a default."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _numbers(value)
        elif value is not None and (name in WHOLE or isinstance(value, int | float)):
            yield name, value


def _described(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration without what chooses code."""
    return {
        name: _described(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if name not in CHOOSES_CODE and not name.startswith("_")
    }
