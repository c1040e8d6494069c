"""bin/calibrate, bin/tradeoff and bin/decode --exit-policy on a trained model: tables predict what decoding gives."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys

import pytest
import torch
from lhotse import CutSet

from splitformer.checkpoint import averaged, checkpoint_id, load_checkpoint, save_checkpoint
from splitformer.cli import command
from splitformer.config import Config, tomllib
from splitformer.decoding.decode import chosen_search
from splitformer.decoding.loading import load_for_decoding
from splitformer.decoding.searches import make_method
from splitformer.early_exit.collect import collect
from splitformer.early_exit.exit_table import ExitTable, outcome
from splitformer.early_exit.names import POLICIES, WITHOUT_CTC
from splitformer.early_exit.policies import FittedPolicy, Fixed, Threshold
from splitformer.model.asr import AsrModel
from splitformer.model.complexity import complexity
from splitformer.report.records import DecodeRecord, EarlyExitRecord, TradeoffRecord
from splitformer.training.distributed import Ranks
from splitformer.training.loop import Trainer
from splitformer.training.options import RunOptions
from tests.factories import make_cuts, make_lang_dir, make_texts
from tests.training_runs import SYSTEM

pytestmark = pytest.mark.slow

LAYERS = (1, 2, 3, 4)
EPOCHS = 26
METHODS = ("greedy_search", "1best")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with dev and test cuts of several speakers each, a lang_dir with HLG, and exp/small-seed7, trained."""
    folder = tmp_path_factory.mktemp("early")
    texts = make_texts(60)
    train = make_cuts(folder, "train", texts)
    dev = with_speakers(make_cuts(folder, "dev", texts[:24], seed=1), "reader", 6)
    with_speakers(make_cuts(folder, "test", texts[24:44], seed=2), "caller", 4)
    lang_dir = make_lang_dir(folder, texts)
    for script, *flags in (
        ("estimate_lm", "--text", folder / "train.txt", "--order", "2", "--arpa", folder / "2gram.arpa"),
        ("prepare_lang", "--lang-dir", lang_dir, "--text", folder / "train.txt"),
        ("compile_graphs", "--lang-dir", lang_dir, "--arpa", folder / "2gram.arpa", "--graph", "HLG"),
    ):
        subprocess.run([sys.executable, "-m", f"local.{script}", *map(str, flags)], check=True, capture_output=True)
    tables = tomllib.loads(SYSTEM)
    tables["model"] |= {"num_layers": 4, "exit_layers": list(LAYERS), "parallel_exits": [1, 4]}
    tables["training"]["num_epochs"] = EPOCHS
    tables["augment"]["p"] = 0.0
    options = RunOptions(folder / "exp/small-seed7", [train], [dev], lang_dir, seed=7, num_workers=0, resume=True)
    Trainer(Config.from_dict(tables), options, Ranks(0, 1, CPU)).train()
    save_checkpoint(options.exp_dir / "averaged.pt", averaged(options.exp_dir))
    blur_exits(options.exp_dir / "averaged.pt")
    return folder


def blur_exits(checkpoint):
    """Add noise to the heads, less at deeper exits: after training none of them makes an error on these tones."""
    contents = load_checkpoint(checkpoint)
    generator = torch.Generator().manual_seed(0)
    for layer, noise in ((1, 0.6), (2, 0.5), (3, 0.4), (4, 0.3)):
        weight = contents["model"][f"ctc_heads.{layer}.weight"]
        weight += noise * torch.randn(weight.shape, generator=generator)
    save_checkpoint(checkpoint, contents)


def with_speakers(path, prefix, count):
    cuts = list(CutSet.from_file(path))
    for place, cut in enumerate(cuts):
        cut.supervisions[0].speaker = f"{prefix}-{place % count}"
    CutSet.from_cuts(cuts).to_file(path)
    return path


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a command of bin/ in this process; return its exit status and what it printed to stderr."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [f"bin/{name}", *map(str, arguments)])  # records have the command line
        try:
            status = command(importlib.import_module(f"splitformer.bin.{name}").run, prog=name)
        except SystemExit as exit:
            status = exit.code
        return status, capsys.readouterr().err

    return run


