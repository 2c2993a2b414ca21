"""Shapes of tensors, checked in every test and never in a run: conftest.py calls `install`.

A letter is one size within a call: where [B, T] stands beside [B], both have as many rows. `*n` are any
sizes, alike within a call. The notation and its checks are jaxtyping's.
"""

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from jaxtyping import Bool, Float, Int, Shaped, jaxtyped

SIZES = {
    "dschat.models.softmax": {
        "token_logprobs": "logits: Float *n V; tokens: Int *n -> Float *n",
        "logprobs_and_entropy": "logits: Float *n V; tokens: Int *n -> Float *n",
    },
    "dschat.losses": {
        "masked_mean": "x, mask: Shaped *n -> Float",
        "masked_whiten": "x: Float *n; mask: Shaped *n -> Float *n",
        "pairwise_ranking_loss": "chosen_scores, rejected_scores, margin: Float B -> Float B",
        "implicit_reward": "logprobs, ref_logprobs: Float B -> Float B",
        "dpo_loss": "policy_chosen, policy_rejected, ref_chosen, ref_rejected: Float B -> Float B",
        "dpo_metrics": "logprobs, ref_logprobs: Float rows -> Float B",  # rows: 2 B
        "pair_accuracy": "chosen, rejected: Float B -> Float B",
        "kl_estimate": "logprobs, ref_logprobs: Float *n -> Float *n",
        "kl_loss": "logprobs, ref_logprobs: Float B T; mask: Shaped B T -> Float",
        "kl_shaped_rewards": (
            "scores: Float B; logprobs, ref_logprobs: Float B T; mask: Shaped B T -> Float B T"
        ),
        "advantages_and_returns": "values, rewards: Float B T; mask: Shaped B T -> Float B T",
        "discounted_returns": "rewards: Float B T; mask: Shaped B T -> Float B T",
        "group_advantages": "scores: Float B; groups: Int B -> Float B",
        "policy_ratio": "logprobs, old_logprobs: Float B T; mask: Shaped B T -> Float B T",
        "truncated_importance_weights": (
            "logprobs, sampled_logprobs: Float B T; mask: Shaped B T -> Float B T"
        ),
        "clipped_policy_loss": (
            "logprobs, old_logprobs, advantages, weights: Float B T; mask: Shaped B T -> Float"
        ),
        "text_loss": "logprobs: Float B L -> Float",
        "clipped_value_loss": "values, old_values, returns: Float B T; mask: Shaped B T -> Float",
    },
    "dschat.data.token_batch": {
        "TokenBatch": (
            "input_ids, attention_mask, position_ids: Int B L; labels: Int B N; label_mask: Bool B N"
        )
    },
    "dschat.data.packing": {
        "Placement": (
            "source, position_ids, segments: Int R W; outputs: Int M; label_places: Int K; last_tokens: Int B"
        )
    },
    "dschat.data.collate": {
        "PairBatch": "pair_mask, weights, margins: Float B; groups: Int B; ref_logprobs: Float 2*B",
        "PromptBatch": "input_ids, attention_mask: Int B P; keys, rows, samples: Int B",
    },
    "dschat.models.forward": {
        "token_logprobs_of": "-> Float B N",
        "predictions_of": "-> Float B N",
        "logits_of": "-> Float *n V",
        "values_of": "-> Float B N",
        "scores_of": "-> Float B",
    },
    "dschat.rlhf.rollout.batch": {
        "RolloutBatch": (
            "input_ids, attention_mask: Int B L; answer_mask: Bool B T; ended: Bool B; prompt_rows: Int B; "
            "logprobs: Float B T"
        )
    },
    "dschat.rlhf.analysis": {
        "ModelOutputs": "logprobs, entropy, ref_logprobs, values: Float B T; scores: Float B",
    },
    "dschat.rlhf.experience": {
        "AnswerAnalysis": "logprobs, entropy, ref_logprobs, values: Float B T; scores, by_source: Float B",
        "MicroBatch": "logprobs, ref_logprobs, values, advantages, returns, weights: Float B T",
        "Experience": "raw_advantages, advantages, returns, weights: Float B T",
    },
}
"""Module -> function or dataclass -> what its tensors are. A dictionary or tuple of tensors: each of them."""
KINDS = {"Float": Float, "Int": Int, "Bool": Bool, "Shaped": Shaped}


def require(where: str, value: Any, shape: str) -> None:
    """Raise `TypeError` where a tensor, or one of several, has another kind or shape; None is nothing."""
    import torch  # not for tests that need none

    if isinstance(value, Mapping):
        value = tuple(value.values())
    kind, _, sizes = shape.partition(" ")
    for tensor in value if isinstance(value, tuple) else (value,):
        if isinstance(tensor, torch.Tensor) and not isinstance(tensor, KINDS[kind][torch.Tensor, sizes]):
            raise TypeError(
                f"{where} is {tensor.dtype} {list(tensor.shape)}, not {shape} as elsewhere in the call"
            )


def checked(function: Callable[..., Any], declared: str) -> Callable[..., Any]:
    """The function or constructor with its shapes checked."""
    parameters, _, result = declared.partition("->")
    shapes = {
        name: shape
        for part in parameters.strip().split("; ")
        if part
        for names, shape in [part.split(": ")]
        for name in names.split(", ")
    }
    # A size in terms of another, such as 2*B, is known once the other is.
    shapes = dict(sorted(shapes.items(), key=lambda item: "2*" in item[1]))
    signature = inspect.signature(function)
    assert set(shapes) <= set(signature.parameters), function

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with jaxtyped("context"):
            arguments = signature.bind(*args, **kwargs).arguments
            for name, shape in shapes.items():
                require(f"{function.__qualname__}: {name}", arguments.get(name), shape)
            output = function(*args, **kwargs)
            if result:
                require(f"{function.__qualname__}: the result", output, result.strip())
        return output

    return wrapper


def check_module(module: ModuleType) -> None:
    """Put checked functions and constructors in the place of those that are listed."""
    for name, declared in SIZES[module.__name__].items():
        thing = getattr(module, name)
        if isinstance(thing, type):
            thing.__init__ = checked(thing.__init__, declared)
        else:
            setattr(module, name, checked(thing, declared))


class CheckingFinder(importlib.abc.MetaPathFinder):
    """Finds the listed modules as ever, and has them checked once they are imported."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """The module's own, with another end of its import."""
        if name not in SIZES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module

        def execute_and_check(module: ModuleType) -> None:
            execute(module)
            check_module(module)

        spec.loader.exec_module = execute_and_check
        return spec


def install() -> None:
    """Have the shapes checked in all modules that are imported from now on."""
    assert not SIZES.keys() & sys.modules.keys(), "too late: a module to be checked has been imported"
    sys.meta_path.insert(0, CheckingFinder())
