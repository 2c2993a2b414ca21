#!/usr/bin/env bash
# Step 1, OPT-1.3b on the GPUs of one node, ZeRO 2.
#     bash step1_sft/run_opt_1.3b_single_node.sh [FLAGS that override those below]
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
out="${OUTPUT:-output/opt_1.3b}"

deepspeed "$here/main.py" \
    --model_name_or_path facebook/opt-1.3b \
    --output_dir "$out/step1_sft" \
    --data_path Dahoas/rm-static Dahoas/full-hh-rlhf \
    --max_seq_len 512 \
    --per_device_train_batch_size 8 \
    --per_device_eval_batch_size 8 \
    --gradient_accumulation_steps 1 \
    --num_train_epochs 1 \
    --learning_rate 1e-5 \
    --zero_stage 2 \
    --dtype bf16 \
    "$@"
