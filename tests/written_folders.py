"""Folders of data, for tests: files and saved data sets of one row for each name, read back."""

import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from dschat.data.findings import Findings
from dschat.data.reading import Format, read_comparisons
from dschat.data.sources import open_source


def write(folder, *names):
    """A file of one row for each name, whose prompt is the name."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".parquet"):
            pq.write_table(pa.Table.from_pylist([{"prompt": name, "completion": "a"}]), path)
        else:
            path.write_text(json.dumps({"prompt": name, "completion": "a"}) + "\n")
    return str(folder)


def saved(folder, names):
    splits = {
        name.removesuffix(".jsonl"): datasets.Dataset.from_list([{"prompt": name, "completion": "a"}])
        for name in names
    }
    datasets.DatasetDict(splits).save_to_disk(str(folder))
    return str(folder)


def read(entry, flag="--data_path"):
    """The prompts to train on and to evaluate on, and what else there is."""
    source = open_source(entry, flag, evaluates=flag == "--eval_data_path")
    parts = [
        [row.prompt for row in read_comparisons(source, rows, Format(), Findings())] if rows else []
        for rows in (source.training, source.evaluation)
    ]
    return *parts, source.unused
