"""Every promise of a manifest, kept and broken, from the export of one step to the start of the next."""

import json
import re
import time
from pathlib import Path

import pytest
from exported_models import FLAG, broken, corrupt, edit, provenance, with_random_head, with_template
from processes import ROOT, python
from safetensors.torch import load_file, save_file
from tiny import tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from dschat.data.templates import NONE
from dschat.errors import UserError
from dschat.export import manifest
from dschat.export.export import export_model
from dschat.export.manifest import Manifest, weight_checksums
from dschat.export.upstream import verify_model
from dschat.models.loading import create_critic_model, create_hf_model


def test_a_model_without_a_manifest_is_accepted_with_one_line(base, capsys):
    handover = verify_model(str(base), "--model_name_or_path", "language_model")
    assert capsys.readouterr().out.count("\n") == 1
    assert handover.manifest is None
    handover.check_outputs(None)
    handover.check_template(with_template())
    with pytest.raises(UserError, match=r"--normalize_scores .* manifest\.json"):
        handover.score_statistics()


def test_a_corrupted_file_is_named(copy):
    weights = copy / "model.safetensors"
    corrupt(weights, weights.stat().st_size // 2)
    assert re.search(r"its checksums: model\.safetensors .*corrupted", broken(copy))


def test_a_file_corrupted_in_its_header_is_named_too(copy):
    corrupt(copy / "model.safetensors", 12)
    assert re.search(r"By its manifest\.json model\.safetensors is not the file", broken(copy))


def test_a_deleted_head_is_named_before_the_checksum(copy):
    state = load_file(copy / "model.safetensors")
    del state["score.weight"]
    save_file(state, copy / "model.safetensors", metadata={"format": "pt"})
    message = broken(copy)
    assert message.index("missing: score.weight") < message.index("model.safetensors is not the file")


def test_a_random_head_breaks_the_checksum_and_behind_a_forged_one_the_golden_scores(copy):
    with_random_head(copy)
    assert "its checksums: model.safetensors" in broken(copy)
    edit(copy, files=weight_checksums(copy))
    handover = verify_model(str(copy), FLAG, "score")
    tokenizer = AutoTokenizer.from_pretrained(copy)
    for config in (None, {"bf16": {"enabled": True}}):
        model = create_critic_model(str(copy), tokenizer, config, rlhf_training=True)
        with pytest.raises(UserError, match=f"{FLAG} .*its golden outputs: a score is off by"):
            handover.check_outputs(model)


def test_a_missing_and_an_added_file_are_named(copy):
    promised = Manifest.read(copy)
    (copy / "model-00001-of-00002.safetensors").write_bytes(b"")
    assert "model-00001-of-00002.safetensors was added" in broken(copy)
    assert manifest.changed_files(promised, copy.parent) == "model.safetensors is missing"


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("tokenizer.json", '"P":', '"p~":', "its tokenizer and chat template"),
        ("tokenizer.json", '"single_word"', '"shngle_word"', "its tokenizer and chat template"),
        ("chat_template.jinja", "{% for", "{& for", "its tokenizer and chat template"),
        ("config.json", '"hidden_size": 32', '"hidden_size": 22', "describes"),
        ("config.json", '"silu"', '"silw"', "cannot be built (KeyError: 'silw')"),
        ("config.json", '"num_attention_heads": 4', '"num_attention_heads": 0', "config.json"),
        ("config.json", "{", "[", "config.json describes no model"),
    ],
)
def test_a_damaged_file_is_one_line_that_names_flag_and_folder(name, old, new, message, copy):
    text = (copy / name).read_text()
    assert old in text
    (copy / name).write_text(text.replace(old, new, 1))
    found = broken(copy)
    assert message in found
    assert str(copy) in found
    assert "\n" not in found


def test_another_tokenizer_is_named_before_its_ids(copy):
    tiny_tokenizer(vocab_size=300).save_pretrained(copy)
    message = broken(copy)
    assert "its tokenizer: the folder holds another tokenizer" in message
    edit(copy, tokenizers_version="0.1")
    assert "written with tokenizers 0.1" in broken(copy)


def test_a_changed_template_is_named_in_the_folder_and_in_the_run(copy, reward):
    with_template(NONE).save_pretrained(copy)
    assert "its chat template: the chat template in the folder" in broken(copy)
    handover = verify_model(str(reward), FLAG, "score")
    with pytest.raises(UserError, match=f"{FLAG} .*its chat template: this run uses another one"):
        handover.check_template(with_template(NONE))


@pytest.mark.parametrize("name", ["eos_token_id", "pad_token_id"])
def test_another_special_token_is_named(name, copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, name: 7}))
    assert f"its special tokens: {name} is 7 in config.json and {config[name]} in" in broken(copy)
    edit(copy, **{name: 7})
    assert f"its special tokens: {name} is {config[name]} in the tokenizer and 7 in" in broken(copy)


