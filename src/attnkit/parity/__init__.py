"""``attnkit parity``: has a model's output changed under another attention implementation or cache, and where?"""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

import attnkit.hf
from attnkit.parity.loading import from_folder
from attnkit.parity.record import Check, Finding, Lane, Row, Verdict
from attnkit.parity.runner import CHECKS, plan, run
from attnkit.parity.subject import Subject, usable
from attnkit.parity.tiny import tiny

__all__ = ["CHECKS", "Check", "Finding", "Lane", "Row", "Subject", "Verdict", "plan", "run", "subject", "tiny"]


def subject(
    model: str, *, against: str | None = None, dtype: str = "float32", text: Path | None = None, register: bool = True
) -> Subject:
    """The model to check: a folder with safetensors, or a tiny random family by its name.

    Parameters
    ----------
    against: the implementation that is right by definition; ``eager`` unless the family says another.
    dtype: the precision judged.
    text: what a folder's model reads; ``attnkit.parity.loading.from_folder`` says what it reads without one.
    register: have Transformers know ``attnkit``, as ``attnkit.hf.register()`` does.

    Raises ValueError or OSError in one sentence for a folder that is broken and a name that is unknown.
    """
    transformers.logging.set_verbosity_error()  # refusals are findings here, not warnings
    transformers.logging.disable_progress_bar()
    if register:
        attnkit.hf.register()
    if against is not None:
        usable([against])
    wanted: torch.dtype = getattr(torch, dtype)
    path = Path(model).expanduser()
    if path.is_dir():
        return from_folder(path, against=against, dtype=wanted, text=text)
    if path.exists():
        raise ValueError(f"{path} is a file, expected the folder of a model")
    if text is not None:
        raise ValueError(
            "a tiny random family has no tokenizer to read a text with: leave --text out, or name a folder"
        )
    return tiny(model, against=against, dtype=wanted)
