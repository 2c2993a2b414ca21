"""Talk to a model: a step's output folder, a hub id, or the folder of an adapter.

    python scripts/chat.py output/step3_ppo/actor
    python scripts/chat.py output/step3_ppo/actor --reward_model output/step2_reward --system "Be brief."
    echo "Name a river." | python scripts/chat.py output/step1_sft

The model reads a conversation in the template and the tokens that it was trained on. /help lists commands.
Ctrl-C stops an answer. Nothing that a checkpoint ships for chatting (penalties, forbidden tokens) acts, and
the defaults sample as step 3 does. With --reward_model the score of each answer stands below it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dschat.arguments import ReadableParser
from dschat.program import readable_errors


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Raises `UserError`."""
    parser = ReadableParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", metavar="MODEL", help="Folder or hub id of a model, or an adapter's folder.")
    add("--system", default="", metavar="TEXT", help="System message.")
    add("--reward_model", metavar="PATH", help="Reward model whose score of each answer is shown.")
    add("--temperature", help="Sampling temperature; 0 takes the likeliest token (default 1).")
    add("--top_p", help="Sample from the likeliest tokens that make up this probability (default 1: all).")
    add("--top_k", help="Sample from so many likeliest tokens (default 0: all).")
    add("--max_tokens", help="Longest answer in tokens (default 512, or half of the model's positions).")
    add("--seed", help="Decides the samples (default 1234): the same conversation gets the same answers.")
    add("--trust_remote_code", action="store_true", help="Run code that a model's folder brings.")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Load and talk. Raises `UserError`."""
    from dschat.models.remote_code import set_consent
    from dschat.serving.chat import Chat, talk
    from dschat.serving.scorer import Scorer
    from dschat.serving.settings import completed, given
    from dschat.serving.speaker import Speaker

    settings = given(vars(args))
    set_consent(args.trust_remote_code)
    speaker = Speaker(args.model, "MODEL")
    scorer = Scorer(args.reward_model, "--reward_model", speaker) if args.reward_model else None
    chat = Chat(
        speaker,
        completed(settings, speaker.positions),
        lambda text: print(text, end="", flush=True),
        system=args.system.strip(),
        scorer=scorer,
    )
    if sys.stdin.isatty():
        print("/help lists commands; Ctrl-C stops an answer, Ctrl-D ends the conversation.")
    talk(chat)


if __name__ == "__main__":
    with readable_errors():
        main(parse())
