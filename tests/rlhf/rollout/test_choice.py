import json

import pytest
import torch
from processes import ROOT, python
from rollout_helpers import TEXTS, PlainEngine, answers, prompt_batch
from tiny import save_tiny_model, tiny_config, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from dschat.arguments import RolloutArguments
from dschat.errors import UserError
from dschat.rlhf.rollout.backend import Sampling
from dschat.rlhf.rollout.choice import CHOICE, build_backend
from dschat.rlhf.rollout.continuous import ContinuousBatching
from dschat.rlhf.rollout.hf_generate import HuggingFaceGenerate
from dschat.rlhf.rollout.static_decoding import StaticDecoding
from dschat.runs import measured_choices
from dschat.runs.measured_choices import MeasuredChoices

NAMES = ("static", "continuous", "hf")


@pytest.fixture(scope="module")
def actor(tmp_path_factory):
    folder = save_tiny_model(tmp_path_factory.mktemp("actor"), "gpt2")
    model = AutoModelForCausalLM.from_pretrained(folder)
    return PlainEngine(model), AutoTokenizer.from_pretrained(folder)


def chosen(actor, choices: MeasuredChoices, backend: str = "auto"):
    args = RolloutArguments(rollout_backend=backend, per_device_generation_batch_size=4)
    return build_backend(args, *actor, longest=60, choices=choices)


@pytest.mark.parametrize(("fastest", "kind"), [("hf", HuggingFaceGenerate), ("static, sdpa", StaticDecoding)])
def test_auto_takes_what_is_fastest_here_and_says_so(actor, fastest, kind, tmp_path, monkeypatch, capsys):
    def times(ways, *_):
        for way in ways.values():
            way()  # each can answer
        return {way: 1.0 if way == fastest else 2.0 for way in ways}

    monkeypatch.setattr(measured_choices, "_times", times)
    choices = MeasuredChoices(folder=tmp_path)
    backend = chosen(actor, choices)
    assert isinstance(backend, kind)
    assert getattr(backend, "mode", None) == fastest.partition(", ")[2] or fastest == "hf"
    assert choices.made == {CHOICE: fastest}
    told = capsys.readouterr().out
    assert f"--rollout_backend: {fastest} (measured on this machine: static, traced 2 s" in told


def test_a_run_goes_on_with_the_way_that_its_checkpoint_has(actor):
    backend = chosen(actor, MeasuredChoices({CHOICE: "static, model"}))
    assert backend.mode == "model"
    assert isinstance(chosen(actor, MeasuredChoices({CHOICE: "hf"})), HuggingFaceGenerate)


def test_without_measurements_the_way_is_fixed(actor):
    backend = chosen(actor, MeasuredChoices(measures=False))
    assert (backend.name, backend.mode) == ("static decoding", "traced")


def test_a_back_end_that_is_named_is_taken(actor, monkeypatch, tmp_path):
    assert isinstance(chosen(actor, MeasuredChoices(measures=False), "hf"), HuggingFaceGenerate)
    monkeypatch.setattr(measured_choices, "_times", lambda ways, *_: dict.fromkeys(ways, 1.0))
    choices = MeasuredChoices(folder=tmp_path)
    assert isinstance(chosen(actor, choices, "static"), StaticDecoding)
    assert choices.made == {CHOICE: "static, traced"}
    assert isinstance(chosen(actor, MeasuredChoices(measures=False), "continuous"), ContinuousBatching)


def test_auto_times_continuous_batching_with_flash_attention_alone(actor, monkeypatch, tmp_path):
    timed = []

    def times(ways, *_):
        timed.append([*ways])
        for way in ways.values():
            way()
        return {way: 1.0 if way == "continuous" else 2.0 for way in ways}

    monkeypatch.setattr(measured_choices, "_times", times)
    chosen(actor, MeasuredChoices(folder=tmp_path / "sdpa"))
    monkeypatch.setattr(ContinuousBatching, "has_flash_attention", True)
    assert isinstance(chosen(actor, MeasuredChoices(folder=tmp_path / "flash")), ContinuousBatching)
    monkeypatch.setattr(ContinuousBatching, "_agrees", lambda self: False)
    chosen(actor, MeasuredChoices(folder=tmp_path / "refused"))
    assert ["continuous" in ways for ways in timed] == [False, True, False]


def test_what_continuous_batching_cannot_do_ends_the_run_where_it_is_named(actor, monkeypatch):
    monkeypatch.setattr(ContinuousBatching, "_agrees", lambda self: False)
    with pytest.raises(UserError, match=r"--rollout_backend continuous: .* use --rollout_backend auto"):
        chosen(actor, MeasuredChoices(measures=False), "continuous")


def test_every_back_end_gives_the_same_answers(actor):
    _, tokenizer = actor
    found = []
    for backend in (chosen(actor, MeasuredChoices(measures=False), name) for name in NAMES):
        with backend.session():
            sampling = Sampling(max_answer_length=20, seed=1, with_logprobs=True)
            found.append(backend.generate(prompt_batch(tokenizer, TEXTS), sampling))
    for other in found[1:]:
        assert answers(other) == answers(found[0])
        torch.testing.assert_close(other.logprobs, found[0].logprobs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("num_positions", [20, 48])
def test_trials_stay_within_the_positions_of_a_small_model(num_positions, tmp_path):
    tokenizer, config = tiny_tokenizer(), tiny_config("gpt2", 400, eos_token_id=0)
    config.n_positions = num_positions
    model = PlainEngine(AutoModelForCausalLM.from_config(config))
    args = RolloutArguments(max_prompt_seq_len=num_positions - 8, max_answer_seq_len=8)
    choices = MeasuredChoices(folder=tmp_path)
    backend = build_backend(args, model, tokenizer, longest=num_positions, choices=choices)
    with backend.session():
        found = backend.generate(prompt_batch(tokenizer, [" one two"]), Sampling(max_answer_length=8))
    assert found.answer_mask.any()


@pytest.mark.matrix
def test_two_ranks_that_share_weights_generate_at_most_half_slower_again(tmp_path):
    """ZeRO-3 beside ZeRO-0, in processor time: gathering the weights and decoding with the whole ones."""
    shape = {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4, "vocab_size": 4096}
    model = LlamaForCausalLM(LlamaConfig(**shape, intermediate_size=1024))
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    worker = ROOT / "tests" / "workers" / "generation_times.py"
    python(worker, tmp_path / "model", tmp_path / "seen.json", ranks=2)
    seen = json.loads((tmp_path / "seen.json").read_text())
    print(seen)
    assert max(seen["seconds"]["3"]) <= 1.5 * max(seen["seconds"]["0"])
