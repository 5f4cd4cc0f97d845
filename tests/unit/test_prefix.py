"""Shared prefixes: random lives of sequences against plain lists, what a key depends on, who is refused and when."""

from __future__ import annotations

import hashlib
import zlib
from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from torch import Tensor

import attnkit
from attnkit.state import PagedKVState, PagePool, PoolBusyError, PrefixCache, prefix

PAGE, PAGES, LAYERS = 3, 9, 2
WHICH = st.integers(0, 9)
WORDS = st.lists(st.integers(0, 1), max_size=8)
SALTS = st.sampled_from(["", "a"])


def names(tokens: list[int], salt: str, layer: int) -> list[float]:
    """What a causal model would store, a number a token: each depends on all tokens so far and on who asked."""
    found, before = [], zlib.crc32(f"{salt} {layer}".encode())
    for token in tokens:
        before = zlib.crc32(bytes([token]), before)
        found.append(float(before))
    return found


def marks(tokens: list[int], salt: str, layer: int, start: int = 0) -> Tensor:
    """These numbers from ``start`` on, as keys."""
    return torch.tensor(names(tokens, salt, layer)[start:], dtype=torch.float64).reshape(1, 1, -1, 1)


class Sequence:
    """A running sequence: its states, one a layer, and the tokens that they should hold."""

    def __init__(self, states: list[PagedKVState], tokens: list[int], salt: str, most: int | None) -> None:
        self.states, self.tokens, self.salt, self.most = states, tokens, salt, most

    def feed(self, new: list[int]) -> None:
        tokens = self.tokens + new
        for layer, state in enumerate(self.states):
            k = marks(tokens, self.salt, layer, len(self.tokens))
            state.append(k, torch.cat([k, -k], -1))
        self.tokens = tokens


