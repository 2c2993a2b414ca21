from dschat.rlhf import phase_times
from dschat.rlhf.phase_times import PhaseTimes


def test_seconds_add_up_by_phase_until_the_next_ppo_step(monkeypatch):
    clock = iter([0.0, 2.0, 10.0, 11.0, 20.0, 21.0])
    monkeypatch.setattr(phase_times.time, "perf_counter", lambda: next(clock))
    times = PhaseTimes()
    for phase in ("generation", "training", "training"):
        with times.measured(phase):
            pass
    assert times.metrics() == {"seconds_generation": 2, "seconds_training": 2}
    times.reset()
    assert not times.seconds
