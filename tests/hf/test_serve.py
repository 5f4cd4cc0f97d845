"""Transformers' own server with our attention, on this machine: it says what the model says by itself."""

from __future__ import annotations

import json
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from attnkit.dispatch import watch
from attnkit.hf.serve import Serve

PROMPT = [5, 6, 7, 8, 9]


@pytest.fixture
def folder(tmp_path: Path, tiny: Callable[..., Any]) -> Path:
    """A tiny model with a tokenizer whose words are the numbers of its tokens."""
    words = Tokenizer(models.WordLevel({str(i): i for i in range(99)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", unk_token="0").save_pretrained(tmp_path)
    model = tiny("llama")
    model.generation_config.update(eos_token_id=None, do_sample=False)
    model.save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def port() -> Iterator[int]:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        found = opened.getsockname()[1]
    yield found


def asked(port: int, model: str, prompt: str) -> str:
    """The answer of a completion, once the server listens."""
    body = json.dumps({"model": model, "prompt": prompt, "max_tokens": 8, "temperature": 0}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", body, {"Content-Type": "application/json"}
    )
    for _ in range(100):
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return str(json.load(answer)["choices"][0]["text"])
        except ConnectionRefusedError:
            time.sleep(0.1)
        except urllib.error.URLError as error:
            if not isinstance(error.reason, ConnectionRefusedError):
                raise
            time.sleep(0.1)
    raise TimeoutError("the server does not listen")


@pytest.mark.parametrize("continuous", [False, True])
def test_a_server_says_what_the_model_says(continuous: bool, folder: Path, port: int, tiny: Callable[..., Any]) -> None:
    ids = torch.tensor([PROMPT])
    want = tiny("llama").generate(ids, do_sample=False, pad_token_id=0, eos_token_id=None, max_new_tokens=8)[0, 5:]
    options = {"cb_num_blocks": 8, "cb_max_batch_tokens": 64} if continuous else {}
    server = Serve(
        str(folder),
        device="cpu",
        port=port,
        host="127.0.0.1",
        non_blocking=True,
        continuous_batching=continuous,
        **options,
    )
    try:
        with watch() as ran:
            got = asked(port, str(folder), " ".join(map(str, PROMPT)))
    finally:
        server.kill_server()
    assert got.split() == [str(i) for i in want.tolist() if i]  # 0 is not a word of its text
    assert ran and {backend for _, backend in ran} == {"cpu"}
    assert ("softmax_step" in {name for name, _ in ran}) == continuous


def test_what_would_not_run_our_attention_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="got no model"):
        Serve()
    with pytest.raises(ValueError, match="attn_implementation 'sdpa'"):
        Serve(str(folder), attn_implementation="sdpa")
