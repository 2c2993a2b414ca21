"""Attention by shape: every way is the same attention, and equal shapes are equal to the last bit."""

import contextlib
import math
import weakref

import pytest
import torch
import transformers
from packaging.version import Version
from tiny import save_tiny_model, tiny_config, tiny_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from dschat.arguments import ModelArguments
from dschat.distributed.process_wide import process_wide
from dschat.errors import UserError
from dschat.models import attention
from dschat.models.attention import MEASURED, GroupedHeads, MeasuredWays, choose_attention
from dschat.models.loading import create_hf_model
from dschat.models.reward_model import enable_gradient_checkpointing
from dschat.runs.measured_choices import MeasuredChoices

OTHERS = ("sdpa_fp32", "eager")
OWN_CODE = ("bloom", "falcon", *(() if Version(transformers.__version__) >= Version("5.24") else ("gptj",)))


@pytest.fixture
def way(request, monkeypatch):
    """Every range of widths goes the way that the test names."""
    monkeypatch.setattr(MeasuredWays, "of", lambda *_: request.param)
    return request.param


def model_of(family: str, implementation: str, dtype=torch.float32):
    config = tiny_config(family, 60, bos_token_id=0, eos_token_id=0, pad_token_id=1)
    config._attn_implementation = implementation
    for name in ("dropout", "attention_dropout"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def masks() -> dict[str, dict[str, torch.Tensor]]:
    """Rows of 10 tokens: without padding, with padding on either side, as two documents in a row."""
    right = torch.ones(2, 10, dtype=torch.long)
    right[0, 7:] = 0
    left = right.flip(1)
    documents = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]] * 2)
    of_document = (documents == 0).cumsum(1)
    same = of_document[:, None, :, None] == of_document[:, None, None, :]
    causal = torch.ones(10, 10, dtype=torch.bool).tril()
    return {
        "none": {},
        "right": {"attention_mask": right},
        "left": {"attention_mask": left, "position_ids": (left.cumsum(1) - 1).clamp(min=0)},
        "dense": {"attention_mask": same & causal, "position_ids": documents},
    }


def logits_and_gradients(model, options):
    ids = torch.arange(20).view(2, 10) + 5
    logits = model(input_ids=ids, use_cache=False, **options).logits
    real = options.get("attention_mask", torch.ones(2, 10))
    logits = logits[real.bool()] if real.dim() == 2 else logits
    logits.square().mean().backward()
    return [logits.detach(), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("way", OTHERS, indirect=True)
@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "gpt_neox", "mistral", "gemma"])
@pytest.mark.parametrize("mask", masks())
def test_a_way_has_the_logits_and_gradients_of_sdpa(family, mask, way):
    expected = logits_and_gradients(model_of(family, "sdpa"), masks()[mask])
    actual = logits_and_gradients(model_of(family, MEASURED), masks()[mask])
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def by_hand(query, key, value, mask):
    """Attention in double precision, one query at a time."""
    output = torch.zeros(query.shape, dtype=torch.float64)
    groups = query.shape[1] // key.shape[1]
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in query.shape[:3])).tolist():
        seen = mask[b, 0, i].nonzero().flatten()
        keys, values = key[b, h // groups, seen].double(), value[b, h // groups, seen].double()
        scores = keys @ query[b, h, i].double() / math.sqrt(query.shape[-1])
        output[b, h, i] = torch.softmax(scores, 0) @ values
    return output.transpose(1, 2)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-6)])
@pytest.mark.parametrize("name", attention.WAYS)
def test_a_way_is_attention(name, dtype, tolerance):
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, n, 6, 8).to(dtype) for n in (4, 2, 2))
    mask = torch.ones(6, 6, dtype=torch.bool).tril().expand(2, 1, 6, 6)
    output, _ = attention.WAYS[name](GroupedHeads(2), query, key, value, mask, scaling=8**-0.5)
    torch.testing.assert_close(output.double(), by_hand(query, key, value, mask), rtol=0, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-6)])
@pytest.mark.parametrize("way", attention.WAYS, indirect=True)
def test_sequences_of_one_row_attend_to_themselves_alone(way, dtype, tolerance):
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, n, 9, 8).to(dtype) for n in (4, 2, 2))
    lengths = torch.tensor([[[[4, 1, 3, 1]]]])
    mask = torch.block_diag(*(torch.ones(n, n).tril() for n in lengths.flatten())).bool()
    output, _ = attention.measured_attention(GroupedHeads(2), query, key, value, lengths, scaling=8**-0.5)
    expected = by_hand(query, key, value, mask[None, None])
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=tolerance)


