"""The flags that all DeepSpeed engines of a run share."""

import pytest
from step_flags import assert_refused, rlhf

STAGE3 = "--actor_zero_stage=3"


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--zero_quantized_weights"], ["--zero_quantized_weights needs --actor_zero_stage 3 or --critic"]),
        (["--zero_quantized_gradients"], ["--zero_quantized_gradients needs --actor_zero_stage 3"]),
        (["--zero_hpz_partition_size=2"], ["--zero_hpz_partition_size 2 needs --actor_zero_stage 3"]),
        (["--zero_hpz_partition_size=0"], ["--zero_hpz_partition_size must be at least 1, got 0"]),
        (["--enable_mixed_precision_lora"], ["--enable_mixed_precision_lora needs --actor_zero_stage 3"]),
        (["--enable_mixed_precision_lora", STAGE3], ["add --actor_lora_dim or --critic_lora_dim"]),
        (
            [STAGE3, "--zero_hpz_partition_size=2", "--critic_tensor_parallel_size=2"],
            ["--zero_hpz_partition_size 2 cannot be combined with --critic_tensor_parallel_size"],
        ),
        (
            [STAGE3, "--zero_quantized_gradients", "--actor_tensor_parallel_size=2"],
            ["--zero_quantized_gradients cannot be combined with --actor_tensor_parallel_size"],
        ),
        (["--offload_nvme_path=d"], ["--offload_nvme_path d says where --offload", "add --offload"]),
        (
            ["--offload_nvme_path=d", "--offload", "--actor_zero_stage=2", "--critic_zero_stage=2"],
            ["--offload_nvme_path d needs --actor_zero_stage 3 or --critic_zero_stage 3"],
        ),
    ],
)
def test_a_setting_that_cannot_work_names_flag_value_and_remedy(argv, parts):
    assert_refused(argv, parts)


def test_deepspeed_gets_the_settings_of_zeropp_that_are_on():
    assert rlhf().run.zeropp == {}
    run = rlhf(STAGE3, "--zero_hpz_partition_size=8", "--zero_quantized_weights").run
    assert run.zeropp == {"zero_hpz_partition_size": 8, "zero_quantized_weights": True}
    run = rlhf(
        STAGE3, "--enable_mixed_precision_lora", "--actor_lora_dim=8", "--zero_quantized_gradients"
    ).run
    assert run.zeropp == {"zero_quantized_nontrainable_weights": True, "zero_quantized_gradients": True}
    assert run.quantized == ["--enable_mixed_precision_lora", "--zero_quantized_gradients"]
