#!/usr/bin/env bash
# Step 1, Llama-3.1-8B on the nodes of HOSTFILE (lines such as "worker-1 slots=8"), ZeRO 3.
#     bash step1_sft/run_llama_8b_multi_node.sh [FLAGS that override those below]
# docs/multi_node.md has other launchers, disks that hosts do not share, and what happens when a host is lost.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
out="${OUTPUT:-output/llama_8b}"

python "$here/../scripts/launch.py" --hostfile "${HOSTFILE:-hostfile}" "$here/main.py" \
    --model_name_or_path meta-llama/Llama-3.1-8B \
    --output_dir "$out/step1_sft" \
    --data_path Dahoas/rm-static Dahoas/full-hh-rlhf \
    --max_seq_len 512 \
    --per_device_train_batch_size 8 \
    --per_device_eval_batch_size 8 \
    --gradient_accumulation_steps 1 \
    --num_train_epochs 1 \
    --learning_rate 1e-5 \
    --zero_stage 3 \
    --dtype bf16 \
    --gradient_checkpointing \
    "$@"
