"""What a run settles before it reads anything."""

import json
import subprocess
import sys

import pytest
import torch
from processes import ROOT, python
from tiny import save_counting_pairs, save_tiny_model

from dschat.arguments import SftArguments, parse_arguments
from dschat.models.remote_code import loading_consent
from dschat.program import prepare


def arguments(*flags: str) -> SftArguments:
    return parse_arguments("sft", ["--model_name_or_path=m", "--data_path=d", "--dtype=fp32", *flags])


@pytest.fixture(autouse=True)
def as_before():
    yield
    torch.use_deterministic_algorithms(False)
    prepare(arguments())


def test_neither_foreign_code_nor_slow_algorithms_by_default():
    prepare(arguments())
    assert loading_consent() == {"trust_remote_code": False}
    assert not torch.are_deterministic_algorithms_enabled()


def test_deterministic_refuses_what_has_no_such_algorithm():
    prepare(arguments("--deterministic"))
    with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]), accumulate=False)


def test_foreign_code_runs_where_it_is_allowed():
    prepare(arguments("--trust_remote_code"))
    assert loading_consent() == {"trust_remote_code": True}


NEVER = {"peft", "scipy", "sklearn", "matplotlib", "tensorflow", "torchvision", "transformers.trainer_utils"}
"""What a run without adapters has no use for, each tenths of a second of its start."""
ONLY_TO_TOKENISE = {"datasets", "pandas"}
"""60 MiB that a run has no use for where its tokens are kept already."""
WATCHED = """
import atexit, gc, json, pathlib, runpy, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, str(pathlib.Path(sys.argv[0]).parents[1]))
import dschat.program
prepare, imported = dschat.program.prepare, []
def note(arguments):
    imported.extend(sorted(sys.modules))
    return prepare(arguments)
dschat.program.prepare = note
@atexit.register
def tell():
    collector = {"collects": gc.isenabled(), "frozen": gc.get_freeze_count()}
    print(json.dumps({"modules": sorted(sys.modules), "imported": imported, **collector}))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


LISTED = """
import json, sys
read = []
@sys.addaudithook
def note(event, values):
    if event == "open" and "transformers/models/" in str(values[0]) and str(values[0]).endswith(".py"):
        read.append(str(values[0]))
{imported}
import transformers.models
print(json.dumps([len(read), len(set(read)), sorted(dir(transformers.models))]))
"""


def test_transformers_reads_the_sources_of_its_models_once():
    program = f"from dschat.program import _imported; _imported({str(ROOT / 'step1_sft' / 'main.py')!r})"
    (ours, files, names), (without, _, all_names) = (
        json.loads(
            subprocess.check_output(
                [sys.executable, "-c", LISTED.replace("{imported}", imported)]
            ).splitlines()[-1]
        )
        for imported in (program, "")
    )
    assert files <= ours < files + 20 < without
    assert names == all_names


@pytest.mark.slow
def test_a_run_without_adapters_imports_only_what_it_uses(tmp_path):
    save_counting_pairs(tmp_path / "pairs.jsonl")
    save_tiny_model(tmp_path / "base")
    (tmp_path / "watched.py").write_text(WATCHED)
    flags = [f"--model_name_or_path={tmp_path / 'base'}", f"--data_path={tmp_path / 'pairs.jsonl'}"]
    result = python(
        tmp_path / "watched.py",
        ROOT / "step1_sft" / "main.py",
        *flags,
        "--dtype=fp32",
        cwd=tmp_path,
        afresh=True,
    )
    told = json.loads(result.stdout.splitlines()[-1])
    assert not NEVER & set(told["modules"])
    assert not ONLY_TO_TOKENISE & set(told["imported"])
    # 3,950 with torch 2.13, transformers 5.23 and DeepSpeed 0.19.8.
    assert len(told["modules"]) < 4300
    # What was imported is not looked through again, and what the run makes is collected as always.
    assert told["collects"]
    assert told["frozen"] > 100_000
