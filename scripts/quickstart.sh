#!/usr/bin/env bash
# From nothing to an RLHF-trained model on a CPU, without a download: .venv, and in it scripts/demo.sh.
#     bash scripts/quickstart.sh [FOLDER]      (default: quickstart/ in the project's root; it is written anew)
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$root/scripts/setup.sh"
export PATH="$root/.venv/bin:$PATH"
exec bash "$root/scripts/demo.sh" "${1:-$root/quickstart}"
