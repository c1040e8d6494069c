#!/usr/bin/env bash
# Check and measure training on a GPU, and write benchmarks/gpu.md. It needs torch 2, and neither k2 nor a network; the
# section on whole runs also needs lhotse. SPLITFORMER_PYTHON names the interpreter. At most 20 minutes on a GPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
exec "${SPLITFORMER_PYTHON:-python3}" -m benchmarks.gpu "$@"
