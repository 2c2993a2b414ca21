"""What a run may write into its output folder, and what of an older run it removes."""

import json
from pathlib import Path

import pytest

from dschat.arguments import RunDescription, parse_arguments
from dschat.errors import UserError
from dschat.runs.atomic_folder import put_in_place
from dschat.runs.export_files import replacing_export
from dschat.runs.output_folder import check_finished, check_run_folder, read_summary, start_run, write_summary


def description(folder: Path, *more: str) -> RunDescription:
    return parse_arguments(
        "sft", ["--model_name_or_path", "m", "--output_dir", str(folder), *more]
    ).description


def ppo_description(folder: Path, *more: str) -> RunDescription:
    models = ("--actor_model_name_or_path=a", "--critic_model_name_or_path=c")
    return parse_arguments("rlhf", [*models, "--output_dir", str(folder), *more]).description


def write(path: Path, text: str = "someone's own") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def export(folder: Path, *names: str) -> None:
    with replacing_export(folder) as place:
        for name in ("config.json", "model.safetensors", "adapter/adapter_model.safetensors", *names):
            write(place / name, "a run's")


def checkpoint(root: Path, name: str) -> None:
    write(root / f".saving-{name}" / "progress.json", "{}")
    put_in_place(root / f".saving-{name}", root / name, {}, serial=1)


def finished(folder: Path, start: RunDescription | None = None, models: tuple[str, ...] = ("",)) -> None:
    """What a run leaves, with a checkpoint, a curve, and half of what it was writing when it was killed."""
    folder.mkdir(exist_ok=True)
    start_run(start or description(folder))
    for model in models:
        export(folder / model)
        write(folder / model / ".export-abcd1234" / "model.safetensors")
    checkpoint(folder / "checkpoints", "step_00000002")
    for name in (".saving-step_00000004", ".replaced-step_00000002", ".resharded-step_00000002"):
        write(folder / "checkpoints" / name / "progress.json")
    write(folder / "metrics.jsonl", "{}\n")
    write(folder / "tensorboard" / "events.out.tfevents.1")
    write_summary(str(folder), {"step": "sft", "loss": float("nan")})


def contents(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()} - LEFT


LEFT = {".run.lock", "log.txt"}
"""Written when a run looks at its folder."""


def test_a_finished_run_is_not_overwritten_without_a_word(tmp_path):
    finished(tmp_path)
    before = contents(tmp_path)
    for check in (
        lambda: check_finished(description(tmp_path).run),
        lambda: check_run_folder(description(tmp_path)),
    ):
        with pytest.raises(UserError, match=r"that finished on \d{4}-.*another folder, or give --overwrite"):
            check()
    assert contents(tmp_path) == before
    assert read_summary(tmp_path) == {"step": "sft", "loss": None}


@pytest.mark.parametrize("from_what", ["latest", "checkpoints/step_00000002"])
def test_a_finished_run_that_is_resumed_says_so_and_stays_as_it_is(from_what, tmp_path, capsys):
    finished(tmp_path)
    before = contents(tmp_path)
    asked = from_what if from_what == "latest" else str(tmp_path / from_what)
    with pytest.raises(SystemExit) as end:
        check_finished(description(tmp_path, "--resume_from_checkpoint", asked).run)
    assert end.value.code == 0
    assert "holds a run that finished on" in capsys.readouterr().out
    assert contents(tmp_path) == before


def test_a_checkpoint_of_another_run_is_no_reason_to_overwrite_a_finished_one(tmp_path):
    finished(tmp_path / "a")
    finished(tmp_path / "b")
    other = str(tmp_path / "a" / "checkpoints" / "step_00000002")
    with pytest.raises(UserError, match="holds a run that finished"):
        check_finished(description(tmp_path / "b", "--resume_from_checkpoint", other).run)


@pytest.mark.parametrize(
    ("start", "models"), [(description, ("",)), (ppo_description, ("actor", "critic", "best", "actor_ema"))]
)
def test_overwriting_removes_what_the_run_wrote_and_nothing_else(start, models, tmp_path):
    finished(tmp_path, start(tmp_path), models)
    own = {
        *("notes.txt", "checkpoints/notes.txt", "checkpoints/step_00000002_copy/complete.json"),
        *("tensorboard/events.mine", "actor/notes.txt", "data/train.jsonl"),
    }
    for name in own:
        write(tmp_path / name)
    args = start(tmp_path, "--overwrite_output_dir", "--seed=7")
    check_run_folder(args)
    assert read_summary(tmp_path) is not None  # the input may still turn out to be bad
    start_run(args)
    assert contents(tmp_path) == own | {"arguments.json", "started.json"}
    assert json.loads((tmp_path / "arguments.json").read_text())["run"]["seed"] == 7


@pytest.mark.parametrize(
    "name",
    [
        *("adapter/adapter_model.safetensors", "adapter/README.md", "model-00001-of-00002.safetensors"),
        *("README.md", "config.json", "tokenizer.json", "pytorch_model.bin", "adapter_config.json"),
        *("metrics.jsonl", "summary.json", "arguments.json", "best/model.safetensors"),
        *("checkpoints/step_00000002/weights.pt", "checkpoints/step_00000002/complete.json"),
    ],
)
def test_what_no_run_wrote_is_refused_by_name_before_the_run_starts(name, tmp_path):
    write(tmp_path / name)
    named = name if not name.startswith("checkpoints") else "checkpoints/step_00000002"
    with pytest.raises(UserError, match=rf"holds .* not as a run wrote it: {named} \(no "):
        check_run_folder(description(tmp_path, "--overwrite_output_dir"))
    assert (tmp_path / name).read_text() == "someone's own"


