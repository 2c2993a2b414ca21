"""Settings of all tests."""

import hypothesis

# No test depends on time: a machine that is busy makes an example slow, not wrong.
hypothesis.settings.register_profile("dschat", deadline=None)
hypothesis.settings.load_profile("dschat")
