"""Hybrids: a pattern of mixers is one model, with one state that is right for every layer; the table of named ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from attnkit import registry
from attnkit.compare import measure, rows
from attnkit.models.decoder import Decoder, DecoderConfig, match_parameters, parameters
from attnkit.models.hybrids import HYBRIDS, Hybrid, at, mixer
from attnkit.spec import LayerPlace
from attnkit.state import KVState, LayeredState, RecurrentState, RewrittenState, State, TokenState, WindowState

VOCAB, WIDTH, HEADS, WINDOW = 50, 32, 4, 4
PATTERNS = {
    "window:full, 5 layers": (("window", "window", "mha"), 5),
    "softmax:forgetting, 3 layers": (("mha", "fox"), 3),
    "ring:sums:rewritten, 4 layers": (("window_sinks", "h1d", "softmax/gqa", "castle_full"), 4),
}


def decoder(pattern: Sequence[str], layers: int) -> Decoder:
    """A decoder in float64 whose layers do something: fresh ones start as the identity."""
    config = DecoderConfig(VOCAB, WIDTH, layers)
    model = Decoder(config, mixer(config, *pattern, heads=HEADS, window=WINDOW))
    for weight in model.parameters():
        if weight.dim() == 2:
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    return model.double().eval()


def tokens(b: int = 2, n: int = 19) -> Tensor:
    return torch.randint(VOCAB, (b, n))


@pytest.fixture(params=PATTERNS)
def model(request: pytest.FixtureRequest) -> Decoder:
    return decoder(*PATTERNS[request.param])


@torch.no_grad()
def test_one_pass_pieces_and_steps_agree(model: Decoder) -> None:
    given = tokens()
    whole = model(given)
    for sizes in ([19], [7, 1, 1, 9, 1], [1] * 19):
        state, parts = model.state(2, 19), []
        for piece in given.split(sizes, 1):
            logits, state = model.step(piece, state)
            parts.append(logits)
        state.check()
        assert state.length == 19
        assert (torch.cat(parts, 1) - whole).abs().max() < 1e-10


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_sampling_gives_the_same_tokens_with_and_without_state(model: Decoder, temperature: float) -> None:
    prompt = tokens(2, 6)
    cached = model.generate(prompt, 14, temperature=temperature, seed=5)
    assert cached.tolist() == model.generate(prompt, 14, temperature=temperature, seed=5, cache=False).tolist()


@torch.no_grad()
def test_forks_and_selections_go_on_by_themselves(model: Decoder) -> None:
    given, other = tokens(2, 12), tokens(2, 5)
    _, state = model.step(given, model.state(2, 20))
    fork, swapped = state.fork(), state.select(torch.tensor([1, 0, 1]))
    model.step(other, state)
    after, _ = model.step(other, fork)
    assert (after - model(torch.cat([given, other], 1))[:, -5:]).abs().max() < 1e-10
    picked = torch.cat([given[[1, 0, 1]], other[[0, 1, 1]]], 1)
    after, _ = model.step(other[[0, 1, 1]], swapped)
    assert (after - model(picked)[:, -5:]).abs().max() < 1e-10


@torch.no_grad()
def test_a_crop_goes_back_in_every_layer() -> None:
    model, given = decoder(("window", "mha", "fox"), 5), tokens(2, 12)
    _, state = model.step(given[:, :3], model.state(2, 20))
    state.crop(2)
    after, state = model.step(given[:, 2:], state)
    assert (after - model(given)[:, 2:]).abs().max() < 1e-10


@torch.no_grad()
def test_a_crop_that_one_layer_refuses_changes_none() -> None:
    model, given = decoder(("mha", "fox", "window"), 3), tokens(2, 15)
    _, state = model.step(given[:, :12], model.state(2, 15))
    with pytest.raises(ValueError, match="the window of 4 has overwritten token 3, which would be visible"):
        state.crop(6)
    assert [layer.length for layer in state.layers] == [12] * 3
    after, _ = model.step(given[:, 12:], state)
    assert (after - model(given)[:, 12:]).abs().max() < 1e-10


@torch.no_grad()
@pytest.mark.parametrize("name", [row.name for row in rows.known() if not row.hybrid])
def test_a_copy_of_no_sequences_refuses_what_its_state_refuses(name: str) -> None:
    """What ``LayeredState.crop`` asks before it crops: so a state's refusal may depend on lengths only."""
    (row,) = rows.select([name])
    layer = row.layer(LayerPlace(WIDTH, HEADS, WINDOW))
    _, state = layer.step(torch.randn(2, 12, WIDTH), layer.state(2, 14))
    empty = state.select(torch.arange(0))
    for length in (13, 12, 11, 6, 1, 0):
        assert _cropped(empty.fork(), length) == _cropped(state.fork(), length)


def _cropped(state: State, length: int) -> int | str:
    """The length after a crop, or why it was refused."""
    try:
        state.crop(length)
    except (ValueError, NotImplementedError) as refusal:
        return str(refusal)
    state.check()
    return state.length


STATES: dict[str, Callable[[], object]] = {
    "rewritten": lambda: RewrittenState(2, 9, {"k": (1, 3)}, (2, 4)),
    "recurrent": lambda: RecurrentState(2, {"state": (1, 3, 3)}),
}


@pytest.mark.parametrize("name", STATES)
def test_states_that_cannot_go_back_hold_the_others(name: str) -> None:
    full, stuck = TokenState(2, 9, {"k": (1, 3)}), STATES[name]()
    full.length = stuck.length = 5  # type: ignore[attr-defined]
    state = LayeredState([full, stuck])  # type: ignore[list-item]
    with pytest.raises(NotImplementedError, match="cannot go back from 5 to 4 tokens"):
        state.crop(4)
    assert (full.length, state.length) == (5, 5)


