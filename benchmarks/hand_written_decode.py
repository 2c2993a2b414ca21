"""The yardstick of decoding: OPT's layers written by hand over a static cache, as plain as can be.

It knows one layout, OPT's with norms before the layers, right-aligned prompts and no end token. It samples
from the softmax with torch's generator, once a step for the whole batch. Nobody would train with it;
`rollout.py` and `versus.py` compare back ends with it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class HandWrittenDecode:
    """Decodes with the weights of a `OPTForCausalLM` as they were when this was made: QKV is one matrix
    here."""

    def __init__(self, model: Any, batch: int, longest: int) -> None:
        """Room for `batch` rows of `longest` tokens. Raises `ValueError` for another layout."""
        decoder, config = model.model.decoder, model.config
        if not config.do_layer_norm_before or decoder.project_in is not None:
            raise ValueError("the hand-written loop knows OPT with norms before the layers alone")
        self.heads, self.width = config.num_attention_heads, config.hidden_size
        self.embed, self.positions = decoder.embed_tokens.weight, decoder.embed_positions.weight
        self.final_norm, self.head = decoder.final_layer_norm, model.lm_head.weight
        self.layers = [self._layer(layer) for layer in decoder.layers]
        shape = (len(self.layers), 2, batch, self.heads, longest, self.width // self.heads)
        self.cache = torch.zeros(shape, dtype=self.embed.dtype, device=self.embed.device)
        self.bias = torch.zeros(batch, 1, 1, longest, dtype=self.embed.dtype, device=self.embed.device)

    @staticmethod
    def _layer(layer: Any) -> dict[str, Any]:
        attention = layer.self_attn
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        return {
            "norm": layer.self_attn_layer_norm,
            "qkv": torch.cat([part.weight for part in parts]),
            "qkv_bias": torch.cat([part.bias for part in parts]),
            "out": attention.out_proj,
            "norm2": layer.final_layer_norm,
            "fc1": layer.fc1,
            "fc2": layer.fc2,
        }

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Tensor, num_new: int) -> Tensor:
        """Sampled tokens [B, num_new] after prompts [B, P] that are padded on the left."""
        length = input_ids.shape[1]
        self.bias.zero_()
        self.bias[..., :length].masked_fill_(
            (attention_mask == 0)[:, None, None], torch.finfo(self.bias.dtype).min
        )
        answers = torch.empty(len(input_ids), num_new, dtype=torch.long, device=input_ids.device)
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
        logits = self._forward(input_ids, positions, 0)
        for step in range(num_new):
            tokens = torch.multinomial(torch.softmax(logits.float(), dim=-1), 1)
            answers[:, step : step + 1] = tokens
            if step + 1 < num_new:
                logits = self._forward(tokens, positions[:, -1:] + step + 1, length + step)
        return answers

    def _forward(self, tokens: Tensor, positions: Tensor, start: int) -> Tensor:
        """Logits [B, V] of the last of the tokens [B, L], which stand from column `start` on."""
        batch, length = tokens.shape
        end = start + length
        hidden = F.embedding(tokens, self.embed) + F.embedding(positions + 2, self.positions)
        bias = self.bias[:batch, ..., :end]
        if length > 1:
            above = torch.full(
                (length, end), torch.finfo(bias.dtype).min, dtype=bias.dtype, device=bias.device
            )
            bias = bias + above.triu(start + 1)
            bias = bias.clamp(min=torch.finfo(bias.dtype).min)
        for layer, cache in zip(self.layers, self.cache, strict=True):
            qkv = F.linear(layer["norm"](hidden), layer["qkv"], layer["qkv_bias"])
            query, key, value = qkv.view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            cache[0, :batch, :, start:end], cache[1, :batch, :, start:end] = key, value
            mixed = F.scaled_dot_product_attention(
                query, cache[0, :batch, :, :end], cache[1, :batch, :, :end], attn_mask=bias
            )
            hidden = hidden + layer["out"](mixed.transpose(1, 2).reshape(batch, length, self.width))
            hidden = hidden + layer["fc2"](F.relu(layer["fc1"](layer["norm2"](hidden))))
        return F.linear(self.final_norm(hidden[:, -1]), self.head)
