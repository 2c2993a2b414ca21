"""ColossalChat's command lines become step 2's."""

import json

import pytest

from dschat.arguments import TrainRmCall, parse_arguments
from dschat.errors import UserError

MODEL_AND_DATA = ["--pretrain", "M", "--dataset", "D"]


def words(*argv: str, on_gpu: bool = False, has_flash_attention: bool = False) -> list[str]:
    call = TrainRmCall.parse([*MODEL_AND_DATA, *argv])
    return call.words(on_gpu=on_gpu, has_flash_attention=has_flash_attention)


def step_2(*argv: str, **machine: bool):
    """Step 2's arguments for a command line of train_rm.py."""
    return parse_arguments("reward", words(*argv, **machine))


def test_the_first_line_of_its_usage_says_all_of_this():
    line = "--plugin zero2 --loss_fn log_sig --lr 5e-6 --max_epochs 3 --save_dir S"
    args = step_2(*line.split())
    assert (args.model.model_name_or_path, args.data.data_path) == ("M", ["D"])
    assert (args.model.zero_stage, args.run.offload, args.reward.loss_fn) == (2, False, "log_sig")
    assert (args.model.learning_rate, args.optimizer.num_train_epochs) == (5e-6, 3)
    assert args.run.output_dir == "S/modeling"
    # All of the data are trained on: nothing is held out, and no other step has a share.
    assert (args.data.data_split, args.data.eval_fraction) == ("0,1,0", 0)


def test_its_defaults_are_its_own():
    args = step_2()
    assert (args.model.zero_stage, args.run.offload) == (3, False)  # gemini
    assert args.batch.max_seq_len == 2048
    assert args.batch_sizes == {"--per_device_train_batch_size x --gradient_accumulation_steps": 32}
    assert (args.batch.per_device_train_batch_size, args.optimizer.gradient_accumulation_steps) == (4, 8)
    assert (args.model.learning_rate, args.model.weight_decay) == (5e-6, 0.1)
    assert (args.run.save_interval, args.run.output_dir) == (1000, "output/modeling")
    assert (args.optimizer.num_train_epochs, args.optimizer.warmup_ratio) == (3, 0.025)
    assert (args.run.dtype, step_2(on_gpu=True).run.dtype) == ("bf16", "fp16")


@pytest.mark.parametrize(
    ("plugin", "stage", "offload"),
    [("gemini_auto", 3, True), ("zero2_cpu", 2, True), ("ddp", 0, False), ("3d", 0, False)],
)
def test_a_plugin_says_what_is_sharded(plugin, stage, offload):
    args = step_2("--plugin", plugin)
    assert (args.model.zero_stage, args.run.offload) == (stage, offload)


def test_sizes_belong_to_the_plugin_3d():
    flags = ("--plugin", "3d", "--tp", "2", "--pp", "2", "--sp", "1", "--grad_checkpoint")
    line = words(*flags)
    assert line[line.index("--tensor_parallel_size") + 1] == "2"
    assert line[line.index("--pipeline_parallel_size") + 1] == "2"
    assert "--sequence_parallel_size" not in line
    assert "--gradient_checkpointing" in line
    args = step_2(*flags, on_gpu=True)
    assert args.parallel_sizes == {"tensor": 2, "pipeline": 2, "sequence": 1}
    assert args.run.dtype == "bf16"
    with pytest.raises(UserError, match="--tp 2: --plugin zero2 shares the work otherwise"):
        words("--plugin", "zero2", "--tp", "2")


def test_flash_attention_is_taken_where_it_can_run_and_else_told(capsys):
    flag = "--use_flash_attn"
    assert (
        step_2(flag, on_gpu=True, has_flash_attention=True).model.attn_implementation == "flash_attention_2"
    )
    assert capsys.readouterr().out == ""
    for machine, why in (
        ({}, "there is no GPU"),
        ({"on_gpu": True}, "the package flash-attn is not installed"),
    ):
        assert step_2(flag, **machine).model.attn_implementation == "auto"
        assert f"--use_flash_attn: {why}, so PyTorch's own attention" in capsys.readouterr().out


def test_adapters_of_a_file_are_trained_alone_at_the_one_learning_rate():
    args = step_2("--lora_config", "lora.json", "--lr", "1e-4")
    assert (args.model.lora_config, args.model.lora_learning_rate) == ("lora.json", 1e-4)
    assert args.optimizer.only_optimize_lora


def test_flags_of_step_2_pass_and_win():
    line = "--eval_dataset E F --zero_stage 1 --dtype fp32 --num_warmup_steps 5 --no_enable_tensorboard"
    args = step_2(*line.split(), "--overwrite_output_dir", "--local_rank=1")
    assert args.data.eval_data_path == ["E", "F"]
    assert (args.model.zero_stage, args.run.dtype) == (1, "fp32")
    assert (args.optimizer.num_warmup_steps, args.optimizer.warmup_ratio) == (5, None)
    assert (args.run.enable_tensorboard, args.run.overwrite_output_dir, args.run.local_rank) == (
        False,
        True,
        1,
    )
    assert step_2("--warmup_steps", "7").optimizer.num_warmup_steps == 7


def test_the_other_flags_have_their_names_here():
    line = "--checkpoint_path latest --mixed_precision bf16 --grad_clip 0.5 --max_length 64 --log_dir L"
    args = step_2(*line.split(), "--batch_size=2", "--accumulation_steps=3", "--save_interval=7", on_gpu=True)
    assert (args.run.resume_from_checkpoint, args.run.dtype) == ("latest", "bf16")
    assert (args.optimizer.max_grad_norm, args.batch.max_seq_len) == (0.5, 64)
    assert args.run.tensorboard_path == "L"
    assert (args.batch.per_device_train_batch_size, args.optimizer.gradient_accumulation_steps) == (2, 3)
    assert args.run.save_interval == 7


@pytest.mark.parametrize(
    ("flag", "hint"),
    [
        ("--pretrian", r"unknown flag --pretrian \(did you mean --pretrain\?\)"),
        ("--accumulation_step", "did you mean --accumulation_steps"),
        ("--tokenizer_dir", "not there: the tokenizer is the model's"),
        ("--lora_rank", "here: --lora_dim"),
    ],
)
def test_a_flag_that_is_not_there_is_an_error_with_the_nearest_name(flag, hint):
    with pytest.raises(UserError, match=hint):
        words(flag, "x")


def test_model_and_data_are_required():
    with pytest.raises(UserError, match="required and not given: --pretrain, --dataset"):
        TrainRmCall.parse(["--plugin", "ddp"])


def test_the_flags_are_written_to_the_config_file_and_read_from_there(tmp_path):
    path = tmp_path / "new" / "config.json"
    TrainRmCall.parse(
        [*MODEL_AND_DATA, "--config_file", str(path), "--lr", "2e-6", "--seed", "3"]
    ).write_config()
    written = json.loads(path.read_text())
    assert (written["pretrain"], written["dataset"], written["lr"], written["seed"]) == ("M", ["D"], 2e-6, 3)
    again = TrainRmCall.parse(["--config", str(path)])
    assert again.arguments.lr == 2e-6
    assert again.of_step_2["seed"] == 3


def test_a_config_file_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    call = TrainRmCall.parse([*MODEL_AND_DATA, "--config_file", str(tmp_path / "file" / "config.json")])
    with pytest.raises(UserError, match=r"--config_file .* cannot be written"):
        call.write_config()
