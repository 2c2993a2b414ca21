"""The command line as a step's object."""

import pytest
from step_flags import STEP3, assert_refused, rlhf

from dschat.arguments import parse_arguments
from dschat.errors import UserError


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--warmup_ratio", "0.1", "--num_warmup_steps=100"], ["--warmup_ratio", "exclude each other"]),
        (["--kl_coef", "much"], ["--kl_coef", "much"]),
        (["--actor_learning_rate", "inf"], ["--actor_learning_rate must be a finite number", "got inf"]),
        (["--gamma", "nan"], ["--gamma must be a finite number", "got nan"]),
        (["--reward_clip", "1e19"], ["--reward_clip", "2**63"]),
        (["--num_train_epochs", "9" * 30], ["--num_train_epochs", "2**63"]),
    ],
)
def test_a_setting_that_cannot_work_names_flag_value_and_remedy(argv, parts):
    assert_refused(argv, parts)


def test_lists_and_booleans():
    args = rlhf("--data_path", "x", "y", "--offload", "--actor_zero_stage=2", "--critic_zero_stage=1")
    assert args.data.data_path == ["x", "y"]
    assert args.run.offload
    assert not rlhf("--no_whiten_advantages").ppo.whiten_advantages
    assert not rlhf("--whiten_advantages", "false").ppo.whiten_advantages


def test_hyphens_are_accepted_for_underscores():
    assert rlhf("--kl-coef", "0.3").ppo.kl_coef == 0.3


# Every flag of DeepSpeed-Chat that these steps have so far keeps its name.
@pytest.mark.parametrize(
    ("step", "argv"),
    [
        ("sft", "--sft_only_data_path x --data_output_path /o --print_loss --compute_fp32_loss --deepspeed"),
        ("sft", "--local_rank 1 --add_eot_token --eot_token <e> --enable_tensorboard --tensorboard_path t"),
        ("reward", "--num_padding_at_beginning 1 --eval_interval 5 --eval_iters 3 --dropout 0.1"),
        ("reward", "--offload --zero_stage 2 --lr_scheduler_type linear --num_warmup_steps 4"),
        ("reward", "--weight_decay 0.1 --gradient_checkpointing --num_train_epochs 2 --max_seq_len 64"),
        ("rlhf", "--per_device_generation_batch_size 4 --per_device_training_batch_size 2"),
        ("rlhf", "--generation_batches 3 --num_padding_at_beginning 1 --actor_dropout 0 --critic_dropout 0"),
        ("rlhf", "--ppo_epochs 2 --max_prompt_seq_len 9 --max_answer_seq_len 9 --enable_ema --print_answers"),
        ("rlhf", "--print_answers_interval 5 --enable_test_mode --test_stop_step 2"),
        ("rlhf", "--actor_zero_stage 3 --offload_reference_model --actor_gradient_checkpointing"),
        ("rlhf", "--critic_zero_stage 3 --offload_reward_model --critic_gradient_checkpointing"),
        ("rlhf", "--unsupervised_dataset_name wikitext --unsup_coef 27.8"),
        ("rlhf", "--unsupervised_dataset_name wikitext --unsupervised_dataset_config_name wikitext-2-raw-v1"),
        ("rlhf", "--actor_weight_decay 0 --critic_weight_decay 0 --align_overflow"),
        ("sft", "--lora_dim 128 --lora_module_name decoder.layers. --lora_learning_rate 5e-4"),
        ("reward", "--lora_dim 128 --lora_module_name decoder.layers. --only_optimize_lora"),
        ("rlhf", "--actor_lora_dim 128 --actor_lora_module_name decoder.layers. --only_optimize_lora"),
        ("rlhf", "--critic_lora_dim 128 --critic_lora_module_name decoder.layers."),
        ("rlhf", "--actor_lora_learning_rate 5e-4 --critic_lora_learning_rate 5e-4"),
    ],
)  # fmt: skip
def test_deepspeed_chats_flags_are_accepted(step, argv):
    required = STEP3 if step == "rlhf" else ["--model_name_or_path", "m"]
    parse_arguments(step, [*required, *argv.split()])


def test_a_missing_model_is_named():
    with pytest.raises(UserError, match="--model_name_or_path"):
        parse_arguments("sft", [])


def test_help_comes_before_complaints():
    with pytest.raises(SystemExit) as end:
        parse_arguments("sft", ["--lr", "1", "--help"])
    assert end.value.code == 0
