"""Describe own data as a corpus: `corpus.sh` and confs."""

from __future__ import annotations

import re
import shlex
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from splitformer.corpora.proposal import Proposal
from splitformer.corpora.sources import ReadOptions, SourceError
from splitformer.corpora.sources.base import absolute_path
from splitformer.files import atomic_folder, atomic_write

NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
MADE_BY = "# Made by local/new_corpus.sh"
CORPUS = """\
# shellcheck shell=bash disable=SC2034,SC2154  # variables are shared with the drivers
{made_by} {name} --from SOURCE, which shows what is in the data; docs/new_corpus.md

corpus_from={source}
corpus_dir={folder}
# Text normalization and splits. Splits are drawn by a hash of the speaker, the recording or the utterance, so that new
# data do not move others; another seed draws other splits.
source_options=(
{options}
)
corpus_source="$(state_of "$corpus_from") ${{source_options[*]}}"

train_splits="train"
dev_splits="dev"
test_splits="test"

token_type={token_type}
vocab_size={vocab_size} # of bpe
lm_order=3
speed_perturb=true
default_config=splitformer
"""


def check_name(name: str, folder: Path, force: bool) -> None:
    """Raise SourceError for an invalid name, a corpus of another origin, or one that exists, unless `force`."""
    if not NAME.fullmatch(name):
        raise SourceError(f"{name!r} is not a name for a corpus: use at most 64 of a to z, digits, - and _")
    if not folder.exists():
        return
    corpus = folder / "corpus.sh"
    if corpus.is_file() and MADE_BY not in corpus.read_text(encoding="utf-8"):
        raise SourceError(f"{corpus} exists and was not made by new_corpus.sh; choose another name")
    if not force:
        raise SourceError(f"{folder} exists; choose another name, or replace its corpus.sh and confs by --force")


def description(
    name: str, source: Path, proposal: Proposal, options: ReadOptions | None = None, decode: bool = False
) -> dict[str, str]:
    """Return {path in the corpus's folder: contents}. decode: whether preparation checks all samples of the audio."""
    source = absolute_path(source)
    if "\n" in str(source):
        raise SourceError(f"{str(source)!r} has a line break in its name: rename it")
    corpus = CORPUS.format(
        made_by=MADE_BY,
        name=name,
        source=shlex.quote(str(source)),
        folder=shlex.quote(str(source if source.is_dir() else source.parent)),
        options="\n".join(f"    {line}" for line in _source_options(proposal, options or ReadOptions(), decode)),
        token_type=proposal.token_type,
        vocab_size=proposal.vocab_size,
    )
    return {"corpus.sh": corpus, **_confs(name, proposal)}


def _source_options(proposal: Proposal, options: ReadOptions, decode: bool) -> list[str]:
    rules, split = proposal.text_rules, proposal.split_rule
    lines = [
        f"--case {rules.case} --punctuation {rules.punctuation} --digits {rules.digits} --channel {options.channel}",
        f"--split-by {split.split_by} --split-seed {split.split_seed} --dev-share {split.dev_share:g} "
        f"--test-share {split.test_share:g}",
        f"--check-audio {'all' if decode else 'headers'}",
    ]
    for name in ("audio_dir", "speakers", "encoding", "audio_column", "text_column", "speaker_column"):
        value = getattr(options, name)
        if value is not None:
            value = absolute_path(value) if isinstance(value, Path) else value
            lines.append(f"--{name.replace('_', '-')} {shlex.quote(str(value))}")
    return lines + ["--skip-missing"] * options.skip_missing


def _confs(name: str, proposal: Proposal) -> dict[str, str]:
    splitformer = [f"# ./run.sh --corpus {name}", "# Expected time: not measured. Result: none yet."]
    baseline = [f"# ./run.sh --corpus {name} --config ee-baseline", "# The same without parallel layers."]
    if proposal.size == "large":
        splitformer.append("# The defaults: the published Splitformer, 36.7 M parameters.")
        baseline += ["[model]", "parallel_exits = []"]
    else:
        exits = {"small": "[1, 6]", "medium": "[2, 12]"}[proposal.size]
        base = f'base = "../../../local/conf/{proposal.size}.toml"'
        average = max(1, proposal.epochs // 6)
        length = ["[augment]", "specaug_warmup_epochs = 6"]
        length += ["[training]", f"num_epochs = {proposal.epochs}", f"average_epochs = {average}"]
        splitformer += [base, "[model]", f"parallel_exits = {exits}", *length]
        baseline += [base, "[model]", "parallel_exits = []", *length]
    confs = {"splitformer": splitformer, "ee-baseline": baseline}
    return {f"conf/{conf}.toml": "\n".join(lines) + "\n" for conf, lines in confs.items()}


def write_folder(folder: Path, files: dict[str, str]) -> None:
    """Write files to a folder. A new folder appears when it is complete; in an old one, other files stay."""
    target: AbstractContextManager[Path] = nullcontext(folder) if folder.exists() else atomic_folder(folder)
    with target as place:
        for name, contents in files.items():
            with atomic_write(place / name) as file:
                file.write(contents)