@pytest.fixture
def decode(run, folder):
    def decode(*arguments, sets=("test",), checkpoint="exp/small-seed7/averaged.pt", out="exp/small-seed7/decode"):
        cuts = [f"{name}={folder}/{name}_cuts.jsonl.gz" for name in sets]
        flags = ["--lang-dir", folder / "lang_char", "--corpus", "tones", "--output-dir", folder / out]
        return run("decode", "--checkpoint", folder / checkpoint, "--cuts", *cuts, *flags, *arguments)

    return decode


@pytest.fixture
def experiment(folder, decode):
    """exp/small-seed7 with the records of every exit."""
    exp_dir = folder / "exp/small-seed7"
    if not (exp_dir / "decode").exists():
        weights = ("--hlg-scales", 0.5, 1.0, "--blank-penalties", 0, 1)
        status, stderr = decode("--methods", *METHODS, "--tune-set", "dev", *weights, sets=("dev", "test"))
        assert status == 0, stderr
    return exp_dir


@pytest.fixture
def calibrate(run, folder):
    def calibrate(*arguments, dev="dev=dev", tests=("test=test",), checkpoint="exp/small-seed7/averaged.pt"):
        def cuts(item):
            name, _, stem = item.partition("=")
            return f"{name}={folder}/{stem}_cuts.jsonl.gz"

        flags = ["--lang-dir", folder / "lang_char", "--cuts", cuts(dev)]
        flags += [] if "--repeats" in arguments else ["--repeats", 1]
        flags += ["--test-cuts", *map(cuts, tests)]
        return run("calibrate", "--checkpoint", folder / checkpoint, *flags, *arguments)

    return calibrate


@pytest.fixture(scope="module")
def tables():
    """{method: the table of the test set}."""
    return {}


def table_of(tables, folder, experiment, method) -> ExitTable:
    if method not in tables:
        loaded = load_for_decoding(experiment / "averaged.pt", folder / "lang_char", CPU)
        name, options = chosen_search(experiment / "decode", "dev", method, LAYERS, loaded.config.model.heads)
        search = make_method(name, folder / "lang_char", loaded.tokenizer.vocab_size, CPU)
        tables[method] = collect(loaded, folder / "test_cuts.jsonl.gz", search, options, repeats=1)
    return tables[method]


def recognised(path):
    """Return {utterance: its line of recognised words}."""
    lines = path.read_text().splitlines()
    return {line.split(":")[0]: line for line in lines if "hyp=" in line}


# ---- decoding gives what the table predicts

DETERMINISTIC = [
    # policy, its target, the search (None: chosen by bin/calibrate), the number of exits taken, at least
    ("learned", ("--max-relative-wer", 0.1), None, 2),
    ("learned", ("--target-macs", 0.75), "greedy_search", 2),
    ("posterior", ("--target-layers", 2.4), "1best", 2),
    ("nbest_posterior", ("--target-macs", 0.7), "1best", 2),
    ("nbest_posterior", ("--target-layers", 2.5), "greedy_search", 2),
    ("patience", ("--target-macs", 0.8), None, 2),
    ("budget", ("--target-layers", 2), "1best", 3),
    ("entropy", ("--target-rtf", 9), "greedy_search", 1),
    ("entropy_non_blank", ("--max-relative-wer", 0), "1best", 1),
    ("fixed", ("--target-layers", 3), "1best", 1),
]


