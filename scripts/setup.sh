#!/usr/bin/env bash
# Make .venv in the project's root, once; quick the next time.
#     bash scripts/setup.sh [--no-operators]      PYTHON=python3.12 bash scripts/setup.sh   (another interpreter)
# Installs torch first, in the version of requirements.txt, so that nothing else decides which build is taken, and
# compiles beforehand what --offload would otherwise compile in the middle of a first run on a CPU (not with
# --no-operators).
set -euo pipefail
case "${1:-}" in
"" | --no-operators) ;;
*) exec sed -n '2,6s/^# *//p' "$0" ;;
esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."

oldest=11 newest=14 # of Python 3: what torch, transformers and pyarrow support in the versions of requirements.txt
needed="Python 3.11, 3.12, 3.13 or 3.14"
candidates=(python3 python3.13 python3.12 python3.11 python3.14) # the user's own first

version_of() { # what a command answers: "3.12", or "3.12 without venv", or nothing (a version manager's shim may not start)
    "$1" -c 'import sys, sysconfig
version = "%d.%d" % sys.version_info[:2]
if sysconfig.get_config_var("Py_GIL_DISABLED"): version += " free-threaded"
try: import venv, ensurepip
except ImportError: version += " without venv"
print(version)' 2>/dev/null
}

usable() { # is this a supported Python that can make environments?
    local version
    version="$(version_of "$1")" || return 1
    [[ "$version" =~ ^3\.([0-9]+)$ ]] && ((BASH_REMATCH[1] >= oldest && BASH_REMATCH[1] <= newest))
}

choose_python() {
    local candidate version found=""
    for candidate in ${PYTHON:+"$PYTHON"} "${candidates[@]}"; do
        usable "$candidate" && echo "$candidate" && return
        version="$(version_of "$candidate")" || version=""
        if [[ "$candidate" == "${PYTHON:-}" ]]; then
            echo "error: PYTHON=$PYTHON is ${version:+Python }${version:-no Python that starts}, and $needed with" \
                "its venv module is needed. Nothing was downloaded." >&2
            return 1
        fi
        [[ -z "$version" ]] || found+="${found:+, }$candidate is $version"
    done
    cat >&2 <<END
error: $needed with its venv module is needed; found: ${found:-none}. Nothing was downloaded.
Install one, then run this again:
  Debian, Ubuntu:  sudo apt install python3 python3-venv
  Fedora:          sudo dnf install python3
  anywhere:        uv python install 3.12, pyenv install 3.12 or conda create -n dschat python=3.12,
                   and PYTHON=/path/to/python3.12 bash scripts/setup.sh
END
    return 1
}

has_gpu() { # judged without torch, which is not there yet
    [[ -e /dev/nvidiactl ]] || command -v nvidia-smi >/dev/null
}

tell_of_cpu_build() {
    if has_gpu || "$python" -m pip config list | grep -qE 'index-url|find-links' || "$python" -c 'import torch' 2>/dev/null; then
        return 0
    fi
    cat <<'END'
== no NVIDIA GPU is here, but pip's default torch for Linux on x86-64 brings gigabytes of CUDA. To take the CPU build
   press Ctrl-C and start the same command again behind PIP_EXTRA_INDEX_URL=ADDRESS, where ADDRESS is the CPU index
   that pytorch.org's "Get Started" page shows.
END
}

pip_install() { # what it is, and pip's arguments
    echo "== installing $1"
    if ! "$python" -m pip install "${@:2}" 2>&1 | follow_pip; then
        explain_failure "$1" >&2
        exit 1
    fi
}

follow_pip() { # keep pip's output in the log, and show what it is doing: something new each 5 s, the same each 30
    local line start=$SECONDS shown=$SECONDS doing="asking the package index" told=""
    while true; do
        if IFS= read -r -t 5 line; then
            printf '%s\n' "$line" >>"$log"
            case "$line" in
            *Downloading* | *"Using cached"* | *"Building wheel"*) doing="${line#"${line%%[![:space:]]*}"}" ;;
            "Installing collected packages"*) line="${line//[^,]/}" doing="unpacking $((${#line} + 1)) packages" ;;
            esac
        elif (($? <= 128)); then # the end; above 128 there was no line for 5 seconds
            return 0
        fi
        if ((SECONDS - shown >= 30)) || [[ "$doing" != "$told" ]] && ((SECONDS - shown >= 5)); then
            shown=$SECONDS told="$doing"
            echo "   $((shown - start)) s: ${doing:0:100}"
        fi
    done
}

