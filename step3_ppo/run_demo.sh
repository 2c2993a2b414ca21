#!/usr/bin/env bash
# Step 3 on the demo task: PPO from what the other two run_demo.sh wrote, in two minutes on two CPU cores.
#     bash step3_ppo/run_demo.sh                 OUTPUT=folder bash step3_ppo/run_demo.sh --kl_coef 0.1
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(dirname "$here")"
out="${OUTPUT:-$root/output/demo}"
python="${PYTHON:-$root/.venv/bin/python}"
[[ -x "$python" ]] || python=python
export PATH="$root/.venv/bin:$PATH"

# shellcheck source=scripts/demo_settings.sh
source "$root/scripts/demo_settings.sh"

for step in step1_sft step2_reward; do
    if [[ ! -f "$out/$step/summary.json" ]]; then
        echo "error: $out/$step holds no finished model; run bash $step/run_demo.sh first." >&2
        exit 2
    fi
done
exec "$python" "$here/main.py" \
    --actor_model_name_or_path "$out/step1_sft" \
    --critic_model_name_or_path "$out/step2_reward" \
    --data_path "$out/data" \
    --output_dir "$out/step3_ppo" \
    "${demo_common[@]}" "${demo_ppo[@]}" "$@"
