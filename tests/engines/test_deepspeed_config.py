import pytest

from dschat.engines.deepspeed_config import (
    get_eval_ds_config,
    get_train_ds_config,
    merged,
    tensor_parallel_size,
)


def test_deepspeed_counts_the_ranks_of_a_batch_itself():
    config = get_train_ds_config(stage=2, per_device_batch_size=4, gradient_accumulation_steps=2)
    assert "train_batch_size" not in config
    assert (config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]) == (4, 2)


def test_tensor_ranks_are_asked_for_where_there_are_some():
    for make in (get_train_ds_config, get_eval_ds_config):
        assert "tensor_parallel" not in make(stage=0)
        assert tensor_parallel_size(make(stage=0)) == 1
        assert tensor_parallel_size(make(stage=0, tensor_parallel_size=2)) == 2


@pytest.mark.parametrize(("dtype", "enabled"), [("bf16", {"bf16"}), ("fp16", {"fp16"}), ("fp32", set())])
def test_one_precision_is_enabled(dtype, enabled):
    for config in (get_train_ds_config(stage=0, dtype=dtype), get_eval_ds_config(stage=0, dtype=dtype)):
        assert {name for name in ("bf16", "fp16") if config.get(name, {}).get("enabled")} == enabled


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_offload_moves_what_the_stage_shards(stage):
    zero = get_train_ds_config(stage=stage, offload=True)["zero_optimization"]
    assert zero["stage"] == stage
    assert zero.get("offload_optimizer", {}).get("device") == ("cpu" if stage else None)
    assert zero.get("offload_param", {}).get("device") == ("cpu" if stage == 3 else None)


@pytest.mark.parametrize(("stage", "frozen"), [(0, 0), (1, 0), (2, 0), (3, 3)])
def test_a_frozen_model_is_sharded_at_stage_three_only(stage, frozen):
    assert get_eval_ds_config(stage=stage)["zero_optimization"]["stage"] == frozen


def test_a_configuration_is_fresh_each_time():
    first = get_train_ds_config(stage=1)
    first["zero_optimization"]["stage"] = 9
    assert get_train_ds_config(stage=1)["zero_optimization"]["stage"] == 1


def test_an_override_replaces_single_entries_and_leaves_its_own_content_alone():
    override = {"zero_optimization": {"reduce_bucket_size": 7}, "wall_clock_breakdown": True}
    config = merged(get_train_ds_config(stage=2), override)
    assert config["zero_optimization"]["stage"] == 2
    assert config["zero_optimization"]["reduce_bucket_size"] == 7
    assert config["wall_clock_breakdown"]
    assert override["zero_optimization"] == {"reduce_bucket_size": 7}


def test_zero_3_alone_gets_a_disk_and_the_settings_of_zeropp():
    options = {"offload": True, "nvme_path": "d", "zeropp": {"zero_hpz_partition_size": 2}}
    zero = get_train_ds_config(stage=3, **options)["zero_optimization"]
    assert zero["offload_optimizer"] == zero["offload_param"] == {"device": "nvme", "nvme_path": "d"}
    assert zero["zero_hpz_partition_size"] == 2
    zero = get_train_ds_config(stage=2, **options)["zero_optimization"]
    assert zero["offload_optimizer"] == {"device": "cpu"}
    assert "zero_hpz_partition_size" not in zero
