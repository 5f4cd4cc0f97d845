"""More peers beside the row's own: compiled FlexAttention, and with the extra ``[peers]`` two inference engines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from typing import Any

from attnkit.bench.calls import arguments
from attnkit.bench.sizes import Case

FLEX, ONNX, OPENVINO = "flex", "onnxruntime", "openvino"
ENGINES = (ONNX, OPENVINO)
NAMES = {FLEX: "FlexAttention", ONNX: "ONNX Runtime", OPENVINO: "OpenVINO"}
Call = Callable[[], Any]


def require(names: Sequence[str]) -> None:
    """Raise ``ImportError``, in one sentence, where a peer is not installed."""
    for name in names:
        if name not in ENGINES:
            continue
        try:
            import_module(name)
        except ImportError as error:
            raise ImportError(
                f"--peers times {name}, which is not installed: pip install 'attnkit[peers]'", name=name
            ) from error


def calls(case: Case, names: Sequence[str]) -> dict[str, Call]:
    """The call of each peer that can do the work of this case, by name."""
    found = {name: MAKERS[name](case) for name in names if _takes(case)}
    return {name: call for name, call in found.items() if call is not None}


def _takes(case: Case) -> bool:
    """Peers do plain softmax attention of whole tensors, forward."""
    return case.mechanism == "softmax" and case.inputs == "sample" and not case.backward and case.ours.state is None


def _flex(case: Case) -> Call | None:
    given = arguments(case)
    if case.spec.backend(FLEX).rejects(case.spec.call(**given)):
        return None
    return partial(case.spec.function, **given, backend=FLEX)


MAKERS: dict[str, Callable[[Case], Call | None]] = {FLEX: _flex}
