"""bin/decode on a trained model: every exit and method, choices on one set alone, records that add up."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from splitformer import report
from splitformer.bin.decode import Decoded, _choose
from splitformer.checkpoint import averaged, save_checkpoint
from splitformer.config import Config, tomllib
from splitformer.decoding.searches import METHODS
from splitformer.losses.pruned_transducer import PrunedTransducerLoss
from splitformer.report.records import DecodeRecord
from splitformer.training.distributed import Ranks
from splitformer.training.loop import RunOptions, Trainer
from tests.factories import make_cuts, make_lang_dir, make_texts
from tests.training_runs import SYSTEM


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with cuts, a lang_dir with HLG.pt, and exp-seed7/averaged.pt."""
    folder = tmp_path_factory.mktemp("trained")
    texts = make_texts(60)
    train, dev = make_cuts(folder, "train", texts), make_cuts(folder, "dev", texts[:15], seed=1)
    make_cuts(folder, "test", texts[15:25], seed=2)
    lang_dir = make_lang_dir(folder, texts)
    for script, *flags in (
        ("estimate_lm", "--text", folder / "train.txt", "--order", "2", "--arpa", folder / "2gram.arpa"),
        ("prepare_lang", "--lang-dir", lang_dir, "--text", folder / "train.txt"),
        *(
            ("compile_graphs", "--lang-dir", lang_dir, "--arpa", folder / "2gram.arpa", "--graph", graph)
            for graph in ("HLG", "LG", "G")
        ),
    ):
        subprocess.run([sys.executable, "-m", f"local.{script}", *map(str, flags)], check=True, capture_output=True)
    for system, loss in (("system", None), ("transducer", PrunedTransducerLoss)):
        tables = tomllib.loads(SYSTEM)
        tables["training"]["num_epochs"] = 8
        tables["augment"]["p"] = 0.0
        if loss:
            tables["model"] |= {"heads": ["ctc", "transducer"], "decoder_dim": 32, "joiner_dim": 32}
            tables["loss"] = {"ctc_only_epochs": 5, "warm_steps": 5, "prune_range": 4}
        options = RunOptions(folder / f"{system}-seed7", [train], [dev], lang_dir, seed=7, num_workers=0, resume=True)
        Trainer(Config.from_dict(tables), options, Ranks(0, 1, torch.device("cpu")), loss).train()
        save_checkpoint(options.exp_dir / "averaged.pt", averaged(options.exp_dir))
    return folder


def decode(folder, *more, system="system"):
    command = [sys.executable, "-m", "splitformer.bin.decode", "--checkpoint", folder / f"{system}-seed7/averaged.pt"]
    command += ["--cuts", f"test={folder}/test_cuts.jsonl.gz", f"dev={folder}/dev_cuts.jsonl.gz"]
    command += ["--lang-dir", folder / "lang_char", "--output-dir", folder / "decode", "--corpus", "tones", *more]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True)


def test_every_exit_and_method_has_a_record_that_adds_up(trained):
    run = decode(trained, "--tune-set", "dev", "--hlg-scales", "0.5", "1.0", "--blank-penalties", "0", "1")
    assert run.returncode == 0, run.stderr
    records = [DecodeRecord.load(path) for path in (trained / "decode").glob("*.json")]
    seen = {(r.test_set, r.exit_layer, r.method) for r in records}
    methods = ("greedy_search", "ctc-decoding", "1best")
    assert seen == {(s, e, m) for s in ("dev", "test") for e in (1, 2) for m in methods}
    for r in records:
        assert (r.system, r.seed, r.corpus, r.avg, r.epoch) == ("system", 7, "tones", 1, 8)
        assert r.errors == r.insertions + r.deletions + r.substitutions
        assert r.wer == pytest.approx(100 * r.errors / r.ref_words)
        assert 0 < r.rtf < 10 and r.macs_per_second > 0
        stem = f"{r.test_set}-exit-{r.exit_layer:02d}-{r.method}"
        assert f"%WER = {r.wer:.2f}" in (trained / "decode" / f"errs-{stem}.txt").read_text()
        assert len((trained / "decode" / f"recogs-{stem}.txt").read_text().splitlines()) == 2 * r.num_utterances
    by_key = {(r.test_set, r.exit_layer, r.method): r for r in records}
    for test_set in ("dev", "test"):
        first, last = (by_key[test_set, layer, "1best"] for layer in (1, 2))
        assert first.parameters < last.parameters and first.macs_per_second < last.macs_per_second
        assert by_key[test_set, 2, "ctc-decoding"].errors == by_key[test_set, 2, "greedy_search"].errors
        assert last.config["decoding"]["hlg_scale"] == by_key["dev", 2, "1best"].config["decoding"]["hlg_scale"]
    # words that the model has learnt: the lexicon and the language model must help
    assert by_key["test", 2, "1best"].wer < by_key["test", 2, "greedy_search"].wer


