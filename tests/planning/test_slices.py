"""Seconds of models of few layers."""

import pytest
from plans import arguments, specs_of
from tiny import tiny_config

from dschat.distributed.process_group import init_process_group
from dschat.planning import slices
from dschat.planning.meta_pass import Rows
from dschat.planning.models import PlannedModel
from dschat.planning.slices import Slices
from dschat.rlhf.rollout.slice_decoding import decode

PHASES = {"forward", "forward_backward", "optimizer"}


def planned_model(step, family="llama", layers=9):
    args = arguments(step)
    config = tiny_config(family, 384)
    config.num_hidden_layers, config.layer_types = layers, None
    return args, PlannedModel(specs_of(args)[0], config, only_adapters=False)


@pytest.mark.parametrize(("step", "more"), [("sft", set()), ("rlhf", {"reading", "writing"})])
def test_a_model_is_trained_and_answers_with_few_of_its_layers(step, more, capsys):
    init_process_group()
    capsys.readouterr()
    args, model = planned_model(step)
    prompts = Rows(2, 8, 4) if more else None
    found = Slices(args.optimizer, args.run, decode).seconds(model, Rows(2, 16, 8), prompts)
    assert found.keys() == PHASES | more
    assert all(seconds > 0 for seconds in found.values())
    assert capsys.readouterr().out == ""


def test_layers_are_taken_as_often_as_the_model_has_them(monkeypatch):
    args, model = planned_model("sft")
    monkeypatch.setattr(
        Slices, "_of_slice", lambda self, model, layers, rows, prompts: {"forward": 1.0 + layers}
    )
    found = Slices(args.optimizer, args.run).seconds(model, Rows(1, 8, 8), None)
    assert found == {"forward": 10.0}  # 1 and a layer each for 9


def test_the_fastest_round_counts(monkeypatch):
    seconds = iter([9, 9, 3, 2, 4, 5, 6])

    class Times:
        end_of = print

        def take(self):
            return {"forward": self.next} if hasattr(self, "next") else {}

    times = Times()
    monkeypatch.setattr(slices, "StepTimes", lambda: times)
    assert slices._fastest(lambda end_of: setattr(times, "next", next(seconds))) == {"forward": 2}
