"""Configuration: strict, complete, and unchanged by a round trip."""

from __future__ import annotations

import dataclasses
import sys

import pytest

from splitformer.config import Config, ConfigError, load_config
from splitformer.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def write(tmp_path, text):
    path = tmp_path / "system.toml"
    path.write_text(text)
    return path


def test_a_conf_states_differences_only_and_overrides_win(tmp_path):
    path = write(tmp_path, "[model]\nd_model = 96\nnum_heads = 4\n[optim]\nschedule = 'cosine'\n")
    config = load_config(path, ["optim.base_lr=2", "optim.schedule=noam", "model.parallel_exits=[]"])
    assert (config.model.d_model, config.model.num_layers) == (96, 12)
    assert (config.optim.base_lr, config.optim.schedule) == (2.0, "noam")
    assert config.model.parallel_exits == ()
    assert Config.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[model]\nd_modle = 96", r"unknown key model\.d_modle, did you mean model\.d_model\?; \[model\] has "),
        ("[model]\nzzz = 96", r"unknown key model\.zzz; \[model\] has"),
        ("[modle]\nd_model = 96", r"unknown section \[modle\], did you mean model\?; sections are model, loss"),
        ("d_model = 96", "is outside a section"),
        ("[model]\nd_model = 'big'", "d_model = 'big' must be an integer"),
        ("[model]\nparallel_gate = 1", "parallel_gate = 1 must be true or false"),
        ("[model]\nsubsampling = 'conv3d'", "must be one of 'conv1d', 'conv2d'"),
        ("[model]\nexit_layers = [2, 4]", r"end at model\.num_layers = 12"),
        ("[model]\nexit_layers = [4, 2, 12]", "must increase"),
        ("[model]\nexit_layers = 12", "exit_layers = 12 must be a list, each item an integer"),
        ("[optim]\nbase_lr = '1'", "must be a number"),
        ("[model]\nparallel_exits = [3]", r"names \[3\], which are no exits"),
        ("[model]\nnum_heads = 7", r"must be a multiple of model\.num_heads = 7"),
        ("[model]\nconv_kernel = 30", "must be odd"),
        ("[model]\nencoder = 'unet'", "must be at least 17|one exit"),
        ("[model]\nencoder = 'unet'\nnum_layers = 19\nexit_layers = [2, 19]\nparallel_exits = []", "has one exit"),
        ("[model]\nencoder = 'unet'\nunet_factors = [2, 4]", "lists of the same length"),
        ("[loss]\nexit_weights = [1.0]", "must be 6 numbers, one per exit"),
        ("[model\n", "is not valid TOML"),
    ],
)
def test_mistakes_are_fatal_and_named(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, text))


def test_overrides_and_missing_files_are_checked(tmp_path):
    path = write(tmp_path, "")
    with pytest.raises(ConfigError, match=r"expected section\.key=value"):
        load_config(path, ["base_lr=3"])
    with pytest.raises(ConfigError, match=r"unknown key optim\.lr"):
        load_config(path, ["optim.lr=3"])
    with pytest.raises(ConfigError, match=r"^--set: model\.d_model = 'a' must be an integer"):
        load_config(path, ["model.d_model=a"])
    with pytest.raises(ConfigError, match=r"system\.toml with --set model\.d_model=7: .* must be a multiple"):
        load_config(path, ["model.d_model=7"])
    with pytest.raises(ConfigError, match=r"there is no conf .*sistem\.toml; its folder has system"):
        load_config(tmp_path / "sistem.toml")
    (tmp_path / "binary.toml").write_bytes(b"\x80\x04\x95")
    with pytest.raises(UserError, match=r"binary\.toml is not text in UTF-8"):
        load_config(tmp_path / "binary.toml")


def test_a_conf_overrides_its_base(tmp_path):
    write(tmp_path, "[model]\nd_model = 96\nnum_heads = 4\n[training]\nnum_epochs = 7\n")
    variant = tmp_path / "variant.toml"
    variant.write_text("base = 'system.toml'\n[model]\nparallel_exits = []\n[optim]\nbase_lr = 2.0\n")
    config = load_config(variant)
    assert (config.model.d_model, config.model.parallel_exits, config.training.num_epochs) == (96, (), 7)
    variant.write_text("base = 'variant.toml'")
    with pytest.raises(ConfigError, match="is its own base"):
        load_config(variant)


def keys_of_bases(conf):
    """The (section, key) that a conf sets itself, and those that its bases set."""
    tables = tomllib.loads(conf.read_text())
    base = tables.pop("base", None)
    own = {(section, key) for section, table in tables.items() for key in table}
    return own, set().union(*keys_of_bases(conf.parent / base)) if base else set()


def test_no_shipped_conf_undoes_what_its_base_sets(shipped):
    for path in [path for folder in shipped for path in folder.glob("conf/*.toml")]:
        own, inherited = keys_of_bases(path)
        assert not own & inherited, f"{path} sets {own & inherited} again"


def test_every_shipped_conf_builds_its_model(shipped):
    from splitformer.model.asr import AsrModel

    confs = [path for folder in shipped for path in sorted(folder.glob("conf/*.toml"))]
    assert {path.parent.parent for path in confs} == set(shipped)
    for path in confs:
        assert path.read_text().startswith("# ./run.sh"), f"{path} must start with its command"
    for model in {load_config(path).model for path in confs}:
        AsrModel(dataclasses.replace(model, feedforward_dim=8))  # a smaller one is built faster
