"""What a user may ask of ``attnkit compare``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from attnkit.compare import rows

TOKENIZERS = ("bytes", "bpe")


@dataclass(frozen=True)
class CompareOptions:
    """What to compare, on which text, and where to keep the results; refused with one sentence when it makes no sense.

    Parameters
    ----------
    text: files to train on; Shakespeare's plays when there are none.
    quick: minutes on two cores and one seed; otherwise every row, more seeds, longer contexts and all tasks.
    mechanisms: names of rows (``gqa``, ``softmax/gqa``, ``window_5_1``), of mechanisms (all their rows), or
        ``hybrids`` (all of those); the set-up's own when empty.
    seeds: seeds to train with; the set-up's own when empty.
    tokenizer: "bytes", "bpe" (trained on the text), or the set-up's own when None.
    out: folder for ``results.jsonl`` and ``report.html``.
    resume: go on with the run in ``out`` instead of starting anew.
    json: print the lines themselves and nothing else.
    """

    text: tuple[Path, ...] = ()
    quick: bool = False
    mechanisms: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    tokenizer: str | None = None
    out: Path = Path("attnkit-compare")
    resume: bool = False
    json: bool = False

    def __post_init__(self) -> None:
        rows.select(self.mechanisms)
        if self.tokenizer not in (None, *TOKENIZERS):
            raise ValueError(f"the tokenizer is {self.tokenizer!r}, expected {' or '.join(TOKENIZERS)}")
        for seed in self.seeds:
            if not 0 <= seed < 1 << 32:
                raise ValueError(f"a seed is {seed}, expected 0 to {(1 << 32) - 1}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"the seeds are {', '.join(map(str, self.seeds))}, expected each once")

    @property
    def rows(self) -> tuple[rows.Row, ...]:
        """The rows to compare: those asked for, else eight for a quick run and every known one for a full run."""
        return rows.select(self.mechanisms or rows.QUICK) if self.mechanisms or self.quick else rows.known()
