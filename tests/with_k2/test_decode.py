"""bin/decode on trained models: every exit and method, weights chosen on one set alone, records that add up."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from splitformer.bin.decode import run
from splitformer.checkpoint import averaged, save_checkpoint
from splitformer.cli import command
from splitformer.config import Config, tomllib
from splitformer.corpora.lexicon import prepare_lang
from splitformer.corpora.ngram import estimate_arpa
from splitformer.data.tokenizer import Tokenizer
from splitformer.decoding.decode import Decoded, best_options, tune_sets
from splitformer.decoding.graphs import compile_g, compile_hlg, compile_lg, save_graph
from splitformer.decoding.methods import METHODS
from splitformer.errors import UserError
from splitformer.report.records import DecodeRecord
from splitformer.training.distributed import Ranks
from splitformer.training.loop import Trainer
from splitformer.training.options import RunOptions
from tests.factories import make_cuts, make_lang_dir, make_texts
from tests.training_runs import SYSTEM


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with cuts, a lang_dir with HLG.pt, and the exp_dirs system-seed7 and transducer-seed7."""
    folder = tmp_path_factory.mktemp("trained")
    texts = make_texts(60)
    train, dev = make_cuts(folder, "train", texts), make_cuts(folder, "dev", texts[:8], seed=1)
    make_cuts(folder, "test", texts[8:16], seed=2)
    make_cuts(folder, "few", texts[8:11], seed=2)
    lang_dir = make_lang_dir(folder, texts)
    estimate_arpa(folder / "train.txt", folder / "2gram.arpa", order=2)
    prepare_lang(lang_dir, (folder / "train.txt").read_text().split(), Tokenizer(lang_dir).encode)
    for name, compile_graph in {"HLG": compile_hlg, "LG": compile_lg, "G": compile_g}.items():
        save_graph(compile_graph(lang_dir, folder / "2gram.arpa", report=lambda line: None), lang_dir / f"{name}.pt")
    for system in ("system", "transducer"):
        tables = tomllib.loads(SYSTEM)
        tables["training"]["num_epochs"] = 8
        tables["augment"]["p"] = 0.0
        if system == "transducer":
            tables["model"] |= {"heads": ["ctc", "transducer"], "decoder_dim": 32, "joiner_dim": 32}
            tables["loss"] = {"ctc_only_epochs": 5, "warm_steps": 5, "prune_range": 4}
        options = RunOptions(folder / f"{system}-seed7", [train], [dev], lang_dir, seed=7, num_workers=0, resume=True)
        Trainer(Config.from_dict(tables), options, Ranks(0, 1, torch.device("cpu"))).train()
        save_checkpoint(options.exp_dir / "averaged.pt", averaged(options.exp_dir))
    return folder


@pytest.fixture
def decode(trained, tmp_path, capsys):
    """Runs the command; returns its exit status, its messages, and the records by (test set, exit, method)."""

    def call(*more, system="system", source=("--checkpoint", "averaged.pt"), lang_dir=trained / "lang_char", **sets):
        option, name = source
        arguments = [option, trained / f"{system}-seed7" / name, "--lang-dir", lang_dir, "--cuts"]
        arguments += [f"{name}={trained}/{sets.get(name, name)}_cuts.jsonl.gz" for name in ("test", "dev")]
        arguments += ["--output-dir", tmp_path / "decode", "--corpus", "tones", *more]
        status = command(run, list(map(str, arguments)), prog="decode")
        records = [DecodeRecord.load(path) for path in (tmp_path / "decode").glob("*.json")]
        return status, capsys.readouterr().err, {(r.test_set, r.exit_layer, r.method): r for r in records}

    return call


