"""Settings of all tests."""

import hypothesis
from shapes import install

# No test depends on time: a machine that is busy makes an example slow, not wrong.
hypothesis.settings.register_profile("dschat", deadline=None)
hypothesis.settings.load_profile("dschat")

install()
