"""The analysis of answers by models whose outputs are known."""

from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from dschat.arguments import PpoArguments
from dschat.rlhf.analysis import AnswerAnalyzer, ModelOutputs
from dschat.rlhf.first_pass import FirstPass
from dschat.rlhf.rollout.batch import RolloutBatch

# P(next | token) of a vocabulary of 3, whose last entry pads it; the reference model finds all alike
BIGRAMS = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.6, 0.2], [0.1, 0.8, 0.1]])
ALIKE = torch.ones(3, 3)
# Prompts 0 1 and, behind padding, 1; answers 1 0 and 0.
ROLLOUT = RolloutBatch(
    input_ids=torch.tensor([[0, 1, 1, 0], [2, 1, 0, 0]]),
    attention_mask=torch.tensor([[1, 1, 1, 1], [0, 1, 1, 0]]),
    answer_mask=torch.tensor([[True, True], [True, False]]),
    ended=torch.tensor([True, True]),
    prompt_rows=torch.tensor([4, 7]),
    prompt_length=2,
)


class Bigrams:
    """A language model that predicts from the last token alone, in the place of an engine."""

    def __init__(self, table, calls):
        self.table, self.calls, self.training = table, calls, True

    def __call__(self, input_ids, **options):
        self.calls.append(len(input_ids))
        return SimpleNamespace(logits=self.table.log()[input_ids])

    def train(self):
        self.training = True

    def eval(self):
        self.training = False


class Echo(Bigrams):
    """A critic or reward model whose output is the token."""

    def __call__(self, input_ids, *, return_values):
        return input_ids.float() if self.table is None else self.table[input_ids]


@pytest.fixture
def engines():
    calls = []
    actor, critic = Bigrams(BIGRAMS, calls), Echo(None, calls)

    @contextmanager
    def reference():
        yield Bigrams(ALIKE, calls)

    return SimpleNamespace(
        actor=actor,
        critic=critic,
        reward=Echo(None, calls),
        reference=reference,
        trained=[actor, critic],
        specs={},
        calls=calls,
    )


@pytest.fixture
def analyzer(engines, monkeypatch):
    monkeypatch.setattr("dschat.rlhf.analysis.build_retokenizer", lambda *args: None)
    args = SimpleNamespace(rollout=SimpleNamespace(temperature=1.0), ppo=PpoArguments())
    return AnswerAnalyzer(engines, SimpleNamespace(actor=range(2)), args)


def rows(*indices):
    return [torch.tensor(part) for part in indices]


def test_every_model_is_asked_of_the_answers_and_what_it_says_stands_at_their_rows(analyzer, engines):
    # each row a pass of its own, the later one first
    analysis = analyzer.analyze(ROLLOUT, rows([1], [0]))
    # of two tokens: P(1|1) = 0.6 / 0.8 and P(0|1), and P(0|1)
    torch.testing.assert_close(analysis.logprobs[ROLLOUT.answer_mask].exp(), torch.tensor([0.75, 0.25, 0.25]))
    torch.testing.assert_close(analysis.ref_logprobs[ROLLOUT.answer_mask].exp(), torch.full((3,), 0.5))
    assert analysis.values.tolist()[0] == [1, 1]  # of the tokens before: 1 1
    assert analysis.values[1, 0] == 1
    assert analysis.scores.tolist() == [0, 0]  # of the last tokens of the answers
    assert not engines.actor.training
    assert not engines.critic.training


def test_the_critic_is_left_out_where_values_are_not_asked_for(analyzer):
    assert analyzer.analyze(ROLLOUT, rows([0, 1]), with_values=False).values is None


def test_actor_and_reference_pass_over_the_same_rows_in_turn(analyzer, engines):
    analyzer.analyze(ROLLOUT, rows([0], [1]))
    assert engines.calls == [1, 1, 1, 1]


def test_the_graph_of_the_first_rows_alone_is_kept_and_changes_nothing(analyzer, engines):
    expected = analyzer.analyze(ROLLOUT, rows([1], [0]))
    engines.actor.table = BIGRAMS.clone().requires_grad_()
    engines.critic.table = torch.arange(3.0, requires_grad=True)
    first_pass = FirstPass()
    first_pass.begin(keeps_actor=True)
    analysis = analyzer.analyze(ROLLOUT, rows([1], [0]), first_pass=first_pass)
    for name in ("logprobs", "entropy", "values"):
        actual = getattr(analysis, name)
        assert torch.equal(actual, getattr(expected, name)), name
        assert not actual.requires_grad, name
    assert engines.actor.training
    assert engines.critic.training
    logprobs, _ = first_pass.take_actor()
    assert torch.equal(logprobs[0, :1], analysis.logprobs[1, :1])
    assert logprobs.requires_grad
    assert first_pass.take_critic().requires_grad
    assert first_pass.take_actor() is first_pass.take_critic() is None


def test_the_critic_s_graph_is_kept_only_where_it_is_asked_for(analyzer, engines):
    engines.critic.table = torch.arange(3.0, requires_grad=True)
    first_pass = FirstPass(keeps_critic=False)
    first_pass.begin(keeps_actor=True)
    assert analyzer.analyze(ROLLOUT, rows([0, 1]), first_pass=first_pass).values is not None
    assert first_pass.take_critic() is None
    assert first_pass.take_actor() is not None
    assert not engines.critic.training


def test_no_graph_of_an_actor_that_waits_is_kept(analyzer, engines):
    engines.actor.table = BIGRAMS.clone().requires_grad_()
    first_pass = FirstPass()
    first_pass.begin(keeps_actor=False)
    analyzer.analyze(ROLLOUT, rows([0, 1]), first_pass=first_pass)
    assert first_pass.take_actor() is None
    assert first_pass.take_critic() is not None


def test_outputs_return_to_the_rows_they_were_made_of():
    lengths = torch.tensor([2, 5, 1, 5, 3, 4])
    mask = torch.arange(5) < lengths[:, None]
    generator = torch.Generator().manual_seed(0)
    whole = ModelOutputs(*torch.randn(4, 6, 5, generator=generator), torch.randn(6, generator=generator))
    numbers = rows([5, 1], [0, 4], [3, 2])
    parts = []
    for part in numbers:
        width = int(lengths[part].max())
        columns = (whole.logprobs, whole.entropy, whole.ref_logprobs, whole.values)
        parts.append(ModelOutputs(*(c[part, :width] for c in columns), whole.scores[part]))
    gathered = ModelOutputs.gather(parts, numbers, 5)
    assert torch.equal(gathered.scores, whole.scores)
    for name in ("logprobs", "entropy", "ref_logprobs", "values"):
        assert torch.equal(getattr(gathered, name)[mask], getattr(whole, name)[mask])
    without = ModelOutputs.gather([replace(part, values=None, scores=None) for part in parts], numbers, 5)
    assert without.values is None
    assert without.scores is None
    assert torch.equal(without.logprobs, gathered.logprobs)
