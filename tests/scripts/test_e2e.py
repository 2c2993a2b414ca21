import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dschat.arguments import parse_arguments
from dschat.errors import UserError
from scripts import demo_task, e2e_failures, e2e_rlhf, e2e_step

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "scripts" / "e2e_rlhf.py"

# What stands in for a step's main.py: it says what it was given, and fails or finishes as told.
FAKE_STEP = """
import json, pathlib, sys
flags = sys.argv[1:]
folder = pathlib.Path(flags[flags.index("--output_dir") + 1])
print("flags", flags)
if "--debug" in flags:  # a mistake of the user's
    sys.exit(print("error: --data_path x: there is no such file", file=sys.stderr) or 2)
if "--seed" in flags:
    sys.stderr.write("10%|#  | 1/10\\r20%|## | 2/10\\n")
    sys.exit("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB")
if "--tensorboard_path" in flags:  # one that is stopped on the way, and may go on
    import signal, time
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(print("stopped after step 3 as SIGTERM asked") or 75))
    if "--resume_from_checkpoint" not in flags:
        print("training", flush=True)
        time.sleep(60)
(folder / "config.json").write_text("{}")
figures = {"eval_accuracy": 0.75, "eval_accuracy_stderr": 0.01, "seconds": 3}
(folder / "summary.json").write_text(json.dumps(figures))
"""


@pytest.fixture
def fake_steps(tmp_path, monkeypatch):
    """e2e_rlhf with steps that take no time; returns the flags that every run needs."""
    root = tmp_path / "project"
    for folder in e2e_rlhf.FOLDERS.values():
        (root / folder).mkdir(parents=True)
        (root / folder / "main.py").write_text(FAKE_STEP)
    monkeypatch.setattr(e2e_rlhf, "ROOT", root)

    def run_and_keep_arguments(command):
        result = e2e_step.run(command)
        if result[0] == 0:
            command.parsed.description.write(command.folder / "arguments.json")
        return result

    monkeypatch.setattr(e2e_rlhf, "run", run_and_keep_arguments)
    (tmp_path / "pairs.jsonl").touch()
    return ["--data-path", str(tmp_path / "pairs.jsonl"), "--output-dir", str(tmp_path / "out")]


def flags_of(command):
    return dict(zip(command.flags[::2], command.flags[1::2], strict=True))


@pytest.mark.slow
def test_help_answers_without_torch_and_at_once():
    start = time.perf_counter()
    spy = (
        "import atexit, runpy, sys; atexit.register(lambda: print('torch' in sys.modules));"
        f"sys.argv = ['e2e', '--help']; runpy.run_path({str(PROGRAM)!r}, run_name='__main__')"
    )
    result = subprocess.run([sys.executable, "-c", spy], capture_output=True, text=True)
    assert result.returncode == 0
    assert "--actor-model" in result.stdout
    assert result.stdout.endswith("False\n")
    assert time.perf_counter() - start < 10  # 0.3 s on a machine that is not loaded


def test_the_steps_hand_their_output_to_step_three(tmp_path):
    flags = "--actor-model a --reward-model b --actor-zero-stage 2 --reward-zero-stage 3 --data-path d"
    args = e2e_rlhf.parse(["--output-dir", str(tmp_path), *flags.split()])
    sft, reward, ppo = (flags_of(command) for command in e2e_rlhf.commands(args))
    assert (sft["--model_name_or_path"], sft["--zero_stage"]) == ("a", "2")
    assert (reward["--model_name_or_path"], reward["--zero_stage"]) == ("b", "3")
    assert (ppo["--actor_model_name_or_path"], ppo["--actor_zero_stage"]) == (sft["--output_dir"], "2")
    assert (ppo["--critic_model_name_or_path"], ppo["--critic_zero_stage"]) == (reward["--output_dir"], "3")
    assert {flags["--data_path"] for flags in (sft, reward, ppo)} == {"d"}


def test_a_reward_model_can_start_from_what_step_one_writes(tmp_path):
    args = e2e_rlhf.parse(["--output-dir", str(tmp_path), "--reward-model", "sft"])
    assert flags_of(e2e_rlhf.commands(args)[1])["--model_name_or_path"] == str(tmp_path / "step1_sft")


def test_extra_flags_reach_their_step_last_and_quotes_hold_them_together(tmp_path):
    extra = ["--common-args", "--seed 7", "--ppo-args", "--tensorboard_path 'a b; rm -rf $HOME'"]
    args = e2e_rlhf.parse(["--output-dir", str(tmp_path), *extra])
    sft, _, ppo = e2e_rlhf.commands(args)
    assert sft.flags[-2:] == ["--seed", "7"]
    assert ppo.flags[-4:] == ["--seed", "7", "--tensorboard_path", "a b; rm -rf $HOME"]
    assert parse_arguments("rlhf", ppo.flags).run.tensorboard_path == "a b; rm -rf $HOME"


