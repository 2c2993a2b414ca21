"""A process of its own for one reward function: a request a line on stdin, a reply a line on stdout, in JSON.

    python function_worker.py FILE.py NAME SECONDS

It imports the standard library alone, so that it starts in an instant. A request that takes longer ends the
process, whatever it hangs in: the watchdog is a thread of C, which a regular expression that never returns
does not hold up, and it writes where the function was. Nothing is read but requests: what the function prints
goes to stderr. At the end of stdin, as when the run is killed, the process ends too.
"""

import faulthandler
import importlib.util
import inspect
import io
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Set
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

LONGEST_TEXT = 300
LARGEST = 3.4028234663852886e38
"""Scores are learned from in fp32, where larger ones are infinite."""


class BadResult(Exception):
    """What the function returned is no list of scores; the message says what it is."""


def main() -> None:
    """Load the function, say which columns it takes, and score batch after batch."""
    path, name, seconds = sys.argv[1:]
    requests, replies, process = *private_pipes(), os.getpid()
    be_the_first_to_go()
    sys.argv, sys.path[0] = [path], str(Path(path).parent)

    def reply(content: dict[str, Any]) -> None:
        replies.write(json.dumps(content) + "\n")
        replies.flush()

    try:
        function = load(Path(path), name)
        reply(signature(function))
    except BaseException as error:  # a file can do anything while it is imported, also exit
        reply({"problem": described(error, path)})
        return
    for line in requests:
        request = json.loads(line)
        faulthandler.dump_traceback_later(float(seconds), exit=True, file=replies)
        answer = reply_to(function, request, path)
        if os.getpid() != process:
            os._exit(
                0
            )  # a fork that the function made and that came back: a reply of its own would be one more
        faulthandler.cancel_dump_traceback_later()
        reply(answer)


def private_pipes() -> tuple[TextIO, TextIO]:
    """stdin and stdout for the protocol alone: the function's own stdin is empty, its stdout is stderr."""
    requests, replies = (
        os.fdopen(os.dup(0), "r", encoding="utf-8"),
        os.fdopen(os.dup(1), "w", encoding="utf-8"),
    )
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    lasting = io.BufferedWriter(LastingOutput())
    sys.stdout = sys.stderr = io.TextIOWrapper(
        lasting, encoding=sys.stderr.encoding, errors="backslashreplace", line_buffering=True
    )
    return requests, replies


class LastingOutput(io.RawIOBase):
    """stderr that no write fails on: that nothing reads a function's prints is no failure of its scores."""

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        with suppress(OSError):
            return os.write(2, data)
        return len(data)


def be_the_first_to_go() -> None:
    """Where memory runs out, Linux is to end this process and not the training that it serves."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def load(path: Path, name: str) -> Callable[..., Any]:
    """The function of that name in the file. Raises whatever the file raises, and `BadResult`."""
    module_name = path.stem if path.stem not in sys.modules else f"{path.stem}_of_rewards"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise BadResult(f"it has no function {name!r} (found: {', '.join(known) or 'none'})")
    return function


def signature(function: Callable[..., Any]) -> dict[str, list[str] | None]:
    """The columns that the function takes, None for all, and those that it needs. Raises `BadResult`."""
    parameters = inspect.signature(function).parameters
    named = {
        name: parameter.default is parameter.empty
        for name, parameter in parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    if not {"prompts", "answers"} <= set(named):
        raise BadResult(
            f"its function takes ({', '.join(parameters)}), but must take prompts and answers, and columns "
            "by their names or as **columns"
        )
    columns = [name for name in named if name not in ("prompts", "answers")]
    return {"columns": None if takes_all else columns, "required": [n for n in columns if named[n]]}


def reply_to(function: Callable[..., Any], request: dict[str, Any], path: str) -> dict[str, Any]:
    """The reply to a request: scores with None for each that is no number, and problems by their place."""
    try:
        prompts, answers = request["prompts"], request["answers"]
        result = function(prompts=prompts, answers=answers, **request["columns"])
        scores = as_list(result, len(answers))
        numbers = [number(score) for score in scores]
        problems = {
            place: [
                "no finite number",
                f"it returned {shortened(repr(scores[place]))}, which is no finite number",
            ]
            for place, value in enumerate(numbers)
            if value is None
        }
    except BaseException as error:  # SystemExit and MemoryError must not end the run either
        return {"problem": described(error, path)}
    return {"scores": numbers, "problems": problems}


def as_list(result: Any, count: int) -> list[Any]:
    """What the function returned, a list, an array or what else can be iterated over, as a list of `count`
    scores. Raises `BadResult`, and what iterating raises.
    """
    if hasattr(result, "tolist"):  # of NumPy or torch
        result = result.tolist()
    if isinstance(result, str | bytes | Mapping | Set) or not isinstance(
        result, Iterable
    ):  # without an order
        raise BadResult(f"it returned {shortened(repr(result))} and no list of scores")
    scores = list(islice(result, count + 1))  # what yields without end as well
    if len(scores) != count:
        number_of = f"more than {count}" if len(scores) > count else str(len(scores))
        raise BadResult(f"it returned {number_of} scores for {count} answers")
    return scores


def number(score: Any) -> float | None:
    """The score, if it is a finite number in fp32."""
    if isinstance(score, str | bytes):
        return None
    try:
        value = float(score)
    except Exception:  # whatever the object's own __float__ raises
        return None
    return value if abs(value) <= LARGEST else None


def described(error: BaseException, path: str) -> list[str]:
    """A problem: its kind, and what happened with the line of the file."""
    if isinstance(error, BadResult):
        return ["no scores", str(error)]
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    if isinstance(error, SyntaxError) and error.filename == path:
        lines = [error.lineno]
    kind, place = type(error).__name__, f" ({Path(path).name}:{lines[-1]})" if lines else ""
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return [kind, f"{kind}: {shortened(text)}{place}" if text else kind + place]


def shortened(text: str) -> str:
    """The first line of a text, or what of it fits a message."""
    line = text.partition("\n")[0]
    return line if len(line) <= LONGEST_TEXT else line[:LONGEST_TEXT] + "..."


if __name__ == "__main__":
    main()
