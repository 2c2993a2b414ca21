"""Pipelines against one process: the same losses, exports and resumed runs, through the steps' programs."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from figures import timeless_lines
from processes import ROOT, python
from safetensors.torch import load_file

sys.path.insert(0, str(ROOT / "tests" / "workers"))
from pipelines import CASES, RESUMED, save_models

WORKER = ROOT / "tests" / "workers" / "pipelines.py"
ORDINARY = ("sft_qwen3_1", "reward_lora", "dpo_llama_0")
"""Cases of the ordinary suite: tied and untied weights, ZeRO 0 and 1, adapters, a resumed run."""


NO_TENSOR_RANKS = ("gpt2", "bloom", "mixtral", "falcon", "falcon_alibi", "qwen3_moe", "gemma")
"""Families that tensor parallelism refuses; this Gemma has one key-value head."""


def outputs(folder: Path, *cases: str, grids: Sequence[tuple[int, int, int]]) -> list[tuple[Path, Path]]:
    """The cases run by one process and on grids of so many ranks, stages and tensor ranks: their folders."""
    save_models(folder, list(cases))
    python(WORKER, folder, 1, 1, *cases, timeout=3600)
    for ranks, stages, tensor in grids:
        for first in range(0, len(cases), 8):  # each engine's groups, and their threads, last as its process
            python(WORKER, folder, stages, tensor, *cases[first : first + 8], ranks=ranks, timeout=3600)
    return [(folder / "1_1_1" / case, folder / f"{n}_{p}_{t}" / case) for n, p, t in grids for case in cases]


def check(alone: Path, pipelined: Path) -> None:
    """Equal losses, norms, evaluations and weights, and a resumed run that is the same to the bit."""
    case, is_half = alone.name, alone.name.startswith("bf16")
    tolerance = 2e-2 if is_half else 1e-5
    for mine, theirs in zip(timeless_lines(pipelined), timeless_lines(alone), strict=True):
        assert mine == pytest.approx(theirs, rel=tolerance, abs=tolerance), case
    weights, expected = (load_file(folder / "model.safetensors") for folder in (pipelined, alone))
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-2 if is_half else 1e-6)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (pipelined, alone)]
    assert configs[0] == configs[1], case
    assert sorted(p.name for p in pipelined.iterdir()) == sorted(p.name for p in alone.iterdir()), case
    resumed = pipelined.with_name(f"{case}_resumed")
    if case in RESUMED:
        assert timeless_lines(resumed) == timeless_lines(pipelined), case
        again = load_file(resumed / "model.safetensors")
        assert all(torch.equal(again[name], weight) for name, weight in weights.items()), case


def test_two_stages_learn_save_resume_and_export_what_one_process_does(tmp_path):
    """The resumed case also with tensor ranks inside the stages."""
    for alone, pipelined in outputs(tmp_path, *ORDINARY, grids=[(2, 2, 1)]):
        check(alone, pipelined)
    python(WORKER, tmp_path, 2, 2, ORDINARY[0], ranks=4)
    check(tmp_path / "1_1_1" / ORDINARY[0], tmp_path / "4_2_2" / ORDINARY[0])


@pytest.mark.matrix
@pytest.mark.parametrize("grid", [(2, 2, 1), (4, 2, 1), (4, 2, 2), (8, 2, 2)])
def test_every_case_is_the_same_in_pipelines_with_and_without_ranks_of_data_and_tensor_ranks(tmp_path, grid):
    cases = [case for case in CASES if case != "dropout"]  # ranks draw other masks than one process
    if grid[0] == 8:
        cases = ["sft_llama_1", "reward_opt_1", "dpo_qwen3_1"]
    elif grid[2] > 1:
        cases = [case for case in cases if CASES[case][1] not in NO_TENSOR_RANKS]
    for alone, pipelined in outputs(tmp_path, *cases, grids=[grid]):
        check(alone, pipelined)
