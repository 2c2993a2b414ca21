#!/usr/bin/env bash
# DPO, LoRA adapters on what step 1 made of Llama-3.1-8B, eight GPUs of one node, ZeRO 3. No reference model is loaded.
#     bash step2_reward/run_dpo_llama_8b_single_node_lora.sh [FLAGS that override those below]
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
out="${OUTPUT:-output/llama_8b_lora}"

deepspeed "$here/dpo.py" \
    --model_name_or_path "$out/step1_sft" \
    --output_dir "$out/step2_dpo" \
    --data_path Dahoas/rm-static Dahoas/full-hh-rlhf \
    --max_seq_len 512 \
    --per_device_train_batch_size 2 \
    --per_device_eval_batch_size 2 \
    --gradient_accumulation_steps 4 \
    --num_train_epochs 1 \
    --beta 0.1 \
    --lora_dim 64 \
    --lora_learning_rate 5e-6 \
    --only_optimize_lora \
    --num_warmup_steps 100 \
    --eval_interval 500 \
    --zero_stage 3 \
    --dtype bf16 \
    --gradient_checkpointing \
    "$@"
