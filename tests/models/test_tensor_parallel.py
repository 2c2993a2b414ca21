"""Tensor parallelism: which models can be shared, and that shared layers learn what whole ones do."""

import json
import math
from itertools import product
from pathlib import Path

import pytest
import torch
from processes import ROOT, python
from safetensors.torch import load_file
from tensor_parallel import EPSILON, LEARNING_RATE, MAX_NORM, ROWS, STEPS, arguments, load, loss_of
from tiny import FAMILIES, save_tiny_model, tiny_tokenizer
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

from dschat.arguments import ModelArguments
from dschat.errors import UserError
from dschat.export.export import export_model
from dschat.models.lora import add_lora
from dschat.models.tensor_parallel import check_tensor_parallel
from dschat.models.tokenizer import load_tokenizer

WORKER = ROOT / "tests" / "workers" / "tensor_parallel.py"
SHARED = (
    "llama",
    "llama_mha",
    "opt",
    "opt_projected",
    "qwen2",
    "qwen3",
    "gpt_neox",
    "mistral",
    "phi",
    "gptj",
)
"""Families of tests/tiny.py that two ranks share."""


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        save_tiny_model(folder / family, family)
    return folder


def asked(path: Path, size: int) -> ModelArguments:
    return ModelArguments(model_name_or_path=str(path), prefix="actor_", tensor_parallel_size=size)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_cannot_be_shared_is_refused_by_its_configuration(models, family):
    path = models / family
    check_tensor_parallel(str(path), asked(path, 1))
    if family in SHARED:
        check_tensor_parallel(str(path), asked(path, 2))
        return
    with pytest.raises(UserError, match=r"--actor_tensor_parallel_size 2: .*(no plan|num_key_value_heads 1)"):
        check_tensor_parallel(str(path), asked(path, 2))


def test_heads_that_do_not_divide_are_refused_with_the_sizes_that_do(models):
    path = models / "llama"
    with pytest.raises(UserError, match=r"num_attention_heads 4, .* multiple of 3.*this model: 1, 2\."):
        check_tensor_parallel(str(path), asked(path, 3))


def trained_in_one_process(models: Path, folder: Path, case: str) -> dict[str, list[float]]:
    """What torch's own AdamW and clipping make of the whole model."""
    family, _, kind = case.split("-")
    args = arguments(models / family, 0, kind)
    model = load(models / family, kind, None)
    if args.uses_lora:
        add_lora(model, args)
    model.eval()
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, LEARNING_RATE, (0.9, 0.95), EPSILON, weight_decay=0)
    seen: dict[str, list[float]] = {"losses": [], "norms": []}
    for _ in range(STEPS):
        loss = loss_of(model, ROWS, kind)
        loss.backward()
        seen["norms"].append(torch.nn.utils.clip_grad_norm_(weights, MAX_NORM).item())
        seen["losses"].append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    export_model(model, load_tokenizer(str(models / family)), folder)
    return seen


def compare(models: Path, folder: Path, *cases: str, ranks: int) -> None:
    """Train on ranks, two to a model, and in one process; losses, norms and every exported weight agree."""
    python(WORKER, models, folder, *cases, ranks=ranks)
    seen = json.loads((folder / "seen.json").read_text())
    for case in cases:
        one = folder / "one" / case
        expected = trained_in_one_process(models, one, case)
        assert seen[case]["shared"] > 0
        assert seen[case]["apart"] == 0, case
        for name, values in expected.items():
            assert_close(seen[case][name], values, rtol=1e-5, atol=1e-6, msg=lambda m, c=case: f"{c}: {m}")
        files = [path.relative_to(one) for path in one.rglob("*.safetensors")]
        assert files
        for file in files:
            whole, shared = load_file(one / file), load_file(folder / case / file)
            assert whole.keys() == shared.keys()
            assert_close(shared, whole, rtol=0, atol=2e-6)


@pytest.mark.slow
def test_layers_that_two_ranks_share_learn_what_whole_ones_do(models, tmp_path):
    compare(models, tmp_path, "llama-3-lm", "qwen3-0-rmlora", "opt-2-lm", ranks=2)


@pytest.mark.matrix
@pytest.mark.parametrize("ranks", [2, 4])
def test_every_family_stage_and_kind(models, tmp_path, ranks):
    cases = product(SHARED, "0123", ("lm", "rm", "lmlora", "rmlora"))
    compare(models, tmp_path, *("-".join(case) for case in cases), ranks=ranks)


@pytest.mark.matrix
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_drop_alike_and_skip_the_same_steps_in_fp16(models, tmp_path, ranks):
    dropping = [f"{case}-{stage}-lmdropout" for case in ("opt", "gpt_neox", "qwen3") for stage in range(4)]
    halved = ["-".join(case) for case in product(("llama", "opt"), "0123", ("lmhalf", "rmhalf"))]
    python(WORKER, models, tmp_path, *dropping, *halved, ranks=ranks)
    seen = json.loads((tmp_path / "seen.json").read_text())
    for case, found in seen.items():
        assert found["apart"] == 0, case
        assert len(set(found["skipped"])) == 1, case
        assert found["skipped before"][1] == (case in halved), case
    for case in halved:
        family, _, kind = case.split("-")
        expected = trained_in_one_process(models, tmp_path / "one" / case, f"{family}-0-{kind[:2]}")
        # Later steps may be skipped too, where the first loss scales are too large.
        for name, values in expected.items():
            taken = [values[step - n] for step, n in enumerate(seen[case]["skipped before"])]
            found = [number for number in zip(seen[case][name], taken, strict=True) if number[0] < math.inf]
            for ours, theirs in found:
                assert ours == pytest.approx(theirs, rel=5e-3), (case, name)
    plain = [f"{case}-0-lm" for case in ("opt", "gpt_neox")]
    for case in plain:
        expected = trained_in_one_process(models, tmp_path / "one" / case, case)["losses"]
        assert abs(seen[f"{case}dropout"]["losses"][0] - expected[0]) > 1e-3


@pytest.mark.matrix
def test_a_machine_holds_one_copy_while_its_ranks_load_in_turn(tmp_path):
    """Beside the ranks' shares: the file that all map, and one rank's copy where its precision is another."""
    shape = {"hidden_size": 768, "num_hidden_layers": 8, "num_attention_heads": 8, "vocab_size": 16000}
    model = LlamaForCausalLM(LlamaConfig(**shape, intermediate_size=2048))
    save_tiny_model(tmp_path / "small")
    for name, dtype in (("fp32", torch.float32), ("fp16", torch.float16)):
        model.to(dtype).save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    whole, replicated = (
        sum(p.numel() for p in m.parameters()) / 2**20 for m in (model, model.get_input_embeddings())
    )
    precisions = (("fp32", "fp32"), ("fp16", "bf16"))
    cases = [f"{file}-{stage}-{run}" for file, run in precisions for stage in range(4)]
    worker, output = WORKER.with_name("loading_peaks.py"), tmp_path / "peaks.json"
    python(worker, tmp_path, output, *cases, ranks=4, timeout=3000)
    peaks = json.loads(output.read_text())
    print(f"{whole:.0f} million parameters on 4 ranks, MiB:", peaks)
    for case, found in peaks.items():
        size, copies = (4, 1) if case.startswith("fp32") else (2, 2)
        shares = whole - replicated + 4 * replicated
        assert whole * size * 0.95 < found["left"] <= found["peak"], case  # each weight is somewhere
        assert found["peak"] < (copies * whole + shares) * size * 1.2, case
