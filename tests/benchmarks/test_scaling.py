"""The slopes of benchmarks/scaling.py, and that what it calls is what a PPO step calls."""

import pytest
import scaling
from scaling import Cost, Size


@pytest.mark.parametrize(("power", "factor"), [(2, 3.0), (1, 0.5), (0, 7.0)])
def test_the_slope_is_the_exponent_of_the_growth(power, factor):
    sizes = [10, 30, 500]
    assert scaling.slope(sizes, [factor * size**power for size in sizes]) == pytest.approx(power)


@pytest.mark.parametrize("part", scaling.PARTS)
def test_every_part_is_measured(part):
    cost = scaling.measure(part, Size(answers=64, length=8, vocabulary=300), repeats=1)
    assert cost.seconds > 0
    assert cost.mebibytes >= 0


def test_the_memory_of_a_call_is_what_it_holds_at_most(monkeypatch):
    def hold(size):
        return lambda: bytearray(size.answers * scaling.MEBIBYTE)

    monkeypatch.setitem(scaling.PARTS, "hold", hold)
    assert scaling.measure("hold", Size(answers=64), repeats=2).mebibytes == pytest.approx(64, abs=4)


def test_a_row_says_sizes_costs_and_slopes():
    sizes = [Size(answers=100), Size(answers=200)]
    row = scaling.line("part", "answers", sizes, [Cost(0.001, 2.0), Cost(0.004, 4.0)])
    assert row == "| part | answers 100 to 200 | 1, 4 | 2.00 | 2, 4 | 1.00 |"
    small = scaling.line("part", "answers", sizes, [Cost(0.001, 0.0), Cost(0.002, 0.1)])
    assert small.endswith("| 1.00 | 0, 0.1 |  |")


@pytest.mark.parametrize("share", [1, 3, 10, 16, 64])
def test_a_share_leaves_several_sizes_that_are_dealt_in_whole_optimiser_steps_and_ranks(share):
    for part, axis, sizes in scaling.series(share):
        along = [getattr(size, axis) for size in sizes]
        assert along == sorted(set(along)), (part, axis)
        assert len(along) > 1, (part, axis)
        for size in sizes:
            if part != scaling.DECODING:
                assert size.answers % (16 * size.ranks) == 0, (part, axis)
                assert size.answers % (16 * max(size.answers // 64, 1)) == 0, (part, axis)


@pytest.mark.parametrize("share", ["0", "65"])
def test_a_share_that_leaves_no_slope_is_refused(share, capsys):
    with pytest.raises(SystemExit):
        scaling.parse(["--share", share])
    assert f"--share {share} is not from 1 to 64" in capsys.readouterr().err


def test_a_file_in_no_folder_is_refused_before_anything_is_measured(tmp_path, capsys):
    with pytest.raises(SystemExit):
        scaling.parse(["--output", str(tmp_path / "none" / "scaling.md")])
    assert "scaling.md: there is no such folder." in capsys.readouterr().err
    assert scaling.parse(["--output", str(tmp_path / "scaling.md")]).output.name == "scaling.md"
