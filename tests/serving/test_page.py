"""The page in a browser: a question typed, an answer that streams, votes, and step 2 on the votes."""

import json
import re
import threading

import pytest
from browser import PHONE
from processes import ROOT, python
from servers import Scripted, serving
from tiny import save_tiny_model

from scripts import serve

HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"

LAST = "[...document.querySelectorAll('.answers')].at(-1)"


def ask(browser, question):
    browser.evaluate(f"get('question').value = {json.dumps(question)}")
    browser.evaluate("get('ask').requestSubmit()")
    browser.wait_for("!running && (!duels || !!document.querySelector('.votes'))")


def test_a_conversation_streams_and_text_of_models_is_text(browser):
    with serving(Scripted(HOSTILE)) as server:
        browser.window(PHONE)
        browser.open(f"http://127.0.0.1:{server.server_address[1]}/")
        browser.wait_for("get('models').textContent === 'a'")
        ask(browser, "Name a tea?")
        ask(browser, "Another one, " + "please " * 30)
        texts = browser.evaluate("[...document.querySelectorAll('#talk pre')].map((p) => p.textContent)")
        assert texts == ["Name a tea?", HOSTILE, ("Another one, " + "please " * 30).strip(), HOSTILE]
        assert browser.evaluate("document.title") == "Chat"
        assert browser.evaluate("history.length") == 4
        browser.check_variants("chat")
        browser.evaluate("get('temperature').value = 'hot'; document.querySelector('details').open = true")
        browser.evaluate("get('question').value = 'More?'; get('ask').requestSubmit()")
        browser.wait_for("get('problem').textContent")
        assert browser.evaluate("history.length") == 4
        browser.evaluate("get('reset').click()")
        assert browser.evaluate("[history.length, get('talk').children.length]") == [0, 0]
        browser.check_variants("chat_problem")
        assert all(f":{server.server_address[1]}/" in url or url == "data:," for url in browser.requests())


def test_votes_are_blind_and_become_rows_of_preferences(browser, tmp_path):
    votes = tmp_path / "votes.jsonl"
    good, bad = "Assam is a tea from India. " * 6, HOSTILE
    with serving(Scripted(good), Scripted(bad), votes=votes) as server:
        browser.open(f"http://127.0.0.1:{server.server_address[1]}/")
        browser.wait_for("duels")
        sides = []
        for number, wanted in enumerate(["good", "good", "tie", "both_bad", "good"]):
            ask(browser, f"Question {number}?")
            left = browser.evaluate(f"{LAST}.querySelector('pre').textContent")
            title = browser.evaluate(f"{LAST}.querySelector('.title').textContent")
            assert title == "Left"  # nothing says which model it is
            sides.append("left" if left == good else "right")
            if number == 0:
                browser.check_variants("duel")
                browser.window()
            vote = sides[-1] if wanted == "good" else wanted
            browser.evaluate(f"document.querySelector('[data-vote={vote}]').click()")
            browser.wait_for("!document.querySelector('.votes')")
            titles = browser.evaluate(f"[...{LAST}.querySelectorAll('.title')].map((p) => p.textContent)")
            expected = ("a", "b") if sides[-1] == "left" else ("b", "a")
            assert titles == [f"Left: {expected[0]}", f"Right: {expected[1]}"]
            assert browser.evaluate("innerHeight + scrollY - document.body.scrollHeight") >= 0
            said = browser.evaluate(f"{LAST}.parentNode.lastChild.textContent")
            assert said.startswith(f"Your vote: {vote.replace('_', ' are ').capitalize()}")
            assert ("goes on with the left answer" in said) == (vote == "tie")
            marked = browser.evaluate(f"[...{LAST}.children].map((box) => box.className)")
            assert marked == [
                *{
                    "left": ("chosen", ""),
                    "right": ("", "chosen"),
                    "tie": ("tied", "tied"),
                    "both_bad": ("", ""),
                }[vote]
            ]
            if vote == "tie":
                browser.screenshot("duel_tie")
        browser.check_variants("duel_voted")
        assert set(sides) == {"left", "right"}
        assert browser.problems() == []
        assert browser.evaluate("document.title") == "Two models side by side"
    rows = [json.loads(line) for line in votes.read_text().splitlines()]
    assert [row["metadata"]["vote"] for row in rows] == [sides[0], sides[1], "tie", "both_bad", sides[4]]
    # The exchange that was bad on both sides is no part of the conversation that went on.
    contents = [message["content"] for message in rows[4]["prompt"]]
    assert "Question 3?" not in contents
    assert contents[-1] == "Question 4?"


