"""Two runs that are to come to the same: figures and exports."""

from pathlib import Path

from figures import timeless_lines
from safetensors.torch import load_file
from torch.testing import assert_close

EPSILON = 1e-3
"""Adam's: with its own default rounding in a gradient that ought to be 0, such as a key's bias has, is a step
of the whole learning rate."""
COMPARED = {"adam_epsilon": EPSILON, "export_actor": "last"}
"""Flags of step 3, so that the actor that is compared is one that has learned."""


def assert_alike(one: Path, other: Path, *, exactly: bool) -> None:
    """Two runs of the same figures and exports, to the last bit or to rounding."""
    figures = [timeless_lines(folder) for folder in (one, other)]
    if exactly:
        assert figures[0] == figures[1]
    for expected, found in zip(*figures, strict=True):
        for figure in ("loss", "eval_loss", "score", "kl", "value_loss", "grad_norm", "actor_grad_norm"):
            if figure in expected:
                assert_close(found[figure], expected[figure], rtol=1e-4, atol=1e-4, msg=f"{other}: {figure}")
    files = [path.relative_to(one) for path in one.rglob("*.safetensors") if "checkpoints" not in path.parts]
    assert files
    for file in files:
        weights, expected = load_file(other / file), load_file(one / file)
        largest = max((weights[name].float() - expected[name].float()).abs().max() for name in expected)
        print(f"{other.parent.name}/{other.name}/{file}: {largest:.1e} apart")
        assert_close(weights, expected, rtol=0, atol=0 if exactly else 5e-6)
