"""Flags of other programs: explained by what they are called here."""

import pytest
from step_flags import refusal

from dschat.arguments.foreign import explain_foreign_flag


# The names that new users brought, each with what must stand in the answer of steps 1 and 3.
@pytest.mark.parametrize(
    ("name", "in_step_1", "in_step_3"),
    [
        ("lr", "here: --learning_rate", "here: --actor_learning_rate and --critic_learning_rate"),
        ("learning_rate", None, "here: --actor_learning_rate and --critic_learning_rate"),
        ("actor_lr", "here: --learning_rate", "here: --actor_learning_rate"),
        ("bf16", "here: --dtype bf16", "here: --dtype bf16"),
        ("logging_steps", "not there: every optimiser step", "not there: every optimiser step"),
        ("log_with", "here: --report_to", "here: --report_to"),
        ("wandb_project", "not there: --report_to names trackers", "not there: --report_to names trackers"),
        ("max_length", "here: --max_seq_len", "here: --max_prompt_seq_len and --max_answer_seq_len"),
        ("max_new_tokens", "in step3_ppo/main.py: --max_answer_seq_len", "here: --max_answer_seq_len"),
        ("response_length", "in step3_ppo/main.py: --max_answer_seq_len", "here: --max_answer_seq_len"),
        ("init_kl_coef", "in step3_ppo/main.py: --kl_coef", "here: --kl_coef"),
        ("num_ppo_epochs", "in step3_ppo/main.py: --ppo_epochs", "here: --ppo_epochs"),
        ("batch_size", "--per_device_train_batch_size", "--per_device_training_batch_size"),
        ("per_device_train_batch_size", None, "here: --per_device_training_batch_size"),
        ("vf_coef", "not there: the critic", "not there: the critic is a model of its own"),
        ("dataset_name", "here: --data_path", "here: --data_path"),
        ("model", "here: --model_name_or_path", "here: --actor_model_name_or_path and --critic"),
        ("save_steps", "here: --save_interval", "here: --save_interval"),
        ("deepspeed_config", "not there: ", "not there: "),
        ("logging_step", "not there: every optimiser step", "not there: every optimiser step"),
        ("kl_coeff", "in step3_ppo/main.py: --kl_coef", "did you mean --kl_coef?"),
        ("sft_only_data_path", None, "in step1_sft/main.py: --sft_only_data_path"),
    ],
)  # fmt: skip
def test_names_of_other_programs_point_to_ours(name, in_step_1, in_step_3):
    for step, expected in (("sft", in_step_1), ("rlhf", in_step_3)):
        if expected:
            assert expected in refusal(step, f"--{name}", "1")


@pytest.mark.parametrize(
    ("name", "known", "explanation"),
    [
        ("lr", {"learning_rate"}, "here: --learning_rate"),
        ("lr", {"actor_learning_rate"}, "here: --actor_learning_rate"),
        (
            "lr",
            {"actor_learning_rate", "critic_learning_rate"},
            "here: --actor_learning_rate and --critic_learning_rate",
        ),
        ("critic_lr", {"actor_learning_rate", "critic_learning_rate"}, "here: --critic_learning_rate"),
        ("lr", {"seed"}, None),  # the step has no such flag
        ("seed", {"seed"}, "here: --seed"),  # not in the table, but a flag of this step
        ("nothing_like_it", {"seed"}, None),
        ("patience_steps", {"seed"}, None),
        ("early_stopping_patience", {"patience"}, "here: --patience"),
        ("early_stopping_patience", {"seed"}, "not there"),  # the next text of the table
        ("fsdp_offload_params", {"zero_stage"}, "here: --zero_stage 3"),  # its family's
        ("max_length", {"max_prompt_seq_len"}, None),  # the text names two flags
    ],
)
def test_a_flag_is_explained_by_the_flags_that_a_step_has(name, known, explanation):
    assert explain_foreign_flag(name, known) == explanation
