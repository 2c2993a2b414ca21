"""Assignment of prompts to the steps' training or to evaluation. Pure functions of prompt keys.

Everything follows from hashes of the prompts, never from their order, so that each step comes to the same
split by itself.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import xxhash

NUM_STEPS = 3
EVALUATION = 3
REPEATED = -1
ALSO_EVALUATION = -2
OUTWEIGHED = -3
"""Parts beside 0, 1, 2, which are the steps' shares: held out; the prompt came before; dropped from training
as the prompt is in some source's evaluation split, or as its source has less weight in the blend."""


def assign(
    keys: np.ndarray,
    sources: np.ndarray,
    in_evaluation: np.ndarray,
    *,
    eval_fraction: float,
    shares: Sequence[float],
    seed: int,
    weights: Mapping[int, float] | None = None,
    families: np.ndarray | None = None,
) -> np.ndarray:
    """The part of each of N comparisons, int8 [N].

    A prompt counts once: the first of the published evaluation rows, else the first of the training rows;
    the others are `REPEATED`. A source without published evaluation rows gives `eval_fraction` of its prompts
    to evaluation; the rest of each source is cut by `shares`. `weights` are the sources' by number: their
    training prompts then stand in that proportion, none is used twice, and as many are used as can be.
    Prompts of equal `families` (default: of none) are held out together, as far as that leaves the numbers
    what they are.
    """
    families = keys if families is None else families
    part = np.full(len(keys), REPEATED, dtype=np.int8)
    part[first_of_each(keys, np.flatnonzero(in_evaluation))] = EVALUATION
    also_evaluation = ~in_evaluation & np.isin(keys, keys[in_evaluation])
    part[also_evaluation] = ALSO_EVALUATION
    fresh = first_of_each(keys, np.flatnonzero(~in_evaluation & ~also_evaluation))
    with_evaluation = set(sources[in_evaluation].tolist())
    rows_of = {number: fresh[sources[fresh] == number] for number in np.unique(sources[fresh]).tolist()}
    held_out = {
        number: 0 if number in with_evaluation else held_out_size(len(rows), eval_fraction)
        for number, rows in rows_of.items()
    }
    quotas = blend_sizes({n: len(rows) - held_out[n] for n, rows in rows_of.items()}, weights or {})
    for number, rows in rows_of.items():
        part[rows] = split_prompts(
            keys[rows],
            families[rows],
            num_held_out=held_out[number],
            num_used=quotas[number],
            shares=shares,
            seed=seed,
        )
    return part


def parts_of_prompts(keys: np.ndarray, in_evaluation: np.ndarray, part: np.ndarray) -> np.ndarray:
    """The part of each comparison's PROMPT, int8 [N]: of repeated ones, the first one's."""
    whole = part.copy()
    for rows in (np.flatnonzero(in_evaluation), np.flatnonzero(~in_evaluation)):
        _, first, group = np.unique(keys[rows], return_index=True, return_inverse=True)
        whole[rows] = part[rows[first]][group]
    return whole


def blend_sizes(sizes: Mapping[int, int], weights: Mapping[int, float]) -> dict[int, int]:
    """How many prompts of each source to use: in proportion to `weights` (1 where not given), none of them
    twice, as many as there are for the source that runs out first. Without any weight: all."""
    if not weights:
        return dict(sizes)
    scale = min((size / weights.get(number, 1.0) for number, size in sizes.items()), default=0.0)
    return {
        number: min(max(round(scale * weights.get(number, 1.0)), 1), size) for number, size in sizes.items()
    }


def split_prompts(
    keys: np.ndarray,
    families: np.ndarray,
    *,
    num_held_out: int,
    num_used: int,
    shares: Sequence[float],
    seed: int,
) -> np.ndarray:
    """The part of N different prompts, int8 [N], in exact sizes: `num_held_out` for evaluation, `num_used`
    cut by `shares`, the others `OUTWEIGHED`.

    Which prompts are held out depends on neither shares nor weights.
    """
    part = np.full(len(keys), OUTWEIGHED, dtype=np.int8)
    is_held_out = _held_out(keys, families, num_held_out, seed)
    part[is_held_out] = EVALUATION
    training = np.flatnonzero(~is_held_out)
    training = training[_shuffled(keys[training], seed, "steps")]
    training = training[np.sort(_shuffled(keys[training], seed, "blend")[:num_used])]
    part[training] = np.repeat(np.arange(len(shares), dtype=np.int8), share_sizes(len(training), shares))
    return part


def _held_out(keys: np.ndarray, families: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Which `count` of N prompts are held out, bool [N]: whole families, the next that has room at a time.

    Where no family has, as in a set of one conversation's turns, single prompts complete the number.
    """
    _, family, sizes = np.unique(families, return_inverse=True, return_counts=True)
    smallest = np.full(len(sizes), np.iinfo(np.uint64).max, dtype=np.uint64)
    np.minimum.at(smallest, family, keys)
    is_held_out = np.zeros(len(sizes), dtype=bool)
    left = count
    for number in _shuffled(smallest, seed, "evaluation"):
        if left == 0:
            break
        if sizes[number] <= left:
            is_held_out[number] = True
            left -= sizes[number]
    of_prompts = is_held_out[family]
    others = _shuffled(keys, seed, "evaluation")
    of_prompts[others[~of_prompts[others]][:left]] = True
    return of_prompts


def some_rows(keys: np.ndarray, count: int, seed: int) -> np.ndarray:
    """The positions, ascending, of `count` of N rows by a seeded hash; a larger count adds to them."""
    return np.sort(_shuffled(keys, seed, "some")[:count])


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


def first_of_each(keys: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Those of `rows` (ascending) whose key no earlier one of them has, ascending."""
    return rows[np.sort(np.unique(keys[rows], return_index=True)[1])]


def number_among_equals(keys: np.ndarray) -> np.ndarray:
    """How many equal keys come before each of N, int64 [N]."""
    order = np.argsort(keys, kind="stable")
    is_first = np.append(True, keys[order][1:] != keys[order][:-1])[: len(keys)]
    positions = np.arange(len(keys))
    numbers = np.empty(len(keys), dtype=np.int64)
    numbers[order] = positions - np.maximum.accumulate(np.where(is_first, positions, 0))
    return numbers


def _shuffled(keys: np.ndarray, seed: int, purpose: str) -> np.ndarray:
    """Positions [N] in the order of a seeded hash of the keys; another purpose is an unrelated order."""
    with np.errstate(over="ignore"):
        mixed = keys ^ np.uint64(xxhash.xxh3_64_intdigest(f"{purpose} {seed}".encode()))
        # The finaliser of SplitMix64, https://doi.org/10.1145/2714064.2660195: one to one, so no ties.
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed = mixed ^ (mixed >> np.uint64(31))
    return np.argsort(mixed, kind="stable")
