#!/usr/bin/env bash
# Writes k2.lock and torch2.lock anew from k2.in and torch2.in, with the newest versions that go together.
# Needs uv. Run ./tests/run.sh and ./tests/run.sh --torch2 afterwards.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
trap 'rm -f k2.lock.new torch2.lock.new' EXIT

compile() { uv pip compile -q --no-annotate --no-header "$@"; }

{
    echo "# Made from k2.in by requirements/lock.sh."
    compile k2.in --python-version 3.10 --python-platform x86_64-manylinux_2_28
} >k2.lock.new
# For every Python from 3.11, and for torch's CUDA and CPU wheels alike: each names the CUDA packages it wants itself.
{
    echo "# Made from torch2.in by requirements/lock.sh."
    compile torch2.in --python-version 3.11 --universal | sed -E '/^(cuda|nvidia|triton)\b/d'
} >torch2.lock.new
mv k2.lock.new k2.lock
mv torch2.lock.new torch2.lock
