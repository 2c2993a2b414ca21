"""A server under load: parallel requests, malformed ones and clients that hang up, in rounds.

    python benchmarks/serving.py MODEL [--rounds 20]

Starts scripts/serve.py and prints a line per round: requests answered, seconds, and the server's memory.
Every round asks the same with the same seeds, so an answer that is lost or another's is found by comparing
rounds. Exit code 1 where one is, where the server printed a traceback, or where its memory grew by over 5 %
from the middle round to the last.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import psutil

ROOT = Path(__file__).resolve().parents[1]
PARALLEL = 50
MALFORMED = (b"", b"\x00\xff\r\n\r\n", b"{", b"[]", b'{"messages": 1}', b'{"messages": []}', b"[" * 10_000)


def ask(port: int, body: dict | bytes, *, hang_up: bool = False) -> tuple[int, str]:
    """The status and the answer; the status is 0 for a client that hung up."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("POST", "/v1/chat/completions", text, {"Content-Type": "application/json"})
    if hang_up:
        time.sleep(0.05)
        connection.close()
        return 0, ""
    reply = connection.getresponse()
    found = json.loads(reply.read())
    return reply.status, found["choices"][0]["message"]["content"] if reply.status == 200 else ""


def one_round(port: int, tokens: int) -> list[str]:
    """The answers to `PARALLEL` requests, beside which others misbehave."""

    def question(number: int) -> dict:
        messages = [{"role": "user", "content": f"Tell me about number {number}."}]
        return {"messages": messages, "max_tokens": tokens, "seed": number, "stream": False}

    with ThreadPoolExecutor(2 * PARALLEL) as pool:
        asked = [pool.submit(ask, port, question(number)) for number in range(PARALLEL)]
        gone = [pool.submit(ask, port, question(number), hang_up=True) for number in range(10)]
        bad = [pool.submit(ask, port, body) for body in MALFORMED]
        found = [task.result() for task in asked]
        assert all(task.result()[0] == 0 for task in gone)
        assert {task.result()[0] for task in bad} == {400}
    assert {status for status, _ in found} == {200}, found
    return [text for _, text in found]


def main() -> int:
    """Serve, ask, compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="Folder of a model.")
    parser.add_argument("--rounds", type=int, default=20, help="Rounds of requests (default 20).")
    parser.add_argument("--tokens", type=int, default=32, help="Longest answer (default 32).")
    args = parser.parse_args()
    with tempfile.TemporaryFile("w+") as output:
        command = [sys.executable, str(ROOT / "scripts/serve.py"), args.model, "--port", "0"]
        command += ["--max_waiting", "128"]
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ})
        try:
            while "http://" not in (said := output_of(output)):
                assert server.poll() is None, said
                time.sleep(0.2)
            port = int(said.partition("http://127.0.0.1:")[2].partition(" ")[0])
            memory, answers = [], []
            for number in range(args.rounds):
                start = time.perf_counter()
                answers.append(one_round(port, args.tokens))
                memory.append(psutil.Process(server.pid).memory_info().rss / 2**20)
                seconds = time.perf_counter() - start
                print(
                    f"round {number}: {PARALLEL} answers in {seconds:.1f} s, {memory[-1]:.1f} MiB", flush=True
                )
        finally:
            server.terminate()
            server.wait()
        said = output_of(output)
    same = all(found == answers[0] for found in answers)
    growth = memory[-1] / memory[len(memory) // 2] - 1
    quiet = "Traceback" not in said
    print(
        f"answers equal in all rounds: {same}; memory since the middle: {growth:+.1%}; no traceback: {quiet}"
    )
    return 0 if same and quiet and growth < 0.05 else 1


def output_of(file: IO[str]) -> str:
    """What the server printed so far."""
    file.seek(0)
    return file.read()


if __name__ == "__main__":
    sys.exit(main())
