"""From the authors' files to a checkpoint that this project decodes with."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from splitformer.bin.import_reference import main
from splitformer.checkpoint import CheckpointError, adopt_checkpoint, load_model
from splitformer.config import DataConfig
from splitformer.corpora.tokens import import_tokenizer, take_tokenizer
from splitformer.data.tokenizer import Tokenizer
from tests.tokens import SENTENCES, foreign_tokens


def test_units_of_the_released_layout(tmp_path):
    theirs = foreign_tokens(tmp_path / "theirs.model")
    rows = import_tokenizer(tmp_path / "theirs.model", tmp_path / "lang", 24, case="upper")
    assert rows == [0, 1, 12, 2, *range(3, 12), *range(13, 24)]
    ours = Tokenizer(tmp_path / "lang")
    assert ours.tokens[:4] == ["<blk>", "<sos/eos>", "<unk>", "</s>"]
    for text in [*SENTENCES, "that mat"]:
        ids = ours.encode(text.upper())
        assert [rows[i] for i in ids] == theirs.encode(text) and min(ids) > 3
        # their targets end in </s>, which a model may therefore say
        assert ours.decode([1, *ids, 3]) == text.upper()
    assert ours.unknown_characters("THE ZEBRA") == {"Z", "B"}
    table = (tmp_path / "lang/tokens.txt").read_text().splitlines()
    assert table == [f"{piece} {i}" for i, piece in enumerate(ours.tokens)]


def test_units_of_sentencepieces_own_layout(tmp_path):
    """Unit 0 is `<unk>`: where that is the blank, an unknown unit is added, which the model never says."""
    theirs = foreign_tokens(tmp_path / "theirs.model", {})
    rows = import_tokenizer(tmp_path / "theirs.model", tmp_path / "lang", 24)
    assert rows == [0, 1, None, *range(2, 24)]
    ours = Tokenizer(tmp_path / "lang")
    assert [rows[i] for i in ours.encode("the dog")] == theirs.encode("the dog")
    assert ours.encode("Z")[-1] == 2
    rows = import_tokenizer(tmp_path / "theirs.model", tmp_path / "lang", 24, blank_id=23)
    assert rows == [23, 1, 0, *range(2, 23)]


def test_imported_tokens_can_be_taken_elsewhere_and_foreign_ones_cannot(tmp_path):
    foreign_tokens(tmp_path / "theirs.model")
    import_tokenizer(tmp_path / "theirs.model", tmp_path / "lang", 24)
    take_tokenizer(tmp_path / "lang/bpe.model", tmp_path / "other")
    for name in ("bpe.model", "tokens.txt"):
        assert (tmp_path / "other" / name).read_bytes() == (tmp_path / "lang" / name).read_bytes()
    with pytest.raises(ValueError, match=r"theirs\.model: token 0 is '@', expected '<blk>'.*import_reference"):
        take_tokenizer(tmp_path / "theirs.model", tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="there is no"):
        take_tokenizer(tmp_path / "absent", tmp_path / "none")
    (tmp_path / "text").write_text("no model")
    with pytest.raises(ValueError, match="text is no sentencepiece model"):
        take_tokenizer(tmp_path / "text", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_bad_tokens_are_named(tmp_path):
    foreign_tokens(tmp_path / "theirs.model", sentences=["aA bB cC", "Ab Ca"], vocab_size=16)
    with pytest.raises(ValueError, match="in upper case two pieces are"):
        import_tokenizer(tmp_path / "theirs.model", tmp_path / "lang", 16, case="upper")
    with pytest.raises(ValueError, match=r"blank 16: .* has units 0 to 15"):
        import_tokenizer(tmp_path / "theirs.model", tmp_path / "lang", 16, blank_id=16)
    (tmp_path / "text").write_text("no model")
    with pytest.raises(ValueError, match="text is no sentencepiece model"):
        import_tokenizer(tmp_path / "text", tmp_path / "lang", 16)
    assert not (tmp_path / "lang").exists()


@pytest.fixture
def run(monkeypatch, capsys):
    """The command, with its exit status and what it says."""

    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["import_reference", *map(str, arguments)])
        status = main()
        told = capsys.readouterr()
        return status, told.out + told.err

    return call


def released(shared, folder, kind):
    """The files that the authors would have released, and what their model computes."""
    golden = load_file(shared / f"data/golden/reference_{kind}_tiny.safetensors")
    torch.save({k.removeprefix("model."): v for k, v in golden.items() if k.startswith("model.")}, folder / "model")
    foreign_tokens(folder / "theirs.model")
    return ["--state", folder / "model", "--bpe-model", folder / "theirs.model", "--num-heads", 4], golden


@pytest.mark.parametrize("kind", ["splitformer", "early_conformer", "early_zipformer"])
def test_a_checkpoint_computes_what_the_released_code_does(shared, tmp_path, run, kind):
    arguments, golden = released(shared, tmp_path, kind)
    status, told = run(*arguments, "--output", tmp_path / "made/averaged.pt")
    assert status == 0 and "24 units; tokens in" in told
    model, config, contents = load_model(tmp_path / "made/averaged.pt")
    assert contents["tokens"] == Tokenizer(tmp_path / "made").tokens and config.data.features == "linear-mel"
    rows = contents["imported_from"]["units"]
    with torch.no_grad():
        exits = list(model(golden["in.mel"].transpose(1, 2), torch.tensor([209])))
    assert len(exits) == len(golden["out.mel"])
    for (_, log_probs), expected in zip(exits, golden["out.mel"]):
        torch.testing.assert_close(log_probs, expected[:, :, rows], atol=1e-4, rtol=0)
    assert {"progress", "seed", "world_size", "device", "epoch", "avg"} <= contents.keys()
    adopt_checkpoint(tmp_path / "made/averaged.pt", replace(config, data=DataConfig(features="linear-mel")),
                     tmp_path / "exp/averaged.pt")  # fmt: skip
    assert (tmp_path / "exp/averaged.pt").read_bytes() == (tmp_path / "made/averaged.pt").read_bytes()
    with pytest.raises(CheckpointError, match=r"data\.features = fbank in the conf, linear-mel in the checkpoint"):
        adopt_checkpoint(tmp_path / "made/averaged.pt", replace(config, data=DataConfig()), tmp_path / "none.pt")
    assert json.dumps(contents["imported_from"]["states"]).startswith('{"model": ')


def test_files_that_do_not_fit_are_named(shared, tmp_path, run):
    arguments, _ = released(shared, tmp_path, "splitformer")
    output = tmp_path / "made/averaged.pt"
    conf = tmp_path / "other.toml"
    conf.write_text("[model]\nd_model = 32\nnum_heads = 4\nfeedforward_dim = 64\nconv_kernel = 9\n")
    status, told = run(*arguments, "--output", output, "--config", conf)
    assert status == 1 and "model.conv_kernel = 9 there, 7 here; model.num_layers = 12 there, 6 here" in told
    foreign_tokens(tmp_path / "larger.model", vocab_size=28)
    status, told = run(*arguments, "--output", output, "--bpe-model", tmp_path / "larger.model")
    assert status == 1 and "larger.model has 28 units, the heads of the model have 24" in told
    status, told = run(*arguments, "--output", output, "--bpe-model", tmp_path / "none.model")
    assert status == 1 and "none.model" in told
    status, told = run(*arguments, "--output", output, "--num-heads", 5)
    assert status == 1 and "must be a multiple of model.num_heads = 5" in told
    status, told = run(*arguments, "--output", output, "--state", tmp_path / "theirs.model")
    assert status == 1 and "cannot be read as a state dict" in told
    assert not output.parent.exists()