@pytest.mark.parametrize(("policy", "target", "method", "exits"), DETERMINISTIC)
def test_decoding_gives_what_the_table_predicts(
    folder, experiment, tables, calibrate, decode, tmp_path, policy, target, method, exits
):
    status, stderr = calibrate(
        "--policy", policy, *target, *(["--method", method] if method else []), "--output", tmp_path / "policy.json"
    )
    assert status == 0, stderr
    fitted = FittedPolicy.load(tmp_path / "policy.json")
    table = table_of(tables, folder, experiment, fitted.method)
    simulated = outcome(fitted.policy, table)
    expected = [LAYERS[place] for place in simulated.taken.tolist()]
    assert len(set(expected)) >= exits, "the policy hardly chooses: nothing is tested"
    words_at = {
        layer: recognised(experiment / f"decode/recogs-test-exit-{layer:02d}-{fitted.method}.txt") for layer in LAYERS
    }

    for max_duration in (60, 0.1):  # batches of many, and of one
        out = tmp_path / f"{max_duration}"
        flags = ("--exit-policy", tmp_path / "policy.json", "--max-duration", max_duration)
        status, stderr = decode(*flags, out=out)
        assert status == 0, stderr
        record = EarlyExitRecord.load(out / f"test-{policy}.json")
        assert record.exits == {layer: expected.count(layer) for layer in LAYERS}
        assert record.errors == simulated.errors.sum() and record.ref_words == table.ref_words.sum()
        assert recognised(out / f"recogs-test-{policy}.txt") == {
            utterance: words_at[layer][utterance] for utterance, layer in zip(table.utterances, expected)
        }
        check_sums(record, experiment)
        # the record counts at the set's mean length, the table at each utterance's
        simulated_macs = simulated.macs.sum() / table.audio_seconds.sum()
        assert record.macs_per_second == pytest.approx(float(simulated_macs), rel=0.05)
        assert record.layers == pytest.approx(float(simulated.layers.mean()))
        assert record.audio_seconds == pytest.approx(float(table.audio_seconds.sum()))
        assert (record.policy, record.method, record.test_set) == (policy, fitted.method, "test")
        assert record.target == fitted.fitted_on["target"] and record.late_utterances == record.nan_exits == 0


def check_sums(record, experiment):
    """Check what holds for the record of any policy."""
    assert sum(record.exits.values()) == record.num_utterances == 20
    assert record.layers == pytest.approx(sum(layer * n for layer, n in record.exits.items()) / 20)
    assert record.errors == record.insertions + record.deletions + record.substitutions
    assert record.wer == pytest.approx(100 * record.errors / record.ref_words)
    assert (record.corpus, record.system, record.seed) == ("tones", "small", 7) and record.rtf > 0
    model, config, *_ = load_for_decoding(experiment / "averaged.pt", experiment.parents[1] / "lang_char", CPU)
    costs = complexity(model.encoder, model.ctc_heads, config.model.num_mel_bins, record.audio_seconds / 20)
    assert record.last_exit_macs_per_second == costs[4].macs_per_second
    heads = sum(cost.head_macs_per_second for cost in costs.values())
    assert costs[1].macs_per_second * 0.999 < record.macs_per_second < costs[4].macs_per_second + heads


@pytest.mark.parametrize(("milliseconds", "layer", "late"), [(60_000, 4, 0), (0.001, 1, 20)])
def test_a_deadline_in_milliseconds_is_the_setting(experiment, calibrate, decode, tmp_path, milliseconds, layer, late):
    policy = tmp_path / "policy.json"
    status, stderr = calibrate("--policy", "deadline", "--deadline-ms", milliseconds, "--output", policy)
    assert status == 0, stderr
    fitted = FittedPolicy.load(policy)
    assert fitted.policy.seconds == milliseconds / 1000
    assert fitted.fitted_on["target"] == f"deadline_ms {milliseconds:g}"
    status, stderr = decode("--exit-policy", policy, out=tmp_path)
    assert status == 0, stderr
    record = EarlyExitRecord.load(tmp_path / "test-deadline.json")
    assert record.exits == {each: 20 * (each == layer) for each in LAYERS} and record.late_utterances == late
    check_sums(record, experiment)


