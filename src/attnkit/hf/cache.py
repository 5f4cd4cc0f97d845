"""A cache for ``generate`` that never copies what it holds to take one more token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import cache_utils as theirs

from attnkit.hf.chosen import PolicyLayer
from attnkit.hf.layers import CodedLayer, FullLayer, HybridLayer, IndexedLayer, LatentLayer, PagedLayer
from attnkit.hf.windows import CodedWindowLayer, WindowLayer
from attnkit.state.codec import Codec
from attnkit.state.policies import Policy, StreamingLLM

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
_CODECS: dict[str, Codec] = {"int8": "int8", "int4": "int4", "fp8": "fp8"}


class Cache(theirs.Cache):
    """Keys and values of every layer in buffers allocated ahead: ``model.generate(..., cache=Cache(config))``.

    Full attention keeps every token, in a buffer of ``max_length`` tokens or one that doubles; latent attention joins a
    token's latent and rotary key in one row; a sliding window or a chunk keeps what it can still see. Linear layers
    keep Transformers' own state, whose size is fixed.

    Parameters
    ----------
    config: the model's configuration.
    dtype: what keys and values are stored in. A floating dtype or its name ("bf16", "fp16", "fp32", "fp64") has to be
        what the model computes them in; "int8", "fp8" and "int4" quantise, and None takes the model's.
    paged: full attention keeps its tokens on pages of 64, quantised or not, which beams share as long as they say the
        same; needs ``max_length``.
    max_length: tokens a sequence may reach; a token past it is refused. None grows.
    policy: what the layers of full attention keep or read of their tokens, such as
        ``attnkit.state.policies.SnapKV(1024)``; each layer takes the policy's ``for_layer``. It looks at queries, so
        the model has to run ``attn_implementation="attnkit"``, and it keeps numbers as they come, on no pages.

    Raises
    ------
    NotImplementedError: a layer type that cannot be kept yet, or a policy beside codes or pages. TypeError: a policy
    that is none. ValueError: an unknown dtype, a wrong length, pages without one.
    """

    def __init__(
        self,
        config: Any,
        dtype: torch.dtype | str | None = None,
        paged: bool = False,
        max_length: int | None = None,
        policy: Policy | None = None,
    ) -> None:
        if max_length is not None and (isinstance(max_length, bool) or max_length < 1):
            raise ValueError(f"Cache got max_length {max_length}, expected at least 1 or None")
        codec = _CODECS.get(str(dtype))
        if paged and max_length is None:
            raise ValueError("Cache got paged=True and no max_length: say how many tokens its pages have to hold")
        text = config.get_text_config(decoder=True)
        kinds, options = theirs.get_layer_types_and_kwargs(text)
        if policy is not None:
            _check_policy(policy, text, kinds, codec or ("pages" if paged else None))
        latent = getattr(text, "kv_lora_rank", None) is not None
        form = _Form(None if codec else _dtype(dtype), codec, paged, latent, max_length)
        full = iter(_each_layer(policy, kinds.count("full_attention")))
        super().__init__(
            layers=[
                form.layer(kind, given, next(full) if kind == "full_attention" else None)
                for kind, given in zip(kinds, options, strict=True)
            ]
        )

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values; the states of linear layers are not counted."""
        return sum(layer.nbytes for layer in self.layers if isinstance(layer, FullLayer | WindowLayer))


def _each_layer(policy: Policy | None, layers: int) -> list[Policy | None]:
    """The policy of each layer of full attention, None for one that keeps and reads all."""
    return [policy.for_layer(layer, layers) if policy is not None else None for layer in range(layers)]


def _check_policy(policy: Policy, config: Any, kinds: list[str], form: str | None) -> None:
    """Raise where ``policy`` could not be honoured by every layer that it would apply to."""
    if not isinstance(policy, Policy):
        raise TypeError(
            f"Cache got policy {policy!r}, expected one of attnkit.state.policies, such as SnapKV(1024), or None"
        )
    name, reason = type(policy).__name__, None
    if form is not None:
        reason = f"the cache keeps its tokens as {form}: leave one of the two out"
    elif getattr(config, "kv_lora_rank", None) is not None:
        reason = "the model keeps latents, which all heads share: leave policy out"
    elif "reuse" in (getattr(config, "kv_sharing_modes", None) or ()):
        reason = "the model has layers that read what others keep: leave policy out"
    elif more := {"hybrid", "indexed_attention"}.intersection(kinds):
        reason = f"the model has layers of type {min(more)!r}, which keep more than keys and values: leave policy out"
    elif "full_attention" not in kinds:
        reason = "the model has no layer of full attention, which is what it chooses from: leave policy out"
    elif isinstance(policy, StreamingLLM) and policy.rotary is not None:
        reason = "how the model turned its keys cannot be told from its configuration: leave rotary out"
    if reason is not None:
        raise NotImplementedError(f"Cache got a policy {name}, but {reason}")


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1:
        return dtype
    if str(dtype) in _DTYPES:
        return _DTYPES[str(dtype)]
    names = ", ".join([*_DTYPES, *_CODECS])
    raise ValueError(f"Cache got dtype {dtype!r}, expected a floating torch dtype, {names} or None")


@dataclass(frozen=True)
class _Form:
    """What a cache was asked to be."""

    dtype: torch.dtype | None
    codec: Codec | None
    paged: bool
    latent: bool
    max_length: int | None

    def layer(self, kind: str, options: dict[str, Any], policy: Policy | None) -> Any:
        match kind:
            case "full_attention":
                return self._full() if policy is None else PolicyLayer(policy, self.dtype, self.max_length)
            case "sliding_attention" | "chunked_attention":
                window = options["sliding_window"]
                if self.codec is not None:
                    return CodedWindowLayer(self.codec, window, self.max_length)
                return WindowLayer(window, self.dtype, self.max_length)
            case "indexed_attention" if self.latent and not (self.codec or self.paged):
                return IndexedLayer(self.dtype, self.max_length)
            case "hybrid" if not (self.codec or self.paged):
                return HybridLayer(options["number_of_states"], self.dtype, self.max_length)
            case "linear_attention" | "conv" | "dummy":
                return theirs.DYNAMIC_LAYER_TYPE_MAPPING[kind](**options)
        form = f" as {self.codec}" if self.codec else " on pages" if self.paged else ""
        raise NotImplementedError(
            f"Cache cannot keep a layer of type {kind!r}{form}: leave cache out to use Transformers' own"
        )

    def _full(self) -> FullLayer:
        if self.paged:
            assert self.max_length is not None
            return PagedLayer(self.dtype, self.max_length, self.codec)
        if self.codec is not None:
            return CodedLayer(self.codec, self.max_length)
        return (LatentLayer if self.latent else FullLayer)(self.dtype, self.max_length)
