import pytest

from dschat.data.comparisons import Turn
from dschat.serving.protocol import ApiError, Form, asked
from dschat.serving.speaker import SpokenAnswer

MESSAGES = [{"role": "user", "content": "Hi"}]


def test_a_request_is_read_into_settings_and_turns():
    body = {
        "model": "a",
        "messages": [{"role": "developer", "content": "Be brief."}, *MESSAGES],
        "temperature": 0,
        "max_completion_tokens": 7,
        "stop": "x",
        "stream": True,
        "stream_options": {"include_usage": True},
        "n": 1,
        "tools": None,
        "user": "me",
    }
    found = asked(body, is_chat=True, most_tokens=9)
    assert found.conversation == (Turn("system", "Be brief."), Turn("user", "Hi"))
    assert found.settings == {"temperature": 0, "max_tokens": 7}
    assert (found.model, found.stops, found.streams, found.wants_usage) == ("a", ("x",), True, True)


def test_a_text_is_one_text():
    assert asked({"prompt": ["Count"]}, is_chat=False, most_tokens=9).prompt == "Count"
    for prompt in (["a", "b"], [1], 1, []):
        with pytest.raises(ApiError, match="prompt must be one text"):
            asked({"prompt": prompt}, is_chat=False, most_tokens=9)


@pytest.mark.parametrize("field", ["logprobs", "tools", "response_format", "presence_penalty", "logit_bias"])
def test_what_is_not_done_is_refused_and_not_passed_over(field):
    with pytest.raises(ApiError, match=f"{field} is not supported here") as error:
        asked({"messages": MESSAGES, field: {"a": 1}}, is_chat=True, most_tokens=9)
    assert error.value.body["error"]["param"] == field


def test_types_of_errors_follow_the_status():
    kinds = {429: "rate_limit_error", 400: "invalid_request_error", 408: "timeout", 507: "server_error"}
    for status, kind in kinds.items():
        assert ApiError(status, "m", "c", "p").body == {
            "error": {"message": "m", "type": kind, "param": "p", "code": "c"}
        }


def test_a_stream_ends_with_its_reason_and_its_counts():
    form, answer = Form(True, "a", 5), SpokenAnswer("tea", [1, 2], "length")
    first = form.chunk("", is_first=True)["choices"][0]
    assert first["delta"] == {"role": "assistant", "content": ""}
    assert form.last_chunk(answer)["choices"][0] == {
        "index": 0,
        "delta": {},
        "logprobs": None,
        "finish_reason": "length",
    }
    assert form.usage_chunk(answer)["choices"] == []
    assert form.usage_chunk(answer)["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 2,
        "total_tokens": 7,
    }
    assert Form(False, "a", 5).chunk("tea")["choices"][0]["text"] == "tea"
