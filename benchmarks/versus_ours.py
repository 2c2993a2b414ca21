"""A training step of this project, as it is, with the moment of each of its steps noted for versus.py.

    python benchmarks/versus_ours.py CHECKOUT 10 step1_sft/main.py FLAGS_OF_STEP_1...

The first 10 steps are not timed. CHECKOUT is this repository, or an older checkout of it to compare with.
What is wrapped does none of the work: the functions that log and count a finished step, and those that make a
batch of rows, which are counted.
"""

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from versus_marks import Marks, median, say


def main() -> None:
    """Wrap, run the program, report."""
    checkout, left_out, flags = Path(sys.argv[1]).resolve(), int(sys.argv[2]), sys.argv[4:]
    marks, program = Marks(left_out), checkout / sys.argv[3]
    logged: list[dict[str, Any]] = []
    sys.argv = [str(program), *flags]
    sys.path[:0] = [str(program.parent), str(checkout)]
    watch(marks, logged)
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        if end.code not in (None, 0):
            raise
    more: dict[str, Any] = {"phases": phases(logged, left_out)}
    lengths = [row["answer_length"] for row in logged if row["step"] > left_out and "answer_length" in row]
    if lengths:
        more["answer_tokens"] = median(lengths)
    torch = sys.modules["torch"]
    if torch.cuda.is_available():
        more["device_peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
    say(marks.report(**more))


def watch(marks: Marks, logged: list[dict[str, Any]]) -> None:
    """Note each finished step, with the rows that were made into batches since the one before, and what is
    logged.

    The modules are imported by the program itself, after its flags are read, so nothing is imported here that
    `--help` would not import: the wrapping waits until the module is there.
    """
    read = {"samples": 0, "tokens": 0}

    def counted(collate: Callable[..., Any]) -> Callable[..., Any]:
        def collate_and_count(rows: Any, *args: Any, **options: Any) -> Any:
            read["samples"] += rows.num_rows
            for name in ("input_ids", "chosen_ids", "rejected_ids"):
                if name in rows.column_names:
                    # Not by `to_numpy`, which would import pandas into a run that does without it.
                    read["tokens"] += sum(rows[name].combine_chunks().value_lengths().to_pylist())
            return collate(rows, *args, **options)

        return collate_and_count

    def wrap_metrics(module: Any) -> None:
        advance, log = module.MetricsLogger.advance, module.MetricsLogger.log

        def log_and_note(self: Any, step: int, *values: Any, **named: Any) -> None:
            log(self, step, *values, **named)  # older checkouts name each value
            logged.append({"step": step, **(values[0] if values else named)})

        def advance_and_note(self: Any) -> None:
            advance(self)
            marks.step(read["samples"], read["tokens"])
            read.update(samples=0, tokens=0)

        module.MetricsLogger.advance, module.MetricsLogger.log = advance_and_note, log_and_note

    def wrap_collate(module: Any) -> None:
        for name in ("collate_sft", "collate_pairs", "collate_prompts"):
            setattr(module, name, counted(getattr(module, name)))

    when_imported({"dschat.runs.metrics": wrap_metrics, "dschat.data.collate": wrap_collate})


def when_imported(wrappers: dict[str, Callable[[Any], None]]) -> None:
    """Call each function with the module of its name, right after that is executed for the first time."""

    class Finder:
        """A finder of `sys.meta_path` that lets the others find, and wraps what they have loaded."""

        @staticmethod
        def find_spec(name: str, path: Any = None, target: Any = None) -> Any:
            if name not in wrappers:
                return None
            wrap = wrappers.pop(name)
            spec = next(
                filter(None, (f.find_spec(name, path, target) for f in sys.meta_path if f is not Finder))
            )
            loader: Any = spec.loader
            execute = loader.exec_module

            def execute_and_wrap(module: Any) -> None:
                execute(module)
                wrap(module)

            loader.exec_module = execute_and_wrap
            return spec

    sys.meta_path.insert(0, Finder)


def phases(logged: list[dict[str, Any]], left_out: int) -> dict[str, float]:
    """The median seconds of each phase of a step, of the steps that are timed, where the step logs them."""
    timed = [row for row in logged if row["step"] > left_out]
    names = sorted({name for row in timed for name in row if name.startswith("seconds_")})
    return {name: median([row[name] for row in timed if name in row]) for name in names}


if __name__ == "__main__":
    main()
