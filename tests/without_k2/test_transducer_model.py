"""The stateless decoder and the joiner compared with plain arithmetic, and the parameters of each kind of head."""

import dataclasses

import pytest
import torch

from splitformer.config import Config, ConfigError, ModelConfig
from splitformer.model.asr import AsrModel
from splitformer.model.decoder import Decoder
from splitformer.model.joiner import Joiner

SMALL = ModelConfig(
    num_mel_bins=80, vocab_size=7, d_model=16, num_heads=2, feedforward_dim=32, conv_kernel=3, num_layers=2,
    exit_layers=(1, 2), parallel_exits=(), decoder_dim=12, joiner_dim=10, heads=("ctc", "transducer"),
)  # fmt: skip


@pytest.mark.parametrize("context_size", [1, 2, 3])
def test_decoder_equals_a_weighted_sum_of_embeddings(context_size):
    torch.manual_seed(0)
    decoder = Decoder(7, 12, context_size)
    y = torch.tensor([[3, 3, 5, 1], [6, 2, 4, 4]])
    out = decoder.teacher_forced(y)
    assert out.shape == (2, 5, 12)
    for utterance in range(2):
        history = [0] * context_size + y[utterance].tolist()
        for position in range(5):
            context = history[position : position + context_size]
            expected = sum(
                decoder.conv.weight[:, 0, k] * (decoder.embedding.weight[token] if token else 0.0)
                for k, token in enumerate(context)
            )
            torch.testing.assert_close(out[utterance, position], torch.relu(torch.as_tensor(expected)))


def test_decoder_is_causal_and_gives_the_same_step_by_step():
    torch.manual_seed(1)
    decoder = Decoder(7, 12, 2)
    y = torch.tensor([[3, 5, 1, 6]])
    out = decoder.teacher_forced(y)
    changed = decoder.teacher_forced(torch.tensor([[3, 5, 2, 2]]))
    assert torch.equal(out[:, :3], changed[:, :3]) and not torch.equal(out[:, 3:], changed[:, 3:])
    context = decoder.start(1)
    for position in range(5):
        torch.testing.assert_close(decoder(context), out[:, position : position + 1])
        if position < 4:
            context = torch.cat([context, y[:, position : position + 1]], dim=1)[:, -2:]


def test_joiner_broadcasts_frames_over_contexts():
    torch.manual_seed(2)
    joiner = Joiner(16, 12, 10, 7)
    encoder_out, decoder_out = torch.randn(2, 5, 16), torch.randn(2, 3, 12)
    logits = joiner(joiner.encoder_proj(encoder_out).unsqueeze(2), joiner.decoder_proj(decoder_out).unsqueeze(1))
    assert logits.shape == (2, 5, 3, 7)
    one = torch.tanh(joiner.encoder_proj(encoder_out[1, 4]) + joiner.decoder_proj(decoder_out[1, 2]))
    torch.testing.assert_close(logits[1, 4, 2], joiner.output_linear(one))


@pytest.mark.parametrize("heads", [("ctc",), ("transducer",), ("ctc", "transducer")])
def test_a_model_has_the_heads_of_its_configuration(heads):
    modules = {name.split(".")[0] for name, _ in AsrModel(dataclasses.replace(SMALL, heads=heads)).named_parameters()}
    expected = {"encoder"} | ({"ctc_heads"} if "ctc" in heads else set())
    assert modules == expected | ({"decoder", "joiners"} if "transducer" in heads else set())


def test_heads_are_checked():
    with pytest.raises(ConfigError, match="heads"):
        dataclasses.replace(SMALL, heads=())
    with pytest.raises(ConfigError, match="'attention' must be one of 'ctc', 'transducer'"):
        Config.from_dict({"model": {"heads": ["attention"]}})
    with pytest.raises(ConfigError, match="needs both heads"):
        Config.from_dict({"loss": {"ctc_only_epochs": 3}})
    with pytest.raises(ConfigError, match="prune_range"):
        Config.from_dict({"loss": {"prune_range": 1}})
