import torch

from dschat.rlhf.ema import MovingAverage


def one_weight(value: float, dtype: torch.dtype) -> torch.nn.Linear:
    model = torch.nn.Linear(1, 1, bias=False, dtype=dtype)
    torch.nn.init.constant_(model.weight, value)
    return model


def test_the_average_moves_by_one_minus_the_decay():
    model = one_weight(1.0, torch.float32)
    average = MovingAverage(model, decay=0.9)
    torch.nn.init.constant_(model.weight, 2.0)
    average.update()  # 0.9 * 1 + 0.1 * 2
    average.update()  # 0.9 * 1.1 + 0.1 * 2
    torch.testing.assert_close(average.weights()["weight"], torch.tensor([[1.19]]))


def test_small_moves_of_bf16_weights_are_not_rounded_away():
    model = one_weight(1.0, torch.bfloat16)
    average = MovingAverage(model, decay=0.999)
    torch.nn.init.constant_(model.weight, 1.5)
    for _ in range(2):
        average.update()  # 1 + 0.5 * (1 - 0.999^2); bf16 has nothing between 1 and 1.0078
    weight = average.weights()["weight"]
    assert weight.dtype == torch.float32
    torch.testing.assert_close(weight, torch.tensor([[1.0009995]]))
