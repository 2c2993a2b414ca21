"""Every promise of a manifest, kept and broken, from the export of one step to the start of the next."""

import json
import re
import shutil
import time
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from processes import ROOT, python
from safetensors.torch import load_file, save_file
from tiny import save_tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from dschat.arguments import ModelArguments, parse_arguments
from dschat.data.preparation import SplitData
from dschat.data.templates import NONE, PLAIN
from dschat.errors import UserError
from dschat.export import manifest
from dschat.export.export import export_model
from dschat.export.golden_outputs import golden_outputs
from dschat.export.manifest import Manifest, weight_checksums
from dschat.export.model_card import Provenance, golden_rows, step_provenance
from dschat.export.upstream import verify_model
from dschat.models.loading import create_critic_model, create_hf_model
from dschat.models.lora import add_lora

FLAG = "--critic_model_name_or_path"
ROWS = [[5, 80, 90, 11], [7, 8, 9, 60, 61, 62, 0], [33, 44]]


def provenance(step: str, head: str | None = None, **figures: float) -> Provenance:
    return Provenance(step=step, base_model="base", golden_inputs=ROWS, head=head, figures=figures)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "base", tokenizer=with_template())


def with_template(template: str = PLAIN):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def reward(base) -> Path:
    """What step 2 hands on; its scores are a quarter of a standard deviation's unit apart from 0."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = create_critic_model(str(base), tokenizer, None)
    folder = base.parent / "reward"
    export_model(model, tokenizer, folder, provenance=provenance("reward", score_mean=0.25, score_std=0.5))
    return folder


@pytest.fixture
def copy(reward, tmp_path) -> Path:
    return Path(shutil.copytree(reward, tmp_path / "copy"))


def edit(folder: Path, **values: object) -> None:
    """Change the manifest by hand."""
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def broken(folder: Path, *heads: str) -> str:
    """The message of a folder that is not accepted."""
    with pytest.raises(UserError) as error:
        verify_model(str(folder), FLAG, *(heads or ("score",)))
    assert FLAG in str(error.value)
    return str(error.value)


def corrupt(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


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


def with_random_head(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    head = state["score.weight"]
    state["score.weight"] = torch.randn(head.shape, generator=generator).to(head) / 33**0.5
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


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


def test_a_manifest_of_format_1_is_read(copy):
    path = copy / "manifest.json"
    values = json.loads(path.read_text())
    del values["end_token_ids"]
    path.write_text(json.dumps({**values, "format": 1}))
    assert verify_model(str(copy), FLAG, "score").manifest.end_token_ids is None


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


def test_another_size_of_the_vocabulary_is_named(copy):
    edit(copy, num_tokens=1000)
    assert "its vocabulary: num_tokens is" in broken(copy, "score")


def test_an_export_without_provenance_takes_an_older_manifest_away(copy, base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    export_model(create_critic_model(str(base), tokenizer, None), tokenizer, copy)
    assert not (copy / "manifest.json").exists()


def test_golden_rows_are_the_ends_of_the_first_rows():
    pairs = {"chosen_ids": [[1] * 30 + [2], [3, 4]], "rejected_ids": [[5], [6, 7]], "length": [31, 2]}
    assert golden_rows(Dataset.from_dict(pairs)) == [[1] * 23 + [2], [3, 4], [6, 7]]
    prompts = {"input_ids": [[i, i] for i in range(9)], "key": list(range(9))}
    assert golden_rows(Dataset.from_dict(prompts)) == [[i, i] for i in range(8)]


def test_the_card_says_what_made_the_model_in_front_matter_that_is_yaml(base, tmp_path):
    args = parse_arguments("sft", ["--model_name_or_path=org/base", "--data_path", "a|b.jsonl", "--seed=7"])
    rows = Dataset.from_dict({"input_ids": ROWS})
    data = SplitData(train=rows, evaluation=rows.select([0]), num_rows={"a|b.jsonl": 12}, key="0")
    tokenizer = AutoTokenizer.from_pretrained(base)
    actor = create_hf_model(AutoModelForCausalLM, str(base), tokenizer)
    made = step_provenance(args.description, args.model.model_name_or_path, data, {"eval_loss": 1.23456789})
    export_model(actor, tokenizer, tmp_path / "sft", provenance=made)
    _, front, body = (tmp_path / "sft" / "README.md").read_text().split("---\n", 2)
    front = yaml.safe_load(front)
    assert front["library_name"] == "transformers"
    assert front["base_model"] == "org/base"
    assert front["tags"] == ["dschat", "sft", "language_model"]
    for line in ("| a\\|b.jsonl | 12 |", "3 rows for training, 1 rows for evaluation", "| `--seed` | 7 |"):
        assert line in body
    assert "| eval_loss | 1.23457 |" in body
    assert "`--dtype`" not in body
    loading = re.search(r"model = transformers\.(.*)", body)[0]
    found = {}
    exec(f"import transformers\n{loading}", found)
    assert found["model"].num_parameters() == actor.num_parameters()


# --- the acceptance test: step 3 as a user starts it, on what a saboteur left


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
    assert ("Loading weights" in result.stderr) is (sabotage is forged)
    assert seconds < 30


@pytest.mark.parametrize("verdict", ["not better than chance: 0.45", "too few pairs to say: 0.9", None])
def test_a_bad_verdict_on_a_reward_model_is_repeated(verdict, copy, capsys):
    path = copy / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "verdict": verdict}))
    verify_model(str(copy), FLAG, "score").warn_of_verdict()
    warning = f"WARNING: {FLAG} {copy}: the verdict of step 2 on this reward model is {verdict}. PPO learns"
    assert (warning in capsys.readouterr().out) == (verdict is not None)


def test_a_good_verdict_is_not_repeated(copy, capsys):
    path = copy / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "verdict": "better than chance: 0.7"}))
    verify_model(str(copy), FLAG, "score").warn_of_verdict()
    assert "verdict" not in capsys.readouterr().out
