"""The tokenizer of a model, with its end and padding tokens settled."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dschat.distributed import print_once
from dschat.errors import UserError

PAD_LIKE_TOKENS = ("<pad>", "[PAD]", "<PAD>", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>")
"""Padding tokens that vocabularies carry without the tokenizer saying so."""

NEW_PAD_TOKEN = "<|pad|>"


def load_tokenizer(
    model_name_or_path: str, *, add_eot_token: bool = False, eot_token: str = "<|endoftext|>"
) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id, its padding token always set and never its end token.

    With `add_eot_token`, `eot_token` becomes the end token, added to the vocabulary where it is missing. A
    tokenizer saved after this and loaded again is the same. Raises `UserError` when there is no tokenizer, or
    none with an end token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_name_or_path)
    except (OSError, ValueError, KeyError) as error:
        error_line = str(error).partition("\n")[0]
        if not Path(model_name_or_path).is_dir():
            raise UserError(
                f"{model_name_or_path!r} is no folder, seen from {Path.cwd()}, and the hub gave no tokenizer "
                f"of that name ({error_line}); correct the name, or download the model and give its folder."
            ) from error
        raise UserError(
            f"{model_name_or_path!r} has no tokenizer that can be read ({error_line}); "
            "put its tokenizer files beside the model's weights."
        ) from error
    if add_eot_token:
        tokenizer.add_special_tokens({"eos_token": eot_token})
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer of {model_name_or_path!r} has no end token, so no answer could ever end; "
            "--add_eot_token adds one."
        )
    _settle_padding(tokenizer)
    return tokenizer


def _settle_padding(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give padding a token apart from the end token.

    Our masks do not need it, but AutoModelForSequenceClassification takes an answer's score at the last token
    that is not the padding token, and that has to be the end token.
    """
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return
    taken = {tokenizer.eos_token_id, tokenizer.bos_token_id}
    vocabulary = tokenizer.get_vocab()
    candidates = [token for token in (*PAD_LIKE_TOKENS, tokenizer.unk_token) if token in vocabulary]
    known = next((token for token in candidates if vocabulary[token] not in taken), None)
    tokenizer.add_special_tokens({"pad_token": known or NEW_PAD_TOKEN})
    if known is None:
        print_once(
            f"note: the tokenizer of {tokenizer.name_or_path!r} has no padding token besides its end token; "
            f"{NEW_PAD_TOKEN} was added with id {tokenizer.pad_token_id}."
        )


def check_same_tokenizer(actor: PreTrainedTokenizerBase, critic: PreTrainedTokenizerBase) -> None:
    """Raise `UserError` unless both have the same tokens and ids: the reward model reads the actor's ids."""
    difference = _first_difference(actor, critic)
    if difference is not None:
        raise UserError(
            f"--actor_model_name_or_path {actor.name_or_path!r} and --critic_model_name_or_path "
            f"{critic.name_or_path!r} have different tokenizers: {difference}. "
            "Train the reward model (step 2) from a model with the actor's tokenizer; give both "
            "steps the same --add_eot_token."
        )


def _first_difference(actor: PreTrainedTokenizerBase, critic: PreTrainedTokenizerBase) -> str | None:
    ours, theirs = actor.get_vocab(), critic.get_vocab()
    if ours != theirs:
        differing = {token for token, _ in ours.items() ^ theirs.items()}
        token = min(differing, key=lambda token: (ours.get(token, len(ours)), token))
        return f"{token!r} has id {ours.get(token)} for the actor, {theirs.get(token)} for the reward model"
    for name in ("eos_token", "pad_token", "bos_token"):
        if getattr(actor, name) != getattr(critic, name):
            return (
                f"{name} is {getattr(actor, name)!r} for the actor, {getattr(critic, name)!r} for the other"
            )
    return None
