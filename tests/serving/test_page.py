"""The page in a browser: a question typed, an answer that streams, votes, and step 2 on the votes."""

import json
import os
from pathlib import Path

from browser import Browser, needs_browser
from servers import Scripted, serving

HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"

LAST = "[...document.querySelectorAll('.answers')].at(-1)"


def ask(browser, question):
    browser.evaluate(f"get('question').value = {json.dumps(question)}")
    browser.evaluate("get('ask').requestSubmit()")
    browser.wait_for("!running && (!duels || !!document.querySelector('.votes'))")


def shots(browser, name):
    """Screenshots, where a person wants to look at them."""
    if folder := os.environ.get("DSCHAT_SCREENSHOTS"):
        browser.screenshot(Path(folder) / f"{name}.png")


@needs_browser
def test_a_conversation_streams_and_text_of_models_is_text():
    with serving(Scripted(HOSTILE)) as server, Browser(width=390, dark=True) as browser:
        browser.open(f"http://127.0.0.1:{server.server_address[1]}/")
        browser.wait_for("get('models').textContent === 'a'")
        ask(browser, "Name a tea?")
        ask(browser, "Another one, " + "please " * 30)
        texts = browser.evaluate("[...document.querySelectorAll('#talk pre')].map((p) => p.textContent)")
        assert texts == ["Name a tea?", HOSTILE, ("Another one, " + "please " * 30).strip(), HOSTILE]
        assert browser.evaluate("document.title") == "Chat"
        assert browser.evaluate("history.length") == 4
        shots(browser, "chat_phone_dark")
        browser.evaluate("get('temperature').value = 'hot'; document.querySelector('details').open = true")
        browser.evaluate("get('question').value = 'More?'; get('ask').requestSubmit()")
        browser.wait_for("get('problem').textContent")
        assert browser.evaluate("history.length") == 4
        browser.evaluate("get('reset').click()")
        assert browser.evaluate("[history.length, get('talk').children.length]") == [0, 0]
        assert browser.overflow() == 0
        assert all(f":{server.server_address[1]}/" in url or url == "data:," for url in browser.requests())


@needs_browser
def test_votes_are_blind_and_become_rows_of_preferences(tmp_path):
    votes = tmp_path / "votes.jsonl"
    good, bad = "Assam is a tea from India. " * 6, HOSTILE
    with serving(Scripted(good), Scripted(bad), votes=votes) as server, Browser() as browser:
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
                shots(browser, "duel_laptop_light")
            vote = sides[-1] if wanted == "good" else wanted
            browser.evaluate(f"document.querySelector('[data-vote={vote}]').click()")
            browser.wait_for("!document.querySelector('.votes')")
            titles = browser.evaluate(f"[...{LAST}.querySelectorAll('.title')].map((p) => p.textContent)")
            expected = ("a", "b") if sides[-1] == "left" else ("b", "a")
            assert titles == [f"Left: {expected[0]}", f"Right: {expected[1]}"]
        shots(browser, "duel_voted_light")
        browser.emulate("dark")
        shots(browser, "duel_voted_dark")
        assert set(sides) == {"left", "right"}
        assert browser.problems() == []
        assert browser.evaluate("document.title") == "Two models side by side"
    rows = [json.loads(line) for line in votes.read_text().splitlines()]
    assert [row["metadata"]["vote"] for row in rows] == [sides[0], sides[1], "tie", "both_bad", sides[4]]
    # The exchange that was bad on both sides is no part of the conversation that went on.
    contents = [message["content"] for message in rows[4]["prompt"]]
    assert "Question 3?" not in contents
    assert contents[-1] == "Question 4?"
