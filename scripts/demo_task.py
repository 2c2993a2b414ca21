"""The demo task: list N things of a kind. A program can check every answer, and the data is of mixed quality.

    python scripts/demo_task.py FOLDER [--seed 0]

writes FOLDER/data/train.jsonl and test.jsonl (preference pairs, no prompt in both) and FOLDER/base_model, a
small Llama with random weights and a tokenizer trained on the data. The same seed writes the same files.

    Human: Help Anna think of three fruits.            Assistant: cherry, fig and plum.

An answer can go wrong in four ways (`FAULTS`); three of them are put into the data. Even the chosen answers
have faults, more often than not, so that a model that imitates them perfectly still fails; a rejected answer
always has more kinds of fault than the chosen one, which is how a reward model can learn what is wanted.

Two choices keep the task within reach of a million weights and a minute of training. A wrong item is a thing
that no prompt asks for (`ODD_ITEMS`). And the data lists items alphabetically, which the check does not need;
a model that learned the order repeats no item, a fault that so small a reward model cannot see. The repeats
that remain are the part of the truth that PPO, following the reward model, cannot mend.
"""

import argparse
import itertools
import json
import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path

CATEGORIES: dict[str, str] = {
    "fruits": "apple pear plum cherry grape lemon fig mango peach banana melon kiwi",
    "animals": "cat dog horse cow sheep goat lion tiger bear wolf fox rabbit",
    "colours": "red blue green yellow white black brown pink purple grey silver gold",
    "tools": "hammer saw drill wrench pliers chisel file axe shovel rake clamp ladder",
    "vegetables": "carrot potato onion cabbage spinach leek pea bean turnip radish celery garlic",
    "countries": "france spain italy norway sweden poland greece egypt kenya india japan brazil",
    "instruments": "piano violin guitar flute drum trumpet harp cello oboe clarinet organ banjo",
    "clothes": "shirt coat hat scarf glove sock shoe skirt dress belt jacket sweater",
    "drinks": "water tea coffee milk juice cocoa wine beer cider soda lemonade rum",
    "sports": "tennis football hockey golf rugby boxing rowing sailing chess judo cricket archery",
}
ODD_THINGS = "brick cloud door engine fence key lamp mirror nail paper stone window"
PEOPLE = (
    "Anna Ben Clara David Emma Felix Grace Hugo Iris Jack Kate Liam Maria Noah Olga Paul Quinn Rosa Sam Tina "
    "Uma Victor Wendy Xavier Yara Zoe Adam Bella Carl Dora Eric Fiona George Helen Ivan Julia Kevin Laura "
    "Max Nina"
)
ITEMS: dict[str, list[str]] = {category: words.split() for category, words in CATEGORIES.items()}
ODD_ITEMS: list[str] = ODD_THINGS.split()
NAMES: list[str] = PEOPLE.split()
NUMBERS: dict[str, int] = {"two": 2, "three": 3, "four": 4, "five": 5}
PHRASINGS = (
    "Help {name} think of {number} {category}.",
    "Please name {number} {category} for {name}.",
    "Can you give {name} {number} {category}?",
    "{name} asked me for {number} {category}. What should I say?",
    "I need {number} {category} for {name}.",
    "Which {number} {category} could {name} draw?",
    "List {number} {category} that {name} may know.",
    "{name} wants to learn {number} {category}. Which ones?",
    "Tell {name} about {number} {category}.",
    "My friend {name} is looking for {number} {category}.",
)
FAULTS = ("count", "category", "repeat", "format")
INJECTED_FAULTS = ("count", "category", "format")
# Share of chosen answers with no, one and two kinds of fault; a rejected answer has one or two kinds more.
CHOSEN_FAULTS = (0.42, 0.40, 0.18)

_ASKED = re.compile(rf"\b({'|'.join(NUMBERS)}) ({'|'.join(ITEMS)})\b")
_WELL_FORMED = re.compile(r"[a-z]+(, [a-z]+)* and [a-z]+\.")


@dataclass(frozen=True)
class Request:
    """What a prompt asks for."""

    number: int
    category: str


def read_prompt(prompt: str) -> Request:
    """The number and the category in a prompt. Raises ValueError where it asks for no list."""
    asked = _ASKED.findall(prompt)
    if not asked:
        raise ValueError(f"this prompt is not one of the demo task: {prompt!r}")
    number, category = asked[-1]
    return Request(NUMBERS[number], category)


