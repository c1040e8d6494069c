"""The index of training cuts: compact, made once for all runs, and the features it leads to are Lhotse's."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from lhotse import CutSet, Fbank, LilcomChunkyWriter, NumpyFilesWriter
from lhotse.dataset import K2SpeechRecognitionDataset
from lhotse.utils import fastcopy, is_module_available

from splitformer.config import AugmentConfig
from splitformer.corpora.fbank import compute_fbank
from splitformer.corpora.manifests import write_split
from splitformer.corpora.shar import export_shar
from splitformer.data.batches import load_cuts
from splitformer.data.cut_features import STORED_FRAMES, AllFrames
from splitformer.data.cut_index import INDEX_FOLDER, DataError, TrainingFilter, index_cuts
from splitformer.data.features import FbankOptions
from splitformer.data.manifests import ManifestError, UnsafeManifest, read_cuts, read_pairs
from splitformer.data.shar import SharCuts
from splitformer.data.tokenizer import Tokenizer
from splitformer.data.training import make_spec_augment, seeded
from splitformer.training.loop import Trainer
from tests.factories import make_cuts, make_lang_dir, make_split, make_texts
from tests.training_runs import ALONE, options, same, small_config, training_data, wait_for

# ---- made once


class CountingFilter(TrainingFilter):
    """Appends the process's number to a file when it reads its first cut."""

    def __init__(self, lang_dir, scanners):
        super().__init__(Tokenizer(lang_dir), small_config())
        self.scanners, self.started = scanners, False

    def check(self, cut):
        if not self.started:
            self.started = True
            with open(self.scanners, "a") as file:
                file.write(f"{os.getpid()}\n")
        time.sleep(0.002)
        return super().check(cut)


def index_alone(corpus, root, scanners, start, results):
    _, train_cuts, _, lang_dir = corpus
    keep = CountingFilter(lang_dir, scanners)
    start.wait()
    index, report = index_cuts(read_cuts(train_cuts), [train_cuts], keep, root)
    results.put((report.kept, [index.cut_id(number) for number in range(len(index))]))


@pytest.fixture
def in_processes(corpus, tmp_path):
    """Start a number of processes that make the same index at the same time."""

    def start(count):
        context = multiprocessing.get_context("fork")
        go, results = context.Barrier(count), context.Queue()
        arguments = (corpus, tmp_path / "index", tmp_path / "scanners", go, results)
        processes = [context.Process(target=index_alone, args=arguments) for _ in range(count)]
        for process in processes:
            process.start()
        return processes, results

    return start


@pytest.mark.parametrize("trial", range(3))
def test_of_four_processes_one_makes_the_index_and_all_use_it(in_processes, tmp_path, trial):
    processes, results = in_processes(4)
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert found == [found[0]] * 4 and found[0][0] == len(set(found[0][1])) == 80
    assert len((tmp_path / "scanners").read_text().split()) == 1
    assert len(list((tmp_path / "index").glob("*/index.json"))) == 1
    assert not list((tmp_path / "index").glob(".*.tmp"))


def test_an_index_whose_maker_was_killed_is_made_by_the_next(in_processes, tmp_path):
    [process], _ = in_processes(1)
    wait_for(lambda: (tmp_path / "scanners").exists())
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not list((tmp_path / "index").glob("*/index.json"))
    processes, results = in_processes(2)
    assert [results.get(timeout=60)[0] for _ in processes] == [80, 80]
    assert not list((tmp_path / "index").glob(".*.tmp"))


def test_all_runs_share_the_index_beside_the_data(corpus, tmp_path):
    folder, train_cuts, _, _ = corpus
    for seed in (1, 2):
        Trainer(small_config(), options(corpus, tmp_path / str(seed), seed=seed), ALONE)
    about = [index for index in folder.glob(f"{INDEX_FOLDER}/*/index.json") if str(train_cuts) in index.read_text()]
    assert len({path.parent for path in about}) == len(about) >= 1
    assert not any(path.is_dir() and path.name != ".ranks" for seed in "12" for path in (tmp_path / seed).glob("*"))
    again = [path.stat().st_mtime_ns for path in about]
    Trainer(small_config(), options(corpus, tmp_path / "3", seed=3), ALONE)
    assert [path.stat().st_mtime_ns for path in about] == again


