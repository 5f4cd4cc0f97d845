"""Attention as a layer: a frozen configuration, then a module like any other."""

import torch

import attnkit
from attnkit.mechanisms.softmax import SoftmaxAttention, SoftmaxConfig
from attnkit.positions import Rotary

config = SoftmaxConfig(width=256, heads=8, kv_heads=2, mask=attnkit.window(64), rotary=Rotary(head_size=32))
layer = SoftmaxAttention(config)
x = torch.randn(4, 100, 256)  # (batch, tokens, width)
y = layer(x)
y.square().mean().backward()
print(y.shape, sum(p.numel() for p in layer.parameters()), "parameters")
