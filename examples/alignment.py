"""Additive attention learns to align: number words to digits with the GRU encoder-decoder of the 2014 paper.

`python examples/alignment.py` trains for well under a minute and prints which word each digit was read from; with
`--picture alignment.svg` it also draws that (needs the `compare` extra).
"""

import argparse
import random
import time
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from attnkit.models.recurrent import AdditiveDecoder, RecurrentConfig, RecurrentModel

ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen".split()
ONES += "seventeen eighteen nineteen".split()
TENS = ". . twenty thirty forty fifty sixty seventy eighty ninety".split()
WORDS = ["<pad>", *ONES, *TENS[2:], "hundred", "thousand", "million", "and"]
END = BEGIN = 10  # ten digits, then one token that begins and ends
PAD = 11


def below_thousand(n: int) -> list[str]:
    words = [ONES[n // 100], "hundred"] if n >= 100 else []
    rest = n % 100
    if n >= 100 and rest:
        words.append("and")
    if rest >= 20:
        words.append(TENS[rest // 10])
        rest %= 10
    return words + [ONES[rest]] if rest else words


def in_words(n: int) -> list[str]:
    """English words of a number from 0 to 999,999,999."""
    words = []
    for size, name in ((10**6, "million"), (10**3, "thousand"), (1, "")):
        part = n // size % 1000
        if part:
            words += below_thousand(part) + ([name] if name else [])
    return words or ["zero"]


def batch(numbers: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Padded words, their lengths, and the digits between BEGIN and END."""
    words = [[WORDS.index(word) for word in in_words(n)] for n in numbers]
    digits = [[BEGIN, *map(int, str(n)), END] for n in numbers]
    lengths = torch.tensor([len(row) for row in words])
    source = torch.tensor([row + [0] * (int(lengths.max()) - len(row)) for row in words])
    target = torch.tensor([row + [PAD] * (max(map(len, digits)) - len(row)) for row in digits])
    return source, lengths, target


def number(rng: random.Random) -> int:
    """Any number of digits is as likely as any other."""
    return rng.randrange(10 ** rng.randint(1, 9))


def draw(words: list[str], digits: list[str], weights: torch.Tensor, path: Path) -> None:
    """Save how much each digit (down) read from each word (across)."""
    import altair as alt
    import vl_convert

    cells = [
        {"word": f"{j + 1} {word}", "digit": f"{i + 1}: {digit}", "weight": round(weights[i, j].item(), 4)}
        for i, digit in enumerate(digits)
        for j, word in enumerate(words)
    ]
    chart = (
        alt.Chart(alt.Data(values=cells), width=28 * len(words), height=28 * len(digits))
        .mark_rect(stroke="#e9ecf0")
        .encode(
            x=alt.X("word:O", sort=None, title=None, axis=alt.Axis(orient="top", labelAngle=-45, domain=False)),
            y=alt.Y("digit:O", sort=None, title="digit written", axis=alt.Axis(domain=False)),
            color=alt.Color("weight:Q", scale=alt.Scale(domain=[0, 1], range=["#ffffff", "#1c3ec0"]), title="weight"),
        )
        .properties(background="#ffffff", padding=12)
    )
    spec = chart.to_dict()
    svg = path.suffix == ".svg"
    path.write_bytes(vl_convert.vegalite_to_svg(spec).encode() if svg else vl_convert.vegalite_to_png(spec, scale=2))


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=600)
parser.add_argument("--picture", type=Path)
options = parser.parse_args()

torch.manual_seed(0)
rng = random.Random(0)
config = RecurrentConfig(source_vocab=len(WORDS), target_vocab=12, width=32, hidden=64)
model = RecurrentModel(config, AdditiveDecoder(config))
optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=options.steps)
held_out = {number(rng) for _ in range(500)}
began = time.perf_counter()
for step in range(options.steps):
    source, lengths, target = batch([n for n in (number(rng) for _ in range(64)) if n not in held_out] or [1])
    logits = model(source, target[:, :-1], lengths=lengths)
    loss = cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten(), ignore_index=PAD)
    optimiser.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    schedule.step()
    if step % 200 == 0 or step == options.steps - 1:
        print(f"step {step:4}  loss {loss.item():.3f}  {time.perf_counter() - began:.0f} s")

model.eval()
source, lengths, target = batch(sorted(held_out))
found = model.generate(source, target[:, :1], target.shape[1] - 1, lengths=lengths)
right = ((found == target) | (target == PAD)).all(1).float().mean().item()
print(f"{right:.1%} of {len(held_out)} numbers never trained on are written without a mistake")

example = 907_041_356
source, lengths, target = batch([example])
with torch.no_grad():
    weights = model.alignment(source, target[:, :-1], lengths=lengths)[0]
written = model.generate(source, target[:, :1], target.shape[1] - 1, lengths=lengths)[0, 1:].tolist()
names = [str(token) if token < 10 else "end" for token in written]
for name, row in zip(names, weights, strict=True):
    print(f"{name:>4} from {in_words(example)[int(row.argmax())]} ({row.max().item():.2f})")
if options.picture:
    draw(in_words(example), [*str(example), "end"], weights, options.picture)
