"""The model card."""

import re

import yaml
from datasets import Dataset
from exported_models import ROWS
from transformers import AutoModelForCausalLM, AutoTokenizer

from dschat.arguments import parse_arguments
from dschat.data.preparation import SplitData
from dschat.export.export import export_model
from dschat.export.model_card import model_card
from dschat.export.provenance import Provenance, step_provenance
from dschat.models.loading import create_hf_model


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


def test_a_card_has_no_section_for_what_is_not_known(tmp_path):
    origin = Provenance(step="deepspeed-chat", base_model=str(tmp_path), golden_inputs=[])
    card = model_card(origin, "score", "out/reward")
    assert "# reward\n\nA reward model: one score for a prompt with its answer, made by conversion" in card
    assert "AutoModelForSequenceClassification.from_pretrained('out/reward'" in card
    assert [line for line in card.splitlines() if line.startswith("## ")] == ["## Versions"]
    assert "base_model" not in card  # a folder is none on the hub


def test_values_in_a_table_are_short_and_do_not_break_it():
    origin = Provenance(
        step="sft",
        base_model="b",
        golden_inputs=[],
        flags={"names": ["a|b", "c"], "rate": 1 / 3, "limit": float("inf"), "text": "x\ny"},
    )
    card = model_card(origin, "language_model", "m")
    for line in ("| `--names` | a\\|b c |", "| `--rate` | 0.333333 |", "| `--limit` | inf |"):
        assert line in card
    assert "| `--text` | x\\ny |" in card
