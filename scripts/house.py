"""The house in figures: what its rules bound, and where the code stands.

    python scripts/house.py [CHECKOUT]

Prints one line per figure with its bound. Exit code 1 where a bound is missed. docs/architecture.md says why.
"""

from __future__ import annotations

import ast
import difflib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TypeVar

PROGRAMS = ("step1_sft/main.py", "step2_reward/main.py", "step2_reward/dpo.py", "step3_ppo/main.py")
WHOLE_ARGUMENTS = re.compile(r"\b(Sft|Reward|Dpo|Rlhf|Step|Supervised)Arguments\b")
SHIFT = re.compile(r"\[:, 1:\]|\[:, :-1\]|\[\.\.\., 1:\]|\[\.\.\., :-1\]|prompt_length - 1\b|first - 1\b")
"""How a tensor is shifted by one against its labels."""
DEEPSPEED_PRIVATE = re.compile(
    r"\._(config|global_grad_norm|copy_recovery_script)\b|\bds_(tensor|numel|shape|id)\b|overflow_checker"
    r"|__compatible_ops__|averaged_gradients|loss_scale_config|raise_error_at_min_scale"
)
Node = TypeVar("Node", bound=ast.AST)
SHORT = 15
"""Lines of a module that needs no test module of its own."""


@dataclass(frozen=True)
class Figure:
    """A measured number, its bound, and where it is found."""

    name: str
    value: float
    bound: float
    where: str = ""

    @property
    def holds(self) -> bool:
        """Whether the bound is kept."""
        return self.value <= self.bound

    def __str__(self) -> str:
        where = f"  ({self.where})" if self.where else ""
        mark = "ok " if self.holds else "BAD"
        return f"{mark} {self.name}: {self.value:g}, at most {self.bound:g}{where}"


class House:
    """The library of a checkout and its programs, parsed."""

    def __init__(self, root: Path) -> None:
        self.root, self.library = root, root / "dschat"
        self.texts = {path: path.read_text(encoding="utf-8") for path in sorted(self.library.rglob("*.py"))}
        self.trees = {path: ast.parse(text) for path, text in self.texts.items()}

    def room(self, path: Path) -> str:
        """The folder, or the module, right below dschat/."""
        return path.relative_to(self.library).parts[0].removesuffix(".py")

    def nodes(self, kind: type[Node]) -> Iterator[tuple[Path, Node]]:
        """Every node of this kind, with its file."""
        for path, tree in self.trees.items():
            yield from ((path, node) for node in ast.walk(tree) if isinstance(node, kind))

    def matches(self, pattern: re.Pattern, *, outside: str = "") -> list[str]:
        """Files with the number of matches in their code; comments and docstrings do not count."""
        found = []
        for path, tree in self.trees.items():
            name = str(path.relative_to(self.library))
            number = sum(len(pattern.findall(line)) for line in code_lines(self.texts[path], tree))
            if number and not (outside and name.startswith(outside)):
                found.append(f"{name} {number}")
        return found


def code_lines(text: str, tree: ast.AST) -> list[str]:
    """The lines of a module without comments and without strings that stand alone."""
    lines = text.splitlines()
    for node in ast.walk(tree):
        match node:
            case ast.Expr(value=ast.Constant(value=str())):
                for number in range(node.lineno - 1, node.end_lineno or node.lineno):
                    lines[number] = ""
    return [line.partition("  # ")[0] for line in lines if not line.lstrip().startswith("#")]


def longest(house: House, kind: type[ast.ClassDef] | type[ast.FunctionDef]) -> tuple[int, str]:
    """Lines of the longest class or function, and which it is."""
    spans = [
        ((node.end_lineno or 0) - node.lineno + 1, f"{node.name} in {path.relative_to(house.root)}")
        for path, node in house.nodes(kind)
    ]
    return max(spans)


