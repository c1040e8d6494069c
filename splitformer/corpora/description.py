"""A corpus's description, written for own data: `corpus.sh` and confs, nothing else."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

from splitformer.corpora.sources import SourceError
from splitformer.corpora.survey import Proposal
from splitformer.files import atomic_write

NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
MADE_BY = "# Made by local/new_corpus.sh"


def check_name(name: str, folder: Path, force: bool) -> None:
    """Raises SourceError for a name that is none, or where `folder`, its place, exists and `force` is not given."""
    if not NAME.fullmatch(name):
        raise SourceError(f"{name!r} is no name for a corpus: small letters of English, digits, - and _, at most 64")
    if not folder.exists():
        return
    description = folder / "corpus.sh"
    if not force:
        raise SourceError(
            f"{folder} exists, and nothing was written: choose another name, or write its files anew by --force"
        )
    if description.is_file() and MADE_BY not in description.read_text(encoding="utf-8"):
        raise SourceError(f"{description} was not made by new_corpus.sh, and is not written over: choose another name")


def description(
    name: str,
    source: Path,
    proposal: Proposal,
    *,
    channel: int = 0,
    audio_dir: Path | None = None,
    speakers: str | None = None,
) -> dict[str, str]:
    """{path in the corpus's folder: contents}."""
    source = source.absolute()
    if "\n" in str(source):
        raise SourceError(f"{str(source)!r} has a line break in its name: rename it")
    rules, split = proposal.text_rules, proposal.split_rule
    options = [f"--case {rules.case} --punctuation {rules.punctuation} --digits {rules.digits} --channel {channel}"]
    options.append(f"--split-by {split.key} --split-seed {split.seed}")
    options[-1] += f" --dev-share {split.dev:g} --test-share {split.test:g}"
    if audio_dir is not None:
        options.append(f"--audio-dir {shlex.quote(str(audio_dir.absolute()))}")
    if speakers is not None:
        options.append(f"--speakers {speakers}")
    corpus = [
        "# shellcheck shell=bash disable=SC2034,SC2154  # variables are shared with the drivers",
        f"{MADE_BY} {name} --from SOURCE, which shows what is in the data; docs/new_corpus.md",
        "",
        f"corpus_from={shlex.quote(str(source))}",
        f"corpus_dir={shlex.quote(str(source if source.is_dir() else source.parent))}",
        "# What is kept of the text, and who is in which split: by a hash of the speaker, the recording or the",
        "# utterance, so that new ones move none. Another seed divides otherwise.",
        "source_options=(",
        *(f"    {option}" for option in options),
        ")",
        'corpus_source="$(state_of "$corpus_from") ${source_options[*]}"',
        "",
        'train_splits="train"',
        'dev_splits="dev"',
        'test_splits="test"',
        "",
        f"token_type={proposal.token_type}",
        f"vocab_size={proposal.vocab_size} # of bpe",
        "lm_order=3",
        "speed_perturb=true",
        "default_config=splitformer",
    ]
    head = [f"# ./run.sh --corpus {name}", "# Expected time: not measured. Result: none yet."]
    baseline = [f"# ./run.sh --corpus {name} --config ee-baseline", "# The same without parallel layers."]
    if proposal.size == "large":
        head.append("# The defaults: the published Splitformer, 36.7 M parameters.")
        baseline += ["[model]", "parallel_exits = []"]
    else:
        average = max(1, proposal.epochs // 6)
        baseline.append(f'base = "../../../local/conf/{proposal.size}.toml"')
        baseline += ["[training]", f"num_epochs = {proposal.epochs}", f"average_epochs = {average}"]
        exits = {"small": "[1, 6]", "medium": "[2, 12]"}[proposal.size]
        head += ['base = "ee-baseline.toml"', "[model]", f"parallel_exits = {exits}"]
    return {
        "corpus.sh": "\n".join(corpus) + "\n",
        "conf/splitformer.toml": "\n".join(head) + "\n",
        "conf/ee-baseline.toml": "\n".join(baseline) + "\n",
    }


def write_folder(folder: Path, files: dict[str, str]) -> None:
    """Write the files; a folder that does not exist appears when it is complete, and of one that does nothing else
    changes."""
    if folder.exists():
        for name, contents in files.items():
            with atomic_write(folder / name) as file:
                file.write(contents)
        return
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        for name, contents in files.items():
            with atomic_write(temporary / name) as file:
                file.write(contents)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