def test_every_exit_and_method_has_a_record_that_adds_up(decode, tmp_path):
    status, errors, by_key = decode("--tune-set", "dev", "--hlg-scales", "0.5", "1.0", "--blank-penalties", "0", "1")
    assert status == 0, errors
    methods = ("greedy_search", "ctc-decoding", "1best")
    assert set(by_key) == {(s, e, m) for s in ("dev", "test") for e in (1, 2) for m in methods}
    for r in by_key.values():
        assert (r.system, r.seed, r.corpus, r.avg, r.epoch) == ("system", 7, "tones", 1, 8)
        assert r.errors == r.insertions + r.deletions + r.substitutions
        assert r.wer == pytest.approx(100 * r.errors / r.ref_words)
        assert 0 < r.rtf < 10 and r.macs_per_second > 0
        stem = f"{r.test_set}-exit-{r.exit_layer:02d}-{r.method}"
        assert f"%WER = {r.wer:.2f}" in (tmp_path / "decode" / f"errs-{stem}.txt").read_text()
        assert len((tmp_path / "decode" / f"recogs-{stem}.txt").read_text().splitlines()) == 2 * r.num_utterances
        values = json.loads((tmp_path / "decode" / f"{stem}.json").read_text())
        assert values["config"]["decoding"]["max_duration"] == 60.0
    for test_set in ("dev", "test"):
        first, last = (by_key[test_set, layer, "1best"] for layer in (1, 2))
        assert first.parameters < last.parameters and first.macs_per_second < last.macs_per_second
        assert by_key[test_set, 2, "ctc-decoding"].errors == by_key[test_set, 2, "greedy_search"].errors
        assert last.config["decoding"]["hlg_scale"] == by_key["dev", 2, "1best"].config["decoding"]["hlg_scale"]
    # the model has learned these words: lexicon and language model must help
    assert by_key["test", 2, "1best"].wer < by_key["test", 2, "greedy_search"].wer


@pytest.mark.slow
def test_a_transducer_is_decoded_with_all_methods_and_hot_words(decode, tmp_path):
    (tmp_path / "hot").write_text("ABBA\nCAD DAB\n")
    weights = ("--hlg-scales", "0.5", "--ngram-lm-scales", "0.5", "--blank-penalties", "0", "1")
    hot_words = ("--hot-words", tmp_path / "hot")
    # few cuts: n-best lists of lattices take long at exits that are hardly trained
    options = ("--tune-set", "dev", *weights, *hot_words)
    status, errors, by_key = decode(*options, system="transducer", dev="few", test="few")
    assert status == 0, errors
    assert set(by_key) == {(s, e, m) for s in ("dev", "test") for e in (1, 2) for m in METHODS}
    for test_set, layer in itertools.product(("dev", "test"), (1, 2)):
        of = {method: by_key[test_set, layer, method] for method in METHODS}
        options = {method: record.config["decoding"] for method, record in of.items()}
        assert of["nbest-oracle"].errors <= of["nbest"].errors
        for method in ("nbest", "nbest-oracle", "nbest-rescoring", "whole-lattice-rescoring"):
            for weight in ("hlg_scale", "blank_penalty", "tuned_on"):
                assert options[method][weight] == options["1best"][weight]
        # G is HLG's own grammar here: rescoring the whole lattice does not change the best path
        assert of["whole-lattice-rescoring"].errors == of["1best"].errors
        assert of["modified_beam_search"].parameters > of["greedy_search"].parameters
        assert options["fast_beam_search_nbest_LG"]["ngram_lm_scale"] == 0.5
        for method in METHODS:
            hot = method in ("prefix_beam_search", "modified_beam_search", "fast_beam_search")
            assert options[method].get("context_phrases", 0) == (2 if hot else 0)
    (tmp_path / "hot").write_text("ABBA!\n")
    assert "'ABBA!' has characters that the tokens lack (!)" in decode(*hot_words, system="transducer")[1]


def test_epochs_are_averaged_on_the_fly(decode):
    """The result is that of averaged.pt; --exit leaves the exits above it out."""
    greedy = ("--methods", "greedy_search", "--exit", "1")
    _, _, of_file = decode(*greedy)
    status, errors, on_the_fly = decode(*greedy, "--epoch", "8", "--avg", "1", source=("--exp-dir", ""))
    assert status == 0, errors
    assert set(of_file) == set(on_the_fly) == {(s, 1, "greedy_search") for s in ("dev", "test")}
    for key, a in of_file.items():
        b = on_the_fly[key]
        assert (b.errors, b.system, b.epoch, b.avg, b.seed) == (a.errors, "system", 8, 1, 7)


def test_without_a_tune_set_one_value_is_used_as_given(decode):
    cases = ((), 1.0, 0.0), (("--hlg-scales", "0.5"), 0.5, 0.0), (("--blank-penalties", "1"), 1.0, 1.0)
    for arguments, scale, penalty in cases:
        status, errors, by_key = decode(*arguments, "--methods", "1best", "--exit", "1")
        assert status == 0, errors
        used = by_key["test", 1, "1best"].config["decoding"]
        assert (used["hlg_scale"], used["blank_penalty"]) == (scale, penalty)


