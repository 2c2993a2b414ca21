"""Peaks of a host's memory while its ranks load a model whose layers they share; writes them as JSON.

torchrun --nproc_per_node N loading_peaks.py FOLDER OUTPUT CASE..., a case being FILE-STAGE-DTYPE: a model
folder below FOLDER, a ZeRO stage and the run's precision. In MiB, beyond what the ranks had before: "peak"
until layers are cut, "left" afterwards. Both are sums over ranks of Pss, which counts shared memory once.
"""

import gc
import json
import os
import sys
import threading
from pathlib import Path

from tensor_parallel import arguments
from transformers import AutoModelForCausalLM

from dschat.arguments import OptimizerArguments, RunArguments
from dschat.distributed import process_group
from dschat.distributed.collectives import all_gather_object, barrier
from dschat.distributed.device import DTYPES, give_back_memory
from dschat.distributed.mesh import mesh, set_parallel_sizes
from dschat.engines.build import shard_layers, train_config
from dschat.models.loading import create_hf_model
from dschat.models.tokenizer import load_tokenizer


def used(pids: list[int]) -> int:
    """MiB of these processes, each page shared out among those that map it."""
    rollups = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in pids]
    return sum(int(text.split("\nPss:")[1].split()[0]) for text in rollups) // 1024


class Peak(threading.Thread):
    """The most that the processes have had since its start, looked at all the time."""

    def __init__(self, pids: list[int]) -> None:
        super().__init__(daemon=True)
        self.pids, self.before, self.most, self.ended = pids, used(pids), 0, threading.Event()
        self.start()

    def run(self) -> None:
        """Look."""
        while not self.ended.is_set():
            self.most = max(self.most, used(self.pids))


def load(folder: Path, case: str, pids: list[int]) -> dict[str, int]:
    """The peak of a case."""
    file, stage, dtype = case.split("-")
    args = arguments(folder / file, int(stage), "lm", size=mesh().world.size)
    config = train_config(args, OptimizerArguments(), RunArguments(dtype=dtype), per_device_batch_size=1)
    tokenizer = load_tokenizer(args.model_name_or_path)
    give_back_memory()  # what the case before left would be taken for this one's
    barrier(axis="world")
    watch = Peak(pids) if mesh().is_main_process else None
    barrier(axis="world")
    model = create_hf_model(AutoModelForCausalLM, args.model_name_or_path, tokenizer, config)
    shard_layers(model, config)
    barrier(axis="world")
    gc.collect()
    assert {p.dtype for p in model.parameters()} == {DTYPES[dtype]}
    barrier(axis="world")
    found = {}
    if watch is not None:
        watch.ended.set()
        watch.join()
        found = {"peak": watch.most - watch.before, "left": used(pids) - watch.before}
    barrier(axis="world")
    return found


def main(folder: Path, output: Path, *cases: str) -> None:
    """Load a small model first, whose libraries and buffers are no part of a case."""
    set_parallel_sizes(tensor=mesh().world.size)
    process_group.init_process_group()
    pids = all_gather_object(os.getpid(), axis="world")
    load(folder, f"small-{cases[0].split('-', 1)[1]}", pids)
    found = {case: load(folder, case, pids) for case in cases}
    if mesh().is_main_process:
        output.write_text(json.dumps(found))
    process_group.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