@pytest.mark.parametrize(
    ("flags", "start"),
    [
        ([], []),
        (["--deployment-type", "single_node", "--num-gpus", "2"], ["--num_gpus", "2"]),
        (["--deployment-type", "multi_node", "--hostfile", "hosts"], ["--hostfile", "hosts"]),
    ],
)
def test_a_deployment_type_decides_what_starts_the_step(flags, start):
    command = e2e_rlhf.commands(e2e_rlhf.parse(["--step", "1", *flags]))[0]
    assert command.is_launched == bool(flags)
    argv = command.argv
    main = argv.index(str(ROOT / "step1_sft" / "main.py"))
    assert argv[0] == sys.executable
    launchers = ("deepspeed.launcher.runner", str(e2e_rlhf.ROOT / "scripts/launch.py"))
    assert any(launcher in argv for launcher in launchers) == bool(flags)
    assert " ".join(start) in " ".join(argv[:main])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--actor-model", "/nowhere/model"], "--actor-model /nowhere/model does not exist"),
        (["--reward-model", "~/model"], "--reward-model ~/model does not exist"),
        (["--data-path", "pairs.jsonl:-1"], "--data-path pairs.jsonl:-1: the weight must be positive"),
        (["--overwrite-output-dir", "--resume"], "flags of step 1: --overwrite_output_dir starts anew and"),
        (["--step", "3"], "step 3 needs the model of step 1 in .*; add 1 to --step"),
        (["--output-dir=--"], "argument --output-dir: expected a value"),
        (["--num-gpus", "-1"], "--num-gpus must be at least 1, got -1"),
        (["--output-dir", "~nobody-of-this-name/x"], "--output-dir ~nobody-of-this-name/x is no path"),
        (["--num-gpus", "2"], "--num-gpus 2 needs --deployment-type"),
        (["--deployment-type", "multi_node", "--hostfile", "/nowhere"], "needs --hostfile"),
        (["--ppo-args", "--kl_coeff 1"], "flags of step 3: unknown flag --kl_coeff .*did you mean --kl_coef"),
        (["--sft-args", "--dtype fp8"], "flags of step 1: .*fp8"),
        (["--sft-args", "--dtype 'fp32"], "--sft-args .* cannot be split"),
        (["--actor-zero-stage", "4"], "invalid choice: 4"),
        (["--actor", "a"], "unknown flag --actor"),
    ],
)
def test_what_cannot_work_is_said_before_anything_runs(fake_steps, tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        e2e_rlhf.main([*fake_steps, *flags])
    assert not (tmp_path / "out").exists()


def test_every_step_runs_in_order_and_its_output_is_kept(fake_steps, tmp_path, capfdbinary):
    assert e2e_rlhf.main([*fake_steps, "--step", "3", "1", "2"]) == 0
    console = capfdbinary.readouterr().out.decode()
    places = [console.index(f"== step {step}") for step in (1, 2, 3)]
    assert places == sorted(places)
    assert "0.750 ± 0.010" in console
    for folder in e2e_rlhf.FOLDERS.values():
        assert "flags ['--data_path'" in (tmp_path / "out" / folder / "training.log").read_text()


def test_a_forecast_goes_to_step_three_and_its_flags_are_checked_before_anything_runs(fake_steps, tmp_path):
    words = ["--forecast", "--gold_function right.py:right --num_answers 32", "--force"]
    _, _, ppo = e2e_rlhf.commands(e2e_rlhf.parse([*fake_steps, *words]))
    asked = ppo.parsed.forecast
    assert (asked.words[-1], asked.force) == ("32", True)
    for flags, message in (
        ("--num_answers 32", "nothing says what good answers are"),
        ("right.py", "no flag"),
    ):
        with pytest.raises(UserError, match=f"--forecast.*{message}"):
            e2e_rlhf.main([*fake_steps, "--forecast", flags])
    assert not (tmp_path / "out").exists()


def test_a_failing_step_is_named_with_its_log_its_last_lines_and_a_remedy(fake_steps, tmp_path, capfd):
    assert e2e_rlhf.main([*fake_steps, "--reward-args", "--seed 1"]) == 1
    output = capfd.readouterr()
    assert "error: step 2 (reward model) failed with exit code 1" in output.err
    assert str(tmp_path / "out" / "step2_reward" / "training.log") in output.err
    assert "  | 20%|## | 2/10\n" in output.err
    assert "10%|#" not in output.err
    assert "likely remedy: Memory ran out." in output.err
    assert "== step 3" not in output.out


def test_the_same_command_again_leaves_out_what_has_finished(fake_steps, tmp_path, capfd):
    assert e2e_rlhf.main([*fake_steps, "--step", "1"]) == 0
    log = (tmp_path / "out" / "step1_sft" / "training.log").read_text()
    harmless = ["--common-args", "--save_interval 5 --debug false"]
    for more in ([], ["--skip-finished"], ["--resume"], harmless):
        assert e2e_rlhf.main([*fake_steps, "--step", "1", "2", *more]) == 0
        second = capfd.readouterr().out
        assert "step 1 has finished before: skipped" in second
        assert second.count("what each step achieved") == 1 + (not more)
    assert (tmp_path / "out" / "step1_sft" / "training.log").read_text() == log


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--actor-model", "other/model"], "--model_name_or_path was facebook/opt-1.3b and is other/model"),
        (["--actor-zero-stage", "2"], "--zero_stage was 0 and is 2"),
        (["--sft-args", "--learning_rate 3e-6"], "--learning_rate was 1e-05 and is 3e-06"),
        (["--data-path", "Dahoas/rm-static:0.5", "b"], "--data_path was .*pairs.jsonl and is Dahoas/rm-sta"),
    ],
)
def test_a_step_that_finished_otherwise_is_named_with_what_differs(
    fake_steps, tmp_path, flags, message, capfd
):
    assert e2e_rlhf.main([*fake_steps, "--step", "1"]) == 0
    kept = (tmp_path / "out" / "step1_sft" / "summary.json").stat().st_mtime_ns
    with pytest.raises(UserError, match=rf"step 1 .* has finished in .*{message}.*--overwrite-output-dir"):
        e2e_rlhf.main([*fake_steps, "--step", "1", *flags])
    assert e2e_rlhf.main([*fake_steps, "--step", "1", *flags, "--skip-finished"]) == 0
    assert "otherwise than this command says (--" in capfd.readouterr().out
    assert (tmp_path / "out" / "step1_sft" / "summary.json").stat().st_mtime_ns == kept


