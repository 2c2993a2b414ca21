"""Results on disks of several hosts are tested in tests/distributed/test_storage.py; here, what they are."""

from dschat.runs import results
from dschat.runs.results import copy_results


def test_the_results_are_models_and_metrics_and_not_what_belongs_to_one_host(tmp_path):
    for name in ("model.safetensors", "actor/config.json", "metrics.jsonl", ".export.json", "summary.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for name in ("checkpoints/step_1/x", "tensorboard/events", "profile/trace", "log.txt", ".run.lock"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    names = {".export.json", "actor/config.json", "metrics.jsonl", "model.safetensors", "summary.json"}
    assert set(results._names(tmp_path)) == names


def test_a_run_on_one_host_copies_nothing(tmp_path):
    copy_results(str(tmp_path))
    copy_results(None)
    assert list(tmp_path.iterdir()) == []
