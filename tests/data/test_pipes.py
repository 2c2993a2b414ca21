import bz2
import gzip
import json
import lzma
import os
import subprocess
import sys
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dschat.data.findings import Findings
from dschat.data.reading import Format, read_comparisons
from dschat.data.sources import open_source
from dschat.errors import UserError

ROWS = [{"prompt": f"Q {n}", "completion": "é"} for n in range(3)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def zstd(content):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as file:
        file.write(content)
    return sink.getvalue().to_pybytes()


def parquet():
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(ROWS), sink)
    return sink.getvalue().to_pybytes()


CONTENTS = {
    "lines": LINES,
    "a list": json.dumps(ROWS, indent=1).encode(),
    "csv": "prompt,completion\nQ 0,é\nQ 1,é\nQ 2,é\n".encode(),
    "tsv": "prompt\tcompletion\nQ 0\té\nQ 1\té\nQ 2\té\n".encode(),
    "gzip": gzip.compress(LINES),
    "bzip2": bz2.compress(LINES),
    "xz": lzma.compress(LINES),
    "Zstandard": zstd(LINES),
    "parquet": parquet(),
}
PACKED = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "Zstandard"}


def prompts(source):
    return [row.prompt for row in read_comparisons(source, source.training, Format(), Findings())]


@pytest.mark.parametrize("suffix", PACKED)
@pytest.mark.parametrize("kind", [".jsonl", ".json"])
def test_packed_files_are_read_by_their_suffix(tmp_path, suffix, kind):
    path = tmp_path / f"x{kind}{suffix}"
    path.write_bytes(CONTENTS[PACKED[suffix]])
    assert prompts(open_source(str(path))) == ["Q 0", "Q 1", "Q 2"]


@pytest.mark.parametrize("suffix", PACKED)
@pytest.mark.parametrize("damage", ["cut", "other"])
def test_a_damaged_packed_file_is_named(tmp_path, suffix, damage):
    path = tmp_path / f"x.jsonl{suffix}"
    path.write_bytes(CONTENTS[PACKED[suffix]][:-6] if damage == "cut" else b"no archive at all")
    with pytest.raises(UserError, match=rf"x\.jsonl{suffix}: the {PACKED[suffix]} file is damaged"):
        prompts(open_source(str(path)))


def fifo(tmp_path, content, name="pipe"):
    path = tmp_path / name
    os.mkfifo(path)
    threading.Thread(target=path.write_bytes, args=(content,), daemon=True).start()
    return str(path)


@pytest.mark.parametrize("content", CONTENTS)
def test_a_pipe_is_read_once_whatever_it_holds_and_said_so(tmp_path, content, capsys):
    entry = f"{fifo(tmp_path, CONTENTS[content])}:0.5"
    source = open_source(entry)
    told = f"note: --data_path {tmp_path}/pipe is a pipe and was read once ("
    assert capsys.readouterr().out.startswith(told)
    assert [prompts(source), prompts(source)] == [["Q 0", "Q 1", "Q 2"]] * 2
    again = open_source(entry, "--eval_data_path")  # from what was read
    assert (again.fingerprint, again.weight) == (source.fingerprint, 0.5)
    assert capsys.readouterr().out == ""


def test_a_row_of_a_pipe_is_named_by_the_pipe(tmp_path):
    with pytest.raises(UserError, match=rf"{tmp_path}/pipe:4: not a JSON object"):
        prompts(open_source(fifo(tmp_path, LINES + b"{oops\n")))


def test_the_suffix_of_a_named_pipe_counts(tmp_path):
    assert prompts(open_source(fifo(tmp_path, CONTENTS["tsv"], "x.tsv"))) == ["Q 0", "Q 1", "Q 2"]


def test_a_pipe_cannot_be_read_by_several_ranks(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="a pipe can be read by one process only, and this run has 2; write"):
        open_source(str(tmp_path / "pipe"))


def test_an_empty_pipe_is_named_for_it_may_have_been_read_before():
    with pytest.raises(UserError, match=r"--data_path /dev/null: the pipe is empty\. It can be read once"):
        open_source("/dev/null")


@pytest.mark.slow
def test_what_a_shell_puts_in_place_of_a_command_is_read(tmp_path):
    program = (
        "import sys; from dschat.data.sources import open_source\n"
        "print([row['prompt'] for _, row in open_source(sys.argv[1]).training()])"
    )
    (tmp_path / "x.jsonl.gz").write_bytes(CONTENTS["gzip"])
    command = f'{sys.executable} -c "$PROGRAM" <(zcat {tmp_path}/x.jsonl.gz)'
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PROGRAM": program, "PYTHONPATH": str(root)}
    run = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "['Q 0', 'Q 1', 'Q 2']"
    assert "note: --data_path /dev/fd/" in run.stdout


def test_a_file_without_a_suffix_is_told_by_its_first_bytes(tmp_path):
    for name, content in CONTENTS.items():
        (tmp_path / name).write_bytes(content)
        assert prompts(open_source(str(tmp_path / name))) == ["Q 0", "Q 1", "Q 2"], name