def test_an_end_token_that_went_is_named(base, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = create_hf_model(AutoModelForCausalLM, str(base), tokenizer)
    model.generation_config.eos_token_id = model.config.eos_token_id = [0, 5]
    export_model(model, tokenizer, tmp_path / "sft", provenance=provenance("sft"))
    assert Manifest.read(tmp_path / "sft").end_token_ids == [0, 5]
    verify_model(str(tmp_path / "sft"), FLAG, "language_model")
    settings = tmp_path / "sft" / "generation_config.json"
    settings.write_text(settings.read_text().replace("5", "6"))
    problem = r"eos_token_id is \[0, 6\] in generation_config.json and \[0, 5\] in the manifest"
    with pytest.raises(UserError, match=problem):
        verify_model(str(tmp_path / "sft"), FLAG, "language_model")


def test_a_critic_is_no_reward_model_and_a_language_model_is_neither(base, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(base)
    critic = create_critic_model(str(base), tokenizer, None)
    export_model(critic, tokenizer, tmp_path / "critic", provenance=provenance("rlhf", head="value"))
    assert "is a critic, as step 3 trains" in broken(tmp_path / "critic")
    assert Manifest.read(tmp_path / "critic").score_std is None
    assert verify_model(str(tmp_path / "critic"), FLAG).manifest.head == "value"  # step 2 takes any backbone
    assert "missing: score.weight" in broken(base)
    assert "step 3 trains, says its manifest.json; give a language model" in broken(
        tmp_path / "critic", "language_model"
    )
    export_model(
        create_hf_model(AutoModelForCausalLM, str(base), tokenizer),
        tokenizer,
        tmp_path / "sft",
        provenance=provenance("sft"),
    )
    assert "is a language model, says its manifest.json; give a reward model" in broken(tmp_path / "sft")
    (tmp_path / "critic" / "manifest.json").unlink()
    assert "not a language model" in broken(tmp_path / "critic", "language_model")


def test_another_size_of_the_vocabulary_is_named(copy):
    edit(copy, num_tokens=1000)
    assert "its vocabulary: num_tokens is" in broken(copy, "score")


@pytest.fixture(scope="module")
def steps(base, reward) -> Path:
    """A folder with an actor, a reward model and data."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    actor = create_hf_model(AutoModelForCausalLM, str(base), tokenizer)
    export_model(actor, tokenizer, base.parent / "sft", provenance=provenance("sft"))
    rows = [{"prompt": f"\n\nHuman: {i}?\n\nAssistant:", "chosen": " a", "rejected": " b"} for i in range(9)]
    (base.parent / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return base.parent


def one_byte(folder: Path) -> None:
    corrupt(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 1000)


def other_tokenizer(folder: Path) -> None:
    tiny_tokenizer(["another language"], vocab_size=280).save_pretrained(folder)


def no_head(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    del state["score.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def forged(folder: Path) -> None:
    with_random_head(folder)
    edit(folder, files=weight_checksums(folder))


SABOTAGE = {
    one_byte: "its checksums: model.safetensors is not the file that step 'reward' wrote",
    other_tokenizer: "its tokenizer: the folder holds another tokenizer",
    no_head: "missing: score.weight",
    forged: "its golden outputs: a score is off by",
}


@pytest.mark.slow
@pytest.mark.parametrize("sabotage", SABOTAGE, ids=lambda sabotage: sabotage.__name__)
def test_step_3_refuses_a_reward_model_that_is_not_what_step_2_wrote(sabotage, steps, copy):
    sabotage(copy)
    start = time.monotonic()
    result = python(
        ROOT / "step3_ppo" / "main.py",
        f"--actor_model_name_or_path={steps / 'sft'}",
        f"{FLAG}={copy}",
        f"--data_path={steps / 'pairs.jsonl'}",
        f"--data_output_path={steps / 'cache'}",
        "--data_split=0,0,1",
        "--dtype=fp32",
        check=False,
    )
    seconds = time.monotonic() - start
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.count("error: ") == 1
    message = result.stderr[result.stderr.index("error: ") :]
    print(f"{seconds:.1f} s: {message}")
    assert FLAG in message
    assert SABOTAGE[sabotage] in message
    assert ("loading the actor" in result.stdout) is (sabotage is forged)
    assert seconds < 30


@pytest.mark.parametrize("verdict", ["no better than chance: 0.45", "too few pairs to say: 0.9", None])
def test_a_bad_verdict_on_a_reward_model_is_repeated(verdict, copy, capsys):
    path = copy / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "verdict": verdict}))
    verify_model(str(copy), FLAG, "score").warn_of_verdict()
    warning = f"WARNING: {FLAG} {copy}: the verdict of step 2 on this reward model is {verdict}. PPO learns"
    assert (warning in capsys.readouterr().out) == (verdict is not None)


def test_a_good_verdict_is_not_repeated(copy, capsys):
    path = copy / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "verdict": "good: 0.7"}))
    verify_model(str(copy), FLAG, "score").warn_of_verdict()
    assert "verdict" not in capsys.readouterr().out