def test_each_set_may_have_a_tune_set_of_its_own(decode):
    weights = ("--methods", "1best", "--hlg-scales", "0.1", "1.0", "--blank-penalties", "0", "2")
    tuned_on = {}
    for values in (("dev",), ("test=dev",), ("dev", "test=test")):
        status, errors, by_key = decode("--tune-set", *values, *weights)
        assert status == 0, errors
        tuned_on[values] = {name: by_key[name, 2, "1best"].config["decoding"]["tuned_on"] for name in ("dev", "test")}
        chosen = {name: by_key[name, 2, "1best"].config["decoding"] for name in ("dev", "test")}
        if values[-1] != "test=test":
            assert chosen["test"] == chosen["dev"]
    assert tuned_on["dev",] == tuned_on["test=dev",] == {"dev": "dev", "test": "dev"}
    assert tuned_on["dev", "test=test"] == {"dev": "dev", "test": "test"}


def test_tune_sets():
    sets = dict.fromkeys(("dev-clean", "dev-other", "test-clean", "test-other", "more"), Path())
    assert tune_sets(("dev-clean", "test-other=dev-other"), sets) == {
        "dev-clean": "dev-clean", "dev-other": "dev-other", "test-clean": "dev-clean", "test-other": "dev-other",
        "more": "dev-clean",
    }  # fmt: skip
    assert tune_sets(("more=dev-clean",), sets) == {"dev-clean": "dev-clean", "more": "dev-clean"}
    assert tune_sets((), sets) == {}
    for values, message in (
        (("more=held-out",), "held-out is not among --cuts"),
        (("dev-clean", "dev-other"), "give one NAME for all sets"),
        (("more=dev-clean", "more=dev-other"), "SET=NAME once"),
    ):
        with pytest.raises(UserError, match=message):
            tune_sets(values, sets)


def test_mistakes_are_named(decode, trained, tmp_path):
    for arguments, message in (
        (("--tune-set", "held-out"), "--tune-set held-out is not among --cuts: test, dev"),
        (("--methods", "modified_beam_search"), "modified_beam_search: the model has ctc heads; choose among"),
        (("--exp-dir", trained / "system-seed7"), "give either --checkpoint FILE or --exp-dir DIR"),
        (("--hlg-scales", "0.5", "1"), "--hlg-scales: several values to choose from; name the set"),
        (("--avg", "3"), "--epoch and --avg choose checkpoints of --exp-dir"),
        (("--exit", "7"), "has no exit after layer 7"),
    ):
        status, errors, _ = decode(*arguments)
        assert status == 1 and message in errors
    policy = ("--exit-policy", tmp_path / "policy.json")
    assert "--exit-policy needs --checkpoint" in decode(*policy, source=("--exp-dir", ""))[1]
    other = make_lang_dir(tmp_path, [text.replace("A", "Z") for text in make_texts(60)])
    assert "was trained with other tokens" in decode(lang_dir=other)[1]
    (other / "bpe.model").unlink()
    assert "bpe.model does not exist: run ./prepare.sh, whose bpe stage makes it" in decode(lang_dir=other)[1]
    (trained / "lang_char" / "HLG.pt").rename(tmp_path / "HLG.pt")
    assert "HLG.pt does not exist: run ./prepare.sh, whose graphs stage makes it" in decode()[1]
    (tmp_path / "HLG.pt").rename(trained / "lang_char" / "HLG.pt")


def test_options_are_chosen_by_errors_on_the_tune_set_for_each_exit():
    def result(*hypotheses):
        return Decoded(results=[(str(i), ["a", "b"], h.split()) for i, h in enumerate(hypotheses)])

    def options(hlg_scale, blank_penalty):
        return (("hlg_scale", hlg_scale), ("blank_penalty", blank_penalty))

    light, plain, heavy = options(0.5, 0.0), options(1.0, 0.0), options(1.0, 2.0)
    decoded = {
        (1, "greedy_search", ()): result("a b"),
        (1, "1best", light): result("a b"),
        (1, "1best", plain): result("a"),
        (2, "1best", light): result("a"),
        (2, "1best", plain): result("b"),
        (2, "1best", heavy): result("a"),
    }
    assert best_options(decoded) == {(1, "greedy_search"): (), (1, "1best"): light, (2, "1best"): plain}
