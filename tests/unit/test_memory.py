"""Memory for results: what is advised is whole pages of that tensor and no byte beyond."""

from __future__ import annotations

import pytest
import torch

from attnkit.native import memory


@pytest.mark.parametrize("count", (memory.LARGE // 4, memory.LARGE // 4 + 1234))
def test_advice_covers_whole_pages_of_a_large_tensor_alone(monkeypatch, count):
    given = []
    monkeypatch.setattr(memory, "_advise", lambda *arguments: given.append(arguments))
    like = torch.zeros(2, dtype=torch.float16)
    assert memory.empty(like, 3, 5).dtype == torch.float16
    assert not given, "a small tensor is none of its business"
    made = memory.empty(like, 1, count, dtype=torch.float32)
    assert made.shape == (1, count)
    assert made.dtype == torch.float32
    ((start, size, _),) = given
    assert start % memory.PAGE == 0
    assert size % memory.PAGE == 0
    assert made.data_ptr() <= start
    assert start + size <= made.data_ptr() + 4 * count
    assert size > 4 * count - 2 * memory.PAGE
