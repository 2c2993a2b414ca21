"""Models of random weights by size, for benchmarks: the layout of the issue's model, of OPT-125m and OPT-1.3b
and of Llama."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "6m": {"hidden_size": 256, "num_hidden_layers": 6, "ffn_dim": 1024, "num_attention_heads": 4,
           "max_position_embeddings": 1024, "vocab_size": 4096},
    "27m": {"hidden_size": 512, "num_hidden_layers": 8, "ffn_dim": 2048, "num_attention_heads": 8,
            "max_position_embeddings": 1024, "vocab_size": 4096},
    "89m": {"hidden_size": 768, "num_hidden_layers": 12, "ffn_dim": 3072, "num_attention_heads": 12,
            "max_position_embeddings": 1024, "vocab_size": 4096},
    "opt-350m": {"hidden_size": 1024, "num_hidden_layers": 24, "ffn_dim": 4096, "num_attention_heads": 16,
                 "max_position_embeddings": 2048, "vocab_size": 50272},
    "opt-1.3b": {"hidden_size": 2048, "num_hidden_layers": 24, "ffn_dim": 8192, "num_attention_heads": 32,
                 "max_position_embeddings": 2048, "vocab_size": 50272},
    "llama-13m": {"model_type": "llama", "hidden_size": 320, "num_hidden_layers": 7, "vocab_size": 8192,
                  "intermediate_size": 864, "num_attention_heads": 5, "num_key_value_heads": 1,
                  "max_position_embeddings": 1024},
    "llama-58m": {"model_type": "llama", "hidden_size": 576, "num_hidden_layers": 6, "vocab_size": 32000,
                  "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3,
                  "max_position_embeddings": 1024},
    "llama-50m-tied": {"model_type": "llama", "hidden_size": 448, "num_hidden_layers": 14,
                       "vocab_size": 32000, "intermediate_size": 1280, "num_attention_heads": 7,
                       "max_position_embeddings": 1024, "tie_word_embeddings": True},
}  # fmt: skip
"""Those of OPT: 6.05 million parameters; OPT-125m's body with a small vocabulary; OPT-350m's size with
OPT-1.3b's order of norms."""


def require_device(device: str) -> None:
    """End the program where it is to run on a GPU and there is none."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch finds no GPU here; leave the flag out for the CPU.")


def word_tokenizer(vocab_size: int) -> Any:
    """One token a word, "w5" and so on, with an end and a padding token: no data is needed to make it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<|endoftext|>", "<|pad|>", *(f"w{number}" for number in range(vocab_size - 2))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|pad|>")


def random_model(
    size: str, tokenizer: Any, *, device: str = "cpu", dtype: Any = None, scores: bool = False
) -> Any:
    """A language model of random weights, made on the device; with `scores` a classifier of one label."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    shape = SHAPES[size]
    if len(tokenizer) > shape["vocab_size"]:
        raise ValueError(
            f"{len(tokenizer)} tokens do not fit the vocabulary of {size}, {shape['vocab_size']}"
        )
    of_opt = {"model_type": "opt", "word_embed_proj_dim": shape["hidden_size"], "dropout": 0.0}
    config = AutoConfig.for_model(
        **(shape if "model_type" in shape else of_opt | shape), bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        if scores:
            config.num_labels = 1
            return AutoModelForSequenceClassification.from_config(config, dtype=dtype or torch.float32)
        return AutoModelForCausalLM.from_config(config, dtype=dtype or torch.float32)


def save_random_model(folder: Path, size: str, tokenizer: Any, **options: Any) -> int:
    """Write a model, as `random_model` makes it, and its tokenizer, where they are not yet. -> parameters."""
    if (folder / "parameters.txt").exists():
        return int((folder / "parameters.txt").read_text())
    model = random_model(size, tokenizer, **options)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "parameters.txt").write_text(f"{model.num_parameters()}\n")
    return model.num_parameters()
