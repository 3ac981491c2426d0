"""Laws of chains over the states of `small_token_models.Oracle`, enumerated: its 81 sequences, and those with masks."""

import itertools

import torch
from small_token_models import Oracle


def metropolis(matrix, reward, temperature):
    """The law of the next state, of a proposal's transition matrix (S, S) and the states' rewards (S,)."""
    moves = matrix * acceptance(reward, temperature)
    moves.diagonal().zero_()
    return moves + torch.diag(1 - moves.sum(1))


def acceptance(reward, temperature):
    """The probabilities (S, S) of going from one state to another."""
    return ((reward[None, :] - reward[:, None]) / temperature).exp().clamp(max=1)


def stationary(matrix):
    """The stationary law of a transition matrix, by its powers."""
    for _ in range(40):
        matrix = matrix @ matrix
        matrix /= matrix.sum(1, keepdim=True)
    return matrix[0]


def tilted(law, reward, temperature):
    law = law * (reward / temperature).exp()
    return law / law.sum()


def distance(a, b):
    """The total variation between two laws."""
    return (a - b).abs().sum().item() / 2


def reward_of(states):
    """A reward without symmetries."""
    ends_alike = (states[..., 0] == states[..., 3]).double()
    return 0.3 * (states * torch.tensor([0.3, -0.5, 0.4, 0.2])).sum(-1).double() + 0.4 * ends_alike


class Partial:
    """The 256 states of an Oracle's sequences with masks, and the laws of steps between them.

    all (256, 4); reveal(m): (256, 256), m masked positions, chosen uniformly, are drawn at once; back(m): m revealed
    ones are masked; completion (256, 81): all masked ones are drawn at once.
    """

    def __init__(self, oracle: Oracle):
        self.oracle, self.all = oracle, torch.cartesian_prod(*[torch.arange(4)] * 4)
        self.seen = (self.all != 3).sum(1)
        law = oracle.conditionals(self.all)  # (256, 4, 3)
        kept = (self.all[:, None] == oracle.states) | (self.all[:, None] == 3)  # (256, 81, 4)
        share = torch.stack([law[:, i, oracle.states[:, i]] for i in range(4)], -1)
        share = torch.where(self.all[:, None] == 3, share, 1.0)
        self.completion = kept.all(-1) * share.prod(-1)
        self._share = law

    def reveal(self, number):
        """Reveal so many positions of every state that has as many masked ones."""
        return self._steps(number, lambda state, chosen: all(state[i] == 3 for i in chosen))

    def back(self, number):
        """Mask so many positions of every state that shows as many."""
        return self._steps(number, lambda state, chosen: all(state[i] != 3 for i in chosen))

    def _steps(self, number, fits):
        matrix = torch.zeros(256, 256, dtype=torch.float64)
        for row, state in enumerate(self.all.tolist()):
            sets = [c for c in itertools.combinations(range(4), number) if fits(state, c)]
            for chosen in sets:
                masks = state[chosen[0]] != 3
                for tokens in [(3,) * number] if masks else itertools.product(range(3), repeat=number):
                    after, share = list(state), 1 / len(sets)
                    for i, token in zip(chosen, tokens, strict=True):
                        after[i] = token
                        share *= 1.0 if masks else self._share[row, i, token].item()
                    matrix[row, self.place(after)] += share
        return matrix

    @staticmethod
    def place(state):
        return ((state[0] * 4 + state[1]) * 4 + state[2]) * 4 + state[3]

    def start(self):
        """The law (256,) of a generation before its first step."""
        law = torch.zeros(256, dtype=torch.float64)
        law[-1] = 1
        return law

    def finished(self, law):
        """The law (81,) of finished states (256,)."""
        return law[[self.place(state) for state in self.oracle.states.tolist()]]
