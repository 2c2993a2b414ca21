#!/usr/bin/env bash
# GRPO on GSM8K with a rule as the reward and no reward model: Qwen2.5-0.5B-Instruct on one GPU.
#     bash step3_ppo/run_gsm8k_demo.sh [FLAGS that override those below]
# MODEL and DATA name another model and a copy of the data, as in DATA=gsm8k/train.jsonl; OUTPUT the folder.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
out="${OUTPUT:-output/gsm8k}"

deepspeed --num_gpus 1 "$here/main.py" \
    --actor_model_name_or_path "${MODEL:-Qwen/Qwen2.5-0.5B-Instruct}" \
    --output_dir "$out/step3_ppo" \
    --data_path "${DATA:-openai/gsm8k}" \
    --data_split 0,0,1 \
    --reward_function "$here/rewards/gsm8k.py:exact_answer" \
    --advantage_estimator grpo \
    --num_samples_per_prompt 8 \
    --max_prompt_seq_len 256 \
    --max_answer_seq_len 256 \
    --per_device_generation_batch_size 64 \
    --generation_batches 2 \
    --per_device_training_batch_size 8 \
    --gradient_accumulation_steps 8 \
    --actor_learning_rate 1e-6 \
    --num_warmup_steps 10 \
    --kl_coef 0.01 \
    --actor_gradient_checkpointing \
    --print_answers \
    --print_answers_interval 20 \
    "$@"
