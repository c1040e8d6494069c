"""RESULTS.md, its plots and results files, from records written by hand."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from splitformer.bin import report
from splitformer.cli import command
from splitformer.errors import UserError
from splitformer.report.plots import plot_all
from splitformer.report.records import DecodeRecord, EpochRecord, append_epoch
from splitformer.report.render import render
from splitformer.report.results import Published, Results, load_published
from splitformer.report.runs import Run, gather, load_runs, with_committed

EXITS = (2, 10)


def record(system: str, seed: int, test_set: str, layer: int, method: str, errors: int) -> DecodeRecord:
    """A record of 200 reference words: one error is half a percent."""
    return DecodeRecord(
        corpus="toy", system=system, seed=seed, test_set=test_set, exit_layer=layer, num_layers=10,
        method=method, wer=errors / 2, errors=errors, insertions=0, deletions=errors, substitutions=0,
        ref_words=200,
        num_utterances=40, fallback_utterances=0, audio_seconds=120.0, rtf=layer / 1000,
        parameters=layer * 10**6, macs_per_second=layer * 1.5e7, epoch=20, avg=5,
        training_seconds=60.0 * seed, world_size=2, device="cpu",
        config={"optim": {"base_lr": 0.123456789}, "decoding": {"beam": 8, "weight": layer / 10}}, commit="0123abc",
        command=f"python -m splitformer.bin.decode --checkpoint exp/{system}-seed{seed}/averaged.pt",
        date="2026-01-02T03:04:05",
    )  # fmt: skip


# errors by (system, seed) and (test set, layer, method); "1best" is better on test, worse on dev
ERRORS = {
    ("baseline", 1): {
        ("dev", 2, "greedy_search"): 60, ("dev", 10, "greedy_search"): 20,
        ("dev", 2, "1best"): 50, ("dev", 10, "1best"): 30,
        ("test", 2, "greedy_search"): 64, ("test", 10, "greedy_search"): 24,
        ("test", 2, "1best"): 40, ("test", 10, "1best"): 10,
    },
    ("split", 1): {
        ("dev", 10, "greedy_search"): 18, ("test", 2, "greedy_search"): 50, ("test", 10, "greedy_search"): 22,
    },
    ("split", 2): {
        ("dev", 10, "greedy_search"): 14, ("test", 2, "greedy_search"): 54, ("test", 10, "greedy_search"): 23,
    },
}  # fmt: skip


def decode_records(system: str, seed: int) -> list[DecodeRecord]:
    cells = ERRORS[system, seed].items()
    return [record(system, seed, *cell, errors) for cell, errors in cells]


def write_experiments(exp_root: Path, keys: Iterable[tuple[str, int]] = ERRORS) -> None:
    for system, seed in keys:
        exp_dir = exp_root / f"{system}-seed{seed}"
        for each in decode_records(system, seed):
            each.save(exp_dir / "decode" / f"{each.test_set}-exit-{each.exit_layer:02d}-{each.method}.json")
        for epoch in range(1, 21):
            by_exit = {layer: 30.0 / epoch / layer for layer in EXITS}
            wers = dict.fromkeys(EXITS, 100.0 / epoch)
            append_epoch(
                exp_dir / "training.jsonl",
                EpochRecord(epoch, 3.0, 1e4, 0.01, 1e-3, 20.0 / epoch, by_exit, by_exit, wers),
            )


def results(dev_sets: tuple[str, ...] = ("dev",), **changes) -> Results:
    runs = [Run(tuple(dataclasses.replace(each, **changes) for each in decode_records(*key)), ()) for key in ERRORS]
    return Results("toy", runs, dev_sets)


def tables(text: str) -> dict[str, list[dict[str, str]]]:
    """The last Markdown table under each heading or lead-in line, as rows of {column: cell}."""
    found: dict[str, list[dict[str, str]]] = {}
    heading, header = "", []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            if line:
                heading, header = line, []
        elif not header:
            header = cells
            found[heading] = []
        elif set("".join(cells)) - set("-:"):
            assert len(cells) == len(header)
            found[heading].append(dict(zip(header, cells, strict=True)))
    return found


def test_the_summary_chooses_on_dev_alone() -> None:
    text = render(results(), [], {}, "command")
    rows = next(rows for heading, rows in tables(text).items() if heading.startswith("All choices are made on the dev"))
    assert [row["system"] for row in rows] == ["baseline", "**split**"]
    # 1best has 5 % on test, and greedy_search is chosen: 10 % against 15 % on dev
    assert rows[0] == {
        "system": "baseline", "parameters (M)": "10.00", "seeds": "1", "training": "1.0 min × 2 processes",
        "decoding": "greedy_search", "dev, last exit": "10.00", "test, first exit": "32.00",
        "test, last exit": "12.00",
    }  # fmt: skip
    assert rows[1]["seeds"] == "1, 2"
    assert rows[1]["training"] == "1.5 min × 2 processes"
    assert rows[1]["dev, last exit"] == "8.00"
    assert rows[1]["test, first exit"] == "26.00 (25.00–27.00)"


def test_without_a_dev_set_every_method_is_listed() -> None:
    text = render(results(dev_sets=()), [], {}, "command")
    rows = next(rows for heading, rows in tables(text).items() if heading.startswith("No dev set"))
    assert [(row["system"], row["decoding"]) for row in rows] == [
        ("baseline", "greedy_search"), ("baseline", "1best"), ("split", "greedy_search"),
    ]  # fmt: skip


def test_methods_that_use_references_or_correct_words_are_never_chosen() -> None:
    errors = {"nbest": 9, "nbest-oracle": 1, "greedy_search+lexicon": 2}
    records = [record("one", 1, "dev", 2, method, n) for method, n in errors.items()]
    assert Results("toy", [Run(tuple(records), ())], ("dev",)).chosen_method("one") == "nbest"


def test_systems_side_by_side_with_published_figures() -> None:
    published = [
        Published("Theirs", "Paper", "https://example.org/a", wer_per_exit={2: {"test": 31.0}, 12: {"test": 5.1}}),
        Published("Classic", "Report", "https://example.org/b", "One seed", {"test": 7.4}),
    ]
    text = render(results(), published, {}, "command")
    greedy = tables(text)["### greedy_search"]
    theirs = "test<br>Theirs (published)"
    assert greedy == [
        {"layer": "2", "test<br>baseline": "32.00", "test<br>split": "26.00 (25.00–27.00)", theirs: "31"},
        {"layer": "10", "test<br>baseline": "12.00", "test<br>split": "11.25 (11.00–11.50)", theirs: "–"},
        {"layer": "12", "test<br>baseline": "–", "test<br>split": "–", theirs: "5.1"},
    ]
    assert "test<br>split" not in tables(text)["### 1best"][0]  # never decoded so
    assert tables(text)["### Published on the same test sets"] == [{"system": "Classic", "test": "7.4"}]
    assert "- Classic: [Report](https://example.org/b). One seed\n" in text


def test_a_systems_own_tables() -> None:
    text = render(results(), [], {}, "command")
    section = text[text.index("## baseline\n") : text.index("## split\n")]
    found = tables(section)
    assert found["## baseline"] == [
        {
            "seed": "1", "epochs": "20, the last 5 averaged", "training (min)": "1.0", "processes": "2",
            "device": "cpu", "commit": "`0123abc`", "date": "2026-01-02",
        }
    ]  # fmt: skip
    assert found["Cost and WER on the test sets:"][0] == {
        "layer": "2", "parameters (M)": "2.00", "10⁹ MACs per s of audio": "0.030",
        "test<br>greedy_search": "32.00", "test<br>1best": "20.00",
    }  # fmt: skip
    assert found["WER on the dev set, on which choices are made:"][1] == {
        "layer": "10", "dev<br>greedy_search": "10.00", "dev<br>1best": "15.00",
    }  # fmt: skip
    real_time = next(rows for heading, rows in found.items() if heading.startswith("Real-time"))
    assert real_time[1] == {"layer": "10", "greedy_search": "0.0100", "1best": "0.0100"}
    assert "--checkpoint exp/baseline-seed1/averaged.pt" in section
    assert "- 1best, seed 1: beam 8; weight 0.2, 1.0 at layers 2, 10\n" in section
    assert "empty lattice" not in text


def test_a_cell_with_fewer_seeds_says_so() -> None:
    whole = results()
    without = [
        Run(tuple(r for r in run.decode if (r.seed, r.exit_layer, r.test_set) != (2, 10, "test")), ())
        for run in whole.runs
    ]
    text = render(Results("toy", without, ["dev"]), [], {}, "command")
    assert tables(text)["### greedy_search"][1]["test<br>split"] == "11.00 [1 of 2 seeds]"


def test_utterances_with_an_empty_lattice_are_listed() -> None:
    text = render(results(fallback_utterances=3), [], {}, "command")
    assert "- test, layer 10, 1best, seed 1: 3 of 40 utterances\n" in text


def test_seeds_with_different_configurations_give_a_warning() -> None:
    runs = [
        dataclasses.replace(
            run,
            decode=tuple(dataclasses.replace(r, config={"optim": {"base_lr": 0.1 * run.seed}}) for r in run.decode),
        )
        for run in results().runs
    ]
    text = render(Results("toy", runs, ["dev"]), [], {}, "command")
    assert "**The seeds of split have different configurations**" in text
    assert "optim.base_lr is 0.1 (seed 1), 0.2 (seed 2)" in text
    assert "The seeds of baseline" not in text


def test_a_dev_set_that_was_not_decoded() -> None:
    with pytest.raises(UserError, match=r"dev-x was decoded; decoded were \['dev', 'test'\]"):
        results(dev_sets=("dev-x",))


def test_gathered_runs_load_again(tmp_path: Path) -> None:
    write_experiments(tmp_path / "exp")
    (tmp_path / "exp" / "unfinished" / "decode").mkdir(parents=True)
    written = gather(tmp_path / "exp", tmp_path / "results", "toy")
    names = ["baseline-seed1.json", "split-seed1.json", "split-seed2.json"]
    assert [path.name for path in written] == names
    runs = load_runs(tmp_path / "results", "toy")
    order = [("baseline", 1), ("split", 1), ("split", 2)]
    assert [(run.system, run.seed) for run in runs] == order
    for run, key in zip(runs, order):
        assert sorted(run.decode, key=repr) == sorted(decode_records(*key), key=repr)  # configuration untouched
        assert [epoch.epoch for epoch in run.training] == list(range(1, 21))
        assert run.training[6].dev_wer_per_exit == {2: 14.286, 10: 14.286}  # 5 digits
    before = [path.read_bytes() for path in written]
    gather(tmp_path / "exp", tmp_path / "results", "toy")
    assert [path.read_bytes() for path in written] == before
    assert all(len(content) < 15_000 for content in before)


def test_results_of_experiments_that_are_gone_stay(tmp_path: Path) -> None:
    write_experiments(tmp_path / "exp")
    gather(tmp_path / "exp", tmp_path / "results", "toy")
    shutil.rmtree(tmp_path / "exp")
    assert gather(tmp_path / "exp", tmp_path / "results", "toy") == []
    assert len(load_runs(tmp_path / "results", "toy")) == 3


def test_records_of_different_models_are_refused(tmp_path: Path) -> None:
    write_experiments(tmp_path / "exp")
    with pytest.raises(UserError, match="of corpus toy, and the report is on other"):
        gather(tmp_path / "exp", tmp_path / "results", "other")
    shutil.copytree(tmp_path / "exp" / "split-seed1", tmp_path / "exp" / "split-again")
    with pytest.raises(UserError, match="are both split with seed 1"):
        gather(tmp_path / "exp", tmp_path / "results", "toy")
    stray = tmp_path / "exp" / "baseline-seed1" / "decode" / "stray.json"
    dataclasses.replace(decode_records("baseline", 1)[0], config={}).save(stray)
    with pytest.raises(UserError, match="different configurations"):
        gather(tmp_path / "exp", tmp_path / "results", "toy")
    stray.write_text("{}")
    with pytest.raises(UserError, match=r"stray\.json is not a DecodeRecord"):
        gather(tmp_path / "exp", tmp_path / "results", "toy")


@pytest.mark.parametrize("content", ["[]", "{}", '{"shared": {}, "decode": [], "training": []}', "{"])
def test_a_damaged_results_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "split-seed1.json").write_text(content)
    with pytest.raises(UserError, match=r"split-seed1\.json"):
        load_runs(tmp_path, "toy")


# ---- the command


def arguments(folder: Path, *more: object) -> list[str]:
    return ["--corpus", "toy", "--exp-root", f"{folder}/exp", "--dev-sets", "dev", *map(str, more)]


def run_report(folder: Path, *more: object) -> int:
    return command(report.run, arguments(folder, *more), prog="report")


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_command_writes_tables_plots_and_results(tmp_path: Path, repo_root: Path) -> None:
    write_experiments(tmp_path / "exp")
    words = [sys.executable, "-m", "splitformer.bin.report", *arguments(tmp_path, "--output-dir", tmp_path / "out")]
    done = subprocess.run(words, cwd=repo_root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    made = files(tmp_path / "out")
    plots = {"training-baseline.png", "training-split.png", "wer-layers.png", "wer-macs.png"}
    results = {"results/baseline-seed1.json", "results/split-seed1.json", "results/split-seed2.json"}
    assert made.keys() == {"RESULTS.md", *plots, *results}
    assert {str(tmp_path / "out" / name) for name in made} == set(done.stdout.split())
    text = made["RESULTS.md"].decode()
    assert "`python -m splitformer.bin.report --corpus toy" in text
    for name in plots:
        assert made[name].startswith(b"\x89PNG\r\n\x1a\n") and made[name].endswith(b"IEND\xaeB`\x82")
        assert 5_000 < len(made[name]) < 80_000
        assert text.count(f"]({name})") == 1


def test_publishing_and_the_same_bytes_without_experiments(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_experiments(tmp_path / "exp")
    before = files(tmp_path / "exp")
    assert run_report(tmp_path, "--publish", tmp_path / "egs") == 0
    assert files(tmp_path / "exp") == before  # nothing but the published folder is written
    made = files(tmp_path / "egs")
    assert len(made) == 1 + 4 + 3
    shutil.rmtree(tmp_path / "exp")
    assert run_report(tmp_path, "--publish", tmp_path / "egs") == 0
    assert files(tmp_path / "egs") == made
    assert run_report(tmp_path, "--publish", tmp_path / "egs", "--committed", tmp_path / "egs") == 1
    assert "--publish" in capsys.readouterr().err


def test_own_runs_beside_committed_ones(tmp_path: Path) -> None:
    write_experiments(tmp_path / "exp")
    assert run_report(tmp_path, "--publish", tmp_path / "egs") == 0
    committed = files(tmp_path / "egs")
    shutil.rmtree(tmp_path / "exp")
    write_experiments(tmp_path / "exp", [("split", 2)])
    assert run_report(tmp_path, "--committed", tmp_path / "egs") == 0
    assert files(tmp_path / "egs") == committed
    made = {name for name in files(tmp_path / "exp") if not name.startswith("split-seed2/")}
    plots = {"training-split.png", "wer-layers.png", "wer-macs.png"}  # no curves of committed systems alone
    assert made == {"RESULTS.md", "results/split-seed2.json", *plots}
    text = (tmp_path / "exp" / "RESULTS.md").read_text()
    [rows] = (rows for heading, rows in tables(text).items() if "made on the dev" in heading)
    assert {row["system"]: row["seeds"] for row in rows} == {"baseline": "1", "**split**": "1, 2\\*"}
    assert text.count("Your own run") == 1
    assert "training-baseline.png" not in text


def test_a_fresh_clone_shows_the_committed_runs_without_stars(tmp_path: Path) -> None:
    write_experiments(tmp_path / "exp")
    assert run_report(tmp_path, "--publish", tmp_path / "egs") == 0
    shutil.rmtree(tmp_path / "exp")
    assert run_report(tmp_path, "--committed", tmp_path / "egs") == 0
    text = (tmp_path / "exp" / "RESULTS.md").read_text()
    assert "## split\n" in text and "\\*" not in text and "Your own run" not in text


def test_an_own_run_takes_the_place_of_a_committed_one() -> None:
    both = [Run(tuple(decode_records("split", seed)), ()) for seed in (1, 2)]
    merged = with_committed([both[1]], both)
    assert [(run.seed, run.committed) for run in merged] == [(1, True), (2, False)]


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run_report(tmp_path) == 1
    assert capsys.readouterr().err.startswith("report: no results in")
    write_experiments(tmp_path / "exp")
    assert run_report(tmp_path, "--published", tmp_path / "absent.toml") == 1
    assert "absent.toml" in capsys.readouterr().err


# ---- small and odd results


@pytest.mark.parametrize("dev_sets", [(), ("dev",)])
def test_a_single_utterance_at_a_single_exit(tmp_path: Path, dev_sets: tuple[str, ...]) -> None:
    own = record("one", 1, "test", 2, "greedy_search", 0)
    one = dataclasses.replace(own, num_utterances=1, ref_words=0, wer=0.0, num_layers=2)
    runs = [Run((one, dataclasses.replace(one, test_set="dev")), ())]
    text = render(Results("toy", runs, dev_sets), [], {}, "command")
    assert tables(text)["### greedy_search"][0]["test<br>one"] == "0.00"
    assert plot_all(Results("toy", runs, dev_sets), [], tmp_path).keys() == {
        "WER against layers", "WER against multiply-accumulates",
    }  # fmt: skip


def test_seeds_and_sets_that_were_decoded_differently() -> None:
    runs = [
        Run((record("one", 1, "dev", 2, "greedy_search", 3), record("one", 1, "test", 2, "greedy_search", 4)), ()),
        Run((record("one", 2, "other", 4, "1best", 5),), ()),
        Run((record("two", 1, "test", 2, "nbest-oracle", 6),), ()),
    ]
    text = render(Results("toy", runs, ("dev",)), [], {}, "command")
    assert tables(text)["### 1best"][0] == {"layer": "2", "other<br>one": "–", "test<br>one": "–"}
    assert tables(text)["### 1best"][1]["other<br>one"] == "2.50 [1 of 2 seeds]"


def test_long_names_of_systems_are_letters_explained_once() -> None:
    names = ["small", "small+training.num_epochs=2+data.max_duration=60", "small+training.num_epochs=3+init-0123abcd"]
    runs = [Run((record(name, 1, "test", 2, "greedy_search", 9),), ()) for name in names]
    text = render(Results("toy", runs, ()), [], {}, "command")
    assert list(tables(text)["### greedy_search"][0]) == [
        "layer", "test<br>small", "test<br>small [a]", "test<br>small [b]",
    ]  # fmt: skip
    assert f"[a] `{names[1]}`<br>\n[b] `{names[2]}`\n" in text
    assert f"## {names[1]}\n" in text
    assert all(names[1] not in line for line in text.splitlines() if line.startswith("|"))


# ---- published figures


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[system", "is not valid TOML"),
        ("[system]\n", r"consists of \[\[system\]\] tables"),
        ("systems = []\n", r"has the keys \['systems'\]"),
        ('[[system]]\nname = "A"\nurl = "u"\nwer = {t = 1.0}\n', r"number 1 .*missing keys \['source'\]"),
        ('[[system]]\nname = "A"\nurl = "u"\nsource = "s"\nWER = 1.0\n', r"unknown keys \['WER'\]"),
        ('[[system]]\nname = "A"\nurl = "u"\nsource = "s"\n', "give either wer"),
        (
            '[[system]]\nname = "A"\nurl = "u"\nsource = "s"\n[system.wer_per_exit]\nlast = {t = 1.0}\n',
            "'last'",
        ),
    ],
)
def test_published_figures_that_cannot_be_read(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "published.toml").write_text(text)
    with pytest.raises(UserError, match=message):
        load_published(tmp_path / "published.toml")


def test_the_published_figures_of_the_recipes_load(shipped: list[Path]) -> None:
    files = [folder / "published.toml" for folder in shipped]
    loaded = {path.parent.name: load_published(path) for path in files if path.is_file()}
    splitformer = next(each for each in loaded["librispeech"] if each.name == "Splitformer")
    assert list(splitformer.wer_per_exit) == [2, 4, 6, 8, 10, 12]
    assert splitformer.wer_per_exit[12] == {"test-clean": 4.8, "test-other": 14.7}
    assert [each.wer for each in loaded["an4"]] == [{"test": 5.95}, {"test": 10.48}, {"test": 7.4}]
    assert all(each.url.startswith("https://") for figures in loaded.values() for each in figures)


def test_a_results_file_has_shared_values_once_and_one_record_a_line(tmp_path: Path) -> None:
    write_experiments(tmp_path / "exp")
    path = gather(tmp_path / "exp", tmp_path / "results", "toy")[0]
    values = json.loads(path.read_text())
    assert values["config"] == {"optim": {"base_lr": 0.123456789}}
    decode = values["decode"]
    assert decode["shared"]["system"] == "baseline" and "wer" in decode["columns"]
    assert decode["rows"][0][decode["columns"].index("decoding")] == {"beam": 8, "weight": 0.2}
    assert sum(line.startswith("   [") for line in path.read_text().splitlines()) == 8 + 20
