"""The loss at every exit, compared with an enumeration of all alignments."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch

from splitformer.config import LossConfig
from splitformer.losses.multi_exit import MultiExitLoss
from splitformer.model.asr import AsrModel
from tests.models import SMALL


def brute_force(log_probs, labels):
    """-log of the summed probability of every alignment that collapses to `labels`."""
    frames, vocab = log_probs.shape
    total = 0.0
    for path in itertools.product(range(vocab), repeat=frames):
        collapsed = [token for token, _ in itertools.groupby(path) if token != 0]
        if collapsed == labels:
            total += math.exp(sum(float(log_probs[t, token]) for t, token in enumerate(path)))
    return -math.log(total)


@pytest.mark.parametrize("weights", [(), (1.0, 0.0, 3.0)])
def test_loss_equals_enumeration_at_every_exit(weights):
    torch.manual_seed(5)
    model = AsrModel(dataclasses.replace(SMALL, vocab_size=3, dropout=0.0)).eval()
    loss = MultiExitLoss(model, LossConfig(exit_weights=weights))
    x, x_lens = torch.randn(3, 27, 20), torch.tensor([27, 19, 23])  # 6, 4 and 5 output frames
    labels = [[1, 2, 1], [2, 2], [1]]
    y = torch.tensor([[1, 2, 1], [2, 2, 0], [1, 0, 0]])
    result = loss(x, x_lens, y, torch.tensor([3, 2, 1]))
    expected = []
    for exit_output, log_probs in model(x, x_lens):
        losses = [brute_force(log_probs[i, : int(exit_output.lengths[i])].detach(), labels[i]) for i in range(3)]
        expected.append(sum(losses) / 6)
    assert result.per_exit.tolist() == pytest.approx(expected, rel=1e-4)
    shares = weights or (1.0, 1.0, 1.0)
    total = sum(w * e for w, e in zip(shares, expected, strict=True)) / sum(shares)
    assert float(result.total) == pytest.approx(total, rel=1e-4)


def test_the_loss_adds_no_parameters_to_the_model():
    model = AsrModel(SMALL)
    names = {name.removeprefix("model.") for name in MultiExitLoss(model, LossConfig()).state_dict()}
    assert names == set(model.state_dict())
