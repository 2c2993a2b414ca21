"""Whether sequences may share rows in a model, tried on its layers."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import FAMILIES, tiny_config
from transformers import Llama4TextConfig

from dschat.arguments import parse_arguments
from dschat.data.packing import RowLayout
from dschat.models import packing_trial
from dschat.models.attention import set_attention
from dschat.models.packing_trial import PackingTrial, choose_row_layout, packed_layout
from dschat.runs.measured_choices import MeasuredChoices

CPU = torch.device("cpu")
PACKED = RowLayout(32, "mask")
PACKS_NOT = ("bloom", "falcon_alibi")
"""They make their biases from a mask of two dimensions."""
OTHERS_ATTENTION = (*PACKS_NOT, "falcon", "gptj")
"""Theirs is code of their own."""


def config_of(family: str):
    config = tiny_config(family, 300, bos_token_id=290, eos_token_id=290, pad_token_id=291)
    config.initializer_range = 0.02  # what models are trained from
    return config


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_mask_separates_sequences_in_all_families_but_those_of_alibi(family, dtype):
    trial = PackingTrial.of(config_of(family), dtype, CPU)
    assert trial.separates(PACKED) == (family not in PACKS_NOT)


@pytest.mark.parametrize("family", FAMILIES)
def test_our_own_attention_takes_all_sequences_in_one_row(family):
    config = config_of(family)
    set_attention(config, "auto")
    layout = packed_layout(RowLayout(32), {"model": config}, longest=8)
    assert layout == RowLayout(32, "mask", in_one_row=family not in OTHERS_ATTENTION)
    trial = PackingTrial.of(config, torch.float32, CPU)
    assert trial.separates(layout) == (family not in PACKS_NOT)


@pytest.mark.parametrize(("family", "is_separated"), [("llama", True), ("gpt2", True), ("opt", False)])
def test_positions_that_begin_anew_separate_them_in_some(family, is_separated):
    trial = PackingTrial.of(config_of(family), torch.float32, CPU)
    assert trial.separates(RowLayout(1, "positions", in_one_row=True)) == is_separated


def chosen(family: str, *flags: str, choices: MeasuredChoices | None = None, longest: int = 9) -> RowLayout:
    return choose_row_layout(
        parse_arguments("sft", ["--model_name_or_path=m", *flags]).widths,
        {"model": config_of(family)},
        choices or MeasuredChoices(measures=False),
        dtype="fp32",
        device=CPU,
        limit=512,
        lengths=[np.array([9, 5, 3])],
        longest=longest,
    )


def test_the_flag_decides(caplog):
    assert chosen("opt", "--packing=on") == RowLayout(32, "mask", limit=512)
    assert chosen("opt", "--packing=off") == RowLayout(32, limit=512)
    assert chosen("opt", "--packing=on", "--pad_to_multiple_of=1").multiple_of == 1


def test_a_model_that_mixes_sequences_is_padded_and_the_log_says_so(capsys):
    assert chosen("bloom", "--packing=on") == RowLayout(32, limit=512)
    assert "packing: padding (a bloom model, the model, mixes sequences" in capsys.readouterr().out


@pytest.mark.parametrize("faster", ["padding", "packing"])
def test_auto_takes_the_faster_way_and_a_resumed_run_the_same(faster, monkeypatch, tmp_path):
    waits = {"padding": PACKED.separated_by, "packing": None}[faster]

    def train(batches, layout):
        if layout.separated_by == waits:
            torch.randn(500, 500) @ torch.randn(500, 500)

    monkeypatch.setattr(PackingTrial, "train", staticmethod(train))
    choices = MeasuredChoices(folder=tmp_path)
    layout = chosen("opt", choices=choices)
    assert (layout.separated_by is not None) == (faster == "packing")
    monkeypatch.setattr(PackingTrial, "train", staticmethod(pytest.fail))
    assert chosen("opt", choices=MeasuredChoices(choices.made, folder=tmp_path / "new")) == layout


def test_deterministic_runs_are_padded():
    assert chosen("opt").separated_by is None


def test_flash_attention_takes_all_sequences_in_one_row():
    config = config_of("llama")
    config._attn_implementation = "flash_attention_2"
    layout = packed_layout(RowLayout(16), {"actor": config, "critic": config}, longest=100)
    assert layout == RowLayout(16, "positions", in_one_row=True)
    assert packed_layout(
        RowLayout(16), {"actor": config, "critic": config_of("opt")}, longest=100
    ) == replace(layout, separated_by="mask", in_one_row=False)


def test_a_mask_in_place_of_the_models_own_is_not_given_where_that_has_a_window():
    for config in (config_of("mistral"), Llama4TextConfig(attention_chunk_size=256)):
        layouts = [packed_layout(RowLayout(), {"model": config}, longest=n) for n in (256, 257)]
        assert [layout.separated_by for layout in layouts] == ["mask", "positions"]


def test_the_longest_row_of_the_run_decides_it_and_not_those_that_are_tried():
    layouts = [chosen("mistral", "--packing=on", longest=n) for n in (256, 257)]
    assert [layout.separated_by for layout in layouts] == ["mask", "positions"]


def test_a_trial_passes_forward_and_backward(monkeypatch):
    trial = PackingTrial.of(config_of("llama"), torch.float32, CPU)
    seen = []
    trial.model.norm.register_full_backward_hook(lambda norm, into, out: seen.append(out[0].shape))
    trial.train([packing_trial.batch_of(np.array([200, 20]))], PACKED)
    trial.train([packing_trial.batch_of(np.array([200, 20]))], RowLayout(32))
    assert [shape[:2] for shape in seen] == [(1, 224), (2, 224)]
    assert all(parameter.grad is None for parameter in trial.model.parameters())