def test_a_run_of_before_resumes_without_the_index_in_its_folder(corpus, tmp_path):
    exp_dir, root = tmp_path / "exp", tmp_path / "index"
    config = small_config(num_epochs=1)
    before = Trainer(config, options(corpus, exp_dir, index_dir=root), ALONE)
    before.train()
    shutil.rmtree(root)
    (exp_dir / "train-cuts").mkdir()
    (exp_dir / "train-cuts/report.json").write_text('{"fingerprint": "of another format"}')
    again = Trainer(config, options(corpus, exp_dir, index_dir=root), ALONE)
    assert again.progress.epoch == 1 and again.data.report == before.data.report
    assert same(again.loss.state_dict(), before.loss.state_dict())


def test_data_that_cannot_be_written_to(corpus, tmp_path):
    nowhere = Path("/proc/splitformer")  # where not even root can write
    with pytest.raises(DataError, match=r"cannot be written to /proc/splitformer .*give --index-dir DIR"):
        training_data(corpus, nowhere)
    assert len(training_data(corpus, tmp_path / "elsewhere").index) == 80


def test_damaged_and_outdated_indexes_are_replaced(corpus, tmp_path):
    root, cuts = tmp_path / "index", tmp_path / "cuts.jsonl.gz"
    cuts.write_bytes(corpus[1].read_bytes())
    durations = training_data(corpus, root, [cuts]).index.durations
    for name in ("duration", "labels", "index.json"):
        [path] = root.glob(f"*/{name}")
        path.write_bytes(path.read_bytes()[:-7])
        again = training_data(corpus, root, [cuts]).index
        assert np.array_equal(again.durations, durations) and again.cut_id(79) == "train-079"
    CutSet.from_file(cuts).subset(first=50).to_file(cuts)
    assert len(training_data(corpus, root, [cuts]).index) == 50
    assert len(list(root.glob("*/index.json"))) == 1, "that of the earlier cuts cannot be used any more"
    training_data(corpus, root, [cuts], min_utterance_seconds=0.6)
    assert len(list(root.glob("*/index.json"))) == 2, "of both choices"


def test_another_tokenizer_gets_another_index(corpus, tmp_path):
    folder, train_cuts, dev_cuts, lang_dir = corpus
    other = folder, train_cuts, dev_cuts, make_lang_dir(tmp_path, ["HGFEDCBA AB"] * 20)
    a, b = (training_data(each, tmp_path / "index").index for each in (corpus, other))
    cuts = {cut.id: cut for cut in read_cuts(train_cuts)}
    for index, tokens in ((a, Tokenizer(lang_dir)), (b, Tokenizer(other[3]))):
        for number in range(len(index)):
            text = cuts[index.cut_id(number)].supervisions[0].text
            assert index.labels(number).tolist() == tokens.encode(text)
            assert index.tokens[number] == len(index.labels(number))


def size(index, *left_out):
    return sum(path.stat().st_size for path in index.folder.iterdir() if path.name not in left_out)


def test_bytes_of_a_cut(corpus, tmp_path):
    cuts = list(read_cuts(corpus[1]))
    many = [fastcopy(cut, id=f"{cut.id}-{copy:04d}") for copy in range(25) for cut in cuts]
    CutSet.from_cuts(many).to_file(tmp_path / "cuts.jsonl")
    stored = training_data(corpus, tmp_path / "stored", [tmp_path / "cuts.jsonl"]).index
    live = training_data(corpus, tmp_path / "live", [tmp_path / "cuts.jsonl"], on_the_fly=True).index
    assert len(stored) == len(live) == 2000
    labels = 2 * int(stored.tokens.sum())
    manifest = (tmp_path / "cuts.jsonl").stat().st_size / 2000
    assert (size(stored) - labels) / 2000 < 110 < 0.15 * manifest, "of which the id and the key take 58"
    assert (size(live) - labels) / 2000 < 350 < 0.5 * manifest, "a packed manifest"


def test_places_in_an_index_are_as_little_trusted_as_those_in_a_manifest(corpus, tmp_path):
    index = training_data(corpus, tmp_path).index
    path = index.folder / "storages"
    path.write_bytes(path.read_bytes().replace(b"numpy_files ", b"memory_raw /"))
    with pytest.raises(UnsafeManifest, match="'memory_raw'"):
        training_data(corpus, tmp_path).index.stored(0)


# ---- the features are those of Lhotse


