"""From a ``config.json`` to the sizes of a model, family by family. No code of a checkpoint is run."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

from attnkit.advise.families import cross, dense, latent, linear
from attnkit.advise.fields import Fields, read_json
from attnkit.advise.keys import IGNORABLE
from attnkit.advise.model import Model

TABLE = dense.TABLE | latent.TABLE | linear.TABLE | cross.TABLE
ALIASES = {"minimax_m1": "minimax", "gemma3": "gemma3_text", "llama4": "llama4_text"}
ALIASES |= {
    "mllama": "mllama_text_model",
    "gemma4": "gemma4_text",
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
}
# Other sequences than text, and the language model beside them.
LANGUAGE = ("text_config", "language_config", "llm_config")
OTHERS = ("vision_config", "audio_config", "speech_config", "vision_tower_config", "projector_config")


def read_config(name: str | Path) -> Model:
    """The model of a ``config.json``, of the folder that holds it, or of a name that attnkit knows."""
    path = Path(name)
    if path.exists() or str(name) not in configs():
        if not path.exists():
            near = ", ".join(configs())
            raise ValueError(f"{name} is not there, expected a config.json, its folder, or one of {near}")
        return from_config(read_json(path), str(path))
    known = read_json(configs()[str(name)])
    return from_config({"_name_or_path": str(name), **known}, f"{name}")


@cache
def configs() -> dict[str, Path]:
    """Configurations that come with attnkit, by the name of the model."""
    folder = Path(__file__).parents[1] / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.json"))}


def from_config(data: dict[str, object], file: str = "config.json") -> Model:
    """The model of a parsed configuration; ``file`` is its name in messages. Raises ``ValueError`` in one sentence."""
    f = Fields(data, file)
    notes = []
    outside: list[str] = []
    for name in LANGUAGE:
        if f.has(name):
            inside = f.inner(name)
            both = ("torch_dtype", "dtype", "tie_word_embeddings")
            kept: dict[str, object] = {key: data[key] for key in both if key in data}
            beside = [key for key in OTHERS if f.has(key)]
            f.skip(*LANGUAGE, *OTHERS, *kept)
            outside = [key for key in f.rest() if key not in IGNORABLE and key != "quantization_config"]
            if f.has("quantization_config"):
                kept["quantization_config"] = data["quantization_config"]
            kind = inside.data.get("model_type") or data.get("model_type")
            if beside:
                notes.append(f"only the language model is counted, not {', '.join(beside)}")
            f = Fields({**kept, **inside.data, "model_type": kind}, file, f"{name}.")
            break
    family = f.text("model_type")
    if family is None:
        f.fail("model_type", "is missing", "the name of a family: see attnkit advise --families")
    assert family is not None
    reader = TABLE.get(ALIASES.get(family, family))
    if reader is None:
        if f.has("auto_map"):
            raise ValueError(
                f"{file}: auto_map wants code from the checkpoint for model_type {family!r}, expected a family that "
                "attnkit knows: its code is never run, see attnkit advise --families"
            )
        f.fail("model_type", f"is {family!r}", "a family that attnkit knows: see attnkit advise --families")
    assert reader is not None
    original = set(f.data)
    found = reader(f)
    left = [key for key in sorted(original) if key not in f.taken]
    unknown = [*outside, *(f"{f.where}{key}" for key in left if key not in IGNORABLE)]
    ignored = [f"{f.where}{key}" for key in left if key in IGNORABLE]
    name = found.name or Path(file).parent.name or family
    return replace(
        found,
        name=name,
        family=family,
        unknown=tuple(unknown),
        ignored=tuple(ignored),
        notes=(*found.notes, *notes),
    )
