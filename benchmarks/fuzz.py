"""Inputs of every kind that a person or the hub may give, most of them broken: each is taken or refused.

python benchmarks/fuzz.py --inputs 100000 --output fuzz.json

makes data files, chat templates, manifests, adapter files, model folders and command lines out of sound
ones, and gives each to the code that reads it. An input may be accepted, or refused by a `UserError` of one
readable line, which for data names the file. Anything else, and whatever takes longer than --limit seconds,
counts as a crash. The same --seed makes the same inputs; --only TARGET:NUMBER runs one again, with its
traceback.
"""

import argparse
import contextlib
import gc
import gzip
import io
import json
import os
import random
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts"), str(ROOT / "tests")]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--inputs", type=int, default=100_000, help="Of all targets together (default 100000)."
    )
    parser.add_argument("--seed", type=int, default=1, help="Decides the inputs (default 1).")
    parser.add_argument(
        "--limit", type=float, default=60, help="Seconds, by the clock, that an input may take (default 60)."
    )
    parser.add_argument("--targets", nargs="+", help="Only these, by their names in the table; default: all.")
    parser.add_argument("--only", metavar="TARGET:NUMBER", help="Run this input alone, with its traceback.")
    parser.add_argument("--output", type=Path, metavar="FILE", help="Also write the figures as JSON.")
    return parser.parse_args(argv)


if __name__ == "__main__":
    parse()  # before pyarrow and torch are imported, so that --help and a mistyped flag answer at once

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from dschat.arguments import STEPS, DataArguments, ModelArguments, parse_arguments
from dschat.console.text import printable
from dschat.data.comparisons import write_comparisons
from dschat.data.findings import Findings
from dschat.data.known_sets import KNOWN_SETS
from dschat.data.layouts import LAYOUTS
from dschat.data.reading import Format, read_comparisons
from dschat.data.sources import open_source
from dschat.errors import UserError

LONGEST_MESSAGE = 2000
LARGEST = 8 << 30
"""Bytes of address space; an input that needs more ends in a MemoryError."""
WARM_UP = 0.2
"""Share of a target's inputs before its memory is read for the first time."""
PYTHON_IN_A_MESSAGE = re.compile(r"<class '\w*(Error|Exception)|\w(Error|Exception)\(|Traceback")

