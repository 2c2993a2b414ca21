"""manifest.json: what an export writes into it, and how other contents are refused."""

import json

import pytest
import torch
from exported_models import FLAG, ROWS, edit, provenance
from transformers import AutoModelForCausalLM, AutoTokenizer

from dschat.arguments import ModelArguments
from dschat.errors import UserError
from dschat.export.export import export_model
from dschat.export.golden_outputs import golden_outputs
from dschat.export.manifest import Manifest, weight_checksums
from dschat.export.upstream import verify_model
from dschat.models.loading import create_critic_model, create_hf_model
from dschat.models.lora import add_lora


def test_what_a_step_promises_is_what_its_folder_holds(reward):
    promised = Manifest.read(reward)
    assert (promised.step, promised.head, promised.dtype) == ("reward", "score", "fp32")
    assert (promised.score_mean, promised.score_std) == (0.25, 0.5)
    assert promised.files == weight_checksums(reward)
    assert set(promised.files) == {"model.safetensors"}
    assert promised.pad_token_id == AutoTokenizer.from_pretrained(reward).pad_token_id
    handover = verify_model(str(reward), FLAG, "score")
    assert handover.score_statistics() == (0.25, 0.5)
    model = create_critic_model(str(reward), AutoTokenizer.from_pretrained(reward), None, rlhf_training=True)
    handover.check_outputs(model)
    handover.check_template(AutoTokenizer.from_pretrained(reward))


def test_a_manifest_of_format_1_is_read(copy):
    path = copy / "manifest.json"
    values = json.loads(path.read_text())
    del values["end_token_ids"]
    path.write_text(json.dumps({**values, "format": 1}))
    assert verify_model(str(copy), FLAG, "score").manifest.end_token_ids is None


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "is no manifest"),
        ("[]", "is no manifest"),
        ('{"format": 1}', "is no manifest"),
        ('{"format": 99}', "has format 99"),
        ("{}", "is no manifest"),
        ("[" * 100_000, "is no manifest"),
    ],
)
def test_a_manifest_that_cannot_be_read_is_an_error_and_says_what_to_do(text, problem, copy):
    (copy / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=rf"manifest\.json {problem}.*delete the file"):
        verify_model(str(copy), FLAG, "score")


@pytest.mark.parametrize(
    "values",
    [
        *(
            {"files": {}},
            {"head": "tail"},
            {"head": []},
            {"golden_outputs": [1.0]},
            {"dtype": {}},
            {"more": 1},
        ),
        *({"golden_inputs": [["a"]] * 3}, {"golden_inputs": [[1.5]] * 3}, {"golden_inputs": 7}),
        *(
            {"golden_outputs": [10**400] * 3},
            {"num_tokens": True},
            {"num_tokens": 10**30},
            {"score_std": "1"},
        ),
        *({"score_std": float("nan")}, {"score_mean": 10**400}, {"eos_token_id": [1]}, {"end_token_ids": []}),
    ],
)
def test_a_manifest_with_other_contents_is_one_too(values, copy):
    edit(copy, **values)
    with pytest.raises(UserError, match=f"is no manifest of this program.*{next(iter(values))}"):
        Manifest.read(copy)


def test_a_manifest_that_lacks_a_promise_names_it(copy):
    path = copy / "manifest.json"
    values = json.loads(path.read_text())
    del values["head"], values["dtype"]
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"\(it lacks dtype, head\)"):
        Manifest.read(copy)


def test_an_export_without_provenance_takes_an_older_manifest_away(copy, base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    export_model(create_critic_model(str(base), tokenizer, None), tokenizer, copy)
    assert not (copy / "manifest.json").exists()


def test_promises_are_about_what_is_in_the_file_merged_adapters_and_averages(base, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(base)
    actor = create_hf_model(AutoModelForCausalLM, str(base), tokenizer)
    untrained = golden_outputs(actor, ROWS, num_tokens=len(tokenizer), device="cpu")
    add_lora(actor, ModelArguments(model_name_or_path=str(base), lora_dim=4))
    with torch.no_grad():
        for name, parameter in actor.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.1)
    export_model(actor, tokenizer, tmp_path / "actor", provenance=provenance("rlhf"))
    merged = verify_model(str(tmp_path / "actor"), FLAG, "language_model")
    merged.check_outputs(actor)
    assert (torch.tensor(merged.manifest.golden_outputs) - untrained).abs().max() > 0.01
    average = {name: p.detach() * 0.9 for name, p in actor.named_parameters()}
    export_model(actor, tokenizer, tmp_path / "ema", parameters=average, provenance=provenance("rlhf"))
    averaged = verify_model(str(tmp_path / "ema"), FLAG, "language_model")
    averaged.check_outputs(create_hf_model(AutoModelForCausalLM, str(tmp_path / "ema"), tokenizer))
    with pytest.raises(UserError, match="golden outputs"):
        averaged.check_outputs(actor)