def test_data_or_a_model_that_was_written_later_is_a_difference(fake_steps, tmp_path):
    assert e2e_rlhf.main([*fake_steps, "--step", "1", "2", "3"]) == 0
    later = time.time() + 10
    os.utime(tmp_path / "out" / "step1_sft" / "config.json", (later, later))
    with pytest.raises(
        UserError, match=r"step 3 .*step1_sft/config.json \(--actor_model_.* written after it"
    ):
        e2e_rlhf.main([*fake_steps, "--step", "3"])
    os.utime(tmp_path / "pairs.jsonl", (later, later))
    with pytest.raises(UserError, match=r"step 1 .*pairs.jsonl \(--data_path\) was written after it"):
        e2e_rlhf.main(fake_steps)


def test_steps_can_be_run_anew_and_what_comes_after_them_is_then_out_of_date(fake_steps, tmp_path, capfd):
    assert e2e_rlhf.main([*fake_steps, "--step", "1", "2", "3"]) == 0
    capfd.readouterr()
    assert e2e_rlhf.main([*fake_steps, "--step", "2", "--overwrite-output-dir"]) == 0
    assert "'--overwrite_output_dir'" in capfd.readouterr().out
    (tmp_path / "out" / "step1_sft" / "summary.json").unlink()
    with pytest.raises(UserError, match=r"step 3 \(PPO\) has finished .*; step 1 runs before it"):
        e2e_rlhf.main(fake_steps)


def test_a_finished_step_of_which_nothing_is_known_is_not_taken_for_the_same(fake_steps, tmp_path):
    assert e2e_rlhf.main([*fake_steps, "--step", "1"]) == 0
    (tmp_path / "out" / "step1_sft" / "arguments.json").unlink()
    with pytest.raises(UserError, match="what it was made with is not known"):
        e2e_rlhf.main([*fake_steps, "--step", "1"])


def test_a_mistake_is_no_stop_whatever_the_log_says_of_an_earlier_one(fake_steps, tmp_path, capfd):
    log = tmp_path / "out" / "step1_sft" / "training.log"
    log.parent.mkdir(parents=True)
    log.write_text("stopped after step 3 as SIGTERM asked; saved in x\n")
    assert e2e_rlhf.main([*fake_steps, "--resume", "--sft-args=--debug"]) == 2
    told = capfd.readouterr().err
    assert told.endswith(
        f"ended with the message above; its log is {log}. Once that is mended, the same command goes on.\n"
    )
    assert "stopped after" not in told


