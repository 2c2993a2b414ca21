#!/usr/bin/env bash
# Step 2 on the demo task: a reward model of what step1_sft/run_demo.sh wrote, in a minute on two CPU cores.
#     bash step2_reward/run_demo.sh              OUTPUT=folder bash step2_reward/run_demo.sh --loss_fn log_exp
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(dirname "$here")"
out="${OUTPUT:-$root/output/demo}"
python="${PYTHON:-$root/.venv/bin/python}"
[[ -x "$python" ]] || python=python
export PATH="$root/.venv/bin:$PATH"

# shellcheck source=scripts/demo_settings.sh
source "$root/scripts/demo_settings.sh"

if [[ ! -f "$out/step1_sft/summary.json" ]]; then
    echo "error: $out/step1_sft holds no finished model; run bash step1_sft/run_demo.sh first." >&2
    exit 2
fi
exec "$python" "$here/main.py" \
    --model_name_or_path "$out/step1_sft" \
    --data_path "$out/data" \
    --output_dir "$out/step2_reward" \
    "${demo_common[@]}" "${demo_reward[@]}" "$@"
