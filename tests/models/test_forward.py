"""The forward pass on models whose outputs are known: a table of bigrams, and the tokens themselves."""

import ast
import math
import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import FAMILIES, tiny_config
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel, AutoModelForCausalLM

from dschat.data.collate import collate_text
from dschat.data.packing import RowLayout
from dschat.data.token_batch import TokenBatch
from dschat.models.attention import set_attention
from dschat.models.forward import (
    logits_of,
    model_inputs,
    predictions_of,
    scores_of,
    token_logprobs_of,
    values_of,
)
from dschat.models.reward_model import RewardModel

ROOT = Path(__file__).resolve().parents[2]
# P(next | token) of a vocabulary of 3, whose last entry pads it
BIGRAMS = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6], [0.1, 0.8, 0.1]])
TOKENS = torch.tensor([[0, 1, 1, 0], [2, 0, 0, 1]])
ANSWERS = TokenBatch.of(TOKENS, torch.ones(2, 2, dtype=torch.bool))


class BigramModel:
    """Predicts from the last token alone; keeps what it was called with."""

    def __call__(self, input_ids, **options):
        self.options = options
        logits = BIGRAMS.log()[input_ids]
        columns = options.get("logits_to_keep")
        return SimpleNamespace(logits=logits if columns is None else logits[:, columns])


def echo(input_ids, attention_mask=None, position_ids=None, *, return_values):
    """A reward model whose output is the token."""
    assert return_values
    return input_ids.float()


def test_the_logprob_of_a_label_is_read_one_position_before_it():
    # answers 1 0 after 1, and 0 1 after 0: P(1|1) P(0|1), P(0|0) P(1|0)
    actual = token_logprobs_of(BigramModel(), ANSWERS).exp()
    torch.testing.assert_close(actual, torch.tensor([[0.2, 0.2], [0.5, 0.3]]))


def test_vocabulary_beyond_the_tokenizer_takes_no_part_where_its_size_is_given():
    # 0.2 / 0.4, and 0.5 / 0.8, 0.3 / 0.8
    actual = token_logprobs_of(BigramModel(), ANSWERS, num_tokens=2).exp()
    torch.testing.assert_close(actual, torch.tensor([[0.5, 0.5], [0.625, 0.375]]))


def test_temperature_and_entropy_are_of_the_same_distribution():
    # at temperature 1/2 probabilities are squared: 0.04 0.04, and 0.25 0.09 of 0.34
    logprobs, entropy = predictions_of(BigramModel(), ANSWERS, num_tokens=2, temperature=0.5)
    first, second = 0.25 / 0.34, 0.09 / 0.34
    torch.testing.assert_close(logprobs.exp(), torch.tensor([[0.5, 0.5], [first, second]]))
    biased = -first * math.log(first) - second * math.log(second)
    torch.testing.assert_close(entropy, torch.tensor([[math.log(2)] * 2, [biased] * 2]))
    alone, nothing = predictions_of(BigramModel(), ANSWERS, num_tokens=2, temperature=0.5, with_entropy=False)
    assert nothing is None
    assert torch.equal(alone, logprobs)


def test_logits_are_computed_where_labels_are_predicted_only_or_at_every_position():
    model = BigramModel()
    few = logits_of(model, ANSWERS)
    assert few.shape == (2, 2, 3)
    assert model.options["logits_to_keep"].tolist() == [1, 2]
    assert torch.equal(logits_of(model, ANSWERS, every_position=True), few)
    assert "logits_to_keep" not in model.options


def test_text_is_predicted_to_its_last_token():
    # P(1|0) P(1|1) P(0|1), and P(0|2) P(0|0) P(1|0)
    batch = collate_text(TOKENS.numpy())
    actual = token_logprobs_of(BigramModel(), batch, every_position=True).exp()
    torch.testing.assert_close(actual, torch.tensor([[0.3, 0.2, 0.2], [0.1, 0.5, 0.3]]))


