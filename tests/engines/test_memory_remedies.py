"""What helps where memory runs out, by phase and step."""

from dataclasses import replace

import pytest

from dschat.arguments import parse_arguments
from dschat.engines.memory_remedies import (
    MemoryFlags,
    Phase,
    PhaseKind,
    halved,
    memory_flags,
    remedies,
    smaller_parts,
)


@pytest.mark.parametrize(
    ("before", "after"), [((16, 1), (8, 2)), ((3, 2), (2, 3)), ((5, 1), (1, 5)), ((2, 4), (1, 8))]
)
def test_the_product_stays(before, after):
    assert smaller_parts(*before) == after


@pytest.mark.parametrize(
    ("phase", "flags"),
    [
        (Phase(PhaseKind.SAMPLING), {"per_device_generation_batch_size": 4, "generation_batches": 6}),
        (Phase(PhaseKind.ANALYZING), {"per_device_training_batch_size": 2, "gradient_accumulation_steps": 4}),
        (
            Phase(PhaseKind.TRAINING, "critic"),
            {"per_device_training_batch_size": 2, "gradient_accumulation_steps": 4},
        ),
        (Phase(PhaseKind.LOADING, "actor"), {}),
    ],
)
def test_what_is_halved_in_step_3(phase, flags):
    args = parse_arguments(
        "rlhf",
        [
            *("--actor_model_name_or_path=a", "--critic_model_name_or_path=c", "--generation_batches=3"),
            *("--per_device_generation_batch_size=8", "--per_device_training_batch_size=4"),
            "--gradient_accumulation_steps=2",
        ],
    )
    assert halved(phase, memory_flags(args)) == flags


def flags_of(step: str, *flags: str) -> MemoryFlags:
    models = {
        "rlhf": ("--actor_model_name_or_path=a", "--critic_model_name_or_path=c"),
        "sft": ("--model_name_or_path=m",),
    }
    args = parse_arguments(step, [*models[step], "--data_path=d", "--dtype=bf16", *flags])
    found = memory_flags(args)
    return replace(found, models_of={"critic": args.critic}) if step == "rlhf" else found


@pytest.mark.parametrize(
    ("phase", "words"),
    [
        (Phase(PhaseKind.LOADING, "reference model"), "loading the reference model"),
        (Phase(PhaseKind.TRAINING, "critic"), "training the critic"),
        (Phase(PhaseKind.EVALUATING), "evaluating"),
        (Phase(PhaseKind.SAMPLING), "sampling answers"),
        (Phase(PhaseKind.ANALYZING), "judging answers"),
        (Phase(PhaseKind.EXPORTING), "exporting"),
    ],
)
def test_the_words_of_a_phase(phase, words):
    assert str(phase) == words


def test_what_helps_in_training_of_step_1():
    flags = flags_of("sft", "--per_device_train_batch_size=3", "--max_seq_len=512")
    assert remedies(Phase(PhaseKind.TRAINING, "model"), flags)[0] == (
        "--per_device_train_batch_size 3 -> 1 with --gradient_accumulation_steps 1 -> 3 (the same gradient)"
    )
    others = remedies(Phase(PhaseKind.TRAINING, "model"), flags)[1:]
    assert {"--gradient_checkpointing", "--lora_dim 64 --only_optimize_lora", "--max_seq_len 512 -> 256"} <= {
        *others
    }


def test_a_micro_batch_of_one_row_can_be_shared_by_ranks():
    shared = "--sequence_parallel_size 2 -> 4 on twice as many devices (each row's tokens are shared)"
    for rows in (1, 2):
        flags = flags_of("sft", f"--per_device_train_batch_size={rows}", "--sequence_parallel_size=2")
        assert (shared in remedies(Phase(PhaseKind.TRAINING, "model"), flags)) == (rows == 1)


def test_a_token_budget_is_lowered_by_hand():
    # It is to be the same at resume, so --auto_micro_batch has nothing to start again with.
    flags, phase = flags_of("sft", "--max_tokens_per_batch=4096"), Phase(PhaseKind.TRAINING, "model")
    assert remedies(phase, flags)[0] == "--max_tokens_per_batch 4096 -> 2048 (the same gradient)"
    assert halved(phase, flags) == {}
    assert "max_tokens_per_batch" not in str(remedies(Phase(PhaseKind.EVALUATING), flags))


def test_evaluations_of_step_1_have_batches_of_their_own_and_those_of_step_3_none():
    phase = Phase(PhaseKind.EVALUATING)
    assert halved(phase, flags_of("sft", "--per_device_eval_batch_size=5")) == {
        "per_device_eval_batch_size": 2
    }
    assert halved(phase, flags_of("sft", "--per_device_eval_batch_size=1")) == {}
    assert halved(phase, flags_of("rlhf")) == {}


def test_a_phase_of_one_model_names_its_flags_and_one_of_all_models_those_of_all():
    flags = flags_of("rlhf")
    loading = remedies(Phase(PhaseKind.LOADING, "critic"), flags)
    assert "--critic_lora_dim 64 --only_optimize_lora" in loading
    assert not [text for text in loading if "actor" in text or "seq_len" in text]
    loading = remedies(Phase(PhaseKind.LOADING, "second reward model"), flags)
    assert {f"--{name}_lora_dim 64 --only_optimize_lora" for name in ("actor", "critic")} <= {*loading}


@pytest.mark.parametrize("phase", [Phase(PhaseKind.ANALYZING), Phase(PhaseKind.TRAINING, "actor")])
def test_activations_of_actor_and_critic_need_not_be_held_at_one_time(phase):
    remedy, both = "--reuse_first_pass both -> actor (the same numbers)", "--reuse_first_pass=both"
    assert remedy in remedies(phase, flags_of("rlhf", both))
    assert remedy not in remedies(phase, flags_of("rlhf"))
    assert remedy not in remedies(phase, flags_of("rlhf", both, "--advantage_estimator=reinforce++"))
    assert remedy not in remedies(Phase(PhaseKind.SAMPLING), flags_of("rlhf", both))


def test_rollouts_of_a_sharded_actor_need_not_gather_it():
    sampling = Phase(PhaseKind.SAMPLING)
    assert "--rollout_gather auto -> never" in remedies(sampling, flags_of("rlhf", "--actor_zero_stage=3"))
    told = remedies(sampling, flags_of("rlhf", "--actor_zero_stage=3", "--rollout_gather=never"))
    assert not [text for text in told if "rollout_gather" in text]
    assert not [text for text in remedies(sampling, flags_of("rlhf")) if "rollout_gather" in text]


def test_where_no_flag_helps_that_is_said():
    flags = flags_of("sft", "--lora_dim=8", "--only_optimize_lora")
    told = remedies(Phase(PhaseKind.EXPORTING), flags)
    assert told == ["a smaller model, or a device with more memory"]
