"""Checkpoints without engines: what is kept, chosen, refused and survived."""

import errno
import json
import os
import random
import shutil
import stat
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file
from tiny import save_tiny_model

from dschat.arguments import STEPS, RunDescription, parse_arguments, settings_of
from dschat.checkpoints import checkpoint
from dschat.checkpoints.checkpoint import Checkpoints
from dschat.checkpoints.resume import begin_run
from dschat.checkpoints.state import Placement
from dschat.errors import Stopped, UserError
from dschat.export.upstream import UpstreamModel
from dschat.runs.atomic_folder import facts_of
from dschat.runs.output_folder import check_run_folder, write_summary


def description(folder, *more: str) -> RunDescription:
    required = ["--model_name_or_path", "m", "--output_dir", str(folder)]
    return parse_arguments("sft", [*required, "--save_interval", "1", *more]).description


def saved(folder, *steps: int, more: tuple[str, ...] = ()) -> Checkpoints:
    """A run that has made checkpoints after these steps."""
    folder.mkdir(exist_ok=True)
    checkpoints = begin_run(description(folder, *more), data="key")
    for step in steps:
        checkpoints.save(step, engines={}, parts={"done": step})
    return checkpoints


def resumed(folder, *more: str, data: str = "key"):
    """Where a run that resumes stands."""
    checkpoints = begin_run(description(folder, "--resume_from_checkpoint", *more), data=data)
    try:
        return checkpoints.load({})
    finally:
        checkpoints._requests.release()


def names(folder) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


