"""The engines of step 3, built for real from lists of models: those of the flags, and one with a teacher."""

import json
from pathlib import Path

import pytest
from processes import ROOT, python
from tiny import save_tiny_model
from transformers import AutoModelForCausalLM

from dschat.arguments import PpoArguments
from dschat.errors import UserError
from dschat.export.export import export_model
from dschat.export.provenance import Provenance
from dschat.models.loading import create_critic_model, create_hf_model
from dschat.models.tokenizer import load_tokenizer
from dschat.rlhf.rlhf_engine import num_training_steps

WORKER = ROOT / "tests" / "workers" / "rlhf_engines.py"
ROWS = [[5, 80, 90, 11], [7, 8, 9, 60, 61, 62, 0], [33, 44]]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """An actor, a teacher and two reward models, each with golden outputs in its manifest."""
    folder = tmp_path_factory.mktemp("models")
    steps = {"actor": "sft", "teacher": "sft", "reward": "reward", "guard": "reward"}
    for seed, (name, step) in enumerate(steps.items()):
        base = str(save_tiny_model(folder / f"base_{name}", seed=seed))
        tokenizer = load_tokenizer(base)
        if step == "sft":
            model = create_hf_model(AutoModelForCausalLM, base, tokenizer)
        else:
            model = create_critic_model(base, tokenizer, None)
        provenance = Provenance(step=step, base_model=base, golden_inputs=ROWS)
        export_model(model, tokenizer, folder / name, provenance=provenance)
    return folder


def flags(models: Path, *more: str) -> list[str]:
    return [f"--actor_model_name_or_path={models / 'actor'}", "--dtype=fp32", "--num_warmup_steps=0", *more]


@pytest.fixture(scope="module")
def built(models) -> dict[str, dict]:
    """What the worker saw of each run, and all that it printed under "printed"."""
    critic = f"--critic_model_name_or_path={models / 'reward'}"
    guard = f"--guard_reward_model_name_or_path={models / 'guard'}"
    alone = ("--actor_lora_dim=4", "--critic_lora_dim=4", "--only_optimize_lora", "--actor_zero_stage=3")
    rule = ("--reward_function=rules.py:f", "--advantage_estimator=rloo", "--num_samples_per_prompt=2")
    runs = {
        "teacher": (flags(models, critic, guard, "--actor_zero_stage=3"), str(models / "teacher")),
        "adapters": (flags(models, critic, *alone, "--offload_reference_model"), None),
        "rule": (flags(models, *rule, "--enable_ema"), None),
        "fresh": (flags(models, f"--reward_model_name_or_path={models / 'reward'}"), None),
    }
    output = models / "seen.json"
    printed = python(WORKER, output, json.dumps(list(runs.values())), cwd=models).stdout
    return {**dict(zip(runs, json.loads(output.read_text()), strict=True)), "printed": printed}


@pytest.mark.slow
def test_a_fifth_model_is_one_entry_of_the_list(built):
    """It is verified, built, sharded as the actor is, counted in memory reports and held to its promises."""
    seen = built["teacher"]
    assert seen["engines"] == ["actor", "reference", "critic", "reward", "guard", "teacher"]
    assert seen["received"][-1] == "--teacher_model_name_or_path"
    assert seen["sharded"] == ["actor", "reference", "teacher"]
    assert "loading the teacher\n" in built["printed"]
    assert any("GiB  weights of the teacher" in line for line in seen["consumers"])
    assert seen["prefixes of flags"]["teacher"] == "actor_"
    assert "--teacher_model_name_or_path" in seen["changed teacher"]
    assert "its golden outputs" in seen["changed teacher"]


@pytest.mark.slow
def test_the_other_models_are_held_to_the_promises_of_the_folders_that_they_come_from(built):
    seen, flag = built["teacher"], "--{}_model_name_or_path"
    sources = {
        "actor": "actor",
        "reference": "actor",
        "critic": "critic",
        "reward": "critic",
        "guard": "guard_reward",
    }
    for role, source in sources.items():
        assert seen[f"changed {role}"].startswith(flag.format(source)), role
    assert seen["received"][:-1] == [flag.format(name) for name in ("actor", "critic", "guard_reward")]


@pytest.mark.slow
def test_only_trained_models_have_gradients(built):
    assert built["teacher"]["trained"] == ["actor", "critic"]
    assert built["teacher"]["have gradients"] == ["actor", "critic"]


@pytest.mark.slow
def test_an_actor_of_adapters_alone_is_its_own_reference(built):
    seen = built["adapters"]
    assert seen["engines"] == ["actor", "critic", "reward"]
    assert seen["reference is the actor"]
    assert not built["teacher"]["reference is the actor"]
    printed = built["printed"]
    assert printed.count("the reference model is the actor without its adapters: no copy is loaded") == 1
    assert printed.count("note: --offload_reference_model has nothing to offload and is ignored.") == 1
    assert printed.count("loading the reference model, a copy: the actor trains more than adapters") == 3


@pytest.mark.slow
def test_without_a_critic_it_is_said_what_that_saves(built):
    assert built["rule"]["engines"] == ["actor", "reference"]
    assert "no critic: --advantage_estimator rloo needs none. One as large as the actor" in built["printed"]


@pytest.mark.slow
def test_nothing_is_promised_of_a_fresh_head(built):
    seen = built["fresh"]
    assert seen["engines"] == ["actor", "reference", "critic", "reward"]
    assert seen["changed critic"] is None
    assert seen["changed reward"].startswith("--reward_model_name_or_path")
    assert seen["received"] == ["--actor_model_name_or_path", "--reward_model_name_or_path"]


def test_a_critic_that_learns_alone_shortens_the_schedule_of_the_actor():
    steps = num_training_steps(PpoArguments(critic_warmup_steps=3), num_ppo_steps=5, updates_per_ppo_step=4)
    assert steps == {"actor": 8, "critic": 20}  # (5 - 3) x 4 and 5 x 4


def test_a_warm_up_of_the_whole_run_is_an_error():
    with pytest.raises(UserError, match=r"--critic_warmup_steps 3 leaves .* 3 PPO steps"):
        num_training_steps(PpoArguments(critic_warmup_steps=3), num_ppo_steps=3, updates_per_ppo_step=4)
