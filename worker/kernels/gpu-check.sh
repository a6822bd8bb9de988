#!/usr/bin/env bash
# Everything that only a GPU can show: that kernels and backend compute what the CPU does, that NVIDIA's compute-sanitizer finds
# no fault in them, how fast they are beside a device copy, and that PyTorch trains through them.
#
#   make gpu-check                    (or this script, from the repository's root)
#   ARC_GPU_PARTS='tests bench'       only these of: tests sanitizer bench python train
#
# Wants an NVIDIA driver of CUDA 13.0 or later (580), a Rust toolchain and, for python and train, what `make python` wants.
# What it prints goes to standard output as well as to target/gpu-check.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

parts=${ARC_GPU_PARTS:-tests sanitizer bench python train}
target=${CARGO_TARGET_DIR:-target}
python=${PYTHON:-python3}
mkdir -p "$target"
log=$target/gpu-check.md
: > "$log"

say() { printf '%s\n' "$*" | tee -a "$log"; }
wanted() { [[ " $parts " == *" $1 "* ]]; }
tests() { "$@" cargo test --quiet --locked -p arc-topk-worker --no-default-features --features cuda --test gpu; }

command -v nvidia-smi > /dev/null || { echo 'gpu-check: there is no nvidia-smi: this wants a machine with an NVIDIA GPU and its driver' >&2; exit 1; }
say "$(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | head -1)"

# The test program, to be run by itself and under the sanitizer.
program() {
  tests env --no-run 2> /dev/null || tests env -- --list > /dev/null
  cargo test --locked -p arc-topk-worker --no-default-features --features cuda --test gpu --no-run --message-format=json 2> /dev/null |
    "$python" -c 'import json, sys
for line in sys.stdin:
    found = json.loads(line)
    if found.get("executable") and found["target"]["name"] == "gpu":
        print(found["executable"])' | tail -1
}

# NVIDIA's wheel of the sanitizer, pinned by hash, unless the machine has one.
sanitizer() {
  command -v compute-sanitizer && return
  local folder=$target/cuda/sanitizer
  if [[ ! -e $folder/.ready ]]; then
    echo 'nvidia-cuda-sanitizer-api==13.0.85 --hash=sha256:b1efff95f63b6fe40dc83801d598550542364393957775912a1abf396904331c' > "$target/sanitizer.txt"
    "$python" -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes --target "$folder" \
      --requirement "$target/sanitizer.txt" >&2
    touch "$folder/.ready"
  fi
  find "$PWD/$folder" -name compute-sanitizer -type f | head -1
}

if wanted tests || wanted sanitizer; then
  gpu_tests=$(program)
fi
if wanted tests; then
  say '## Tests on the GPU'
  "$gpu_tests" --ignored --test-threads=1 2>&1 | tee -a "$log"
fi
if wanted sanitizer; then
  tool=$(sanitizer)
  chmod +x "$tool"
  for check in memcheck racecheck; do
    say "## compute-sanitizer $check"
    "$tool" --tool "$check" --error-exitcode 9 "$gpu_tests" --ignored --test-threads=1 2>&1 | tail -12 | tee -a "$log"
  done
fi
if wanted bench; then
  say '## Kernels beside a device copy'
  cargo run --quiet --locked --release -p arc-topk-worker --no-default-features --features cuda --example gpu_bench | tee -a "$log"
fi
if wanted python; then
  say '## PyTorch on the GPU'
  make python
  cargo build --quiet --locked --workspace --bins
  (cd worker/python && ARC_BIN="$(cd ../.. && cd "$target" && pwd)/debug" "$(cd ../.. && pwd)/.venv/bin/pytest" -q tests/test_gpu.py) 2>&1 |
    tee -a "$log"
fi
if wanted train; then
  say '## Two workers that share the GPU train a small GPT'
  "$python" worker/data/fetch.py shakespeare
  for way in '--method dense' '--method arc' '--method arc --form wrapper'; do
    # shellcheck disable=SC2086
    .venv/bin/python worker/python/examples/gpt.py --workers 2 --device cuda --steps 200 $way 2>&1 | tail -2 | tee -a "$log"
  done
fi
say 'gpu-check: all is well'
