from functools import partial
from itertools import chain, islice

import numpy as np
import pytest
import torch

from dschat.data.collate import collate_pairs, collate_sft
from dschat.data.loaders import (
    TextLoader,
    build_eval_loader,
    build_eval_prompts,
    build_prompt_loader,
    build_train_loader,
)
from dschat.data.rows import Rows
from dschat.errors import UserError

PAD = 0
SFT = partial(collate_sft, pad_id=PAD)


def sft_rows(lengths):
    """Row i holds its own number i + 1 again and again, so that batches tell which rows they hold."""
    ids = [[i + 1] * length for i, length in enumerate(lengths)]
    targets = [max(length // 2, 1) for length in lengths]
    masks = [[False] * (length - n) + [True] * n for length, n in zip(lengths, targets, strict=True)]
    columns = {"input_ids": ids, "loss_mask": masks, "num_targets": targets, "length": list(lengths)}
    return Rows.from_dict(columns)


def lengths_of(num_rows, seed=0):
    return np.random.default_rng(seed).gamma(2.0, 40.0, num_rows).astype(int) + 2


def rows_in(batch):
    """The numbers of the real rows of a batch, in order."""
    input_ids = batch.input_ids if left_padded(batch) else batch.tokens.input_ids
    return [row[-1 if left_padded(batch) else 0] - 1 for row in input_ids.tolist() if any(row)]


def left_padded(batch):
    return hasattr(batch, "keys")


def train_loader(dataset, rank=0, world_size=1, batch_size=4, accumulation_steps=1, seed=3):
    return build_train_loader(
        dataset,
        SFT,
        batch_size=batch_size,
        accumulation_steps=accumulation_steps,
        rank=rank,
        world_size=world_size,
        seed=seed,
    )


def steps_of(dataset, batch_size, accumulation_steps, world_size):
    """For each optimiser step of an epoch the sorted rows of all ranks and micro-batches."""
    ranks = [
        list(train_loader(dataset, rank, world_size, batch_size, accumulation_steps))
        for rank in range(world_size)
    ]
    starts = range(0, len(ranks[0]), accumulation_steps)
    return [
        sorted(
            row
            for batches in ranks
            for batch in batches[i : i + accumulation_steps]
            for row in rows_in(batch)
        )
        for i in starts
    ]


@pytest.mark.parametrize("num_rows", [1, 7, 16, 50, 1000])
def test_every_row_is_trained_on_once_an_epoch(num_rows):
    steps = steps_of(sft_rows(lengths_of(num_rows)), 4, 2, 2)
    assert sorted(chain.from_iterable(steps)) == list(range(num_rows))
    assert [len(step) for step in steps[:-1]] == [16] * (len(steps) - 1)


def test_a_step_holds_the_same_rows_however_it_is_divided():
    dataset = sft_rows(lengths_of(133))
    steps = steps_of(dataset, 16, 1, 1)
    for division in [(8, 2, 1), (8, 1, 2), (4, 2, 2), (1, 4, 4), (2, 8, 1)]:
        assert steps_of(dataset, *division) == steps


def test_the_denominator_is_the_targets_of_the_whole_step():
    dataset = sft_rows(lengths_of(21))
    loaders = [train_loader(dataset, rank, 2, 2, 2) for rank in range(2)]
    batches = [list(loader) for loader in loaders]
    assert len(batches[0]) == len(loaders[0]) == 6
    assert loaders[0].steps_per_epoch == 3
    for step in range(3):
        parts = [batch for rank in batches for batch in rank[2 * step : 2 * step + 2]]
        assert {batch.denominator for batch in parts} == {
            float(sum(batch.tokens.label_mask.sum() for batch in parts))
        }


def test_the_denominator_of_pairs_is_the_sum_of_their_weights():
    columns = {"chosen_ids": [[1, 2]] * 3, "rejected_ids": [[1]] * 3, "length": [2] * 3}
    numbers = {"prompt_length": [1] * 3, "weight": [0.25] * 3, "margin": [0.0] * 3, "group": [0] * 3}
    dataset = Rows.from_dict(columns | numbers)
    loader = build_train_loader(
        dataset,
        partial(collate_pairs, pad_id=PAD),
        batch_size=2,
        accumulation_steps=1,
        rank=0,
        world_size=1,
        seed=1,
    )
    assert [(batch.weights.tolist(), batch.denominator) for batch in loader] == [
        ([0.25, 0.25], 0.5),
        ([0.25, 0], 0.25),
    ]


@pytest.mark.parametrize(
    ("num_rows", "num_epochs", "num_steps"),
    # Four rows a step; 0.1 times 30 steps is 3.0000000000000004, and any number above zero is a step.
    [(12, 1, 3), (12, 0.5, 2), (12, 1.5, 5), (120, 0.1, 3), (12, 0.001, 1), (9, 2, 6), (3, 0.5, 1)],
)
def test_part_of_an_epoch_is_rounded_up_to_whole_steps(num_rows, num_epochs, num_steps):
    assert train_loader(sft_rows([2] * num_rows)).num_steps_of(num_epochs) == num_steps
    assert len(prompt_steps(num_rows, 4, 1, 1, num_epochs=num_epochs)) == int(
        np.ceil(round(num_rows * num_epochs / 4, 6))
    )


def test_an_epoch_has_its_own_order_and_gives_it_again():
    loader = train_loader(sft_rows(lengths_of(60)))
    orders = []
    for num_done in (0, 15, 0):  # 60 rows are 15 steps
        steps = islice(loader.steps_after(num_done), 15)
        orders.append([rows_in(batch) for step in steps for batch in step.micro_batches])
    assert orders[0] == orders[2] != orders[1]
    assert orders[0] == [rows_in(batch) for batch in loader]
    assert [sorted(chain.from_iterable(order)) for order in orders[:2]] == [list(range(60))] * 2


def test_a_run_goes_on_inside_an_epoch_and_into_the_next():
    loader = train_loader(sft_rows(lengths_of(21)), 1, 2, 2, 2)  # 8 rows a step, 3 steps an epoch
    whole = [[rows_in(batch) for batch in step.micro_batches] for step in islice(loader.steps_after(0), 9)]
    rest = [[rows_in(batch) for batch in step.micro_batches] for step in islice(loader.steps_after(4), 5)]
    assert rest == whole[4:]
    assert [len(step) for step in whole] == [2] * 9


def test_a_step_has_the_denominator_of_its_micro_batches():
    loader = train_loader(sft_rows([4, 4, 6, 2]), 0, 1, 1, 2)
    for step in islice(loader.steps_after(0), 4):
        # Half of each row is learned: 2, 2, 3 and 1 tokens.
        assert step.denominator == sum(batch.tokens.label_mask.sum() for batch in step.micro_batches)
        assert {batch.denominator for batch in step.micro_batches} == {step.denominator}


def test_batches_come_with_the_indices_of_their_rows():
    dataset = sft_rows(lengths_of(21))
    evaluation = build_eval_loader(dataset, SFT, batch_size=4, rank=1, world_size=2)
    for loader in (train_loader(dataset, 1, 2, 2, 2), evaluation):
        pairs = list(loader.indexed_batches())
        assert len(pairs) == len(loader)
        assert all(indices.tolist() == rows_in(batch) for indices, batch in pairs)


def test_ranks_work_on_similar_lengths_at_the_same_time():
    dataset = sft_rows(lengths_of(640))
    ranks = [list(train_loader(dataset, rank, 2, 8, 4)) for rank in range(2)]
    longest = np.array([[batch.tokens.input_ids.shape[1] for batch in batches] for batches in ranks])
    assert np.abs(longest[0] - longest[1]).mean() < 0.05 * longest.mean()


@pytest.mark.parametrize(("accumulation_steps", "world_size"), [(1, 1), (1, 2), (4, 1)])
def test_padding_is_under_15_percent_at_batch_8(accumulation_steps, world_size):
    loader = train_loader(sft_rows(lengths_of(2000)), 0, world_size, 8, accumulation_steps)
    masks = [batch.tokens.attention_mask for batch in loader]
    assert sum(int(mask.sum()) for mask in masks) > 0.85 * sum(mask.numel() for mask in masks)


def test_sorting_leaves_the_lengths_of_steps_in_random_order():
    loader = train_loader(sft_rows(lengths_of(2000)), batch_size=8)
    longest = np.array([batch.tokens.input_ids.shape[1] for batch in loader])
    assert abs(np.corrcoef(longest[:-1], longest[1:])[0, 1]) < 0.2


@pytest.mark.parametrize("num_rows", [0, 1, 9, 40])
def test_evaluation_takes_every_row_once_in_as_many_batches_on_each_rank(num_rows):
    dataset = sft_rows(lengths_of(num_rows)) if num_rows else Rows(sft_rows([2]).table.slice(0, 0))
    loaders = [build_eval_loader(dataset, SFT, batch_size=4, rank=rank, world_size=3) for rank in range(3)]
    batches = [list(loader) for loader in loaders]
    assert [len(part) for part in batches] == [len(loaders[0])] * 3
    assert sorted(row for part in batches for batch in part for row in rows_in(batch)) == list(
        range(num_rows)
    )
    assert {batch.denominator for part in batches for batch in part} <= {1.0}


def test_a_short_evaluation_takes_the_same_sample_on_any_number_of_ranks():
    dataset = sft_rows(lengths_of(100))

    def sample(batch_size, world_size):
        settings = {"batch_size": batch_size, "world_size": world_size, "num_batches": 3}
        ranks = [build_eval_loader(dataset, SFT, rank=rank, **settings) for rank in range(world_size)]
        assert {len(loader) for loader in ranks} == {3}
        return sorted(row for loader in ranks for batch in loader for row in rows_in(batch))

    assert sample(8, 1) == sample(4, 2) == sample(8, 1)
    assert len(set(sample(8, 1))) == 24
    assert sample(8, 1) != list(range(24))


def test_a_short_evaluation_of_little_data_takes_all_of_it():
    loader = build_eval_loader(sft_rows([3, 4, 5]), SFT, batch_size=2, rank=0, world_size=1, num_batches=9)
    assert [rows_in(batch) for batch in loader] == [[2, 1], [0]]


def blocks_of(batch):
    """The tokens that are read, and the last, which is predicted only."""
    return torch.cat([batch.input_ids, batch.labels[:, -1:]], dim=1).tolist()


@pytest.mark.parametrize(
    ("batch_size", "accumulation_steps", "world_size"), [(6, 1, 1), (1, 3, 2), (3, 1, 2)]
)
def test_an_optimiser_step_holds_the_same_blocks_of_text_however_it_is_divided(
    batch_size, accumulation_steps, world_size
):
    blocks = np.arange(10, dtype=np.int32).repeat(5).reshape(10, 5)
    parts = [
        TextLoader(blocks, batch_size, accumulation_steps, rank, world_size, seed=3)
        for rank in range(world_size)
    ]
    whole = TextLoader(blocks, 6, 1, 0, 1, seed=3)
    assert {part.num_targets for part in parts} == {6 * 4}
    seen = []
    for all_at_once, *steps in islice(zip(whole, *parts, strict=True), 5):  # three epochs of ten blocks
        (expected,) = all_at_once.micro_batches
        held = [block for step in steps for part in step.micro_batches for block in blocks_of(part)]
        assert sorted(held) == sorted(blocks_of(expected))
        sizes = [len(part.input_ids) for part in steps[0].micro_batches]
        assert sizes == [batch_size] * accumulation_steps
        assert {step.denominator for step in steps} == {24.0}
        seen += [block[0] for block in blocks_of(expected)]
    assert sorted(seen) == sorted(list(range(10)) * 3)
    assert seen[:10] != seen[10:20]


def prompts(num_rows):
    ids = [[i + 1] * (i % 9 + 1) for i in range(num_rows)]
    keys = [100 + i for i in range(num_rows)]
    return Rows.from_dict({"input_ids": ids, "key": keys, "length": [len(row) for row in ids]})


def prompt_steps(num_rows, batch_size, batches_per_step, world_size, num_epochs=1, samples_per_prompt=1):
    """For each PPO step the (row, sample) pairs of all ranks, sorted."""
    settings = {"batch_size": batch_size, "batches_per_step": batches_per_step, "world_size": world_size}
    settings["samples_per_prompt"] = samples_per_prompt
    loaders = [
        build_prompt_loader(
            prompts(num_rows), pad_id=PAD, rank=rank, seed=5, num_epochs=num_epochs, **settings
        )
        for rank in range(world_size)
    ]
    steps = [[] for _ in range(len(loaders[0]))]
    for loader in loaders:
        for step, batches in zip(steps, loader, strict=True):
            assert [len(batch.keys) for batch in batches] == [batch_size] * batches_per_step
            for batch in batches:
                assert rows_in(batch) == (batch.keys - 100).tolist()
                step.extend(zip(rows_in(batch), batch.samples.tolist(), strict=True))
    return [sorted(step) for step in steps]


@pytest.mark.parametrize(("batch_size", "batches_per_step", "world_size"), [(12, 1, 1), (3, 2, 2), (2, 3, 2)])
def test_a_ppo_step_holds_every_answer_to_its_prompts(batch_size, batches_per_step, world_size):
    steps = prompt_steps(10, batch_size, batches_per_step, world_size, num_epochs=2, samples_per_prompt=3)
    assert len(steps) == 5  # 2 x 10 prompts, 3 answers each, 12 answers a step
    for step in steps:
        by_prompt = {}
        for row, sample in step:
            by_prompt.setdefault((row, sample // 3), []).append(sample % 3)  # the epoch and the answer in it
        assert list(by_prompt.values()) == [[0, 1, 2]] * 4
    answers = list(chain.from_iterable(steps))
    assert sorted(answers) == [(row, sample) for row in range(10) for sample in range(6)]
    assert steps == prompt_steps(10, 12, 1, 1, num_epochs=2, samples_per_prompt=3)


def test_a_ppo_step_that_cannot_hold_whole_groups_of_answers_is_an_error():
    with pytest.raises(UserError, match=r"samples 8 answers .*--num_samples_per_prompt 3 does not divide"):
        prompt_steps(10, 4, 1, 2, samples_per_prompt=3)


def test_ppo_takes_each_prompt_once_an_epoch_and_fills_the_last_step_from_the_next():
    steps = prompt_steps(10, 4, 1, 1, num_epochs=2)
    assert len(steps) == 5
    assert sorted(chain.from_iterable(steps)) == [(row, sample) for row in range(10) for sample in (0, 1)]
    steps = prompt_steps(10, 4, 1, 1)
    assert len(steps) == 3
    assert sorted(row for step in steps for row, sample in step if sample == 0) == list(range(10))
    assert len([row for step in steps for row, sample in step if sample == 1]) == 2


def test_a_step_larger_than_the_data_numbers_the_samples_of_a_prompt():
    (step,) = prompt_steps(3, 8, 1, 1)
    assert len(set(step)) == 8
    assert [sample for row, sample in step if row == 0][:2] == [0, 1]


def test_two_rows_of_one_prompt_have_samples_of_their_own():
    # Rows 0 to 3 are one prompt, 4 and 5 another: no two answers of a step or a run may share (key, sample).
    keys = [7, 7, 7, 7, 8, 8, 9]
    ids = [[key] * 3 for key in keys]
    dataset = Rows.from_dict({"input_ids": ids, "key": keys, "length": [3] * 7})
    settings = {"pad_id": PAD, "batches_per_step": 1, "rank": 0, "world_size": 1, "seed": 5}
    loader = build_prompt_loader(dataset, batch_size=14, num_epochs=3, samples_per_prompt=2, **settings)
    answers = [
        pair for (batch,) in loader for pair in zip(batch.keys.tolist(), batch.samples.tolist(), strict=True)
    ]
    # Three epochs of two samples for each row: 4 x 6, 2 x 6 and 1 x 6, counted on without a gap.
    expected = [(7, n) for n in range(24)] + [(8, n) for n in range(12)] + [(9, n) for n in range(6)]
    assert sorted(answers) == expected
    groups = [row for (batch,) in loader for row in batch.rows.tolist()]
    assert sorted(groups) == sorted(list(range(7)) * 6)  # a row is a group of its own


def test_a_ppo_step_has_the_same_prompts_on_any_number_of_ranks():
    assert prompt_steps(50, 8, 2, 1) == prompt_steps(50, 4, 2, 2) == prompt_steps(50, 4, 1, 4)


def test_each_epoch_of_prompts_has_another_order():
    steps = prompt_steps(40, 8, 1, 1, num_epochs=2)
    assert [row for row, _ in steps[0]] != [row for row, _ in steps[5]]


def eval_prompts(num_rows, num_prompts, batch_size, world_size, samples_per_prompt=1):
    """Each rank's batches of a sample of held-out prompts."""
    settings = {"num_prompts": num_prompts, "batch_size": batch_size, "world_size": world_size}
    settings["samples_per_prompt"] = samples_per_prompt
    return [
        build_eval_prompts(prompts(num_rows), pad_id=PAD, rank=rank, **settings) for rank in range(world_size)
    ]


@pytest.mark.parametrize(("batch_size", "world_size"), [(4, 1), (4, 2), (3, 2), (50, 1)])
def test_an_evaluation_of_ppo_answers_each_prompt_so_many_times_with_samples_of_its_own(
    batch_size, world_size
):
    dealt = eval_prompts(5, 9, batch_size, world_size, samples_per_prompt=3)
    found = [
        (number, sample)
        for batches in zip(*dealt, strict=True)  # a global batch is dealt to the ranks in turn
        for row in zip(
            *([*zip(b.rows.tolist(), b.samples.tolist(), strict=True)] for b in batches), strict=True
        )
        for number, sample in row
        if number >= 0
    ]
    once = eval_prompts(5, 9, 5, 1)[0][0].rows.tolist()
    assert found == [(number, sample) for number in once for sample in range(3)]


@pytest.mark.parametrize(
    ("num_rows", "num_prompts", "batch_size", "world_size"),
    [(40, 7, 4, 2), (40, 7, 2, 3), (5, 9, 4, 2), (1, 4, 8, 2)],
)
def test_an_evaluation_of_ppo_holds_each_prompt_of_a_fixed_sample_once(
    num_rows, num_prompts, batch_size, world_size
):
    by_rank = eval_prompts(num_rows, num_prompts, batch_size, world_size)
    shapes = [[len(batch.rows) for batch in batches] for batches in by_rank]
    assert all(shape == shapes[0] for shape in shapes)  # as many passes of as many rows on every rank
    assert max(shapes[0]) <= batch_size
    rows = [row for batches in by_rank for batch in batches for row in batch.rows.tolist() if row >= 0]
    assert len(rows) == min(num_rows, num_prompts)
    (one_rank,) = eval_prompts(num_rows, num_prompts, 64, 1)
    assert sorted(rows) == sorted(one_rank[0].rows.tolist())
    for batches in by_rank:
        for batch in batches:
            for ids, mask, row, key in zip(
                batch.input_ids, batch.attention_mask, batch.rows, batch.keys, strict=True
            ):
                if row >= 0:
                    assert ids[mask.bool()].tolist() == [row + 1] * (row % 9 + 1)
                    assert key == 100 + row
