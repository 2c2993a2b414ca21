"""PPO's invariants in every layout of rows, with every back end, on one rank and two, for every family.

test_ppo_on_ranks.py and test_ppo_options_on_ranks.py have the ZeRO stages and PPO's options, for one family.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from figures import timeless
from processes import ROOT, python
from tiny import FAMILIES, save_reward_model, save_tiny_model
from transformers import GenerationConfig

WORKER = ROOT / "tests" / "workers" / "ppo_matrix.py"
RUNS = {"one rank": (1, 0), "two ranks": (2, 0), "two ranks, ZeRO 3": (2, 3)}


def attention(name: str) -> dict[str, Any]:
    return {f"{model}_attn_implementation": name for model in ("actor", "critic")}


LAYOUTS = {
    "padded": {"packing": "off", "pad_to_multiple_of": 1},
    "round": {"packing": "off", "pad_to_multiple_of": 16},
    "one row": {"packing": "on"},
    "under a mask": {"packing": "on", **attention("sdpa")},
}
PADDED, PACKED = ({**LAYOUTS[layout], "rollout_backend": "static"} for layout in ("padded", "one row"))
BACKENDS = ("hf", "static", "continuous")
MODES = ("matmul", "sdpa", "model")
"""Of static decoding, beside the recorded one, which is taken where nothing is measured."""
ADAPTERS = {"actor_lora_dim": 4, "critic_lora_dim": 4, "only_optimize_lora": True}
OWN_ATTENTION = ("gptj", "bloom", "falcon", "falcon_alibi")
"""They keep the attention of their own, which knows no pages."""
ALIBI = ("bloom", "falcon_alibi")
"""Their biases are made from a mask of two dimensions: no row is shared, and decoding has one mode."""

WHOLE, ADAPTED = "padded, hf", "adapters, padded"
"""The cases that those of models that are trained whole, and of adapters, are compared with."""
TOLERANCE = 1e-5
"""Of metrics, and of what models say of tokens: fp32."""
OF_FORMULAS = ("raw_advantages", "returns", "sum of rewards", "advantages", "beyond the answers")

Cases = dict[str, dict[str, Any]]


def cases_of(family: str, run: str) -> Cases:
    """Flags of step 3, and maybe a mode of decoding, by the names of the cases."""
    ranks, stage = RUNS[run]
    cases = {
        f"{layout}, {name}": {"flags": {**widths, "rollout_backend": name}}
        for layout, widths in LAYOUTS.items()
        for name in BACKENDS
        if family not in OWN_ATTENTION or (name != "continuous" and layout != "under a mask")
    }
    if stage:
        return {name: case for name, case in cases.items() if name.startswith("one row")}
    one = {"per_device_training_batch_size": 1, "gradient_accumulation_steps": 4 // ranks}
    cases |= {
        "micro-batches of one": {"flags": {**PACKED, **one}},
        "both first passes kept": {"flags": {**PACKED, "reuse_first_pass": "both"}},
        "adapters, padded": {"flags": {**PADDED, **ADAPTERS}},
        "adapters, one row": {"flags": {**PACKED, **ADAPTERS}},
    }
    if family not in OWN_ATTENTION:
        cases["eager attention"] = {"flags": {**PADDED, **attention("eager")}}
    modes = [] if family in ALIBI else [mode for mode in MODES if (family, mode) != ("gptj", "sdpa")]
    return cases | {f"static, {mode}": {"flags": PACKED, "mode": f"static, {mode}"} for mode in modes}


def save_models(folder: Path, family: str) -> None:
    """An actor whose answers have many lengths, and a reward model."""
    save_tiny_model(folder / "actor", family)
    save_tiny_model(folder / "base", family, seed=1)
    save_reward_model(folder / "base", folder / "reward")
    settings = GenerationConfig.from_pretrained(folder / "actor")
    settings.eos_token_id = [0, *range(20, 60)]
    settings.save_pretrained(folder / "actor")


def seen(run: str, cases: Cases, folder: Path) -> Cases:
    """What the worker saw of the cases."""
    ranks, stage = RUNS[run]
    given, output = folder / f"cases of {run}.json", folder / f"{run}.json"
    given.write_text(json.dumps(cases))
    python(WORKER, folder, output, stage, given, ranks=ranks, timeout=1800)
    return json.loads(output.read_text())


def faults(found: dict[str, Any], reference: dict[str, Any]) -> Iterator[str]:
    """What is wrong with what was seen of a case, beside another case on one rank."""
    if not found["greedy"]:
        yield "a pass over greedy answers finds other tokens"
    for number, (step, expected) in enumerate(zip(found["steps"], reference["steps"], strict=True)):
        metrics, wanted = timeless(step["metrics"]), timeless(expected["metrics"])
        if step["answers"] != expected["answers"]:
            yield f"step {number}: other answers"
        if metrics["first_minibatch_ratio_error"] != 0:
            yield f"step {number}: the first ratio is {metrics['first_minibatch_ratio_error']} from 1"
        if (metrics["kl"] == metrics["k3"] == 0) != (number == 0):
            yield f"step {number}: KL {metrics['kl']}, k3 {metrics['k3']}"
        for metric, value in wanted.items():
            if metrics[metric] != pytest.approx(value, rel=TOLERANCE, abs=TOLERANCE):
                yield f"step {number}: {metric} is {metrics[metric]}, not {value}"
        for what, apart in step["apart"].items():
            if not apart <= (1e-6 if what in OF_FORMULAS else TOLERANCE):
                yield f"step {number}: {what} is {apart} from plain code's"


def misnomers(family: str, case: dict[str, Any], found: dict[str, Any]) -> Iterator[str]:
    """Where a case was not what its flags say."""
    flags, layout, (backend, mode) = case["flags"], found["layout"], found["backend"]
    is_packed = flags["packing"] == "on" and family not in ALIBI
    if layout["separated_by"] != ("mask" if is_packed else None):
        yield f"laid out as {layout}"
    own = is_packed and flags.get("actor_attn_implementation") is None
    if family not in OWN_ATTENTION and layout["in_one_row"] != own:
        yield f"laid out as {layout}"
    usual = "model" if family in ALIBI else "traced"
    if flags["rollout_backend"] == "static" and f"static, {mode}" != case.get("mode", f"static, {usual}"):
        yield f"decoded as {mode}"
    names = {"hf": "generate()", "static": "static decoding", "continuous": "continuous batching"}
    if backend != names[flags["rollout_backend"]]:
        yield f"answered by {backend}"


def check(family: str, cases: dict[str, Cases], folder: Path) -> None:
    """Run the cases of each number of ranks and compare them all with those on one rank."""
    save_models(folder, family)
    found = {run: seen(run, of_run, folder) for run, of_run in cases.items()}
    wrong = []
    for run, of_run in cases.items():
        for name, case in of_run.items():
            reference = found["one rank"][ADAPTED if name.startswith("adapters") else WHOLE]
            problems = [*faults(found[run][name], reference), *misnomers(family, case, found[run][name])]
            wrong += [f"{run}, {name}: {problem}" for problem in problems]
    assert wrong == []
    steps = [step for of_run in found.values() for of_case in of_run.values() for step in of_case["steps"]]
    lengths = {sum(token >= 0 for token in answer) for step in steps for answer in step["answers"]}
    assert len(lengths) > 3, "answers are of many lengths"
    apart = {what: max(step["apart"][what] for step in steps) for what in steps[0]["apart"]}
    numbers = ", ".join(f"{what} {number:.1e}" for what, number in apart.items())
    print(f"{family}: at most from plain code's: {numbers}")  # with pytest -rP


@pytest.mark.matrix
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("family", FAMILIES)
def test_no_layout_no_back_end_and_no_rank_changes_a_number(family, tmp_path):
    check(family, {run: cases_of(family, run) for run in RUNS}, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_neither_packing_nor_a_back_end_changes_a_number(family, tmp_path):
    """A few of the cases of the matrix."""
    cases = cases_of(family, "one rank")
    names = (WHOLE, *(f"one row, {name}" for name in BACKENDS))
    check(family, {"one rank": {name: cases[name] for name in names}}, tmp_path)
