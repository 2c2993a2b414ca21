"""Serve a model to OpenAI's clients and to a browser on this machine, or two models side by side with votes.

    python scripts/serve.py output/step3_ppo/actor
    python scripts/serve.py output/step3_ppo/actor --versus output/step1_sft --votes votes.jsonl

The page is at http://127.0.0.1:8000, and clients take http://127.0.0.1:8000/v1 as base_url. With --versus two
models answer each question, on sides that are shuffled each time, and every vote is added to the file of
--votes, which step 2 and DPO read as it is.

Requests are answered one after the other, by one thread per model. It is a server for people and their
programs on one machine; for many users serve the folder with an engine that is made for that.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dschat.arguments import ReadableParser
from dschat.errors import UserError
from dschat.program import readable_errors

if TYPE_CHECKING:  # torch takes seconds to import, and --help is to answer at once
    from dschat.serving.server import Server

KEY = "DSCHAT_API_KEY"
"""The environment variable of the key: a flag would stand in the list of processes."""


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Raises `UserError`."""
    parser = ReadableParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", metavar="MODEL", help="Folder or hub id of a model, or an adapter's folder.")
    add("--versus", metavar="OTHER", help="A second model: the page shows both side by side and takes votes.")
    add("--votes", type=Path, metavar="FILE", help="JSON lines that votes are added to (votes.jsonl).")
    add("--host", default="127.0.0.1", help="Address to listen on (default 127.0.0.1).")
    add("--port", type=int, default=8000, help="Port to listen on; 0 takes a free one (default 8000).")
    add(
        "--allow_remote",
        action="store_true",
        help=f"Let --host be an address that others reach; needs a key in the variable {KEY}.",
    )
    add("--temperature", help="Sampling temperature of requests that give none (default 1).")
    add("--top_p", help="Of such requests, the probability of the likeliest tokens taken (default 1: all).")
    add("--max_tokens", help="Longest answer in tokens (default 512).")
    add("--max_length", type=int, default=8192, help="Most tokens of prompt and answer (default 8192).")
    add("--max_waiting", type=int, default=64, help="Requests per model that may wait (default 64).")
    add("--request_timeout", type=float, default=120.0, help="Seconds until an answer is given up (120).")
    add("--seed", help="Decides the samples of requests that give none (default 1234).")
    add("--trust_remote_code", action="store_true", help="Run code that a model's folder brings.")
    args = parser.parse_args(argv)
    if args.votes is not None and args.versus is None:
        raise UserError("--votes needs a second model to vote against: --versus OTHER.")
    for name, least in (("max_length", 2), ("max_waiting", 1)):
        if getattr(args, name) < least:
            raise UserError(f"--{name} must be at least {least}, got {getattr(args, name)}.")
    if not 0 < args.request_timeout < 86400:
        raise UserError(f"--request_timeout must lie in (0, 86400) seconds, got {args.request_timeout}.")
    return args


def key_for(host: str, *, allow_remote: bool) -> str | None:
    """The key that requests need, None where this machine alone can send any. Raises `UserError`."""
    from dschat.serving.server import is_loopback

    key = os.environ.get(KEY, "").strip() or None
    if is_loopback(host):
        return key
    if not allow_remote:
        raise UserError(
            f"--host {host} can be reached from elsewhere; add --allow_remote and a key in {KEY}, or leave "
            "--host out."
        )
    if key is None:
        raise UserError(f"--allow_remote needs a key: export {KEY}=$(openssl rand -hex 16)")
    return key


def names_of(paths: Sequence[str]) -> list[str]:
    """What the models are called: the ends of their paths, as long as it takes to tell them apart."""
    parts = [Path(path).parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"--versus {paths[1]} is the model itself; give another.")


def build(args: argparse.Namespace) -> Server:
    """The server, listening. Raises `UserError`."""
    from dschat.models.remote_code import set_consent
    from dschat.serving.app import App
    from dschat.serving.duels import Duels
    from dschat.serving.server import Server
    from dschat.serving.settings import DEFAULTS, given
    from dschat.serving.speaker import Speaker
    from dschat.serving.worker import Limits, Worker

    settings = given(vars(args))
    key = key_for(args.host, allow_remote=args.allow_remote)
    paths = [args.model, *([args.versus] if args.versus else [])]
    names = names_of(paths)
    set_consent(args.trust_remote_code)
    limits = Limits(
        tokens=int(settings.get("max_tokens", DEFAULTS["max_tokens"])),
        length=args.max_length,
        seconds=args.request_timeout,
        waiting=args.max_waiting,
    )
    duels = Duels(args.votes or Path("votes.jsonl")) if args.versus else None
    server = Server(args.host, args.port, limits=limits, key=key)
    speakers = [Speaker(path, flag) for path, flag in zip(paths, ("MODEL", "--versus"), strict=False)]
    workers = [Worker(*pair, most_waiting=limits.waiting) for pair in zip(names, speakers, strict=True)]
    server.app = App(workers, limits=limits, settings=settings, duels=duels)
    return server


def main(args: argparse.Namespace) -> None:
    """Serve until Ctrl-C. Raises `UserError`."""
    with build(args) as server:
        host = f"[{args.host}]" if ":" in args.host else args.host
        address = f"http://{host}:{server.server_address[1]}"
        print(f"{' and '.join(server.app.workers)}: {address} in a browser, {address}/v1 for clients")
        if args.versus:
            print(f"votes are added to {args.votes or 'votes.jsonl'}")
        print("Ctrl-C ends the server", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("ended")


if __name__ == "__main__":
    with readable_errors():
        main(parse())
