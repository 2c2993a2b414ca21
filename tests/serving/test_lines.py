import json
import os
import threading

import pytest

from dschat.errors import UserError
from dschat.serving.lines import append_line, last_line


def test_lines_of_many_threads_are_all_there_and_whole(tmp_path):
    path = tmp_path / "votes.jsonl"
    threads = [
        threading.Thread(target=append_line, args=(path, {"n": n, "text": "tea\n" * 500})) for n in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(json.loads(line)["n"] for line in path.read_text().splitlines()) == list(range(20))


def test_a_part_of_a_line_that_a_crash_left_is_cut_off(tmp_path, capsys):
    path = tmp_path / "votes.jsonl"
    path.write_text('{"n": 1}\n{"n": 2, "te')
    append_line(path, {"n": 3})
    assert path.read_text() == '{"n": 1}\n{"n": 3}\n'
    assert "ended in a part of a line, 12 bytes, which is cut off" in capsys.readouterr().out


def test_a_whole_line_without_its_end_stays(tmp_path):
    path = tmp_path / "votes.jsonl"
    path.write_text('{"n": 1}')
    append_line(path, {"n": 2})
    assert path.read_text() == '{"n": 1}\n{"n": 2}\n'
    assert last_line(path) == {"n": 2}


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "votes.jsonl"
    append_line(path, {"n": 1})
    real = os.write

    def write(descriptor, data):
        if len(data) < 10:
            raise OSError(28, "No space left on device")
        return real(descriptor, data[:10])

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(OSError, match="No space left"):
        append_line(path, {"n": 2, "a": 1})
    assert path.read_text() == '{"n": 1}\n'


@pytest.mark.parametrize("text", [None, "", "tea\n"])
def test_a_file_without_a_line_of_json_is_named(tmp_path, text):
    path = tmp_path / "talk.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=r"talk\.jsonl has no last line of JSON"):
        last_line(path)