@pytest.mark.parametrize("given", [(), ("attention_mask",), ("attention_mask", "position_ids")])
def test_a_model_is_given_only_the_masks_and_positions_that_a_batch_has(given):
    """Not every model takes positions, and those of a model's own making need no argument."""
    model = BigramModel()
    batch = TokenBatch.of(TOKENS, torch.ones(2, 2).bool(), **dict.fromkeys(given, TOKENS + 5))
    token_logprobs_of(model, batch)
    assert {name for name in model.options if name != "logits_to_keep"} == {*given, "use_cache"}
    assert model.options["use_cache"] is False
    assert all(torch.equal(model.options[name], TOKENS + 5) for name in given)


def test_a_value_is_of_the_row_before_its_label():
    assert values_of(echo, ANSWERS).tolist() == [[1, 1], [0, 0]]


@pytest.mark.parametrize(
    ("mask", "scores"),
    [
        (None, [0, 1]),
        ([[1, 1, 1, 0], [1, 0, 0, 0]], [1, 2]),
        ([[0, 1, 1, 0], [0, 0, 0, 1]], [1, 1]),
    ],
)
def test_a_score_is_the_output_at_the_last_token_wherever_the_padding_is(mask, scores):
    mask = None if mask is None else torch.tensor(mask)
    batch = TokenBatch.of(TOKENS, torch.ones(2, 2).bool(), attention_mask=mask)
    assert scores_of(echo, batch).tolist() == scores


LIBRARY = [*(ROOT / "dschat").rglob("*.py"), *ROOT.glob("step*/*.py")]
STARTS = ("first", "first_label", "prompt_length", "start")
"""Names of columns; the one before them is where they are predicted."""


def is_shift(node: ast.AST) -> bool:
    """Whether an expression moves columns by one."""
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Tuple):
        columns = [part for part in node.slice.elts[1:] if isinstance(part, ast.Slice)]
        starts = [ast.unparse(part.lower) for part in columns if part.lower]
        ends = [ast.unparse(part.upper) for part in columns if part.upper]
        return "1" in starts or "-1" in ends or any(text.endswith("- 1") for text in starts + ends)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Sub):
        name = ast.unparse(node.left).split(".")[-1]
        return ast.unparse(node.right) == "1" and name in STARTS
    return isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("roll", "narrow")