@pytest.mark.parametrize(
    ("code", "said", "passed_on", "is_stop"),
    [
        (75, [], [], True),
        (1, ["stopped after step 3 as SIGTERM asked; saved in x", "launcher: exit code 1"], [], True),
        (1, ["worker-1: stopped after step 12 as another rank's signal asked; saved"], [], True),
        (-15, [], [15], True),
        (143, ["training"], [15], True),
        (-9, [], [15], False),
        (-15, [], [], False),
        (1, ["Traceback"], [15], False),
        (2, ["stopped after step 3 as SIGTERM asked", "error: --data_path x"], [], False),
        (0, ["stopped after step 3 as SIGTERM asked"], [], False),
    ],
)
def test_what_counts_as_a_stop(code, said, passed_on, is_stop):
    assert e2e_step.was_stopped(code, said, passed_on) is is_stop


def test_a_pipe_that_every_step_would_read_is_refused(fake_steps, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=r"--data-path .*pipe:0.5 is a pipe, which every step would read"):
        e2e_rlhf.main([*fake_steps, "--data-path", f"{tmp_path / 'pipe'}:0.5"])


def test_a_signal_goes_to_the_step_and_resume_goes_on(fake_steps, tmp_path, capfd):
    flags = [*fake_steps, "--reward-args", "--tensorboard_path x"]
    start = time.monotonic()

    def ask_to_stop() -> None:
        log = tmp_path / "out" / "step2_reward" / "training.log"
        while not (log.is_file() and "training" in log.read_text().splitlines()):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=ask_to_stop).start()
    assert e2e_rlhf.main(flags) == 75
    assert time.monotonic() - start < 30
    told = capfd.readouterr()
    assert "the same command with --resume goes on" in told.err
    assert not (tmp_path / "out" / "step3_ppo").exists()
    assert e2e_rlhf.main([*flags, "--resume"]) == 0
    told = capfd.readouterr().out
    assert "step 1 has finished before: skipped" in told
    assert "'--resume_from_checkpoint', 'latest'" in told
    log = (tmp_path / "out" / "step2_reward" / "training.log").read_text()
    assert "stopped after step 3" in log  # the log goes on, too


def test_a_weight_behind_a_file_is_the_steps_to_read(fake_steps, tmp_path, capfd):
    assert e2e_rlhf.main([*fake_steps, "--data-path", f"{tmp_path / 'pairs.jsonl'}:0.5", "--step", "1"]) == 0
    assert "pairs.jsonl:0.5'" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("line", "advice"),
    [
        ("RuntimeError: [enforce fail] DefaultCPUAllocator: can't allocate memory", "Memory ran out"),
        ("DistNetworkError: port: 29500, code: -98, name: EADDRINUSE", "port"),
        ("OSError: [Errno 28] No space left on device", "disk is full"),
        ("error: --max_prompt_seq_len 4 removes every prompt", "message above"),
        ("something new", "No known cause"),
    ],
)
def test_a_known_message_has_its_remedy(line, advice):
    assert advice in e2e_failures.remedy(["Traceback", line])


@pytest.mark.slow
def test_three_steps_on_two_ranks_under_the_deepspeed_launcher(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    demo_task.write_demo(tmp_path, num_train=160, num_test=20)
    flags = [
        *("--actor-model", str(tmp_path / "base_model"), "--reward-model", "sft"),
        *("--data-path", str(tmp_path / "data"), "--output-dir", str(tmp_path / "out")),
        *("--deployment-type", "single_node", "--num-gpus", "2"),
        *("--actor-zero-stage", "3", "--reward-zero-stage", "2", "--common-args", "--dtype fp32"),
        *("--sft-args", "--max_seq_len 64", "--reward-args", "--max_seq_len 64"),
        "--ppo-args",
        "--max_prompt_seq_len 40 --max_answer_seq_len 8 --per_device_generation_batch_size 8"
        " --per_device_training_batch_size 8 --enable_test_mode --test_stop_step 2",
    ]
    assert e2e_rlhf.main(flags) == 0, capfd.readouterr().err
    summaries = [e2e_rlhf.read_summary(tmp_path / "out" / folder) for folder in e2e_rlhf.FOLDERS.values()]
    assert [summary["step"] for summary in summaries] == ["sft", "reward", "rlhf"]
    assert summaries[2]["ppo_steps"] == 2
    assert (tmp_path / "out" / "step3_ppo" / "actor" / "config.json").is_file()