@pytest.fixture(scope="module")
def all_kinds(tmp_path_factory):
    """Cuts of every kind: whole, speed-perturbed, parts of recordings, with partial transcripts, padded, too long."""
    folder = tmp_path_factory.mktemp("kinds")
    texts = make_texts(12)
    files = make_split(folder, texts)
    compute_fbank(*files, folder / "whole.jsonl.gz", folder / "feats", FbankOptions("lhotse"), speed_perturb=True)
    cuts = list(read_cuts(folder / "whole.jsonl.gz"))
    long = read_cuts(make_cuts(folder, "long", ["ABCDEFGH ABCDEFGH ABCDEFGH ABCDEFGH ABCDEFGH ABCDEFGH"] * 4))
    writer = LilcomChunkyWriter if is_module_available("lilcom") else NumpyFilesWriter
    kept = long.compute_and_store_features(Fbank(), str(folder / "long"), storage_type=writer, progress_bar=False)
    long = [fastcopy(cut, id=f"long-{number}") for number, cut in enumerate(kept)]
    assert all(cut.num_frames > 500 for cut in long), "more than one of Lhotse's chunks"
    part = long[0].truncate(offset=1.0, duration=3.03)
    part.supervisions = [fastcopy(part.supervisions[0], start=0.0, duration=3.03)]
    partial = fastcopy(long[1], id="partial", supervisions=[fastcopy(long[1].supervisions[0], start=0.5, duration=3.0)])
    start = fastcopy(long[2].truncate(duration=2.5), id="start")
    start.supervisions = [fastcopy(start.supervisions[0], duration=2.5)]
    padded = fastcopy(long[3], id="to-pad").pad(duration=9.0, preserve_id=True)
    others = [part, partial, start, padded]
    path = folder / "cuts.jsonl.gz"
    CutSet.from_cuts([*cuts, *long, *others]).to_file(path)
    return (folder, path, path, make_lang_dir(folder, texts)), len(cuts) + len(long), len(others)


def lhotses(cuts, seed, augment):
    """The batch of these cuts that Lhotse's own dataset loads, with the augmentation of this seed."""
    transforms = [make_spec_augment(augment, 1)] if augment.p else []
    with seeded(*seed):
        dataset = K2SpeechRecognitionDataset(True, input_transforms=transforms, input_strategy=AllFrames())
        return dataset[CutSet.from_cuts(cuts)]


@pytest.mark.parametrize("p", [0.0, 0.9])
def test_batches_have_the_bits_of_lhotses_own_loading(all_kinds, tmp_path, p):
    corpus, whole, others = all_kinds
    data = training_data(corpus, tmp_path, augment={"p": p, "time_warp_factor": 20}, max_duration=40.0)
    assert sum(data.index.stored(number) is not None for number in range(len(data.index))) >= whole
    assert any(data.index.stored(number) is None for number in range(len(data.index))), "some need a manifest"
    cuts = {cut.id: cut for cut in load_cuts([corpus[1]])}
    tokens, plan, seen = Tokenizer(corpus[3]), data.plan(1), set()
    for number, batch in enumerate(data.batches(plan, 1, 0, 1, range(1))):
        ids = [data.index.cut_id(each) for each in plan.batch(number)]
        theirs = lhotses([cuts[cut_id] for cut_id in ids], (1, 1, number, 0), data.config.augment)
        assert not batch.errors and torch.equal(batch.x, theirs["inputs"])
        assert torch.equal(batch.x_lens, theirs["supervisions"]["num_frames"].long())
        assert batch.cut_ids == [cut.id for cut in theirs["supervisions"]["cut"]]
        assert batch.durations == [cut.duration for cut in theirs["supervisions"]["cut"]]
        for row, length, text in zip(batch.y, batch.y_lens, theirs["supervisions"]["text"], strict=True):
            assert row[:length].tolist() == tokens.encode(text) and not row[length:].any()
        seen.update(batch.cut_ids)
    assert seen == cuts.keys() and len(seen) == whole + others


