"""RewardModel: scores stand where answers end, padding changes nothing, the loss is Bradley and Terry's."""

import math

import pytest
import torch
from processes import ROOT, python
from tiny import FAMILIES, TEXTS, save_tiny_model, tiny_tokenizer
from torch import nn
from transformers import AutoModelForSequenceClassification

from dschat.export.upstream import verify_model
from dschat.models.loading import create_critic_model
from dschat.models.reward_model import RewardModel, at_last_token


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, tmp_path_factory) -> RewardModel:
    folder = save_tiny_model(tmp_path_factory.mktemp(request.param), request.param)
    return create_critic_model(str(folder), tiny_tokenizer(), None)


def batch(side: str, texts=TEXTS) -> dict[str, torch.Tensor]:
    tokens = tiny_tokenizer()(list(texts), padding=True, padding_side=side, return_tensors="pt")
    return {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}


def scores(model: RewardModel, tokens: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model.forward_value(**tokens)["chosen_end_scores"]


def test_a_score_does_not_depend_on_padding_or_neighbours(model):
    alone = torch.cat([scores(model, batch("right", [text])) for text in TEXTS])
    torch.testing.assert_close(scores(model, batch("right")), alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(scores(model, batch("left")), alone, atol=1e-5, rtol=0)


def test_what_stands_in_the_padding_does_not_matter(model):
    tokens = batch("right")
    expected = scores(model, tokens)
    tokens["input_ids"][tokens["attention_mask"] == 0] = 300
    torch.testing.assert_close(scores(model, tokens), expected, atol=1e-5, rtol=0)


def test_without_mask_every_token_is_real(model):
    tokens = batch("right", TEXTS[:1])
    torch.testing.assert_close(scores(model, {"input_ids": tokens["input_ids"]}), scores(model, tokens))


def test_values_come_one_a_token_from_both_ways_of_asking(model):
    tokens = batch("left")
    with torch.no_grad():
        values = model.forward_value(**tokens, return_value_only=True)
        assert values.shape == tokens["input_ids"].shape
        assert values.dtype == torch.float32
        torch.testing.assert_close(model(**tokens, return_values=True), values)
    torch.testing.assert_close(scores(model, tokens), values[:, -1])


def test_gradients_reach_every_weight_of_the_backbone_and_the_head(model):
    model.zero_grad()
    model(**batch("right"))["loss"].backward()
    without = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    # Rounding apart, two biases have no gradient: attention is unchanged when all keys move alike, and what
    # the last norm adds to every hidden state cancels between the chosen and the rejected score.
    cancels = ("k_proj.bias", "final_layer_norm.bias", "final_layernorm.bias", "ln_f.bias")
    assert {name for name in without if not name.endswith(cancels)} == set()


class Echo(nn.Module):
    """A backbone whose hidden state is the token id, so that a head of weight 1 scores a token by its id."""

    def forward(self, input_ids, attention_mask=None, use_cache=False):
        self.last_hidden_state = input_ids.unsqueeze(-1).float()
        return self


@pytest.fixture
def echo() -> RewardModel:
    head = nn.Linear(1, 1, bias=False)
    nn.init.ones_(head.weight)
    return RewardModel(Echo(), head, config=None)


# Two pairs; the last real tokens are 2 and 3 (chosen) and 1 and 5 (rejected), 9 is padding.
PAIRS = torch.tensor([[7, 2, 9], [7, 7, 3], [1, 9, 9], [7, 5, 9]])
MASK = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 1, 0]])


@pytest.mark.parametrize("loss_fn", ["log_sig", "log_exp"])
def test_loss_of_two_pairs_worked_by_hand(echo, loss_fn):
    out = echo(PAIRS, MASK, loss_fn=loss_fn)
    assert out["chosen_mean_scores"].tolist() == [2, 3]
    assert out["rejected_mean_scores"].tolist() == [1, 5]
    # log(1 + e^-1) = 0.313262 for the lead of 1, log(1 + e^2) = 2.126928 for the lag of 2; their mean:
    assert out["loss"].item() == pytest.approx(1.220095, abs=1e-5)


def test_filler_pairs_do_not_count(echo):
    loss = echo(PAIRS, MASK, weights=torch.tensor([1.0, 0.0]))["loss"]
    assert loss.item() == pytest.approx(0.313262, abs=1e-5)


def test_the_denominator_is_the_callers(echo):
    loss = echo(PAIRS, MASK, weights=torch.tensor([1.0, 1.0]), denominator=4.0)["loss"]
    assert loss.item() == pytest.approx(1.220095 / 2, abs=1e-5)


