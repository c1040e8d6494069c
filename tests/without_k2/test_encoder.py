"""The encoder: size, padding, layers that are not run, exits of a truncated model, and the gate."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from splitformer.config import ModelConfig
from splitformer.model.asr import AsrModel
from splitformer.model.conformer import ConformerLayer, MaskedBatchNorm
from splitformer.model.subsampling import MIN_FRAMES, subsampled_lengths
from tests.models import SMALL, build

VARIANTS = {
    "splitformer": SMALL,
    "baseline": dataclasses.replace(SMALL, parallel_exits=()),
    "gated_conv2d_normalised": dataclasses.replace(
        SMALL, parallel_gate=True, subsampling="conv2d", cmvn="utterance"
    ),
}


@pytest.mark.parametrize(("parallel_exits", "parameters"), [((2, 12), 36_683_264), ((), 31_536_128)])
def test_published_sizes(parallel_exits, parameters):
    model = AsrModel(ModelConfig(parallel_exits=parallel_exits))
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_the_output_for_an_utterance_does_not_depend_on_the_batch_and_its_padding(config):
    model = build(config)
    # output lengths 50, 49, 1 (the smallest), 12 and 13: parallel branches see odd and even numbers of frames
    frames = [203, 199, MIN_FRAMES, 53, 55]
    lengths = [int(subsampled_lengths(torch.tensor(t))) for t in frames]
    assert {length % 2 for length in lengths} == {0, 1}
    utterances = [torch.randn(t, config.num_mel_bins) for t in frames]
    for padding in (0.0, -23.0259, 1000.0):
        x = torch.full((len(frames), max(frames) + 30, config.num_mel_bins), padding)
        for row, utterance in zip(x, utterances, strict=True):
            row[: len(utterance)] = utterance
        with torch.no_grad():
            batch = list(model(x, torch.tensor(frames)))
            for i, utterance in enumerate(utterances):
                alone = list(model(utterance.unsqueeze(0), torch.tensor([len(utterance)])))
                for (exit_batch, log_probs), (exit_alone, expected) in zip(batch, alone, strict=True):
                    assert exit_batch.layer == exit_alone.layer
                    assert int(exit_batch.lengths[i]) == int(exit_alone.lengths[0]) == expected.size(1)
                    torch.testing.assert_close(
                        log_probs[i, : lengths[i]], expected[0], atol=1e-4, rtol=0, msg=f"utterance {i}"
                    )


def test_iterating_to_the_first_exit_runs_two_of_twelve_layers():
    config = dataclasses.replace(SMALL, num_layers=12, exit_layers=(2, 4, 6, 8, 10, 12), parallel_exits=(2, 12))
    model = build(config)
    calls = []
    for name, module in model.encoder.named_modules():
        if isinstance(module, ConformerLayer):
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    exits = model.encoder(torch.randn(1, 100, 20), torch.tensor([100]))
    assert next(exits).layer == 2
    assert calls == ["layers.0", "layers.1", "parallel.2.layer"]
    assert next(exits).layer == 4
    assert calls[3:] == ["layers.2", "layers.3"]


def test_a_truncated_model_has_the_same_exits():
    full = build(SMALL)
    config = dataclasses.replace(SMALL, num_layers=3, exit_layers=(2, 3), parallel_exits=(2,))
    truncated = AsrModel(config).eval()
    missing = truncated.load_state_dict(full.state_dict(), strict=False).missing_keys
    assert missing == []
    x, x_lens = torch.randn(2, 90, 20), torch.tensor([90, 71])
    with torch.no_grad():
        for (_, expected), (_, log_probs) in zip(full(x, x_lens), truncated(x, x_lens), strict=False):
            assert torch.equal(log_probs, expected)


def test_a_gated_branch_starts_like_the_baseline_and_learns():
    torch.manual_seed(3)
    gated = AsrModel(dataclasses.replace(SMALL, parallel_gate=True, dropout=0.0))
    baseline = AsrModel(dataclasses.replace(SMALL, parallel_exits=(), dropout=0.0))
    baseline.load_state_dict(gated.state_dict(), strict=False)
    x, x_lens = torch.randn(2, 60, 20), torch.tensor([60, 50])
    for (_, a), (_, b) in zip(gated.eval()(x, x_lens), baseline.eval()(x, x_lens), strict=True):
        assert torch.equal(a, b)
    *_, (_, log_probs) = gated.train()(x, x_lens)
    log_probs[:, :, 1].sum().backward()
    assert gated.encoder.parallel["2"].gate.grad.abs() > 0


def test_batch_statistics_are_computed_over_valid_frames_only():
    torch.manual_seed(4)
    ours, reference = MaskedBatchNorm(6).train(), torch.nn.BatchNorm1d(6).train()
    x, lengths = torch.randn(3, 9, 6), [9, 4, 2]
    mask = (torch.arange(9) < torch.tensor(lengths).unsqueeze(1)).unsqueeze(2).float()
    valid = torch.cat([row[:length] for row, length in zip(x, lengths, strict=True)])
    padded = x.masked_fill(mask == 0, 77.0)
    expected = reference(valid)
    result = ours(padded, mask)
    result = torch.cat([row[:length] for row, length in zip(result, lengths, strict=True)])
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.running_mean, reference.running_mean)
    torch.testing.assert_close(ours.running_var, reference.running_var)


def test_output_lengths_are_those_of_the_convolutions():
    for subsampling in ("conv1d", "conv2d"):
        model = AsrModel(dataclasses.replace(SMALL, subsampling=subsampling)).eval()
        for frames in range(MIN_FRAMES, 60):
            exit_output = next(model.encoder(torch.zeros(1, frames, 20), torch.tensor([frames])))
            assert exit_output.encoder_out.size(1) == int(exit_output.lengths)
    assert subsampled_lengths(torch.tensor([0, 1, 2, MIN_FRAMES - 1])).tolist() == [0, 0, 0, 0]
