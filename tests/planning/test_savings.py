"""Which flags cut most, and which fit."""

from functools import partial

from plans import arguments, planned

from dschat.planning.savings import cheaper_first, cut_most, fitting, savings_lines


def test_the_changes_that_cut_most_are_those_of_messages_about_memory():
    args = arguments("sft", "--zero_stage=0")
    plan_of = partial(planned, ranks=4)
    plan = plan_of(args)
    found = cut_most(args, plan, plan_of)
    assert 1 <= len(found) <= 3
    assert [saved for _, saved in found] == sorted((saved for _, saved in found), reverse=True)
    for change, saved in found:
        assert saved == plan.peak - plan_of(args.with_flags(change.flags)).peak
    (line,) = savings_lines(found)
    assert "--max_seq_len 512 -> 256" in line
    assert savings_lines([]) == []


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
