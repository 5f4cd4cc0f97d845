"""A short causal convolution over tokens, one filter a channel, as linear-attention layers have before their keys."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ShortConvolution(nn.Module):
    """``y_t = silu(w_0 x_{t-taps+1} + ... + w_{taps-1} x_t)`` for each channel by itself; rows before the first are 0.

    Between two calls, the state holds the last ``taps - 1`` rows of ``x`` as they came: not those of ``y``.

    Parameters
    ----------
    channels: of ``x``; ``weight`` is (channels, 1, taps), as ``nn.Conv1d`` with as many groups stores it.
    taps: rows that one output reads, its own included.
    bias: add one number a channel before the activation.
    """

    def __init__(self, channels: int, taps: int = 4, *, bias: bool = False) -> None:
        super().__init__()
        if channels < 1 or taps < 2:
            raise ValueError(f"ShortConvolution: got {channels} channels and {taps} taps, expected >= 1 and >= 2")
        self.taps = taps
        # The start that nn.Conv1d has: the variance of a uniform number within +- taps ** -0.5.
        self.weight = nn.Parameter(torch.empty(channels, 1, taps).uniform_(-(taps**-0.5), taps**-0.5))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None

    @property
    def tail_shape(self) -> tuple[int, int]:
        """Shape a sequence of what the state keeps: the last rows and their channels."""
        return self.taps - 1, self.weight.shape[0]

    def forward(self, x: Tensor, tail: Tensor | None = None, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Filter the new rows ``x`` ``(b, m, channels)`` that follow those of ``tail`` ``(b, taps - 1, channels)``.

        ``tail`` None is the start of the sequences. ``lengths``, int64 ``(b,)``, says how many rows of each sequence
        there are; the others come last and are left out of the tail.

        Returns
        -------
        y: (b, m, channels).
        tail: (b, taps - 1, channels), for the next call.
        """
        before = x.new_zeros(x.shape[0], *self.tail_shape) if tail is None else tail
        if not x.shape[1]:
            return x, before
        rows = torch.cat([before, x], 1)
        y = F.silu(F.conv1d(rows.mT, self.weight, self.bias, groups=len(self.weight))).mT
        if lengths is None:
            return y, rows[:, rows.shape[1] - before.shape[1] :]
        last = lengths[:, None] + torch.arange(before.shape[1], device=x.device)
        return y, rows.gather(1, last[..., None].expand_as(before))
