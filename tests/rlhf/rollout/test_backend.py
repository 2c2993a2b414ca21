import pytest
from scripted_backend import END, ScriptedBackend, prompts

from dschat.arguments import RolloutArguments
from dschat.errors import UserError
from dschat.rlhf.rollout.backend import Ability, RolloutBackend, Sampling, require


def test_the_sampling_is_what_the_flags_ask_for():
    args = RolloutArguments(max_answer_seq_len=12, temperature=0.7, top_k=5, top_p=0.9)
    sampling = Sampling.of(args, seed=3, with_logprobs=True)
    assert sampling == Sampling(
        max_answer_length=12, temperature=0.7, top_k=5, top_p=0.9, seed=3, with_logprobs=True
    )


def test_a_back_end_of_some_lines_is_one():
    backend: RolloutBackend = ScriptedBackend([[(7, -1.0), (END, -2.0)]])
    with backend.session():
        rollout = backend.generate(prompts([5, 6]), Sampling(max_answer_length=4, with_logprobs=True))
    assert rollout.input_ids.tolist() == [[5, 6, 7, END]]
    assert (rollout.ended.tolist(), rollout.logprobs.tolist()) == ([True], [[-1, -2]])


@pytest.mark.parametrize(
    ("lacks", "sampling", "on_mismatch", "message"),
    [
        (Ability.LOGPROBS, {"with_logprobs": True}, "stop", "--rollout_correction: the script cannot record"),
        (Ability.GREEDY, {"greedy": True}, "stop", "greedy decoding: the script cannot take the likeliest"),
        (Ability.WITHOUT_CACHE, {}, "uncached", "--rollout_on_mismatch uncached: the script cannot generate"),
    ],
)
def test_an_ability_that_is_asked_for_and_lacking_ends_the_run(lacks, sampling, on_mismatch, message):
    wanted = Sampling(max_answer_length=4, **sampling)
    with pytest.raises(UserError, match=message):
        require(ScriptedBackend(cannot=frozenset({lacks})), wanted, on_mismatch=on_mismatch)
    require(ScriptedBackend(), wanted, on_mismatch=on_mismatch)


def test_an_ability_that_nobody_asks_for_may_lack():
    require(ScriptedBackend(cannot=frozenset(Ability)), Sampling(max_answer_length=4))
