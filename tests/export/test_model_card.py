"""The model card."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from exported_models import ROWS, with_template
from tiny import with_moved_adapters
from transformers import AutoModelForCausalLM, AutoTokenizer

from dschat.arguments import ModelArguments, parse_arguments
from dschat.data.comparisons import Turn
from dschat.data.encoder import Encoder
from dschat.data.preparation import SplitData
from dschat.data.rows import Rows
from dschat.export.export import export_model
from dschat.export.golden_outputs import golden_outputs
from dschat.export.model_card import model_card
from dschat.export.provenance import Provenance, step_provenance
from dschat.export.snippets import ANSWER, QUESTION
from dschat.models.loading import create_critic_model, create_hf_model
from dschat.models.lora import add_lora


def test_the_card_says_what_made_the_model_in_front_matter_that_is_yaml(base, tmp_path, capsys):
    args = parse_arguments("sft", ["--model_name_or_path=org/base", "--data_path", "a|b.jsonl", "--seed=7"])
    rows = Rows.from_dict({"input_ids": ROWS})
    data = SplitData(train=rows, evaluation=Rows(rows.table.slice(0, 1)), num_rows={"a|b.jsonl": 12}, key="0")
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
    assert run_code(tmp_path / "sft")["model"].num_parameters() == actor.num_parameters()
    assert len(capsys.readouterr().out.strip("\n")) > 0  # the answer


def adapted(model):
    """The model with adapters that have learned something, and nothing else that has."""
    add_lora(model, ModelArguments(model_name_or_path="base", lora_dim=4), only_optimize_lora=True)
    return with_moved_adapters(model)


def run_code(folder: Path) -> dict[str, Any]:
    """What is defined once the code of a card has run."""
    found: dict[str, Any] = {}
    blocks = re.findall(
        r"^```python\n(.*?)^```", (folder / "README.md").read_text(), re.MULTILINE | re.DOTALL
    )
    assert blocks
    for block in blocks:
        exec(block, found)
    return found


def test_the_code_scores_as_step_3_does_also_with_the_adapter_alone(base, tmp_path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = adapted(create_critic_model(str(base), tokenizer, None))
    for head in ("score", "value"):
        made = Provenance(step="reward", base_model=str(base), golden_inputs=ROWS, head=head)
        export_model(model, tokenizer, tmp_path / head, provenance=made)
        found = run_code(tmp_path / head)
        (row,) = Encoder(tokenizer).rows([(Turn("user", QUESTION),)], [[ANSWER]])
        ours = create_critic_model(str(tmp_path / head), tokenizer, None, rlhf_training=True).eval()
        (score,) = golden_outputs(
            ours, [[*row.prompt, *row.answers[0]]], num_tokens=len(tokenizer), device="cpu"
        )
        name, shown = re.search(r"^(\w+): ([-.\de]+)$", capsys.readouterr().out, re.MULTILINE).groups()
        assert (name, float(shown)) == (head, pytest.approx(score.item(), abs=1e-5))
        alone = found["model"](found["ids"]).logits.item()  # the last block put the adapter on its base
        assert alone == pytest.approx(score.item(), abs=1e-5)


def test_a_language_models_adapter_on_its_base_is_the_model(base, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(base)
    actor = adapted(create_hf_model(AutoModelForCausalLM, str(base), tokenizer))
    made = Provenance(step="rlhf", base_model=str(base), golden_inputs=ROWS)
    export_model(actor, tokenizer, tmp_path / "actor", provenance=made)
    found = run_code(tmp_path / "actor")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "actor")
    torch.testing.assert_close(found["model"](found["ids"]).logits, whole(found["ids"]).logits)


def test_a_card_has_no_section_for_what_is_not_known(tmp_path):
    origin = Provenance(step="deepspeed-chat", base_model=str(tmp_path), golden_inputs=[])
    card = model_card(origin, "score", "out/reward", with_template())
    assert "# reward\n\nA reward model: one score for a prompt with its answer, made by conversion" in card
    assert "folder = 'out/reward'" in card
    assert "adapter" not in card
    assert [line for line in card.splitlines() if line.startswith("## ")] == ["## Versions"]
    assert "base_model" not in card  # a folder is none on the hub


def test_values_in_a_table_are_short_and_do_not_break_it():
    origin = Provenance(
        step="sft",
        base_model="b",
        golden_inputs=[],
        flags={"names": ["a|b", "c"], "rate": 1 / 3, "limit": float("inf"), "text": "x\ny"},
    )
    card = model_card(origin, "language_model", "m", with_template())
    for line in ("| `--names` | a\\|b c |", "| `--rate` | 0.333333 |", "| `--limit` | inf |"):
        assert line in card
    assert "| `--text` | x\\ny |" in card
