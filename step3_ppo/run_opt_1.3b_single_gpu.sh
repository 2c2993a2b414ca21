#!/usr/bin/env bash
# Step 3, actor OPT-1.3b, critic OPT-350m, on one GPU.
#     bash step3_ppo/run_opt_1.3b_single_gpu.sh [FLAGS that override those below]
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
out="${OUTPUT:-output/opt_1.3b}"

deepspeed --num_gpus 1 "$here/main.py" \
    --actor_model_name_or_path "$out/step1_sft" \
    --critic_model_name_or_path "$out/step2_reward" \
    --output_dir "$out/step3_ppo" \
    --data_path Dahoas/rm-static Dahoas/full-hh-rlhf \
    --max_prompt_seq_len 256 \
    --max_answer_seq_len 256 \
    --per_device_generation_batch_size 16 \
    --generation_batches 4 \
    --per_device_training_batch_size 8 \
    --gradient_accumulation_steps 8 \
    --actor_learning_rate 1e-6 \
    --critic_learning_rate 9e-6 \
    --kl_coef 0.05 \
    --num_warmup_steps 20 \
    --normalize_scores \
    --actor_zero_stage 0 \
    --critic_zero_stage 0 \
    --dtype bf16 \
    --enable_ema \
    --actor_gradient_checkpointing \
    --critic_gradient_checkpointing \
    "$@"
