"""PyramidKV: SnapKV with more tokens in the lower layers, where attention is spread out."""

from __future__ import annotations

from dataclasses import dataclass, field

from attnkit.state.policies.snapkv import SnapKV


@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """SnapKV whose budget, ``budget`` a layer on average, falls evenly from the first layer to the last.

    Without the window, the last layer has ``1 / beta`` of the average, the first what makes the average right. Where
    ``prompt`` is the length of the prompt, no layer plans for more than there is, and others get more. ``for_layer``
    gives each layer its SnapKV.

    Source: Cai et al. 2024, arXiv 2406.02069, section 4.2.
    """

    beta: float = field(default=20.0, kw_only=True)
    prompt: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.beta <= self.budget - self.observed:
            raise ValueError(
                f"PyramidKV: beta is {self.beta}, expected 1 to {self.budget - self.observed}: budget - observed, so "
                f"that the last layer keeps a token"
            )

    def budgets(self, layers: int) -> list[int]:
        """Tokens that each layer keeps, its window included; never more than ``layers * budget`` together."""
        average = self.budget - self.observed
        least = average / self.beta
        most = 2 * average - least
        if self.prompt is not None and most > self.prompt - self.observed:
            most = max(average, self.prompt - self.observed)
            least = 2 * average - most
        step = (most - least) / max(1, layers - 1)
        return [self.observed + (int(most - layer * step) if layers > 1 else average) for layer in range(layers)]

    def for_layer(self, layer: int, layers: int) -> SnapKV:
        budget = self.budgets(layers)[layer]
        every = min(self.every, budget - self.observed)
        return SnapKV(budget, every=every, observed=self.observed, kernel=self.kernel, pool=self.pool)
