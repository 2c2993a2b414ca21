"""Small models and tokenizers for tests: real architectures, random weights, under a million parameters."""

import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    GemmaConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    PhiConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from dschat.data.comparisons import Comparison, record_batch
from dschat.data.rows import Rows
from dschat.export.export import export_model
from dschat.models.loading import create_critic_model
from dschat.models.tokenizer import load_tokenizer

# "opt_projected" is OPT-350m's shape: embeddings narrower than the hidden states, norms after the layers.
# "llama" has grouped queries, "llama_mha" a key head a query head; "falcon_alibi" is Falcon-RW's shape.
FAMILIES = (
    *("llama", "opt", "qwen3", "gpt2", "gpt_neox", "opt_projected"),
    *("llama_mha", "qwen2", "mistral", "gemma", "phi", "gptj", "bloom", "falcon", "falcon_alibi"),
    *("mixtral", "qwen3_moe"),
)

TEXTS = (
    "\n\nHuman: How do I boil an egg?\n\nAssistant: Put it in boiling water for eight minutes.",
    "\n\nHuman: What is the capital of France?\n\nAssistant: The capital of France is Paris.",
    "\n\nHuman: Count to five.\n\nAssistant: one two three four five",
    "\n\nHuman: Is the sky blue?\n\nAssistant: Yes, on a clear day the sky is blue.",
)


def tiny_tokenizer(
    texts: Sequence[str] | None = None,
    *,
    vocab_size: int = 384,
    bos: bool = False,
    pad_token: str | None = "<|pad|>",
) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on `texts`, ending with `<|endoftext|>`.

    With `bos` it starts every text with `<s>`, as Llama's does; `pad_token=None` leaves it without one, as
    GPT-2's is. `vocab_size` is an upper bound of at least 259 that counts the special tokens.
    """
    specials = ["<|endoftext|>", *([pad_token] if pad_token else []), *(["<s>"] if bos else [])]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS if texts is None else texts, trainer)
    if bos:
        start = ("<s>", backend.token_to_id("<s>"))
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[start]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|endoftext|>",
        pad_token=pad_token,
        bos_token="<s>" if bos else None,
    )


def comparison_rows(*comparisons: Comparison) -> Dataset:
    """The comparisons as the data set that tokenisation reads."""
    return Dataset(pa.Table.from_batches([record_batch(comparisons)]))


def tiny_config(family: str, vocab_size: int, **ids: int | None) -> PretrainedConfig:
    """A two-layer configuration of the family with hidden size 32 and room for 512 positions.

    `ids` are bos_token_id, eos_token_id and pad_token_id.
    """
    vocabulary = {"vocab_size": vocab_size, **ids}
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, **vocabulary}
    narrow = {"word_embed_proj_dim": 16, "do_layer_norm_before": False}
    gpt2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, **vocabulary}
    gated = shape | {"intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 512}
    wide = shape | {"intermediate_size": 64, "max_position_embeddings": 512}
    opt = shape | {"ffn_dim": 64, "max_position_embeddings": 512, "word_embed_proj_dim": 32}
    falcon = shape | {"max_position_embeddings": 512, "ffn_hidden_size": 64}
    moe = gated | {"num_experts_per_tok": 2, "head_dim": 8}
    configs = {
        "llama": lambda: LlamaConfig(**gated, tie_word_embeddings=False),
        "qwen3": lambda: Qwen3Config(**gated, head_dim=8, tie_word_embeddings=True),
        "opt": lambda: OPTConfig(**opt),
        "opt_projected": lambda: OPTConfig(**opt | narrow),
        "gpt2": lambda: GPT2Config(**gpt2),
        "gpt_neox": lambda: GPTNeoXConfig(**wide),
        "llama_mha": lambda: LlamaConfig(**gated | {"num_key_value_heads": 4}),
        "qwen2": lambda: Qwen2Config(**gated),
        "mistral": lambda: MistralConfig(**gated, sliding_window=256),
        "gemma": lambda: GemmaConfig(**gated | {"num_key_value_heads": 1}, head_dim=8),
        "phi": lambda: PhiConfig(**wide),
        "gptj": lambda: GPTJConfig(**gpt2, rotary_dim=4),
        "bloom": lambda: BloomConfig(**vocabulary, hidden_size=32, n_layer=2, n_head=4),
        "falcon": lambda: FalconConfig(**falcon, alibi=False, multi_query=True, parallel_attn=True),
        "falcon_alibi": lambda: FalconConfig(
            **falcon, alibi=True, multi_query=False, parallel_attn=False, bias=True
        ),
        "mixtral": lambda: MixtralConfig(**moe, num_local_experts=4),
        "qwen3_moe": lambda: Qwen3MoeConfig(**moe, num_experts=4, moe_intermediate_size=32),
    }
    config = configs[family]()
    config.initializer_range = 0.1  # the default 0.02 gives a model of this width nearly uniform outputs
    return config


def save_tiny_model(
    folder: Path | str,
    family: str = "llama",
    vocab_size: int | None = None,
    seed: int = 0,
    *,
    tokenizer: PreTrainedTokenizerFast | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a causal language model of `family` and its tokenizer, `tiny_tokenizer()` by default.

    `vocab_size` is the model's; by default that of the tokenizer. Equal seeds give equal weights.
    """
    folder = Path(folder)
    tokenizer = tiny_tokenizer() if tokenizer is None else tokenizer
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = tiny_config(family, len(tokenizer) if vocab_size is None else vocab_size, **ids)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_reward_model(base: Path, folder: Path) -> Path:
    """Write a reward model with an untrained head on the model in `base`."""
    tokenizer = load_tokenizer(str(base))
    export_model(create_critic_model(str(base), tokenizer, None), tokenizer, folder)
    return folder


def save_counting_pairs(path: Path) -> None:
    """Write sixty preferences: the chosen answer counts on, the rejected one does not."""
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    rows = [
        {
            "prompt": f"\n\nHuman: Count on from {words[i % 8]}, {'please ' * (i // 8)}friend.\n\nAssistant:",
            "chosen": f" {words[i % 8 + 1]} {words[i % 8 + 2]}",
            "rejected": f" {words[(i * 5) % 7]} {words[(i * 3) % 5]} no",
        }
        for i in range(60)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def with_moved_adapters(model: torch.nn.Module) -> torch.nn.Module:
    """The model, whose LoRA adapters are as after some training: B is no longer 0."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.1)
    return model


def values_of(rows: Rows, name: str = "input_ids") -> list:
    """A column of prepared rows."""
    return rows.table[name].to_pylist()
