"""Fine-tuning: what a run takes from another model, what is new, and what stays as it came."""

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
from tests.training_runs import same, small_config, train, weights

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
        start_from(network, config, tokens, tmp_path, init_from=tmp_path / "a.pt", freeze_encoder_layers=freeze)
    return network, caplog.text


def test_another_vocabulary_keeps_the_encoder_and_makes_new_heads(tmp_path: Path, caplog) -> None:
    theirs = make_checkpoint(tmp_path / "a.pt")
    # as many tokens, and so the same shapes: what a row stands for is another
    tokens = [*TOKENS[:-1], "Ω"]
    network, told = started(tmp_path, tokens, caplog)
    ours = network.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if name.startswith("encoder."))
    assert not any(torch.equal(ours[name], theirs[name]) for name in ours if name.endswith("heads.1.weight"))
    assert "encoder.layers 1, 2" in told and "new: ctc_heads 1, 2" in told and "vocabulary is another" in told
    assert float(network.encoder.cmvn.deviation[0]) == 3.0, "the encoder hears features on its own scale"


def test_the_same_vocabulary_takes_all(tmp_path: Path, caplog) -> None:
    theirs = make_checkpoint(tmp_path / "a.pt")
    network, told = started(tmp_path, TOKENS, caplog)
    assert same(network.state_dict(), theirs) and "nothing is new" in told


def test_exits_and_parallel_layers_that_the_other_has_not_are_new(tmp_path: Path, caplog) -> None:
    theirs = make_checkpoint(tmp_path / "a.pt", exit_layers=(2,), parallel_exits=())
    network, told = started(tmp_path, TOKENS, caplog)
    assert torch.equal(network.ctc_heads["2"].weight, theirs["ctc_heads.2.weight"])
    assert "new: ctc_heads 1" in told and "encoder.parallel 1, 2" in told
    theirs = make_checkpoint(tmp_path / "a.pt")
    _, told = started(tmp_path, TOKENS, caplog, exit_layers=(2,), parallel_exits=(2,))
    assert "not used: ctc_heads 1" in told


def test_another_encoder_is_refused_with_the_keys(tmp_path: Path, caplog) -> None:
    make_checkpoint(tmp_path / "a.pt", d_model=48)
    with pytest.raises(CheckpointError, match=r"another encoder: model\.d_model = 48, here 32"):
        started(tmp_path, TOKENS, caplog)
    with pytest.raises(CheckpointError, match=r"there is no .*none\.pt; give a checkpoint"):
        config = config_of(TOKENS)
        start_from(AsrModel(config.model), config, TOKENS, tmp_path, init_from=tmp_path / "none.pt")
    assert not (tmp_path / RECORD).exists()


@pytest.mark.parametrize("count", [-1, 3])
def test_there_are_only_so_many_layers_to_freeze(tmp_path: Path, caplog, count: int) -> None:
    make_checkpoint(tmp_path / "a.pt")
    with pytest.raises(ConfigError, match="the encoder has 1 to 2 layers"):
        started(tmp_path, TOKENS, caplog, freeze=count)


def test_frozen_layers_stay_and_a_resumed_run_ends_as_one_without_a_break(corpus, tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "a.pt", [*TOKENS, "Z"])
    flags = ["--init-from", tmp_path / "a.pt", "--freeze-encoder-layers", 1]
    done = train(corpus, tmp_path, tmp_path / "one", *flags)
    assert done.returncode == 0, done.stderr
    assert "new: ctc_heads 1, 2" in done.stderr and "frozen: the front end and encoder layers 1 to 1" in done.stderr
    before, after = weights(tmp_path / "a.pt"), weights(tmp_path / "one/epoch-2.pt")
    frozen = ("encoder.cmvn", "encoder.subsampling", "encoder.layers.0.", "encoder.parallel.1.")
    for name in before:
        if not name.startswith("ctc_heads"):
            # batch statistics are there, too
            assert torch.equal(before[name], after[name]) == name.startswith(frozen), name

    shutil.copytree(tmp_path / "one", tmp_path / "two")
    (tmp_path / "two/epoch-2.pt").unlink()
    other = train(corpus, tmp_path, tmp_path / "two", "--resume", "--freeze-encoder-layers", 2)
    assert other.returncode == 1 and "is to go on with no --init-from and --freeze-encoder-layers 2" in other.stderr
    resumed = train(corpus, tmp_path, tmp_path / "two", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert same(weights(tmp_path / "two/epoch-2.pt"), after)
