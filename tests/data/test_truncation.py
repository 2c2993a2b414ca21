from dschat.data.truncation import NOT_FOR_LENGTH, REASONS, Truncation


def test_examples_are_kept_whole_shortened_or_cut_and_dropped_otherwise():
    kept = [kind.name for kind in Truncation if kind.is_kept]
    assert kept == ["WHOLE", "FEWER_TURNS", "CUT"]


def test_every_drop_has_a_reason_but_a_refusal_which_has_its_own():
    assert set(REASONS) == {kind for kind in Truncation if not kind.is_kept} - {Truncation.REFUSED}
    assert REASONS[Truncation.LONG_PROMPT].format(limit="--max_seq_len") == "prompt over --max_seq_len"


def test_a_higher_limit_mends_a_long_prompt_only():
    assert REASONS[Truncation.LONG_PROMPT] not in NOT_FOR_LENGTH
    assert REASONS[Truncation.EQUAL_ANSWERS] in NOT_FOR_LENGTH
