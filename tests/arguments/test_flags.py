"""How flags are declared."""

import dataclasses
from dataclasses import dataclass

import pytest

from dschat.arguments import STEPS
from dschat.arguments.flags import flag, group, require, require_at_least
from dschat.errors import UserError


@pytest.mark.parametrize("step", STEPS)
def test_every_flag_has_a_help_line(step):
    for part in dataclasses.fields(STEPS[step]):
        for f in dataclasses.fields(part.metadata["group"]):
            if "help" in f.metadata:
                assert f.metadata["help"].endswith("."), f.name


@dataclass(frozen=True, kw_only=True)
class Group:
    """A group of three flags."""

    size: int = flag(help="Required.")
    names: list[str] = flag(["a"], "A list.", at_resume="free", nargs="*")
    rate: float = flag(0.5, "A number.", at_resume="divided")


def test_a_flag_keeps_what_resuming_and_argparse_need():
    size, names, rate = dataclasses.fields(Group)
    assert size.default is dataclasses.MISSING
    assert [f.metadata["at_resume"] for f in (size, names, rate)] == ["same", "free", "divided"]
    assert names.metadata["argparse"] == {"nargs": "*"}
    assert rate.metadata["help"] == "A number."


def test_objects_do_not_share_the_default_of_a_list():
    first, second = Group(size=1), Group(size=1)
    assert first.names == ["a"]
    assert first.names is not second.names


def test_a_group_has_a_prefix_and_defaults_of_the_step():
    metadata = group(Group, "actor_", rate=0.1).metadata
    assert metadata == {"group": Group, "prefix": "actor_", "defaults": {"rate": 0.1}}


def test_a_default_for_a_flag_that_is_not_there_is_a_mistake_of_ours():
    with pytest.raises(AssertionError, match=r"Group has no \{'ratio'\}"):
        group(Group, ratio=0.1)


def test_the_first_setting_that_is_too_small_is_named_with_its_prefix():
    require_at_least(1, Group(size=1), "size", prefix="actor_")
    with pytest.raises(UserError, match=r"^--actor_rate must be at least 1, got 0\.5\.$"):
        require_at_least(1, Group(size=1), "size", "rate", prefix="actor_")


def test_what_is_required_is_said_as_it_is_given():
    require(True, "not said")
    with pytest.raises(UserError, match=r"^said$"):
        require(False, "said")
