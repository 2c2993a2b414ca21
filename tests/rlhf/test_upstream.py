"""The models that step 3 receives: each folder is verified once, for what all roles need of it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import save_reward_model, save_tiny_model, tiny_tokenizer

from dschat.arguments import parse_arguments
from dschat.data.templates import NONE
from dschat.errors import UserError
from dschat.export.export import export_model
from dschat.export.provenance import Provenance
from dschat.models.loading import create_critic_model
from dschat.models.tokenizer import load_tokenizer
from dschat.rlhf.roles import EngineSpec, engine_specs
from dschat.rlhf.tokenizers import RlhfTokenizers
from dschat.rlhf.upstream import check_adapters, check_positions, verify_models


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A language model base/, a reward model reward/ with a bad verdict, and a trained critic critic/."""
    folder = tmp_path_factory.mktemp("models")
    base = save_tiny_model(folder / "base")
    tokenizer = load_tokenizer(str(base))
    for name, head in (("reward", "score"), ("critic", "value")):
        provenance = Provenance(
            step="reward",
            base_model="base",
            golden_inputs=[],
            head=head,
            verdict="no better than chance" if name == "reward" else None,
            metrics={"score_mean": 0.25, "score_std": 0.5},
        )
        model = create_critic_model(str(base), tokenizer, None)
        export_model(model, tokenizer, folder / name, provenance=provenance)
    return folder


def specs(models: Path, *, critic: str = "reward", **more: str) -> list[EngineSpec]:
    named = {"actor_model": "base", "critic_model": critic, **more}
    return engine_specs(
        parse_arguments("rlhf", [f"--{name}_name_or_path={models / path}" for name, path in named.items()])
    )


def test_a_folder_of_two_roles_is_verified_once_and_its_verdict_repeated(models, capsys):
    received = verify_models(specs(models))
    assert [model.flag for model in received.all] == [
        *("--actor_model_name_or_path", "--critic_model_name_or_path")
    ]
    assert list(received.by_role) == ["actor", "reward"]
    told = capsys.readouterr().out
    assert told.count("has no manifest.json") == 1  # the actor's
    assert told.count("the verdict of step 2 on this reward model is no better than chance") == 1


def test_a_critic_that_ppo_trained_goes_on_beside_a_reward_model_and_in_place_of_none(models):
    received = verify_models(specs(models, critic="critic", reward_model="reward"))
    assert list(received.by_role) == ["actor", "critic", "reward"]
    with pytest.raises(UserError, match=r"--critic_model_name_or_path .* is a critic.* give a reward model"):
        verify_models(specs(models, critic="critic"))


def test_a_base_model_is_no_reward_model_by_whichever_flag(models):
    flags = {
        "--critic_model_name_or_path": specs(models, critic="base"),
        "--reward_model_name_or_path": specs(models, reward_model="base"),
        "--guard_reward_model_name_or_path": specs(models, guard_reward_model="base"),
    }
    for flag, wrong in flags.items():
        with pytest.raises(UserError, match=f"{flag}.*score.weight"):
            verify_models(wrong)


def test_scores_are_scaled_by_what_the_reward_model_promises(models):
    received = verify_models(specs(models))
    assert received.score_scale("step2") == (0.25, 0.5)
    assert received.score_scale("none") == received.score_scale("running") == (0.0, 1.0)


def test_each_model_is_to_read_the_template_that_it_was_trained_with(models):
    wanted = specs(models)
    received = verify_models(wanted)
    received.check_templates(wanted, RlhfTokenizers(load_tokenizer(str(models / "base"))))
    other = tiny_tokenizer()
    other.chat_template = NONE
    with pytest.raises(UserError, match=r"--critic_model_name_or_path .* its chat template"):
        received.check_templates(wanted, RlhfTokenizers(other))
    own = {role: load_tokenizer(str(models / "base")) for role in ("critic", "reward")}
    received.check_templates(wanted, RlhfTokenizers(other, own))  # the actor has promised nothing


def test_outputs_are_checked_of_the_engines_that_there_are(models):
    """An engine that fails as soon as it is asked stands for each; without golden inputs none is."""
    wanted = specs(models)
    received = verify_models(wanted)
    received.check_outputs(wanted, {"actor": None, "critic": None, "reward": None})
    manifest = json.loads((models / "reward" / "manifest.json").read_text())
    assert manifest["golden_outputs"] == []


def test_positions_count_for_models_that_read_the_tokens_of_the_actor(models, tmp_path):
    short = save_reward_model(save_tiny_model(tmp_path / "base", "gpt2"), tmp_path / "short")
    wanted = specs(models, guard_reward_model=str(short))
    ours = load_tokenizer(str(models / "base"))
    check_positions(wanted, RlhfTokenizers(ours), 512)
    with pytest.raises(UserError, match="short' knows 512 positions; lower --max_prompt_seq_len"):
        check_positions(wanted, RlhfTokenizers(ours), 513)
    check_positions(wanted, RlhfTokenizers(ours, {"guard": ours}), 513)


def test_adapters_of_trained_models_have_layers_to_be_on(models):
    actor, *others = specs(models)
    lacking = replace(actor, settings=replace(actor.settings, lora_dim=4, lora_module_name="qkv"))
    with pytest.raises(UserError, match="--actor_lora_module_name 'qkv'"):
        check_adapters([lacking, *others])
    check_adapters([actor, *others, replace(lacking, trained=False)])
