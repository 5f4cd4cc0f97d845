"""A model's folder as a subject."""

from __future__ import annotations

import copy
import pydoc_data.topics
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from attnkit.parity.folder import CONFIG, Folder, read_folder
from attnkit.parity.subject import Subject

LENGTH, TEXT, NEW = 64, 512, 64
MOST_TEXT = 1 << 24
MEMORY = Path("/proc/meminfo")


def from_folder(path: Path, *, against: str | None, dtype: torch.dtype, text: Path | None) -> Subject:
    """The model in ``path`` and its text; raises ValueError or OSError in one sentence for a folder that is broken.

    text: a text to read; without one the manual that comes with Python is read, and random tokens where the folder has
        no ``tokenizer.json``.
    """
    folder = read_folder(path)
    model = load(folder, dtype)
    tokens = _tokens(folder, text, model.config.get_text_config(decoder=True).vocab_size)
    most = getattr(model.config, "max_position_embeddings", None) or TEXT
    length = min(_length(model.config), most)
    if len(tokens) < 2 * length:
        raise ValueError(f"the text has {len(tokens)} tokens, expected at least {2 * length}: give a longer one")
    return Subject(
        path.name or str(path),
        model=model,
        gold=copy.deepcopy(model).to(torch.float64),
        against=against or "eager",
        ids=tokens[: 2 * length].view(2, length),
        text=tokens[: min(TEXT, most)],
        prompt=min(LENGTH, most // 2),
        new=min(NEW, most // 2),
    )


def load(folder: Folder, dtype: torch.dtype) -> Any:
    """The model of ``folder`` in evaluation mode, in ``dtype``, from its tensors alone."""
    config = _config(folder)
    try:
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(config, attn_implementation="eager", trust_remote_code=False)
    except Exception as error:  # whatever a class of Transformers raises for numbers that do not fit together
        raise ValueError(f"{CONFIG} describes no model: {_one_line(error)}") from error
    wanted = sum(p.numel() for p in empty.parameters())
    if wanted > folder.elements:
        raise ValueError(f"{CONFIG} describes {wanted} parameters and the weights hold {folder.elements}")
    _check_memory(wanted * (8 + 2 * dtype.itemsize))
    state: dict[str, Tensor] = {}
    for file in folder.weights:
        state |= load_file(file)
    try:
        model, info = type(empty).from_pretrained(
            None,
            config=config,
            state_dict=state,
            dtype=dtype,
            attn_implementation="eager",
            output_loading_info=True,
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
        )
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the weights do not fit {CONFIG}: {_one_line(error)}") from error
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if names := sorted(map(str, info[kind])):
            raise ValueError(
                f"the weights do not fit {CONFIG}: {kind.removesuffix('_keys')} are {', '.join(names[:3])}"
            )
    return model.eval()


def _config(folder: Folder) -> Any:
    kind = folder.config.get("model_type")
    if not isinstance(kind, str) or kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ValueError(
            f"{CONFIG}: model_type is {kind!r}, which is no language model of this Transformers, and code that a "
            "folder brings along is never run"
        )
    if folder.config.get("quantization_config"):
        raise ValueError(f"{CONFIG}: the weights are quantised, expected floating-point ones")
    try:
        config = CONFIG_MAPPING[kind].from_dict(folder.config)
    except Exception as error:  # validation of Transformers raises classes of its own
        raise ValueError(f"{CONFIG} is no {kind} configuration: {_one_line(error)}") from error
    config._experts_implementation = "eager"  # the grouped product has no float64
    return config


def _tokens(folder: Folder, text: Path | None, vocabulary: int) -> Tensor:
    if folder.tokenizer is None:
        if text is not None:
            raise ValueError(f"{folder.path} has no tokenizer.json, expected one to read {text} with")
        return torch.randint(vocabulary, (1 << 12,), generator=torch.Generator().manual_seed(0))
    words = _manual() if text is None else _read(text)
    import tokenizers

    try:
        ids = tokenizers.Tokenizer.from_file(str(folder.tokenizer)).encode(words, add_special_tokens=False).ids
    except Exception as error:  # the only class that it raises
        raise ValueError(f"tokenizer.json cannot be read: {_one_line(error)}") from error
    if ids and max(ids) >= vocabulary:
        raise ValueError(f"tokenizer.json has token {max(ids)}, and the model knows {vocabulary}")
    return torch.tensor(ids, dtype=torch.int64)


def _manual() -> str:
    """The start of the reference manual that every Python has."""
    return "\n".join(pydoc_data.topics.topics[name] for name in ("assignment", "class", "for", "import"))


def _read(text: Path) -> str:
    if not text.is_file():
        raise ValueError(f"{text} is no file, expected a text")
    with text.open("rb") as file:
        return file.read(MOST_TEXT).decode("utf-8", errors="replace")


def _length(config: Any) -> int:
    """Tokens to read at once: enough to pass a window that is not too long for that."""
    window = getattr(config.get_text_config(decoder=True), "sliding_window", None) or 0
    return max(LENGTH, window + LENGTH // 4 if window <= 8 * LENGTH else 0)


def _check_memory(needed: int) -> None:
    if not MEMORY.is_file():
        return
    free = next(int(line.split()[1]) << 10 for line in MEMORY.read_text().splitlines() if "MemAvailable" in line)
    if needed > free:
        raise ValueError(
            f"this model needs {needed >> 20} MiB for its weights in float64 and in the dtype judged, and "
            f"{free >> 20} MiB are free: use a machine with more memory"
        )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
