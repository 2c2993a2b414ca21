"""Settings of all tests."""

from collections.abc import Iterator

import hypothesis
import pytest
from browser import CHROMIUM, Browser
from shapes import install

# No test depends on time: a machine that is busy makes an example slow, not wrong.
hypothesis.settings.register_profile("dschat", deadline=None)
hypothesis.settings.load_profile("dschat")

install()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the tests marked matrix out where -m does not speak of them; files with slow tests come first.

    The many short files are left for the worker that is done with the long ones.
    """
    if "matrix" not in config.option.markexpr:
        left_out = [item for item in items if item.get_closest_marker("matrix")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("matrix")]
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    """The browser of all tests of a process; they take `browser`."""
    if CHROMIUM is None:
        pytest.skip("no chromium on PATH (apt-get install chromium)")
    with Browser() as chromium:
        yield chromium


@pytest.fixture
def browser(chromium) -> Iterator[Browser]:
    """A browser with an empty page, as wide as a laptop's, and light."""
    chromium.window()
    yield chromium
    chromium.open("about:blank")
