"""Turn what DeepSpeed-Chat or TRL wrote into folders of ours, or a folder of ours into DeepSpeed-Chat's.

    python scripts/convert_checkpoint.py --from deepspeed-chat old/reward output/reward
    python scripts/convert_checkpoint.py --from dschat output/reward old/reward
    python scripts/convert_checkpoint.py --from trl-valuehead old/ppo output/from_trl

Language models and reward models are told apart by their weights; step 3's critic is taken for a reward
model. DeepSpeed-Chat keeps both kinds in pytorch_model.bin, a reward model's backbone as rwtransformer.* and
its head as v_head.weight. Ours are safetensors that transformers loads by itself, with a manifest whose
golden outputs the next step verifies.

TRL keeps a language model and its value head (AutoModelForCausalLMWithValueHead) in one folder. OUTPUT/actor
gets the language model and OUTPUT/critic a copy of its layers with the head, for step 3's
--actor_model_name_or_path and --critic_model_name_or_path; --reward_model_name_or_path names the scores.
"""

from __future__ import annotations

import argparse
import pickle
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from dschat.export.manifest import Head
    from dschat.models.reward_model import RewardModel

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dschat.arguments import ReadableParser
from dschat.console import messages
from dschat.errors import UserError
from dschat.program import readable_errors

THEIR_WEIGHTS = "pytorch_model.bin"
TRL_HEAD = "v_head.summary."
FORMATS = ("deepspeed-chat", "dschat", "trl-valuehead")
GOLDEN_TEXTS = (
    "\n\nHuman: What is the capital of France?\n\nAssistant: The capital of France is Paris.",
    "\n\nHuman: Please count to five.\n\nAssistant: One, two, three, four, five.",
    "\n\nHuman: Is water wet?\n\nAssistant: I do not want to talk about that.",
)
"""What a converted model's outputs are promised on: there are no data here to take rows from."""


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Raises `UserError`."""
    parser = ReadableParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--from",
        dest="source",
        required=True,
        choices=FORMATS,
        help="What wrote INPUT. OUTPUT is ours, or of ours DeepSpeed-Chat's.",
    )
    parser.add_argument("input", type=Path, metavar="INPUT", help="Folder of the model to convert.")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="Folder to write.")
    parser.add_argument("--overwrite", action="store_true", help="Replace a model that is in OUTPUT.")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Raise `UserError` for folders that cannot be read or must not be written."""
    if not args.input.is_dir():
        raise UserError(f"INPUT {args.input} is no folder, seen from {Path.cwd()}; give a model's folder.")
    if args.output.resolve() == args.input.resolve():
        raise UserError(f"INPUT and OUTPUT are both {args.input}; give another folder for the result.")
    if args.output.exists() and not args.output.is_dir():
        raise UserError(f"OUTPUT {args.output} is a file; give a folder.")
    if args.output.is_dir() and any(args.output.iterdir()) and not args.overwrite:
        raise UserError(f"OUTPUT {args.output} is not empty; give a new folder, or add --overwrite.")


def convert(args: argparse.Namespace) -> None:
    """Read, check and write one model. Raises `UserError`."""
    check(args)
    if args.source == "dschat":
        to_deepspeed_chat(args.input, args.output)
    elif args.source == "trl-valuehead":
        from_trl(args.input, args.output)
    else:
        from_deepspeed_chat(args.input, args.output)
    print(f"{args.input} ({args.source}) -> {args.output}")


def from_deepspeed_chat(folder: Path, output: Path) -> None:
    """Write DeepSpeed-Chat's model in `folder` as `export_model` does, in its own precision."""
    from dschat.models.weights import BACKBONE_NAMES

    tensors = _their_tensors(folder)
    is_reward = any(name.startswith((*BACKBONE_NAMES, "v_head.")) for name in tensors)
    _export(folder, output, tensors, step="deepspeed-chat", base_model=folder, is_reward=is_reward)


def _export(
    folder: Path,
    output: Path,
    tensors: Mapping[str, torch.Tensor],
    *,
    step: str,
    base_model: Path,
    is_reward: bool,
    head: Head | None = None,
) -> None:
    """Write the model in `folder`, with its `tensors`, into `output` in the precision of most of them."""
    from dschat.export.export import export_model
    from dschat.export.provenance import GOLDEN_TOKENS, Provenance

    dtypes = [tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()]
    model, tokenizer = _load(folder, is_reward=is_reward, dtype=max(set(dtypes), key=dtypes.count))
    rows = [tokenizer(text)["input_ids"][-GOLDEN_TOKENS:] for text in GOLDEN_TEXTS]
    provenance = Provenance(step=step, base_model=str(base_model), golden_inputs=rows, head=head)
    export_model(model, tokenizer, output, provenance=provenance)


