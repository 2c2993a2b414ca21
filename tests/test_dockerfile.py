"""The Dockerfile, read without a daemon: what it copies is there, what it installs is pinned."""

import fnmatch
import json
import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
LINES = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
STEPS = [tuple(line.split(maxsplit=1)) for line in LINES if line.strip() and not line.startswith("#")]
IGNORED = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def of(instruction: str) -> list[str]:
    """What stands behind each of these instructions."""
    return [rest for word, rest in STEPS if word == instruction]


def is_ignored(path: str) -> bool:
    """Whether the builder is not given this: a pattern is for the first folder, behind **/ for each."""
    parts = Path(path).parts
    return any(
        fnmatch.filter(parts if pattern.startswith("**/") else parts[:1], pattern.removeprefix("**/"))
        for pattern in IGNORED
    )


def test_every_file_that_it_copies_exists_and_reaches_the_builder():
    sources = [source for line in of("COPY") for source in line.split()[:-1]]
    assert {"requirements.txt", "."} <= set(sources)
    assert [source for source in sources if not (ROOT / source).exists() or is_ignored(source)] == []


def test_what_runs_and_tests_write_stays_out_of_the_image():
    written = (ROOT / ".gitignore").read_text(encoding="utf-8").split()
    assert [name for name in written if not is_ignored(name.strip("/"))] == []


def test_it_installs_the_pinned_versions_and_then_the_project_without_others():
    pip = [re.sub(r"^.*\.venv/bin/pip ", "", line) for line in of("RUN") if "pip install" in line]
    assert pip == [
        "install --no-cache-dir -r requirements.txt",
        "install --no-cache-dir --no-deps --no-build-isolation --editable .",
    ]
    lines = [line.partition("#")[0] for line in (ROOT / "requirements.txt").read_text().splitlines()]
    pins = {pin.name: pin for pin in map(Requirement, filter(str.strip, lines))}
    assert "setuptools" in pins  # which --no-build-isolation builds with
    asked = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]
    for range_ in map(Requirement, asked):
        (version,) = pins[range_.name].specifier
        assert version.operator == "=="
        assert version.version in range_.specifier, f"requirements.txt and pyproject.toml: {range_}"


def test_its_arguments_are_declared_where_they_are_used_and_its_command_exists():
    declared: set[str] = set()
    for word, rest in STEPS:
        used = set(re.findall(r"\$\{?(\w+)", rest)) - {"PATH"}
        assert used <= declared, rest
        if word == "FROM":
            declared = set()  # what stands before FROM ends with it
        if word == "ARG":
            declared.add(rest.partition("=")[0])
    told = set(re.findall(r"--build-arg (\w+)=", "\n".join(LINES)))
    assert told == {rest.partition("=")[0] for rest in of("ARG")}
    (folder,), (path,), (command,) = of("WORKDIR"), of("ENV"), of("ENTRYPOINT")
    assert path == f"PATH={folder}/.venv/bin:$PATH"
    assert json.loads(command)[0] in PROJECT["scripts"]
