#!/usr/bin/env bash
# Step 1, Qwen3-8B on eight GPUs of one node, ZeRO 3.
#     bash step1_sft/run_qwen3_8b_single_node_zero3.sh [FLAGS that override those below]
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
out="${OUTPUT:-output/qwen3_8b}"

deepspeed "$here/main.py" \
    --model_name_or_path Qwen/Qwen3-8B-Base \
    --output_dir "$out/step1_sft" \
    --data_path Dahoas/rm-static Dahoas/full-hh-rlhf \
    --max_seq_len 512 \
    --per_device_train_batch_size 4 \
    --per_device_eval_batch_size 4 \
    --gradient_accumulation_steps 2 \
    --num_train_epochs 1 \
    --learning_rate 1e-5 \
    --zero_stage 3 \
    --dtype bf16 \
    --gradient_checkpointing \
    "$@"
