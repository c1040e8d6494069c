#!/usr/bin/env bash
# Every check: the environment, lint, and the tests, quick ones first.
#
#   ./tests/run.sh [--fast] [pytest options]                 in .venv; --fast leaves out the recipe tests
#   ./tests/run.sh tests/... [pytest options]                these tests alone, without lint
#   ./tests/run.sh --torch2 [pytest options or tests/...]    in .venv-torch2: what needs no k2, under today's torch
#
# All checks run even where one fails; the exit status tells whether any did.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

suites=(tests/without_k2 tests/with_k2 tests/recipe)
venv=.venv
setup_options=()
lint=true
case "${1:-}" in
    --fast)
        suites=(tests/without_k2 tests/with_k2)
        shift
        ;;
    --torch2)
        suites=(tests/without_k2)
        venv=.venv-torch2 setup_options=(--torch2) lint=false      # the files are the same, one lint is enough
        shift
        ;;
esac
for argument in "$@"; do
    case "$argument" in tests/*) suites=() lint=false ;; esac      # the caller says which
done

./setup.sh "${setup_options[@]}"

# Test models are too small to gain from threads, and distributed tests run a process for each core.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} MKL_NUM_THREADS=${MKL_NUM_THREADS:-1}

status=0
if $lint; then
    echo "== ruff"
    "$venv/bin/ruff" check . || status=1
    echo "== shellcheck"
    find . \( -path './.venv*' -o -path ./.cache -o -path ./.git -o -path './egs/*/data' -o -path './egs/*/exp' \) -prune \
        -o -type f \( -name '*.sh' -o -path ./.ci/run \) -print0 |
        sort -z | xargs -0 "$venv/bin/shellcheck" --external-sources --source-path=SCRIPTDIR || status=1
fi
echo "== pytest, $("$venv/bin/python" -c 'import sys, torch; print("Python", sys.version.split()[0], "torch", torch.__version__)')"
"$venv/bin/python" -m pytest "${suites[@]}" "$@" || status=1
exit "$status"