def test_policy_json_names_model_search_and_calibration_set(folder, experiment, calibrate):
    records = [DecodeRecord.load(path) for path in (experiment / "decode").glob("dev-*.json")]
    at_last = {record.method: record.wer for record in records if record.exit_layer == 4}
    # an oracle is not selectable, whatever its WER
    oracle = json.loads((experiment / "decode/dev-exit-04-1best.json").read_text())
    oracle |= {"method": "nbest-oracle", "errors": 0, "insertions": 0, "deletions": 0, "substitutions": 0, "wer": 0.0}
    unfair = experiment / "decode/dev-exit-04-nbest-oracle.json"
    unfair.write_text(json.dumps(oracle))
    try:
        status, stderr = calibrate("--policy", "posterior", "--target-layers", 3)
    finally:
        unfair.unlink()
    assert status == 0, stderr
    fitted = FittedPolicy.load(experiment / "policy.json")  # beside the checkpoint
    assert set(at_last) == set(METHODS) and fitted.method == min(at_last, key=at_last.get) == "1best"
    of_layer = {record.exit_layer: record.config["decoding"] for record in records if record.method == "1best"}
    assert fitted.options == {
        layer: {name: of_layer[layer][name] for name in ("hlg_scale", "blank_penalty")} for layer in LAYERS
    }
    assert len({tuple(each.items()) for each in fitted.options.values()}) > 1, "equal options: nothing is tested"
    assert (fitted.exit_layers, fitted.checkpoint) == (LAYERS, checkpoint_id(experiment / "averaged.pt"))
    on = fitted.fitted_on
    assert (on["set"], on["utterances"], on["target"]) == ("dev", 24, "layers 3")
    assert on["speakers"] == [f"reader-{each}" for each in range(6)]
    assert "--policy posterior --target-layers 3" in on["command"]
    assert 1 <= on["unseen_speakers"]["layers"] <= 3 and on["unseen_speakers"]["rtf"] > 0


# ---- errors, before anything is written


@pytest.mark.parametrize("name", ["test", "test-clean", "an4_test", "TEST_other", "test2"])
def test_a_test_set_is_refused_for_calibration(experiment, calibrate, tmp_path, name):
    status, stderr = calibrate("--output", tmp_path / "policy.json", dev=f"{name}=dev", tests=())
    assert status == 3 and f"{name} is a test set" in stderr and "--cuts dev=PATH" in stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["latest", "contest"])
def test_other_names_that_contain_test_are_accepted(experiment, calibrate, tmp_path, name):
    flags = ("--method", "greedy_search", "--policy", "fixed", "--output", tmp_path / "policy.json")
    status, stderr = calibrate(*flags, dev=f"{name}=dev", tests=())
    assert status == 0, stderr


def test_sets_that_overlap_are_refused(folder, experiment, calibrate, run, tmp_path):
    cuts = list(CutSet.from_file(folder / "dev_cuts.jsonl.gz"))
    CutSet.from_cuts(cuts[:1]).to_file(folder / "same_utterance_cuts.jsonl.gz")
    CutSet.from_cuts([cuts[0].with_id("another")]).to_file(folder / "same_speaker_cuts.jsonl.gz")
    unknown = [cuts[0].with_id(cuts[0].id)]
    unknown[0].supervisions[0].speaker = None
    CutSet.from_cuts(unknown).to_file(folder / "unknown_speaker_cuts.jsonl.gz")
    for tests, message in (
        (("dev=test",), "dev is a test set"),
        (("test=test", "more=same_utterance"), "dev and more share 1 utterances (dev-000)"),
        (("test=same_speaker",), "dev and test share 1 speakers (reader-0)"),
        (("test=unknown_speaker",), "dev and test share 1 utterances (dev-000)"),
    ):
        status, stderr = calibrate("--output", tmp_path / "policy.json", tests=tests)
        assert status == 3 and message in stderr, stderr
        assert "calibrate on a set of other speakers" in stderr or "Calibrate on a dev set" in stderr
        flags = ["--checkpoint", experiment / "averaged.pt", "--lang-dir", folder / "lang_char", "--corpus", "tones"]
        flags += ["--cuts", f"dev={folder}/dev_cuts.jsonl.gz", "--output-dir", tmp_path, "--test-cuts"]
        named = (item.split("=") for item in tests)
        status, stderr = run("tradeoff", *flags, *(f"{name}={folder}/{stem}_cuts.jsonl.gz" for name, stem in named))
        assert status == 3 and message in stderr, stderr
    assert not list(tmp_path.iterdir())


