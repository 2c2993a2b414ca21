"""Decoding without an engine."""

from tiny import tiny_config
from transformers import AutoModelForCausalLM

from dschat.planning.meta_pass import Rows
from dschat.rlhf.rollout.slice_decoding import decode


def test_prompts_are_read_and_tokens_written():
    model = AutoModelForCausalLM.from_config(tiny_config("llama", 384))
    widths, ends = [], []
    model.register_forward_pre_hook(
        lambda module, args, options: widths.append(tuple(map(int, options["input_ids"].shape))),
        with_kwargs=True,
    )
    decode(model, Rows(2, 16, 3), ends.append)
    assert ends == ["reading", "writing"]
    assert widths[0] == (2, 16)
    assert set(widths[1:]) == {(2, 1)}  # one where the pass is recorded, else three
