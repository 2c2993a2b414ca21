"""The layout of the rows in which the models of step 3 read prompts with answers."""

from collections.abc import Sequence

import numpy as np

from dschat.arguments import RlhfArguments
from dschat.data.packing import RowLayout
from dschat.data.rows import Rows
from dschat.distributed.device import current_device
from dschat.models.attention import set_attention
from dschat.models.config import learned_positions, read_config
from dschat.models.packing_trial import choose_row_layout
from dschat.rlhf.rlhf_engine import choose_ways
from dschat.rlhf.roles import EngineSpec
from dschat.runs.measured_choices import MeasuredChoices

NUM_TRIED, NUM_MEASURED = 2, 8
"""Micro-batches that are tried in several layouts."""
MOST_TOKENS = 2**31
"""More tokens than a row has."""


def choose_ways_and_layout(
    args: RlhfArguments,
    specs: Sequence[EngineSpec],
    prompts: Rows,
    choices: MeasuredChoices,
    *,
    longest: int,
) -> tuple[RowLayout, int, float]:
    """`choose_ways` of the models, and `choose_row_layout` for all together: they read the same rows.

    The numbers are of the tokens in rows, padding included, that a prompt takes with the longest answer: the
    longest in a row of its own, and the mean.

    No answers are known yet: the trial's are of any length up to --max_answer_seq_len. `longest` is the
    longest prompt with the longest answer, in tokens. Every rank must call it.
    """
    choose_ways(specs, longest=longest, choices=choices)
    configs, limits = {}, []
    for spec in specs:
        configs[spec.name] = read_config(spec.path, 0.0)
        set_attention(configs[spec.name], spec.settings.attn_implementation)
        limits.append(learned_positions(spec.path))
    generator = np.random.default_rng(args.run.seed)
    size = args.ppo.per_device_training_batch_size
    known = prompts.column("length")
    lengths = [
        generator.choice(known, size) + generator.integers(1, args.rollout.max_answer_seq_len + 1, size)
        for _ in range(NUM_TRIED)
    ]
    layout = choose_row_layout(
        args.widths,
        configs,
        choices,
        dtype=args.run.dtype,
        device=current_device(),
        limit=min((limit for limit in limits if limit is not None), default=None),
        lengths=lengths,
        # A reward model with a tokenizer of its own reads rows of lengths that nobody knows yet.
        longest=MOST_TOKENS if "reader_ids" in prompts.table.column_names else longest,
    )
    longest_answers = known[: NUM_MEASURED * size] + args.rollout.max_answer_seq_len
    batches = [longest_answers[i : i + size] for i in range(0, len(longest_answers), size)]
    return layout, layout.width_of(longest), layout.tokens_per_sequence(batches)
