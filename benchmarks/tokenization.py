"""Time and memory of preparing a large file of preferences, first and second start, beside a plain map.

python benchmarks/tokenization.py --megabytes 1000 --folder output/tokenization

writes FOLDER/pairs.jsonl (synthetic dialogues) and a small model, then prepares step 2's pairs of it twice,
each time in a new process. Memory is the largest resident set of any one process, polled. The peer,
on the first tenth of the rows, is what people write by hand: `datasets.load_dataset("json")` and a batched
`map` that tokenises prompt + answer with the same tokenizer and as many processes.
"""

import argparse
import contextlib
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

OURS = """
import sys
from dschat.arguments import DataArguments
from dschat.data.preparation import reward_data
from dschat.models.tokenizer import load_tokenizer
if __name__ == "__main__":
    folder, path, workers = sys.argv[1:4]
    data = DataArguments(data_path=[path], data_output_path=folder + "/cache", data_split="0,1,0",
                         preprocessing_num_workers=int(workers))
    split = reward_data(data, load_tokenizer(folder + "/model"), max_seq_len=512, seed=1)
    print(len(split.train))
"""
PEER = """
import sys
import datasets
from dschat.models.tokenizer import load_tokenizer
if __name__ == "__main__":
    folder, path, workers = sys.argv[1:4]
    tokenizer = load_tokenizer(folder + "/model")
    def encode(batch):
        columns = {}
        for name in ("chosen", "rejected"):
            texts = [prompt + answer for prompt, answer in zip(batch["prompt"], batch[name])]
            columns[name + "_ids"] = tokenizer(texts, truncation=True, max_length=512)["input_ids"]
        return columns
    rows = datasets.load_dataset("json", data_files=path, split="train", cache_dir=folder + "/peer")
    rows = rows.map(encode, batched=True, remove_columns=rows.column_names, num_proc=int(workers))
    print(len(rows))
"""


def write_data(folder: Path, megabytes: float) -> Path:
    """Dialogues of words of an invented language, about a kilobyte a row, and a model with its tokenizer."""
    from tiny import save_tiny_model, tiny_tokenizer

    chance = random.Random(0)
    parts = ["ba", "cor", "den", "el", "fis", "go", "hu", "in", "jo", "ka", "lum", "mer", "no", "or", "pa"]
    words = ["".join(chance.choices(parts, k=chance.randint(1, 4))) for _ in range(20_000)]

    def sentence(mean: int) -> str:
        return " ".join(chance.choices(words, k=max(3, int(chance.expovariate(1 / mean)))))

    path, size, number = folder / "pairs.jsonl", 0, 0
    texts = []
    with path.open("w") as file:
        while size < megabytes * 1e6:
            turns = [f"\n\nHuman: {sentence(20)}\n\nAssistant: {sentence(30)}" for _ in range(number % 3)]
            prompt = "".join(turns) + f"\n\nHuman: {sentence(20)} {number}\n\nAssistant:"
            row = {"prompt": prompt, "chosen": f" {sentence(30)}", "rejected": f" {sentence(30)}"}
            line = json.dumps(row) + "\n"
            file.write(line)
            size, number = size + len(line), number + 1
            if number < 2000:
                texts.append(prompt + row["chosen"])
    save_tiny_model(folder / "model", tokenizer=tiny_tokenizer(texts, vocab_size=4096))
    return path


def head(path: Path, share: float) -> Path:
    """The first share of the lines as a file of their own."""
    short, wanted = path.with_name("head.jsonl"), path.stat().st_size * share
    with path.open("rb") as file, short.open("wb") as out:
        for line in file:
            out.write(line)
            if out.tell() >= wanted:
                return short
    return short


def measure(program: str, *args: object) -> tuple[float, float]:
    """Seconds, and the largest resident set of any process of it in GiB."""
    start, largest = time.perf_counter(), 0
    command = [sys.executable, "-c", program, *map(str, args)]
    with tempfile.TemporaryFile() as log:  # not a pipe, which progress bars would fill
        child = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        while child.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                main = psutil.Process(child.pid)
                processes = [main, *main.children(recursive=True)]
                largest = max(largest, *(process.memory_info().rss for process in processes))
            time.sleep(0.5 if time.perf_counter() - start > 10 else 0.05)
        if child.returncode:
            log.seek(0)
            raise SystemExit(log.read().decode()[-4000:])
    return time.perf_counter() - start, largest / 2**30


def main() -> None:
    """Write, run, print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--megabytes", type=float, default=1000, help="Size of the file (default 1000).")
    parser.add_argument("--folder", type=Path, required=True, help="Where everything is written.")
    parser.add_argument("--workers", type=int, default=2, help="Processes that tokenise (default 2).")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    path = write_data(args.folder, args.megabytes)
    short = head(path, 0.1)
    sizes = {"first start": path, "second start": path}
    print(f"{path.stat().st_size / 1e6:.0f} MB, {args.workers} workers")
    for name, file in sizes.items():
        seconds, memory = measure(OURS, args.folder, file, args.workers)
        print(f"{name:<36} {seconds:8.1f} s {memory:6.2f} GiB in the largest process", flush=True)
    ours = measure(OURS, args.folder, short, args.workers)
    peer = measure(PEER, args.folder, short, args.workers)
    print(f"{'the first tenth, ours':<36} {ours[0]:8.1f} s {ours[1]:6.2f} GiB")
    print(f"{'the first tenth, plain datasets map':<36} {peer[0]:8.1f} s {peer[1]:6.2f} GiB")
    print(f"ours / peer: {ours[0] / peer[0]:.2f} of the time")


if __name__ == "__main__":
    main()
