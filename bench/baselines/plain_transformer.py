"""The PatchTransformer in plain torch operations, as in training: a baseline with the same weights.

Every call computes all tokens, with a mask as the rule of attention: no context cache and none of this project's
kernels, so torch.compile sees all of it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ipr_fast.models import PatchTransformer, Prediction
from ipr_fast.models.transformer_layers import EPS


class PlainTransformer(nn.Module):
    """Computes `model.predict(patches, levels, is_active)`, with the weights of `model`."""

    def __init__(self, model: PatchTransformer) -> None:
        super().__init__()
        self.inner, self.grid = model, model.grid

    def forward(self, patches: Tensor, levels: Tensor, is_active: Tensor) -> Prediction:
        """Predict all N patches; levels (B, N), 0 in the context; is_active (B, N) bool."""
        inner, numel = self.inner, self.grid.patch_numel
        position = torch.arange(patches.shape[1], device=patches.device)
        role = inner.role(is_active.long())
        h = inner.patch_in(patches.to(inner.patch_in.weight.dtype)) + inner.position(position) + role
        condition = F.silu(inner.condition(levels) + role)
        shared = inner.modulation(condition)
        may_attend = is_active[:, None, :, None] | ~is_active[:, None, None, :]
        for layer in inner.layers:
            scale, shift, gate, mlp_scale, mlp_shift, mlp_gate = (shared + layer.table).chunk(6, dim=-1)
            qkv = layer.qkv(_norm(h, scale, shift)).chunk(3, dim=-1)
            q, k, v = (x.unflatten(-1, (layer.num_heads, -1)).transpose(1, 2) for x in qkv)
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=may_attend).transpose(1, 2).flatten(2)
            h = torch.addcmul(h, gate, layer.attention_out(attended))
            hidden = F.gelu(layer.mlp_in(_norm(h, mlp_scale, mlp_shift)), approximate="tanh")
            h = torch.addcmul(h, mlp_gate, layer.mlp_out(hidden))
        scale, shift = inner.modulation_out(condition).chunk(2, dim=-1)
        velocity, mix, log_variance = inner.patch_out(_norm(h, scale, shift)).split((numel, numel, 1), dim=-1)
        return Prediction(velocity, mix.sigmoid(), log_variance.squeeze(-1))


def _norm(h: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return torch.addcmul(shift, F.layer_norm(h, h.shape[-1:], eps=EPS), 1 + scale)
