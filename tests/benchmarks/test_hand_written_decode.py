"""The yardstick decodes what transformers decodes, or it would measure something else."""

import hand_written_decode
import pytest
import torch
from tiny import save_tiny_model
from transformers import AutoModelForCausalLM


def test_it_gives_the_logits_of_the_model_it_was_made_from(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(save_tiny_model(tmp_path, "opt")).eval()
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    prompts = torch.where(mask.bool(), torch.arange(10).view(2, 5) + 7, 1)
    decode = hand_written_decode.HandWrittenDecode(model, 2, 9)
    seen: list[torch.Tensor] = []
    forward = decode._forward
    decode._forward = lambda *args: seen.append(forward(*args)) or seen[-1]
    torch.manual_seed(0)
    answers = decode.generate(prompts, mask, 4)
    rows, masks = torch.cat([prompts, answers], 1), torch.cat([mask, torch.ones_like(answers)], 1)
    positions = (masks.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(input_ids=rows, attention_mask=masks, position_ids=positions).logits
    for step, found in enumerate(seen):
        torch.testing.assert_close(found, logits[:, 4 + step], rtol=1e-4, atol=1e-5)


def test_it_refuses_another_layout(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(save_tiny_model(tmp_path, "opt_projected"))
    with pytest.raises(ValueError, match="norms before the layers"):
        hand_written_decode.HandWrittenDecode(model, 1, 8)
