#!/usr/bin/env bash
# Set up, check style and types, run the tests, the files shared by two processes. Arguments go to pytest; without any
# the coverage of dschat/ is measured, of what runs in the tests' own processes:
#     bash scripts/test.sh             bash scripts/test.sh -m 'not slow' -k losses -n 0
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$root/scripts/setup.sh"
cd "$root"
export PATH="$root/.venv/bin:$PATH"

# The tests of pages need a browser, and are skipped with that reason where there is none.
if [[ ${CI:-} == true && $(id -u) == 0 ]] && ! command -v chromium >/dev/null && command -v apt-get >/dev/null; then
    { apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium; } >/dev/null 2>&1 ||
        echo "note: chromium could not be installed; the tests of pages in a browser are skipped."
fi

shellcheck .ci/run scripts/*.sh scripts/slurm/*.sbatch step*/*.sh
ruff check .
ruff format --check .
mypy --no-error-summary
if (($#)); then
    python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
else
    python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --cov dschat --cov-report=
    echo "== $(python -m coverage report --format=total) % of the lines of dschat/ are covered"
fi
