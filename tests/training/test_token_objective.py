"""The objective of tokens."""

import math

import pytest
import torch
from small_models import TINY_TOKENS, randomise

from ipr_fast.models import TokenTransformer
from ipr_fast.tasks.token_sudoku import TokenSudoku
from ipr_fast.training.configs import config_of
from ipr_fast.training.objective import sample_roles
from ipr_fast.training.token_objective import TokenBatch, TokenObjective, sample_masked


def test_as_many_active_positions_are_masked_in_any_state_of_a_regeneration(generator):
    is_active = torch.arange(16) < torch.tensor([[1], [8], [16]]).repeat_interleave(8000, 0)
    masked = sample_masked(is_active, generator)
    assert not (masked & ~is_active).any()
    for count, rows in zip((1, 8, 16), masked.split(8000), strict=True):
        number = rows.sum(1).bincount(minlength=17)[1:]
        assert (number[count:] == 0).all()
        assert rows.any(1).all()
        assert (number[:count] / 8000 - 1 / count).abs().max() < 5 * 0.5 / 8000**0.5
        assert (rows[:, :count].float().mean(0) - (count + 1) / (2 * count)).abs().max() < 5 * 0.5 / 8000**0.5


def test_the_loss_is_the_cross_entropy_of_the_masked_positions(generator):
    task = TokenSudoku(4)
    model = randomise(TokenTransformer(config_of(task)), seed=0)
    objective = TokenObjective(task, model)
    batch = objective.draw(8, generator)
    tokens, is_active, is_masked = batch
    assert task.judge()(tokens).good.all()
    seen = tokens.masked_fill(is_masked, 0)
    chosen = model.predict(seen, is_active).logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    loss = objective.losses(batch)
    assert loss.cross_entropy.item() == pytest.approx(-chosen[is_masked].mean().item(), rel=1e-5)
    assert objective.total(loss) is loss.cross_entropy


def test_a_new_model_knows_nothing_and_every_weight_gets_a_gradient(generator):
    model = TokenTransformer(TINY_TOKENS)
    objective = TokenObjective(TokenSudoku(4), model)
    tokens = torch.randint(1, 6, (16, 16), generator=generator)
    is_active = sample_roles(16, 16, generator)
    batch = TokenBatch(tokens, is_active, sample_masked(is_active, generator))
    assert objective.losses(batch).cross_entropy.item() == pytest.approx(math.log(6), rel=1e-6)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    objective.losses(batch).cross_entropy.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