def shifts(path: Path) -> list[str]:
    """Where a file moves columns by one: file, function, expression."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return [
        f"{path.name} {function.name}: {ast.unparse(node)}"
        for function in functions
        for node in ast.walk(function)
        if is_shift(node)
    ]


def test_labels_are_shifted_by_one_in_one_function():
    found = [shift for path in LIBRARY for shift in shifts(path)]
    assert found, "the search finds nothing at all"
    assert not [shift for shift in found if not shift.startswith("token_batch.py of: ")]


@pytest.mark.parametrize(
    "line",
    ["x[:, 1:]", "x[:, :-1]", "x[:, n - 1 : -1]", "x[..., 1:, :]", "x.roll(1, 1)", "b.prompt_length - 1"],
)
def test_a_shift_would_be_found(line, tmp_path):
    (tmp_path / "new.py").write_text(f"def f():\n    return {line}\n")
    assert shifts(tmp_path / "new.py")


def test_models_are_called_in_one_file():
    """Arguments that only a call of a model has, and an output that only it gives, are found nowhere else.

    Sampling calls models itself, in the files that are named here, and so does the planner, without numbers.
    """
    decoding = ("static_decoding.py", "slice_decoding.py", "traced_pass.py", "graphed_pass.py")
    sampling = (*decoding, "decode_modes.py", "hybrid.py")
    for path in LIBRARY:
        if path.name in ("forward.py", "reward_model.py", *sampling) or path.parent.name == "planning":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            keywords = {one.arg for one in getattr(node, "keywords", [])}
            assert not keywords & {"logits_to_keep", "return_values"}, f"{path}:{node.lineno}"
            assert getattr(node, "attr", "") != "logits", f"{path}:{node.lineno}"


PACKS_NOT = ("bloom", "falcon_alibi")
"""They make their biases from a mask of two dimensions."""


def sequences(vocab_size: int) -> TokenBatch:
    """Seven sequences, padded on the right, whose first two tokens are prompts."""
    lengths = torch.tensor([5, 40, 17, 60, 3, 1, 33])
    columns = torch.arange(60)
    ids = torch.randint(vocab_size, (7, 60), generator=torch.Generator().manual_seed(0))
    is_token = columns < lengths[:, None]
    return TokenBatch.of(ids, (is_token & (columns > 1))[:, 2:], attention_mask=is_token.long())


@pytest.mark.parametrize("family", FAMILIES)
def test_labels_have_the_same_probability_in_every_layout_of_the_rows(family):
    config = tiny_config(family, 60)
    set_attention(config, "auto")
    model = AutoModelForCausalLM.from_config(config).eval()
    batch = sequences(50)
    layouts = [RowLayout(), RowLayout(32)]
    if family not in PACKS_NOT:
        layouts += [RowLayout(32, "mask"), RowLayout(8, "mask", in_one_row=True)]
    expected, expected_entropy = predictions_of(model, batch, num_tokens=50, temperature=0.7)
    for layout in layouts:
        logprobs, entropy = predictions_of(model, batch.placed(layout), num_tokens=50, temperature=0.7)
        counts = batch.label_mask
        torch.testing.assert_close(logprobs[counts], expected[counts], atol=1e-5, rtol=0)
        torch.testing.assert_close(entropy[counts], expected_entropy[counts], atol=1e-5, rtol=0)


def test_our_own_attention_is_told_the_lengths_of_one_row_and_others_a_mask():
    batch, shapes = sequences(60).placed(RowLayout(8, "mask", in_one_row=True)), []
    for attention in ("auto", "sdpa"):
        config = tiny_config("opt", 60)
        set_attention(config, attention)
        model = AutoModelForCausalLM.from_config(config)
        shapes.append(tuple(model_inputs(model, batch)["attention_mask"].shape))
    assert shapes == [(1, 1, 1, 8), (1, 1, 160, 160)]  # seven sequences, and the padding behind them


def test_the_head_reads_the_outputs_that_are_needed_alone():
    model = AutoModelForCausalLM.from_config(tiny_config("llama", 60)).eval()
    batch = sequences(60).placed(RowLayout(8))
    rows = []
    model.lm_head.register_forward_hook(lambda head, inputs, output: rows.append(output.shape))
    num_labels = int(batch.label_mask.sum())
    assert logits_of(model, batch).shape == (num_labels, 60)
    assert rows == [(1, -(-num_labels // 8) * 8, 60)]
    assert not model.lm_head._forward_pre_hooks  # other callers get all logits


@pytest.mark.parametrize(
    "layout",
    [RowLayout(), RowLayout(32), RowLayout(32, "mask"), RowLayout(32, "mask", in_one_row=True)],
)
def test_values_and_scores_are_the_same_in_every_layout_of_the_rows(layout):
    config = tiny_config("opt", 60)
    set_attention(config, "auto")
    model = RewardModel(AutoModel.from_config(config), torch.nn.Linear(32, 1, bias=False), config).eval()
    plain = sequences(60)
    placed = plain.placed(layout)
    torch.testing.assert_close(scores_of(model, placed), scores_of(model, plain), atol=1e-6, rtol=0)
    values, expected = (values_of(model, batch)[plain.label_mask] for batch in (placed, plain))
    torch.testing.assert_close(values, expected, atol=1e-6, rtol=0)


class HostReads(TorchDispatchMode):
    """Keeps where the value of a tensor is asked for, which on a GPU waits for all that was started."""

    def __init__(self) -> None:
        super().__init__()
        self.stacks = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.stacks.append("".join(traceback.format_stack()))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_a_pass_waits_for_the_device_only_where_transformers_makes_the_mask_of_padded_rows(family):
    model = AutoModelForCausalLM.from_config(tiny_config(family, 80))
    ids, mask = torch.randint(2, 80, (2, 12)), torch.ones(2, 12, dtype=torch.long)
    mask[1, :4] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    masks = ({}, {"attention_mask": mask, "position_ids": positions})
    for options in masks:
        batch = TokenBatch.of(ids, torch.ones(2, 6).bool(), **options)
        with HostReads() as reads:
            logprobs, entropy = predictions_of(model, batch)
            (logprobs.sum() + entropy.sum()).backward()
        # OPT draws layers to drop on the host, before transformers 5.23 also where none is dropped.
        waits = [stack for stack in reads.stacks if "self.layerdrop" not in stack]
        assert all("masking_utils.py" in stack for stack in waits)
        assert len(waits) <= 2