@pytest.mark.slow
def test_a_person_types_sees_two_models_answer_votes_and_step_2_and_dpo_train_on_the_votes(
    browser, tmp_path, monkeypatch
):
    """The commands of docs/chat.md, in a browser, and then with the file of votes as it is."""
    page = (ROOT / "docs" / "chat.md").read_text(encoding="utf-8").replace("\\\n", "")
    alone, versus = re.findall(r"^python scripts/serve\.py (.*)$", page, re.MULTILINE)
    [training] = re.findall(r"^python step2_reward/main\.py (.*)$", page, re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("step1_sft", "step3_ppo/actor")):
        save_tiny_model(tmp_path / "output" / name, seed=seed)
    serve.build(serve.parse([*alone.split(), "--port", "0"])).server_close()
    votes = tmp_path / "votes.jsonl"
    with serve.build(serve.parse([*versus.split(), "--port", "0", "--max_tokens", "24"])) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,)).start()
        browser.open(f"http://127.0.0.1:{server.server_address[1]}/")
        browser.wait_for("duels")
        # How long the answers are, whenever that changes.
        browser.evaluate(
            "window.seen = []; new MutationObserver(() => seen.push([...document.querySelectorAll("
            "'.answers pre')].slice(-2).map((p) => p.textContent.length))).observe(get('talk'), "
            "{childList: true, subtree: true}); 0"
        )
        unrecorded, pieces = 0, []
        for number in range(8):
            if number == 4:
                browser.evaluate("document.querySelector('details').open = true; get('reset').click()")
            browser.evaluate("get('question').focus(); seen.length = 0")
            browser.call("Input.insertText", text=f"Name tea number {number}.")
            for kind in ("keyDown", "keyUp"):
                browser.call("Input.dispatchKeyEvent", type=kind, key="Enter", windowsVirtualKeyCode=13)
            browser.wait_for("!!document.querySelector('.votes')")
            pieces.append(len({sum(pair) for pair in browser.evaluate("seen")}))
            vote = ("left", "right", "left", "tie")[number % 4]
            browser.evaluate(f"document.querySelector('[data-vote={vote}]').click()")
            browser.wait_for("!document.querySelector('.votes')")
            unrecorded += browser.evaluate(
                f"{LAST}.parentNode.lastChild.textContent.includes('not recorded')"
            )
        assert max(pieces) > 4, "the answers come in one piece"  # some answers end after a token or two
        assert browser.problems() == []
        server.shutdown()
    rows = [json.loads(line) for line in votes.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 8 - unrecorded
    contents = [[message["content"] for message in row["prompt"]] for row in rows]
    assert "Name tea number 0." in contents[1]  # the conversation goes on, until there is a new one
    assert ["Name tea number 4."] in contents
    decided = sum(row["metadata"]["vote"] != "tie" for row in rows)
    shorter = ["--eval_fraction", "0", "--max_seq_len", "256", "--num_train_epochs", "1"]
    for step in ("main", "dpo"):
        flags = training.replace("output/voted", f"output/{step}").split()
        python(ROOT / "step2_reward" / f"{step}.py", *flags, *shorter)
        folder = tmp_path / "output" / step
        assert json.loads((folder / "summary.json").read_text())["num_train_rows"] == decided
        assert json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["loss"] > 0
