"""scripts/chat.py, as in a pipe."""

import io
import re
import shlex
import signal

import pytest
from processes import ROOT
from tiny import save_reward_model, save_tiny_model

from dschat.errors import UserError
from dschat.serving import speaker
from scripts import chat


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--temperature", "hot"], r"temperature must be a number in \[0, 100\], got 'hot'"),
        (["--temprature", "1"], r"unknown flag --temprature \(did you mean --temperature"),
        ([], r"MODEL .*there is no such folder"),
    ],
)
def test_flags_that_cannot_work_are_refused(tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        chat.main(chat.parse([str(tmp_path / "gone"), *flags]))


def test_questions_and_commands_come_from_a_pipe_and_ctrl_c_stops_an_answer_alone(
    tmp_path, monkeypatch, capsys
):
    model = save_tiny_model(tmp_path / "m")
    reward_model = save_reward_model(model, tmp_path / "rm")
    lines = [
        "Hello \\",
        "there",
        "/settings max_tokens 4",
        "Count to five.",
        "/nothing",
        "/undo",
        "/quit",
        "x",
    ]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    put, tokens = speaker.AnswerText.put, []

    def interrupted_once(text, value):
        put(text, value)
        tokens.append(value)
        if len(tokens) == 4:  # the prompt, and three tokens of the first answer
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(speaker.AnswerText, "put", interrupted_once)
    flags = ["--reward_model", str(reward_model), "--max_tokens", "200", "--temperature", "0"]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a background process
    try:
        chat.main(chat.parse([str(model), *flags]))
    finally:
        signal.signal(signal.SIGINT, before)
    out = capsys.readouterr().out
    assert "[stopped, score " in out
    assert "[cut off at max_tokens, score " in out
    assert out.index("[stopped") < out.index("[cut off")
    assert "there is no command /nothing" in out
    assert len(tokens) == 4 + 5  # and the prompt and four tokens of the second


def test_the_commands_of_the_page_run(tmp_path, monkeypatch, capsys):
    """Those of `serve` and of step 2 are in tests/serving/test_page.py."""
    page = (ROOT / "docs" / "chat.md").read_text(encoding="utf-8")
    commands = re.findall(r"^(?:(echo .*?) \| )?python scripts/chat\.py (.*)$", page, re.MULTILINE)
    assert len(commands) == 2
    monkeypatch.chdir(tmp_path)
    save_tiny_model("output/step3_ppo/actor")
    save_tiny_model("output/step1_sft")
    for echo, words in commands:
        said = shlex.split(echo)[1:] or ["/settings max_tokens 3", "Hello", "/help", "/save talk.jsonl"]
        monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(said)))
        chat.main(chat.parse([*shlex.split(words), "--max_tokens", "3"]))
        assert "[cut off at max_tokens]" in capsys.readouterr().out
    assert (tmp_path / "talk.jsonl").is_file()
