"""The Python in a model card: it loads the model and asks it something, and needs nothing of this project."""

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from dschat.data.comparisons import Turn
from dschat.data.encoder import Encoder
from dschat.data.rendering import own_template
from dschat.data.tokenizer_fingerprint import start_tokens
from dschat.errors import UserError
from dschat.export.manifest import Head

QUESTION, ANSWER = "What is the capital of France?", "Paris."
CHAT = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
PLAIN_PROMPT = f"\n\nHuman: {QUESTION}\n\nAssistant:"
ASKED = "prompt = tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True, tokenize=False)"
EXCHANGE = "text = tokenizer.apply_chat_template(chat, tokenize=False).rstrip()"
GENERATE = """\
answer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=64)[0, ids.shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))"""


def snippet(head: Head, folder: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Import, tokenizer, model; then an answer, a score or a value, from the tokens that steps make of it."""
    auto_class = auto_class_of(head)
    loading = f"""\
import torch
from transformers import {auto_class}, AutoTokenizer

folder = {folder!r}
tokenizer = AutoTokenizer.from_pretrained(folder)
model = {auto_class}.from_pretrained(folder, dtype="auto")
"""
    try:
        if head == "language_model":
            return f"{loading}\n{prompt_ids(tokenizer)}\n{GENERATE}"
        return f'{loading}\n{scored_ids(tokenizer)}\nprint("{head}:", model(ids).logits[0, 0].item())'
    except (UserError, TemplateError):  # the model learned from tokens, and its template shows no such chat
        return loading


def adapter_snippet(head: Head, base_model: str) -> str:
    """The model as its base with the adapter on it, in place of the whole one of `snippet`."""
    labels = "" if head == "language_model" else ", num_labels=1"
    return f"""\
from peft import PeftModel

base = {auto_class_of(head)}.from_pretrained({base_model!r}, dtype="auto"{labels})
model = PeftModel.from_pretrained(base, folder + "/adapter")"""


def auto_class_of(head: Head) -> str:
    """The class of transformers that loads a model with this head."""
    return "AutoModelForCausalLM" if head == "language_model" else "AutoModelForSequenceClassification"


def prompt_ids(tokenizer: PreTrainedTokenizerBase) -> str:
    """Lines that make `ids` [1, T] of a question."""
    asked = f"chat = {CHAT[:1]}\n{ASKED}" if own_template(tokenizer) else f"prompt = {PLAIN_PROMPT!r}"
    rows = 'tokenizer(prompt, add_special_tokens=False)["input_ids"]'
    prompt = tokenizer(_shown(tokenizer, CHAT[:1]), add_special_tokens=False)["input_ids"]
    return f"{asked}\nids = torch.tensor([{_start(tokenizer, prompt)}{rows}])"


def scored_ids(tokenizer: PreTrainedTokenizerBase) -> str:
    """Lines that make `ids` [1, T] of a question with its answer."""
    prompt, text = _shown(tokenizer, CHAT[:1]), _shown(tokenizer, CHAT).rstrip()
    (row,) = Encoder(tokenizer).rows([(Turn("user", QUESTION),)], [[ANSWER]])
    answer = tokenizer(text.removeprefix(prompt), add_special_tokens=False)["input_ids"]
    end = "" if answer == row.answers[0] else " + tokenizer.eos_token"
    lines = [f"chat = {CHAT}", ASKED, EXCHANGE, f"answer = text.removeprefix(prompt){end}"]
    start = _start(tokenizer, tokenizer(prompt, add_special_tokens=False)["input_ids"])
    if not own_template(tokenizer) or not text.startswith(prompt):
        shown = tokenizer.decode(row.answers[0])
        lines, start = [f"prompt = {tokenizer.decode(row.prompt)!r}", f"answer = {shown!r}"], ""
    rows = 'rows = tokenizer([prompt, answer], add_special_tokens=False)["input_ids"]'
    return "\n".join([*lines, rows, f"ids = torch.tensor([{start}rows[0] + rows[1]])"])


def _shown(tokenizer: PreTrainedTokenizerBase, chat: list[dict[str, str]]) -> str:
    """The question, or it and its answer, as the template shows them."""
    if not own_template(tokenizer):
        return PLAIN_PROMPT if len(chat) == 1 else f"{PLAIN_PROMPT} {ANSWER}"
    asks = len(chat) == 1
    return str(tokenizer.apply_chat_template(chat, add_generation_prompt=asks, tokenize=False))


def _start(tokenizer: PreTrainedTokenizerBase, prompt: list[int]) -> str:
    """The tokens that come before a prompt which does not begin with them, as the beginning of a sum."""
    start = start_tokens(tokenizer)
    return f"{start} + " if start and prompt[: len(start)] != start else ""
