"""Rollouts of an actor that is a Hybrid Engine: what generates, what is said, the numbers of real runs."""

import json
from pathlib import Path

import pytest
import torch
from alike_runs import assert_alike
from processes import ROOT, python
from rollout_helpers import TEXTS, PlainEngine, answers, prompt_batch
from test_ppo_resume import HALF_A_RANK, flags_of, save_models_and_pairs
from tiny import save_reward_model, save_tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from dschat.arguments import ModelArguments, RolloutArguments
from dschat.engines import hybrid
from dschat.engines.hybrid import Injection
from dschat.models.loading import create_hf_model
from dschat.models.lora import add_lora
from dschat.rlhf.rollout.backend import Sampling
from dschat.rlhf.rollout.choice import build_backend
from dschat.rlhf.rollout.hybrid import HybridGenerate
from dschat.runs.measured_choices import MeasuredChoices

KERNELS = "Hybrid Engine: DeepSpeed's kernels"
SETTINGS = {"pin_parameters": True, "release_inference_cache": False}


@pytest.fixture
def phases(monkeypatch) -> list[str]:
    """Phases of engines that are none of DeepSpeed's, in the order in which they begin and end."""
    found: list[str] = []

    class Phase:
        def __init__(self, engine):
            pass

        def __enter__(self):
            found.append("begin")

        def __exit__(self, *_):
            found.append("end")

    monkeypatch.setattr(hybrid, "phase", Phase)
    return found


def actor(folder: Path, injection: Injection | None, **lora) -> tuple[PlainEngine, object]:
    path, tokenizer = str(save_tiny_model(folder)), tiny_tokenizer()
    model = create_hf_model(AutoModelForCausalLM, path, tokenizer)
    if lora:
        add_lora(model, ModelArguments(model_name_or_path=path, **lora), only_optimize_lora=True)
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                torch.nn.init.normal_(parameter, std=0.1)
    engine = PlainEngine(model)
    if injection is not None:
        engine.injection = injection
    return engine, tokenizer


def backend_of(engine, tokenizer, backend: str = "auto"):
    args = RolloutArguments(rollout_backend=backend)
    choices = MeasuredChoices(measures=False)
    return build_backend(args, engine, tokenizer, longest=120, choices=choices)


def answered(backend, tokenizer) -> tuple[list[list[int]], torch.Tensor]:
    sampling = Sampling(max_answer_length=8, with_logprobs=True)
    with backend.session():
        rollout = backend.generate(prompt_batch(tokenizer, TEXTS), sampling)
    return answers(rollout), rollout.logprobs


def test_without_kernels_another_back_end_answers_in_the_engine_s_phases(tmp_path, phases, capsys):
    expected, _ = answered(backend_of(*actor(tmp_path, None)), tiny_tokenizer())
    engine, tokenizer = actor(tmp_path, Injection(SETTINGS, "there are none"))
    backend = backend_of(engine, tokenizer)
    said = [line for line in capsys.readouterr().out.splitlines() if "Hybrid Engine" in line]
    assert said == [f"{KERNELS} are not used, as there are none; static decoding generates instead"]
    phases.clear()
    assert answered(backend, tokenizer)[0] == expected
    assert phases == ["begin", "end"]


@pytest.mark.parametrize("backend", ["hf", "static"])
def test_adapters_are_in_the_weights_for_generation_and_gone_bit_by_bit_after_it(
    tmp_path, phases, backend, capsys
):
    adapters = {"lora_dim": 4, "lora_learning_rate": 1e-4}
    torch.manual_seed(3)
    expected, logprobs = answered(backend_of(*actor(tmp_path, None, **adapters), backend), tiny_tokenizer())
    torch.manual_seed(3)
    engine, tokenizer = actor(tmp_path, Injection(SETTINGS, "they read none"), **adapters)
    weights = {name: p.clone() for name, p in engine.module.state_dict().items()}
    hybrid_backend = backend_of(engine, tokenizer, backend)
    assert capsys.readouterr().out.endswith("with the adapters added into the weights in each phase\n")
    products = []
    layer = engine.module.model.layers[0].self_attn.q_proj
    layer.lora_A["default"].register_forward_hook(lambda *_: products.append(1))
    found, their_logprobs = answered(hybrid_backend, tokenizer)
    assert found == expected
    torch.testing.assert_close(their_logprobs, logprobs, atol=1e-5, rtol=0)
    assert not products
    for name, weight in engine.module.state_dict().items():
        assert torch.equal(weight, weights[name]), name
    engine.module(input_ids=torch.tensor([[1]]))
    assert products


