import pytest

from dschat.rlhf.kl_controller import KlController


def test_beta_follows_the_trajectory_worked_out_by_hand():
    # target 6, horizon 1000, 100 answers a step: a tenth of the clipped error each time
    # KL 12: error 1 -> 0.2, beta 0.1 * 1.02 = 0.102
    # KL 6.6: error 0.1,      beta 0.102 * 1.01 = 0.10302
    # KL 6: error 0,          beta stays
    # KL 0: error -1 -> -0.2, beta 0.10302 * 0.98 = 0.1009596
    controller = KlController(0.1, target=6, horizon=1000)
    trajectory = []
    for kl in (12, 6.6, 6, 0):
        controller.update(kl, 100)
        trajectory.append(controller.coef)
    assert trajectory == [pytest.approx(beta) for beta in (0.102, 0.10302, 0.10302, 0.1009596)]


def test_without_a_target_beta_is_held():
    controller = KlController(0.1)
    controller.update(100, 100)
    assert controller.coef == 0.1


@pytest.mark.parametrize(("kl", "beta"), [(0, 0.08), (100, 0.12)])
def test_a_batch_of_many_horizons_moves_beta_by_a_fifth_and_no_more(kl, beta):
    controller = KlController(0.1, target=1, horizon=10)
    controller.update(kl, 1000)
    assert controller.coef == pytest.approx(beta)
