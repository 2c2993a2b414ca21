import pyarrow as pa

from dschat.data.comparisons import Comparison, write_comparisons


def test_text_survives_the_file_and_equal_prompts_have_equal_keys(tmp_path):
    rows = [
        (Comparison("Grüße 😀?", " ja", " nein"), 0, False),
        (Comparison("What?", " x\u2028y", " z\n"), 1, True),
        (Comparison("Grüße 😀?", " a", " b"), 1, False),
    ]
    index = write_comparisons(rows, tmp_path / "rows.arrow")
    table = pa.ipc.open_stream(tmp_path / "rows.arrow").read_all()
    assert table.to_pylist() == [vars(comparison) for comparison, _, _ in rows]
    assert index.keys[0] == index.keys[2] != index.keys[1]
    assert index.sources.tolist() == [0, 1, 1]
    assert index.in_evaluation.tolist() == [False, True, False]


def test_nothing_is_written_as_an_empty_table(tmp_path):
    index = write_comparisons([], tmp_path / "rows.arrow")
    assert pa.ipc.open_stream(tmp_path / "rows.arrow").read_all().num_rows == 0
    assert len(index.keys) == len(index.sources) == len(index.in_evaluation) == 0


def test_more_rows_than_are_written_at_once_keep_their_order(tmp_path):
    rows = ((Comparison(str(i), "a", "b"), 0, False) for i in range(2500))
    index = write_comparisons(rows, tmp_path / "rows.arrow")
    table = pa.ipc.open_stream(tmp_path / "rows.arrow").read_all()
    assert table["prompt"].to_pylist() == [str(i) for i in range(2500)]
    assert len(set(index.keys.tolist())) == 2500
