"""Parameters and multiply-accumulates per exit, compared with sums by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from splitformer.config import ModelConfig
from splitformer.model.asr import AsrModel
from splitformer.model.complexity import complexity, transducer_heads
from splitformer.model.encoder import ExitOutput

SECONDS = 10
T0 = 1000  # feature frames
T1 = 499  # (1000 - 3) // 2 + 1
T2 = 249  # (499 - 3) // 2 + 1: encoder frames


def conformer_macs(t: int, d: int, f: int, k: int) -> int:
    """Two feed-forwards, in and out projections of attention, its two products, the convolution module."""
    feed_forwards = 2 * (t * d * f + t * f * d)
    attention = t * d * 3 * d + t * t * d + t * t * d + t * d * d
    convolution = t * d * 2 * d + t * d * k + t * d * d
    return feed_forwards + attention + convolution


def conformer_parameters(d: int, f: int, k: int) -> int:
    norm = 2 * d
    feed_forward = norm + (d * f + f) + (f * d + d)
    attention = norm + (d * 3 * d + 3 * d) + (d * d + d)
    convolution = norm + (d * 2 * d + 2 * d) + (d * k + d) + norm + (d * d + d)
    return 2 * feed_forward + attention + convolution + norm


def published(parallel_exits: tuple[int, ...]) -> AsrModel:
    return AsrModel(ModelConfig(parallel_exits=parallel_exits))


@pytest.mark.parametrize("parallel_exits", [(), (2, 12)])
def test_the_published_systems(parallel_exits: tuple[int, ...]) -> None:
    model = published(parallel_exits)
    c, d, f, k, v = 80, 256, 2048, 31, 256
    costs = complexity(model.encoder, model.ctc_heads, c, SECONDS)
    assert list(costs) == [2, 4, 6, 8, 10, 12]
    head = d * v + v
    for layer, cost in costs.items():
        branches = sum(exit_layer <= layer for exit_layer in parallel_exits)
        front_end = T1 * d * c * 3 + T2 * d * d * 3
        macs = front_end + layer * conformer_macs(T2, d, f, k) + T2 * d * v
        macs += branches * conformer_macs((T2 + 1) // 2, d, f, k)
        parameters = (c * d * 3 + d) + (d * d * 3 + d) + head
        parameters += (layer + branches) * conformer_parameters(d, f, k)
        assert cost.layer == layer
        assert cost.macs_per_second == macs / SECONDS
        assert cost.parameters == parameters
    # the last exit runs everything except the heads of other exits
    everything = sum(p.numel() for p in model.parameters())
    assert everything == (36_683_264 if parallel_exits else 31_536_128)
    assert costs[12].parameters == everything - 5 * head


def test_conv2d_front_end_and_gate() -> None:
    config = ModelConfig(
        subsampling="conv2d", subsampling_channels=8, d_model=16, num_heads=2, feedforward_dim=32,
        conv_kernel=3, num_layers=2, exit_layers=(1, 2),
        parallel_exits=(2,), parallel_gate=True, vocab_size=10,
    )  # fmt: skip
    model = AsrModel(config)
    costs = complexity(model.encoder, model.ctc_heads, 80, SECONDS)
    c1, c2 = (80 - 1) // 2, ((80 - 1) // 2 - 1) // 2  # frequency bins after each convolution
    front_end = T1 * c1 * 8 * 9 + T2 * c2 * 8 * 8 * 9 + T2 * (c2 * 8) * 16
    head = T2 * 16 * 10
    layer = conformer_macs(T2, 16, 32, 3)
    assert costs[1].macs_per_second == (front_end + layer + head) / SECONDS
    branch = conformer_macs(125, 16, 32, 3)
    assert costs[2].macs_per_second == (front_end + 2 * layer + branch + head) / SECONDS
    # the gate's one scalar is counted with the branch
    assert costs[2].parameters - costs[1].parameters == 2 * conformer_parameters(16, 32, 3) + 1


def test_a_transducer_head_costs_a_joiner_and_a_decoder_per_frame() -> None:
    config = ModelConfig(
        d_model=16, num_heads=2, feedforward_dim=32, conv_kernel=3, num_layers=2, exit_layers=(1, 2), parallel_exits=(),
        vocab_size=10, heads=("transducer",), decoder_dim=12, joiner_dim=14, context_size=2,
    )  # fmt: skip
    model = AsrModel(config)
    costs = complexity(model.encoder, transducer_heads(model), 80, SECONDS)
    front_end = T1 * 16 * 80 * 3 + T2 * 16 * 16 * 3
    head = T2 * (16 * 14 + 12 * 2 + 12 * 14 + 14 * 10)
    layer = conformer_macs(T2, 16, 32, 3)
    assert [costs[n].macs_per_second for n in (1, 2)] == [(front_end + n * layer + head) / SECONDS for n in (1, 2)]
    # all exits share the decoder; the joiner of the other exit is not counted
    joiner = sum(p.numel() for p in model.joiner(1).parameters())
    assert costs[2].parameters == sum(p.numel() for p in model.parameters()) - joiner


def test_measuring_does_not_change_the_model() -> None:
    model = published(())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    complexity(model.encoder, model.ctc_heads, 80, seconds=1.0)
    assert model.training and all(module.training for module in model.encoder.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


class Recurrent(nn.Module):
    """An encoder with a layer that cannot be counted."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(80, 4, batch_first=True)

    def forward(self, x: torch.Tensor, x_lens: torch.Tensor):
        yield ExitOutput(1, self.lstm(x)[0], x_lens)


def test_an_unknown_kind_of_layer_is_an_error() -> None:
    with pytest.raises(TypeError, match="LSTM has a weight matrix"):
        complexity(Recurrent(), {"1": nn.Linear(4, 2)}, 80)
