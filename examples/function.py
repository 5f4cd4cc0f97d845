"""Attention as a function: grouped heads, a combined mask, and the reason why a backend runs."""

import torch

import attnkit

q = torch.randn(1, 8, 1000, 64)  # (batch, query heads, queries, head size)
k, v = torch.randn(2, 1, 2, 1000, 64)  # two KV heads, each read by four query heads
mask = attnkit.causal() & (attnkit.window(128) | attnkit.global_tokens(4))
print(mask)
print(attnkit.explain(attnkit.softmax_attention, q, k, v, mask=mask))
o = attnkit.softmax_attention(q, k, v, mask=mask)
print(o.shape)
