"""The commands of docs/export.md that fit a policy and run a model stage by stage."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
from lhotse import CutSet

from splitformer.checkpoint import save_checkpoint
from splitformer.config import Config
from splitformer.data.tokenizer import Tokenizer
from tests.factories import RATE, make_cuts, make_lang_dir, make_texts, tone_speech
from tests.models import SMALL, build


@pytest.fixture
def system(tmp_path):
    """A folder with averaged.pt (random weights), dev_cuts.jsonl.gz of four speakers, lang_char and speech.wav."""
    lang_dir = make_lang_dir(tmp_path, make_texts(40))
    cuts = list(CutSet.from_file(make_cuts(tmp_path, "dev", make_texts(12))))
    for number, cut in enumerate(cuts):
        cut.supervisions[0].speaker = f"reader-{number % 4}"
    CutSet.from_cuts(cuts).to_file(tmp_path / "dev_cuts.jsonl.gz")
    tokens = Tokenizer(lang_dir).tokens
    config = Config(model=dataclasses.replace(SMALL, num_mel_bins=80, vocab_size=len(tokens)))
    model = build(config.model)
    with torch.no_grad():
        for head in model.ctc_heads.values():
            head.weight.mul_(8.0)
    save_checkpoint(
        tmp_path / "averaged.pt", {"model": model.state_dict(), "config": config.to_dict(), "tokens": tokens}
    )
    soundfile.write(tmp_path / "speech.wav", tone_speech("ABC DEF", np.random.default_rng(0)), RATE)
    return tmp_path


def documented_commands(repo_root, section):
    """The commands in a section of docs/export.md, as words."""
    text = (repo_root / "docs/export.md").read_text(encoding="utf-8").partition(f"\n## {section}\n")[2]
    code = [line[4:] for line in text.partition("\n## ")[0].splitlines() if line.startswith("    ")]
    return [shlex.split(command) for command in "\n".join(code).replace("\\\n", " ").splitlines()]


def test_the_documented_commands_run_a_policy_in_stages(system, repo_root):
    replaced = {"python": sys.executable, "EXP": system, "LANG": system / "lang_char", "DIR": system / "stages"}
    replaced |= {"DEV_CUTS": system / "dev_cuts.jsonl.gz", "speech.wav": system / "speech.wav"}
    placeholder = re.compile("|".join(rf"(?<![\w.]){re.escape(name)}(?![\w.])" for name in replaced))
    commands = documented_commands(repo_root, "Stage by stage")
    assert [words[1:4] for words in commands[:2]] == [["-m", "splitformer", each] for each in ("export", "calibrate")]
    for words in commands:
        command = [placeholder.sub(lambda match: str(replaced[match[0]]), word) for word in words]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
    assert re.search(r"speech\.wav\tlayer [234]\t", done.stdout), done.stdout
    weights = json.loads((system / "policy-learned.json").read_text())["policy"]["weights"]
    assert {"frames", "entropy"} <= weights.keys()
