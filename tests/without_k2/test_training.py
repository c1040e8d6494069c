"""The training loop on data made here: it learns, repeats itself, goes on after a kill, and says what it drops."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from lhotse import CutSet

from splitformer.checkpoint import CheckpointError, averaged, epoch_checkpoints, load_checkpoint, load_model
from splitformer.config import ConfigError, LossConfig
from splitformer.data.batches import evaluation_batches, load_cuts
from splitformer.data.tokenizer import Tokenizer
from splitformer.losses.multi_exit import MultiExitLoss
from splitformer.report.records import read_training_log
from splitformer.training.evaluate import evaluate
from splitformer.training.loop import Trainer
from tests.training_runs import (
    ALONE,
    ENV,
    TORCHRUN,
    command,
    options,
    same,
    small_config,
    train,
    training_data,
    weights,
)


def test_it_learns_to_spell(corpus, tmp_path):
    run = train(corpus, tmp_path, tmp_path / "exp", "--set", "training.num_epochs=12")
    assert run.returncode == 0, run.stderr
    epochs = read_training_log(tmp_path / "exp" / "training.jsonl")
    assert [e.epoch for e in epochs] == list(range(1, 13))
    assert epochs[-1].train_loss < 0.3 * epochs[0].train_loss
    assert set(epochs[-1].dev_wer_per_exit) == {1, 2}
    assert epochs[-1].dev_wer_per_exit[2] < 40.0
    assert 0.0 <= epochs[-1].data_wait_share <= 1.0
    assert "training data: 80 utterances" in run.stderr


def test_a_seed_gives_the_same_weights_and_a_resumed_run_too(corpus, tmp_path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert train(corpus, tmp_path, straight).returncode == 0
    process = subprocess.Popen(
        command(corpus, tmp_path, killed), stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    deadline = time.monotonic() + 120
    while not (killed / "epoch-1.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(epoch_checkpoints(killed)) == [1]
    assert "add --resume" in train(corpus, tmp_path, killed).stderr
    assert train(corpus, tmp_path, killed, "--resume").returncode == 0
    assert same(weights(straight / "epoch-2.pt"), weights(killed / "epoch-2.pt"))
    log = read_training_log(killed / "training.jsonl")
    assert [e.epoch for e in log] == [1, 2]
    again = train(corpus, tmp_path, killed, "--resume")
    assert again.returncode == 0 and "nothing to train" in again.stderr


def test_two_ranks_share_the_work_and_agree(corpus, tmp_path):
    training = command(corpus, tmp_path, tmp_path / "exp", "--set", "training.num_epochs=1")[1:]
    run = subprocess.run(
        [sys.executable, *TORCHRUN, "--nproc_per_node", "2", *training],
        capture_output=True,
        text=True,
        env=ENV,
    )
    assert run.returncode == 0, run.stderr
    assert load_checkpoint(tmp_path / "exp" / "epoch-1.pt")["world_size"] == 2
    assert len(read_training_log(tmp_path / "exp" / "training.jsonl")) == 1


def test_a_corrupt_newest_checkpoint_is_named_and_the_one_before_used(corpus, tmp_path, caplog):
    Trainer(small_config(), options(corpus, tmp_path), ALONE).train()
    newest = tmp_path / "epoch-2.pt"
    newest.write_bytes(newest.read_bytes()[:5000])
    trainer = Trainer(small_config(), options(corpus, tmp_path), ALONE)
    assert trainer.progress.epoch == 1
    assert "epoch-2.pt cannot be read" in caplog.text
    (tmp_path / "epoch-1.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no checkpoint of .* can be read"):
        Trainer(small_config(), options(corpus, tmp_path), ALONE)


def test_another_configuration_in_the_same_exp_dir_is_refused(corpus, tmp_path):
    Trainer(small_config(num_epochs=1), options(corpus, tmp_path), ALONE).train()
    with pytest.raises(ConfigError, match=r"training\.average_period: 2 there, 3 now"):
        Trainer(small_config(num_epochs=1, average_period=3), options(corpus, tmp_path), ALONE)


def test_the_average_is_the_mean_of_the_weights_over_the_steps(corpus, tmp_path):
    config = small_config(num_epochs=3, average_epochs=2, average_period=1)
    trainer = Trainer(config, options(corpus, tmp_path), ALONE)
    seen = []
    step = trainer._step
    name = "ctc_heads.2.weight"

    def remember(*args):
        result = step(*args)
        seen.append((trainer.progress.step, trainer.loss.model.state_dict()[name].double().clone()))
        return result

    trainer._step = remember
    trainer.train()
    after = load_checkpoint(tmp_path / "epoch-1.pt")["progress"]["step"]
    expected = torch.stack([w for s, w in seen if s > after]).mean(dim=0)
    model, loaded, checkpoint = load_model(averaged(tmp_path))
    assert (checkpoint["epoch"], checkpoint["avg"]) == (3, 2)
    assert loaded.training == config.training
    torch.testing.assert_close(model.state_dict()[name].double(), expected, atol=1e-5, rtol=0)
    expected = torch.stack([w for _, w in seen]).mean(dim=0)
    model, _, checkpoint = load_model(averaged(tmp_path, epoch=3, avg=7))
    assert checkpoint["avg"] == 3, "there are no more epochs"
    torch.testing.assert_close(model.state_dict()[name].double(), expected, atol=1e-5, rtol=0)
    with pytest.raises(CheckpointError, match=r"has no epoch-9\.pt; choose among epochs 1, 2, 3"):
        averaged(tmp_path, epoch=9)
    with pytest.raises(CheckpointError, match="at least 1"):
        averaged(tmp_path, avg=0)


def test_averaging_nothing_says_so(tmp_path):
    with pytest.raises(CheckpointError, match="train first"):
        averaged(tmp_path)


def test_what_cannot_be_trained_on_is_dropped_with_a_count_and_a_reason(corpus, tmp_path):
    _, train_cuts, _, _ = corpus
    bad = list(CutSet.from_file(train_cuts).subset(first=8))
    for i, cut in enumerate(bad):
        cut.id = f"bad-{i}"
    bad[0].supervisions[0].text = "  "
    bad[1].supervisions[0].text = "AB ÆØ"
    bad[2].supervisions[0].text = "ABCDEFGH" * 20
    bad[3] = bad[3].truncate(duration=0.1)
    bad[4].supervisions.append(bad[4].supervisions[0])
    bad[5].supervisions[0].text = None
    bad[7] = bad[7].pad(duration=180.0)  # an outlier of three minutes
    CutSet.from_cuts(bad).to_file(tmp_path / "bad.jsonl.gz")
    data = training_data(corpus, tmp_path / "index", [train_cuts, tmp_path / "bad.jsonl.gz", train_cuts])
    assert data.report.kept == 81
    assert dict(data.report.dropped) == {
        "empty transcript": 2,
        "transcript has characters that the tokens lack: Æ Ø": 1,
        "more labels than output frames": 1,
        "shorter than data.min_utterance_seconds = 0.2": 1,
        "2 supervisions instead of one": 1,
        "longer than data.max_utterance_seconds = 25.0": 1,
        "a cut of the same id came before": 80,
    }
    assert data.report.examples["empty transcript"] == "bad-0"
    plan = data.plan(1)
    ids = [cut_id for batch in data.batches(plan, 1, 0, 1, range(1)) for cut_id in batch.cut_ids]
    assert len(ids) == len(set(ids)) == 81
    CutSet.from_cuts(bad[:2]).to_file(tmp_path / "none-good.jsonl.gz")
    with pytest.raises(ValueError, match="0 utterances are left"):
        training_data(corpus, tmp_path / "other", [tmp_path / "none-good.jsonl.gz"])
    with pytest.raises(FileNotFoundError, match=r"run prepare\.sh"):
        load_cuts([tmp_path / "none.jsonl.gz"])


def test_parts_are_disjoint_and_their_union_is_the_batch_whatever_their_number(corpus, tmp_path):
    data = training_data(corpus, tmp_path)
    plan = data.plan(3)
    whole = [batch.cut_ids for batch in data.batches(plan, 3, 0, 1, range(1))]
    for parts in (2, 3):
        shares = [
            [batch.cut_ids for batch in data.batches(plan, 3, 0, parts, range(part, part + 1))] for part in range(parts)
        ]
        for number, batch in enumerate(whole):
            taken = [cut_id for share in shares for cut_id in share[number]]
            if len(batch) >= parts:
                assert sorted(taken) == sorted(batch)
            else:
                assert set(taken) == set(batch) and len(taken) == parts


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_epoch_goes_on_from_any_batch_with_the_same_augmentation(corpus, tmp_path, num_workers):
    data = training_data(corpus, tmp_path, num_workers=num_workers)
    plan = data.plan(2)
    whole = list(data.batches(plan, 2, 0, 2, range(2)))
    assert len(whole) == 2 * len(plan)
    for first in (1, len(plan) - 1):
        rest = list(data.batches(plan, 2, first, 2, range(2)))
        assert len(rest) == len(whole) - 2 * first
        for ours, theirs in zip(rest, whole[2 * first :], strict=True):
            assert ours.cut_ids == theirs.cut_ids and torch.equal(ours.x, theirs.x)
    others = list(data.batches(plan, 3, 0, 2, range(2)))
    assert any(not torch.equal(a.x, b.x) for a, b in zip(whole, others, strict=True))


def test_the_index_is_made_once_and_anew_where_the_manifest_changed(corpus, tmp_path, monkeypatch):
    _, train_cuts, _, _ = corpus
    copy = tmp_path / "cuts.jsonl.gz"
    copy.write_bytes(train_cuts.read_bytes())
    first = training_data(corpus, tmp_path / "index", [copy])
    monkeypatch.setattr("splitformer.data.cut_index._scan", lambda *_: pytest.fail("scanned again"))
    again = training_data(corpus, tmp_path / "index", [copy])
    assert again.report == first.report
    assert [again.index[i].id for i in range(3)] == [first.index[i].id for i in range(3)]
    monkeypatch.undo()
    CutSet.from_file(train_cuts).subset(first=50).to_file(copy)
    assert len(training_data(corpus, tmp_path / "index", [copy]).index) == 50
    assert len(training_data(corpus, tmp_path / "index", [copy], min_utterance_seconds=0.6).index) < 50


def test_evaluation_sees_every_cut_and_does_not_depend_on_the_batches(corpus, tmp_path):
    _, _, dev_cuts, lang_dir = corpus
    tokenizer = Tokenizer(lang_dir)
    Trainer(small_config(num_epochs=1), options(corpus, tmp_path), ALONE).train()
    loss = MultiExitLoss(load_model(tmp_path / "epoch-1.pt")[0], LossConfig())
    results = [
        evaluate(loss, evaluation_batches(load_cuts([dev_cuts]), tokenizer, seconds), tokenizer, ALONE)
        for seconds in (0.5, 100.0)
    ]
    assert results[0].wer_per_exit == results[1].wer_per_exit
    assert results[0].loss_per_exit == pytest.approx(results[1].loss_per_exit, rel=1e-4)
