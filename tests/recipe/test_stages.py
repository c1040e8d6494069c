"""The drivers' bookkeeping: what is made once, what is made again, what stops a run; options and signals."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

PRELUDE = """
set -euo pipefail
called_from=$PWD
source local/parse_options.sh
source local/stages.sh
value_options=(stage stop_stage name) flag_options=(strict) list_options=(set)
stage=0 stop_stage=2 name=none strict=false set=(default)
usage() { echo usage; }
"""


@pytest.fixture
def bash(repo_root: Path):
    """Run a script after PRELUDE, in the repository's root."""

    def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", "-c", PRELUDE + script, "driver.sh", *arguments]
        return subprocess.run(command, cwd=repo_root, text=True, capture_output=True)

    return run


MAKE = 'build() { echo "building"; echo "$1" >"$target"; }; make_artefact "$target" "option $value" build "$value"'


def test_an_artefact_is_made_once_for_the_same_options(bash, tmp_path: Path) -> None:
    target = tmp_path / "folder" / "a.txt"
    outputs = [bash(f"target={target} value={value}; {MAKE}").stdout for value in (1, 1, 2)]
    assert ["building" in output for output in outputs] == [True, False, True]
    assert "exists already" in outputs[1] and "was made from other inputs" in outputs[2]
    assert target.read_text() == "2\n"
    assert (target.parent / ".a.txt.done").read_text() == "option 2\n"
    target.unlink()
    assert "building" in bash(f"target={target} value=2; {MAKE}").stdout


def test_a_folder_holds_its_own_fingerprint(bash, tmp_path: Path) -> None:
    script = 'build() { mkdir -p "$1"; }; make_artefact "$1" from build "$1"'
    assert bash(script, str(tmp_path / "lang")).returncode == 0
    assert (tmp_path / "lang" / ".done").read_text() == "from\n"
    assert "exists already" in bash(script, str(tmp_path / "lang")).stdout


@pytest.mark.parametrize("fault", ["false", "cat /nonexistent | cat", "exit 3", "undefined_command", "echo $undefined"])
def test_an_artefact_that_failed_is_not_marked(bash, tmp_path: Path, fault: str) -> None:
    target = tmp_path / "a.txt"
    result = bash(
        f'build() {{ echo half >"{target}"; {fault}; echo on; }}; make_artefact "{target}" x build; echo after'
    )
    assert result.returncode != 0 and "after" not in result.stdout and "on\n" not in result.stdout
    assert not (tmp_path / ".a.txt.done").exists()
    repaired = bash(f'build() {{ echo whole >"{target}"; }}; make_artefact "{target}" x build')
    assert repaired.returncode == 0 and target.read_text() == "whole\n"


def test_a_command_that_makes_nothing_is_an_error(bash, tmp_path: Path) -> None:
    result = bash(f'make_artefact "{tmp_path / "a"}" x true')
    assert result.returncode == 1 and "does not exist" in result.stderr


def test_stages_by_number_and_by_name(bash) -> None:
    stages = (
        'select_stages one two three; for n in one two three; do eval "stage_$n() { echo run-$n; }"; run_stage $n; done'
    )
    script = 'parse_options "$@"; ' + stages
    assert "run-" in bash(script).stdout
    for arguments in (("--stage", "1", "--stop-stage", "1"), ("--stage", "two", "--stop-stage=two")):
        result = bash(script, *arguments)
        assert "run-two" in result.stdout and "run-one" not in result.stdout and "run-three" not in result.stdout
    result = bash(script, "--stage", "four")
    assert result.returncode == 2
    assert "unknown stage 'four' for --stage; stages are: 0 one, 1 two, 2 three" in result.stderr
    assert "comes after" in bash(script, "--stage", "2", "--stop-stage", "0").stderr


LOCKED = """
locked_folders=("$1")
make() { touch "$1/started"; while [[ ! -e $1/end ]]; do sleep 0.02; done; touch "$1/made"; }
make_artefact "$1/made" "options" make "$1"
echo finished
"""


def start(repo_root: Path, script: str, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["bash", "-c", PRELUDE + script, "driver.sh", str(folder)], cwd=repo_root, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=as_in_a_terminal,
    )  # fmt: skip


