"""The layer: projections, head norms, positions and a decoding state around ``softmax_attention``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from attnkit.costs import softmax as cost
from attnkit.masks import Mask, causal, joined
from attnkit.mechanisms.softmax import softmax_attention, streaming
from attnkit.positions import Rotary, T5Buckets, alibi_slopes
from attnkit.projected import check_rotary
from attnkit.shapes import check_groups
from attnkit.spec import Cost, Sizes
from attnkit.state import KVState, PagedKVState, WindowState
from attnkit.state.policies import Policy, PolicyState, StreamingLLM

Cache = KVState | WindowState | PagedKVState | PolicyState


@dataclass(frozen=True)
class SoftmaxConfig:
    """A softmax attention layer.

    ``kv_heads`` None is MHA, 1 is MQA, a divisor of ``heads`` GQA. ``head_size`` is ``width // heads`` when None and
    ``value_size`` is ``head_size``. ``mask`` None is bidirectional. ``alibi`` and ``t5`` are position biases and
    ``rotary`` turns queries and keys; none of them leaves the order of tokens to the mask (NoPE). ``positions`` says
    where tokens stand for ``rotary``: in the text, or in the cache of a mask that lets go of keys (StreamingLLM).
    ``sink`` learns one logit a head.
    """

    width: int
    heads: int
    kv_heads: int | None = None
    head_size: int | None = None
    value_size: int | None = None
    mask: Mask | None = field(default_factory=causal)
    rotary: Rotary | None = None
    positions: Literal["text", "cache"] = "text"
    alibi: bool = False
    t5: T5Buckets | None = None
    qk_norm: bool = False
    softcap: float | None = None
    sink: bool = False
    dropout: float = 0.0
    scale: float | None = None
    bias: bool = False
    backend: str | None = None

    def __post_init__(self) -> None:
        if self.width < 1 or self.heads < 1:
            raise ValueError(f"SoftmaxConfig: width is {self.width} and heads {self.heads}, expected at least 1 each")
        check_groups("SoftmaxConfig", self.heads, self.groups)
        if self.head_size is None and self.width % self.heads:
            raise ValueError(f"SoftmaxConfig: width {self.width} is no multiple of {self.heads} heads: say head_size=")
        check_rotary("SoftmaxConfig", self.rotary, self.key_size)
        if self.alibi and self.t5 is not None:
            raise ValueError("SoftmaxConfig: alibi and t5 are both on, expected one position bias: drop one")
        if self.positions not in ("text", "cache"):
            raise ValueError(f"SoftmaxConfig: positions is {self.positions!r}, expected 'text' or 'cache'")
        if self.positions == "cache":
            if self.rotary is None or self.alibi or self.t5 is not None:
                raise ValueError("SoftmaxConfig: positions are those of the cache, expected rotary= and no alibi or t5")
            reach = self.mask.reach() if self.mask is not None else None
            if reach is None or not reach.exact:
                raise ValueError(
                    f"SoftmaxConfig: positions are those of the cache and the mask is {self.mask!r}, expected one that "
                    f"shows the last keys and the first: (window(128) | global_tokens(4)) & causal()"
                )

    @property
    def groups(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def key_size(self) -> int:
        return self.width // self.heads if self.head_size is None else self.head_size

    @property
    def values(self) -> int:
        return self.key_size if self.value_size is None else self.value_size


class SoftmaxAttention(nn.Module):
    """Softmax attention on ``(b, n, width)``; ``forward`` for whole sequences, ``step`` for decoding through a state.

    Projections start as N(0, 1/width), so that logits have unit scale at any width; the T5 table as N(0, 1/width),
    sinks as 0 (a sink that takes as much as one average key).
    """

    def __init__(self, config: SoftmaxConfig) -> None:
        super().__init__()
        self.config = c = config
        self.q = nn.Linear(c.width, c.heads * c.key_size, bias=c.bias)
        self.k = nn.Linear(c.width, c.groups * c.key_size, bias=c.bias)
        self.v = nn.Linear(c.width, c.groups * c.values, bias=c.bias)
        self.o = nn.Linear(c.heads * c.values, c.width, bias=c.bias)
        for linear in (self.q, self.k, self.v, self.o):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        self.q_norm = nn.RMSNorm(c.key_size) if c.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(c.key_size) if c.qk_norm else nn.Identity()
        self.sink = nn.Parameter(torch.zeros(c.heads)) if c.sink else None
        self.t5_table = nn.Parameter(torch.randn(c.t5.buckets, c.heads) * c.width**-0.5) if c.t5 else None
        self.slopes: Tensor | None
        self.register_buffer("slopes", alibi_slopes(c.heads) if c.alibi else None, persistent=False)

    def forward(self, x: Tensor, context: Tensor | None = None, *, mask: Mask | None = None) -> Tensor:
        """Attend within ``x`` ``(b, m, width)``, or from ``x`` to ``context`` ``(b, n, width)`` (cross-attention).

        ``mask`` joins the layer's own, for what belongs to the batch: padding, documents. Cross-attention has no
        positions and no mask but ``mask``. Returns ``(b, m, width)``.
        """
        q, k, v = self._project(x, x if context is None else context)
        if context is not None:
            return self._attend(q, k, v, mask, None)
        positions = torch.arange(x.shape[1], device=x.device)
        q, k = self._in_cache(q, k, positions, positions) if self._streams else self._in_text(q, k, positions)
        return self._attend(q, k, v, joined(self.config.mask, mask), (positions, positions))

    def state(
        self,
        batch: int,
        capacity: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        policy: Policy | None = None,
    ) -> KVState | WindowState | PolicyState:
        """An empty state for ``capacity`` tokens: a ring when the mask lets go of old keys, else the whole sequence.

        ``policy`` says what to attend to of it instead, such as ``attnkit.state.policies.H2O(1024)``.
        """
        c = self.config
        if c.mask is None:
            raise ValueError("a bidirectional layer cannot decode: give it a causal mask")
        if policy is not None:
            self._check_policy(policy)
            made: PolicyState = policy.state(
                batch, c.groups, capacity, c.key_size, c.values, dtype=dtype, device=device
            )
            return made
        reach = c.mask.reach()
        if reach is None or reach.window + reach.sinks >= capacity:
            return KVState(batch, c.groups, capacity, c.key_size, c.values, dtype=dtype, device=device)
        return WindowState(
            batch, c.groups, reach.window, c.key_size, c.values, sinks=reach.sinks, dtype=dtype, device=device
        )

    def cost(self, m: int, n: int, *, batch: int = 1, dtype: torch.dtype = torch.float32) -> Cost:
        """What the attention of ``m`` new tokens over ``n`` takes, and the state that holds ``n``."""
        c = self.config
        sizes = Sizes(batch, c.heads, c.groups, m, n, c.key_size, c.values)
        return cost(sizes, mask=c.mask, itemsize=dtype.itemsize)

    def step(self, x: Tensor, state: Cache) -> tuple[Tensor, Cache]:
        """Feed the next token or tokens ``x`` ``(b, m, width)``; any split of a sequence gives ``forward``'s rows.

        A ``KVState`` with a codec and a ``PagedKVState`` (whose sequences have one length) are read in place.
        """
        q, k, v = self._project(x, x)
        positions = torch.arange(state.length, state.length + x.shape[1], device=x.device)
        if not self._streams:
            q, k = self._in_text(q, k, positions)
        if isinstance(state, PagedKVState) or (isinstance(state, KVState) and state.codec is not None):
            return self._attend_in_place(q, k, v, state, positions), state
        if isinstance(state, PolicyState):
            chosen, mask = state.append(k, v, q, scale=self.config.scale).for_queries(causal(), x.shape[1])
            return self._attend(q, chosen.k, chosen.v, mask, None), state
        view, mask = state.append(k, v).for_queries(self.config.mask, x.shape[1])
        keys = torch.arange(view.length, device=x.device) if view.positions is None else view.positions
        k = view.k
        if self._streams:  # slots change as tokens leave, so the state holds keys that are not turned
            q, k = self._in_cache(q, k, positions, keys)
        y = self._attend(q, k, view.v, mask, (positions, keys), ordered=view.positions is None)
        return y, state

    def _attend_in_place(
        self, q: Tensor, k: Tensor, v: Tensor, state: KVState | PagedKVState, positions: Tensor
    ) -> Tensor:
        from attnkit.mechanisms.softmax import softmax_attention_step  # made after the record, which names the layer

        c = self.config
        if self._streams:
            raise NotImplementedError(
                f"positions are those of the cache, which turns keys at every step, and the state is a "
                f"{type(state).__name__} that is read in place: use the layer's own state"
            )
        state.store(k, v)
        bias = None
        if c.t5 is not None:
            assert self.t5_table is not None
            bias = c.t5.bias(self.t5_table, positions, torch.arange(state.length, device=q.device))
        o = softmax_attention_step(
            q,
            state,
            mask=c.mask,
            scale=c.key_size**-0.5 if c.scale is None else c.scale,
            bias=bias,
            alibi=self.slopes,
            softcap=c.softcap,
            sink=self.sink,
        )
        y: Tensor = self.o(o.transpose(1, 2).flatten(2))
        return y

    def _check_policy(self, policy: Policy) -> None:
        """Raise for what a policy does not know: a key it kept is one of many, wherever it stands."""
        c = self.config
        if c.mask is None or c.mask.interval() != causal().interval():
            raise NotImplementedError(f"the mask is {c.mask!r} and a policy chooses among all tokens: use causal()")
        if given := [name for name in ("alibi", "t5", "softcap", "sink") if getattr(c, name)]:
            raise NotImplementedError(
                f"the layer has {' and '.join(given)}, which a policy does not take into account: use a whole state"
            )
        if self._streams:
            raise NotImplementedError("positions are those of the cache: give the policy StreamingLLM rotary= instead")
        if isinstance(policy, StreamingLLM) and policy.rotary not in (None, c.rotary):
            raise ValueError(f"the policy turns keys by {policy.rotary} and the layer by {c.rotary}, expected the same")

    @property
    def _streams(self) -> bool:
        return self.config.positions == "cache"

    def _in_text(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        rotary = self.config.rotary
        return (q, k) if rotary is None else (rotary.rotate(q, positions), rotary.rotate(k, positions))

    def _in_cache(self, q: Tensor, k: Tensor, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        rotary, mask = self.config.rotary, self.config.mask
        assert rotary is not None and mask is not None
        reach = mask.reach()
        assert reach is not None
        if len(queries) == 1:
            return streaming.by_slot(rotary, q, k, keys)
        return streaming.by_distance(rotary, q, k, queries, keys, reach)

    def _project(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        c = self.config
        q = self.q(x).unflatten(-1, (c.heads, c.key_size)).transpose(1, 2)
        k = self.k(source).unflatten(-1, (c.groups, c.key_size)).transpose(1, 2)
        v = self.v(source).unflatten(-1, (c.groups, c.values)).transpose(1, 2)
        return self.q_norm(q), self.k_norm(k), v

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Mask | None,
        positions: tuple[Tensor, Tensor] | None,
        *,
        ordered: bool = True,
    ) -> Tensor:
        c = self.config
        bias, alibi = None, None
        if positions is not None and c.t5 is not None:
            assert self.t5_table is not None
            bias = c.t5.bias(self.t5_table, *positions)
        if positions is not None and self.slopes is not None:
            if ordered:
                alibi = self.slopes
            else:  # keys of a ring do not stand at their index, so the distances are spelled out
                queries, keys = positions
                bias = -self.slopes[:, None, None] * (queries[:, None] - keys).abs()
        o = softmax_attention(
            q,
            k,
            v,
            mask=mask,
            scale=c.key_size**-0.5 if c.scale is None else c.scale,
            bias=bias,
            alibi=alibi,
            softcap=c.softcap,
            sink=self.sink,
            dropout=c.dropout if self.training else 0.0,
            backend=c.backend,
        )
        y: Tensor = self.o(o.transpose(1, 2).flatten(2))
        return y