def test_splits_of_one_speaker_get_a_warning(folder, experiment, calibrate, decode, run, tmp_path):
    """A corpus of one speaker is split by utterance: policies are fitted, and every record says what limits it."""
    for name in ("dev", "test"):
        cuts = [cut.with_id(cut.id) for cut in CutSet.from_file(folder / f"{name}_cuts.jsonl.gz")]
        for cut in cuts:
            cut.supervisions[0].speaker = "me"
        CutSet.from_cuts(cuts[:12]).to_file(folder / f"my_{name}_cuts.jsonl.gz")
    policy = tmp_path / "policy.json"
    flags = ("--method", "greedy_search", "--policy", "entropy", "--output", policy)
    status, stderr = calibrate(*flags, dev="dev=my_dev", tests=("test=my_test",))
    assert status == 0, stderr
    status, stderr = decode("--exit-policy", policy, sets=("my_test",), out=tmp_path)
    assert status == 0, stderr
    record = EarlyExitRecord.load(tmp_path / "my_test-entropy.json")
    assert "my_test has all 1 speakers of dev" in record.warning and sum(record.exits.values()) == 12
    status, stderr = decode("--exit-policy", policy, sets=("my_dev",), out=tmp_path / "refused")
    assert status == 3 and "share 12 utterances" in stderr

    flags = ["--checkpoint", experiment / "averaged.pt", "--lang-dir", folder / "lang_char", "--corpus", "tones"]
    flags += ["--cuts", f"dev={folder}/my_dev_cuts.jsonl.gz", "--test-cuts", f"test={folder}/my_test_cuts.jsonl.gz"]
    flags += ["--output-dir", tmp_path, "--method", "greedy_search", "--policies", "entropy", "deadline"]
    status, stderr = run("tradeoff", *flags, "--repeats", 1, "--draws", 20)
    assert status == 0, stderr
    curves = TradeoffRecord.load(tmp_path / "tradeoff-test.json")
    assert {saving.policy for saving in curves.savings} == {"entropy", "deadline"}
    assert "test has all 1 speakers of dev" in curves.warning

    fitted = FittedPolicy.load(policy)
    del fitted.fitted_on["cuts"]  # as in earlier versions
    fitted.save(policy)
    status, stderr = decode("--exit-policy", policy, sets=("my_test",), out=tmp_path / "refused")
    assert status == 1 and "does not list its utterances" in stderr and "bin/calibrate" in stderr


def test_a_calibration_set_that_is_too_small(folder, experiment, calibrate, run, tmp_path):
    cuts = list(CutSet.from_file(folder / "dev_cuts.jsonl.gz"))
    CutSet.from_cuts(cuts[:1]).to_file(folder / "one_cuts.jsonl.gz")
    flags = ("--method", "greedy_search", "--output", tmp_path / "policy.json")
    status, stderr = calibrate(*flags, dev="dev=one")
    assert status == 3 and stderr.startswith("calibrate: the calibration set has 1 utterance"), stderr
    CutSet.from_cuts(cuts[:2]).to_file(folder / "two_cuts.jsonl.gz")
    for policy in POLICIES:
        status, stderr = calibrate(*flags, "--policy", policy, dev="dev=two")
        assert status == 0, stderr


@pytest.mark.parametrize(
    ("flags", "messages"),
    [
        (["--deadline-ms", "50"], ["--deadline-ms 50 is for --policy deadline"]),
        (["--policy", "deadline", "--deadline-ms", "-1"], ["deadline_ms -1", "above 0"]),
        (["--policy", "deadline", "--deadline-ms", "nan"], ["deadline_ms nan", "above 0"]),
        (["--target-macs", "1.5"], ["macs 1.5", "at most 1"]),
        (["--target-layers", "2", "--target-rtf", "1"], ["--target-layers and --target-rtf", "one target"]),
        (["--target-rtf", "1e-9"], ["no setting of learned_nbest costs at most rtf 1e-09; the cheapest", "raise"]),
        (["--policy", "guess"], ["unknown policy guess; choose among fixed, entropy"]),
        (["--repeats", "0"], ["--repeats 0"]),
        (["--method", "guess"], ["--method guess", "choose among greedy_search, ", "1best"]),
        (["--method", "nbest-oracle"], ["--method nbest-oracle", "choose among"]),
        (["--method", "modified_beam_search"], ["--method modified_beam_search", "choose among"]),
        (["--method", "nbest"], ["no record of nbest on dev at layers 1, 2, 3, 4", "--methods nbest --tune-set dev"]),
        (["--decode-dir", "none"], ["none has no record of dev", "bin/decode --tune-set dev"]),
        (["--exit", "7"], ["no exit after layer 7", "choose one of 1, 2, 3, 4"]),
        (["--exit", "1", "--method", "1best"], ["one exit", "nothing to choose"]),
    ],
)
def test_wrong_options_are_refused(experiment, calibrate, tmp_path, flags, messages):
    status, stderr = calibrate(*flags, "--output", tmp_path / "policy.json")
    assert status == 1 and stderr.startswith("calibrate: ")
    assert all(message in stderr for message in messages), stderr
    assert not list(tmp_path.iterdir())