def functions_with_whole_arguments(house: House) -> list[str]:
    """Functions one parameter of which is annotated as a step's whole arguments object."""
    found = []
    for path, node in house.nodes(ast.FunctionDef):
        parameters = [*node.args.args, *node.args.kwonlyargs]
        notes = [ast.unparse(parameter.annotation) for parameter in parameters if parameter.annotation]
        if any(WHOLE_ARGUMENTS.search(note) for note in notes):
            found.append(f"{path.relative_to(house.library)}:{node.name}")
    return found


def circles(house: House) -> list[str]:
    """Modules that import themselves over others, imports inside functions among them."""
    names = {
        path: ".".join(("dschat", *path.relative_to(house.library).with_suffix("").parts))
        for path in house.texts
    }
    known = set(names.values())
    imported: dict[str, set[str]] = {}
    for path, tree in house.trees.items():
        found = imported.setdefault(names[path], set())
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        found &= known

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        todo = [start]
        while todo:
            new = imported[todo.pop()] - seen
            seen |= new
            todo += new
        return seen

    return sorted(name for name in known if name in reached(name))


def unmirrored(house: House) -> list[str]:
    """Modules without a test module in the same place below tests/; short ones need none."""
    wanted = [
        path.relative_to(house.library)
        for path, text in house.texts.items()
        if not path.name.startswith("__") and house.room(path) != "utils" and len(text.splitlines()) > SHORT
    ]
    tests = house.root / "tests"
    return [str(p) for p in wanted if not (tests / p.parent / f"test_{p.name}").is_file()]


def shared_share(house: House) -> tuple[float, str]:
    """The largest share of lines that two of the steps' programs have in common, in one order."""
    texts = {
        name: [line for line in (house.root / name).read_text(encoding="utf-8").splitlines() if line.strip()]
        for name in PROGRAMS
    }

    def share(first: str, second: str) -> float:
        blocks = difflib.SequenceMatcher(None, texts[first], texts[second], autojunk=False)
        return sum(block.size for block in blocks.get_matching_blocks()) / min(
            len(texts[first]), len(texts[second])
        )

    return max((share(*pair), " and ".join(pair)) for pair in combinations(PROGRAMS, 2))


def rank_calls(house: House) -> list[str]:
    """Calls of rank() and world_size() outside of distributed/."""
    return [
        str(path.relative_to(house.library))
        for path, node in house.nodes(ast.Call)
        if house.room(path) != "distributed"
        and getattr(node.func, "id", getattr(node.func, "attr", "")) in ("rank", "world_size")
    ]


def figures(root: Path) -> list[Figure]:
    """All figures of a checkout."""
    house = House(root)
    lines = {path: len(text.splitlines()) for path, text in house.texts.items()}
    loose = [p.name for p in house.library.glob("*.py") if not p.name.startswith("__")]
    module = max(lines, key=lambda path: lines[path])
    missing = unmirrored(house)
    share, programs = shared_share(house)
    found: list[tuple[str, float, list[str]]] = [
        ("loose modules in dschat/", 4, loose),
        ("functions that take a step's whole arguments", 10, functions_with_whole_arguments(house)),
        ("files that shift tensors against their labels", 1, house.matches(SHIFT)),
        ("rank() and world_size() outside distributed/", 0, rank_calls(house)),
        ("files that touch private names of DeepSpeed", 1, house.matches(DEEPSPEED_PRIVATE)),
        ("modules in a circle of imports", 0, circles(house)),
        ("modules without a test module of their own", 0, missing),
    ]
    longest_function, function = longest(house, ast.FunctionDef)
    longest_class, name = longest(house, ast.ClassDef)
    return [
        Figure("lines of the library", sum(lines.values()), 36_211),
        Figure("lines of the longest module", lines[module], 400, str(module.relative_to(root))),
        Figure("lines of the longest function", longest_function, 67, function),
        Figure("lines of the longest class", longest_class, 200, name),
        Figure("share of lines that two steps' programs have in common", round(share, 3), 0.25, programs),
        *(Figure(title, len(places), bound, ", ".join(places)) for title, bound, places in found),
    ]


def main(argv: list[str]) -> int:
    """Print them."""
    found = figures(Path(argv[0] if argv else ".").resolve())
    print(*found, sep="\n")
    return int(not all(figure.holds for figure in found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
