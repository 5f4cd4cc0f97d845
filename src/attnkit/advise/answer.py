"""The answer to a question about a model: estimates of everything it could be, a decision, and the sentences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from attnkit.advise.alternatives import EFFORTS, TRAINING, Alternative, Unsuited, alternatives, presets, trainings
from attnkit.advise.families import from_config, read_config
from attnkit.advise.hardware import Hardware, find
from attnkit.advise.lengths import Lengths, parse
from attnkit.advise.model import Model
from attnkit.advise.ranking import Judged, Wanted, decide, judge
from attnkit.advise.roofline import Load, estimate
from attnkit.advise.words import Quality, quality, targets
from attnkit.spec import Decision


@dataclass(frozen=True)
class Answer:
    """What to do with a model, and the arithmetic behind it; ``ranked`` is best first."""

    model: Model
    hardware: Hardware
    load: Load
    wanted: Wanted
    decision: Decision
    ranked: tuple[Judged, ...]
    unsuited: tuple[Unsuited, ...]

    @property
    def chosen(self) -> Judged:
        """The alternative to take."""
        return self.ranked[0]

    @property
    def base(self) -> Judged:
        """The model as it is."""
        return next(one for one in self.ranked if one.alternative.name == "as-is")


def advise(
    config: str | Path | Mapping[str, Any] | Model,
    *,
    hardware: str | Hardware,
    lengths: str | Lengths,
    concurrency: int = 1,
    target: str | Mapping[str, float] = "",
    quality_words: str = "",
    most: str = TRAINING,
    planned: bool = False,
    source: int = 0,
    shared: int = 0,
    dtype: str | None = None,
    train: bool = False,
    also: str = "",
) -> Answer:
    """Which attention, which backend and which cache form a model should have on some hardware, for some traffic.

    Nothing of the model is loaded and nothing is allocated.

    Parameters
    ----------
    config: a ``config.json``, the folder that holds it, its parsed content, or a ``Model``.
    hardware: a name such as ``h100-sxm`` or ``8xh200``, a TOML file, or a ``Hardware``.
    lengths: percentiles such as ``p50=2k,p99=96k``, a file with a length a line, or ``Lengths``: tokens of a request,
        prompt and answer.
    concurrency: requests that are served at once.
    target: ``ttft=2s,itl=50ms``: the time to the first token of a prompt of the 99th percentile, and of a step.
    quality_words: what has to stay, such as "recall matters", "locality", "streaming".
    most: the most effort that is wanted: "a switch", "conversion and healing" or "retraining".
    planned: the model is not trained yet, so that every mechanism takes as much training as any other.
    source: tokens of the sequence that cross-attention reads.
    shared: tokens that all prompts start with.
    train: the question is how to train it on sequences of these lengths, ``concurrency`` of them in a step; ``itl``
        is then the time of a step.
    also: names of presets of attnkit's layers, such as "moba_4,tpa", to ask about as well; this imports torch.
    dtype: what to compute and cache in, and store weights in that are not quantised; None for what the model names.

    Raises ``ValueError`` in one sentence for whatever cannot be understood.
    """
    if isinstance(config, Model):
        model = config
    elif isinstance(config, Mapping):
        model = from_config(dict(config))
    else:
        model = read_config(config)
    if dtype is not None:
        model = model.cast(dtype)
    machine = hardware if isinstance(hardware, Hardware) else find(hardware)
    traffic = lengths if isinstance(lengths, Lengths) else parse(lengths, model.longest)
    if isinstance(concurrency, bool) or not 1 <= concurrency <= 1 << 20:
        raise ValueError(f"concurrency is {concurrency}, expected 1 to {1 << 20:,} requests")
    if most not in EFFORTS:
        raise ValueError(f"most is {most!r}, expected one of {', '.join(EFFORTS)}")
    if not 0 <= shared < traffic.worst:
        raise ValueError(f"shared is {shared}, expected less than the {traffic.worst:,} tokens of the longest request")
    words: Quality = quality(quality_words)
    wanted = Wanted(targets(target) if isinstance(target, str) else target, words, most, planned, concurrency)
    load = Load(traffic, concurrency, source, shared, train)
    judged, unsuited = [], []
    offered = [*(trainings(model) if train else alternatives(model, traffic)), *(presets(model, also) if also else ())]
    for one in offered:
        if isinstance(one, Unsuited):
            unsuited.append(one)
        elif one.shares and not shared:
            unsuited.append(Unsuited(one.name, one.title, "no tokens are said to be shared by all prompts"))
        else:
            judged.append(_judged(one, machine, load, wanted))
    decision, ranked = decide(judged, unsuited, wanted)
    return Answer(model, machine, load, wanted, decision, tuple(ranked), tuple(unsuited))


def _judged(one: Alternative, machine: Hardware, load: Load, wanted: Wanted) -> Judged:
    asked = load if one.shares else replace(load, shared=0)
    return judge(one, estimate(one.model, machine, asked, one.page, table=one.table), machine, wanted)
