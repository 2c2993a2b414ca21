from dschat.rlhf.position import Position

UPDATES = 4
"""Optimiser steps of a PPO step."""


def numbers(position: Position) -> tuple[bool, int, int]:
    return (
        position.is_inside(UPDATES),
        position.num_ppo_steps_done(UPDATES),
        position.num_updates(UPDATES),
    )


def test_a_run_that_has_not_begun_is_inside_no_ppo_step():
    assert numbers(Position()) == (False, 0, 0)


def test_inside_a_ppo_step_and_at_its_end():
    position = Position()
    position.begin_ppo_step(2)  # the third
    assert numbers(position) == (True, 2, 8)
    position.minibatches_done = 3
    assert numbers(position) == (True, 2, 11)
    position.minibatches_done = 4
    assert numbers(position) == (False, 3, 12)


def test_a_ppo_step_begins_without_what_the_last_one_did():
    position = Position(1, 4, 2, True, num_skipped=1, nonfinite_scores=3, num_text_steps=4)
    position.begin_ppo_step(1)
    assert position == Position(2, num_text_steps=4)
