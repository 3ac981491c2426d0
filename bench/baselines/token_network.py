"""A transformer of tokens in plain torch, called as models of `transformers` are."""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Sizes(NamedTuple):
    """length: N tokens; size: V ids, of which the last one is the mask."""

    length: int
    size: int
    width: int
    depth: int
    heads: int


class Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(*qkv).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class TokenNetwork(nn.Module):
    """Random weights; logits of a spread as a trained model's, hardly ever the mask."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        length, size, width, depth, heads = sizes
        self.config = SimpleNamespace(vocab_size=size, mask_token_id=size - 1, max_position_embeddings=length)
        self.embed, self.place = nn.Embedding(size, width), nn.Parameter(torch.randn(length, width))
        self.layers = nn.Sequential(*(Layer(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, size)
        nn.init.normal_(self.head.weight, std=4 * width**-0.5)
        nn.init.constant_(self.head.bias[-1:].data, -100.0)
        self.eval().requires_grad_(False)

    def get_output_embeddings(self) -> nn.Linear:
        return self.head

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.norm(self.layers(self.embed(input_ids) + self.place)))


def random_network(sizes: Sizes) -> TokenNetwork:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return TokenNetwork(sizes)
