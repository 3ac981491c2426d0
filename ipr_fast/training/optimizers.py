"""Optimisers of a training run."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from ipr_fast.models.partial_transformer import PartialTransformer

OPTIMIZERS = ("adamw", "muon")
ADAM_BETAS = (0.9, 0.99)
MUON_MOMENTUM = 0.95


def make_optimizers(
    name: str, model: PartialTransformer, head: nn.Module | None, *, rate: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """Return the optimisers of a model and its symbol head: AdamW, or Muon for the layers' matrices before it.

    Muon orthogonalises each matrix's momentum, that of queries, keys and values as one, and scales it to the size of
    AdamW's updates, so both take one learning rate. Raises ValueError for Muon with torch < 2.9.
    Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers"; the scale of Liu et al. 2025, arXiv 2502.16982.
    """
    matrices = [p for layer in model.layers for p in layer.parameters() if p.ndim == 2] if name == "muon" else []
    in_muon = {id(p) for p in matrices}
    trained: Iterable[nn.Parameter] = (*model.parameters(), *(head.parameters() if head is not None else ()))
    others = [p for p in trained if id(p) not in in_muon]
    adamw = torch.optim.AdamW(others, lr=rate, betas=ADAM_BETAS, weight_decay=weight_decay, fused=True)
    if name != "muon":
        return [adamw]
    if not hasattr(torch.optim, "Muon"):
        raise ValueError(f"optimizer: muon needs torch >= 2.9, got torch {torch.__version__}")
    muon = torch.optim.Muon(
        matrices, lr=rate, weight_decay=weight_decay, momentum=MUON_MOMENTUM, adjust_lr_fn="match_rms_adamw"
    )
    return [muon, adamw]
