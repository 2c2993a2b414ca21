"""The fastest that this machine multiplies matrices of a model's shapes: what shares of the peak refer to."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Product:
    """`count` products of [rows, width] and [width, columns] matrices that a forward pass takes."""

    name: str
    rows: int
    width: int
    columns: int
    count: int

    @property
    def operations(self) -> int:
        """Floating-point operations of all of them."""
        return 2 * self.rows * self.width * self.columns * self.count


def products_of(shape: dict[str, int], rows: int) -> list[Product]:
    """The matrix products of a forward pass of OPT's layout over so many tokens, `shape` as in
    `random_models`."""
    width, wide, layers = shape["hidden_size"], shape["ffn_dim"], shape["num_hidden_layers"]
    return [
        Product("q, k, v, out", rows, width, width, 4 * layers),
        Product("fc1", rows, width, wide, layers),
        Product("fc2", rows, wide, width, layers),
        Product("head", rows, width, shape["vocab_size"], 1),
    ]


def peak(
    products: list[Product], *, device: str, processor_time: bool = False
) -> tuple[float, dict[str, float]]:
    """FLOP/s of a forward pass that were nothing but these products, and of each product.

    Each is measured in bf16 and on a CPU in fp32 too, and the faster counts: not every CPU multiplies bf16.
    """
    dtypes = ("bfloat16",) if device == "cuda" else ("bfloat16", "float32")
    speeds = {}
    for p in products:
        seconds = min(seconds_of(p, device, dtype, processor_time) for dtype in dtypes)
        speeds[p.name] = 2 * p.rows * p.width * p.columns / seconds
    total = sum(p.operations / speeds[p.name] for p in products)
    return sum(p.operations for p in products) / total, speeds


def seconds_of(
    product: Product, device: str, dtype: str, processor_time: bool, *, least: float = 0.1
) -> float:
    """The least time of one product, out of repetitions that last `least` seconds and more."""
    import torch

    options = {"device": device, "dtype": getattr(torch, dtype)}
    a = torch.randn(product.rows, product.width, **options)
    b = torch.randn(product.columns, product.width, **options)

    def now() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.process_time() if processor_time else time.perf_counter()

    def timed(times: int, work: Callable[[], Any]) -> float:
        start = now()
        for _ in range(times):
            work()
        return (now() - start) / times

    def multiply() -> Any:
        return torch.nn.functional.linear(a, b)

    timed(2, multiply)
    times = max(1, int(least / 5 / max(timed(2, multiply), 1e-6)))
    return min(timed(times, multiply) for _ in range(5))
