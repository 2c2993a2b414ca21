# shellcheck shell=bash disable=SC2034
# Flags of the demo, sourced by quickstart.sh and step*/run_demo.sh, so that both run the same. The learning rates suit
# a million random weights and a minute of training; a pretrained model needs far smaller ones.
demo_common=(--dtype fp32 --data_split "4,3,3")
demo_sft=(
    --max_seq_len 64
    --per_device_train_batch_size 32
    --per_device_eval_batch_size 100
    --num_train_epochs 6
    --learning_rate 1e-3
    --num_warmup_steps 20
)
demo_reward=(
    --max_seq_len 64
    --per_device_train_batch_size 32
    --per_device_eval_batch_size 100
    --num_train_epochs 1
    --learning_rate 5e-4
    --num_warmup_steps 10
)
demo_dpo=(
    --max_seq_len 64
    --per_device_train_batch_size 32
    --per_device_eval_batch_size 100
    --num_train_epochs 1
    --learning_rate 3e-5
    --beta 0.5
    --num_warmup_steps 10
)
demo_ppo=(
    --max_prompt_seq_len 40
    --max_answer_seq_len 20
    --per_device_generation_batch_size 128
    --per_device_training_batch_size 64
    --num_train_epochs 2
    --ppo_epochs 2
    --actor_learning_rate 1e-4
    --critic_learning_rate 3e-4
    --num_warmup_steps 5
    --kl_coef 0.2
    --normalize_scores
)
