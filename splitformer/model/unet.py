"""The authors' U-Net variant of the encoder (`Early_zipformer` in their code): stacks of layers at lower frame rates.

A module of its own, not a conf of `Encoder`: frames are halved once before the layers and once behind them, the stacks
lie one after the other instead of beside a block, and there is one exit, because in between the frame rate changes.
"""

from __future__ import annotations

from collections.abc import Generator

import torch
from torch import Tensor, nn

from splitformer.config import ModelConfig
from splitformer.model.cmvn import make_cmvn
from splitformer.model.conformer import frame_masks
from splitformer.model.encoder import ExitOutput, every_nth, make_layer, repeat_frames, sinusoidal_positions


class UNetEncoder(nn.Module):
    """A convolution of stride 2, Conformer layers, then for each stack: every nth frame, its layers, each frame n
    times, added to the stack's input; at the end every second frame.

    T feature frames give ceil(floor((T - 1) / 2) / 2), as many as `subsampled_lengths` says or one more.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.exit_layers = config.exit_layers
        self.cmvn = make_cmvn(config)
        self.subsampling = nn.Conv1d(config.num_mel_bins, config.d_model, kernel_size=3, stride=2)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList([make_layer(config) for _ in range(config.num_layers)])
        first = config.num_layers - sum(config.unet_stacks)
        self.stacks = [(1, range(first))]
        """(one frame in so many, places of its layers)"""
        for size, factor in zip(config.unet_stacks, config.unet_factors, strict=True):
            self.stacks.append((factor, range(first, first + size)))
            first += size

    def forward(self, x: Tensor, x_lens: Tensor) -> Generator[ExitOutput, Tensor | None, None]:
        """As `Encoder.forward`; there is nothing to go on to behind the one exit."""
        lengths = torch.div(x_lens - 1, 2, rounding_mode="floor").clamp(min=0)
        x = self.subsampling(self.cmvn(x, x_lens).transpose(1, 2)).transpose(1, 2)
        x = self.dropout(x.float() + sinusoidal_positions(x))  # the residual stream stays float32 under autocast
        for factor, places in self.stacks:
            y = x[:, ::factor]
            masks = frame_masks(every_nth(lengths, factor), y)
            for place in places:
                y = self.layers[place](y, *masks)
            # the layers before the stacks run at full rate and are not added to their input
            x = y if factor == 1 else x + repeat_frames(y, factor, x.size(1))
        yield ExitOutput(self.exit_layers[-1], x[:, ::2], every_nth(lengths, 2))