explain_failure() {
    local problem remedy
    problem="$(grep -E '^ *ERROR: ' "$log" | tail -n 1 | sed 's/^ *ERROR: //')"
    case "$(tail -n 60 "$log")" in
    *"No space left"*) remedy="Make room on the disk (.venv takes 2 GiB with torch's CPU build, several more with CUDA)." ;;
    *"Temporary failure in name resolution"* | *"Name or service not known"* | *"timed out"* | *"Connection refused"* | \
        *ProxyError* | *SSLError* | *"Network is unreachable"*)
        remedy="See that pip's package index can be reached: https_proxy names a proxy, PIP_INDEX_URL an index of your own." ;;
    *"No matching distribution"*)
        remedy="The index has no such version for $("$python" --version): see PIP_INDEX_URL and 'pip config list', or set PYTHON to another of $needed." ;;
    *) remedy="$log has pip's whole output." ;;
    esac
    echo "error: $1 could not be installed: ${problem:-pip ended without a message}. $remedy" \
        "Running this again goes on with what was downloaded; the log is $log."
}

install() {
    tell_of_cpu_build
    : >"$log"
    pip_install "torch" "$(grep -E '^torch==' requirements.txt)"
    pip_install "everything else" -r requirements.txt
    # setuptools is pinned above: no second, isolated environment is needed to build our few files.
    pip_install "dschat" --no-deps --no-build-isolation --editable .
}

build_operators() {
    if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
        echo "== a GPU is here: DeepSpeed compiles its operators where a run needs them"
        return 0
    fi
    local header='import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")'
    if ! command -v g++ >/dev/null || ! "$python" -c "$header" 2>/dev/null; then
        echo "== no g++ or no Python.h: DeepSpeed's Adam for the CPU is not compiled. Everything works but --offload"
        return 0
    fi
    echo "== compiling DeepSpeed's Adam for the CPU, which --offload needs (half a minute)"
    local compiler_log
    compiler_log="$(mktemp)"
    # ninja, which drives the compiler, is in .venv/bin.
    if ! PATH="$PWD/.venv/bin:$PATH" "$python" -c "
from deepspeed.accelerator import get_accelerator
get_accelerator().create_op_builder('CPUAdamBuilder').load()" >"$compiler_log" 2>&1; then
        echo "== it did not compile; a run with --offload will say the same:"
        tail -n 3 "$compiler_log"
    fi
    rm -f "$compiler_log"
}

main() {
    local stamp
    python="$PWD/.venv/bin/python" log="$PWD/.venv/install.log"
    # The folder belongs to it: what is installed points back here.
    stamp="$(cat requirements.txt pyproject.toml | cksum) $PWD"
    if [[ -f .venv/installed && "$(cat .venv/installed)" == "$stamp" ]] && usable "$python" && is_asked_for; then
        return 0
    fi
    echo "== setting up dschat in .venv (minutes; only this once)"
    local base
    base="$(choose_python)"
    if [[ -d .venv ]] && ! { usable "$python" && is_asked_for && "$python" -m pip --version >/dev/null 2>&1; }; then
        echo "== .venv belongs to another Python, or to one that is gone: it is made again"
        rm -rf .venv
    fi
    [[ -x "$python" ]] || "$base" -m venv .venv
    echo "== $("$python" --version), $base"
    install
    [[ "${1:-}" == --no-operators ]] || build_operators
    echo "$stamp" >.venv/installed
    echo "== ready: .venv/bin/python is $("$python" --version) with torch $("$python" -c 'import torch; print(torch.__version__)')"
}

is_asked_for() { # has .venv the version of PYTHON, if that is given?
    [[ -z "${PYTHON:-}" || "$(version_of "$python")" == "$(version_of "$PYTHON")" ]]
}

main "$@"
