"""The tokenizer of a model, with its end and padding tokens and its chat template settled."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dschat.arguments import TokenizerArguments
from dschat.console import messages
from dschat.data.files import is_local
from dschat.data.hub import reach_hub
from dschat.data.template_trial import configure_template
from dschat.errors import UserError
from dschat.models.remote_code import loading_consent, remedy
from dschat.models.vocabulary import NUM_KNOWN

PAD_LIKE_TOKENS = ("<pad>", "[PAD]", "<PAD>", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>")
"""Padding tokens that vocabularies carry without the tokenizer saying so."""

NEW_PAD_TOKEN = "<|pad|>"


def load_tokenizer(
    model_name_or_path: str, args: TokenizerArguments | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id: its padding token set and never its end token, its template set.

    `args` may add an end token or choose another template. A tokenizer saved after this and loaded again is
    the same. Raises `UserError` when there is no tokenizer, or none with an end token, or its template cannot
    serve.
    """
    args = TokenizerArguments() if args is None else args
    if not is_local(model_name_or_path):
        reach_hub()
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_name_or_path, **loading_consent())
        tokenizer("tea")  # settings of the wrong kind are met in use
    except Exception as error:  # tokenizers raises plain ones
        if needed := remedy(error):
            raise UserError(f"the tokenizer of {model_name_or_path!r}: {needed}.") from error
        error_line = str(error).partition("\n")[0]
        if not is_local(model_name_or_path):
            raise UserError(
                f"{model_name_or_path!r} is no folder, seen from {Path.cwd()}, and the hub gave no tokenizer "
                f"of that name ({error_line}); correct the name, or download the model and give its folder."
            ) from error
        raise UserError(
            f"{model_name_or_path!r} has no tokenizer that can be read ({error_line}); "
            "put its tokenizer files beside the model's weights."
        ) from error
    setattr(tokenizer, NUM_KNOWN, len(tokenizer))
    if args.add_eot_token:
        tokenizer.add_special_tokens({"eos_token": args.eot_token})
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer of {model_name_or_path!r} has no end token, so no answer could ever end; "
            "--add_eot_token adds one."
        )
    _configure_padding(tokenizer)
    configure_template(tokenizer, args.chat_template)
    return tokenizer


def _configure_padding(tokenizer: PreTrainedTokenizerBase) -> None:
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
        messages.note(
            f"the tokenizer of {tokenizer.name_or_path!r} has no padding token besides its end token; "
            f"{NEW_PAD_TOKEN} was added with id {tokenizer.pad_token_id}."
        )


def reads_otherwise(ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase) -> bool:
    """Whether the same conversation has other tokens for `theirs`: by its vocabulary or its chat template."""
    return first_difference(ours, theirs) is not None or ours.chat_template != theirs.chat_template


def first_difference(actor: PreTrainedTokenizerBase, critic: PreTrainedTokenizerBase) -> str | None:
    """The first difference of two vocabularies or of their special tokens, None where they are equal."""
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