QUESTION = "\n\nHuman: Name a tea.\n\nAssistant:"
SAID = [{"role": "user", "content": "Name a tea."}, {"role": "assistant", "content": "Assam."}]
TOLD = [{"from": "human", "value": "Name a tea."}, {"from": "gpt", "value": "Assam."}]
ROWS: dict[str, dict[str, Any]] = {
    "preference": {"prompt": QUESTION, "chosen": " Assam.", "rejected": " No.", "margin": 1.5},
    "sharegpt_preference": {"conversations": TOLD[:1], "chosen": TOLD[1], "rejected": TOLD[1], "system": "B"},
    "alpaca_preference": {
        "instruction": "Name a tea.",
        "input": "Black.",
        "chosen": "Assam.",
        "rejected": "No.",
    },
    "question_preference": {"question": "Name a tea.", "system": "B", "chosen": "Assam.", "rejected": "No."},
    "ranked": {"prompt": "Name a tea.", "answers": ["Assam.", "No."], "scores": [1, 0.5]},
    "tokens": {
        "chosen_input_ids": [5, 6, 7, 2],
        "rejected_input_ids": [5, 6, 8, 2],
        "chosen_loss_mask": [0, 0, 1, 1],
        "rejected_loss_mask": [0, 0, 1, 1],
    },
    "hh": {"chosen": QUESTION + " Assam.", "rejected": QUESTION + " No."},
    "two_answers": {"prompt": "Name a tea.", "answer_a": "Assam.", "answer_b": "No.", "winner": "a"},
    "messages": {"messages": SAID},
    "sharegpt": {"conversations": TOLD, "system": "Be brief."},
    "alpaca": {"instruction": "Name a tea.", "output": "Assam.", "history": [["Hi", "Yes?"]]},
    "instruction_response": {"instruction": "Name a tea.", "context": "Black.", "response": "Assam."},
    "question_answer": {"question": "Name a tea.", "answer": "Assam."},
    "prompt_completion": {"prompt": SAID[:1], "completion": SAID[1:]},
    "prompt_response": {"prompt": "Name a tea.", "response": "Assam."},
    "prompt_only": {"prompt": "Name a tea."},
    "openai/webgpt_comparisons": {
        "question": {"full_text": "Name a tea."},
        **{"answer_0": "Assam [1].", "answer_1": "No.", "score_0": 0.5, "score_1": -0.5},
    },
    "stanfordnlp/SHP": {"history": "Name a tea.", "human_ref_A": "Assam.", "human_ref_B": "No.", "labels": 1},
    "pvduy/sharegpt_alpaca_oa_vicuna_format": {"prompt": "USER: Name a tea. ASSISTANT:", "label": "Assam."},
    "Cohere/miracl-zh-queries-22-12": {
        "query": "Name a tea.",
        "positive_passages": [{"text": "Assam."}],
        "negative_passages": [{"text": "No."}],
    },
    "mkqa-Japanese": {"queries": {"ja": "Name a tea."}, "answers": {"ja": [{"text": "Assam."}]}},
    "local/jsonfile": {"prompt": "Name a tea.", "chosen": "Assam.", "rejected": None},
}
ODD_TEXTS = [
    *("", " ", "\n", "\x00", "\x1b[31mred", "\u202eback", "\ud800", "a\udcffb", "\x85\u2028", "😀", "0"),
    "none",
    *("x" * 5000, "\n\nHuman:", "\n\nAssistant:", "\r\n\r\nHuman: a\r\n\r\nAssistant:", "{{ 1/0 }}"),
    *("../../etc/passwd", "/dev/null", "@LISTS@", "@LISTS@", "@OBJECTS@", "@OBJECTS@", "@DIGITS@"),
]
ODD_VALUES = (
    *(None, True, False, 0, -1, 1.5, 10**30, -(10**30), 10**400, 1e308, -0.0),
    *(float("nan"), float("inf"), -float("inf")),
    *([], {}, [[]], [{}], {"": ""}, [None], ["a"], {"role": "user"}),
    *ODD_TEXTS,
)
"""The marks stand for JSON that `json.dumps` cannot write; `as_json` puts it there."""
MARKS = {"LISTS": ("[", "]"), "OBJECTS": ('{"a":', "}"), "DIGITS": ("9", "")}
ODD_BYTES = [b"", b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", *(bytes([byte]) for byte in b'[]{},"\\\n\x0c')]
ODD_WORDS = (  # noqa: SIM905
    "0 1 -1 2 0.5 1e5 1e400 -1e400 nan NaN inf -inf infinity 1_000 ٣ true False no None none plain bf16 sft "
    "= -- - a,b 2,4,4 0,0,0 1,,1 é😀 ../.. / ~ ~nobody/x a:0.5 a:nan : A=b =b ' \" %s %(prog)s {} @x"
).split(" ")
ODD_WORDS += ["", " ", "9" * 30, "9" * 5000, "9" * 400 + ",1,1", "x" * 5000, "\x1b[31m", "a\nb", "\udcff"]


class Hang(BaseException):
    """An input took longer than the limit."""


# ---------------------------------------------------------------------------------------------- inputs


def as_json(chance: random.Random, value: Any) -> str:
    """JSON, with the marks of `ODD_VALUES` replaced by deep nesting and by a number of many digits."""

    def repeated(mark: re.Match) -> str:
        opening, closing = MARKS[mark[1]]
        depth = chance.choice((5, 100, 3000, 100_000, *(chance.randint(700, 1000) for _ in range(4))))
        return opening * depth + "1" + closing * depth

    return re.sub(f'"@({"|".join(MARKS)})@"', repeated, json.dumps(value))


def mutated(chance: random.Random, value: Any) -> Any:
    """The same value with one place of it changed, at any depth."""
    if isinstance(value, dict) and value and chance.random() < 0.85:
        key, changed = chance.choice(list(value)), dict(value)
        kind = chance.random()
        if kind < 0.15:
            del changed[key]
        elif kind < 0.25:
            changed[str(chance.choice(ODD_VALUES))] = changed.pop(key)
        elif kind < 0.35:
            changed[str(chance.choice(ODD_VALUES))] = chance.choice(ODD_VALUES)
        else:
            changed[key] = mutated(chance, value[key])
        return changed
    if isinstance(value, list) and value and chance.random() < 0.7:
        place, kind = chance.randrange(len(value)), chance.random()
        if kind < 0.2:
            return value[:place] + value[place + 1 :]
        if kind < 0.4:
            return value + [value[place]] * chance.choice((1, 2, 50))
        return value[:place] + [mutated(chance, value[place])] + value[place + 1 :]
    if isinstance(value, str) and value and chance.random() < 0.4:
        place = chance.randrange(len(value) + 1)
        inserted = chance.choice(ODD_TEXTS)
        return value[:place] + inserted + value[place + chance.choice((0, 0, 1, 5)) :]
    return chance.choice(ODD_VALUES)


def several_times(chance: random.Random, change: Callable[[Any], Any], value: Any, most: int = 3) -> Any:
    """`value` after 0 to `most` changes."""
    for _ in range(chance.randint(0, most)):
        value = change(value)
    return value


def changed_bytes(chance: random.Random, data: bytes) -> bytes:
    """One flip, cut, insertion or repetition."""
    place, kind = chance.randrange(len(data) + 1), chance.randrange(5)
    if kind == 0 and place < len(data):
        return data[:place] + bytes([data[place] ^ (1 << chance.randrange(8))]) + data[place + 1 :]
    if kind == 1:
        return data[:place]
    if kind == 2:
        return data[:place] + data[place + chance.randint(1, 20) :]
    if kind == 3:
        return data[:place] + data[place : place + 50] * 2 + data[place:]
    return data[:place] + chance.choice(ODD_BYTES) + data[place:]


def sound_rows(chance: random.Random, name: str) -> list[dict[str, Any]]:
    """Some rows of that layout or known set."""
    return [ROWS[name]] * chance.randint(1, 3)


def parquet(rows: list[Any]) -> bytes | None:
    """The rows as a Parquet file, None where Arrow finds no type for them."""
    buffer = io.BytesIO()
    try:
        pq.write_table(pa.Table.from_pylist(rows), buffer, compression="none")
    except (pa.ArrowException, TypeError, ValueError, OverflowError, AttributeError):
        return None
    return buffer.getvalue()


def data_file(chance: random.Random, folder: Path, rows: list[Any], change: Callable[[bytes], bytes]) -> Path:
    """Those rows as a file of a suffix drawn by chance, its bytes changed."""
    suffix = chance.choice((".jsonl", ".json", ".jsonl.gz", ".parquet"))
    data = parquet(rows) if suffix == ".parquet" else None
    if data is None:
        suffix = ".jsonl" if suffix == ".parquet" else suffix
        lines = [as_json(chance, row) for row in rows]
        if chance.random() < 0.1:
            lines = [line.replace("{", '{"prompt": "twice", ', 1) for line in lines]
        separator = chance.choice(("\n", "\n\n", "\r\n"))
        text = "[" + ",\n".join(lines) + "]" if suffix == ".json" else separator.join(lines) + separator
        data = text.encode()
        if suffix.endswith(".gz"):
            data = gzip.compress(data, 1)
    path = folder / f"rows{suffix}"
    path.write_bytes(change(data))
    return path


# ---------------------------------------------------------------------------------------------- targets

Target = Callable[[random.Random, Path], None]
TARGETS: dict[str, tuple[float, Target]] = {}
"""Of each target its share of the inputs, and what makes one input and reads it."""


def target(name: str, share: float) -> Callable[[Target], Target]:
    """Register the function below."""

    def register(function: Target) -> Target:
        TARGETS[name] = (share, function)
        return function

    return register


def read_all(entry: str, form: Format, folder: Path, row_named: bool) -> None:
    """Read an entry of --data_path into comparisons, and write those as step 1 to 3 do."""
    source = open_source(entry)
    found = read_comparisons(source, source.training, form, Findings())
    try:
        write_comparisons(((comparison, 0, False) for comparison in found), folder / "comparisons.arrow")
    except UserError as error:
        place = r"(:\d+|, row \d+): " if row_named else ""
        if not re.search(re.escape(Path(entry).name) + place, str(error)):
            raise AssertionError(f"the message does not name file and row: {error}") from error
        raise


@target("data: rows", 0.36)
def broken_rows(chance: random.Random, folder: Path) -> None:
    """Rows of every layout and of known sets with wrong values, in files that are sound."""
    name = chance.choice(list(ROWS))
    rows = [several_times(chance, lambda row: mutated(chance, row), row) for row in sound_rows(chance, name)]
    told = name in KNOWN_SETS or chance.random() < 0.3
    keys = (("prompt", chance.choice(("prompt", "question", "no"))),) if chance.random() < 0.1 else ()
    path = data_file(chance, folder, rows, lambda data: data)
    read_all(str(path), Format(name if told else None, keys), folder, row_named=True)


@target("data: bytes", 0.27)
def broken_bytes(chance: random.Random, folder: Path) -> None:
    """Files of sound rows with bytes flipped, cut, put in."""
    rows = sound_rows(chance, chance.choice(list(LAYOUTS)))
    path = data_file(
        chance, folder, rows, lambda data: several_times(chance, lambda d: changed_bytes(chance, d), data)
    )
    read_all(str(path), Format(), folder, row_named=False)


@target("data: entries", 0.02)
def odd_entries(chance: random.Random, folder: Path) -> None:
    """What stands behind --data_path and --data_format: names, weights, folders of files."""
    inside = folder / "entries"
    inside.mkdir(exist_ok=True)
    for path in inside.iterdir():
        path.unlink()
    for name in chance.sample(("train.jsonl", "test.json", "a.txt", "state.json", "dataset_dict.json"), 2):
        (inside / name).write_text(
            several_times(chance, lambda t: t[: chance.randint(0, len(t))], '[{"prompt": "a"}]', 1)
        )
    entry = chance.choice(
        (str(inside), str(inside), f"{inside}:{chance.choice(ODD_WORDS)}", chance.choice(ODD_WORDS))
    )
    if chance.random() < 0.2:
        entry = "/".join((entry, chance.choice(ODD_WORDS)))
    form = Format.of(
        DataArguments(data_format=chance.choice((None, "prompt_only", chance.choice(ODD_WORDS))))
    )
    source = open_source(entry)
    for _ in read_comparisons(source, source.training, form, Findings()):
        pass


FRAME = "{% for m in messages %}{{ m['role'] }}: {{ m.content }}\n{% endfor %}"
FRAME += "{% if add_generation_prompt %}assistant: {% endif %}"
TEMPLATE_PARTS = (
    r"""
{{ eos_token }}
{{ bos_token }}
{{ messages }}
{{ messages | tojson }}
{{ messages | length }}
{{ messages | sort }}
{{ messages[9] }}
{{ messages.append(1) }}
{{ nothing.x }}
{{ raise_exception('no') }}
{{ strftime_now('%Y') }}
{{ 1 / 0 }}
{{ 1 + 'a' }}
{{ [][0] }}
{{ {}['a'] }}
{{ '%s' % messages }}
{{ '%d' % 'a' }}
{{ 'a' ~ 1 }}
{{ 'a' | nothing }}
{{ 3 is nothing }}
{{ 9 | round(9**9) }}
{{ '\ud800' }}
{{ 'x' * 10**6 }}
{{ ''.__class__.__mro__ }}
{{ self.__init__.__globals__ }}
{{ cycler.__init__ }}
{{ '{0.__class__}'.format(1) }}
{{ dict(a=1).fromkeys([1]) }}
{{ lipsum(n=50) }}
{% for i in range(10**9) %}x{% endfor %}
{% for i in range(99999) %}xxxxxxxxxxxxxxxxxxxx{% endfor %}
{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}
{% set ns = namespace(x=1) %}{% set ns.x = 2 %}{{ ns.x }}
{% include 'x' %}
{% extends 'x' %}
{% import 'x' as y %}
{% generation %}a{% endgeneration %}
{% break %}
{% if %}
{{
}}
{%
%}
{# a #}
{#
""".strip().split("\n")
    + [
        "{{ " + "(" * 300 + "1" + ")" * 300 + " }}",
        "{{ 1" + " + 1" * 500 + " }}",
        "{% if 1 %}" * 30 + "{% endif %}" * 30,
        "{% for a in [1] %}" * 25 + "{% endfor %}" * 25,
        "\x00",
        "\ud800",
    ]
)
BOMBS = """
{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}
{{ 10 ** (10 ** 10) }}
{{ 'x' * 10 ** 11 }}
{% set x = namespace(s='x') %}{% for i in range(60) %}{% set x.s = x.s ~ x.s %}{% endfor %}
{{ '%99999999999d' % 1 }}
{{ '{:99999999999}'.format(1) }}
{{ 'a'.center(10 ** 11) }}
{{ lipsum(n=10**9) }}
""".strip().split("\n")
"""What would run for hours or take all memory. Each costs the seconds of the bound, so they come seldom."""


@target("chat templates", 0.03)
def templates(chance: random.Random, folder: Path) -> None:
    """Templates put together from parts that work, raise, loop, recurse and pry."""
    from dschat.data.template_trial import configure_template
    from dschat.data.templates import NAMED

    text = chance.choice((FRAME, FRAME, *NAMED.values(), ""))
    text = several_times(
        chance,
        lambda t: chance.choice((t + chance.choice(TEMPLATE_PARTS), chance.choice(TEMPLATE_PARTS) + t)),
        text,
        4,
    )
    if chance.random() < 0.3:
        text = several_times(
            chance, lambda t: changed_bytes(chance, t), text.encode(errors="replace"), 3
        ).decode(errors="replace")
    if BOMBS and chance.random() < 1 / 2000:
        text = chance.choice(BOMBS) + text
    serve(folder, text, configure_template)


def serve(folder: Path, text: str, settle: Callable[..., None]) -> None:
    """Settle on that template, and show it conversations as data has them."""
    from dschat.data.comparisons import Turn
    from dschat.data.templates import ChatTemplate

    path = folder / "template.jinja"
    path.write_bytes(text.encode(errors="surrogatepass"))
    tokenizer = the_tokenizer()
    settle(tokenizer, str(path))
    template = ChatTemplate(tokenizer)
    for prompt in (
        "Name a tea.",
        QUESTION,
        (Turn("system", "Be"), Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c")),
    ):
        template.texts(prompt, ("Assam.", " {{ 1/0 }} "))
        template.pieces(prompt, "Assam.")


KEPT: dict[str, Any] = {}
"""What is made once in a process."""


def the_tokenizer() -> Any:
    """A small tokenizer, its template to be replaced."""
    if "tokenizer" not in KEPT:
        from tiny import tiny_tokenizer

        KEPT["tokenizer"] = tiny_tokenizer()
    return KEPT["tokenizer"]


def model_folder(folder: Path) -> dict[str, bytes]:
    """The files of a small model as step 1 exports it, written once."""
    if "model" not in KEPT:
        from tiny import save_tiny_model

        from dschat.data.tokenizer_fingerprint import tokenizer_fingerprint
        from dschat.export.manifest import FORMAT, MANIFEST, Manifest, template_fingerprint, weight_checksums
        from dschat.models.tokenizer import load_tokenizer

        place = folder / "model"
        save_tiny_model(place)
        tokenizer = load_tokenizer(str(place))
        manifest = Manifest(
            step="sft",
            head="language_model",
            tokenizer=tokenizer_fingerprint(tokenizer, versioned=False),
            tokenizers_version="0",
            chat_template=template_fingerprint(tokenizer),
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            num_tokens=len(tokenizer),
            dtype="fp32",
            score_mean=0.5,
            score_std=1.5,
            files=weight_checksums(place),
            golden_inputs=[[1, 2, 3], [4, 5]],
            golden_outputs=[-1.5, -2.5],
        )
        (place / MANIFEST).write_text(json.dumps({"format": FORMAT, **asdict(manifest)}))
        KEPT["model"] = {path.name: path.read_bytes() for path in place.iterdir() if path.is_file()}
    return KEPT["model"]


def broken_json(chance: random.Random, data: bytes) -> bytes:
    """A JSON file with values or bytes changed."""
    value = several_times(chance, lambda v: mutated(chance, v), json.loads(data))
    text = as_json(chance, value).encode()
    return text if chance.random() < 0.7 else several_times(chance, lambda d: changed_bytes(chance, d), text)


@target("manifests", 0.1)
def manifests(chance: random.Random, folder: Path) -> None:
    """manifest.json, and what uses its values before a model is there."""
    from dschat.export.manifest import MANIFEST, Manifest, changed_files
    from dschat.export.upstream import UpstreamModel

    place = folder / "manifest"
    place.mkdir(exist_ok=True)
    (place / "model.safetensors").write_bytes(model_folder(folder)["model.safetensors"])
    (place / MANIFEST).write_bytes(broken_json(chance, model_folder(folder)[MANIFEST]))
    manifest = Manifest.read(place, "--model_name_or_path")
    changed = changed_files(manifest, place)
    if changed:
        raise UserError(f"--model_name_or_path {place}: {changed}.")
    UpstreamModel(str(place), "--model_name_or_path", manifest).score_statistics()


@target("model names", 0.005)
def model_names(chance: random.Random, folder: Path) -> None:
    """What stands behind --model_name_or_path and is no model."""
    from dschat.export.upstream import verify_model
    from dschat.models.tokenizer import load_tokenizer

    name = chance.choice(("", str(folder / "model" / ""), "owner/", "../")) + chance.choice(ODD_WORDS)
    if chance.random() < 0.5:
        load_tokenizer(name)
    verify_model(name, "--model_name_or_path", "language_model")


@target("model folders", 0.005)
def model_folders(chance: random.Random, folder: Path) -> None:
    """A model's folder of which one JSON file is broken: config, tokenizer, index of shards, manifest."""
    from dschat.export.upstream import verify_model

    files, place = model_folder(folder), folder / "model"
    for name, data in files.items():
        (place / name).write_bytes(data)
    index = place / "model.safetensors.index.json"
    index.unlink(missing_ok=True)
    name = chance.choice(sorted(name for name in files if name.endswith(".json")) + [index.name])
    data = files.get(name) or json.dumps({"weight_map": {"a": "model-1.safetensors"}}).encode()
    if name == index.name:
        (place / "model.safetensors").unlink()
    (place / name).write_bytes(broken_json(chance, data))
    heads = chance.choice(((), ("language_model",), ("score",)))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        verify_model(str(place), "--model_name_or_path", *heads)


LORA = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj"], "bias": "none",
        "peft_type": "LORA", "use_rslora": False, "init_lora_weights": True, "modules_to_save": None,
        "layers_to_transform": [0, 1], "layers_pattern": "layers", "task_type": "CAUSAL_LM"}  # fmt: skip


@target("adapter files", 0.08)
def adapter_files(chance: random.Random, folder: Path) -> None:
    """The file behind --lora_config, and for some of those taken a model that is to get the adapters."""
    from dschat.models.lora import check_adapters
    from dschat.models.lora_file import read_lora_file

    model_folder(folder)
    path = folder / "lora.json"
    path.write_bytes(broken_json(chance, json.dumps(LORA).encode()))
    args = ModelArguments(model_name_or_path=str(folder / "adapted"), lora_config=str(path))
    read_lora_file(args)
    if chance.random() < 0.1:
        if not (folder / "adapted").is_dir():
            (folder / "adapted").mkdir()
            (folder / "adapted" / "config.json").write_bytes(model_folder(folder)["config.json"])
        check_adapters(language=args)


def flag_names(step: str) -> list[str]:
    """The flags of that step."""
    return [
        part.metadata["prefix"] + f.name
        for part in fields(STEPS[step])
        for f in fields(part.metadata["group"])
        if "help" in f.metadata
    ]


def odd_flags(chance: random.Random, names: list[str], sound: list[str]) -> list[str]:
    """A command line of flags and values in any order and number."""
    argv = list(sound) if chance.random() < 0.9 else []
    for _ in range(chance.randint(0, 4)):
        name = "--" + chance.choice(names)
        kind = chance.random()
        if kind < 0.08:
            name = name[: chance.randint(1, len(name))]
        elif kind < 0.12:
            name = name.replace("_", "-") if "_" in name else name.replace("-", "_", 2)
        values = [chance.choice(ODD_WORDS) for _ in range(chance.choice((0, 1, 1, 1, 1, 2)))]
        argv += [f"{name}={values[0]}"] if values and chance.random() < 0.2 else [name, *values]
    if chance.random() < 0.05:
        argv.insert(chance.randint(0, len(argv)), chance.choice(ODD_WORDS))
    return argv


@target("arguments", 0.08)
def arguments(chance: random.Random, folder: Path) -> None:
    """The command lines of the three steps, of DPO and of inspect_data.py."""
    step = chance.choice(list(STEPS))
    models = (
        ("actor_model_name_or_path", "critic_model_name_or_path")
        if step == "rlhf"
        else ("model_name_or_path",)
    )
    argv = odd_flags(chance, flag_names(step), [word for name in models for word in (f"--{name}", "model")])
    with contextlib.redirect_stdout(io.StringIO()):
        parsed = parse_arguments(step, argv)
    for value in numbers_in(asdict(parsed)):
        assert abs(value) < 2**63, f"{argv}: {value} was accepted"
    data = parsed.data
    assert 0 < sum(data.shares) < float("inf"), f"{argv}: {data.shares} was accepted"


def numbers_in(value: Any) -> Iterator[float]:
    """Every number in an object of settings."""
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from numbers_in(inner)
    elif isinstance(value, int | float):
        yield value


@target("programs' arguments", 0.05)
def program_arguments(chance: random.Random, folder: Path) -> None:
    """The command lines of e2e_rlhf.py and compare.py."""
    import compare
    import e2e_rlhf

    if chance.random() < 0.5:
        names = "step actor-model reward-model actor-zero-stage output-dir data-path deployment-type num-gpus"
        names += " hostfile common-args sft-args reward-args ppo-args skip-finished"
        args = e2e_rlhf.parse(odd_flags(chance, names.split(), []))
        for step in args.step:
            e2e_rlhf.step_flags(args, step)
        assert args.num_gpus is None or args.num_gpus > 0, f"{args.num_gpus} was accepted"
        return
    names = (
        "model data-path prompt num-prompts num-shown max-answer-seq-len batch-size greedy temperature seed"
    )
    names += " reference demo-task output html top-p top-k reward-model reward-function judge judge-model"
    args = compare.parse(odd_flags(chance, names.split(), ["--model", "A=a", "--prompt", "Name a tea."]))
    assert 0 < args.temperature < float("inf"), f"{args.temperature} was accepted"
    for value in (args.seed, args.num_prompts, args.num_shown, args.batch_size):
        assert 0 <= value < 2**63, f"{value} was accepted: {args}"


# ---------------------------------------------------------------------------------------------- the run


def problem_with(message: str) -> str | None:
    """What is wrong with a line of a message for people, None where nothing is."""
    if not message.strip():
        return "it is empty"
    if len(message) > LONGEST_MESSAGE:
        return f"it has {len(message)} characters"
    if printable(message, keep="") != message:
        return "it holds line breaks or control characters"
    found = PYTHON_IN_A_MESSAGE.search(message)
    return f"it shows {found[0]!r}" if found else None


def attempt(run: Target, chance: random.Random, folder: Path) -> bool:
    """Whether the input was accepted. Raises what is a bug."""
    try:
        run(chance, folder)
    except UserError as error:
        for line in error.args:
            if problem := problem_with(line):
                raise AssertionError(f"the message cannot be read, {problem}: {line[:300]!r}") from error
        return False
    except SystemExit as end:  # --help
        if end.code:
            raise AssertionError(f"exit code {end.code}") from end
    return True


@dataclass
class Result:
    """What became of a target's inputs; memory in MB, after the warm-up and at the end."""

    inputs: int = 0
    accepted: int = 0
    refused: int = 0
    crashes: int = 0
    slowest_ms: float = 0.0
    memory_start_mb: float = 0.0
    memory_end_mb: float = 0.0
    seconds: float = 0.0
    examples: list[dict[str, str]] = field(default_factory=list)
    """Of crashes, the first of each kind."""


def fuzz(name: str, count: int, seed: int, folder: Path, limit: float) -> Result:
    """Run that many inputs of a target."""
    result, run, kinds = Result(inputs=count), TARGETS[name][1], Counter()
    start = time.perf_counter()
    for number in range(count):
        if number == int(count * WARM_UP):
            result.memory_start_mb = resident_mb()
        before = time.perf_counter()
        signal.setitimer(signal.ITIMER_REAL, limit)
        try:
            accepted = attempt(run, random.Random(f"{seed}/{name}/{number}"), folder)
            result.accepted += accepted
            result.refused += not accepted
        except (Exception, Hang) as error:
            result.crashes += 1
            where = traceback.extract_tb(error.__traceback__)[-1]
            kind = f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}"
            kinds[kind] += 1
            if kinds[kind] == 1 and len(result.examples) < 50:
                result.examples.append(
                    {"input": f"{name}:{number}", "kind": kind, "message": str(error)[:500]}
                )
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        result.slowest_ms = max(result.slowest_ms, 1000 * (time.perf_counter() - before))
    for example in result.examples:
        example["times"] = str(kinds[example["kind"]])
    result.memory_end_mb, result.seconds = resident_mb(), time.perf_counter() - start
    return result