def as_in_a_terminal() -> None:
    """Undo what nohup, and a shell that starts tests in the background, leave to their children: ignored signals."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.02)


def test_a_second_driver_is_refused_and_told_who_changes_the_folder(repo_root: Path, tmp_path: Path) -> None:
    first = start(repo_root, LOCKED, tmp_path)
    wait_for(tmp_path / "started")
    second = start(repo_root, LOCKED, tmp_path)
    output, error = second.communicate(timeout=20)
    assert second.returncode == 1 and not output, output
    assert f"{tmp_path} is in use by driver.sh, process {first.pid} on host {socket.gethostname()}, since 20" in error
    (tmp_path / "end").touch()
    assert "finished" in first.communicate(timeout=20)[0]
    # what is made already needs no lock
    third = start(repo_root, LOCKED, tmp_path)
    assert "exists already" in third.communicate(timeout=20)[0]


def test_a_killed_driver_leaves_no_lock(repo_root: Path, tmp_path: Path) -> None:
    first = start(repo_root, LOCKED, tmp_path)
    wait_for(tmp_path / "started")
    first.kill()
    first.communicate()
    (tmp_path / "end").touch()
    deadline = time.monotonic() + 20
    while "finished" not in start(repo_root, LOCKED, tmp_path).communicate(timeout=20)[0]:  # its last `sleep` ends
        assert time.monotonic() < deadline


def test_a_folder_that_is_read_cannot_be_changed_and_may_be_read_by_others(repo_root: Path, tmp_path: Path) -> None:
    read = 'lock_folder shared "$1"; touch "$1/$2.reads"; while [[ ! -e $1/end ]]; do sleep 0.02; done'
    readers = [start(repo_root, read.replace("$2", name), tmp_path) for name in ("one", "two")]
    for name in ("one", "two"):
        wait_for(tmp_path / f"{name}.reads")
    writer = start(repo_root, LOCKED, tmp_path)
    _, error = writer.communicate(timeout=20)
    assert writer.returncode == 1 and "is in use by runs that read it" in error
    assert all(f" {reader.pid}" in error for reader in readers)
    (tmp_path / "end").touch()
    assert [reader.wait(20) for reader in readers] == [0, 0]
    assert "finished" in start(repo_root, LOCKED, tmp_path).communicate(timeout=20)[0]


def test_a_missing_input_stops_the_run(bash, tmp_path: Path) -> None:
    for call in ("checksum", "fingerprint_of"):
        for name, stage in (("HLG.pt", "graphs"), ("test_cuts.jsonl.gz", "fbank"), ("averaged.pt", "average")):
            result = bash(f'inputs=$({call} "{tmp_path / name}"); echo after')
            assert result.returncode == 1 and "after" not in result.stdout
            assert f"stage '{stage}' makes it" in result.stderr


def test_options(bash) -> None:
    show = 'parse_options "$@"; echo "$name $strict ${#set[@]} ${set[*]}"'
    assert bash(show).stdout == "none false 1 default\n"
    assert bash(show, "--name", "a b", "--strict", "--set", "x=[1, 2]", "y=3", "--set", "z=4").stdout == (
        "a b true 3 x=[1, 2] y=3 z=4\n"
    )
    assert bash(show, "--help").stdout == "usage\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nmae", "x"], "unknown option '--nmae'. Did you mean --name? --help lists the options"),
        (["x"], "unexpected argument 'x'"),
        (["--name"], "--name needs a value"),
        (["--name", "--strict"], "--name needs a value, and '--strict' is an option"),
        (["--strict=true"], "--strict takes no value"),
        (["--set"], "--set needs one or more values"),
    ],
)
def test_bad_options_are_named(bash, arguments: list[str], message: str) -> None:
    result = bash('parse_options "$@"; echo after', *arguments)
    assert result.returncode == 2 and message in result.stderr and not result.stdout


def test_command_line_overrides_corpus(bash) -> None:
    result = bash(
        'parse_options "$@"; name=corpus strict=false; reapply_options; echo "$name $strict"', "--name", "mine"
    )
    assert result.stdout == "mine false\n"


SAVES = """
save() { sleep 0.5; touch "$1/saved"; exit 143; }
work() { trap 'save "$1"' TERM; sleep 60 & touch "$1/started"; wait; }
export -f save work
supervise bash -c 'work "$1"' work "$1"
echo after
"""


@pytest.mark.parametrize("stdin", ["open", "closed"])
@pytest.mark.parametrize(("name", "status"), [("TERM", 143), ("INT", 130), ("HUP", 143), ("USR1", 138)])
def test_a_signal_to_the_driver_reaches_what_it_runs_and_waits_for_it(
    repo_root: Path, tmp_path: Path, name: str, status: int, stdin: str
) -> None:
    """The command saves its state when it is asked to stop; a child of its own ends with it."""
    driver = start(repo_root, ("exec <&-\n" if stdin == "closed" else "") + SAVES, tmp_path)
    wait_for(tmp_path / "started")
    driver.send_signal(getattr(signal, f"SIG{name}"))
    output, _ = driver.communicate(timeout=20)
    assert driver.returncode == status and (tmp_path / "saved").exists()
    assert "the same command resumes" in output and "after" not in output


@pytest.mark.parametrize("script", [SAVES, 'touch "$1/started" "$1/saved"; sleep 1; echo after'])
def test_a_signal_reaches_a_driver_that_is_process_1(repo_root: Path, tmp_path: Path, script: str) -> None:
    """A container's process 1 ignores signals without a handler: inside a command of a stage, and between two."""
    command = ["unshare", "--pid", "--fork", "--mount-proc", "bash", "-c", PRELUDE + script, "driver.sh", str(tmp_path)]
    if subprocess.run([*command[:4], "true"], capture_output=True).returncode:
        pytest.skip("this machine does not let us make a PID namespace")
    container = subprocess.Popen(command, cwd=repo_root, text=True, stdout=subprocess.PIPE)
    wait_for(tmp_path / "started")
    [driver] = Path(f"/proc/{container.pid}/task/{container.pid}/children").read_text().split()
    os.kill(int(driver), signal.SIGTERM)
    output, _ = container.communicate(timeout=20)
    assert container.returncode == 143 and (tmp_path / "saved").exists() and "after" not in output


def test_a_command_of_a_stage_fails_as_it_would_alone(bash) -> None:
    assert bash("supervise true; echo after").stdout == "after\n"
    failed = bash("supervise bash -c 'exit 7'; echo after")
    assert failed.returncode == 7 and not failed.stdout
