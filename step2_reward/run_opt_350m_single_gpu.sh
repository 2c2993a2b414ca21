#!/usr/bin/env bash
# Step 2, a reward model of OPT-350m on one GPU, for the actor OPT-1.3b.
#     bash step2_reward/run_opt_350m_single_gpu.sh [FLAGS that override those below]
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
out="${OUTPUT:-output/opt_1.3b}"

deepspeed --num_gpus 1 "$here/main.py" \
    --model_name_or_path facebook/opt-350m \
    --output_dir "$out/step2_reward" \
    --data_path Dahoas/rm-static Dahoas/full-hh-rlhf \
    --max_seq_len 512 \
    --per_device_train_batch_size 8 \
    --per_device_eval_batch_size 8 \
    --gradient_accumulation_steps 8 \
    --num_train_epochs 1 \
    --learning_rate 9e-6 \
    --eval_interval 500 \
    --zero_stage 0 \
    --dtype bf16 \
    "$@"
