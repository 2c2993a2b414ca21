#!/usr/bin/env bash
# DPO on the demo task: of what step1_sft/run_demo.sh wrote, on step 2's pairs, in a minute on two CPU cores.
#     bash step2_reward/run_dpo_demo.sh          OUTPUT=folder bash step2_reward/run_dpo_demo.sh --beta 0.05
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
exec "$python" "$here/dpo.py" \
    --model_name_or_path "$out/step1_sft" \
    --data_path "$out/data" \
    --output_dir "$out/step2_dpo" \
    "${demo_common[@]}" "${demo_dpo[@]}" "$@"