def resident_mb() -> float:
    """This process's resident memory in MB, garbage collected and Arrow's spare memory given back."""
    gc.collect()
    pa.default_memory_pool().release_unused()
    return psutil.Process().memory_info().rss / 1e6


TITLES = ("target", "inputs", "accepted", "refused", "crashes", "slowest ms", "MB start", "MB end", "seconds")


def show(name: str, r: Result) -> None:
    """A line of the table, and below it the crashes."""
    print(
        f"{name:<20}{r.inputs:>9}{r.accepted:>10}{r.refused:>9}{r.crashes:>9}{r.slowest_ms:>12.0f}"
        f"{r.memory_start_mb:>10.0f}{r.memory_end_mb:>9.0f}{r.seconds:>9.0f}"
    )
    for example in r.examples:
        print(f"    {example['input']} ({example['times']} times): {example['kind']}: {example['message']}")
    sys.stdout.flush()


def _hung(*_: Any) -> None:
    raise Hang("over the limit")


def main() -> int:
    """Run, print the table; 1 where anything crashed."""
    args = parse()
    unknown = [name for name in args.targets or () if name not in TARGETS]
    if unknown:
        raise SystemExit(f"--targets {' '.join(unknown)}: there are {', '.join(TARGETS)}")
    resource.setrlimit(resource.RLIMIT_AS, (LARGEST, LARGEST))
    signal.signal(signal.SIGALRM, _hung)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.only:
            wanted, _, number = args.only.rpartition(":")
            accepted = attempt(TARGETS[wanted][1], random.Random(f"{args.seed}/{wanted}/{number}"), folder)
            print("accepted" if accepted else "refused")
            return 0
        results = {}
        chosen = {name: TARGETS[name][0] for name in args.targets or TARGETS}
        print("{:<20}{:>9}{:>10}{:>9}{:>9}{:>12}{:>10}{:>9}{:>9}".format(*TITLES), flush=True)
        for wanted, share in chosen.items():
            count = round(args.inputs * share / sum(chosen.values()))
            results[wanted] = fuzz(wanted, count, args.seed, folder, args.limit)
            show(wanted, results[wanted])
            if args.output:
                args.output.write_text(
                    json.dumps({k: asdict(r) for k, r in results.items()}, indent=2) + "\n"
                )
    return int(any(result.crashes for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
