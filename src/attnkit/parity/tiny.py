"""A named tiny random family as a subject."""

from __future__ import annotations

import copy
import difflib

import torch

from attnkit.parity.families import FAMILIES, build
from attnkit.parity.subject import Subject

# Against eager unless the family's own implementations differ where their outputs do not matter: the recurrent layers
# of this one read what attention makes of padding, which sees no key: 0 with us and SDPA, a mean with eager.
AGAINST = {"recurrent_gemma": "sdpa"}
LENGTH = 24


def tiny(family: str, *, against: str | None = None, dtype: torch.dtype = torch.float32, seed: int = 0) -> Subject:
    """A random model of ``family`` and random text; raises ValueError for a family that is not in the table."""
    if family not in FAMILIES:
        near = difflib.get_close_matches(family, FAMILIES, 1)
        hint = f", perhaps {near[0]!r}" if near else ""
        raise ValueError(
            f"there is no folder and no family {family!r}{hint}: name a folder with safetensors, or one of "
            f"{', '.join(FAMILIES)}"
        )
    numbers = torch.Generator().manual_seed(seed)
    model = build(family, dtype=dtype, seed=seed)
    return Subject(
        family,
        model=model,
        gold=copy.deepcopy(model).to(torch.float64),
        against=against or AGAINST.get(family, "eager"),
        ids=torch.randint(3, 99, (2, LENGTH), generator=numbers),
        text=torch.randint(3, 99, (2 * LENGTH,), generator=numbers),
        prompt=LENGTH // 2,
        new=LENGTH,
    )
