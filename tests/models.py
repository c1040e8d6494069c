"""Small models with random weights."""

from __future__ import annotations

import torch

from splitformer.config import ModelConfig
from splitformer.model.asr import AsrModel

SMALL = ModelConfig(
    num_mel_bins=20,
    vocab_size=11,
    d_model=24,
    num_heads=4,
    feedforward_dim=48,
    conv_kernel=7,
    num_layers=4,
    exit_layers=(2, 3, 4),
    parallel_exits=(2, 4),
)


def build(config):
    """A model with random weights everywhere, also in what starts at zero or one."""
    torch.manual_seed(1)
    model = AsrModel(config).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "running_mean" in name or name.endswith("gate"):
                tensor.normal_()
            elif "running_var" in name or name.endswith("deviation"):
                tensor.uniform_(0.5, 2.0)
    return model
