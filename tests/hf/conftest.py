"""Tiny random models of Transformers, and a switch that is set before the tests and taken back after them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
import transformers

import attnkit.hf
from attnkit.hf.names import arguments
from attnkit.parity.families import FAMILIES, build
from attnkit.parity.subject import float64_softmax


def _old_names(call: Callable[..., Any]) -> Callable[..., Any]:
    """``call`` of a model, whose cache may be given as ``cache``."""

    def renamed(self: Any, *args: Any, **options: Any) -> Any:
        if isinstance(options.get("cache"), transformers.Cache) and "cache" not in arguments(self):
            options["past_key_values"] = options.pop("cache")
        return call(self, *args, **options)

    return renamed


# Transformers before 5.24 has another name for what these tests call ``cache`` (make hf-oldest).
if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 24):
    transformers.PreTrainedModel.__call__ = _old_names(torch.nn.Module.__call__)
    transformers.GenerationMixin.generate = _old_names(transformers.GenerationMixin.generate)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "each_family" in metafunc.fixturenames:
        metafunc.parametrize("each_family", list(FAMILIES))


@pytest.fixture
def tiny() -> Callable[..., Any]:
    """Builds a tiny random model: ``tiny("llama", "attnkit")``."""
    return build


@pytest.fixture
def softmax_in_float64() -> Iterator[None]:
    """Eager attention rounds its weights to float32 whatever the model's dtype; this lets float64 through."""
    with float64_softmax():
        yield


@pytest.fixture(autouse=True)
def _switch() -> Iterator[None]:
    transformers.logging.set_verbosity_error()
    attnkit.hf.register()
    yield
    attnkit.hf.unregister()
