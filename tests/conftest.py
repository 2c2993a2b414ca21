"""Settings of all tests."""

import hypothesis
import pytest
from shapes import install

# No test depends on time: a machine that is busy makes an example slow, not wrong.
hypothesis.settings.register_profile("dschat", deadline=None)
hypothesis.settings.load_profile("dschat")

install()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the tests marked matrix out where -m does not speak of them."""
    if "matrix" in config.option.markexpr:
        return
    left_out = [item for item in items if item.get_closest_marker("matrix")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("matrix")]
