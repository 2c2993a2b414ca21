#!/usr/bin/env bash
# Set up, check the style, run the tests, the files shared by two processes. Arguments go to pytest:
#     bash scripts/test.sh             bash scripts/test.sh -m 'not slow' -k losses -n 0
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$root/scripts/setup.sh"
cd "$root"
export PATH="$root/.venv/bin:$PATH"

shellcheck .ci/run scripts/*.sh step*/*.sh
ruff check .
ruff format --check .
python -m pytest -n 2 --dist loadfile "$@"
