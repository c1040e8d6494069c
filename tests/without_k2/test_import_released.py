"""From the authors' files to a checkpoint that this project decodes with."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from splitformer.bin.import_released import run
from splitformer.checkpoint import CheckpointError, adopt_checkpoint, checkpoint_id, load_model
from splitformer.cli import command
from splitformer.config import DataConfig
from splitformer.corpora.tokens import import_tokenizer, take_tokenizer
from splitformer.data.tokenizer import Tokenizer
from splitformer.errors import UserError
from tests.golden import KINDS, load_golden
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
    with pytest.raises(ValueError, match=r"theirs\.model: token 0 is '@', expected '<blk>'.*import_released"):
        take_tokenizer(tmp_path / "theirs.model", tmp_path / "none")
    with pytest.raises(UserError, match="there is no"):
        take_tokenizer(tmp_path / "absent", tmp_path / "none")
    (tmp_path / "text").write_text("no model")
    with pytest.raises(ValueError, match="text is not a sentencepiece model"):
        take_tokenizer(tmp_path / "text", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_bad_tokens_are_named(tmp_path):
    foreign_tokens(tmp_path / "theirs.model", sentences=["aA bB cC", "Ab Ca"], vocab_size=16)
    with pytest.raises(ValueError, match="in upper case two pieces are"):
        import_tokenizer(tmp_path / "theirs.model", tmp_path / "lang", 16, case="upper")
    with pytest.raises(ValueError, match=r"blank 16: .* has units 0 to 15"):
        import_tokenizer(tmp_path / "theirs.model", tmp_path / "lang", 16, blank_id=16)
    (tmp_path / "text").write_text("no model")
    with pytest.raises(ValueError, match="text is not a sentencepiece model"):
        import_tokenizer(tmp_path / "text", tmp_path / "lang", 16)
    assert not (tmp_path / "lang").exists()


@pytest.fixture
def import_released(capsys):
    """Run the command in this process: (exit status, what it printed)."""

    def call(*arguments):
        status = command(run, list(map(str, arguments)), prog="import-released")
        output = capsys.readouterr()
        return status, output.out + output.err

    return call


def released(shared, folder, kind, **changed):
    """Options of the command for files such as the authors would release, and what their model computes."""
    state, tensors = load_golden(shared, kind)
    torch.save(state, folder / "model")
    foreign_tokens(folder / "theirs.model")
    options = {"state": folder / "model", "bpe-model": folder / "theirs.model", "num-heads": 4}
    options |= {"output": folder / "made/averaged.pt"} | {name.replace("_", "-"): x for name, x in changed.items()}
    return [word for name, value in options.items() for word in (f"--{name}", value)], tensors


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_computes_what_the_released_code_does(shared, tmp_path, import_released, kind):
    arguments, tensors = released(shared, tmp_path, kind)
    status, output = import_released(*arguments)
    assert status == 0 and "24 units; tokens in" in output
    checkpoint = tmp_path / "made/averaged.pt"
    model, config, contents = load_model(checkpoint)
    assert contents["tokens"] == Tokenizer(tmp_path / "made").tokens and config.data.features == "linear-mel"
    assert contents["imported_from"]["states"] == {"model": checkpoint_id(tmp_path / "model")}
    rows = contents["imported_from"]["units"]
    with torch.no_grad():
        exits = list(model(tensors["in.mel"].transpose(1, 2), torch.tensor([209])))
    for (_, log_probs), expected in zip(exits, tensors["out.mel"], strict=True):
        torch.testing.assert_close(log_probs, expected[:, :, rows], atol=1e-4, rtol=0)
    # run.sh --checkpoint takes it
    adopt_checkpoint(checkpoint, config, tmp_path / "exp/averaged.pt")
    assert (tmp_path / "exp/averaged.pt").read_bytes() == checkpoint.read_bytes()
    with pytest.raises(CheckpointError, match=r"data\.features = fbank in the conf, linear-mel in the checkpoint"):
        adopt_checkpoint(checkpoint, replace(config, data=DataConfig()), tmp_path / "none.pt")


def test_the_conf_becomes_the_configuration_of_the_checkpoint(shared, tmp_path, import_released):
    conf = tmp_path / "tiny.toml"
    conf.write_text(
        "[model]\nd_model = 32\nnum_heads = 2\nfeedforward_dim = 64\nconv_kernel = 7\nnum_layers = 6\n"
        'exit_layers = [2, 4, 6]\nparallel_exits = []\n[data]\nfeatures = "linear-mel"\nmax_duration = 77\n'
    )
    arguments, _ = released(shared, tmp_path, "early_conformer", config=conf, num_heads=2, lang_dir=tmp_path / "lang")
    status, output = import_released(*arguments)
    assert status == 0, output
    _, config, contents = load_model(tmp_path / "made/averaged.pt")
    assert (config.model.num_heads, config.model.vocab_size, config.data.max_duration) == (2, 24, 77.0)
    assert contents["tokens"] == Tokenizer(tmp_path / "lang").tokens


def test_files_that_do_not_fit_are_named(shared, tmp_path, import_released):
    def check(message, **changed):
        status, output = import_released(*released(shared, tmp_path, "splitformer", **changed)[0])
        assert status == 1 and message in output, output

    conf = tmp_path / "other.toml"
    conf.write_text("[model]\nd_model = 32\nnum_heads = 4\nfeedforward_dim = 64\nconv_kernel = 9\n")
    check("model.conv_kernel = 9 in the conf, 7 in the weights; model.num_layers = 12 in the conf, 6 in", config=conf)
    foreign_tokens(tmp_path / "larger.model", vocab_size=28)
    check("larger.model has 28 units", bpe_model=tmp_path / "larger.model")
    check("none.model", bpe_model=tmp_path / "none.model")
    check("must be a multiple of model.num_heads = 5", num_heads=5)
    check("cannot be read as a state dict", state=tmp_path / "theirs.model")
    assert not (tmp_path / "made").exists()
