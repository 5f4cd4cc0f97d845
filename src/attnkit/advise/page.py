"""The answer as one HTML file that needs nothing else, in the style of the report of ``attnkit compare``."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from importlib.resources import files
from pathlib import Path

from attnkit.advise.alternatives import EFFORTS
from attnkit.advise.answer import Answer
from attnkit.advise.ranking import Judged
from attnkit.advise.sentences import asked, headline, hints, reasons
from attnkit.advise.words import count, length, seconds, size

_EXTRA = """
td.why { white-space: normal; text-align: left; min-width: 18em; max-width: 40em; }
tbody th { white-space: normal; min-width: 9em; text-align: left; }
tr.group th { color: var(--soft); font-weight: 500; padding-top: 20px; }
tr.chosen th, tr.chosen td { background: var(--mark); font-weight: 650; }
tr.short { color: var(--soft); }
.bar { display: block; height: 6px; min-width: 1px; background: var(--ours); border-radius: 3px; margin-top: 4px; }
.bar.over { background: var(--limit); }
thead th.why { text-align: left; }
@media (max-width: 640px) {
  .columns th, .columns td { padding: 8px 3px; white-space: normal; min-width: 0; font-size: 11px; }
  .others tr { display: grid; grid-template-columns: 2fr 1fr 1fr 1fr; padding: 6px 0; }
  .others tr { border-bottom: 1px solid var(--line); }
  .others th, .others td { border: 0; padding: 3px 6px 3px 0; min-width: 0; }
  .others th:first-child, .others td.why { grid-column: 1 / -1; max-width: none; }
  .others thead th:first-child, .others thead th.why { display: none; }
}
"""


_WHY = ' class="why"'


def write(answer: Answer, path: Path, command: str) -> None:
    """Write the page to ``path``, all of it or nothing; ``command`` is what to type to have it again."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(page(answer, command), encoding="utf-8")
    part.replace(path)


def page(answer: Answer, command: str) -> str:
    """The text of the page."""
    css = (files("attnkit") / "report" / "page" / "page.css").read_text("utf-8")
    model, hardware = answer.model, answer.hardware
    facts = (f"{count(model.weights)} weights", hardware.title, asked(answer))
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    kept = [answer.base] if answer.base is answer.chosen else [answer.base, answer.chosen]
    body = [
        _section("answer", "Answer", f'<p class="lead">{escape(headline(answer))}</p>'),
        *(_section(f"numbers-{i}", one.alternative.title.capitalize(), _columns(one)) for i, one in enumerate(kept)),
        _section("others", "Everything it could be, and why not", _ranking(answer)),
        _section("read", "How to read this", "".join(f'<p class="prose">{escape(hint)}</p>' for hint in hints(answer))),
        _section("source", "Where the figures are from", _sources(answer, command)),
    ]
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<link rel="icon" href="data:,">
<title>{escape(model.name)} on {escape(hardware.title)}</title>
<style>{css}{_EXTRA}</style>
</head>
<body>
<header>
  <p class="eyebrow">attnkit advise</p>
  <h1>{escape(model.name)} on {escape(hardware.title)}</h1>
  <p class="facts">{"".join(f"<span>{escape(fact)}</span>" for fact in facts)}</p>
</header>
<main>
{"".join(body)}</main>
</body>
</html>
"""


def _section(name: str, title: str, inside: str) -> str:
    return f'<section aria-labelledby="{name}">\n<h2 id="{name}">{escape(title)}</h2>\n{inside}\n</section>\n'


def _table(name: str, kind: str, head: Iterable[str], rows: Iterable[str]) -> str:
    cells = "".join(f'<th scope="col"{_WHY if cell == "why not" else ""}>{escape(cell)}</th>' for cell in head)
    region = f'<div class="scroll" role="region" aria-labelledby="{name}" tabindex="0">'
    return f"{region}<table class='{kind}'><thead><tr>{cells}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"


def _columns(judged: Judged) -> str:
    estimate = judged.estimate
    rows = (
        ("cache of a request", [size(c.cache) for c in estimate.columns]),
        ("requests that fit", [f"{c.fit:,}" for c in estimate.columns]),
        ("prompt, at least", [f"{seconds(c.prefill.seconds)} ({c.prefill.bound})" for c in estimate.columns]),
        ("step, at least", [f"{seconds(c.decode.seconds)} ({c.decode.bound})" for c in estimate.columns]),
    )
    head = ["", *(f"{column.name}: {length(column.tokens)} tokens" for column in estimate.columns)]
    lines = (
        f'<tr><th scope="row">{name}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in cells)}</tr>'
        for name, cells in rows
    )
    note = (
        f"Weights {size(estimate.weights)}, activations {size(estimate.activations)}, free for the cache "
        f"{size(estimate.free)} of {size(estimate.usable)}; a token adds {estimate.token:,} bytes."
    )
    return _table("answer", "columns", head, lines) + f'<p class="note">{escape(note)}</p>'


def _ranking(answer: Answer) -> str:
    rows = []
    most = max(one.estimate.needed for one in answer.ranked) or 1
    for effort in EFFORTS:
        ours = [one for one in answer.ranked if one.alternative.effort == effort]
        if ours and effort != "nothing":
            rows.append(f'<tr class="group"><th scope="rowgroup" colspan="6">takes {escape(effort)}</th></tr>')
        rows += [_row(answer, one, most) for one in ours]
    if answer.unsuited:
        rows.append('<tr class="group"><th scope="rowgroup" colspan="6">does not apply</th></tr>')
    for other in answer.unsuited:
        why = escape(other.why)
        rows.append(
            f'<tr class="short"><th scope="row">{escape(other.title)}</th><td></td><td></td><td></td><td></td>'
            f'<td class="why">{why}</td></tr>'
        )
    return _table("others", "others", ("", "cache of all requests", "fit", "prompt", "step", "why not"), rows)


def _row(answer: Answer, judged: Judged, most: int) -> str:
    one, estimate = judged.alternative, judged.estimate
    p99 = estimate.column("p99")
    chosen = judged is answer.chosen
    over = " over" if estimate.needed > max(0, estimate.free) else ""
    bar = f'<span class="bar{over}" style="width: {100 * estimate.needed / most:.1f}%"></span>'
    kind = "chosen" if chosen else "" if judged.meets else "short"
    why = "chosen" if chosen else reasons(answer, one.name)
    cells = f"<td>{size(estimate.needed)}{bar}</td><td>{p99.fit:,}</td>"
    times = f"<td>{seconds(p99.prefill.seconds)}</td><td>{seconds(p99.decode.seconds)}</td>"
    title = f'<th scope="row">{escape(one.title)}</th>'
    return f'<tr class="{kind}">{title}{cells}{times}<td class="why">{escape(why)}</td></tr>'


def _sources(answer: Answer, command: str) -> str:
    hardware, model = answer.hardware, answer.model
    rates = ", ".join(f"{rate / 1e12:,.4g} T {name}" for name, rate in hardware.rates.items())
    facts = {
        "hardware": f"{size(hardware.memory)}, {hardware.bandwidth / 1e9:,.0f} GB/s, {rates}",
        "its source": hardware.source,
        "layers": model.shape,
        "family": f"{model.family}, {model.dtype}",
        "keys that change nothing": ", ".join(model.ignored) or "none",
        "keys that nothing reads": ", ".join(model.unknown) or "none",
    }
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    return f"<dl>{listed}</dl><pre>{escape(command)}</pre>"
