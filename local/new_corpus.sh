#!/usr/bin/env bash
# Make a corpus of own data: ./local/new_corpus.sh NAME --from SOURCE. See --help and docs/new_corpus.md.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[[ -n ${SPLITFORMER_PYTHON:-} ]] || "$root/setup.sh"
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
exec "${SPLITFORMER_PYTHON:-$root/.venv/bin/python}" "$root/local/new_corpus.py" "$@"
