"""Golden outputs: what they are, and how near to a promise they must be."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from exported_models import FLAG, ROWS, provenance
from tiny import save_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from dschat.errors import UserError
from dschat.export.export import export_model
from dschat.export.golden_outputs import golden_outputs, head_of, tolerance
from dschat.export.manifest import Manifest
from dschat.export.upstream import verify_model
from dschat.models.loading import create_critic_model, create_hf_model


def test_golden_outputs_are_the_mean_log_probability_and_the_score_of_rows_by_themselves(base, reward):
    tokenizer = AutoTokenizer.from_pretrained(base)
    actor = create_hf_model(AutoModelForCausalLM, str(base), tokenizer)
    critic = create_critic_model(str(reward), tokenizer, None, rlhf_training=True).train()
    logprobs = golden_outputs(actor, ROWS, num_tokens=len(tokenizer), device="cpu")
    scores = golden_outputs(critic, ROWS, num_tokens=len(tokenizer), device="cpu")
    assert critic.training
    with torch.no_grad():
        for row, logprob, score in zip(ROWS, logprobs, scores, strict=True):
            ids = torch.tensor([row])
            # transformers' loss is the mean of -log p over all tokens but the first.
            assert logprob.item() == pytest.approx(-actor(ids, labels=ids).loss.item(), abs=1e-5)
            assert score.item() == pytest.approx(
                critic.forward_value(ids)["chosen_end_scores"].item(), abs=1e-5
            )
    assert scores.std() > 0.01


def test_rounding_to_bf16_breaks_no_promise(reward, base, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(base)
    half = {"bf16": {"enabled": True}}
    critic = create_critic_model(str(reward), tokenizer, half, rlhf_training=True)
    verify_model(str(reward), FLAG, "score").check_outputs(critic)
    actor = create_hf_model(AutoModelForCausalLM, str(base), tokenizer, half)
    export_model(actor, tokenizer, tmp_path, provenance=provenance("sft"))
    handover = verify_model(str(tmp_path), FLAG, "language_model")
    assert handover.manifest.dtype == "bf16"
    handover.check_outputs(actor, create_hf_model(AutoModelForCausalLM, str(tmp_path), tokenizer))


def test_another_language_model_under_the_promises_of_this_one_is_found_out(base, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(base)
    actor = create_hf_model(AutoModelForCausalLM, str(base), tokenizer)
    export_model(actor, tokenizer, tmp_path / "sft", provenance=provenance("sft"))
    handover = verify_model(str(tmp_path / "sft"), FLAG, "language_model")
    save_tiny_model(tmp_path / "other", seed=1)
    other = create_hf_model(AutoModelForCausalLM, str(tmp_path / "other"), tokenizer)
    with pytest.raises(UserError, match="a log-probability a token is off by"):
        handover.check_outputs(actor, other)
    with torch.no_grad():
        next(actor.parameters()).fill_(torch.nan)
    with pytest.raises(UserError, match="off by inf"):
        handover.check_outputs(actor)


def promised(reward: Path, **values: object) -> Manifest:
    return dataclasses.replace(Manifest.read(reward), **values)


@pytest.mark.parametrize(
    ("written", "loaded", "nats"),
    [
        ("fp32", torch.float32, 1e-3),
        ("fp32", torch.float16, 0.03),
        ("bf16", torch.float32, 0.1),
        ("fp16", torch.bfloat16, 0.1),  # the coarser of the two
    ],
)
def test_a_log_probability_may_be_off_by_what_the_coarser_precision_rounds(written, loaded, nats, reward):
    assert tolerance(promised(reward, head="language_model", dtype=written), loaded) == nats


def test_a_score_may_be_off_by_standard_deviations_and_by_rounding_of_its_size(reward):
    # 1e-3 of 0.5, and 4 times 2^-23 of 1000.
    manifest = promised(reward, score_std=0.5, golden_outputs=[1000.0, 0.0, 1.0])
    assert tolerance(manifest, torch.float32) == pytest.approx(0.0005 + 4 * 2**-23 * 1000)
    # Without statistics the outputs' own: 0, 0 and 3 have mean 1 and variance (1 + 1 + 4) / 3 = 2.
    manifest = promised(reward, score_std=None, golden_outputs=[0.0, 0.0, 3.0], dtype="bf16")
    assert tolerance(manifest, torch.float32) == pytest.approx(0.5 * 2**0.5 + 4 * 2**-7 * 3)


def test_rows_of_one_token_alone_have_no_outputs(base):
    outputs = golden_outputs(torch.nn.Linear(1, 1), [], num_tokens=3, device="cpu")
    assert outputs.shape == (0,)
    assert outputs.dtype == torch.float64


def test_the_head_is_known_by_the_class_of_a_module_or_of_an_engines(reward):
    model = create_critic_model(str(reward), AutoTokenizer.from_pretrained(reward), None, rlhf_training=True)
    assert head_of(model) == head_of(SimpleNamespace(module=model)) == "score"
    assert head_of(torch.nn.Linear(1, 1)) == "language_model"
