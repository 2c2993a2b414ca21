"""The house rules of docs/architecture.md that a program can check."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts import house

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = ("step1_sft", "step2_reward", "step3_ppo", "scripts", "benchmarks")
LAYERS = [
    rooms.split()
    for rooms in re.search(
        r"^Layers: `(.*)`$", (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"), re.MULTILINE
    )[1].split("` < `")
]
"""The rooms of dschat/, folders and modules, from the bottom up, as the documentation has them."""
LAYER_OF = {room: layer for layer, rooms in enumerate(LAYERS) for room in rooms}
DEEPSPEED_USERS = ("distributed", "engines", "checkpoints", "models")
LONGEST_FUNCTION = 80


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(ROOT / "dschat").parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


LIBRARY = [path for path in sources("dschat") if path.parent != ROOT / "dschat" or path.name != "__init__.py"]


def test_every_room_has_a_layer():
    assert sorted(LAYER_OF) == sorted({room(path) for path in LIBRARY})


def test_no_modules_import_each_other_in_a_circle():
    assert house.circles(house.House(ROOT)) == []


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down_only(path):
    mine = LAYER_OF[room(path)]
    for name in imports(path):
        assert name.split(".")[0] not in PROGRAMS, f"the library imports the program {name}"
        if name.startswith("dschat."):
            theirs = LAYER_OF[name.split(".")[1]]
            assert theirs <= mine, f"layer {mine} imports {name} of layer {theirs}"


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: str(path.relative_to(ROOT)))
def test_deepspeed_is_imported_in_its_own_rooms_only(path):
    if room(path) not in DEEPSPEED_USERS:
        assert not [name for name in imports(path) if name.split(".")[0] == "deepspeed"]


def test_the_re_exports_hold_no_code():
    for path in sources("dschat/utils"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            is_all = isinstance(node, ast.Assign) and node.targets[0].id == "__all__"
            assert isinstance(node, ast.Import | ast.ImportFrom | ast.Expr) or is_all, path


@pytest.mark.parametrize("path", sources("dschat", *PROGRAMS), ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_fit_a_screen_and_public_ones_are_annotated(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.FunctionDef):
            continue
        length = node.end_lineno - node.lineno + 1
        assert length <= LONGEST_FUNCTION, f"{node.name} has {length} lines"
        if not node.name.startswith("_") or node.name == "__init__":
            parameters = [*node.args.args, *node.args.kwonlyargs]
            bare = [a.arg for a in parameters if a.annotation is None and a.arg not in ("self", "cls")]
            assert not bare, f"{node.name}: {bare} without annotation"
            assert node.returns is not None, f"{node.name} does not say what it returns"


def test_losses_know_no_model_rank_or_engine():
    for name in ("losses.py", "models/softmax.py"):
        assert {module.split(".")[0] for module in imports(ROOT / "dschat" / name)} <= {"torch", "typing"}


@pytest.mark.parametrize("path", sources("dschat", *PROGRAMS), ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_depends_on_the_built_in_hash(path):
    """It differs between versions of Python, and for text between processes."""
    calls = [
        node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)
    ]
    assert not [call for call in calls if getattr(call.func, "id", "") == "hash"]


def test_flags_are_declared_without_torch():
    for path in [*sources("dschat/arguments"), ROOT / "dschat" / "errors.py"]:
        assert not [n for n in imports(path) if n.startswith(("torch", "deepspeed"))], path


@pytest.mark.slow
def test_flags_are_declared_in_one_folder_and_taken_from_its_front():
    for path in sources("dschat", *PROGRAMS, "tests"):
        if path.parent not in (ROOT / "dschat" / "arguments", ROOT / "tests" / "arguments"):
            assert not [name for name in imports(path) if name.startswith("dschat.arguments.")], path


@pytest.mark.parametrize(
    "path", sources("step1_sft", "step2_reward", "step3_ppo"), ids=lambda p: f"{p.parent.name}/{p.name}"
)
def test_a_program_is_a_short_table_of_contents(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_files_that_the_documentation_names_exist(page):
    named = re.findall(r"`((?:[\w.]+/)+[\w]+\.(?:py|sh))`", page.read_text(encoding="utf-8"))
    places = (ROOT, ROOT / "dschat")
    assert [name for name in named if not any((place / name).is_file() for place in places)] == []


@pytest.mark.parametrize("page", ["follow_a_pair.md", "follow_a_prompt.md"])
def test_a_way_through_the_house_is_eight_files_long(page):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    assert len(re.findall(r"^\d\. \*\*`[\w/]+\.py`\*\*", text, re.MULTILINE)) == 8