class Everything:
    """A part with values, tensors that all ranks share, and a tensor of the rank's own."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state

    def placement(self, key: str) -> Placement:
        return Placement.SUM if key == "sum" else Placement.REPLICATED

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.state = state_dict


def test_parts_and_random_states_come_back(tmp_path):
    checkpoints = begin_run(description(tmp_path), data="key")
    tensors = {"ema": torch.arange(6.0).view(2, 3), "half": torch.ones(2, dtype=torch.bfloat16)}
    tensors["sum"] = torch.ones(1)
    values = {"kl_coef": 0.1 + 0.2, "best": {"step": 3, "loss": None}}
    checkpoints.save(7, engines={}, parts={"all": Everything(values | tensors), "seconds": 2.5})
    drawn = random.random(), numpy.random.rand(), torch.rand(1).item()
    begun = resumed(tmp_path)
    assert (begun.step, begun.values) == (7, {"all": values, "seconds": 2.5})
    found = Everything({})
    begun.restore({"all": found})
    assert {name: found.state.pop(name) for name in values} == values
    torch.testing.assert_close(found.state, tensors, rtol=0, atol=0)
    assert (random.random(), numpy.random.rand(), torch.rand(1).item()) == drawn


def test_the_files_of_a_checkpoint_have_the_names_that_earlier_versions_read(tmp_path):
    parts = {
        "average": Everything({"w": torch.ones(2)}),
        "trainer": Everything({"sum": torch.ones(1), "x": 1}),
    }
    begin_run(description(tmp_path), data="key").save(3, engines={}, parts={**parts, "seconds": 1.5})
    folder = tmp_path / "checkpoints" / "step_00000003"
    assert list(load_file(folder / "shared.safetensors")) == ["average.w"]
    own = load_file(folder / "rank_00000.safetensors")
    assert [name for name in own if not name.startswith("random.")] == ["trainer.sum"]
    progress = json.loads((folder / "progress.json").read_text())
    assert progress["state"] == {"trainer": {"x": 1}, "seconds": 1.5}
    assert {"format", "program", "data", "models", "world_size", "sizes", "settings", "step"} <= set(progress)
    assert progress["step"] == 3


def test_a_first_run_begins_at_step_0(tmp_path, capsys):
    assert resumed(tmp_path).step == 0
    assert "starting from the beginning" in capsys.readouterr().out


def test_only_the_newest_are_kept_and_all_are_private(tmp_path):
    saved(tmp_path, 1, 2, 3, 4)
    assert names(tmp_path) == ["step_00000003", "step_00000004"]
    saved(tmp_path / "all", 1, 2, 3, more=("--save_total_limit", "0"))
    assert len(names(tmp_path / "all")) == 3
    root = tmp_path / "checkpoints"
    for path in (root, *root.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)


def test_copies_that_someone_made_are_left_alone(tmp_path):
    checkpoints = saved(tmp_path, 1)
    root = tmp_path / "checkpoints"
    shutil.copytree(root / "step_00000001", root / "step_00000001.good")
    for step in (2, 3):
        checkpoints.save(step, engines={}, parts={})
    assert names(tmp_path) == ["step_00000001.good", "step_00000002", "step_00000003"]
    assert resumed(tmp_path).step == 3


def corrupt(path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["a bit", "cut short", "missing"])
def test_a_damaged_checkpoint_is_named_and_the_previous_one_used(how, tmp_path, capsys):
    saved(tmp_path, 1, 2)
    path = tmp_path / "checkpoints" / "step_00000002" / "rank_00000.safetensors"
    {"a bit": corrupt, "cut short": lambda p: os.truncate(p, 10), "missing": os.unlink}[how](path)
    assert resumed(tmp_path).step == 1
    told = capsys.readouterr().out
    assert "step_00000002 is passed over: rank_00000.safetensors" in told
    with pytest.raises(UserError, match=r"step_00000002 cannot be used: rank_00000.safetensors"):
        resumed(tmp_path, str(tmp_path / "checkpoints" / "step_00000002"))
    corrupt(tmp_path / "checkpoints" / "step_00000001" / "progress.json")
    with pytest.raises(UserError, match=r"no checkpoint in .* is intact"):
        resumed(tmp_path)


def test_no_byte_of_the_mark_may_change(tmp_path):
    saved(tmp_path, 1)
    mark = tmp_path / "checkpoints" / "step_00000001" / "complete.json"
    content = mark.read_bytes()
    whole = facts_of(mark.parent)
    assert whole["serial"] == 1
    for place in range(len(content)):
        mark.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert facts_of(mark.parent) in (None, whole), place  # a blank that became another changes nothing


def test_a_damaged_checkpoint_is_not_counted_and_goes_when_a_new_one_is_complete(tmp_path):
    saved(tmp_path, 1, 2)
    corrupt(tmp_path / "checkpoints" / "step_00000002" / "progress.json")
    checkpoints = begin_run(description(tmp_path, "--resume_from_checkpoint"), data="key")
    checkpoints.save(3, engines={}, parts={})
    assert names(tmp_path) == ["step_00000001", "step_00000003"]


def test_a_half_written_folder_is_never_chosen(tmp_path, monkeypatch, capsys):
    checkpoints = saved(tmp_path, 1)

    def killed(*_, **__) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dschat.runs.atomic_folder.write_json", killed)  # between the move and the mark
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(2, engines={}, parts={})
    monkeypatch.setattr("dschat.checkpoints.checkpoint.put_in_place", killed)  # before the move
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(3, engines={}, parts={})
    monkeypatch.undo()
    assert names(tmp_path) == [".saving-step_00000003", "step_00000001", "step_00000002"]
    assert resumed(tmp_path).step == 1
    assert "step_00000002 is passed over: it was never finished" in capsys.readouterr().out
    begin_run(description(tmp_path, "--resume_from_checkpoint"), data="key").save(2, engines={}, parts={})
    assert names(tmp_path) == ["step_00000001", "step_00000002"]


def test_a_full_disk_keeps_the_previous_checkpoint_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    checkpoints = saved(tmp_path, 1)

    def full(*_) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    checkpoints.save(2, engines={}, parts={})
    told = capsys.readouterr().out
    assert "WARNING: no checkpoint at step 2" in told
    assert "No space left on device" in told
    assert "step_00000001, is kept" in told
    assert names(tmp_path) == ["step_00000001"]
    monkeypatch.undo()
    checkpoints.save(3, engines={}, parts={})
    assert resumed(tmp_path).step == 3


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--learning_rate", "1e-3"], ["--learning_rate is 0.001 and was 1e-05"]),
        (["--seed", "5"], ["--seed is 5 and was 1234"]),
        (["--gradient_accumulation_steps", "2"], ["--per_device_train_batch_size", "is 32 and was 16"]),
        (["--zero_stage", "2"], ["--zero_stage is 2 and was 0"]),
    ],
)
def test_a_harmful_difference_ends_the_run_with_the_name_of_the_flag(flags, parts, tmp_path):
    saved(tmp_path, 1)
    with pytest.raises(UserError) as error:
        resumed(tmp_path, "latest", *flags)
    for part in parts:
        assert part in str(error.value)


def test_other_data_end_the_run(tmp_path):
    saved(tmp_path, 1)
    with pytest.raises(UserError, match="--data_path: what it names has changed"):
        resumed(tmp_path, data="other")


def test_models_are_compared_by_content_wherever_they_lie(tmp_path, capsys):
    for name in ("base", "moved", "other"):
        save_tiny_model(tmp_path / name, seed=3 if name == "other" else 2)

    def begin(model: str, *more: str, flag: str = "--model_name_or_path") -> Checkpoints:
        args = description(tmp_path / "run", "--model_name_or_path", str(tmp_path / model), *more)
        return begin_run(args, data="key", models=[UpstreamModel(str(tmp_path / model), flag, None)])

    (tmp_path / "run").mkdir()
    begin("base").save(1, engines={}, parts={})
    begin("moved", "--resume_from_checkpoint")
    assert f"--model_name_or_path {tmp_path / 'moved'} (was " in capsys.readouterr().out
    with pytest.raises(UserError, match="--model_name_or_path names another model, or other weights, than"):
        begin("other", "--resume_from_checkpoint")
    with pytest.raises(UserError, match="--reward_model is given and was not when"):
        begin("base", "--resume_from_checkpoint", flag="--reward_model")


def test_harmless_differences_are_said(tmp_path, capsys):
    saved(tmp_path, 1)
    flags = ["--per_device_train_batch_size=8", "--gradient_accumulation_steps=2", "--eval_interval=3"]
    assert resumed(tmp_path, "latest", *flags).step == 1
    told = capsys.readouterr().out
    for part in ("--per_device_train_batch_size 8 (was 16)", "--eval_interval 3 (was 0)"):
        assert part in told
    assert "save" not in told.split("other than")[1].split("saved:")[1]


# Everything else decides what is learned.
FREE = {
    *("data_output_path", "preprocessing_num_workers", "gradient_checkpointing", "output_dir", "debug"),
    *("enable_tensorboard", "tensorboard_path", "report_to", "local_rank", "deepspeed", "compute_fp32_loss"),
    *(
        "save_interval",
        "eval_command",
        "eval_command_timeout",
        "save_minutes",
        "save_total_limit",
        "host_timeout",
        "resume_from_checkpoint",
        "print_loss",
    ),
    "overwrite_output_dir",
    "sequence_parallel_size",
    *("per_device_eval_batch_size", "eval_interval", "eval_iters", "num_padding_at_beginning"),
    *("offload_reference_model", "offload_reward_model", "rollout_gather", "print_answers"),
    *(
        "print_answers_interval",
        "trust_remote_code",
        "actor_gradient_checkpointing",
        "critic_gradient_checkpointing",
    ),
    *(
        "export_actor",
        "export_model",
        "max_kl",
        "min_entropy_ratio",
        "max_length_ratio",
        "min_eos_ratio",
        "patience",
    ),
    *("max_skipped_steps", "auto_micro_batch", "rollout_tolerance", "rollout_on_mismatch"),
    *("inference_tp_size", "tp_gather_partition_size", "release_inference_cache", "unpin_actor_parameters"),
    *("offload_nvme_path", "zero_hpz_partition_size"),
    *("pad_to_multiple_of", "packing", "reuse_first_pass", "profile", "forecast", "force"),
    # What these name is compared by its content.
    *("model_name_or_path", "actor_model_name_or_path", "critic_model_name_or_path"),
    *("reward_model_name_or_path", "guard_reward_model_name_or_path"),
    *("data_path", "eval_data_path", "sft_only_data_path"),
    *("reward_batch_size", "reward_timeout", "reward_endpoint_timeout", "reward_endpoint_retries"),
}
DIVIDED = {
    *("gradient_accumulation_steps", "per_device_train_batch_size", "per_device_training_batch_size"),
    *("per_device_generation_batch_size", "generation_batches"),
}
REQUIRED = {
    "rlhf": ["--actor_model_name_or_path", "a", "--critic_model_name_or_path", "c"],
    "inspect": ["--model_name_or_path", "m"],
}


@pytest.mark.parametrize("step", [step for step in STEPS if step != "inspect"])
def test_a_flag_may_change_at_resume_only_where_that_is_intended(step):
    known = settings_of(parse_arguments(step, REQUIRED.get(step, REQUIRED["inspect"])))
    for name, setting in known.items():
        intended = "free" if name in FREE else "divided" if name in DIVIDED else "same"
        assert setting.at_resume == intended, name


def test_an_unfinished_run_is_not_overwritten_but_where_that_is_asked_for(tmp_path):
    saved(tmp_path, 1)
    with pytest.raises(
        UserError, match=r"step_00000001: add --resume_from_checkpoint latest; or .*overwrite"
    ):
        check_run_folder(description(tmp_path))
    check_run_folder(description(tmp_path, "--resume_from_checkpoint"))
    check_run_folder(overwriting := description(tmp_path, "--overwrite_output_dir"))
    begin_run(overwriting, data="key")
    assert not (tmp_path / "checkpoints").exists()


def test_a_launch_that_torchrun_starts_again_goes_on_where_it_had_begun(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    saved(tmp_path, 1)  # by an earlier launch: this one is refused, and so is its second attempt
    for attempt in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        with pytest.raises(UserError, match="add --resume_from_checkpoint latest"):
            check_run_folder(description(tmp_path))
    overwriting = description(tmp_path, "--overwrite_output_dir")
    begin_run(overwriting, data="key").save(2, engines={}, parts={})
    check_run_folder(overwriting)
    assert begin_run(overwriting, data="key")._chosen.name == "step_00000002"
    write_summary(str(tmp_path), {})
    with pytest.raises(SystemExit, match="0"):
        check_run_folder(overwriting)


@pytest.mark.parametrize("name", ["notes.txt", "weights/model.pt"])
def test_a_folder_called_like_a_checkpoint_is_refused_also_at_resume(name, tmp_path):
    saved(tmp_path, 1)
    place = tmp_path / "checkpoints" / "step_00000002" / name
    place.parent.mkdir(parents=True)
    place.write_text("someone's own")
    with pytest.raises(UserError, match=r"holds .*: checkpoints/step_00000002 \(no checkpoint of a run\)"):
        check_run_folder(description(tmp_path, "--resume_from_checkpoint"))


def test_a_checkpoint_is_due_by_number_by_time_by_signal_and_at_the_end(tmp_path, monkeypatch):
    checkpoints = begin_run(description(tmp_path, "--save_interval=3", "--save_minutes=2"), data="key")
    checkpoints.load({})
    assert [step for step in range(1, 8) if checkpoints.is_due(step)] == [3, 6]
    now = checkpoint.time.monotonic()
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now + 121)
    assert checkpoints.is_due(4)
    monkeypatch.undo()
    assert checkpoints.is_due(7, is_last=True)
    checkpoints.load({})
    os.kill(os.getpid(), 15)
    assert checkpoints.is_due(7)
    with pytest.raises(Stopped, match=r"step 7 as SIGTERM asked; saved in .*step_00000007\. Go on with"):
        checkpoints.save(7, engines={}, parts={})
    assert resumed(tmp_path, "latest", "--save_interval=3").step == 7


def test_without_an_output_folder_a_signal_ends_the_run_and_says_what_is_lost():
    checkpoints = begin_run(parse_arguments("sft", ["--model_name_or_path", "m"]).description, data="key")
    checkpoints.load({})
    os.kill(os.getpid(), 10)
    assert checkpoints.is_due(1)
    with pytest.raises(Stopped, match="without --output_dir nothing could be kept"):
        checkpoints.save(1, engines={}, parts={})


@pytest.mark.parametrize("flag", ["--save_interval=1", "--save_minutes=1", "--resume_from_checkpoint"])
def test_checkpoints_need_a_folder(flag):
    with pytest.raises(UserError, match="needs --output_dir"):
        parse_arguments("sft", ["--model_name_or_path", "m", flag])


def test_metrics_go_back_to_the_step_of_the_checkpoint(tmp_path):
    tmp_path.joinpath("metrics.jsonl").write_text('{"step": 1}\n')
    checkpoints = saved(tmp_path, 1)
    with tmp_path.joinpath("metrics.jsonl").open("a") as file:
        file.write('{"step": 2}\n{"st')
    assert checkpoints is not None
    resumed(tmp_path)
    lines = tmp_path.joinpath("metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 1}]
