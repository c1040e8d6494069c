"""The U-Net variant behaves like the encoder; test_released holds it against the authors' code."""

from __future__ import annotations

import pytest
import torch

from splitformer.config import ModelConfig
from splitformer.model.asr import AsrModel
from splitformer.model.complexity import complexity
from splitformer.model.subsampling import MIN_FRAMES, subsampled_lengths

CONFIG = ModelConfig(
    num_mel_bins=20,
    vocab_size=11,
    d_model=24,
    num_heads=4,
    feedforward_dim=48,
    conv_kernel=7,
    encoder="unet",
    unet_stacks=(1, 2, 1),
    unet_factors=(2, 8, 2),
    num_layers=5,
    exit_layers=(5,),
    parallel_exits=(),
)


@pytest.fixture
def model():
    torch.manual_seed(1)
    return AsrModel(CONFIG).eval()


def test_the_output_for_an_utterance_does_not_depend_on_the_batch_and_its_padding(model):
    frames = [203, 201, 199, 53, 40, MIN_FRAMES]
    batch = torch.randn(len(frames), max(frames), 20) * 100  # padding holds anything
    with torch.no_grad():
        [(together, log_probs)] = model(batch, torch.tensor(frames))
        for row, n in enumerate(frames):
            [(alone, expected)] = model(batch[row : row + 1, :n], torch.tensor([n]))
            length = int(alone.lengths)
            assert length == int(together.lengths[row]) == expected.size(1)
            # the filter of training data never assumes more frames than there are
            assert int(subsampled_lengths(torch.tensor(n))) <= length <= int(subsampled_lengths(torch.tensor(n))) + 1
            torch.testing.assert_close(log_probs[row : row + 1, :length], expected, atol=1e-4, rtol=0)


def test_gradients_reach_every_layer(model):
    model.train()
    [(_, log_probs)] = model(torch.randn(2, 100, 20), torch.tensor([100, 60]))
    log_probs.square().sum().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]


def test_its_cost_depends_on_the_number_of_frames(model):
    """More frames in a stack cost more."""
    heads = model.ctc_heads
    cost = complexity(model.encoder, heads, 20)[5]
    assert cost.parameters == sum(p.numel() for p in model.parameters())
    slow = AsrModel(ModelConfig(**{**CONFIG.__dict__, "unet_factors": (2, 2, 2)}))
    assert complexity(slow.encoder, heads, 20)[5].macs_per_second > cost.macs_per_second
