"""What every test may use: the repository's root, real speech and reference outputs, and a corpus of tones."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.factories import make_cuts, make_lang_dir, make_texts

REPO_ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ("an4", "librispeech", "mini", "tedlium", "voxpopuli")
"""corpora of this repository; egs/ may have others, which are their users' own"""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--shared",
        metavar="DIR",
        type=Path,
        default=REPO_ROOT.parent / "shared",
        help="folder with data/an4_sphere.tar.gz, data/LibriSpeech and data/golden; "
        "tests that need it are skipped where it is absent (default: shared/ beside the repository)",
    )


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The repository's root folder."""
    return REPO_ROOT


@pytest.fixture(scope="session")
def shipped() -> list[Path]:
    """The folders in egs/ that this repository has; users may add others."""
    return [REPO_ROOT / "egs" / name for name in SHIPPED]


@pytest.fixture(scope="session")
def shared(request: pytest.FixtureRequest) -> Path:
    """The folder given by `--shared`; a test that asks for it is skipped where there is none."""
    folder: Path = request.config.getoption("--shared").resolve()
    if not folder.is_dir():
        pytest.skip(f"needs the shared data, and {folder} is no folder: pass --shared DIR")
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """80 training and 20 dev utterances of tones: (folder, train cuts, dev cuts, lang_dir); not to be changed"""
    folder = tmp_path_factory.mktemp("corpus")
    texts = make_texts(80)
    return (
        folder,
        make_cuts(folder, "train", texts),
        make_cuts(folder, "dev", make_texts(20, seed=1), seed=1),
        make_lang_dir(folder, texts),
    )
