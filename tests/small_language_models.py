"""Small models with random weights that are called as published diffusion language models are."""

from types import SimpleNamespace

import torch
from torch import nn

SIZE, LENGTH, MASK, END = 24, 10, 20, 21


class Network(nn.Module):
    """A bidirectional transformer of one layer with rotary positions. forward: hidden states (B, N, d)."""

    def __init__(self, size, width=16, heads=2):
        super().__init__()
        self.heads = heads
        self.embed, self.norm = nn.Embedding(size, width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        nn.init.normal_(self.embed.weight)
        nn.init.normal_(self.qkv.weight)

    def forward(self, tokens, attention_mask=None, positions=None, shift=0.0):
        x = self.embed(tokens) + shift
        q, k, v = (each.unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in self.qkv(x).chunk(3, -1))
        positions = torch.arange(tokens.shape[1]).expand_as(tokens) if positions is None else positions
        q, k = (rotated(each, positions[:, None, :, None]) for each in (q, k))
        y = nn.functional.scaled_dot_product_attention(q, k, v, attention_mask)
        return self.norm(x + self.out(y.transpose(1, 2).flatten(2)))


def rotated(x, positions):
    """Rotate pairs (i, i + d / 2) of the last dimension by angles that grow with the position."""
    half = x.shape[-1] // 2
    angle = positions.to(x.dtype) * 100.0 ** (-torch.arange(half, dtype=x.dtype) / half)
    a, b = x.chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)


class LanguageModel(nn.Module):
    """Base class. kind: `config.model_type`; facts: more of the configuration."""

    kind = ""

    def __init__(self, **facts):
        super().__init__()
        torch.manual_seed(0)
        self.config = SimpleNamespace(model_type=self.kind, vocab_size=SIZE, **facts)
        self.network, self.lm_head = Network(SIZE), nn.Linear(16, SIZE)
        nn.init.normal_(self.lm_head.weight)
        self.eval()

    def get_output_embeddings(self):
        return self.lm_head


class LLaDALike(LanguageModel):
    """Takes the mask (B, N) of tokens to attend to; pads with the end of a text."""

    kind = "llada"

    def __init__(self):
        super().__init__(mask_token_id=MASK, pad_token_id=END, eos_token_id=END, max_sequence_length=32)

    def forward(self, input_ids, inputs_embeds=None, attention_mask=None, attention_bias=None):
        assert inputs_embeds is None
        assert attention_bias is None
        if attention_mask is not None and 0.0 in attention_mask:
            lowest = torch.finfo(torch.float32).min
            attention_mask = (1.0 - attention_mask[:, None, None, :].float()) * lowest
            attention_mask = attention_mask.to(self.lm_head.weight.dtype)  # as LLaDA casts it to that of queries
        else:
            attention_mask = None
        return SimpleNamespace(logits=self.lm_head(self.network(input_ids, attention_mask)))


class DreamLike(LanguageModel):
    """Its logits at a position are those of the next one; takes a mask of pairs, and positions."""

    kind = "Dream"

    def __init__(self):
        super().__init__(mask_token_id=MASK, pad_token_id=END, eos_token_id=END, max_position_embeddings=32)

    def forward(self, input_ids, attention_mask=None, position_ids=None):
        batch, length = input_ids.shape
        if attention_mask is not None:
            assert attention_mask.dtype == torch.bool
            assert attention_mask.shape == (batch, 1, length, length)
        return SimpleNamespace(logits=self.lm_head(self.network(input_ids, attention_mask, position_ids)))


class MDLMLike(LanguageModel):
    """Returns logits as they are, also of the mask, the last id; needs timesteps, and knows no mask of attention."""

    kind = "mdlm"

    def __init__(self, time_conditioning=False):
        super().__init__(time_conditioning=time_conditioning, model_length=LENGTH)

    def get_output_embeddings(self):
        return None

    def forward(self, input_ids=None, timesteps=None, output_hidden_states=None, return_dict=None):
        sigma = timesteps if self.config.time_conditioning else torch.zeros_like(timesteps)
        return self.lm_head(self.network(input_ids, shift=sigma[:, None, None]))
