"""The flags of DeepSpeed's Hybrid Engine."""

import pytest
from step_flags import assert_refused, rlhf

ON = "--enable_hybrid_engine"


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--inference_tp_size=2"], ["--inference_tp_size 2 needs --enable_hybrid_engine"]),
        (["--tp_gather_partition_size=4"], ["--tp_gather_partition_size 4 needs --enable_hybrid_engine"]),
        (["--release_inference_cache"], ["--release_inference_cache needs --enable_hybrid_engine"]),
        (["--unpin_actor_parameters"], ["--unpin_actor_parameters needs --enable_hybrid_engine"]),
        ([ON, "--inference_tp_size=0"], ["--inference_tp_size must be at least 1, got 0"]),
        ([ON, "--inference_tp_size=2"], ["--inference_tp_size 2", "needs --actor_zero_stage 3, got 0"]),
        ([ON, "--unpin_actor_parameters", "--rollout_gather=always"], ["leave one of them out"]),
    ],
)
def test_a_setting_that_cannot_work_names_flag_value_and_remedy(argv, parts):
    assert_refused(argv, parts)


def test_deepspeed_gets_what_the_flags_of_deepspeed_chat_say():
    assert rlhf().hybrid_engine is None
    flags = ("--inference_tp_size=2", "--tp_gather_partition_size=4", "--release_inference_cache")
    lengths = ("--max_prompt_seq_len=100", "--max_answer_seq_len=28")
    args = rlhf(ON, "--actor_zero_stage=3", "--unpin_actor_parameters", *flags, *lengths)
    assert args.hybrid_engine == {
        "enabled": True,
        "max_out_tokens": 128,
        "inference_tp_size": 2,
        "release_inference_cache": True,
        "pin_parameters": False,
        "tp_gather_partition_size": 4,
    }


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        ([], ""),
        (["--rollout_backend=hf"], ""),
        (["--rollout_backend=static"], "--rollout_backend static was given"),
        (["--actor_lora_dim=4"], "they read no adapters of PEFT"),
        (["--actor_tensor_parallel_size=2"], "tensor ranks share the layers"),
    ],
)
def test_flags_that_leave_no_room_for_kernels(argv, reason):
    assert rlhf(ON, *argv).without_kernels == reason
