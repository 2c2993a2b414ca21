"""Which tokenizer each model of step 3 reads by, and what the models' tokenizers may be."""

import pytest
from tiny import tiny_tokenizer

from dschat.arguments import parse_arguments
from dschat.data.templates import NONE, PLAIN
from dschat.errors import UserError
from dschat.rlhf.roles import engine_specs, spec_of
from dschat.rlhf.tokenizers import load_rlhf_tokenizers


def saved(folder, tokenizer) -> str:
    tokenizer.save_pretrained(folder)
    return str(folder)


def rlhf_tokenizers(tmp_path, actor, critic, reward=None):
    """What step 3 makes of three models with these tokenizers."""
    flags = {"actor": actor, "critic": critic, "reward": reward}
    argv = [
        f"--{role}_model_name_or_path={saved(tmp_path / role, tokenizer)}"
        for role, tokenizer in flags.items()
        if tokenizer is not None
    ]
    return load(argv)


def load(argv):
    """The tokenizers, and whether the critic has to start from the actor."""
    args = parse_arguments("rlhf", argv)
    tokenizers, specs = load_rlhf_tokenizers(engine_specs(args), args.tokenizer)
    return tokenizers, spec_of(specs, "critic").fresh_head


def with_template(template, **settings):
    tokenizer = tiny_tokenizer(**settings)
    tokenizer.chat_template = template
    return tokenizer


def test_one_tokenizer_serves_all_four_models(tmp_path):
    loaded, fresh_critic = rlhf_tokenizers(tmp_path, tiny_tokenizer(bos=True), tiny_tokenizer(bos=True))
    assert (loaded.own, fresh_critic) == ({}, False)
    assert loaded.of("reward") is loaded.actor


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        # What is learnt has ids from 258 on, after two special tokens and 256 bytes: "aa" here, "bb" there.
        (lambda: tiny_tokenizer(["abbb"]), "'aa' has id 258 for the actor, None for the reward model"),
        (lambda: with_added_token(tiny_tokenizer(["aaab"])), "None for the actor"),
        (lambda: with_other_end(tiny_tokenizer(["aaab"])), "'<s>' has id None for the actor"),
    ],
)
def test_a_reward_model_of_another_tokenizer_reads_text_and_the_critic_starts_from_the_actor(
    tmp_path, capsys, change, difference
):
    loaded, fresh_critic = rlhf_tokenizers(tmp_path, tiny_tokenizer(["aaab"]), change())
    assert fresh_critic
    assert list(loaded.own) == ["reward"]
    assert loaded.of("reward").get_vocab() != loaded.of("critic").get_vocab()
    told = capsys.readouterr().out
    assert difference in told
    assert "the critic starts from the actor" in told


def test_without_a_critic_to_start_from_it_starts_from_the_actor(tmp_path):
    actor = saved(tmp_path / "actor", tiny_tokenizer())
    argv = [f"--actor_model_name_or_path={actor}", "--reward_function=rules.py:f"]
    loaded, fresh_critic = load(argv)
    assert (loaded.own, fresh_critic) == ({}, True)
    other = saved(tmp_path / "reward", tiny_tokenizer(["abbb"]))
    loaded, fresh_critic = load([*argv, f"--reward_model_name_or_path={other}"])
    assert loaded.reward_tokenizer.get_vocab() != loaded.actor.get_vocab()
    assert fresh_critic


def with_added_token(tokenizer):
    tokenizer.add_tokens(["<|new|>"])
    return tokenizer


def with_other_end(tokenizer):
    tokenizer.add_special_tokens({"eos_token": "<s>"})
    return tokenizer


def test_a_critic_of_another_tokenizer_beside_a_named_reward_model_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"'aa' has id 258 .*The critic reads the actor's tokens"):
        rlhf_tokenizers(tmp_path, tiny_tokenizer(["aaab"]), tiny_tokenizer(["abbb"]), tiny_tokenizer())


def test_a_reward_model_of_another_template_is_an_error_unless_it_is_named(tmp_path):
    ours, theirs = with_template(PLAIN), with_template(NONE)
    with pytest.raises(UserError, match="different chat templates"):
        rlhf_tokenizers(tmp_path, ours, theirs)
    loaded, fresh_critic = rlhf_tokenizers(tmp_path, ours, ours, theirs)
    assert loaded.reward_tokenizer.chat_template == NONE
    assert not fresh_critic


def test_a_second_reward_model_reads_as_the_actor_or_as_the_reward_model(tmp_path):
    ours, theirs, third = tiny_tokenizer(["aaab"]), tiny_tokenizer(["abbb"]), tiny_tokenizer(["bbbb", "cc"])
    flags = {"actor": ours, "critic": ours, "reward": theirs}
    argv = [
        f"--{role}_model_name_or_path={saved(tmp_path / role, tokenizer)}"
        for role, tokenizer in flags.items()
    ]

    def guarded(tokenizer):
        guard = saved(tmp_path / "guard", tokenizer)
        return load([*argv, f"--guard_reward_model_name_or_path={guard}"])[0]

    assert list(guarded(ours).own) == ["reward"]
    loaded = guarded(theirs)
    assert loaded.own["guard"].get_vocab() == loaded.reward_tokenizer.get_vocab()
    with pytest.raises(UserError, match=r"--guard_reward_model_name_or_path .*reads as one of them does"):
        guarded(third)
