#!/usr/bin/env bash
# Make .venv in the project's root, once; quick the next time.
#     bash scripts/setup.sh            PYTHON=python3.12 bash scripts/setup.sh   (another interpreter)
# Installs torch first, in the version of requirements.txt, so that nothing else decides which build is taken, and
# compiles beforehand what DeepSpeed would otherwise compile in the middle of a first run on a CPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usable() { # is this a Python 3.10 to 3.12 that starts? (a version manager's shim may exist and not start)
    "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null
}

choose_python() {
    if [[ -n "${PYTHON:-}" ]]; then
        usable "$PYTHON" && echo "$PYTHON" && return
        echo "error: PYTHON=$PYTHON is no Python 3.10, 3.11 or 3.12 with venv." >&2
        return 1
    fi
    local candidate
    for candidate in python3.11 python3 python3.12 python3.10; do
        usable "$candidate" && echo "$candidate" && return
    done
    echo "error: Python 3.10, 3.11 or 3.12 with venv is needed and was not found (python3 is" \
        "$(python3 --version 2>/dev/null || echo missing)); install one, or set PYTHON to its path." >&2
    return 1
}

install() {
    echo "== installing into .venv (minutes; only this once)"
    "$python" -m pip install --quiet "$(grep -E '^torch==' requirements.txt)"
    "$python" -m pip install --quiet -r requirements.txt
    # setuptools is pinned above: no second, isolated environment is needed to build our few files.
    "$python" -m pip install --quiet --no-deps --no-build-isolation --editable .
}

build_operators() {
    if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
        echo "== a GPU is here: DeepSpeed compiles its operators where a run needs them"
        return 0
    fi
    if ! command -v g++ >/dev/null; then
        echo "== no g++: DeepSpeed's operators are not compiled. Everything works, but several processes on a CPU" \
            "are slower, and --offload is not available"
        return 0
    fi
    echo "== compiling what DeepSpeed would compile on its first use on a CPU (about a minute)"
    local log failed=0 builder pids=()
    log="$(mktemp -d)"
    # ninja, which drives the compiler, is in .venv/bin.
    for builder in ShareMemCommBuilder CPUAdamBuilder; do
        PATH="$PWD/.venv/bin:$PATH" "$python" -c "
from deepspeed.accelerator import get_accelerator
get_accelerator().create_op_builder('$builder').load()" >"$log/$builder" 2>&1 &
        pids+=($!)
    done
    for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
    if ((failed)); then
        echo "== an operator of DeepSpeed did not compile; a run that needs it will say the same:"
        tail -n 3 "$log"/*
    fi
    rm -rf "$log"
}

main() {
    local base stamp
    base="$(choose_python)"
    if [[ -x .venv/bin/python ]] && ! usable .venv/bin/python; then
        echo "== .venv belongs to a Python that is gone or too old or new: it is made again"
        rm -rf .venv
    fi
    python="$PWD/.venv/bin/python"
    # The folder belongs to it: what is installed points back here.
    stamp="$(cat requirements.txt pyproject.toml | cksum) $PWD"
    if [[ -x "$python" && -f .venv/installed && "$(cat .venv/installed)" == "$stamp" ]]; then
        return 0
    fi
    [[ -x "$python" ]] || "$base" -m venv .venv
    install
    build_operators
    echo "$stamp" >.venv/installed
    echo "== ready: .venv/bin/python is $("$python" --version)"
}

main
