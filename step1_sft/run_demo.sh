#!/usr/bin/env bash
# Step 1 on the demo task (scripts/demo_task.py): a minute on two CPU cores, no download.
#     bash step1_sft/run_demo.sh                 OUTPUT=folder bash step1_sft/run_demo.sh --num_train_epochs 8
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(dirname "$here")"
out="${OUTPUT:-$root/output/demo}"
python="${PYTHON:-$root/.venv/bin/python}"
[[ -x "$python" ]] || python=python
export PATH="$root/.venv/bin:$PATH"

# shellcheck source=scripts/demo_settings.sh
source "$root/scripts/demo_settings.sh"

[[ -d "$out/base_model" && -f "$out/data/train.jsonl" ]] || "$python" "$root/scripts/demo_task.py" "$out"
exec "$python" "$here/main.py" \
    --model_name_or_path "$out/base_model" \
    --data_path "$out/data" \
    --output_dir "$out/step1_sft" \
    "${demo_common[@]}" "${demo_sft[@]}" "$@"
