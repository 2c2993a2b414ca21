"""Which comparison goes where: one step's training, or evaluation. Pure functions of prompt keys.

Everything follows from hashes of the prompts, never from their order, so that each step comes to the same
split by itself.
"""

from collections.abc import Sequence

import numpy as np
import xxhash

NUM_STEPS = 3
EVALUATION = 3
REPEATED = -1
ALSO_EVALUATION = -2
"""Parts beside 0, 1, 2, which are the steps' shares: held out; dropped as the prompt came before; dropped
from training as the prompt is in some source's evaluation split."""


def assign(
    keys: np.ndarray,
    sources: np.ndarray,
    in_evaluation: np.ndarray,
    *,
    eval_fraction: float,
    shares: Sequence[float],
    seed: int,
) -> np.ndarray:
    """The part of each of N comparisons, int8 [N].

    A prompt is kept once: the first of the published evaluation rows, else the first of the training rows.
    A source without published evaluation rows gives `eval_fraction` of its prompts to evaluation; the rest of
    each source is cut by `shares`.
    """
    part = np.full(len(keys), REPEATED, dtype=np.int8)
    part[_first_of_each(keys, np.flatnonzero(in_evaluation))] = EVALUATION
    also_evaluation = ~in_evaluation & np.isin(keys, keys[in_evaluation])
    part[also_evaluation] = ALSO_EVALUATION
    fresh = _first_of_each(keys, np.flatnonzero(~in_evaluation & ~also_evaluation))
    with_evaluation = set(sources[in_evaluation].tolist())
    for source in np.unique(sources[fresh]).tolist():
        rows = fresh[sources[fresh] == source]
        fraction = 0.0 if source in with_evaluation else eval_fraction
        part[rows] = split_prompts(keys[rows], eval_fraction=fraction, shares=shares, seed=seed)
    return part


def split_prompts(
    keys: np.ndarray, *, eval_fraction: float, shares: Sequence[float], seed: int
) -> np.ndarray:
    """The part (0, 1, 2 or `EVALUATION`) of N different prompts, int8 [N], in exact sizes.

    Which prompts are held out does not depend on the shares.
    """
    num_held_out = held_out_size(len(keys), eval_fraction)
    order = _shuffled(keys, seed, "evaluation")
    part = np.full(len(keys), EVALUATION, dtype=np.int8)
    training = order[num_held_out:]
    training = training[_shuffled(keys[training], seed, "steps")]
    part[training] = np.repeat(np.arange(len(shares), dtype=np.int8), share_sizes(len(training), shares))
    return part


def held_out_size(num_prompts: int, fraction: float) -> int:
    """`fraction` of the prompts, rounded; of two or more at least one, and never all."""
    if num_prompts < 2 or fraction == 0:
        return 0
    return min(max(round(num_prompts * fraction), 1), num_prompts - 1)


def share_sizes(num_prompts: int, shares: Sequence[float]) -> list[int]:
    """`num_prompts` cut in proportion to `shares`, by largest remainder, the earlier share on a tie.

    Each share above zero gets a prompt where there are enough for all of them; the largest gives it up.
    """
    quotas = np.asarray(shares, dtype=np.float64) * num_prompts / sum(shares)
    sizes = np.floor(quotas).astype(int)
    # Rounded, lest an error in the last digit decides between equal remainders.
    by_remainder = np.argsort(-np.round(quotas - sizes, 9), kind="stable")
    sizes[by_remainder[: num_prompts - sizes.sum()]] += 1
    wanted = np.asarray(shares) > 0
    if num_prompts >= wanted.sum():
        for share in np.flatnonzero(wanted & (sizes == 0)):
            sizes[sizes.argmax()] -= 1
            sizes[share] += 1
    return sizes.tolist()


def _first_of_each(keys: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Those of `rows` (ascending) whose key no earlier one of them has, ascending."""
    return rows[np.sort(np.unique(keys[rows], return_index=True)[1])]


def _shuffled(keys: np.ndarray, seed: int, purpose: str) -> np.ndarray:
    """Positions [N] in the order of a seeded hash of the keys; another purpose is an unrelated order."""
    with np.errstate(over="ignore"):
        mixed = keys ^ np.uint64(xxhash.xxh3_64_intdigest(f"{purpose} {seed}".encode()))
        # The finaliser of SplitMix64, https://doi.org/10.1145/2714064.2660195: one to one, so no ties.
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed = mixed ^ (mixed >> np.uint64(31))
    return np.argsort(mixed, kind="stable")
