#!/usr/bin/env bash
# Runs every check: the environments, lint, types and tests, fast ones first. ./tests/run.sh --help lists the options.
# shellcheck disable=SC2329  # `check` calls the functions
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

usage() {
    cat <<END
usage: ./tests/run.sh [--fast | --torch2 | --k2-contract] [tests/...] [pytest options]

  (no option)   every check, in both environments
  --fast        lint, types and the fast tests in .venv: what one runs while coding
  --torch2      the tests that need no k2, in .venv-torch2, with a current torch
  --k2-contract what this project expects of k2, in seconds: for a k2 of your own, in the interpreter that
                SPLITFORMER_PYTHON names (default: .venv), which needs pytest
  tests/...     these tests alone

All checks run even if one fails; the exit status says whether any did.
END
}

# Test models are too small to gain from threads; two processes run tests, and distributed tests start two more.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} MKL_NUM_THREADS=${MKL_NUM_THREADS:-1}
status=0

# check NAME COMMAND...
check() {
    printf '== %s\n' "$1"
    "${@:2}" || status=1
}

lint() {
    .venv/bin/ruff check . || return
    find . \( -path './.venv*' -o -path ./.cache -o -path ./.git -o -path './egs/*/data' -o -path './egs/*/exp' \) -prune \
        -o -type f \( -name '*.sh' -o -path ./.ci/run \) -print0 |
        sort -z | xargs -0 .venv/bin/shellcheck --external-sources --source-path=SCRIPTDIR
}

# run_tests VENV OPTIONS...
run_tests() {
    "$1/bin/python" -m pytest -n 2 --dist worksteal --durations 15 "${@:2}"
}

case "${1:-}" in
    --help | -h)
        usage
        ;;
    --torch2)
        shift
        contains_tests=false
        for argument in "$@"; do [[ $argument != tests/* ]] || contains_tests=true; done
        $contains_tests || set -- tests/without_k2 "$@"
        ./setup.sh --torch2 || exit
        check "tests with a current torch" run_tests .venv-torch2 "$@"
        ;;
    --k2-contract)
        [[ -n ${SPLITFORMER_PYTHON:-} ]] || ./setup.sh || exit
        check "what this project expects of k2" "${SPLITFORMER_PYTHON:-.venv/bin/python}" -m pytest -q \
            tests/with_k2/test_k2_contract.py tests/with_k2/test_fast_beam.py "${@:2}"
        ;;
    --fast)
        ./setup.sh || exit
        check lint lint
        check types .venv/bin/mypy
        check "fast tests" run_tests .venv -m "not slow" tests/without_k2 tests/with_k2 "${@:2}"
        ;;
    "" | -*)
        ./setup.sh && ./setup.sh --torch2 || exit
        check lint lint
        check types .venv/bin/mypy
        check "tests in the recipe's environment" run_tests .venv tests/without_k2 tests/with_k2 "$@"
        check "tests with a current torch" run_tests .venv-torch2 tests/without_k2 "$@"
        check "tests of the recipes" run_tests .venv tests/recipe "$@"
        ;;
    *)
        ./setup.sh || exit
        check tests .venv/bin/python -m pytest "$@"
        ;;
esac
exit "$status"
