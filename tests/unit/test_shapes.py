"""Shape checks and the arguments of ``softmax_attention``: wrong input is one sentence that says what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attnkit
from attnkit import shapes

BOOL = torch.ones(9, 9, dtype=torch.bool)
Q, K, V = torch.zeros(2, 4, 5, 8), torch.zeros(2, 2, 7, 8), torch.zeros(2, 2, 7, 6)


def assert_one_sentence(message: str) -> None:
    assert "\n" not in message
    assert len(message) < 300
    assert "expected" in message or "make" in message or "name" in message or "give" in message, message


def test_check_names_the_axes() -> None:
    sizes = shapes.check("f", q=(Q, "b h m d"), k=(K, "b g n d"), v=(V, "b g n e"))
    assert sizes == {"b": 2, "h": 4, "m": 5, "d": 8, "g": 2, "n": 7, "e": 6}


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "three dimensions": ({"q": Q[0]}, ValueError, "q has 3 dimensions (4, 5, 8), expected 4 (batch, query heads"),
    "not a tensor": ({"q": [1.0]}, TypeError, "q is a list, expected a tensor"),
    "batch": ({"k": K[:1]}, ValueError, "batch is 1 in k (1, 2, 7, 8) but 2 in q (2, 4, 5, 8)"),
    "key size": ({"k": K[..., :3]}, ValueError, "key size is 3 in k (2, 2, 7, 3) but 8 in q"),
    "keys and values": ({"v": V[:, :, :4]}, ValueError, "keys is 4 in v (2, 2, 4, 6) but 7 in k"),
    "KV heads of k and v": ({"v": V[:, :1]}, ValueError, "KV heads is 1 in v"),
    "no division": ({"q": torch.zeros(2, 3, 5, 8)}, ValueError, "got 3 query heads and 2 KV heads, expected"),
    "no KV heads": ({"k": K[:, :0], "v": V[:, :0]}, ValueError, "4 query heads and 0 KV heads"),
    "no query heads": ({"q": Q[:, :0]}, ValueError, "got 0 query heads and 2 KV heads, expected"),
    "no key size": ({"q": Q[..., :0], "k": K[..., :0]}, ValueError, "key size is 0"),
    "dtypes": ({"k": K.bfloat16()}, TypeError, "k has dtype torch.bfloat16 but q torch.float32, expected one"),
    "integers": ({"q": Q.long(), "k": K.long(), "v": V.long()}, TypeError, "q has dtype torch.int64, expected"),
    "devices": ({"k": K.to("meta")}, ValueError, "k is on meta but q on cpu, expected one"),
    "mask length": ({"mask": torch.ones(5, 6, dtype=torch.bool)}, ValueError, "the mask tensor is 5x6 but there are 5"),
    "mask of numbers": ({"mask": torch.zeros(5, 7)}, ValueError, "a float32 tensor of shape (5, 7), expected a bool"),
    "mask of another kind": ({"mask": "causal"}, TypeError, "mask is a str, expected a mask such as attnkit.causal()"),
    "documents length": ({"mask": attnkit.documents(torch.arange(6))}, ValueError, "documents has length 6"),
    "padding batch": ({"mask": attnkit.padding(BOOL[:3, :7])}, ValueError, "batch size 3 but the call has 2"),
    "padding length": ({"mask": attnkit.padding(BOOL[:2, :9])}, ValueError, "padding has length 9"),
    "block layout": (
        {"mask": attnkit.block_sparse(BOOL[:2, :2], 2)}, ValueError, "block_sparse covers 4 positions",
    ),
    "mask heads": (
        {"mask": attnkit.block_sparse(BOOL[:2, :2].expand(3, 2, 2), 8)}, ValueError, "head count 3 but the call has 4",
    ),
    "bias shape": ({"bias": torch.zeros(3, 7)}, ValueError, "(3, 7), expected one that broadcasts to (2, 4, 5, 7)"),
    "bool bias": ({"bias": torch.ones(5, 7, dtype=torch.bool)}, TypeError, "a torch.bool tensor, expected a floating"),
    "number as bias": ({"bias": 1.0}, TypeError, "bias is a float"),
    "alibi heads": ({"alibi": torch.zeros(2)}, ValueError, "query heads is 2 in alibi"),
    "sink rank": ({"sink": torch.zeros(1, 4)}, ValueError, "sink has 2 dimensions"),
    "negative softcap": ({"softcap": -1.0}, ValueError, "softcap is -1.0, expected a positive number"),
    "NaN softcap": ({"softcap": float("nan")}, ValueError, "softcap is nan"),
    "dropout 1": ({"dropout": 1.0}, ValueError, "dropout is 1.0, expected 0 <= dropout < 1"),
    "unknown backend": ({"backend": "cuda"}, ValueError, "softmax has no backend 'cuda': name one of cpu, sdpa"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence(name: str) -> None:
    changed, error, said = BAD[name]
    with pytest.raises(error) as caught:
        attnkit.softmax_attention(**{"q": Q, "k": K, "v": V, **changed})
    message = str(caught.value)
    assert said in message
    assert_one_sentence(message)


def test_good_input_is_accepted() -> None:
    """The inverse: the same call without a mistake runs."""
    assert attnkit.softmax_attention(Q, K, V).shape == (2, 4, 5, 6)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: attnkit.window(0), "window: size is 0, expected at least 1"),
        (lambda: attnkit.window(-3), "size is -3"),
        (lambda: attnkit.window(2.0), "size is a float (2.0), expected an integer"),
        (lambda: attnkit.window(True), "size is a bool"),
        (lambda: attnkit.symmetric_window(-1), "radius is -1"),
        (lambda: attnkit.dilated_window(3, 0), "dilation is 0"),
        (lambda: attnkit.fixed(4, 5), "columns is 5 but stride is 4"),
        (lambda: attnkit.prefix(-1), "length is -1"),
        (lambda: attnkit.global_tokens([]), "expected at least one"),
        (lambda: attnkit.global_tokens([3, -1]), "none negative"),
        (lambda: attnkit.documents(torch.zeros(4)), "expected integer ids"),
        (lambda: attnkit.padding(torch.zeros(2, 4)), "expected a bool tensor of 1 or 2 dimensions"),
        (lambda: attnkit.block_sparse(torch.ones(2, 3, dtype=torch.bool), 4), "as many query blocks as key blocks"),
        (lambda: attnkit.causal() & torch.ones(2, 2, dtype=torch.bool), "wrap a tensor in explicit"),
        (
            lambda: (
                attnkit.padding(torch.ones(2, 4, dtype=torch.bool))
                & attnkit.padding(torch.ones(3, 4, dtype=torch.bool))
            ),
            "made for 2 and 3 batches",
        ),
    ],
)
def test_bad_masks_are_one_sentence(make: Any, said: str) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        make()
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
