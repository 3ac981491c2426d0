"""Inputs of partial attention: the active tokens' own keys and values, and a cache of the context's."""

from typing import NamedTuple

import torch
from torch import Tensor

from ipr_fast.kernels.context_mask import context_mask
from ipr_fast.sampling.patches import ActivePatches


class AttentionCase(NamedTuple):
    """Arguments of `partial_attention` but for the heads; keys_values (B, N, 2 W) are what it should attend to."""

    q: Tensor
    own: Tensor
    cache: Tensor
    slot: Tensor
    place: Tensor
    keys_values: Tensor

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        """The arguments, with a cache of their own: a twin writes to it."""
        return self.q, self.own, self.cache.clone(), self.slot, self.place

    @property
    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, *self.keys_values.chunk(2, dim=-1)


def attention_case(
    batch: int, slots: int, tokens: int, width: int, generator: torch.Generator, device="cpu", dtype=torch.float32
) -> AttentionCase:
    """Make a case in which chains have between 0 and `slots` active tokens; what must not be read is NaN."""
    count = torch.randint(0, slots + 1, (batch, 1), generator=generator)
    count[0] = slots
    mask = torch.rand(batch, tokens, generator=generator).argsort(1).argsort(1) < count
    active = ActivePatches.from_mask(mask.to(device), slots)
    qkv = torch.randn(batch, slots, 3 * width, generator=generator).to(device, dtype)  # q is a slice, as in the network
    keys_values = torch.randn(batch, tokens, 2 * width, generator=generator).to(device, dtype)
    slot = torch.empty(batch, tokens + 1, dtype=torch.int32, device=device)
    context_mask(active.index, active.count, slot, dtype)
    place = active.rows(tokens)
    cache = torch.full((batch * tokens + 1, 2 * width), torch.nan, dtype=dtype, device=device)
    cache[:-1] = keys_values.flatten(0, 1).masked_fill(mask.to(device).flatten()[:, None], torch.nan)
    whole = torch.cat([keys_values.flatten(0, 1), cache[-1:]])
    whole[place.flatten()] = qkv[..., width:].flatten(0, 1)
    return AttentionCase(qkv[..., :width], qkv[..., width:], cache, slot, place, whole[:-1].view_as(keys_values))
