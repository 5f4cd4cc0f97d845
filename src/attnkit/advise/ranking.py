"""Which alternative to take: the least effort that meets everything asked for, and why every other one lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from attnkit.advise.alternatives import EFFORTS, TRAINING, Alternative, Unsuited
from attnkit.advise.hardware import Hardware
from attnkit.advise.roofline import Estimate
from attnkit.advise.words import Quality, seconds, size
from attnkit.spec import Decision


@dataclass(frozen=True)
class Wanted:
    """What is asked for: seconds by name, words about quality, the most effort, whether the model is only planned."""

    targets: Mapping[str, float]
    quality: Quality
    most: str = TRAINING
    planned: bool = False
    concurrency: int = 1


@dataclass(frozen=True)
class Judged:
    """An alternative, what it takes, and where it falls short: each a sentence and by how much."""

    alternative: Alternative
    estimate: Estimate
    short: tuple[tuple[str, float], ...] = ()

    @property
    def meets(self) -> bool:
        return not self.short


def judge(one: Alternative, estimate: Estimate, hardware: Hardware, wanted: Wanted) -> Judged:
    """Compare an alternative with what is asked for."""
    short: list[tuple[str, float]] = []
    train = estimate.activations == 0
    at = "at p99" if train or one.page is not None else "of the worst case"
    units = ("sequences", "activations") if train else ("requests", "cache")
    if estimate.free <= 0:
        need = estimate.weights + estimate.activations
        text = f"weights and activations take {size(need)}, and {size(estimate.usable)} are usable"
        short.append((text, need / estimate.usable))
    else:
        need = estimate.needed
        if need > estimate.free:
            count = f"{wanted.concurrency} {units[0] if wanted.concurrency > 1 else units[0][:-1]}"
            verb = "need" if wanted.concurrency > 1 else "needs"
            text = f"{count} {at} {verb} {size(need)} of {units[1]}, and {size(estimate.free)} are free"
            short.append((text, need / estimate.free))
    p99 = estimate.column("p99")
    for name, time, words in (
        ("ttft", p99.prefill, "a p99 prompt takes at least {} to read"),
        ("itl", p99.decode, "a step at p99 takes at least {}"),
    ):
        if name in wanted.targets and time.seconds > wanted.targets[name]:
            asked = wanted.targets[name]
            why = f"bound by {time.bound} of {time.part}"
            short.append(
                (f"{words.format(seconds(time.seconds))} ({why}), asked for {seconds(asked)}", time.seconds / asked)
            )
    if wanted.quality.recall and one.forgets:
        short.append((f"recall is asked for, and {one.quality}", 1e3))
    if wanted.quality.streaming and any(mixer.grows for mixer in one.model.mixers):
        short.append((f"the text has no end, and its cache grows by {size(estimate.token)} a token", 1e3))
    elif wanted.quality.streaming and not one.endless:
        grows = size(estimate.columns[-1].cache)
        short.append((f"the text has no end, and it lets go of tokens of a prompt only ({grows} at the worst)", 1e3))
    if EFFORTS.index(one.effort) > EFFORTS.index(wanted.most) and not wanted.planned:
        would = f"it would take {size(p99.cache)} and {seconds(p99.decode.seconds)} a step"
        short.append((f"it takes {one.effort}, and at most {wanted.most} is wanted; {would}", 1e6))
    return Judged(one, estimate, tuple(short))


def order(judged: Judged, wanted: Wanted) -> tuple[float, ...]:
    """Smaller is better: what is met, effort, risk, then time."""
    one = judged.alternative
    # A model that is not trained yet takes as much training with one mechanism as with another, and nothing is healed.
    effort = 0 if wanted.planned else EFFORTS.index(one.effort)
    risk = one.design if wanted.planned and one.design is not None else one.risk
    if wanted.quality.local and one.name == "window":
        risk = 0.4
    if wanted.quality.recall and one.near:
        risk += 1
    worst = max((by for _, by in judged.short), default=0.0)
    step = judged.estimate.column("p99").decode.seconds
    return (float(bool(judged.short)), worst, float(effort), risk, step)


def decide(judged: Sequence[Judged], unsuited: Sequence[Unsuited], wanted: Wanted) -> tuple[Decision, list[Judged]]:
    """The decision, and all that were judged, best first."""
    ranked = sorted(judged, key=lambda one: order(one, wanted))
    best = ranked[0]
    rejected = {one.alternative.name: (why_not(one, best, wanted),) for one in ranked[1:]}
    rejected |= {one.name: (one.why,) for one in unsuited}
    return Decision("advise", best.alternative.name, rejected), ranked


def why_not(one: Judged, best: Judged, wanted: Wanted) -> str:
    """Why ``one`` lost to ``best``, in one sentence with numbers."""
    if one.short:
        return one.short[0][0] if len(one.short) == 1 else "; ".join(text for text, _ in one.short[:2])
    mine, theirs = one.alternative, best.alternative
    p99, other = one.estimate.column("p99"), best.estimate.column("p99")
    pair = f"{size(p99.cache)} and {seconds(p99.decode.seconds)} a step"
    numbers = f"{pair}, against {size(other.cache)} and {seconds(other.decode.seconds)}"
    if not wanted.planned and EFFORTS.index(mine.effort) > EFFORTS.index(theirs.effort):
        easier = "nothing has to change" if theirs.effort == "nothing" else f"{theirs.title} takes {theirs.effort}"
        return f"it would do too ({numbers}), but takes {mine.effort} where {easier}"
    if order(one, wanted)[3] > order(best, wanted)[3]:
        return f"it would do too ({numbers}), but {_quality(mine, wanted)}"
    return f"it would do too, with no gain ({numbers})"


def _quality(one: Alternative, wanted: Wanted) -> str:
    return one.trained if wanted.planned and one.trained else one.quality
