"""How long, how wide and how fast the decoders of ``attnkit compare`` are trained.

The figures of the quick set-up were found by training multi-head attention on two cores (AMD EPYC Zen 5, one thread a
training) until it learned in the time it gets; ``docs/notes/training.md`` tells what was tried. The full set-up has the
same rates and the same kind of stages, with more of everything.
"""

from __future__ import annotations

from dataclasses import dataclass

from attnkit.compare.tasks import NEEDLES, Exam


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder. ``hidden`` is the feed-forward width under MHA; other mixers get what equals its parameters.

    ``window`` is what local mixers see. With ``qk_norm`` mixers that can normalise their queries and keys.
    """

    width: int
    layers: int
    heads: int
    hidden: int
    window: int
    qk_norm: bool = False


@dataclass(frozen=True)
class Stage:
    """Part of a training: ``steps`` of ``rows`` sequences of ``length`` tokens, with up to ``pairs`` pairs in tasks."""

    steps: int
    rows: int
    length: int
    pairs: int = 0


@dataclass(frozen=True)
class Training:
    """Stages and rates.

    Weights of linear maps are trained by Muon at ``matrix_rate``, all others by AdamW at ``rate``. Rates rise over the
    first ``warmup`` of the steps and fall to 0 over the last ``decay`` of them. ``bfloat16`` multiplies matrices in
    bfloat16 where the CPU has instructions for it.
    """

    stages: tuple[Stage, ...]
    matrix_rate: float = 0.02
    rate: float = 0.01
    warmup: float = 0.03
    decay: float = 1.0
    bfloat16: bool = False

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    @property
    def tokens(self) -> int:
        return sum(stage.steps * stage.rows * stage.length for stage in self.stages)


@dataclass(frozen=True)
class TextSetup:
    """Training on text; ``tokenizer`` and ``vocab`` as in ``corpus.load``."""

    shape: Shape
    training: Training
    tokenizer: str
    vocab: int


@dataclass(frozen=True)
class TaskSetup:
    """Training on the generated tasks, then ``exams`` of ``rows`` sequences each."""

    shape: Shape
    training: Training
    exams: tuple[Exam, ...]
    rows: int


@dataclass(frozen=True)
class Setup:
    """All that ``attnkit compare`` trains for each row."""

    text: TextSetup
    tasks: TaskSetup
    seeds: tuple[int, ...]


def quick() -> Setup:
    """Half a minute of training on two cores for each row."""
    return Setup(
        text=TextSetup(
            Shape(width=192, layers=2, heads=4, hidden=512, window=32),
            Training((Stage(steps=220, rows=16, length=128),), bfloat16=True),
            tokenizer="bpe",
            vocab=2048,
        ),
        # Without the norm of queries and keys, heads this small find out how to recall late, or not at all.
        tasks=TaskSetup(
            Shape(width=64, layers=2, heads=4, hidden=128, window=32, qk_norm=True),
            Training(
                (
                    Stage(steps=350, rows=32, length=16, pairs=2),
                    Stage(steps=250, rows=32, length=32, pairs=8),
                    Stage(steps=250, rows=16, length=64, pairs=16),
                    Stage(steps=300, rows=8, length=128, pairs=32),
                ),
                rate=0.02,
            ),
            exams=(
                *(Exam("recall", 128, pairs) for pairs in (4, 8, 16, 32)),
                *(Exam("recall", length, 8) for length in (32, 64)),
                *(Exam("copy", 2 * pairs + 2, pairs) for pairs in (7, 15, 31, 63)),
                *(Exam("needle", length, NEEDLES) for length in (32, 64, 128)),
            ),
            rows=128,
        ),
        seeds=(0,),
    )


def full() -> Setup:
    """Tens of minutes of training for each row: a larger decoder, longer texts and tasks, three seeds."""
    return Setup(
        text=TextSetup(
            Shape(width=256, layers=4, heads=8, hidden=688, window=64),
            Training(
                (Stage(steps=1500, rows=16, length=256), Stage(steps=300, rows=8, length=512)), decay=0.5, bfloat16=True
            ),
            tokenizer="bpe",
            vocab=4096,
        ),
        tasks=TaskSetup(
            Shape(width=128, layers=2, heads=8, hidden=256, window=64, qk_norm=True),
            Training(
                (
                    Stage(steps=500, rows=32, length=16, pairs=2),
                    Stage(steps=400, rows=32, length=32, pairs=8),
                    Stage(steps=400, rows=16, length=64, pairs=16),
                    Stage(steps=400, rows=16, length=128, pairs=32),
                    Stage(steps=500, rows=16, length=256, pairs=64),
                    Stage(steps=500, rows=8, length=512, pairs=64),
                ),
                rate=0.02,
            ),
            exams=(
                *(Exam("recall", 512, pairs) for pairs in (4, 8, 16, 32, 64)),
                *(Exam("recall", length, 8) for length in (32, 64, 128, 256)),
                *(Exam("copy", 2 * pairs + 2, pairs) for pairs in (15, 31, 63, 127)),
                *(Exam("needle", length, NEEDLES) for length in (64, 128, 256, 512)),
            ),
            rows=256,
        ),
        seeds=(0, 1, 2),
    )