def check_answer(prompt: str, answer: str) -> list[str]:
    """The kinds of fault of an answer, out of `FAULTS`; an empty list is a success.

    A well-formed answer is "a and b." or "a, b and c." and nothing else; white space around it is free.
    """
    request = read_prompt(prompt)
    text = answer.strip()
    items = [word for word in re.findall(r"[^\s,.]+", text) if word != "and"]
    wrong = {
        "count": len(items) != request.number,
        "category": any(item not in ITEMS[request.category] for item in items),
        "repeat": len(set(items)) < len(items),
        "format": _WELL_FORMED.fullmatch(text) is None,
    }
    return [fault for fault in FAULTS if wrong[fault]]


def few_faults(prompts: list[str], answers: list[str]) -> list[float]:
    """A reward function (docs/rewards.md): 1 without fault, less a quarter for each kind of fault."""
    return [1 - len(check_answer(*pair)) / len(FAULTS) for pair in zip(prompts, answers, strict=True)]


def make_prompts(rng: random.Random) -> list[str]:
    """Every prompt there is, shuffled."""
    prompts = [
        "\n\nHuman: " + phrasing.format(name=name, number=number, category=category) + "\n\nAssistant:"
        for phrasing, name, number, category in itertools.product(PHRASINGS, NAMES, NUMBERS, ITEMS)
    ]
    rng.shuffle(prompts)
    return prompts


def make_answer(request: Request, faults: set[str], rng: random.Random) -> str:
    """An answer with exactly these kinds of fault, out of `INJECTED_FAULTS`, beginning with a space."""
    length = request.number
    if "count" in faults:
        # One item alone could not be well-formed, so two become three.
        length += rng.choice([-1, 1]) if request.number > 2 else 1
    items = rng.sample(ITEMS[request.category], length)
    if "category" in faults:
        num_odd = rng.randint(1, 2)
        items[:num_odd] = rng.sample(ODD_ITEMS, num_odd)
    items.sort()
    text = ", ".join(items[:-1]) + " and " + items[-1] + "."
    if "format" in faults:
        text = text[:-1] if rng.random() < 0.5 else text.replace(" and ", ", ")
    return " " + text


def make_row(prompt: str, rng: random.Random) -> dict[str, str]:
    """One preference pair, {"prompt", "chosen", "rejected"}."""
    request = read_prompt(prompt)
    better = rng.choices(range(len(CHOSEN_FAULTS)), CHOSEN_FAULTS)[0]
    worse = min(better + rng.choice([1, 2]), len(INJECTED_FAULTS))
    chosen, rejected = (
        make_answer(request, set(rng.sample(INJECTED_FAULTS, num_faults)), rng)
        for num_faults in (better, worse)
    )
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def write_data(folder: Path, *, seed: int, num_train: int, num_test: int) -> list[dict[str, str]]:
    """Write train.jsonl and test.jsonl; returns the training rows. Raises ValueError beyond all prompts."""
    rng = random.Random(seed)
    prompts = make_prompts(rng)
    if num_train + num_test > len(prompts):
        raise ValueError(f"there are {len(prompts)} prompts; {num_train} + {num_test} were asked for.")
    rows = [make_row(prompt, rng) for prompt in prompts[: num_train + num_test]]
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("test", rows[:num_test]), ("train", rows[num_test:])):
        text = "".join(json.dumps(row) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return rows[num_test:]


def write_base_model(folder: Path, texts: list[str], *, seed: int) -> None:
    """Save a Llama of about one million random weights and a byte-level BPE tokenizer trained on `texts`."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils.logging import disable_progress_bar

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="</s>")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    disable_progress_bar()
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_demo(folder: Path, *, seed: int = 0, num_train: int = 12_000, num_test: int = 600) -> None:
    """Write the data set and the base model into `folder`."""
    rows = write_data(folder / "data", seed=seed, num_train=num_train, num_test=num_test)
    texts = [row["prompt"] + row[side] for row in rows for side in ("chosen", "rejected")]
    write_base_model(folder / "base_model", texts, seed=seed)


def main() -> None:
    """Write the demo from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="Where data/ and base_model/ go.")
    parser.add_argument("--seed", type=int, default=0, help="Decides every random draw (default 0).")
    parser.add_argument("--num-train", type=int, default=12_000, help="Training pairs (default 12000).")
    parser.add_argument("--num-test", type=int, default=600, help="Held-out pairs (default 600).")
    args = parser.parse_args()
    try:
        write_demo(args.folder, seed=args.seed, num_train=args.num_train, num_test=args.num_test)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"demo data and base model are in {args.folder}")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from dschat.program import readable_errors

    with readable_errors():
        main()
