from dschat.rlhf.rewards.text_answers import Problem, TextAnswers


def test_batches_cut_all_lists_alike_and_keep_the_order():
    answers = TextAnswers(["p", "q", "r"], ["a", "b", "c"], {"x": [1, 2, 3], "y": [None, 0, ""]})
    first, second = answers.batches(2)
    assert first == TextAnswers(["p", "q"], ["a", "b"], {"x": [1, 2], "y": [None, 0]})
    assert second == TextAnswers(["r"], ["c"], {"x": [3], "y": [""]})
    assert len(answers) == 3
    assert list(answers.batches(3)) == [answers]


def test_no_answers_make_no_batch():
    assert list(TextAnswers([], [], {"x": []}).batches(4)) == []


def test_problems_of_one_kind_may_say_different_things():
    assert Problem("hangs", "after 1 s").kind == Problem("hangs", "after 2 s").kind
