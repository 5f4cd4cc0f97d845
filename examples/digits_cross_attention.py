"""Two modalities: text tokens read image patches through cross-attention, with any mixer that can.

The images are scikit-learn's 1,797 handwritten digits of 8 x 8 pixels (it comes with the `dev` extra), as 16 patches of
2 x 2; the text is a question of one word, "name", "parity" or "size", and its answer spelled in letters.
`python examples/digits_cross_attention.py --mixer softmax` (or `additive`, `hard`) trains for one to two minutes and
prints how often a whole answer about an image never trained on is right.
"""

import argparse
import time

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import attnkit
from attnkit.mechanisms.additive import AdditiveAttention, AdditiveConfig
from attnkit.mechanisms.hard import HardAttention, HardConfig
from attnkit.mechanisms.softmax import SoftmaxAttention, SoftmaxConfig
from attnkit.models.decoder import DecoderConfig
from attnkit.models.encoder import EncoderConfig
from attnkit.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from attnkit.positions import Rotary

NAMES = "zero one two three four five six seven eight nine".split()
QUESTIONS = {
    "name": lambda digit: NAMES[digit],
    "parity": lambda digit: "odd" if digit % 2 else "even",
    "size": lambda digit: "small" if digit < 5 else "large",
}
LETTERS = "abcdefghijklmnopqrstuvwxyz."
VOCABULARY = [*LETTERS, *QUESTIONS]
LONGEST = 6  # "three" and the stop that ends it
WIDTH, HEADS = 64, 4


def mixer(name: str, causal: bool, positions: bool) -> nn.Module:
    """A layer of the mechanism, for one sequence or for reading another one."""
    mask = attnkit.causal() if causal else None
    if name == "additive":
        return AdditiveAttention(AdditiveConfig(WIDTH, HEADS, mask=mask))
    rotary = Rotary(WIDTH // HEADS) if positions else None
    layer, config = (HardAttention, HardConfig) if name == "hard" else (SoftmaxAttention, SoftmaxConfig)
    return layer(config(WIDTH, HEADS, mask=mask, rotary=rotary))


def patches() -> tuple[torch.Tensor, torch.Tensor]:
    """Images as (1797, 16 patches, 4 pixels and 8 numbers that say where the patch is), and their digits."""
    from sklearn.datasets import load_digits

    images, digits = load_digits(return_X_y=True)
    pixels = (
        torch.tensor(images, dtype=torch.float32).reshape(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, 16, 4) / 8 - 1
    )
    row, column = torch.eye(4).repeat_interleave(4, 0), torch.eye(4).repeat(4, 1)
    place = torch.cat([row, column], 1).expand(len(pixels), -1, -1)
    return torch.cat([pixels, place], 2), torch.tensor(digits)


def texts(digits: torch.Tensor, questions: list[str]) -> torch.Tensor:
    """Token rows: the question, then the answer's letters, then stops."""
    rows = []
    for digit, question in zip(digits.tolist(), questions, strict=True):
        answer = QUESTIONS[question](digit).ljust(LONGEST, ".")
        rows.append([VOCABULARY.index(token) for token in (question, *answer)])
    return torch.tensor(rows)


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--mixer", choices=("softmax", "additive", "hard"), default="softmax")
parser.add_argument("--steps", type=int, default=1500)
options = parser.parse_args()

torch.manual_seed(0)
images, digits = patches()
order = torch.randperm(len(images))
train, test = order[360:], order[:360]
config = EncoderDecoderConfig(
    EncoderConfig(inputs=images.shape[2], width=WIDTH, layers=2, vectors=True),
    DecoderConfig(vocab=len(VOCABULARY), width=WIDTH, layers=2),
)
model = EncoderDecoder(
    config,
    encoder_mixer=lambda layer: mixer(options.mixer, causal=False, positions=False),
    mixer=lambda layer: mixer(options.mixer, causal=True, positions=True),
    cross=lambda layer: mixer(options.mixer, causal=False, positions=False),
)
optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=options.steps)
asked = list(QUESTIONS)
began = time.perf_counter()
for step in range(options.steps):
    rows = train[torch.randint(len(train), (64,))]
    tokens = texts(digits[rows], [asked[i] for i in torch.randint(3, (64,)).tolist()])
    logits = model(images[rows], tokens[:, :-1])
    loss = cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    optimiser.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    schedule.step()
    if step % 100 == 0 or step == options.steps - 1:
        print(f"step {step:4}  loss {loss.item():.3f}  {time.perf_counter() - began:.0f} s")

for question in asked:
    tokens = texts(digits[test], [question] * len(test))
    found = model.generate(images[test], tokens[:, :1], LONGEST)
    right = (found == tokens).all(1).float().mean().item()
    print(f"{question:>6}: {right:.1%} of {len(test)} answers about images never trained on are right")