def test_empty_sets_are_named(folder, experiment, calibrate, decode, run, tmp_path):
    CutSet.from_cuts([]).to_file(folder / "none_cuts.jsonl.gz")
    output = ("--output", tmp_path / "policy.json")
    for status, stderr in (
        calibrate(*output, dev="dev=none"),
        calibrate(*output, tests=("test=none",)),
        decode("--exit-policy", some_policy(experiment, tmp_path), sets=("test", "none"), out=tmp_path / "out"),
        decode(sets=("test", "none"), out=tmp_path / "out"),
    ):
        assert status == 1 and "none_cuts.jsonl.gz: there are no cuts in it" in stderr, stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["some.json"]
    status, stderr = calibrate(*output, dev="dev=nowhere")
    assert status == 1 and "nowhere_cuts.jsonl.gz" in stderr and "prepare.sh" in stderr


def some_policy(experiment, folder, policy=None):
    """Write a policy for the experiment's model, as an earlier version did: without the names of the utterances."""
    policy = policy or Threshold("posterior", {1: 0.01, 2: 0.05})
    checkpoint = checkpoint_id(experiment / "averaged.pt")
    fitted_on = {"set": "dev", "speakers": ["reader-0", "reader-1"], "target": "layers 2"}
    fitted = FittedPolicy("posterior", policy, LAYERS, checkpoint, "greedy_search", fitted_on=fitted_on)
    fitted.save(folder / "some.json")
    return folder / "some.json"


def test_decoding_refuses_a_policy_that_does_not_fit(folder, experiment, decode, tmp_path):
    policy = some_policy(experiment, tmp_path)
    out = tmp_path / "out"
    (tmp_path / "hot").write_text("ABBA\n")
    cuts = list(CutSet.from_file(folder / "dev_cuts.jsonl.gz"))
    CutSet.from_cuts([cuts[0].with_id("another")]).to_file(folder / "same_speaker_cuts.jsonl.gz")
    for arguments, options, messages in (
        ([], {"checkpoint": f"exp/small-seed7/epoch-{EPOCHS}.pt"}, ["was fitted for checkpoint", "bin/calibrate"]),
        (["--exit", 3], {}, ["exits after layers 1, 2, 3, 4", "has exits after 1, 2, 3", "bin/calibrate"]),
        (["--exit", 5], {}, ["no exit after layer 5", "choose one of 1, 2, 3, 4"]),
        (["--methods", "1best"], {}, ["--methods 1best", "fitted with the search greedy_search", "leave the options"]),
        (["--tune-set", "test"], {}, ["--tune-set", "leave the options out"]),
        (["--hlg-scales", 1, "--hot-words", tmp_path / "hot"], {}, ["--hot-words", "--hlg-scales", "leave"]),
        ([], {"sets": ("test", "dev")}, ["was fitted on dev", "give sets of other speakers"]),
        ([], {"sets": ("test", "same_speaker")}, ["share 1 speakers (reader-0)", "other speakers"]),
    ):
        status, stderr = decode("--exit-policy", policy, *arguments, out=out, **options)
        assert status == (3 if "share" in messages[0] else 1) and all(each in stderr for each in messages), stderr
        assert "some.json" in stderr or "--exit" in str(arguments)
    whole = policy.read_text()
    for damaged in (whole[:100], "", "[]", whole.replace('"threshold"', '"guess"'), whole.replace('"method"', '"m"')):
        policy.write_text(damaged)
        status, stderr = decode("--exit-policy", policy, out=out)
        assert status == 1 and "some.json is not an exit policy" in stderr and "with bin/calibrate" in stderr, stderr
    status, stderr = decode("--exit-policy", tmp_path / "nowhere.json", out=out)
    assert status == 1 and "nowhere.json" in stderr
    assert not out.exists(), "a refused decoding has written something"


