#!/usr/bin/env bash
# The demo on a CPU, without a download: a small task, a small model, the three steps, and answers side by side.
#     dschat demo [FOLDER] [--resume]             bash scripts/demo.sh [FOLDER] [--resume]
# FOLDER is dschat_demo/ here by default. It is written anew, but with --resume an interrupted run goes on.
# In a checkout, scripts/quickstart.sh installs what it needs first.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
out="" resume=()
for word in "$@"; do
    case "$word" in
    --resume) resume=(--resume) ;;
    -*) exec sed -n '2,5s/^# *//p' "$0" ;;
    *) out="$word" ;;
    esac
done
out="${out:-dschat_demo}"
start=$SECONDS

mkdir -p "$out"
out="$(cd "$out" && pwd)"
export TOKENIZERS_PARALLELISM=false
if [[ ${#resume[@]} == 0 || ! -d "$out/base_model" ]]; then
    # The last run's results go, and only those: the folder may hold other things.
    rm -rf "$out"/{data,base_model,step1_sft,step2_reward,step3_ppo,figures.json}
    python "$root/scripts/demo_task.py" "$out"
fi
# The recipes step*/run_demo.sh run the same steps with the same flags, one by one.
# shellcheck source=scripts/demo_settings.sh
source "$root/scripts/demo_settings.sh"
DSCHAT_NEXT_UNASKED=1 python "$root/scripts/e2e_rlhf.py" "${resume[@]}" --output-dir "$out" --data-path "$out/data" \
    --actor-model "$out/base_model" --reward-model sft \
    --common-args "${demo_common[*]}" --sft-args "${demo_sft[*]}" \
    --reward-args "${demo_reward[*]}" --ppo-args "${demo_ppo[*]}"
python "$root/scripts/compare.py" --data-path "$out/data/test.jsonl" --demo-task --reference SFT \
    --model "base=$out/base_model" --model "SFT=$out/step1_sft" --model "PPO=$out/step3_ppo/actor" \
    --max-answer-seq-len 20 --batch-size 200 --num-shown 3 --output "$out/figures.json"

echo "done in $((SECONDS - start)) s; everything is in $out"
