"""One list of models: what the flags make of it, and that an entry more is a model more."""

from dataclasses import replace

import pytest

from dschat.arguments import parse_arguments
from dschat.rlhf.roles import EngineSpec, engine_specs, spec_of, unused_offloads


def specs(*flags: str) -> list[EngineSpec]:
    return engine_specs(parse_arguments("rlhf", ["--actor_model_name_or_path=a", *flags]))


CRITIC, REWARD = "--critic_model_name_or_path=c", "--reward_model_name_or_path=r"
GUARD = "--guard_reward_model_name_or_path=g"


@pytest.mark.parametrize(
    ("flags", "models"),
    [
        # role: path, role whose folder it is, fresh head
        (
            [CRITIC],
            {
                "actor": ("a", "actor", False),
                "reference": ("a", "actor", False),
                "critic": ("c", "reward", False),
                "reward": ("c", "reward", False),
            },
        ),
        (
            [CRITIC, REWARD, GUARD],
            {
                "actor": ("a", "actor", False),
                "reference": ("a", "actor", False),
                "critic": ("c", "critic", False),
                "reward": ("r", "reward", False),
                "guard": ("g", "guard", False),
            },
        ),
        (
            [REWARD],
            {
                "actor": ("a", "actor", False),
                "reference": ("a", "actor", False),
                "critic": ("a", "actor", True),
                "reward": ("r", "reward", False),
            },
        ),
        (
            ["--reward_function=rules.py:f"],
            {
                "actor": ("a", "actor", False),
                "reference": ("a", "actor", False),
                "critic": ("a", "actor", True),
            },
        ),
        (
            [CRITIC, "--advantage_estimator=rloo", "--num_samples_per_prompt=2"],
            {
                "actor": ("a", "actor", False),
                "reference": ("a", "actor", False),
                "reward": ("c", "reward", False),
            },
        ),
    ],
    ids=["one folder for two", "all five", "no critic", "no reward model", "no critic wanted"],
)
def test_the_flags_make_the_list_in_the_order_of_building(flags, models):
    found = {spec.role: (spec.path, spec.source, spec.fresh_head) for spec in specs(*flags)}
    assert found == models
    assert list(found) == list(models)


def test_a_folder_named_by_both_flags_is_that_of_the_reward_model():
    critic, reward = specs(CRITIC, "--reward_model_name_or_path=c")[2:]
    assert (critic.source, critic.flag, critic.tokenizer) == (
        "reward",
        "--critic_model_name_or_path",
        "actor",
    )
    assert (reward.source, reward.flag, reward.tokenizer) == ("reward", "--reward_model_name_or_path", "own")


def test_every_model_is_known_by_its_flag_and_its_name():
    found = [(spec.name, spec.flag, spec.head, spec.trained) for spec in specs(CRITIC, GUARD)]
    assert found == [
        ("actor", "--actor_model_name_or_path", "language_model", True),
        ("reference model", "--actor_model_name_or_path", "language_model", False),
        ("critic", "--critic_model_name_or_path", "value", True),
        ("reward model", "--critic_model_name_or_path", "score", False),
        ("second reward model", "--guard_reward_model_name_or_path", "score", False),
    ]


@pytest.mark.parametrize(
    ("actor", "critic", "stages"), [(2, 3, [2, 0, 3, 3, 3]), (3, 1, [3, 3, 1, 0, 0]), (0, 0, [0] * 5)]
)
def test_a_frozen_model_is_sharded_where_the_trained_one_is(actor, critic, stages):
    flags = (f"--actor_zero_stage={actor}", f"--critic_zero_stage={critic}", CRITIC, GUARD)
    assert [spec.zero_stage for spec in specs(*flags)] == stages


def test_each_flag_of_offloading_is_for_its_own_models():
    stages = ("--actor_zero_stage=3", "--critic_zero_stage=3", CRITIC, GUARD)

    def offloaded(flag):
        return [spec.role for spec in specs(*stages, flag) if spec.offload]

    assert offloaded("--offload") == ["actor", "critic"]
    assert offloaded("--offload_reference_model") == ["reference"]
    assert offloaded("--offload_reward_model") == ["reward", "guard"]
    for spec in specs(*stages):
        assert not spec.offload
        assert spec.role in offloaded(spec.offload_flag)


def test_frozen_models_could_be_offloaded_at_any_stage():
    for stage in (0, 3):
        flags = (f"--actor_zero_stage={stage}", f"--critic_zero_stage={stage}", CRITIC, GUARD)
        assert unused_offloads(specs(*flags)) == ["--offload_reference_model", "--offload_reward_model"]
        assert unused_offloads(specs(*flags, "--offload_reward_model")) == ["--offload_reference_model"]


def test_a_copy_is_packed_as_the_model_is_that_it_is_a_copy_of():
    more = ("--actor_lora_dim=4", "--only_optimize_lora", "--dtype=bf16", CRITIC)
    assert [s.role for s in specs("--actor_load_in_4bit", *more) if s.load_in_4bit] == ["actor", "reference"]
    more = ("--critic_lora_dim=4", "--only_optimize_lora", "--dtype=bf16", CRITIC)
    assert [s.role for s in specs("--critic_load_in_4bit", *more) if s.load_in_4bit] == ["critic"]


def test_a_critic_that_starts_from_the_actor_keeps_its_own_settings():
    actor, _, critic, _ = specs(CRITIC, "--critic_learning_rate=0.5")
    moved = critic.starting_from(actor)
    assert (moved.path, moved.flag, moved.source, moved.fresh_head) == ("a", actor.flag, "actor", True)
    assert moved.settings is critic.settings
    assert moved.starting_settings == replace(critic.settings, model_name_or_path="a")
    assert moved.tokenizer == "actor"


def test_a_role_that_the_run_lacks_has_no_specification():
    assert spec_of(specs(CRITIC), "reward").path == "c"
    assert spec_of(specs(CRITIC), "guard") is None