# ---- a model that ends at an exit


def test_a_model_up_to_a_layer_gives_the_records_of_that_layer(experiment, decode, tmp_path, caplog):
    caplog.set_level("INFO")
    weights = ("--hlg-scales", 0.5, 1.0, "--blank-penalties", 0, 1, "--tune-set", "dev", "--methods", *METHODS)
    status, stderr = decode("--exit", 2, *weights, sets=("dev", "test"), out=tmp_path)
    assert status == 0, stderr
    whole = {path.name: DecodeRecord.load(path) for path in (experiment / "decode").glob("*.json")}
    small = {path.name: DecodeRecord.load(path) for path in tmp_path.glob("*.json")}
    assert set(small) == {name for name, record in whole.items() if record.exit_layer <= 2} and len(small) == 8
    for name, record in small.items():
        for field in ("errors", "insertions", "wer", "ref_words", "parameters", "macs_per_second"):
            assert getattr(record, field) == getattr(whole[name], field), (name, field)
        assert record.num_layers == 2
        recogs = f"recogs-{name[: -len('.json')]}.txt"
        assert (tmp_path / recogs).read_text() == (experiment / "decode" / recogs).read_text()
    model, *_ = load_for_decoding(experiment / "averaged.pt", experiment.parents[1] / "lang_char", CPU, exit_layer=2)
    held = [*model.parameters(), *model.buffers()]
    size = sum(tensor.numel() * tensor.element_size() for tensor in held) / 1e6
    count = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert f"up to layer 2: {count:.2f} M parameters, {size:.1f} MB in memory" in caplog.text


def test_a_policy_of_a_model_up_to_a_layer(experiment, calibrate, decode, tmp_path):
    policy = tmp_path / "policy.json"
    status, stderr = calibrate("--exit", 3, "--target-layers", 2, "--policy", "budget", "--output", policy)
    assert status == 0, stderr
    assert FittedPolicy.load(policy).exit_layers == (1, 2, 3)
    status, stderr = decode("--exit-policy", policy, out=tmp_path / "out")
    assert status == 1 and "has exits after 1, 2, 3, 4" in stderr
    status, stderr = decode("--exit-policy", policy, "--exit", 3, out=tmp_path)
    assert status == 0, stderr
    assert set(EarlyExitRecord.load(tmp_path / "test-budget.json").exits) == {1, 2, 3}


# ---- curves, and the report


def test_curves_are_in_the_report(folder, experiment, tables, decode, run, tmp_path):
    out = experiment / "early_exit"
    flags = ["--checkpoint", experiment / "averaged.pt", "--lang-dir", folder / "lang_char", "--corpus", "tones"]
    flags += ["--cuts", f"dev={folder}/dev_cuts.jsonl.gz", "--test-cuts", f"test={folder}/test_cuts.jsonl.gz"]
    status, stderr = run("tradeoff", *flags, "--output-dir", out, "--repeats", 1, "--draws", 50)
    assert status == 0, stderr
    record = TradeoffRecord.load(out / "tradeoff-test.json")
    dynamic = set(POLICIES) - {"fixed"}
    assert {point.policy for point in record.points} == {*dynamic, "fixed", "oracle"}
    assert {saving.policy for saving in record.savings} == dynamic
    assert [point.layers for point in record.points if point.policy == "fixed"] == list(LAYERS)
    assert (record.test_set, record.calibration_set, record.method) == ("test", "dev", "1best")
    assert (record.num_utterances, record.exit_layers, record.system) == (20, LAYERS, "small")
    for layer in LAYERS:  # the fixed exits have the WER of the records
        decoded = DecodeRecord.load(experiment / f"decode/test-exit-{layer:02d}-1best.json")
        [point] = (p for p in record.points if p.policy == "fixed" and p.layers == layer)
        assert point.wer == pytest.approx(decoded.wer) and point.wer_low <= point.wer <= point.wer_high
    again = ExitTable.load(out / "exits/test.json")
    assert torch.equal(again.errors, table_of(tables, folder, experiment, "1best").errors)
    assert ExitTable.load(out / "exits/dev.json").speakers[:2] == ["reader-0", "reader-1"]

    status, stderr = decode("--exit-policy", some_policy(experiment, tmp_path), out=out)
    assert status == 0, stderr
    results = ["--output-dir", tmp_path, "--dev-sets", "dev"]
    status, stderr = run("report", "--corpus", "tones", "--exp-root", folder / "exp", *results)
    assert status == 0, stderr
    text = (tmp_path / "RESULTS.md").read_text()
    assert "Dynamic exits" in text and "(early-exit-small.png)" in text
    assert (tmp_path / "early-exit-small.png").stat().st_size > 5000
    for policy in dynamic:
        assert f"| {policy} |" in text


