"""Every attention call of a forward pass, with what its mask lets each query see, and its definition in float64."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from attnkit.hf.names import as_cache
from attnkit.masks import explicit
from attnkit.mechanisms.softmax import softmax_attention
from attnkit.parity.caches import cache
from attnkit.parity.record import DoesNotApplyError
from attnkit.parity.subject import Subject, implementation

PROBE = "attnkit_parity"
Function = Callable[..., tuple[Tensor, Any]]


@dataclass(frozen=True, eq=False)
class Settings:
    """What a call asks for besides its tensors; ``sink`` and ``bias`` as for ``softmax_attention``."""

    scale: float | None
    softcap: float | None
    sink: Tensor | None
    bias: Tensor | None
    window: int | None


@dataclass(frozen=True, eq=False)
class Call:
    """One call of an attention function, and what it returned.

    layer: the module's name. q: (b, h, m, d). k: (b, g, n, d). v: (b, g, n, e). o: (b, m, h, e).
    """

    layer: str
    module: nn.Module
    function: Function
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Any
    options: dict[str, Any]
    o: Tensor

    @property
    def settings(self) -> Settings:
        given = self.options.get
        return Settings(
            given("scaling"), given("softcap"), given("s_aux"), given("position_bias"), given("sliding_window")
        )

    @property
    def scale(self) -> float:
        """What scores are multiplied by."""
        given = self.settings.scale
        return self.q.shape[3] ** -0.5 if given is None else given

    def again(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The same call with other tensors."""
        with torch.no_grad():
            return self.function(self.module, q, k, v, self.mask, **self.options)[0]


@dataclass(frozen=True, eq=False)
class Judged:
    """A call beside the truth: ``visible`` ``(b, 1 | h, m, n)`` says which keys each query may see."""

    call: Call
    visible: Tensor


def definition(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, settings: Settings) -> Tensor:
    """Attention ``(b, m, h, e)`` by its definition, in the dtype of ``q``; 0 where a query sees no key."""
    sink, bias = (None if x is None else x.detach().to(q.dtype) for x in (settings.sink, settings.bias))
    o: Tensor = softmax_attention(
        q,
        k,
        v,
        mask=explicit(visible),
        scale=settings.scale,
        softcap=settings.softcap,
        sink=sink,
        bias=bias,
        backend="reference",
    )
    return o.transpose(1, 2)


def recorded(subject: Subject, backend: str, kept: Tensor | None = None, cuts: Sequence[int] = ()) -> list[Judged]:
    """Every attention call of one forward pass, or of one that reads pieces that end at ``cuts`` with DynamicCache.

    Which keys may be seen is what Transformers' own dense masks say in a second pass over the same text. Raises
    ``DoesNotApplyError`` for a model that calls no attention function, ``ValueError`` for a backend it cannot use.
    """
    with implementation(subject.model, backend):  # raises what Transformers says of a backend it refuses
        pass
    calls = _pass(subject, _function(backend), AttentionMaskInterface().get(backend), kept, cuts)
    truth = _pass(subject, lambda module: _by_definition, _dense_mask, kept, cuts)
    if not calls:
        raise DoesNotApplyError("the model calls no attention function")
    return [Judged(call, _visible(true, call.k.shape[2])) for call, true in zip(calls, truth, strict=True)]


def _function(backend: str) -> Callable[[nn.Module], Function]:
    """How to find the function of ``backend`` for a module; eager attention is in the file of its model."""
    registered = AttentionInterface().get(backend)

    def find(module: nn.Module) -> Function:
        home = sys.modules[type(module).__module__]
        found = registered or getattr(home, "eager_attention_forward", None)
        if found is None:
            raise DoesNotApplyError(f"{type(module).__name__} has its own attention")
        function: Function = found
        return function

    return find


def _pass(
    subject: Subject, find: Callable[[nn.Module], Function], masks: Any, kept: Tensor | None, cuts: Sequence[int]
) -> list[Call]:
    model, ids = subject.model, subject.ids
    names = {id(module): name for name, module in model.named_modules()}
    calls: list[Call] = []

    def record(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
    ) -> tuple[Tensor, None]:
        function = find(module)
        o = function(module, query, key, value, attention_mask, **options)[0]
        calls.append(Call(names[id(module)], module, function, query, key, value, attention_mask, options, o))
        return o, None

    with _registered(record, masks), implementation(model, PROBE), torch.no_grad():
        if not cuts:
            model(ids, attention_mask=kept, use_cache=False)
        else:
            held = cache("dynamic", model.config, ids.shape[1])
            for start, end in pairwise((0, *cuts)):
                seen = None if kept is None else kept[:, :end]
                model(ids[:, start:end], attention_mask=seen, use_cache=True, **as_cache(model, held))
    return calls


@contextmanager
def _registered(function: Any, masks: Any) -> Iterator[None]:
    """``function`` and ``masks`` as an implementation; without masks Transformers drops every mask in silence."""
    AttentionInterface.register(PROBE, function)
    if masks is not None:
        AttentionMaskInterface.register(PROBE, masks)
    try:
        yield
    finally:
        del AttentionInterface._global_mapping[PROBE]
        AttentionMaskInterface._global_mapping.pop(PROBE, None)


def _dense_mask(*args: Any, **options: Any) -> Any:
    return sdpa_mask(*args, **{**options, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})


def _by_definition(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any
) -> tuple[Tensor, None]:
    call = Call("", module, _by_definition, q, k, v, mask, options, q)
    o = definition(q, k, v, _visible(call, k.shape[2]), call.settings)
    return o.contiguous(), None


def _visible(call: Call, keys: int) -> Tensor:
    """What the dense mask of ``call`` and the keys that an indexer chose let each query see."""
    mask, m, b = call.mask, call.q.shape[2], call.q.shape[0]
    if mask is None:
        visible = torch.ones(1, 1, m, keys, dtype=torch.bool)
        wanted = call.options.get("is_causal")
        if m > 1 and (getattr(call.module, "is_causal", True) if wanted is None else wanted):
            visible = visible.tril()
    elif mask.dtype == torch.bool:
        visible = mask[..., :keys]
    else:
        raise DoesNotApplyError("the model makes its masks itself")
    if (chosen := call.options.get("indices")) is not None:
        among = torch.zeros(b, 1, m, keys, dtype=torch.bool)
        visible = visible & among.scatter_(-1, chosen.long()[:, None], True)
    return visible.expand(b, -1, m, keys)
