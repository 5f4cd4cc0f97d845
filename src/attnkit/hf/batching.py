"""Continuous batching: prompts of any lengths in one batch without padding, on pages that the kernel reads in place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import cache_utils as theirs

from attnkit.hf.accelerate import check_runs_ours
from attnkit.hf.carried import carried
from attnkit.hf.layers import PAGE, PagedLayer
from attnkit.hf.names import arguments, as_cache
from attnkit.state import PagedKVState, PagePool


def generate_batch(
    model: nn.Module,
    inputs: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_token_id: int | Iterable[int] | None = None,
    max_batch: int = 16,
) -> list[list[int]]:
    """The most likely continuation of each prompt, as ``generate`` finds it for each alone.

    Up to ``max_batch`` sequences take each step together, each with as many tokens as it has, and a new one comes in
    when one is done. The keys and values of all lie on pages of one pool a layer, large enough for the longest.

    Parameters
    ----------
    model: one that runs our attention, all of whose layers are full or sliding attention.
    inputs: token ids of each prompt, at least one.
    max_new_tokens: of each, at most.
    eos_token_id: what ends a sequence, which includes it; those of the model's generation config when None.

    Returns
    -------
    The new tokens of each, in the order of ``inputs``.

    Raises
    ------
    ValueError: a prompt without tokens, or a model that does not run our attention. NotImplementedError: layers of
    another kind, or a model that cannot be told positions.
    """
    waiting = [(i, [int(token) for token in prompt]) for i, prompt in enumerate(inputs)]
    if min((max_new_tokens, max_batch, *(len(prompt) for _, prompt in waiting))) < 1:
        raise ValueError(
            f"generate_batch got max_new_tokens {max_new_tokens}, max_batch {max_batch} and prompts of "
            f"{[len(prompt) for _, prompt in waiting]} tokens, expected at least 1 of each"
        )
    ends = _ends(model, eos_token_id)
    pages = sorted((-(-(len(prompt) + max_new_tokens) // PAGE) for _, prompt in waiting), reverse=True)[:max_batch]
    cache = _Ragged(model, sum(pages))
    found: list[list[int]] = [[] for _ in waiting]
    running: list[tuple[int, int]] = []  # which input, and how many tokens of it are in the cache
    waiting.reverse()
    with torch.no_grad():
        while waiting or running:
            while waiting and len(running) < max_batch:
                i, prompt = waiting.pop()
                cache.admit()
                found[i].append(_next(model, [prompt], [range(len(prompt))], cache)[0])
                cache.all_rows()
                running.append((i, len(prompt)))
            going = [
                r for r, (i, _) in enumerate(running) if len(found[i]) < max_new_tokens and found[i][-1] not in ends
            ]
            if len(going) < len(running):
                cache.keep(going)
                running = [running[r] for r in going]
                continue  # others may come in first
            newest = _next(model, [[found[i][-1]] for i, _ in running], [[length] for _, length in running], cache)
            for (i, _), token in zip(running, newest, strict=True):
                found[i].append(token)
            running = [(i, length + 1) for i, length in running]
    return found


def _next(model: nn.Module, ids: list[list[int]], positions: list[Any], cache: _Ragged) -> list[int]:
    """The most likely token after each sequence, whose newest tokens are ``ids``."""
    device = next(model.parameters()).device
    options = {"logits_to_keep": 1} if "logits_to_keep" in arguments(model) else {}
    out = model(
        input_ids=torch.tensor(ids, device=device),
        position_ids=torch.tensor([list(row) for row in positions], device=device),
        use_cache=True,
        **as_cache(model, cache),
        **options,
    )
    tokens: list[int] = out.logits[:, -1].argmax(-1).tolist()
    return tokens


def _ends(model: Any, given: int | Iterable[int] | None) -> set[int]:
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None) if given is None else given
    if ends is None:
        return set()
    return {int(ends)} if isinstance(ends, int) else {int(end) for end in ends}


def check_layers(model: Any, where: str, known: Iterable[str]) -> list[str]:
    """The kind of each layer's attention; raises ``NotImplementedError`` where one is not ``known``, or is latent."""
    config = model.config.get_text_config(decoder=True)
    kinds, _ = theirs.get_layer_types_and_kwargs(config)
    unknown = set(kinds) - set(known)
    if unknown or getattr(config, "kv_lora_rank", None) is not None:
        got = ", ".join(sorted(unknown)) or "latent attention"
        raise NotImplementedError(f"{where} got layers of {got}, expected full and sliding attention: use generate")
    return list(kinds)


class _Ragged(theirs.Cache):
    """Sequences of different lengths, of which one is filled alone or all take a step."""

    def __init__(self, model: Any, pages: int) -> None:
        check_runs_ours(model, "generate_batch")
        if "position_ids" not in arguments(model):
            raise NotImplementedError(
                f"generate_batch got a {type(model).__name__}, which counts positions itself: use generate"
            )
        kinds = check_layers(model, "generate_batch", ("full_attention", "sliding_attention", "dummy"))
        made: list[Any] = [theirs.DummyLayer() if kind == "dummy" else _RaggedLayer(pages) for kind in kinds]
        super().__init__(layers=made)

    @property
    def _own(self) -> list[_RaggedLayer]:
        return [layer for layer in self.layers if isinstance(layer, _RaggedLayer)]

    def admit(self) -> None:
        """A sequence more, which takes the next tokens alone."""
        for layer in self._own:
            layer.admit()

    def all_rows(self) -> None:
        """All sequences take a token each from now on."""
        for layer in self._own:
            layer.filling = False

    def keep(self, rows: list[int]) -> None:
        """Only the sequences ``rows``; the pages of the others are free."""
        for layer in self._own:
            layer.batch_select_indices(torch.tensor(rows, dtype=torch.int64))


class _RaggedLayer(PagedLayer):
    """A layer of it; while it is ``filling``, the last sequence is alone."""

    def __init__(self, pages: int) -> None:
        super().__init__(None, pages * PAGE)
        self.pages, self.filling = pages, False

    def admit(self) -> None:
        self.filling = True
        if not isinstance(self.state, PagedKVState):
            return
        before, rows = self.state, len(self.state.lengths)
        if rows == 0:
            self.state = PagedKVState(before.pool, 1)
            return
        self.state = before.select(torch.tensor([*range(rows), 0]))
        self.state.crop_each([*before.lengths, 0])
        before.release()

    def _made(self, capacity: int, k: Tensor, v: Tensor) -> PagedKVState:
        _, g, _, d = k.shape
        return PagedKVState(PagePool(self.pages, PAGE, g, d, v.shape[3], dtype=k.dtype, device=k.device), 1)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store keys ``(b, g, m, d)`` and values; return what they attend to."""
        k, v, m = key_states, value_states, key_states.shape[2]
        self._check(k, v, 0)
        if self.state is None:
            self.lazy_initialization(k, v)
        state = self.state
        assert isinstance(state, PagedKVState)
        if self.filling:
            rows = len(state.lengths)
            state.append(k.expand(rows, -1, -1, -1), v.expand(rows, -1, -1, -1), [0] * (rows - 1) + [m])
            return k, v
        state.append(k, v)
        return carried(state, k, v)

    def get_seq_length(self) -> int:
        """Tokens of the longest sequence, or of the one that is filled."""
        return 0 if self.filling else super().get_seq_length()
