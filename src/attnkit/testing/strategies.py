"""Hypothesis strategies over calls of a mechanism (needs hypothesis; the rest of ``attnkit.testing`` does not)."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st

from attnkit.spec import Mechanism
from attnkit.testing import samplers


def calls(spec: Mechanism, dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> st.SearchStrategy[dict[str, Any]]:
    """Keyword arguments of the mechanism's function, with every feature it has; shrinks to a small call."""
    return st.builds(
        lambda rng, dtype: samplers.arguments(spec, rng, dtype=dtype),
        st.randoms(use_true_random=False),
        st.sampled_from(dtypes),
    )
