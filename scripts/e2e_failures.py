"""What a failed step of e2e_rlhf.py said, and what usually helps."""

import re
from collections.abc import Sequence
from pathlib import Path

SHOWN_LINES = 20
SEARCHED_LINES = 200
"""The end of a failed launch is the launcher's own noise: causes are looked for further up."""

LONGEST_SEARCH = 1 << 16
"""Bytes of a log's end that are read."""

# What a log says, and what usually helps; the first that matches the end of the log is shown.
REMEDIES = (
    (
        r"out of memory|OutOfMemoryError|DefaultCPUAllocator: can't allocate|MemoryError",
        "Memory ran out. Smaller --per_device_*_batch_size with more --gradient_accumulation_steps, a higher "
        "ZeRO stage (--actor-zero-stage 3), --gradient_checkpointing (step 3: --actor_gradient_checkpointing "
        "--critic_gradient_checkpointing) or --offload lower what is needed.",
    ),
    (
        r"EADDRINUSE|Address already in use",
        "The port of the process group is taken: another run is using it. Wait for that run or end it.",
    ),
    (
        r"No space left on device",
        "The disk is full. Free some space, or give another --output-dir (token cache: --data_output_path).",
    ),
    (
        r"Permission denied",
        "A file or folder may not be written or read: the line above names it. Give another --output-dir, or "
        "--data_output_path for the token cache.",
    ),
    (
        r"NCCL error|ncclSystemError|ncclUnhandledCudaError|ncclInternalError",
        "The GPUs could not talk to each other. NCCL_DEBUG=INFO tells more; on several nodes "
        "NCCL_SOCKET_IFNAME must name the network interface that connects them.",
    ),
    (
        r"Error building extension|ninja: (error|build stopped)|c\+\+: not found|CUDA_HOME",
        "DeepSpeed could not compile one of its operators. It needs g++ and ninja (and on GPUs a CUDA "
        "toolkit of torch's version); leaving out --offload avoids its Adam for the CPU.",
    ),
    (
        r"offline mode|Max retries exceeded|ConnectionError|couldn't connect to|Name or service not known",
        "The hub could not be reached. Download the model or the data beforehand and give the folder's path.",
    ),
    (
        r"No such file or directory|FileNotFoundError|does not exist",
        "A file is missing: the line above names it. Check the path.",
    ),
    (r"ModuleNotFoundError|ImportError", "A package is missing or does not fit: run bash scripts/setup.sh."),
    (
        r"exits with return code = -9|Killed",
        "A process was killed, most often because memory ran out: try a smaller batch, a higher ZeRO stage.",
    ),
    (r"(^|\n)(\[rank\d+\]: )?error: ", "The message above says what to change."),
)


def last_lines(log: Path, count: int = SHOWN_LINES, *, start: int = 0) -> list[str]:
    """The end of a log, from byte `start` on, as the console showed it: of a progress bar, the last state."""
    with log.open("rb") as file:
        file.seek(max(start, log.stat().st_size - LONGEST_SEARCH))
        text = file.read().decode(errors="replace")
    lines = [line.rstrip("\r").rpartition("\r")[2].rstrip() for line in text.split("\n")]
    return [line for line in lines if line][-count:]


def remedy(lines: Sequence[str]) -> str:
    """What usually helps against what these lines of a log say."""
    text = "\n".join(lines)
    for pattern, advice in REMEDIES:
        if re.search(pattern, text):
            return advice
    return "No known cause was recognised; the log has the whole story."


def failure(title: str, code: int, log: Path, *, start: int = 0) -> str:
    """What to say of a step that failed: its log, its last lines and the likely remedy."""
    lines = [
        f"error: {title} failed with exit code {code}.",
        f"log: {log}",
        *(f"  | {line}" for line in last_lines(log, start=start)),
        f"likely remedy: {remedy(last_lines(log, SEARCHED_LINES, start=start))}",
        "The same command leaves out the steps that have finished; with --resume it also goes on in the "
        "middle of one that makes checkpoints.",
    ]
    return "\n".join(lines)
