"""Grids of every dimension, a grid of the user's own, and a denoiser of any of them."""

import torch
from torch import nn

from ipr_fast import PatchGrid, Prediction


class Rings:
    """A user's own grid: the pixels of a 4x4 image in two patches, the border's eight that alternate and the rest."""

    sample_shape, grid_shape, num_patches, patch_numel = (1, 4, 4), (2,), 2, 8
    order = torch.tensor([0, 2, 4, 7, 8, 11, 13, 15, 1, 3, 5, 6, 9, 10, 12, 14])

    def to_patches(self, images):
        return images.flatten(-3)[..., self.order].unflatten(-1, (2, 8))

    def to_images(self, patches):
        return patches.flatten(-2)[..., self.order.argsort()].unflatten(-1, (1, 4, 4))


GRIDS = {
    "1-D": PatchGrid.of((2, 12), 3),
    "2-D": PatchGrid(1, 4, 9, (2, 3)),
    "3-D": PatchGrid.of((1, 4, 4, 6), (2, 2, 3)),
    "user's": Rings(),
}


class AnyGrid(nn.Module):
    """A denoiser of two layers of any grid's patches, in the order of their ids."""

    def __init__(self, grid) -> None:
        super().__init__()
        self.grid = grid
        self.layer, self.out = nn.Linear(grid.patch_numel + 1, 16), nn.Linear(16, 2 * grid.patch_numel)

    def forward(self, patches, levels, active=None):
        levels = levels if active is None else active.scatter(levels, self.grid.num_patches)
        hidden = self.layer(torch.cat([patches, levels[..., None]], dim=-1)).tanh()
        velocity, mix = self.out(hidden + hidden.mean(1, keepdim=True)).chunk(2, dim=-1)
        prediction = Prediction(velocity, mix.sigmoid())
        return prediction if active is None else prediction.at(active)