def from_trl(folder: Path, output: Path) -> None:
    """Write the language model and the critic of TRL's value-head model in `folder` as two models of ours."""
    from dschat.models.weights import HEAD, OUTPUT_LAYERS

    state = _trl_state(folder)
    head = {name: state.pop(TRL_HEAD + name, None) for name in ("weight", "bias")}
    if head["weight"] is None:
        raise UserError(f"INPUT {folder} has no value head ({TRL_HEAD}weight): it is a model as it is.")
    backbone = {name: tensor for name, tensor in state.items() if not name.startswith(OUTPUT_LAYERS)}
    for name, tensors in (("actor", state), ("critic", backbone | {HEAD: head["weight"]})):
        with _as_folder(folder, tensors) as place:
            is_reward, kind = name == "critic", "value" if name == "critic" else None
            _export(
                place,
                output / name,
                tensors,
                step=FORMATS[2],
                base_model=folder,
                is_reward=is_reward,
                head=kind,
            )
    if head["bias"] is not None and head["bias"].item() != 0:
        messages.note(
            f"the bias of the value head, {head['bias'].item():.4g}, is left out, as heads have none here: "
            "every value of the critic is lower by it until PPO has trained it."
        )


def _trl_state(folder: Path) -> dict[str, torch.Tensor]:
    """The weights in TRL's folder by the names of the language model, and its head's. Raises `UserError`."""
    from safetensors import SafetensorError
    from transformers.modeling_utils import load_state_dict

    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"INPUT {folder} holds an adapter, and a value head in {THEIR_WEIGHTS}: dschat merge-adapter "
            "makes an actor of the adapter and its base; the head is not converted."
        )
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise UserError(f"INPUT {folder} holds no model*.safetensors and no pytorch_model*.bin.")
    state = {}
    for path in files:
        try:
            state |= load_state_dict(str(path), map_location="cpu", weights_only=True)
        except (
            OSError,
            EOFError,
            RuntimeError,
            ValueError,
            pickle.UnpicklingError,
            SafetensorError,
        ) as error:
            raise UserError(f"{path} cannot be read as a file of weights alone: {error}") from error
    return {name.removeprefix("pretrained_model."): tensor for name, tensor in state.items()}


@contextmanager
def _as_folder(source: Path, state: Mapping[str, torch.Tensor]) -> Iterator[Path]:
    """A folder with these weights and all that `source` has beside weights, until the block ends."""
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as place:
        for path in source.iterdir():
            if path.is_file() and not path.name.endswith((".safetensors", ".bin", ".index.json")):
                shutil.copy(path, place)
        # Tied weights are there twice: copies, as the format has no two names for one tensor.
        copies = {name: tensor.clone().contiguous() for name, tensor in state.items()}
        save_file(copies, Path(place, "model.safetensors"), metadata={"format": "pt"})
        yield Path(place)


def _their_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The names, shapes and precisions in DeepSpeed-Chat's file of weights, without the weights."""
    import torch

    path = folder / THEIR_WEIGHTS
    if not path.is_file() or (folder / "model.safetensors").is_file():
        hint = " It holds safetensors: --from dschat is for those." if _is_ours(folder) else ""
        raise UserError(f"INPUT {folder} is no DeepSpeed-Chat model: that is {THEIR_WEIGHTS} alone.{hint}")
    try:
        state = torch.load(path, map_location="meta", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path} cannot be read as a file of weights alone: {reason}") from error
    is_state = isinstance(state, dict) and all(isinstance(value, torch.Tensor) for value in state.values())
    if not is_state or not any(tensor.is_floating_point() for tensor in state.values()):
        raise UserError(
            f"{path} holds no named weights; give the folder that a step of DeepSpeed-Chat wrote."
        )
    return state


def to_deepspeed_chat(folder: Path, output: Path) -> None:
    """Write our model in `folder` as DeepSpeed-Chat's `save_hf_format` does: weights, config, tokenizer.

    Where the folder has a manifest, what it promises is verified first.
    """
    import torch
    from transformers import AutoConfig

    from dschat.export.upstream import verify_model
    from dschat.runs.export_files import replacing_export

    if not _is_ours(folder):
        raise UserError(f"INPUT {folder} holds no model of ours: config.json beside model*.safetensors.")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    is_reward = config.architectures[0].endswith("ForSequenceClassification")
    verify_model(str(folder), "INPUT", *(("score", "value") if is_reward else ("language_model",)))
    model, tokenizer = _load(folder, is_reward=is_reward, dtype=config.dtype or torch.float32)
    with replacing_export(output) as place:
        torch.save(model.state_dict(), place / THEIR_WEIGHTS)
        config.save_pretrained(place)
        tokenizer.save_pretrained(place)


def _is_ours(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any(folder.glob("model*.safetensors"))


def _load(
    folder: Path, *, is_reward: bool, dtype: torch.dtype
) -> tuple[PreTrainedModel | RewardModel, PreTrainedTokenizerBase]:
    """The whole model in that precision, its keys checked, and its tokenizer."""
    from transformers import AutoModelForCausalLM

    from dschat.distributed.device import PRECISIONS
    from dschat.models.loading import create_critic_model, create_hf_model
    from dschat.models.tokenizer import load_tokenizer

    if dtype not in PRECISIONS:
        raise UserError(
            f"the weights in {folder} are {dtype}; this converts {', '.join(PRECISIONS.values())}."
        )
    tokenizer = load_tokenizer(str(folder))
    precision = {PRECISIONS[dtype]: {"enabled": True}}  # what a DeepSpeed configuration says
    if is_reward:
        return create_critic_model(str(folder), tokenizer, precision, rlhf_training=True), tokenizer
    return create_hf_model(AutoModelForCausalLM, str(folder), tokenizer, precision), tokenizer


if __name__ == "__main__":
    with readable_errors():
        convert(parse())
