"""What pyproject.toml cannot say: the wheel holds the programs of the tree too, as dschat/tree."""

from pathlib import Path

from setuptools import find_namespace_packages, setup

PROGRAMS = ("step1_sft", "step2_reward", "step3_ppo", "scripts")
folders = [
    folder
    for program in PROGRAMS
    for folder in (Path(program), *sorted(p for p in Path(program).rglob("*") if p.is_dir()))
    if folder.name != "__pycache__"
]
tree = {f"dschat.tree.{'.'.join(folder.parts)}": str(folder) for folder in folders}

setup(
    packages=[*find_namespace_packages(include=["dschat*"]), *tree],
    package_dir=tree,
    package_data={"": ["*.sh", "*.jinja", "*.js", "*.sbatch", "*.yaml"]},
    exclude_package_data={"dschat.tree.scripts": ["setup.sh", "test.sh", "quickstart.sh"]},  # of a checkout
)
