"""What an answer says in words: for the terminal, for JSON and for the page."""

from __future__ import annotations

from collections.abc import Iterator

from attnkit.advise.alternatives import Alternative
from attnkit.advise.answer import Answer
from attnkit.advise.model import describe
from attnkit.advise.words import length, seconds, size

MODES = {
    "nothing": "nothing has to change",
    "a switch": "a switch, no training",
    "conversion and healing": "a conversion of the weights, and training to heal it",
    "retraining": "training",
}


def asked(answer: Answer) -> str:
    """What was asked for."""
    load, wanted = answer.load, answer.wanted
    lengths = ", ".join(f"{name} {length(tokens)}" for name, tokens in load.lengths.columns.items())
    words = [f"{load.concurrency} request{'s' if load.concurrency > 1 else ''} at once of {lengths} tokens"]
    words += [f"{length(load.shared)} of them shared"] if load.shared else []
    words += [f"{length(load.source)} of a source"] if load.source else []
    names = {"ttft": "first token within", "itl": "a token every"}
    words += [f"{names[name]} {seconds(value)}" for name, value in wanted.targets.items()]
    words += [wanted.quality.text] if wanted.quality.text else []
    if wanted.planned:
        words.append("not trained yet")
    elif wanted.most != "retraining":
        words.append(f"at most {wanted.most}")
    return "; ".join(words)


def headline(answer: Answer) -> str:
    """The decision in one or two sentences."""
    best = answer.chosen
    one, p99 = best.alternative, best.estimate.column("p99")
    step = seconds(p99.decode.seconds)
    numbers = f"{size(p99.cache)} of cache a request at p99, {p99.fit:,} fit, a step takes at least {step}"
    if answer.load.train:
        numbers = f"{size(p99.cache)} of activations a sequence at p99, {p99.fit:,} fit, a step takes at least {step}"
    if not best.meets:
        return f"Nothing meets all that is asked for. Closest is {one.title}: {best.short[0][0]}."
    keep = "Keep it as it is" if one.name == "as-is" else f"Take {one.title}"
    mode = "" if answer.wanted.planned else f" ({MODES[one.effort]})"
    form = "How" if answer.load.train else "Cache"
    return f"{keep}{mode}: {numbers}. Mechanism: {mechanism(one)}. {form}: {one.how}. Backend: {backend(answer, one)}."


def mechanism(one: Alternative) -> str:
    """What mixes tokens, in words."""
    return ", ".join(f"{times} x {describe(mixer)}" for mixer, times in one.model.mixers.items())


def backend(answer: Answer, one: Alternative) -> str:
    """The backend that attnkit takes for it on such hardware, and how to ask dispatch itself."""
    names = sorted({mixer.mechanism for mixer in one.model.mixers} - {"convolution"})
    if not names:
        return "none, there is no attention"
    main = names[0] if len(names) == 1 else ("softmax" if "softmax" in names else names[0])
    if answer.hardware.kind == "cpu":
        taken = "cpu (native)" if main not in ("dsa", "compressed") else "chunk"
    else:
        taken = {"softmax": "sdpa (tiled, no table of scores)", "mla": "absorbed to decode, expanded to read"}.get(
            main, "chunk"
        )
    return f"{taken}; `attnkit explain {main}` says which one a call takes and why"


def reasons(answer: Answer, name: str) -> str:
    """Why an alternative was passed over."""
    return "; ".join(answer.decision.rejected.get(name, ()))


def hints(answer: Answer) -> Iterator[str]:
    """What a reader has to know to read the numbers right."""
    yield (
        "Times are bounds: no program on this hardware is faster. What has to fit is all requests at the 99th "
        "percentile, or of the worst case where a cache has no pages."
    )
    if answer.hardware.count > 1:
        yield f"{answer.hardware.count} processors count as one: what they have to tell each other takes no time here."
    for note in answer.model.notes:
        yield f"Note: {note}."
    if answer.model.unknown:
        yield f"Keys of the configuration that nothing reads: {', '.join(answer.model.unknown)}."