class PageMachine(RuleBasedStateMachine):
    """Sequences come, grow, fork, shrink, leave and return over two layers; every page not owned holds NaN."""

    pages = PAGES

    def __init__(self) -> None:
        super().__init__()
        self.pools = [PagePool(self.pages, PAGE, 1, 1, 2, dtype=torch.float64) for _ in range(LAYERS)]
        self.prefixes = PrefixCache(self.pools, model="m")
        self.running: list[Sequence] = []
        self.gone: list[Sequence] = []  # released, and still referred to by somebody

    def pick(self, which: int) -> Sequence | None:
        return self.running[which % len(self.running)] if self.running else None

    def room(self, asking: Sequence | None) -> int:
        """Pages there would be for one more sequence, or one that runs, without prefixes; counted from the tables."""
        used = Counter(page for one in self.running for page in one.states[0].pages(0))
        promised = sum(self.wants(one, one.most, used) for one in self.running if one is not asking and one.most)
        return self.pages - len(used) - promised

    @staticmethod
    def wants(one: Sequence, length: int, used: Counter[int]) -> int:
        """Pages that the sequence takes to reach ``length``."""
        pages = one.states[0].pages(0)
        copied = len(one.tokens) % PAGE > 0 and length > len(one.tokens) and used[pages[-1]] > 1
        return max(0, -(-length // PAGE) - len(pages)) + copied

    @rule(prompt=WORDS, new=st.none() | st.integers(0, 6), salt=SALTS)
    def open(self, prompt: list[int], new: int | None, salt: str) -> None:
        most = None if new is None else len(prompt) + new
        before, room = list(self.prefixes._entries), self.room(None)
        try:
            states = self.prefixes.open([prompt], most=None if most is None else [most], salt=salt)
        except ValueError as refusal:
            assert most is not None and "\n" not in str(refusal)
            assert isinstance(refusal, PoolBusyError) == (-(-most // PAGE) <= self.pages)
            assert list(self.prefixes._entries) == before, "a refusal costs no prefix"
            assert -(-most // PAGE) > room, "refused although it fits without sharing a page"
            return
        held = states[0].length
        assert held <= max(0, len(prompt) - 1)
        assert [state.length for state in states] == [held] * LAYERS
        one = Sequence(states, prompt[:held], salt, most)
        self.running.append(one)
        self.step(len(self.running) - 1, prompt[held:])

    @rule(which=WHICH, new=st.lists(st.integers(0, 1), min_size=1, max_size=4))
    def step(self, which: int, new: list[int]) -> None:
        if (one := self.pick(which)) is None:
            return
        if one.most is not None:
            one.feed(new[: one.most - len(one.tokens)])  # promised: a refusal is an error
            return
        before = list(self.prefixes._entries)
        used = Counter(page for other in self.running for page in other.states[0].pages(0))
        fits = self.wants(one, len(one.tokens) + len(new), used) <= self.room(one)
        try:
            one.feed(new)
        except ValueError:
            assert not fits, "refused although there is room"
            assert list(self.prefixes._entries) == before, "a refusal costs no prefix"
        else:
            assert fits or not new, "took pages that were promised"

    @rule(which=WHICH)
    def keep(self, which: int) -> None:
        if one := self.pick(which):
            self.prefixes.keep([one.tokens], one.states, salt=one.salt)
            assert self.prefixes.match([*one.tokens, 0], salt=one.salt) >= len(one.tokens)

    @rule(which=WHICH)
    def leave(self, which: int) -> None:
        if one := self.pick(which):
            self.running.remove(one)
            self.gone.append(one)
            for state in one.states:
                state.release()

    @rule(which=WHICH)
    def preempt_and_resume(self, which: int) -> None:
        """Out of the pool and back: whatever was given up in between is fed again."""
        if one := self.pick(which):
            self.keep(which)
            self.leave(which)
            self.open([*one.tokens, 1], None, one.salt)

    @rule(which=WHICH)
    def fork(self, which: int) -> None:
        one = self.pick(which)
        if one and one.most is None and len(self.running) < 6:
            states = [state.fork() for state in one.states]
            self.running.append(Sequence(states, list(one.tokens), one.salt, None))

    @rule(which=WHICH)
    def fork_and_part(self, which: int) -> None:
        """Both go on at once, and differently: what one writes the other must not see."""
        before = len(self.running)
        self.fork(which)
        if len(self.running) > before:
            self.step(which % before, [0])
            self.step(before, [1])

    @rule(which=WHICH, length=st.integers(0, 12))
    def crop(self, which: int, length: int) -> None:
        one = self.pick(which)
        if one and one.most is None and length <= len(one.tokens):
            for state in one.states:
                state.crop(length)
            del one.tokens[length:]

    @rule()
    def clear(self) -> None:
        self.prefixes.clear()

    @invariant()
    def books_are_right(self) -> None:
        self.prefixes.check()
        for layer, pool in enumerate(self.pools):
            pool.check()
            owners = Counter(page for one in self.running for page in one.states[layer].pages(0))
            owners.update(entry.pages[layer] for entry in self.prefixes._entries.values())
            assert [pool.owners(page) for page in range(self.pages)] == [owners[page] for page in range(self.pages)]
            assert pool.free + len(owners) == self.pages
            assert set(pool._free).isdisjoint(owners)
            pool.k[pool._free], pool.v[pool._free] = torch.nan, torch.nan

    @invariant()
    def every_sequence_reads_what_it_was_fed(self) -> None:
        for one in self.running:
            for layer, state in enumerate(one.states):
                state.check()
                k, v = state.read(0)
                wanted = names(one.tokens, one.salt, layer)
                assert k.flatten().tolist() == wanted
                assert v[0].tolist() == [[name, -name] for name in wanted]


class SmallestPool(PageMachine):
    pages = 1


QUICK = settings(max_examples=120, stateful_step_count=30, deadline=None, derandomize=True)


@pytest.mark.parametrize("machine", [PageMachine, SmallestPool])
def test_lives_of_sequences(machine: type[PageMachine], live: Any) -> None:
    live(machine, 100 if machine is PageMachine else 50)


class Colliding(PageMachine):
    """A prefix whose key is taken is not kept, and so may not be found."""

    @rule(which=WHICH)
    def keep(self, which: int) -> None:
        if one := self.pick(which):
            self.prefixes.keep([one.tokens], one.states, salt=one.salt)


def truncated(data: bytes) -> bytes:
    return bytes([hashlib.sha256(data).digest()[0] % 8])


def test_colliding_keys_are_told_apart(live: Any) -> None:
    """The same lives with keys of 3 bits, which many prefixes have in common."""
    with mock.patch.object(prefix, "_digest", truncated):
        live(Colliding, 40)


def without_comparing(self: PrefixCache, parent: Any, tokens: tuple[int, ...]) -> Any:
    return self._entries.get(prefix._page_key(parent.key, tokens))


def given_up_in_use(right: Callable[..., None]) -> Callable[..., None]:
    def wrong(self: PrefixCache, entry: Any) -> None:
        pages = [(pool, page) for pool, page in zip(self.pools, entry.pages, strict=True) if pool.owners(page) > 1]
        right(self, entry)
        for pool, page in pages:
            pool._free.append(page)

    return wrong


def given_up_in_vain(right: Callable[..., int]) -> Callable[..., int]:
    def wrong(self: PrefixCache, state: PagedKVState, needed: Callable[[], int]) -> int:
        self._give_up(state.pool, lambda: needed() > state.pool.free)
        return right(self, state, needed)

    return wrong


def one_token_more(right: Callable[..., Any]) -> Callable[..., Any]:
    def wrong(*arguments: Any) -> Any:
        path = right(*arguments)
        return [*path[:-1], (path[-1][0], path[-1][1] + 1)] if path and path[-1][1] < PAGE else path

    return wrong


def last_token_too(right: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, tokens, salt, adapter: right(self, (*tokens, 9), salt, adapter)


FAULTS: dict[str, tuple[Any, str, Callable[[Any], Any]]] = {
    "shared pages are written on": (PagePool, "copy", lambda right: lambda self, page: page),
    "a copy keeps the old page": (PagePool, "release", lambda right: lambda self, page: None),
    "a page is freed twice": (
        PagePool,
        "release",
        lambda right: lambda self, page: (right(self, page), right(self, page)),
    ),
    "forks do not count": (PagePool, "share", lambda right: lambda self, page: page),
    "pages in use are given up": (PrefixCache, "_drop", given_up_in_use),
    "prefixes are given up in vain": (PrefixCache, "room", given_up_in_vain),
    "no prefix is given up": (PrefixCache, "_give_up", lambda right: lambda self, pool, short: None),
    "promises are not kept": (PrefixCache, "_promised", lambda right: lambda self, pool, but=None: 0),
    "promises outlive their state": (PrefixCache, "forget", lambda right: lambda self, state: None),
    "the salt is left out": (PrefixCache, "_label", lambda right: lambda self, salt, adapter: right(self, "", adapter)),
    "a part of a page counts too much": (PrefixCache, "_path", one_token_more),
    "the last token is found as well": (PrefixCache, "_path", last_token_too),
    "the newest prefix goes first": (PrefixCache, "_touch", lambda right: lambda self, path: right(self, path[::-1])),
}


def fails(machine: type[PageMachine]) -> bool:
    """Whether random lives meet a fault; the examples are not made smaller, which would take long."""
    quick = settings(QUICK, phases=[Phase.generate], report_multiple_bugs=False, print_blob=False)
    try:
        run_state_machine_as_test(machine, settings=quick)
    except Exception:
        return True
    return False


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_noticed(fault: str) -> None:
    owner, name, wrong = FAULTS[fault]
    with mock.patch.object(owner, name, wrong(getattr(owner, name))):
        assert fails(PageMachine) or fails(SmallestPool)


def test_a_collision_that_is_not_compared_is_noticed() -> None:
    with mock.patch.object(prefix, "_digest", truncated), mock.patch.object(PrefixCache, "_find", without_comparing):
        assert fails(Colliding)


def pool(pages: int = 8, page: int = 4, heads: int = 2, size: int = 8, dtype: torch.dtype = torch.float32) -> PagePool:
    return PagePool(pages, page, heads, size, dtype=dtype)


IDENTITY: dict[str, Callable[[], PrefixCache]] = {
    "the same": lambda: PrefixCache(pool(), model="m"),
    "model": lambda: PrefixCache(pool(), model="m2"),
    "mechanism": lambda: PrefixCache(pool(), model="m", mechanism="gated"),
    "dtype": lambda: PrefixCache(pool(dtype=torch.bfloat16), model="m"),
    "page": lambda: PrefixCache(pool(page=5), model="m"),
    "heads": lambda: PrefixCache(pool(heads=1), model="m"),
    "size": lambda: PrefixCache(pool(size=16), model="m"),
    "layers": lambda: PrefixCache([pool(), pool()], model="m"),
}
TOKENS = st.lists(st.integers(-(2**63) + 1, 2**63 - 1), min_size=1, max_size=9)


def keys_differ(count: int) -> None:
    caches = {name: make() for name, make in IDENTITY.items()}
    twin = IDENTITY["the same"]()

    @settings(max_examples=count, derandomize=True, deadline=None, phases=[Phase.generate])
    @given(tokens=TOKENS, other=TOKENS, salt=st.text(max_size=3), adapter=st.text(max_size=3))
    def check(tokens: list[int], other: list[int], salt: str, adapter: str) -> None:
        keys = {name: cache.key(tokens, salt=salt, adapter=adapter) for name, cache in caches.items()}
        cache = caches["the same"]
        assert keys["the same"] == twin.key(tokens, salt=salt, adapter=adapter)
        keys["salt"] = cache.key(tokens, salt=salt + "x", adapter=adapter)
        keys["adapter"] = cache.key(tokens, salt=salt, adapter=adapter + "x")
        if salt != adapter:
            keys["swapped"] = cache.key(tokens, salt=adapter, adapter=salt)
        longer, first = [*tokens, 0], [tokens[0] ^ 1, *tokens[1:]]
        keys["longer"] = cache.key(longer, salt=salt, adapter=adapter)
        keys["first"] = cache.key(first, salt=salt, adapter=adapter)
        if other not in (tokens, longer, first):
            keys["other"] = cache.key(other, salt=salt, adapter=adapter)
        assert len(set(keys.values())) == len(keys)

    check()


def test_a_key_depends_on_all_that_makes_the_numbers(full: bool) -> None:
    keys_differ(2000 if full else 40)


KEY_FAULTS: dict[str, tuple[Any, str, Callable[[Any], Any]]] = {
    "the salt is left out": FAULTS["the salt is left out"],
    "the page before is left out": (prefix, "_page_key", lambda right: lambda parent, tokens: right(b"", tokens)),
    "salt and adapter are joined": (
        PrefixCache,
        "_label",
        lambda right: lambda self, salt, adapter: right(self, salt + adapter, ""),
    ),
    "the form is left out": (
        PrefixCache,
        "_label",
        lambda right: lambda self, salt, adapter: repr((self._model, self._mechanism, salt, adapter)),
    ),
    "Python's hash": (prefix, "_digest", lambda right: lambda data: bytes([hash(data) % 256])),
}


@pytest.mark.parametrize("fault", KEY_FAULTS)
def test_faults_of_keys_are_noticed(fault: str) -> None:
    owner, name, wrong = KEY_FAULTS[fault]
    with mock.patch.object(owner, name, wrong(getattr(owner, name))), pytest.raises(AssertionError):
        keys_differ(40)


def test_the_longest_common_beginning_is_found(full: bool) -> None:
    """Against a list of all that was kept; a million random prompts find nothing that is not there."""

    @settings(max_examples=2000 if full else 100, derandomize=True, deadline=None)
    @given(kept=st.lists(st.tuples(WORDS, SALTS), max_size=6), asked=st.lists(st.tuples(WORDS, SALTS), max_size=4))
    def check(kept: list[tuple[list[int], str]], asked: list[tuple[list[int], str]]) -> None:
        pages = pool(40, 3, 1, 1, torch.float64)
        cache = PrefixCache(pages, model="m")
        for tokens, salt in kept:
            one = Sequence([PagedKVState(pages, 1)], [], salt, None)
            one.states[0].append(*[marks(tokens, salt, 0)] * 2)
            cache.keep([tokens], one.states, salt=salt)
        for tokens, salt in asked:
            alike = [prefix._common(tuple(tokens[:-1]), tuple(old)) for old, its in kept if its == salt]
            assert cache.match(tokens, salt=salt) == max(alike, default=0)

    check()
    cache = PrefixCache(pool(40, 3, 1, 1, torch.float64), model="m")
    state = PagedKVState(cache.pools[0], 1)
    state.append(*[marks(list(range(90)), "", 0)] * 2)
    cache.keep([range(90)], [state])
    drawn = torch.randint(90, (1_000_000 if full else 20_000, 5), generator=torch.Generator().manual_seed(0)).tolist()
    for tokens in drawn:
        assert cache.match(tokens) == prefix._common(tuple(tokens[:-1]), tuple(range(90)))


@pytest.mark.parametrize("layers_of_one_pool", [False, True])
def test_sequences_of_a_batch_share_with_each_other_and_with_those_before(layers_of_one_pool: bool) -> None:
    pools = [pool(20)] * 2 if layers_of_one_pool else [pool(20), pool(20)]
    cache, tokens = PrefixCache(pools, model="m"), list(range(11))
    k = torch.randn(1, 2, 11, 8, generator=torch.Generator().manual_seed(0))
    states = cache.open([tokens], most=[11])
    for state in states:
        state.append(k, -k)
    cache.keep([tokens], states)
    before = pools[0].free
    pair = cache.open([tokens, [*tokens[:9], 99, 98]], most=[13, 13])
    assert [state.lengths for state in pair] == [[10, 9]] * 2
    assert pools[0].free == before
    for state in pair:
        state.append(k[:, :, [10, 10]].expand(2, -1, -1, -1), -k[:, :, [10, 10]].expand(2, -1, -1, -1))
        assert state.read(0)[0].equal(torch.cat([k[0, :, :11], k[0, :, 10:]], 1))
        assert state.read(1)[0].equal(torch.cat([k[0, :, :9], k[0, :, 10:], k[0, :, 10:]], 1))
    assert states[0].read(0)[0].equal(k[0])
    one = attnkit.softmax_attention_step(k[:, :, :1], states[0])
    del states, state, pair
    assert cache.open([[*tokens, 1]])[0].lengths == [11]
    again = cache.open([[*tokens, 1]])[0]
    assert attnkit.softmax_attention_step(k[:, :, :1], again).equal(one)
    cache.check()


@pytest.mark.parametrize("kept", [6, 8])
def test_whoever_opens_without_a_promise_leaves_what_was_promised(kept: int) -> None:
    """A page that is shared cannot be given up, or has to be copied: those who are promised pages come first."""
    cache, x = PrefixCache(pool(3), model="m"), torch.zeros(1, 2, 12, 8)
    if kept == 6:  # the promised sequence's own last page is remembered, and found in part
        promised = cache.open([range(12)], most=[12])
        promised[0].append(x[:, :, :6], x[:, :, :6])
        cache.keep([range(6)], promised)
    else:  # pages of somebody who has left are promised, and found
        gone = cache.open([range(9)])
        gone[0].append(x[:, :, :8], x[:, :, :8])
        cache.keep([range(8)], gone)
        gone[0].release()
        promised = cache.open([[9] * 12], most=[12])
    other = cache.open([[*range(9)]])
    promised[0].append(*[x[:, :, : 12 - promised[0].length]] * 2)
    assert promised[0].length == 12
    assert other[0].length <= 4


def test_bytes_and_pages_of_a_budget() -> None:
    made = PagePool.within(10_000, 4, 2, 8)
    assert made.nbytes <= 10_000 < made.nbytes + made.nbytes // len(made.k)
    cache = PrefixCache([made, made], model="m")
    states = cache.open([range(9)], most=[9])
    for state in states:
        state.append(*[torch.zeros(1, 2, 9, 8)] * 2)
    cache.keep([range(9)], states)
    assert (len(cache), cache.nbytes) == (3, 6 * 4 * 2 * 16 * 4)
    cache.clear()
    assert (len(cache), cache.nbytes, cache._roots) == (0, 0, {})


def test_refusals_name_both_numbers() -> None:
    cache = PrefixCache(pool(4), model="m")
    states = cache.open([range(5)], most=[9])
    refused: list[tuple[Callable[[], Any], type[Exception], str]] = [
        (
            lambda: PagePool.within(100, 4, 2, 8),
            ValueError,
            "the budget is 100 bytes and one page of 4 tokens takes 512",
        ),
        (lambda: cache.open([range(5)], most=[17]), ValueError, "[17] tokens take 5 pages of 4 and the pool has 4"),
        (lambda: cache.open([range(5)], most=[5]), PoolBusyError, "[5] tokens take up to 2 pages and 1 are neither"),
        (lambda: cache.open([range(5)], most=[4]), ValueError, "most is [4] for prompts of [5] tokens"),
        (lambda: cache.open([]), ValueError, "got no prompts"),
        (lambda: cache.open([["a"]]), TypeError, "expected integers"),  # type: ignore[list-item]
        (lambda: cache.keep([[1]], states), ValueError, "got [1] tokens and states of [0], expected what"),
        (lambda: cache.keep([[]], states * 2), ValueError, "got 2 states, expected one on each of 1 pools"),
        (lambda: PrefixCache(cache.pools, model="m"), ValueError, "a pool that has a prefix cache"),
        (lambda: PrefixCache([pool(), pool(page=5)], model="m"), ValueError, "pages of [4, 5] tokens"),
        (lambda: PrefixCache([], model="m"), ValueError, "pages of [] tokens"),
    ]
    for act, error, said in refused:
        with pytest.raises(error) as caught:
            act()
        assert said in str(caught.value) and "\n" not in str(caught.value)
        assert type(caught.value) is error
    other = PagedKVState(cache.pools[0], 1)
    with pytest.raises(ValueError, match="needs 2 more pages of 4 tokens and 1 are free"):
        other.append(*[torch.zeros(1, 2, 5, 8)] * 2)
    states[0].release()
    other.append(*[torch.zeros(1, 2, 5, 8)] * 2)
