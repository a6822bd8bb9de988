#!/usr/bin/env bash
# Everything that only a GPU can show: that kernels and backend compute what the CPU does, that NVIDIA's compute-sanitizer finds
# no fault in them, how fast they are beside a device copy, and that PyTorch trains through them.
#
#   make gpu-check                    (or this script)
#   ARC_GPU_PARTS='tests bench'       only these of: tests sanitizer bench python train
#
# Wants an NVIDIA driver of CUDA 13.0 or later (580), a Rust toolchain and, for python and train, what `make python` wants.
# What it finds is printed and kept in target/gpu-check.md.
set -euo pipefail
shopt -s inherit_errexit
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

parts=${ARC_GPU_PARTS:-tests sanitizer bench python train}
mkdir -p "${CARGO_TARGET_DIR:-target}"
target=$(cd "${CARGO_TARGET_DIR:-target}" && pwd)
python=${PYTHON:-python3}
log=$target/gpu-check.md
library=(--locked -p arc-topk-worker --no-default-features --features cuda)

say() { printf '%s\n' "$*" | tee -a "$log"; }
wanted() { [[ " $parts " == *" $1 "* ]]; }

if ! command -v nvidia-smi > /dev/null; then
  echo 'gpu-check: there is no nvidia-smi: this wants a machine with an NVIDIA GPU and its driver' >&2
  exit 1
fi
: > "$log"
say "$(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | head -1)"

# The file of the test program, to be run by itself and under the sanitizer.
test_program() {
  cargo test "${library[@]}" --test it --no-run --message-format=json-render-diagnostics |
    "$python" -c '
import json, sys
for line in sys.stdin:
    made = json.loads(line)
    if made.get("executable") and made["target"]["name"] == "it":
        print(made["executable"])'
}

# compute-sanitizer: the machine's, or NVIDIA's wheel (14 MB), pinned by hash.
sanitizer() {
  if command -v compute-sanitizer; then
    return
  fi
  local folder=$target/cuda/sanitizer
  if [[ ! -e $folder/.ready ]]; then
    rm -rf "$folder"
    mkdir -p "$folder"
    echo 'nvidia-cuda-sanitizer-api==13.0.85 --hash=sha256:b1efff95f63b6fe40dc83801d598550542364393957775912a1abf396904331c' \
      > "$folder/requirements.txt"
    "$python" -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes --target "$folder" \
      --requirement "$folder/requirements.txt" >&2
    chmod +x "$folder/nvidia/cu13/bin/compute-sanitizer"
    touch "$folder/.ready"
  fi
  echo "$folder/nvidia/cu13/bin/compute-sanitizer"
}

if wanted tests || wanted sanitizer; then
  program=$(test_program)
fi
if wanted tests; then
  say '## Tests on the GPU'
  "$program" gpu:: --ignored --test-threads=1 2>&1 | tee -a "$log"
fi
if wanted sanitizer; then
  tool=$(sanitizer)
  for check in memcheck racecheck synccheck initcheck; do
    say "## compute-sanitizer $check"
    "$tool" --tool "$check" --error-exitcode 9 "$program" gpu:: --ignored --test-threads=1 2>&1 | tee -a "$log"
  done
fi
if wanted bench; then
  say '## Kernels beside a device copy'
  cargo run --quiet --release "${library[@]}" --example gpu_bench | tee -a "$log"
fi
if wanted python || wanted train; then
  make python
  .venv/bin/python -c 'import torch; assert torch.cuda.is_available(), "PyTorch sees no GPU"'
fi
if wanted python; then
  say '## PyTorch on the GPU'
  cargo build --quiet --locked --workspace --bins
  (cd worker/python && ARC_BIN=$target/debug ../../.venv/bin/pytest tests/test_gpu.py) 2>&1 | tee -a "$log"
fi
if wanted train; then
  say '## Two workers that share the GPU train a small GPT'
  "$python" worker/data/fetch.py shakespeare
  for way in 'dense ddp' 'arc ddp' 'arc wrapper'; do
    read -r method form <<< "$way"
    .venv/bin/python worker/python/examples/gpt.py --workers 2 --device cuda --steps 200 --method "$method" --form "$form" 2>&1 |
      tee -a "$log"
  done
fi
say 'gpu-check: all is well'
