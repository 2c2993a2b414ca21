#!/usr/bin/env bash
# What one GPU gives, from random weights: each training step of OPT-1.3b and every way to decode, each in minutes.
#   bash benchmarks/gpu.sh [OUTPUT_FOLDER]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:-output/gpu}
mkdir -p "$out"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv | tee "$out/gpu.txt"
for decode in "32 128 128" "64 256 256"; do
    read -r batch prompt answer <<<"$decode"
    timeout 300 python benchmarks/rollout.py --device cuda --model opt-1.3b \
        --batch "$batch" --prompt "$prompt" --answer "$answer" 2>"$out/rollout-$batch.err" | tee "$out/rollout-$batch.md"
done
timeout 300 python benchmarks/steps.py --device cuda --model opt-1.3b --folder "$out/steps" | tee "$out/steps.md"
timeout 350 python benchmarks/planner.py --device cuda --folder "$out/planner" --output "$out/planner.md"