def test_kernels_generate_where_the_trial_found_them_good(tmp_path, phases, capsys):
    backend = backend_of(*actor(tmp_path, Injection(SETTINGS, layer="LlamaDecoderLayer")))
    assert isinstance(backend, HybridGenerate)
    assert backend.name == "DeepSpeed's kernels"
    assert "kernels took the place of LlamaDecoderLayer and generate" in capsys.readouterr().out


def test_unpinned_parameters_are_gathered_by_layer(tmp_path):
    engine, tokenizer = actor(tmp_path, Injection({**SETTINGS, "pin_parameters": False}, "there are none"))
    engine.module.lm_head.weight.ds_id = 0  # a sharded parameter
    assert HybridGenerate(engine, tokenizer, engine.injection, gather="auto").keeps_in_step


FAMILIES = ("opt", "llama", "gpt2", "gpt_neox", "qwen3", "bloom")
SIZES = {
    1: {"per_device_generation_batch_size": 8, "per_device_training_batch_size": 4},
    2: {"per_device_generation_batch_size": 4, "per_device_training_batch_size": 2},
}


@pytest.mark.matrix
@pytest.mark.parametrize("family", FAMILIES)
def test_two_ppo_steps_are_those_of_an_ordinary_engine(family, tmp_path):
    """On 1 and 2 ranks at ZeRO 0 and 3; prints what each run said. test_ppo_on_ranks.py has adapters."""
    save_tiny_model(tmp_path / "actor", family)
    save_tiny_model(tmp_path / "base", family, seed=1)
    save_reward_model(tmp_path / "base", tmp_path / "reward")
    runs: dict[tuple[int, int], dict] = {}
    said: list[str] = []
    for ranks, sizes in SIZES.items():
        settings = [
            {**sizes, "dtype": "fp32", "actor_zero_stage": stage, "enable_hybrid_engine": True}
            for stage in (0, 3)
        ]
        plain = [{**sizes, "dtype": "fp32"}] if ranks == 1 else []
        output = tmp_path / f"results_{ranks}.json"
        worker = ROOT / "tests" / "workers" / "ppo_steps.py"
        printed = python(
            worker, tmp_path, output, json.dumps(settings + plain), ranks=ranks, timeout=900
        ).stdout
        said += [line for line in printed.splitlines() if line.startswith(KERNELS)]
        results = json.loads(output.read_text())
        runs |= {(ranks, 0): results[0], (ranks, 3): results[1]}
        if plain:
            expected = results[2]
    print(family, *said, sep="\n")
    assert len(said) == 4
    for run, result in runs.items():
        for ours, theirs in zip(result["steps"], expected["steps"], strict=True):
            assert ours["answers"] == theirs["answers"], run
            for name in ("score", "kl", "entropy", "policy_loss", "value_loss"):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-4), (name, run)
        for name, weights in expected["weights"].items():
            assert result["weights"][name] == pytest.approx(weights, rel=1e-4), (name, run)


@pytest.mark.matrix
@pytest.mark.parametrize("family", FAMILIES)
def test_a_stopped_run_goes_on_bit_by_bit_on_two_ranks(family, tmp_path):
    save_models_and_pairs(tmp_path, family)
    runs = []
    for stage in (0, 3):
        options = HALF_A_RANK | {"actor_zero_stage": stage, "enable_hybrid_engine": True}
        options["export_actor"] = "last"
        whole, stopped = (flags_of(tmp_path, f"{name} {stage}", options) for name in ("whole", "stopped"))
        runs += [{"flags": whole}, {"flags": stopped, "stop_after": 5}]
        runs.append({"flags": [*stopped, "--resume_from_checkpoint=latest"]})
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    python(ROOT / "tests" / "workers" / "interrupted_ppo.py", tmp_path / "runs.json", ranks=2, timeout=900)
    for stage in (0, 3):
        assert_alike(tmp_path / f"whole {stage}", tmp_path / f"stopped {stage}", exactly=True)
