"""More peers beside the row's own: compiled FlexAttention, and with the extra ``[peers]`` two inference engines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from typing import Any

import torch

from attnkit.bench.calls import arguments
from attnkit.bench.sizes import Case
from attnkit.spec import Sizes

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
            for needed in ("onnx", ONNX) if name == ONNX else (name,):
                import_module(needed)
        except ImportError as error:
            raise ImportError(
                f"--peers needs {error.name}, which is not installed: pip install 'attnkit[peers]'", name=error.name
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


def _onnxruntime(case: Case) -> Call | None:
    """ONNX Runtime's GroupQueryAttention, causal and float32 here; a decoded token appends to a bound cache."""
    s = case.sizes
    causal = case.decodes or case.mask == "causal()"
    if case.dtype != "float32" or not causal or s.d != s.e or s.m not in (1, s.n):
        return None
    import numpy
    import onnxruntime

    given = arguments(case)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(_gqa(s), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for name, x in (("query", given["q"]), ("key", given["k"][:, :, -s.m :]), ("value", given["v"][:, :, -s.m :])):
        binding.bind_cpu_input(name, x.transpose(1, 2).reshape(s.b, s.m, -1).contiguous().numpy())
    binding.bind_cpu_input("seqlens_k", numpy.full(s.b, s.n - 1, numpy.int32))
    binding.bind_cpu_input("total_sequence_length", numpy.array([s.n], numpy.int32))
    binding.bind_output("o")
    for name in ("key", "value"):
        # Past and present are one buffer, as in a server: nothing is copied but the new token.
        held = given[name[0]].numpy() if case.decodes else numpy.zeros((s.b, s.g, s.n, s.d), numpy.float32)
        cache = onnxruntime.OrtValue.ortvalue_from_numpy(held.copy())
        binding.bind_ortvalue_input(f"past_{name}", cache)
        binding.bind_ortvalue_output(f"present_{name}", cache)
    return partial(session.run_with_iobinding, binding)


def _gqa(s: Sizes) -> bytes:
    """A model of one GroupQueryAttention, inputs and outputs by name."""
    from onnx import TensorProto, helper

    def value(name: str, shape: list[str | int], kind: int = TensorProto.FLOAT) -> Any:
        return helper.make_tensor_value_info(name, kind, shape)

    wide: list[str | int] = ["b", "m", s.h * s.d]
    narrow: list[str | int] = ["b", "m", s.g * s.d]
    cache: list[str | int] = ["b", s.g, "n", s.d]
    inputs = [value("query", wide), value("key", narrow), value("value", narrow)]
    inputs += [value("past_key", cache), value("past_value", cache)]
    inputs += [value("seqlens_k", ["b"], TensorProto.INT32), value("total_sequence_length", [1], TensorProto.INT32)]
    outputs = [value("o", wide), value("present_key", cache), value("present_value", cache)]
    names, made = ([x.name for x in values] for values in (inputs, outputs))
    heads = {"num_heads": s.h, "kv_num_heads": s.g}
    node = helper.make_node("GroupQueryAttention", names, made, domain="com.microsoft", **heads)
    operators = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(helper.make_graph([node], "attention", inputs, outputs), opset_imports=operators)
    model.ir_version = 10  # the newest that runtimes of two years read
    return bytes(model.SerializeToString())


def _openvino(case: Case) -> Call | None:
    """OpenVINO's scaled dot product attention; it has no groups, so keys are written out for every query head."""
    s = case.sizes
    if case.dtype not in ("float32", "bfloat16") or case.mask not in (None, "causal()") or s.m not in (1, s.n):
        return None
    import openvino
    from openvino import opset13

    kind, hint = (openvino.Type.f32, "f32") if case.dtype == "float32" else (openvino.Type.bf16, "bf16")
    given = arguments(case)
    tensors = [given["q"], *(given[name].repeat_interleave(s.h // s.g, 1) for name in ("k", "v"))]
    inputs = [opset13.parameter(list(x.shape), kind) for x in tensors]
    attention = opset13.scaled_dot_product_attention(*inputs, causal=case.mask is not None and not case.decodes)
    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": hint}
    request = openvino.Core().compile_model(openvino.Model([attention], inputs), "CPU", settings).create_infer_request()
    for index, x in enumerate(tensors):
        held = openvino.Tensor(kind, list(x.shape))
        # NumPy has no bfloat16: the bits go over as integers of their size.
        integer = torch.int32 if x.element_size() == 4 else torch.int16
        bits = x.contiguous().view(integer).numpy()
        held.data.view(bits.dtype)[...] = bits
        request.set_input_tensor(index, held)
    return partial(request.infer)


MAKERS: dict[str, Callable[[Case], Call | None]] = {FLEX: _flex, ONNX: _onnxruntime, OPENVINO: _openvino}
