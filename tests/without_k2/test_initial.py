"""Fine-tuning: which weights a run takes from another model, which are new, and which are frozen."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from splitformer.checkpoint import CheckpointError, save_checkpoint
from splitformer.config import Config, ConfigError
from splitformer.model.asr import AsrModel
from splitformer.training.initial import RECORD, start_from
from splitformer.training.loop import Trainer
from splitformer.training.options import RunOptions
from tests.training_runs import ALONE, options, same, small_config, weights

TOKENS = ["<blk>", "<sos/eos>", "<unk>", *"▁ABCDEFGH"]


def config_of(tokens: list[str], **model: object) -> Config:
    config = small_config()
    return replace(config, model=replace(config.model, vocab_size=len(tokens), **model))


def make_checkpoint(path: Path, tokens: list[str] = TOKENS, **model: object) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    config = config_of(tokens, **model)
    state = AsrModel(config.model).state_dict()
    state["encoder.cmvn.deviation"] = torch.full((80,), 3.0)
    save_checkpoint(path, {"model": state, "config": config.to_dict(), "tokens": tokens})
    return state


def started(tmp_path: Path, tokens: list[str], caplog, freeze: int = 0, **model: object) -> tuple[AsrModel, str]:
    torch.manual_seed(2)
    config = config_of(tokens, **model)
    network = AsrModel(config.model)
    with caplog.at_level(logging.INFO):
        given = RunOptions(tmp_path, (), (), tmp_path, init_from=tmp_path / "a.pt", freeze_encoder_layers=freeze)
        start_from(network, config, tokens, given, resuming=False, is_main=True)
    return network, caplog.text


def test_another_vocabulary_keeps_the_encoder_and_has_new_heads(tmp_path: Path, caplog) -> None:
    theirs = make_checkpoint(tmp_path / "a.pt")
    # the same number of tokens, and so the same shapes, but another meaning
    tokens = [*TOKENS[:-1], "Ω"]
    network, summary = started(tmp_path, tokens, caplog)
    ours = network.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if name.startswith("encoder."))
    assert not any(torch.equal(ours[name], theirs[name]) for name in ours if name.endswith("heads.1.weight"))
    assert "encoder.layers 1 2" in summary and "new: ctc_heads 1 2" in summary and "another vocabulary" in summary
    assert float(network.encoder.cmvn.deviation[0]) == 3.0, "the encoder sees features on its own scale"


def test_the_same_vocabulary_takes_all_weights(tmp_path: Path, caplog) -> None:
    theirs = make_checkpoint(tmp_path / "a.pt")
    network, summary = started(tmp_path, TOKENS, caplog)
    assert same(network.state_dict(), theirs) and "new: none" in summary


def test_exits_and_parallel_layers_that_the_other_model_lacks_are_new(tmp_path: Path, caplog) -> None:
    theirs = make_checkpoint(tmp_path / "a.pt", exit_layers=(2,), parallel_exits=())
    network, summary = started(tmp_path, TOKENS, caplog)
    assert torch.equal(network.ctc_heads["2"].weight, theirs["ctc_heads.2.weight"])
    assert "new: ctc_heads 1" in summary and "encoder.parallel 1 2" in summary
    theirs = make_checkpoint(tmp_path / "a.pt")
    _, summary = started(tmp_path, TOKENS, caplog, exit_layers=(2,), parallel_exits=(2,))
    assert "not used: ctc_heads 1" in summary


def test_another_encoder_is_refused_with_the_keys(tmp_path: Path, caplog) -> None:
    make_checkpoint(tmp_path / "a.pt", d_model=48)
    with pytest.raises(CheckpointError, match=r"another encoder: model\.d_model = 48, here 32"):
        started(tmp_path, TOKENS, caplog)
    with pytest.raises(CheckpointError, match=r"there is no .*none\.pt; give a checkpoint"):
        config = config_of(TOKENS)
        given = RunOptions(tmp_path, (), (), tmp_path, init_from=tmp_path / "none.pt")
        start_from(AsrModel(config.model), config, TOKENS, given, resuming=False, is_main=True)
    assert not (tmp_path / RECORD).exists()


@pytest.mark.parametrize("count", [-1, 3])
def test_layers_to_freeze_must_exist(tmp_path: Path, caplog, count: int) -> None:
    make_checkpoint(tmp_path / "a.pt")
    with pytest.raises(ConfigError, match="the encoder has 1 to 2 layers"):
        started(tmp_path, TOKENS, caplog, freeze=count)


@pytest.mark.slow
def test_frozen_layers_stay_and_a_resumed_run_ends_with_the_same_weights(corpus, tmp_path: Path, caplog) -> None:
    caplog.set_level(logging.INFO)
    make_checkpoint(tmp_path / "a.pt", [*TOKENS, "Z"])
    fine_tuning = {"init_from": tmp_path / "a.pt", "freeze_encoder_layers": 1}
    Trainer(small_config(), options(corpus, tmp_path / "one", **fine_tuning), ALONE).train()
    assert "new: ctc_heads 1 2" in caplog.text
    assert "frozen: the front end and encoder layers 1 to 1" in caplog.text
    before, after = weights(tmp_path / "a.pt"), weights(tmp_path / "one/epoch-2.pt")
    frozen = ("encoder.cmvn", "encoder.subsampling", "encoder.layers.0.", "encoder.parallel.1.")
    for name in before:
        if not name.startswith("ctc_heads"):  # batch statistics are among them
            assert torch.equal(before[name], after[name]) == name.startswith(frozen), name

    for number, given in enumerate(({}, {"freeze_encoder_layers": 1}, fine_tuning)):
        folder = tmp_path / f"resumed-{number}"
        shutil.copytree(tmp_path / "one", folder)
        (folder / "epoch-2.pt").unlink()
        Trainer(small_config(), options(corpus, folder, **given), ALONE).train()
        assert same(weights(folder / "epoch-2.pt"), after)
    for other in ({"freeze_encoder_layers": 2}, {"init_from": tmp_path / "one/epoch-2.pt"}):
        with pytest.raises(ConfigError, match=r"was started with --init-from a checkpoint .* cannot resume with"):
            Trainer(small_config(), options(corpus, tmp_path / "one", **other), ALONE)


def test_random_weights_are_not_frozen(tmp_path: Path) -> None:
    config = config_of(TOKENS)
    with pytest.raises(ConfigError, match=r"--freeze-encoder-layers 1 would freeze random weights: .* --init-from"):
        given = RunOptions(tmp_path, (), (), tmp_path, freeze_encoder_layers=1)
        start_from(AsrModel(config.model), config, TOKENS, given, resuming=False, is_main=True)
