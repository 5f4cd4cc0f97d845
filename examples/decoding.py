"""Decoding with a cache: the state goes in and comes out, and the rows are those of one pass over everything."""

import torch

from attnkit.mechanisms.softmax import SoftmaxAttention, SoftmaxConfig

layer = SoftmaxAttention(SoftmaxConfig(width=256, heads=8, kv_heads=2)).eval()
x = torch.randn(1, 20, 256)
with torch.no_grad():
    state = layer.state(batch=1, capacity=20)
    rows, state = layer.step(x[:, :16], state)  # the prompt at once
    for i in range(16, 20):  # then token by token
        row, state = layer.step(x[:, i : i + 1], state)
        rows = torch.cat([rows, row], dim=1)
    print(f"{(rows - layer(x)).abs().max():.1e} apart, {state.nbytes} bytes of cache")
