"""Rows on disk: what `datasets` wrote comes back, and only the rows that are asked for are read."""

import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset

from dschat.data.rows import Rows, array_of

COLUMNS = {"input_ids": [[n] * (n % 4) for n in range(25)], "length": [n % 4 for n in range(25)]}


@pytest.fixture
def saved(tmp_path):
    """25 rows in two files of several record batches, as a selection of another data set."""
    more = Dataset.from_dict({name: [*values, values[0]] for name, values in COLUMNS.items()})
    more.select(range(25)).save_to_disk(str(tmp_path), num_shards=2)
    return tmp_path


def test_rows_are_those_that_datasets_saved(saved):
    rows = Rows.read(saved)
    assert rows.table.to_pydict() == COLUMNS
    assert len(rows) == 25
    assert rows.column("length").tolist() == rows.lengths("input_ids").tolist() == COLUMNS["length"]


@pytest.mark.parametrize("numbers", [[24, 3, 3, 0, 12, 13, -1, -25], []])
def test_rows_come_in_the_order_of_their_numbers(saved, numbers):
    table = Rows.read(saved).table
    batches = [batch for start in range(0, 25, 4) for batch in table.slice(start, 4).to_batches()]
    for rows in (Rows(table), Rows(pa.Table.from_batches(batches))):
        found = rows[np.array(numbers, dtype=np.int64)]
        assert found["input_ids"].to_pylist() == [COLUMNS["input_ids"][n] for n in numbers]
        assert found.column_names == list(COLUMNS)


def test_no_rows_have_columns(tmp_path):
    Dataset(pa.table(COLUMNS).slice(0, 0)).save_to_disk(str(tmp_path), num_shards=1)
    rows = Rows.read(tmp_path)
    assert len(rows) == 0
    assert rows.column("length").shape == rows.lengths("input_ids").shape == (0,)
    assert rows[np.arange(0)].num_rows == 0


@pytest.mark.parametrize("number", [25, -26])
def test_a_row_outside_is_an_error(number):
    with pytest.raises(IndexError, match=r"of 25 rows"):
        Rows.from_dict(COLUMNS)[np.array([0, number])]


def test_reading_needs_no_datasets_and_reads_few_pages(tmp_path):
    ids = [[7] * 100] * 20_000
    many = Dataset.from_dict({"input_ids": ids, "length": [100] * 20_000, "num_targets": [1] * 20_000})
    many = many.add_column("loss_mask", [[True] * 100] * 20_000)
    many.save_to_disk(str(tmp_path))
    script = (
        "import json, re, sys; import numpy as np; from pathlib import Path; import pyarrow.compute\n"
        "from dschat.data.rows import Rows\n"
        "status = Path('/proc/self/status')\n"
        "mib = lambda: int(re.search(r'RssFile:\\s+(\\d+)', status.read_text())[1]) / 1024\n"
        f"rows, before = Rows.read(Path({str(tmp_path)!r})), mib()\n"
        "rows[np.array([3, 19_000])]\n"
        "read = mib() - before\n"
        "assert rows.column('length').sum() == rows.lengths('input_ids').sum() == 2_000_000\n"
        "assert Rows(rows.table.slice(0, 0)).lengths('input_ids').shape == (0,)\n"
        "from dschat.data.collate import collate_sft\n"
        "collate_sft(rows[np.array([3, 19_000])], 3, 1.0, pad_id=0)\n"
        "print(json.dumps([read, sorted({'datasets', 'pandas'} & set(sys.modules))]))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    read, modules = json.loads(run.stdout)
    assert modules == []
    assert read < 2, "of 15 MiB"


def test_arrays_are_those_of_arrow():
    chunked = pa.chunked_array([[1.5, 2.5], [], [3.5]])
    for values in (
        chunked,
        chunked.slice(1),
        pa.array([], pa.int32()),
        pa.chunked_array([], pa.int64()),
        pa.chunked_array([], pa.bool_()),
        pa.array([True, False, True]).slice(1),
    ):
        array = array_of(values)
        assert array.tolist() == values.to_pylist()
        assert array.dtype == values.type.to_pandas_dtype()
