"""A mixture of two Gaussians whose velocity is known exactly."""

import torch

from ipr_fast import PatchGrid, Prediction

MEAN = STD = 1.0


class ExactDenoiser:
    """The exact velocity for samples of four patches of one value each, in equal parts N(+m, s^2) and N(-m, s^2).

    Given the component c, the posterior mean of a value is x_c = m_c + (1 - t) s^2 / var (z - (1 - t) m_c), with
    var = ((1 - t) s)^2 + t^2; a component's weight is proportional to the product over all patches of
    N(z; (1 - t) m_c, var). The velocity is u = E[eps - x | z] = (z - E[x | z]) / t.
    """

    grid = PatchGrid(1, 2, 2, 1)
    means = torch.tensor([-MEAN, MEAN])

    def __call__(self, patches, levels, active=None):
        if active is not None:
            levels = active.scatter(levels, self.grid.num_patches)
        t = levels[..., None]  # (B, N, 1)
        residual = patches - (1 - t) * self.means  # (B, N, component)
        var = ((1 - t) * STD) ** 2 + t**2
        weight = (-(residual**2) / (2 * var)).sum(1, keepdim=True).softmax(-1)
        x = (weight * (self.means + (1 - t) * STD**2 / var * residual)).sum(-1, keepdim=True)
        prediction = Prediction(torch.where(t > 0, (patches - x) / t.clamp(min=1e-9), 0.0))
        return prediction if active is None else prediction.at(active)


def draw(count, seed=0):
    """Exact samples (B, 1, 2, 2)."""
    generator = torch.Generator().manual_seed(seed)
    component = 2.0 * torch.randint(2, (count, 1, 1, 1), generator=generator) - 1
    return MEAN * component + STD * torch.randn(count, 1, 2, 2, generator=generator)
