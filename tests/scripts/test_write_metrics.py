"""docs/metrics.md says what the registry does."""

from dschat.runs.registry import METRICS
from scripts import write_metrics


def test_the_page_is_what_the_registry_says():
    written = write_metrics.PAGE.read_text(encoding="utf-8")
    assert written == write_metrics.page() + "\n", "stale: run python scripts/write_metrics.py"


def test_every_metric_is_on_the_page_once():
    rows = [line for line in write_metrics.page().splitlines() if line.startswith("| `")]
    assert len(rows) == len(METRICS)
    assert "| `kl` | nats per answer |" in write_metrics.page()