def test_a_system_with_both_heads_is_decoded_by_every_method(trained, tmp_path):
    (tmp_path / "hot").write_text("ABBA\nCAD DAB\n")
    weights = ("--hlg-scales", "0.5", "--ngram-lm-scales", "0.5", "--blank-penalties", "0", "1")
    out = ("--output-dir", tmp_path / "decode", "--hot-words", tmp_path / "hot")
    run = decode(trained, "--tune-set", "dev", *weights, *out, system="transducer")
    assert run.returncode == 0, run.stderr
    records = [DecodeRecord.load(path) for path in (tmp_path / "decode").glob("*.json")]
    by_key = {(r.test_set, r.exit_layer, r.method): r for r in records}
    assert set(by_key) == {(s, e, m) for s in ("dev", "test") for e in (1, 2) for m in METHODS}
    for test_set, layer in itertools.product(("dev", "test"), (1, 2)):
        of = {method: by_key[test_set, layer, method] for method in METHODS}
        options = {method: record.config["decoding"] for method, record in of.items()}
        assert of["nbest-oracle"].errors <= of["nbest"].errors
        for method in ("nbest", "nbest-oracle", "nbest-rescoring", "whole-lattice-rescoring"):
            for weight in ("hlg_scale", "blank_penalty", "tuned_on"):
                assert options[method][weight] == options["1best"][weight]
        # G is HLG's own grammar here: rescoring gives 1best back
        assert of["whole-lattice-rescoring"].errors == of["1best"].errors
        assert of["modified_beam_search"].parameters > of["greedy_search"].parameters
        assert options["fast_beam_search_nbest_LG"]["ngram_lm_scale"] == 0.5
        for method in METHODS:
            hot = method in ("prefix_beam_search", "modified_beam_search", "fast_beam_search")
            assert options[method].get("context_phrases", 0) == (2 if hot else 0)
    (tmp_path / "hot").write_text("ABBA!\n")
    assert "'ABBA!' has characters that the tokens lack (!)" in decode(trained, *out, system="transducer").stderr


def test_mistakes_are_named(trained, tmp_path):
    assert "--tune-set held-out is not among --cuts: test, dev" in decode(trained, "--tune-set", "held-out").stderr
    other = make_lang_dir(tmp_path, [text.replace("A", "Z") for text in make_texts(60)])
    assert "was trained with other tokens" in decode(trained, "--lang-dir", other).stderr
    stranger = decode(trained, "--methods", "greedy_search", "modified_beam_search").stderr
    assert "--methods modified_beam_search: this model's heads are ctc; choose among greedy_search," in stranger
    (trained / "lang_char" / "HLG.pt").rename(tmp_path / "HLG.pt")
    assert "graphs stage makes it" in decode(trained).stderr
    (tmp_path / "HLG.pt").rename(trained / "lang_char" / "HLG.pt")


def test_options_are_chosen_by_errors_on_the_tune_set_for_each_exit():
    def found(*hypotheses):
        return Decoded(results=[(str(i), ["a", "b"], h.split()) for i, h in enumerate(hypotheses)])

    def options(hlg_scale, blank_penalty):
        return (("hlg_scale", hlg_scale), ("blank_penalty", blank_penalty))

    light, plain, heavy = options(0.5, 0.0), options(1.0, 0.0), options(1.0, 2.0)
    decoded = {
        (1, "greedy_search", ()): found("a b"),
        (1, "1best", light): found("a b"),
        (1, "1best", plain): found("a"),
        (2, "1best", light): found("a"),
        (2, "1best", plain): found("b"),
        (2, "1best", heavy): found("a"),
    }
    assert _choose(decoded) == {
        (1, "greedy_search"): (),
        (1, "1best"): light,
        (2, "1best"): plain,
    }


def test_the_driver_and_the_report_know_the_same_methods():
    text = (Path(__file__).parents[2] / "run.sh").read_text()
    assert text.split("known_methods=(")[1].split(")")[0].split() == list(METHODS)
    assert list(report._METHODS) == list(METHODS)


def test_records_are_json_that_others_can_read(trained):
    for path in (trained / "decode").glob("*.json"):
        assert json.loads(path.read_text())["config"]["decoding"]["max_duration"] == 60.0
