#!/usr/bin/env bash
# From nothing to an RLHF-trained model on a CPU, without a download: .venv, and in it scripts/demo.sh.
#     bash scripts/quickstart.sh [FOLDER] [--resume]
# FOLDER is quickstart/ in the project's root by default. It is written anew, but with --resume an interrupted run
# goes on.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
case "${1:-}" in
"" | --resume) set -- "$root/quickstart" "$@" ;;
-*) exec sed -n '2,5s/^# *//p' "$0" ;;
esac
bash "$root/scripts/setup.sh" --no-operators # the demo does not take --offload
export PATH="$root/.venv/bin:$PATH"
exec bash "$root/scripts/demo.sh" "$@"
