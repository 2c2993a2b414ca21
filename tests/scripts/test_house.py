"""The figures of scripts/house.py on small libraries made for them."""

from pathlib import Path

import pytest

from scripts import house

TAKES_ALL = "def f(args: 'RlhfArguments | None') -> None: ...\n"


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A library of one room in which every bound but that of loose modules is kept."""
    for name in house.PROGRAMS:
        program = tmp_path / name
        program.parent.mkdir(exist_ok=True)
        program.write_text("".join(f"{name} {number}\n" for number in range(8)))
    write(tmp_path, "room/small.py", "def f(x: int) -> int:\n    return x\n\n\nclass C:\n    pass\n")
    return tmp_path


def write(checkout: Path, name: str, text: str) -> None:
    path = checkout / "dschat" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def missed(checkout: Path) -> dict[str, str]:
    """Where the bounds that are not kept are missed."""
    return {figure.name: figure.where for figure in house.figures(checkout) if not figure.holds}


def test_a_small_library_keeps_every_bound(checkout):
    assert missed(checkout) == {}


@pytest.mark.parametrize(
    ("text", "name", "where"),
    [
        (TAKES_ALL * 11, "functions that take a step's whole arguments", "room/new.py:f"),
        ("n = mesh.rank()\n", "rank() and world_size() outside distributed/", "room/new.py"),
        ("def f():\n" + "    pass\n" * 67, "lines of the longest function", "f in dschat/room/new.py"),
        ("class D:\n" + "    x = 1\n" * 200, "lines of the longest class", "D in dschat/room/new.py"),
        ("x = 1\n" * 401, "lines of the longest module", "dschat/room/new.py"),
        ("x = 1\n" * 16, "modules without a test module of their own", "room/new.py"),
    ],
)  # fmt: skip
def test_each_bound_is_measured(checkout, text, name, where):
    write(checkout, "room/new.py", text)
    assert missed(checkout)[name].startswith(where)


def test_a_shift_counts_in_code_and_not_in_a_comment_or_docstring(checkout):
    write(checkout, "room/one.py", '"""logits[:, :-1]"""\n# logits[:, :-1]\na = logits[:, :-1]\n')
    assert missed(checkout) == {}
    write(checkout, "room/two.py", "b = ids[:, 1:]\n")
    assert missed(checkout) == {
        "files that shift tensors against their labels": "room/one.py 1, room/two.py 1"
    }


def test_a_circle_over_an_import_in_a_function_is_one(checkout):
    write(checkout, "room/a.py", "from dschat.room.b import f\n")
    write(checkout, "room/b.py", "def f():\n    from dschat.room import a\n    return a\n")
    assert missed(checkout) == {"modules in a circle of imports": "dschat.room.a, dschat.room.b"}


def test_lines_in_common_count_in_the_order_they_stand_in(checkout):
    first, second = (checkout / name for name in house.PROGRAMS[:2])
    second.write_text(first.read_text())
    name = "share of lines that two steps' programs have in common"
    assert missed(checkout)[name] == f"{house.PROGRAMS[0]} and {house.PROGRAMS[1]}"


@pytest.mark.slow
def test_this_house_keeps_its_bounds():
    assert missed(Path(__file__).resolve().parents[2]) == {}