def test_frames_that_lhotse_does_not_count_are_kept(corpus, tmp_path):
    """And a frame that is missing repeats the last, as in Lhotse."""
    cuts = list(read_cuts(corpus[1]))[:30]
    for number, cut in enumerate(cuts):
        feats = cut.load_features()
        feats = np.concatenate((feats, feats[:1])) if number % 3 == 0 else feats[: len(feats) - (number % 3 == 1)]
        np.save(tmp_path / f"{cut.id}.npy", feats)
        cut.features.storage_path, cut.features.storage_key = str(tmp_path), f"{cut.id}.npy"
        if number % 3 == 0:
            cut.custom = {STORED_FRAMES: len(feats)}
    CutSet.from_cuts(cuts).to_file(tmp_path / "cuts.jsonl.gz")
    data = training_data(corpus, tmp_path / "index", [tmp_path / "cuts.jsonl.gz"], augment={"p": 0.0})
    by_id, plan = {cut.id: cut for cut in cuts}, data.plan(1)
    for number, batch in enumerate(data.batches(plan, 1, 0, 1, range(1))):
        theirs = lhotses([by_id[data.index.cut_id(each)] for each in plan.batch(number)], (0,), AugmentConfig(p=0.0))
        assert torch.equal(batch.x, theirs["inputs"]) and not batch.errors
        assert torch.equal(batch.x_lens, theirs["supervisions"]["num_frames"].long())


# ---- what the data must be


def test_features_of_another_kind_than_the_conf_are_refused_before_training(corpus, tmp_path):
    config = small_config()
    narrow = replace(config, model=replace(config.model, num_mel_bins=40))
    with pytest.raises(ManifestError, match=r"fbank features of 80 mel bins, but .*model\.num_mel_bins is 40: change"):
        Trainer(narrow, options(corpus, tmp_path / "a"), ALONE)
    linear = replace(config, data=replace(config.data, features="linear-mel"))
    with pytest.raises(ManifestError, match=r"has fbank features .* but data\.features is linear-mel"):
        Trainer(linear, options(corpus, tmp_path / "b"), ALONE)
    files = make_split(tmp_path, make_texts(3))
    compute_fbank(*files, tmp_path / "dev.jsonl.gz", tmp_path / "feats", FbankOptions("lhotse", 40))
    with pytest.raises(ManifestError, match="fbank features of 40 mel bins"):
        Trainer(config, options((*corpus[:2], tmp_path / "dev.jsonl.gz", corpus[3]), tmp_path / "c"), ALONE)


def test_features_that_are_gone_are_noticed_before_training(corpus, tmp_path):
    files = make_split(tmp_path, make_texts(12))
    cuts = tmp_path / "cuts.jsonl.gz"
    compute_fbank(*files, cuts, tmp_path / "feats", FbankOptions("lhotse"))
    assert len(training_data(corpus, tmp_path / "index", [cuts]).index) == 12
    shutil.rmtree(tmp_path / "feats")
    with pytest.raises(DataError, match=r"features .* are gone: there is no .*feats.*prepare\.sh --stage fbank makes"):
        training_data(corpus, tmp_path / "index", [cuts])


@pytest.mark.parametrize("lilcom", [True, False])
def test_ids_that_look_like_paths_stay_in_the_store(tmp_path, monkeypatch, lilcom):
    ids = ["../../../evil", "/evil-utterance", "a/b/../c", "./d", "e//f", "g."]
    pairs = list(read_pairs(*make_split(tmp_path, make_texts(len(ids)))))
    names = iter(ids)
    renamed = [(recording, [fastcopy(each, id=next(names)) for each in segments]) for recording, segments in pairs]
    files = tmp_path / "r.jsonl.gz", tmp_path / "s.jsonl.gz"
    write_split(renamed, *files)
    if not lilcom:
        monkeypatch.setattr("splitformer.corpora.fbank.is_module_available", lambda name: name != "lilcom")
    store = tmp_path / "deep/er/store"
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    compute_fbank(*files, tmp_path / "cuts.jsonl.gz", store, FbankOptions("lhotse"))
    written = {path for path in tmp_path.rglob("*") if path.is_file()} - before - {tmp_path / "cuts.jsonl.gz"}
    assert written and all(store in path.parents for path in written) and not Path("/evil-utterance.npy").exists()
    cuts = list(read_cuts(tmp_path / "cuts.jsonl.gz"))
    assert [cut.id for cut in cuts] == ids and all(len(cut.load_features()) == cut.num_frames for cut in cuts)
    export_shar(tmp_path / "cuts.jsonl.gz", tmp_path / "shar", "numpy")
    for ours, theirs in zip(SharCuts(tmp_path / "shar"), cuts, strict=True):
        assert ours.id == theirs.id and np.array_equal(ours.load_features(), theirs.load_features())