def test_step_3_minds_the_folders_of_its_models_only(tmp_path):
    for name in ("README.md", "config.json", "adapter/adapter_config.json", "actor/notes.txt"):
        write(tmp_path / name)
    check_run_folder(ppo_description(tmp_path))
    write(tmp_path / "actor" / "model.safetensors")
    with pytest.raises(UserError, match=r"actor/model.safetensors \(no run wrote it\)"):
        check_run_folder(ppo_description(tmp_path))


def test_what_was_put_into_the_place_of_a_runs_file_is_refused(tmp_path):
    finished(tmp_path)
    write(tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"model.safetensors \(it was changed after a run had written it\)"):
        check_run_folder(description(tmp_path, "--overwrite_output_dir"))


@pytest.mark.parametrize("name", ["checkpoints", "actor", "actor/model.safetensors"])
def test_symbolic_links_are_not_followed(name, tmp_path):
    output, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    finished(output, ppo_description(output), ("actor",))
    (output / name).replace(elsewhere)
    (output / name).symlink_to(elsewhere)
    args = ppo_description(output, "--overwrite_output_dir")
    with pytest.raises(UserError, match=rf"holds .*{name} \(a symbolic link"):
        check_run_folder(args)
    before = contents(elsewhere)
    start_run(args)  # were it to come to that
    assert contents(elsewhere) == before
    assert elsewhere.exists()


def test_an_empty_folder_behind_a_link_may_hold_the_checkpoints(tmp_path):
    (tmp_path / "large disk").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "checkpoints").symlink_to(tmp_path / "large disk")
    check_run_folder(description(tmp_path / "out"))


def test_a_damaged_summary_is_named(tmp_path):
    finished(tmp_path)
    (tmp_path / "summary.json").write_text('{"step": ')
    with pytest.raises(UserError, match=r"summary\.json is damaged .*; move it away"):
        check_finished(description(tmp_path).run)


def test_a_kill_on_the_way_leaves_a_finished_run_or_one_that_can_be_started_again(tmp_path, monkeypatch):
    """After each removal in turn; the record and the arguments still tell what is a run's."""
    unlink, calls = Path.unlink, []

    def dying(path: Path, **options: bool) -> None:
        if len(calls) == kill_after:
            raise KeyboardInterrupt
        calls.append(path.name)
        unlink(path, **options)

    for kill_after in range(100):
        folder = tmp_path / str(kill_after)
        finished(folder)
        calls.clear()
        with monkeypatch.context() as patched:
            patched.setattr(Path, "unlink", dying)
            try:
                start_run(description(folder, "--overwrite_output_dir"))
            except KeyboardInterrupt:
                again = description(folder, "--overwrite_output_dir")
            else:
                break
        check_run_folder(again)
        start_run(again)
        assert contents(folder) == {"arguments.json", "started.json"}
    assert len(calls) > 5


def test_a_resumed_run_clears_what_was_half_written_and_keeps_the_rest(tmp_path):
    finished(tmp_path)
    (tmp_path / "summary.json").unlink()
    (tmp_path / "checkpoints" / ".saving-mine").mkdir()
    start_run(description(tmp_path, "--resume_from_checkpoint"), is_resumed=True)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step_00000002", ".saving-mine"}
    assert (tmp_path / "model.safetensors").exists()


def test_both_ways_to_begin_at_once_are_refused(tmp_path):
    with pytest.raises(UserError, match="--overwrite_output_dir starts anew and --resume_from_checkpoint"):
        description(tmp_path, "--overwrite_output_dir", "--resume_from_checkpoint")
    with pytest.raises(UserError, match="--overwrite_output_dir True needs --output_dir"):
        parse_arguments("sft", ["--model_name_or_path", "m", "--overwrite_output_dir"])


def test_a_new_folder_is_its_owners_alone_and_an_older_one_stays_as_it_is(tmp_path):
    (tmp_path / "older").mkdir()
    (tmp_path / "older").chmod(0o755)  # whatever the umask
    for name, mode in {"new": 0o700, "older": 0o755}.items():
        check_run_folder(description(tmp_path / name))
        assert (tmp_path / name).stat().st_mode & 0o777 == mode


@pytest.mark.parametrize("flag", ["--output_dir", "--tensorboard_path"])
def test_a_folder_that_cannot_be_made_is_named(flag, tmp_path):
    (tmp_path / "file").write_text("")
    args = parse_arguments(
        "sft", ["--model_name_or_path", "m", flag, str(tmp_path / "file" / "out")]
    ).description
    with pytest.raises(UserError, match=rf"{flag} .*file/out cannot be written"):
        check_run_folder(args)


@pytest.mark.parametrize("name", ["", "actor"])
def test_the_model_that_a_run_starts_from_is_not_overwritten(tmp_path, name):
    (tmp_path / "out" / "actor").mkdir(parents=True)
    args = description(tmp_path / "out")
    check_run_folder(args, "some/hub-id", str(tmp_path))
    with pytest.raises(UserError, match=r"--output_dir .* would overwrite the model"):
        check_run_folder(args, str(tmp_path / "out" / name))