@torch.no_grad()
def test_a_step_without_room_is_refused_before_any_layer_has_changed() -> None:
    model, given = decoder(("window", "mha"), 3), tokens(1, 9)
    _, state = model.step(given[:, :7], model.state(1, 8))
    assert (state.capacity, state.length) == (8, 7)
    with pytest.raises(ValueError, match="holds 7 of 8 tokens and got 2 more: make the state with a capacity of at"):
        model.step(given[:, 7:], state)
    assert [layer.length for layer in state.layers] == [7] * 3
    after, _ = model.step(given[:, 7:8], state)
    assert (after - model(given[:, :8])[:, 7:]).abs().max() < 1e-10


def test_bytes_and_limits_are_those_of_the_layers() -> None:
    ring, cache = WindowState(1, 2, 4, 8), KVState(1, 2, 30, 8)
    assert LayeredState([ring, cache]).nbytes == ring.nbytes + cache.nbytes
    assert LayeredState([ring, ring.fork()]).capacity is None
    assert LayeredState([cache, KVState(1, 2, 20, 8)]).capacity == 20


def test_states_of_different_lengths_or_none_are_refused() -> None:
    with pytest.raises(ValueError, match=r"states of lengths \[0, 3\], expected one or more, all of one length"):
        moved = KVState(1, 1, 4, 2)
        moved.append(torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 3, 2))
        LayeredState([KVState(1, 1, 4, 2), moved])
    with pytest.raises(ValueError, match=r"states of lengths \[\], expected one or more"):
        LayeredState([])


def test_a_pattern_repeats_and_each_mixer_learns_its_layer() -> None:
    seen: list[tuple[str, int]] = []

    def make(name: str) -> Callable[[int], nn.Module]:
        def one(layer: int) -> nn.Module:
            seen.append((name, layer))
            return nn.Identity()

        return one

    Decoder(DecoderConfig(VOCAB, WIDTH, 5), [make("a"), make("b")])
    assert seen == [("a", 0), ("b", 1), ("a", 2), ("b", 3), ("a", 4)]
    with pytest.raises(ValueError, match="a pattern has 3 mixers for 2 layers, expected 1 to 2: shorten it or"):
        Decoder(DecoderConfig(VOCAB, WIDTH, 2), [make("a")] * 3)


def test_presets_are_told_their_layer_and_how_many_there_are() -> None:
    pattern = ("softmax/global_local", "softmax/mha")
    assert [at(pattern, LayerPlace(8, 2, layer=i, layers=5))[1].name for i in range(5)] == [
        "global_local",
        "mha",
    ] * 2 + ["global_local"]
    model = decoder(("global_local",), 3)
    kinds = [type(layer) for layer in model.state(1, 30).layers]
    assert kinds == [WindowState, KVState, WindowState]


def test_a_model_with_fewer_layers_than_the_pattern_gets_its_end() -> None:
    (row,) = rows.select(["window_5_1"])
    assert row.kinds(2) == ["window", "mha"]
    assert row.kinds(6) == ["window"] * 5 + ["mha"]
    assert row.kinds(8) == ["window"] * 5 + ["mha", "window", "window"]


def test_a_name_in_a_pattern_that_no_preset_has_is_refused() -> None:
    config = DecoderConfig(VOCAB, WIDTH, 2)
    with pytest.raises(ValueError, match="'mhaa' in a pattern names none, expected one preset: see attnkit list"):
        Decoder(config, mixer(config, "mha", "mhaa", heads=HEADS))


@pytest.mark.parametrize("hybrid", HYBRIDS, ids=lambda hybrid: hybrid.name)
def test_a_hybrid_lacks_mechanisms_but_never_presets(hybrid: Hybrid) -> None:
    """A preset that was renamed would take the hybrid out of compare without a word."""
    for name in hybrid.pattern:
        if name.partition("/")[0] in registry.mechanisms():
            assert len(registry.presets(name)) == 1, f"{hybrid.name}: there is no preset {name}"
    assert hybrid.installed == any(row.name == hybrid.name for row in rows.known())


def test_hybrids_that_are_not_installed_are_no_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    specs = registry.mechanisms()
    monkeypatch.setattr(registry, "mechanisms", lambda: {"gated": specs["gated"], "softmax": specs["softmax"]})
    rows.known.cache_clear()
    try:
        assert [row.name for row in rows.select(["hybrids"])] == ["window_5_1"]
        with pytest.raises(ValueError, match="there is no row 'csa_hca' to compare"):
            rows.select(["csa_hca"])
    finally:
        rows.known.cache_clear()


def test_bytes_of_a_deep_hybrid_are_the_sum_over_its_layers() -> None:
    (row,) = rows.select(["window_5_1"])
    plan = measure.SpeedPlan(parameters=2_000_000, width=128, layers=7, window=16)
    allocated, predicted = measure.cache(measure.decoder(row, plan), 300)
    assert allocated == predicted == (6 * 16 + 300) * 2 * 128 * 4


def test_a_pattern_of_mixers_gets_equal_parameters() -> None:
    config = DecoderConfig(512, 64, 5)
    pattern = [mixer(config, "mha", heads=HEADS), mixer(config, "gate_channels", heads=HEADS)]
    target = parameters(Decoder(config, pattern[0]))
    assert abs(parameters(Decoder(match_parameters(config, pattern, target), pattern)) - target) < 0.005 * target
