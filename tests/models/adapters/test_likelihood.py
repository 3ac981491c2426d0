"""The log-likelihood of text as a reward: against a loop, as an acceptance rule, from the command line."""

import math
import sys

import numpy as np
import pytest
import torch
from small_token_models import Lookup

from ipr_fast import Metropolis, TokenSchedule, generate_batch, random_patches, refine_batch
from ipr_fast.cli.main import main
from ipr_fast.models.adapters.likelihood import Likelihood
from ipr_fast.sampling.guidance.best_of import BestOfN

transformers = pytest.importorskip("transformers")
SIZE = 12


@pytest.fixture(scope="module")
def network():
    """A GPT-2 of random weights, larger than usual so that its predictions differ."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=SIZE, n_positions=16, n_embd=16, n_layer=2, n_head=2, initializer_range=0.5
    )
    return transformers.GPT2LMHeadModel(config).eval().requires_grad_(False)


@pytest.fixture
def tokens():
    return torch.randint(0, SIZE - 1, (5, 9), generator=torch.Generator().manual_seed(2))


def looped(network, row, first):
    """The log-likelihood of one sequence from position `first` on, token by token."""
    total = 0.0
    for at in range(first, len(row)):
        logits = network(input_ids=row[None, :at]).logits[0, -1]
        total += float(logits.double().log_softmax(0)[row[at]])
    return total


def test_it_is_the_sum_of_the_tokens_log_probabilities(network, tokens):
    found = Likelihood(network)(tokens)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx([looped(network, row, 1) for row in tokens], rel=1e-5)
    loss = network(input_ids=tokens, labels=tokens).loss
    assert float(found.mean() / 8) == pytest.approx(-float(loss), rel=1e-5)
    assert torch.equal(Likelihood(network, rows=2)(tokens[:2]), found[:2])
    torch.testing.assert_close(Likelihood(network, rows=2)(tokens), found, rtol=1e-5, atol=0)
    torch.testing.assert_close(Likelihood(network, mean=True)(tokens), found / 8)
    assert Likelihood(network)(tokens[:0]).shape == (0,)


def test_prompts_a_start_and_padding(network, tokens):
    given = Likelihood(network, prompt_length=4)(tokens)
    assert given.tolist() == pytest.approx([looped(network, row, 4) for row in tokens], rel=1e-5)
    begun = torch.cat([torch.full((5, 1), 3), tokens], 1)
    found = Likelihood(network, start_id=3)(tokens)
    assert found.tolist() == pytest.approx([looped(network, row, 1) for row in begun], rel=1e-5)
    padded, pad = tokens.clone(), SIZE - 1
    padded[0, 6:] = pad
    padded[1, 3] = pad  # within the text
    padded[2] = pad
    lengths = [6, 9, 0, 9, 9]
    expected = [looped(network, row[:n], 1) for row, n in zip(padded, lengths, strict=True)]
    assert Likelihood(network, pad_id=pad)(padded).tolist() == pytest.approx(expected, rel=1e-5)
    per_token = [each / max(1, n - 1) for each, n in zip(expected, lengths, strict=True)]
    assert Likelihood(network, pad_id=pad, mean=True)(padded).tolist() == pytest.approx(per_token, rel=1e-5)


def test_tokens_of_another_tokenizer_are_translated(network, tokens):
    def doubled(x):
        return torch.stack([x, (x + 1) % SIZE], 2).flatten(1)[:, :16]

    expected = [looped(network, row, 1) for row in doubled(tokens)]
    assert Likelihood(network, translate=doubled)(tokens).tolist() == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match=r"^translate must be int64 \(5, M\), got \(5, 9\) of torch.float32"):
        Likelihood(network, translate=torch.Tensor.float)(tokens)


def test_refinement_and_guidance_raise_it(network):
    reward, options = Likelihood(network), {"model": Lookup(), "schedule": TokenSchedule(order="random")}
    x = generate_batch(40, **options)
    accept = Metropolis(reward, 0.5)
    refined = refine_batch(x, random_patches(0.3), 6, accept=accept, **options)
    assert reward(refined).mean() > reward(x).mean() + 3
    torch.testing.assert_close(accept.last.reward, reward(refined), rtol=1e-5, atol=1e-5)
    assert reward(generate_batch(40, guidance=BestOfN(reward, 4), **options)).mean() > reward(x).mean() + 3


def test_the_command_line_takes_it(network, tmp_path, monkeypatch, capsys):
    """The user's module makes the reward of a saved model."""
    network.save_pretrained(tmp_path / "gpt")
    (tmp_path / "text_rewards.py").write_text(
        "from small_token_models import Lookup\n"
        "from transformers import AutoModelForCausalLM\n\n"
        "from ipr_fast.models.adapters.likelihood import Likelihood\n\n"
        "likelihood = Likelihood(AutoModelForCausalLM.from_pretrained('gpt').eval())\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    np.save("x.npy", generate_batch(6, model=Lookup()).numpy())
    options = ["--accept", "text_rewards:likelihood", "--iters", "3", "--model", "text_rewards:Lookup", "--quiet"]
    assert main(["refine", "x.npy", *options, "--out", "y.npy"]) == 0
    before, after = (Likelihood(network)(torch.from_numpy(np.load(name))) for name in ("x.npy", "y.npy"))
    assert (after >= before - 1e-4).all()
    assert after.mean() > before.mean()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"start_id": SIZE}, r"^start_id must be an int in 0..11, got 12"),
        ({"pad_id": -1}, r"^pad_id must be an int in 0..11, got -1"),
        ({"prompt_length": -1}, r"^prompt_length must be an int >= 0, got -1"),
        ({"rows": 0}, r"^rows must be an int >= 1, got 0"),
        ({"mean": 1}, r"^mean must be a bool, got 1"),
        ({"translate": 3}, r"^translate must be callable, got int"),
    ],
)
def test_bad_settings_are_refused(arguments, message, network):
    with pytest.raises(ValueError, match=message):
        Likelihood(network, **arguments)


def test_what_it_cannot_score_is_named(network, tokens):
    with pytest.raises(ValueError, match=r"^model must be an nn.Module with a `config`, got function"):
        Likelihood(lambda x: x)
    with pytest.raises(ValueError, match=r"^tokens must be in 0..11 for GPT2LMHeadModel, got 0..\d+; translate= "):
        Likelihood(network)(tokens * 3)
    with pytest.raises(ValueError, match=r"^tokens must be int64 \(5, M\), got \(5, 9\) of torch.float32"):
        Likelihood(network)(tokens.float())
    network.train()
    try:
        with pytest.raises(ValueError, match=r"is in training mode"):
            Likelihood(network)(tokens)
    finally:
        network.eval()


def test_a_likelihood_of_zero_is_minus_infinity(network, tokens):
    class Certain(torch.nn.Module):
        config = network.config

        def forward(self, input_ids):
            logits = torch.full((*input_ids.shape, SIZE), -math.inf)
            logits[..., 0] = 0.0
            return logits

    found = Likelihood(Certain())(torch.tensor([[1, 0, 0], [0, 1, 0]]))
    assert found.tolist() == [0.0, -math.inf]


def test_a_sequence_that_is_all_prompt_is_refused(network, tokens):
    with pytest.raises(ValueError, match=r"^prompt_length must be less than the 9 tokens of a sequence, got 9"):
        Likelihood(network, prompt_length=9)(tokens)
