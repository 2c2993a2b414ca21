import json

import pytest

from dschat.data.comparisons import Turn
from dschat.errors import UserError
from dschat.serving.chat import Chat, Conversation
from dschat.serving.settings import completed
from dschat.serving.speaker import SpokenAnswer


class Written:
    """A speaker that says what is written for it, and notes what it was asked."""

    positions = 100

    def __init__(self, *answers, end="stop"):
        self.answers, self.end, self.prompts, self.samples = list(answers), end, [], []

    def read(self, prompt, *, max_tokens=None):
        self.prompts.append(prompt)
        ids = list(range(10 * len(prompt)))
        return ids[-max_tokens:], len(ids) > max_tokens > 10

    def answer(self, ids, sampling, on_text, *, sample=0):
        self.samples.append(sample)
        text = self.answers.pop(0)
        on_text(text)
        return SpokenAnswer(text, [1] if text else [0], self.end)


class OneScore:
    def described(self, prompt, ids, said):
        return f"score of {prompt[-1].content} {said.text}"


def chat_with(*answers, scorer=None, end="stop", **settings):
    shown = []
    speaker = Written(*answers, end=end)
    chat = Chat(speaker, completed(settings, 100), shown.append, scorer=scorer)
    return chat, speaker, shown


def test_an_answer_has_all_that_was_said_before_it():
    chat, speaker, shown = chat_with("Assam.", "Darjeeling.")
    assert chat.hear("/system Be brief.")
    assert chat.hear("A tea?")
    assert chat.hear("  ")
    assert chat.hear("Another?")
    assert shown == ["Assam.", "\n", "Darjeeling.", "\n"]
    assert speaker.prompts[1] == (
        Turn("system", "Be brief."),
        Turn("user", "A tea?"),
        Turn("assistant", "Assam."),
        Turn("user", "Another?"),
    )
    assert not chat.hear("/quit")


def test_an_exchange_is_taken_back_or_had_again_with_another_sample():
    chat, speaker, _ = chat_with("one", "two", "three", "four")
    chat.hear("first")
    chat.hear("second")
    chat.hear("/undo")
    assert chat.conversation.exchanges == [("first", "one")]
    chat.hear("/retry")
    chat.hear("/retry")
    assert chat.conversation.exchanges == [("first", "four")]
    assert speaker.samples == [0, 0, 1, 2]
    assert speaker.prompts[-1] == (Turn("user", "first"),)
    chat.hear("/reset")
    for command in ("/undo", "/retry", "/save x"):
        with pytest.raises(UserError, match="said"):
            chat.hear(command)


def test_a_conversation_is_kept_as_a_row_of_step_1_and_goes_on_from_there(tmp_path):
    file = tmp_path / "talk.jsonl"
    chat, _, _ = chat_with("one", "two")
    chat.hear("/system Count.")
    chat.hear("first")
    chat.hear(f"/save {file}")
    chat.hear("second")
    chat.hear(f"/save {file}")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [len(row["messages"]) for row in rows] == [3, 5]
    other, _, _ = chat_with()
    other.hear(f"/load {file}")
    assert other.conversation == chat.conversation
    with pytest.raises(UserError, match="cannot be written"):
        chat.hear(f"/save {tmp_path}")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('["messages"]', "no object with"),
        ('{"text": 1}', "must be a list of messages"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "must alternate"),
        (
            '{"messages": [{"role": "tool", "content": "a"}, {"role": "assistant", "content": "b"}]}',
            "alternate",
        ),
        ('{"messages": [{"role": "user"}]}', 'has no "content"'),
    ],
)
def test_what_is_no_conversation_is_not_loaded(tmp_path, line, message):
    (tmp_path / "talk.jsonl").write_text(line)
    chat, _, _ = chat_with()
    with pytest.raises(UserError, match=message):
        chat.hear(f"/load {tmp_path / 'talk.jsonl'}")
    assert chat.conversation == Conversation()


def test_settings_are_shown_and_changed_within_bounds():
    chat, _, shown = chat_with()
    chat.hear("/settings temperature 0.5")
    chat.hear("/settings")
    assert shown[1] == "[temperature 0.5, top_p 1, top_k 0, max_tokens 50, seed 1234]\n"
    for line, message in (
        ("/settings heat 1", "no setting 'heat'; there are temperature, top_p"),
        ("/settings top_p", "top_p must be a number in .*got ''"),
        ("/settings max_tokens 100", "leaves no room"),
        ("/stings", "there is no command /stings; /help lists them"),
    ):
        with pytest.raises(UserError, match=message):
            chat.hear(line)
    assert chat.settings["max_tokens"] == 50
    chat.hear("/help")
    assert {line.split()[0] for line in shown[2:]} >= {"/help", "/retry", "/settings", "/quit"}


def test_below_an_answer_stand_its_score_and_why_it_ends():
    chat, _, shown = chat_with("Ass", scorer=OneScore(), end="length")
    chat.hear("A tea?")
    assert shown[-1] == "[cut off at max_tokens, score of A tea? Ass]\n"


def test_an_answer_without_a_word_is_not_kept():
    chat, _, shown = chat_with("")
    chat.hear("A tea?")
    assert shown[-1] == "[no answer, so that the question is not kept]\n"
    assert chat.conversation.exchanges == []


def test_text_of_a_model_steers_no_terminal():
    chat, _, shown = chat_with("\x1b[2J\x07tea\u202e")
    chat.hear("A tea?")
    assert shown[0] == "\\x1b[2J\\x07tea\\u202e"


def test_what_a_model_has_no_room_for_is_said():
    chat, _, shown = chat_with("one", "two", max_tokens=85)
    chat.hear("first")
    chat.hear("second")  # three turns of ten tokens, in room for 15
    assert "[the first exchanges are left out: the model has no room for them]\n" in shown
    chat.settings["max_tokens"] = 95
    with pytest.raises(UserError, match="the question has"):
        Chat(TooLong(), chat.settings, shown.append).hear("third")


class TooLong(Written):
    def read(self, prompt, *, max_tokens=None):
        return list(range(50)), False
