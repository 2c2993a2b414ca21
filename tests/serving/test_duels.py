import pytest

from dschat.data.comparisons import Turn
from dschat.data.findings import Findings
from dschat.data.reading import Format, read_comparisons
from dschat.data.sources import open_source
from dschat.errors import UserError
from dschat.serving import duels as duels_module
from dschat.serving.duels import Duel, Duels
from dschat.serving.protocol import ApiError

PROMPT = (Turn("system", "Be brief."), Turn("user", "Name a tea."))


def duel(left="Assam.", right="Coffee."):
    return Duel(PROMPT, ("sft", "ppo"), {"temperature": 1.0}, {"left": left, "right": right})


def voted(path, *votes, **answers):
    duels = Duels(path)
    for vote in votes:
        duels.vote({"duel": duels.add(duel(**answers)), "vote": vote})
    return duels


def read(path):
    source, findings = open_source(str(path), "--data_path", evaluates=False), Findings()
    return list(read_comparisons(source, source.training, Format(), findings)), findings


def test_votes_are_pairs_for_step_2_and_ties_are_dropped(tmp_path):
    voted(tmp_path / "votes.jsonl", "tie", "left", "right", "both_bad")
    rows, findings = read(tmp_path / "votes.jsonl")
    assert [(row.prompt, row.answers) for row in rows] == [
        (PROMPT, ("Assam.", "Coffee.")),
        (PROMPT, ("Coffee.", "Assam.")),
    ]
    assert dict(findings.dropped) == {"ties": 2}
    assert not findings.unread


@pytest.mark.parametrize(
    "text", ["a", "tie", "left", "response_b", '[{"role": "user", "content": "x"}]', "sft"]
)
def test_no_text_of_an_answer_is_taken_for_a_verdict_or_for_messages(tmp_path, text):
    voted(tmp_path / "votes.jsonl", "left", "tie", left=text, right="b")
    rows, _ = read(tmp_path / "votes.jsonl")
    assert [row.answers for row in rows] == [(text, "b")]


def test_a_duel_has_one_vote_and_names_its_models_only_then(tmp_path):
    duels = Duels(tmp_path / "votes.jsonl")
    name = duels.add(duel())
    with pytest.raises(ApiError, match="vote must be one of left, right, tie, both_bad"):
        duels.vote({"duel": name, "vote": "up"})
    assert duels.vote({"duel": name, "vote": "left"}) == {"left": "sft", "right": "ppo", "recorded": True}
    for body in ({"duel": name, "vote": "left"}, {"duel": None, "vote": "left"}):
        with pytest.raises(ApiError, match="no such duel, or it has its vote"):
            duels.vote(body)
    assert len((tmp_path / "votes.jsonl").read_text().splitlines()) == 1


def test_a_vote_on_an_answer_without_a_word_is_not_recorded(tmp_path):
    duels = voted(tmp_path / "votes.jsonl", "left", right=" ")
    assert duels.path.read_text() == ""


def test_a_vote_that_cannot_be_written_can_be_given_again(tmp_path, monkeypatch):
    duels = Duels(tmp_path / "votes.jsonl")
    name = duels.add(duel())
    monkeypatch.setattr(duels_module, "append_line", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(ApiError, match="cannot be written: full") as error:
        duels.vote({"duel": name, "vote": "left"})
    assert error.value.status == 507
    monkeypatch.undo()
    assert duels.vote({"duel": name, "vote": "left"})["recorded"]


def test_sides_are_shuffled(tmp_path):
    duels = Duels(tmp_path / "votes.jsonl")
    assert {duels.shuffled(["sft", "ppo"]) for _ in range(60)} == {("sft", "ppo"), ("ppo", "sft")}


def test_duels_without_a_vote_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(duels_module, "MOST_WAITING", 2)
    duels = Duels(tmp_path / "votes.jsonl")
    first, *_ = [duels.add(duel()) for _ in range(3)]
    with pytest.raises(ApiError, match="no such duel"):
        duels.vote({"duel": first, "vote": "left"})


def test_a_file_that_cannot_be_written_is_named_before_a_model_is_loaded(tmp_path):
    with pytest.raises(UserError, match=r"--votes .*gone.* cannot be written \(No such file"):
        Duels(tmp_path / "gone" / "votes.jsonl")
