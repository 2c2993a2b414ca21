#!/usr/bin/env bash
# Step 3, actor and critic Llama-3.1-8B on the nodes of HOSTFILE, ZeRO 3.
#     bash step3_ppo/run_llama_8b_multi_node.sh [FLAGS that override those below]
# docs/multi_node.md has other launchers, disks that hosts do not share, and what happens when a host is lost.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
out="${OUTPUT:-output/llama_8b}"

python "$here/../scripts/launch.py" --hostfile "${HOSTFILE:-hostfile}" "$here/main.py" \
    --actor_model_name_or_path "$out/step1_sft" \
    --critic_model_name_or_path "$out/step2_reward" \
    --output_dir "$out/step3_ppo" \
    --data_path Dahoas/rm-static Dahoas/full-hh-rlhf \
    --max_prompt_seq_len 256 \
    --max_answer_seq_len 256 \
    --per_device_generation_batch_size 16 \
    --generation_batches 1 \
    --per_device_training_batch_size 8 \
    --gradient_accumulation_steps 2 \
    --actor_learning_rate 1e-6 \
    --critic_learning_rate 9e-6 \
    --kl_coef 0.05 \
    --num_warmup_steps 20 \
    --normalize_scores \
    --actor_zero_stage 3 \
    --critic_zero_stage 3 \
    --dtype bf16 \
    --enable_ema \
    --actor_gradient_checkpointing \
    --critic_gradient_checkpointing \
    "$@"
