"""Chat templates of model families, less their tools, and what each makes of one conversation."""

from dataclasses import dataclass
from functools import cache
from itertools import groupby

import pytest
from tiny import tiny_tokenizer

from dschat.data.comparisons import Turn
from dschat.data.templates import PLAIN, ChatTemplate

CHATML = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou help.<|im_end|>\\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{{ m['content'].split('</think>')[-1] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


LLAMA3 = (
    "{% for m in messages %}{{ (bos_token if loop.first else '') + '<|start_header_id|>' + m['role'] + "
    "'<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)


ALTERNATING = (
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) or m['role'] == 'system' %}"
    "{{ raise_exception('user and assistant must alternate') }}{% endif %}"
)


MISTRAL = (
    "{{ bos_token }}{% for m in messages %}" + ALTERNATING + "{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)


GEMMA = (
    "{{ bos_token }}{% for m in messages %}" + ALTERNATING + "{{ '<start_of_turn>' + "
    "('model' if m['role'] == 'assistant' else 'user') + '\\n' + m['content'] | trim + '<end_of_turn>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)


SYSTEM_LAST = (  # as Mistral's third: the system message stands in the last question
    "{% set system = messages[0]['content'] + ' ' if messages[0]['role'] == 'system' else '' %}"
    "{% set last = messages | selectattr('role', 'eq', 'user') | list | last %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + (system if m == last else '') + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)


TURNS = (Turn("user", "Tea?"), Turn("assistant", "Yes."), Turn("user", "Milk?"))


ANSWER = "A drop."


SYSTEM = Turn("system", "Be brief.")


@dataclass(frozen=True)
class Style:
    """A template with its tokenizer's marks, and what it makes of `TURNS` and `ANSWER`."""

    template: str
    end: str
    asked: str
    answered: str
    """Less the end token."""
    learned: tuple[str, str]
    """With the end token: the template's own, or else the tokenizer's."""
    system: str
    """What stands before "Tea?" where `SYSTEM` comes first."""
    bos: bool = False
    marks: tuple[str, ...] = ()


IM = ("<|im_start|>", "<|im_end|>")


CHATML_ASKED = (
    "<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\nTea?<|im_end|>\n<|im_start|>assistant\n"
    "Yes.<|im_end|>\n<|im_start|>user\nMilk?<|im_end|>\n<|im_start|>assistant\n"
)


CHATML_SYSTEM = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"


PLAIN_ASKED = "\n\nHuman: Tea?\n\nAssistant: Yes.\n\nHuman: Milk?\n\nAssistant:"


GEMMA_ASKED = (
    "<s><start_of_turn>user\nTea?<end_of_turn>\n<start_of_turn>model\nYes.<end_of_turn>\n"
    "<start_of_turn>user\nMilk?<end_of_turn>\n<start_of_turn>model\n"
)


HEADER = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


GEMMA_MARKS = ("<start_of_turn>", "<end_of_turn>")


STYLES = {
    "plain": Style(
        PLAIN,
        "<|endoftext|>",
        PLAIN_ASKED,
        " A drop.",
        (" Yes.", " A drop.<|endoftext|>"),
        "Be brief.\n\nHuman: ",
    ),
    "plain_bos": Style(
        PLAIN,
        "<|endoftext|>",
        PLAIN_ASKED,
        " A drop.",
        (" Yes.", " A drop.<|endoftext|>"),
        "Be brief.\n\nHuman: ",
        bos=True,
    ),
    "chatml": Style(
        CHATML,
        "<|im_end|>",
        CHATML_ASKED,
        "A drop.",
        ("Yes.<|im_end|>", "A drop.<|im_end|>"),
        CHATML_SYSTEM,
        marks=IM,
    ),
    "chatml_of_a_base_model": Style(
        CHATML,
        "<|endoftext|>",
        CHATML_ASKED,
        "A drop.<|im_end|>",
        ("Yes.<|im_end|>", "A drop.<|im_end|>"),
        CHATML_SYSTEM,
        marks=IM,
    ),
    "thinking": Style(
        THINKING,
        "<|im_end|>",
        CHATML_ASKED.removeprefix("<|im_start|>system\nYou help.<|im_end|>\n"),
        "<think>\n\n</think>\n\nA drop.",
        ("Yes.<|im_end|>", "<think>\n\n</think>\n\nA drop.<|im_end|>"),
        CHATML_SYSTEM,
        marks=IM,
    ),
    "llama3": Style(
        LLAMA3,
        "<|eot_id|>",
        "<s><|start_header_id|>user<|end_header_id|>\n\nTea?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nYes.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nMilk?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "A drop.",
        ("Yes.<|eot_id|>", "A drop.<|eot_id|>"),
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n",
        bos=True,
        marks=HEADER,
    ),
    "mistral": Style(
        MISTRAL,
        "<|endoftext|>",
        "<s>[INST] Tea? [/INST] Yes.<|endoftext|>[INST] Milk? [/INST]",
        " A drop.",
        (" Yes.<|endoftext|>", " A drop.<|endoftext|>"),
        "<s>[INST] Be brief.\n\n",
        bos=True,
        marks=("[INST]", "[/INST]"),
    ),
    "gemma": Style(
        GEMMA,
        "<end_of_turn>",
        GEMMA_ASKED,
        "A drop.",
        ("Yes.<end_of_turn>", "A drop.<end_of_turn>"),
        "<s><start_of_turn>user\nBe brief.\n\n",
        bos=True,
        marks=GEMMA_MARKS,
    ),
    "gemma_of_a_base_model": Style(
        GEMMA,
        "<|endoftext|>",
        GEMMA_ASKED,
        "A drop.<end_of_turn>",
        ("Yes.<end_of_turn>", "A drop.<end_of_turn>"),
        "<s><start_of_turn>user\nBe brief.\n\n",
        bos=True,
        marks=GEMMA_MARKS,
    ),
}


EACH = pytest.mark.parametrize("name", STYLES)


@cache
def tokenizer_of(name):
    style = STYLES[name]
    tokenizer = tiny_tokenizer(bos=style.bos)
    tokenizer.add_tokens(list(style.marks), special_tokens=True)
    tokenizer.eos_token = style.end
    tokenizer.chat_template = style.template
    return tokenizer


def template_of(name):
    return ChatTemplate(tokenizer_of(name))


def templated(template, **settings):
    tokenizer = tiny_tokenizer(**settings)
    tokenizer.chat_template = template
    return tokenizer


def learned_texts(tokenizer, row):
    """The runs of tokens that the mask marks, as text."""
    runs = groupby(zip(row["input_ids"], row["loss_mask"], strict=True), key=lambda pair: pair[1])
    return tuple(tokenizer.decode([token for token, _ in run]) for marked, run in runs if marked)