def test_a_batch_of_fillers_alone_costs_nothing(echo):
    loss = echo(PAIRS, MASK, weights=torch.zeros(2))["loss"]
    assert loss.item() == 0


def test_the_last_token_is_found_on_either_side_and_with_gaps():
    x = torch.tensor([[10, 11, 12], [20, 21, 22], [30, 31, 32], [40, 41, 42]])
    mask = torch.tensor([[1, 1, 0], [0, 1, 1], [1, 0, 1], [1, 0, 0]])
    assert at_last_token(x, mask).tolist() == [11, 22, 32, 40]


def test_a_head_in_bf16_still_scores_in_fp32(echo):
    head = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    nn.init.constant_(head.weight, 1.0)
    model = RewardModel(Echo(), head, config=None)
    # 1001 needs ten bits and bf16 has eight, so a product in bf16 would be 1000.
    assert model(torch.tensor([[1001]]), return_values=True).item() == 1001
    assert not math.isclose(torch.tensor(1001.0).bfloat16().item(), 1001)


def test_gradient_checkpointing_can_be_switched(model):
    def is_on() -> bool:
        return any(getattr(part, "gradient_checkpointing", False) for part in model.modules())

    assert not is_on()
    model.gradient_checkpointing_enable()
    assert is_on()
    model.gradient_checkpointing_disable()
    assert not is_on()


PAD = 1
# The last row of each side is the longer one; 1 is the padding token of the tiny tokenizer.
ROWS = {
    "chosen_input_ids": torch.tensor([[9, 12, 40, 0, PAD, PAD], [30, 31, 32, 33, 34, 0]]).repeat(2, 1),
    "rejected_input_ids": torch.tensor([[9, 12, 41, 42, 0, PAD], [30, 31, 32, 0, PAD, PAD]]).repeat(2, 1),
}


def test_a_call_with_one_list_of_rows_returns_scores_and_finds_the_padding(base):
    model = RewardModel.from_pretrained(base)
    rows = ROWS["chosen_input_ids"][:2]
    with torch.no_grad():
        alone = torch.cat([model(rows[:1, :4]), model(rows[1:])])
        torch.testing.assert_close(model(rows), alone)
        torch.testing.assert_close(model(rows, attention_mask=rows != PAD), alone)
        inside = torch.tensor([[9, PAD, 40, 0, PAD]])  # a padding token between others is a token
        torch.testing.assert_close(model(inside), model(inside[:, :4], attention_mask=torch.ones(1, 4)))
    assert alone.dtype == torch.float32
    assert alone.shape == (2,)


def test_a_saved_reward_model_keeps_its_head(reward):
    rows = ROWS["chosen_input_ids"]
    first, again = (RewardModel.from_pretrained(reward) for _ in range(2))
    classifier = AutoModelForSequenceClassification.from_pretrained(reward)
    with torch.no_grad():
        torch.testing.assert_close(first(rows), classifier(rows).logits.squeeze(-1))
        torch.testing.assert_close(first(rows), again(rows), rtol=0, atol=0)


def test_a_loop_of_ones_own_trains_over_deepspeed_and_saves_a_reward_model_of_ours(base, tmp_path):
    batches = [ROWS, {name: rows.flip(0) for name, rows in ROWS.items()}]
    torch.save(batches, tmp_path / "rows.pt")
    loop = ROOT / "tests" / "workers" / "seed_loop.py"
    python(loop, base, tmp_path / "rows.pt", tmp_path, 0, 3, ranks=2)
    torch.manual_seed(7)
    expected = RewardModel.from_pretrained(base)
    optimizer = torch.optim.AdamW(expected.parameters(), lr=1e-2, eps=1e-3, weight_decay=0.0)
    for batch in batches:
        loss = (1 + (expected(batch["rejected_input_ids"]) - expected(batch["chosen_input_ids"])).exp()).log()
        loss.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for stage in (0, 3):
        folder = tmp_path / f"reward{stage}"
        assert verify_model(str(folder), "--critic_model_name_or_path", "score").manifest is None
        trained = RewardModel.from_pretrained(folder)
        classifier = AutoModelForSequenceClassification.from_pretrained(folder)
        with torch.no_grad():
            for rows in ROWS.values():
                torch.testing.assert_close(trained(rows), expected(rows), rtol=0, atol=1e-4)
                torch.testing.assert_close(classifier(rows).logits[:, 0], trained(rows), rtol=0, atol=1e-6)
        assert next((tmp_path / f"checkpoint{stage}").glob("global_step2/*.pt"))