class Products(TorchDispatchMode):
    """The shapes of batched products."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.bmm.default:
            self.shapes.add((tuple(args[0].shape[1:]), tuple(args[1].shape[1:])))
        return func(*args, **(kwargs or {}))


def test_groups_have_sequences_in_powers_of_two_and_every_token_once():
    places = attention.Places.of((5, 40, 32, 1, 60))
    assert places.groups == [(1, 32), (2, 32), (2, 64)]
    row = torch.arange(138)
    moved = row[places.in_groups]
    assert moved[places.in_one_row].tolist() == row.tolist()
    assert moved[places.real.flatten()].tolist() == [
        *range(5),
        *range(45, 78),
        *range(5, 45),
        *range(78, 138),
    ]


@pytest.mark.parametrize("way", ["eager"], indirect=True)
def test_sequences_of_one_row_have_the_gradients_of_each_alone_by_products_of_few_shapes(way):
    torch.manual_seed(0)
    lengths = torch.tensor([1, 70, 5, 31, 96, 33, 32, 64, 90, 2])
    states = [torch.randn(1, n, int(lengths.sum()), 8).requires_grad_() for n in (4, 2, 2)]
    with Products() as products:
        output, _ = attention.measured_attention(
            GroupedHeads(2), *states, lengths[None, None, None], scaling=0.3
        )
        weights = torch.randn_like(output)
        found = torch.autograd.grad(output, states, weights)
    parts, alone = zip(*(tensor.split(lengths.tolist(), dim=2) for tensor in states), strict=True), []
    for part in parts:
        mask = torch.ones(part[0].shape[2], part[0].shape[2], dtype=torch.bool).tril()[None, None]
        alone.append(attention.WAYS["sdpa"](GroupedHeads(2), *part, mask, scaling=0.3)[0])
    torch.testing.assert_close(output, torch.cat(alone, dim=1), rtol=0, atol=1e-6)
    expected = torch.autograd.grad(torch.cat(alone, dim=1), states, weights)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    of_tokens = {size for shapes in products.shapes for shape in shapes for size in shape if size != 8}
    assert of_tokens == {32, 64, 96}


@pytest.mark.parametrize("way", attention.WAYS, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_see_nothing_are_finite(way, dtype):
    model = model_of("llama", MEASURED, dtype)
    options = {"attention_mask": torch.tensor([[0] * 10, [1] * 10])}
    output = model(input_ids=torch.full((2, 10), 5), use_cache=False, **options).logits
    output[1].float().square().mean().backward()
    assert output.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("way", OTHERS, indirect=True)
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_passes_with_and_without_gradients_and_recomputed_ones_are_equal_to_the_last_bit(family, way):
    options = masks()["right"]
    model = model_of(family, MEASURED, torch.bfloat16)
    with torch.no_grad():
        first = model(input_ids=torch.full((2, 10), 5), use_cache=False, **options).logits
    second = model(input_ids=torch.full((2, 10), 5), use_cache=False, **options).logits
    assert torch.equal(first, second)
    plain = logits_and_gradients(model.train(), options)
    plain = [tensor.clone() for tensor in plain]
    model.zero_grad()
    enable_gradient_checkpointing(model)
    recomputed = logits_and_gradients(model, options)
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))


def losses_of_training(implementation: str) -> list[float]:
    model = model_of("llama", implementation).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)
    options, ids = masks()["right"], torch.arange(20).view(2, 10) + 5
    losses = []
    for _ in range(8):
        losses.append(model(input_ids=ids, labels=ids, use_cache=False, **options).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    return [loss.item() for loss in losses]


@pytest.mark.parametrize("way", OTHERS, indirect=True)
def test_the_loss_curve_is_that_of_sdpa(way):
    expected = losses_of_training("sdpa")
    assert losses_of_training(MEASURED) == pytest.approx(expected, rel=1e-5)
    assert expected[-1] < expected[0] / 2


@pytest.mark.parametrize("way", OTHERS, indirect=True)
def test_decoding_with_a_cache_gives_the_tokens_of_sdpa(way):
    ids, mask = torch.arange(20).view(2, 10) + 5, masks()["left"]["attention_mask"]
    settings = {"max_new_tokens": 6, "do_sample": False, "attention_mask": mask, "eos_token_id": None}
    models = [model_of("llama", name).eval() for name in ("sdpa", MEASURED)]
    expected, actual = [model.generate(ids, **settings) for model in models]
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("family", ["llama", *OWN_CODE])
def test_auto_leaves_families_with_attention_of_their_own_alone_and_no_file_has_the_name(family, tmp_path):
    path = save_tiny_model(tmp_path / "base", family)
    model = create_hf_model(
        AutoModelForCausalLM, str(path), tiny_tokenizer(), None, attn_implementation="auto"
    )
    assert (model.config._attn_implementation == MEASURED) == (family not in OWN_CODE)
    model.save_pretrained(tmp_path / "saved")
    assert "dschat" not in (tmp_path / "saved" / "config.json").read_text(encoding="utf-8")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "saved").config._attn_implementation != MEASURED


def flags(implementation: str = "auto") -> ModelArguments:
    return ModelArguments(model_name_or_path="x", attn_implementation=implementation)


class Fastest(MeasuredChoices):
    """Chooses the last way, and knows what it was asked."""

    def __init__(self):
        super().__init__()
        self.asked = {}

    def choose(self, name, ways, **_):
        for run in ways.values():
            run()
        self.asked[name] = list(ways)
        return list(ways)[-1]


def test_each_range_of_widths_that_rows_reach_is_timed_by_itself(tmp_path, monkeypatch):
    measured = process_wide(MeasuredWays)
    monkeypatch.setattr(measured, "by_heads", {})
    path = str(save_tiny_model(tmp_path, "llama"))
    choices = Fastest()
    choose_attention([(path, flags()), (path, flags("sdpa"))], dtype="bf16", longest=700, choices=choices)
    assert list(choices.asked.values()) == [["sdpa", "sdpa_fp32", "eager"]] * 3 + [["sdpa", "sdpa_fp32"]]
    (heads, ways), *_ = measured.by_heads.items()
    assert heads == (4, 2, 8, torch.bfloat16)
    assert ways == {128: "eager", 256: "eager", 512: "eager", 1024: "sdpa_fp32"}
    widths = {1: "eager", 128: "eager", 512: "eager", 513: "sdpa_fp32", 5000: "sdpa_fp32"}
    assert {width: measured.of(heads, width) for width in widths} == widths
    assert measured.of((9, 9, 9, torch.float32), 10) == "sdpa"
    choices = Fastest()
    choose_attention([(path, flags())], dtype="fp32", longest=100, choices=choices)
    assert list(choices.asked.values()) == [["sdpa", "eager"]]


def test_a_way_that_computes_something_else_is_not_used(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(process_wide(MeasuredWays), "by_heads", {})
    monkeypatch.setitem(attention.WAYS, "eager", lambda m, q, k, v, mask, **_: (q.transpose(1, 2) + 1, None))
    monkeypatch.setattr(torch.autograd, "grad", lambda output, inputs, _: inputs)
    choices, path = Fastest(), str(save_tiny_model(tmp_path, "llama"))
    choose_attention([(path, flags())], dtype="fp32", longest=100, choices=choices)
    assert list(choices.asked.values()) == [["sdpa"]]
    assert "eager differs from sdpa by" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("family", "implementation", "words"),
    [("llama", "flash_attention_2", "needs a GPU"), ("bloom", "sdpa", "no such attention for 'bloom'")],
)
def test_what_cannot_be_had_is_an_error_before_a_model_is_loaded(family, implementation, words, tmp_path):
    path = save_tiny_model(tmp_path, family)
    (path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=f"--attn_implementation {implementation}.*{words}"):
        choose_attention(
            [(str(path), flags(implementation))], dtype="bf16", longest=9, choices=MeasuredChoices()
        )


def test_eager_is_transformers_own(tmp_path):
    path = save_tiny_model(tmp_path, "llama")
    model = create_hf_model(AutoModelForCausalLM, str(path), tiny_tokenizer(), attn_implementation="eager")
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("kept_narrow", [True, False])
def test_fp32_copies_are_not_kept_for_the_backward_pass(kept_narrow):
    narrow = torch.randn(3, 4).bfloat16().requires_grad_()
    wide = narrow.float()
    copy = weakref.ref(wide)
    with attention._kept_narrow([wide], [narrow]) if kept_narrow else contextlib.nullcontext():
        output = wide.square() + wide.exp()  # exp keeps its output, which is a copy of nothing
    del wide
    assert (copy() is None) == kept_narrow
    output.sum().backward()
    values = narrow.detach().float()
    torch.testing.assert_close(narrow.grad, (2 * values + values.exp()).bfloat16())


def test_checkpointing_keeps_its_own_tensors_alone():
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, lambda _: None):
        assert isinstance(attention._kept_narrow([], []), contextlib.nullcontext)
    assert not isinstance(attention._kept_narrow([], []), contextlib.nullcontext)
