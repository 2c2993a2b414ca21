"""What every test of a run's metrics needs."""

import pytest
from tensorboard.summary.writer import event_file_writer


@pytest.fixture(autouse=True)
def event_files_in_order(monkeypatch):
    """Number TensorBoard's event files from 0 in every test.

    Their names end in a number of the process, and TensorBoard reads them in the order of their names, in
    which file 10 of one second comes before file 9. A resumed run is another process, in another second.
    """
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
