"""Which flags cut most, and which fit."""

import re
from functools import partial

from plans import arguments, planned

from dschat.planning.plan import GB
from dschat.planning.savings import cheaper_first, fitting, would_cut_most
from dschat.runs.measured_choices import MeasuredChoices


def test_the_changes_that_cut_most_are_those_of_messages_about_memory(tmp_path):
    args = arguments("sft", "--zero_stage=0")
    made = []

    def plan_of(args):
        made.append(args)
        return planned(args, ranks=4)

    plan = planned(args, ranks=4)
    (line,) = would_cut_most(args, plan, plan_of, MeasuredChoices(folder=tmp_path))
    shorter = (plan.peak - planned(args.with_flags({"max_seq_len": 256}), ranks=4).peak) / GB
    assert f"--max_seq_len 512 -> 256 (-{shorter:.2f} GB)" in line
    saved = [float(text) for text in re.findall(r"\(-([0-9.]+) GB\)", line)]
    assert 1 <= len(saved) <= 3
    assert saved == sorted(saved, reverse=True)
    # The machine remembers what was planned, for these flags alone.
    tried = len(made)
    assert would_cut_most(args, plan, plan_of, MeasuredChoices(folder=tmp_path)) == [line]
    assert len(made) == tried > 0
    other = args.with_flags({"max_seq_len": 128})
    assert would_cut_most(other, planned(other, ranks=4), plan_of, MeasuredChoices(folder=tmp_path)) != [line]
    assert len(made) > tried


def test_no_line_where_no_change_saves_memory(tmp_path):
    args = arguments("sft")
    plan = planned(args)
    assert would_cut_most(args, plan, lambda _: plan, MeasuredChoices(folder=tmp_path)) == []


def test_cheaper_settings_come_first_and_keep_the_batch():
    args = arguments("sft", "--per_device_train_batch_size=4")
    found = list(cheaper_first(args, [""], with_lora=False))
    assert found[0]["zero_stage"] == 0
    assert not found[0]["gradient_checkpointing"]
    assert not found[0]["offload"]
    assert {f["per_device_train_batch_size"] * f["gradient_accumulation_steps"] for f in found} == {4}
    assert all("lora_dim" not in flags for flags in found)


def test_the_first_that_fits_is_taken():
    args = arguments("sft")
    roomy, tight = (fitting(args, [""], partial(planned, memory=m), with_lora=False) for m in (80e9, 0.72e9))
    assert roomy is not None
    assert roomy[0]["per_device_train_batch_size"] == 16
    assert tight is not None
    assert tight[1].fits
    assert tight[0]["per_device_train_batch_size"] < 16 or tight[0]["gradient_checkpointing"]
    assert fitting(args, [""], partial(planned, memory=0.6001e9), with_lora=True) is None