# ---- NaN, and heads that policies need


@pytest.fixture
def broken(folder, experiment):
    """The experiment's model with a NaN in the head of the second exit."""
    contents = load_checkpoint(experiment / "averaged.pt")
    contents["model"]["ctc_heads.2.weight"][3, 5] = math.nan
    save_checkpoint(folder / "exp/broken-seed7/averaged.pt", contents)
    return folder / "exp/broken-seed7"


def test_an_exit_with_nan_is_passed_over(experiment, broken, decode, tmp_path):
    checkpoint = "exp/broken-seed7/averaged.pt"
    for policy, layer in ((Fixed(2), 3), (Threshold("posterior", {2: 1.0}), 4), (Fixed(1), 1)):
        fitted = some_policy(broken, tmp_path, policy)
        status, stderr = decode("--exit-policy", fitted, checkpoint=checkpoint, out=tmp_path)
        assert status == 0, stderr
        record = EarlyExitRecord.load(tmp_path / "test-posterior.json")
        assert record.exits == {each: 20 * (each == layer) for each in LAYERS}
        assert record.nan_exits == (20 if layer > 2 else 0)
        sound = DecodeRecord.load(experiment / f"decode/test-exit-{layer:02d}-greedy_search.json")
        assert record.errors == sound.errors


def test_nothing_is_fitted_to_nan(broken, calibrate, tmp_path):
    flags = ("--method", "greedy_search", "--output", tmp_path / "policy.json")
    status, stderr = calibrate(*flags, checkpoint="exp/broken-seed7/averaged.pt")
    assert status == 1 and "the exit after layer 2 gives NaN for dev-000" in stderr and "--exit" in stderr, stderr
    assert not list(tmp_path.iterdir())


def test_policies_of_a_model_without_ctc_head(folder, experiment, calibrate, decode, tmp_path):
    """The model is not trained; the test is about which exits are chosen."""
    contents = load_checkpoint(experiment / "averaged.pt")
    contents["config"]["model"] |= {"heads": ["transducer"], "decoder_dim": 16, "joiner_dim": 16}
    torch.manual_seed(1)
    contents["model"] = AsrModel(Config.from_dict(contents["config"]).model).state_dict()
    checkpoint = "exp/transducer-seed7/averaged.pt"
    save_checkpoint(folder / checkpoint, contents)
    search = "transducer-greedy_search"
    flags = ("--methods", search, "--blank-penalties", 0, "--tune-set", "dev")
    status, stderr = decode(*flags, sets=("dev",), checkpoint=checkpoint, out="exp/transducer-seed7/decode")
    assert status == 0, stderr
    output = ("--output", tmp_path / "policy.json")
    for policy in set(POLICIES) - set(WITHOUT_CTC):
        status, stderr = calibrate("--policy", policy, *output, checkpoint=checkpoint)
        assert status == 1 and stderr.startswith(f"calibrate: {policy}: needs a CTC head"), stderr
        assert "choose among fixed, deadline" in stderr
    assert not list(tmp_path.iterdir())
    for policy, *target in (
        ("fixed", "--target-layers", 2),
        ("deadline", "--deadline-ms", 5000),
    ):
        status, stderr = calibrate("--policy", policy, *target, *output, checkpoint=checkpoint)
        assert status == 0, stderr
        status, stderr = decode("--exit-policy", tmp_path / "policy.json", checkpoint=checkpoint, out=tmp_path)
        assert status == 0, stderr
        record = EarlyExitRecord.load(tmp_path / f"test-{policy}.json")
        assert record.method == search and sum(record.exits.values()) == 20
        assert record.exits[{"fixed": 2, "deadline": 4}[policy]] == 20
