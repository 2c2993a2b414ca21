"""Every flag that users of DeepSpeed-Chat and ColossalChat type from memory is accepted by its step."""

import shlex

import pytest

from dschat.arguments import TrainRmCall, flags_of, parse_arguments

STEPS_1_AND_2 = """
    --data_path Dahoas/rm-static openai/webgpt_comparisons --data_split 2,4,4 --data_output_path D
    --model_name_or_path facebook/opt-1.3b --per_device_train_batch_size 8 --per_device_eval_batch_size=8
    --max_seq_len 512 --learning_rate 9.65e-6 --weight_decay 0. --num_train_epochs 2
    --gradient_accumulation_steps 1 --lr_scheduler_type cosine --num_warmup_steps 0 --output_dir O
    --seed 1234 --local_rank 0 --deepspeed --gradient_checkpointing --dropout 0.0 --offload --dtype bf16
    --zero_stage=3 --lora_dim 128 --lora_module_name decoder.layers. --only_optimize_lora
    --lora_learning_rate 5e-4 --compute_fp32_loss --enable_tensorboard --tensorboard_path T
    --add_eot_token --eot_token <|endoftext|> --eval_interval 10 --eval_iters=100 --tensor_parallel_size 1
    --sequence_parallel_size 1 --pipeline_parallel_size 1 --attn_implementation sdpa --torch_compile=false
    --save_interval 5 --resume_from_checkpoint latest
"""
STEP_3 = """
    --data_path Dahoas/rm-static --data_split 2,4,4 --data_output_path D
    --unsupervised_dataset_name wikitext --unsupervised_dataset_config_name wikitext-103-v1
    --unsup_coef 27.8 --actor_model_name_or_path A --critic_model_name_or_path C
    --num_padding_at_beginning 1 --per_device_generation_batch_size 16 --per_device_training_batch_size=16
    --generation_batches 1 --ppo_epochs 1 --max_prompt_seq_len 256 --max_answer_seq_len 256
    --actor_learning_rate 9.65e-6 --critic_learning_rate 5e-6 --actor_weight_decay 0.1
    --critic_weight_decay=0.1 --num_train_epochs 1 --lr_scheduler_type cosine
    --gradient_accumulation_steps 1 --num_warmup_steps 100 --output_dir O --seed 1234
    --preprocessing_num_workers 2 --local_rank=-1 --deepspeed --offload --dtype bf16
    --offload_reference_model --offload_reward_model --actor_zero_stage 3 --critic_zero_stage 3
    --actor_gradient_checkpointing --critic_gradient_checkpointing --actor_dropout 0.0
    --critic_dropout=0.0 --actor_lora_dim 128 --critic_lora_dim 128
    --actor_lora_module_name decoder.layers. --critic_lora_module_name decoder.layers.
    --only_optimize_lora --actor_lora_learning_rate 5e-4 --critic_lora_learning_rate 5e-4 --enable_ema
    --compute_fp32_loss --enable_tensorboard --tensorboard_path T --add_eot_token --align_overflow
    --print_answers --print_answers_interval 10 --enable_test_mode --test_stop_step 2
    --enable_hybrid_engine --unpin_actor_parameters --release_inference_cache --inference_tp_size 1
    --tp_gather_partition_size 8 --enable_mixed_precision_lora
    --actor_tensor_parallel_size 1 --critic_tensor_parallel_size 1 --kl_coef 0.1 --kl_target 6
    --kl_horizon 1000 --kl_estimator k1 --ratio_clip 0.2 --value_clip 0.2 --gamma 1 --gae_lambda 0.95
    --reward_clip 5 --whiten_advantages --missing_eos_penalty 1 --temperature 1 --top_p 1 --top_k 0
    --max_grad_norm 1 --adam_beta1 0.9 --adam_beta2 0.95 --adam_epsilon 1e-5 --ema_decay 0.992
"""
LINES = {
    "sft": f"{STEPS_1_AND_2} --sft_only_data_path E F --print_loss",
    "reward": f"{STEPS_1_AND_2} --num_padding_at_beginning 1 --loss_fn log_exp",
    "dpo": f"{STEPS_1_AND_2} --beta 0.1 --label_smoothing 0 --offload_reference_model --print_loss "
    "--sft_only_data_path E F",
    "rlhf": STEP_3,
}
TRAIN_RM = """
    --pretrain M --dataset D E --eval_dataset F --loss_fn log_exp --plugin 3d --tp 2 --pp 2 --sp 1
    --lora_config lora.json --checkpoint_path K --save_interval 1000 --save_dir S --config_file C
    --max_length 2048 --max_epochs 3 --batch_size 4 --lr 5e-6 --accumulation_steps 8
    --mixed_precision fp16 --grad_checkpoint --use_flash_attn
"""


@pytest.mark.parametrize("step", LINES)
def test_a_step_has_every_flag_of_its_line(step):
    typed = {word[2:].partition("=")[0] for word in shlex.split(LINES[step]) if word.startswith("--")}
    assert typed - flags_of(step) == set()


@pytest.mark.parametrize("step", LINES)
def test_the_line_is_accepted_as_it_stands(step):
    parse_arguments(step, shlex.split(LINES[step]))


def test_the_line_of_train_rm_is_accepted_as_it_stands():
    TrainRmCall.parse(shlex.split(TRAIN_RM))
