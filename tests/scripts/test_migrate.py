"""scripts/migrate.py on files as other projects publish them, written anew."""

import shlex

import pytest

from dschat.arguments import parse_arguments
from dschat.errors import UserError
from scripts import migrate
from scripts.migrate_sources import read

DEEPSPEED_CHAT = """\
#!/bin/bash
ACTOR_MODEL=$1
OUTPUT=$2
if [ "$OUTPUT" == "" ]; then
    OUTPUT=./output
fi
mkdir -p $OUTPUT

deepspeed --master_port 12346 main.py \\
   --data_path Dahoas/rm-static \\
   --actor_model_name_or_path $ACTOR_MODEL \\
   --critic_model_name_or_path "$3" \\
   --per_device_generation_batch_size 4 \\
   --per_device_training_batch_size 4 \\
   --actor_learning_rate ${Actor_Lr} \\
   --deepspeed --seed 1234 \\
   --inference_speed 3 \\
   --output_dir $OUTPUT \\
    &> $OUTPUT/training.log
echo done
"""
FACTORY = """\
model_name_or_path: org/model
reward_model: saves/reward model
stage: ppo
do_train: true
finetuning_type: lora
lora_target: all
dataset: identity,alpaca_en_demo
template: llama3
cutoff_len: 2048
overwrite_output_dir: true
report_to: none
output_dir: saves/ppo
save_steps: 500
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-5
bf16: true
max_new_tokens: 512
top_p: 0.9
"""
SWIFT = """\
nproc_per_node=4
CUDA_VISIBLE_DEVICES=0,1 NPROC_PER_NODE=$nproc_per_node \\
swift rlhf \\
    --rlhf_type dpo --model org/model --train_type full \\
    --dataset 'org/pairs#20000' \\
    --torch_dtype bfloat16 \\
    --gradient_accumulation_steps $(expr 16 / $nproc_per_node) \\
    --deepspeed zero3_offload --attn_impl flash_attn
"""
COLOSSAL = """\
colossalai run --nproc_per_node 8 --hostfile hosts train_sft.py --pretrain $MODEL --dataset ${data[@]} \\
    --plugin zero2_cpu --batch_size 4 --max_epochs 1 --accumulation_steps 8 --lr 5e-5 --max_len 4096 \\
    --mixed_precision bf16 --use_flash_attn --tokenizer_dir $MODEL
"""
TRL = """\
from datasets import load_dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

arguments = DPOConfig(
    output_dir="out", beta=0.2, learning_rate=5e-7, bf16=True, max_length=512, loss_type=["sigmoid"],
    hub_token=token(),
)
adapters = LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"])
data = load_dataset("org/pairs", split="train")
DPOTrainer(model="org/model", args=arguments, train_dataset=data, peft_config=adapters).train()
"""
TRL_PPO = """\
accelerate launch --num_processes 2 examples/scripts/ppo/ppo.py --dataset_name org/prompts \\
    --learning_rate 3e-6 --per_device_train_batch_size 64 --gradient_accumulation_steps 1 \\
    --total_episodes 10000 --model_name_or_path org/sft --sft_model_path org/sft \\
    --reward_model_path org/reward --response_length 53 --missing_eos_penalty 1.0 --num_ppo_epochs 2
"""


def migrated(tmp_path, name: str, text: str) -> tuple[str, dict[str, str], dict[str, str]]:
    """The script, our flags, and what is said, by the first word of theirs."""
    path = tmp_path / name
    path.write_text(text)
    source = read(path)
    done = migrate.translate(source, source.step)
    notes = {text.partition(" ")[0].strip(":"): kind for kind, text in done.notes}
    return migrate.script(source, done, name), done.flags, notes


def test_a_launch_script_of_deepspeed_chat_keeps_its_lines_and_its_flags(tmp_path):
    script, flags, notes = migrated(tmp_path, "run_1.3b.sh", DEEPSPEED_CHAT)
    assert "deepspeed --master_port 12346 --module dschat ppo \\\n    --data_path Dahoas/rm-static" in script
    assert "    OUTPUT=./output\nfi\nmkdir -p $OUTPUT\n" in script
    assert script.endswith("--output_dir $OUTPUT &> $OUTPUT/training.log\necho done")
    assert script.count("#!/bin/bash") == 1
    assert flags["critic_model_name_or_path"] == '"$3"'
    assert notes["--inference_speed"] == "unknown"
    assert {notes[name] for name in ("--data_path", "--seed", "--actor_learning_rate")} == {"kept"}
    assert "# another default  --critic_learning_rate is 5e-6 there" in script


def test_ppo_of_llama_factory_has_two_models_and_a_rate_for_its_adapters(tmp_path):
    _, flags, notes = migrated(tmp_path, "ppo.yaml", FACTORY)
    assert "--reward_model" in notes
    args = parse_arguments("rlhf", [word for f, v in flags.items() for word in (f"--{f}", *shlex.split(v))])
    assert (args.actor.model_name_or_path, args.reward_path) == ("org/model", "saves/reward model")
    assert args.optimizer.only_optimize_lora
    for model in (args.actor, args.critic):
        assert (model.lora_dim, model.lora_alpha, model.lora_learning_rate) == (8, 16, 1e-5)
    # A rollout is what an optimiser step takes: one answer times eight micro-batches.
    assert (args.rollout_size, args.minibatch_size) == (8, 8)
    assert (args.rollout.max_prompt_seq_len, args.rollout.max_answer_seq_len) == (1536, 512)
    assert args.data.data_path == ["identity", "alpaca_en_demo"]
    assert args.run.save_interval == 500


def test_ms_swift_starts_with_torchrun_and_its_deepspeed_file_is_a_stage(tmp_path):
    script, flags, notes = migrated(tmp_path, "dpo.sh", SWIFT)
    assert "\nCUDA_VISIBLE_DEVICES=0,1 torchrun --nproc_per_node $nproc_per_node -m dschat dpo \\\n" in script
    assert (flags["zero_stage"], flags["offload"], flags["dtype"]) == ("3", "true", "bf16")
    assert flags["gradient_accumulation_steps"] == "$(expr 16 / $nproc_per_node)"
    assert flags["attn_implementation"] == "flash_attention_2"
    assert "only_optimize_lora" not in flags
    assert notes["--rlhf_type"] == "left out"


def test_colossalchat(tmp_path):
    script, flags, _ = migrated(tmp_path, "train_sft.sh", COLOSSAL)
    assert "torchrun --nproc_per_node 8 -m dschat sft" in script
    assert (flags["model_name_or_path"], flags["data_path"]) == ("$MODEL", "${data[@]}")
    assert (flags["zero_stage"], flags["offload"]) == ("2", "true")
    assert flags["max_seq_len"] == "4096"


def test_ppo_of_colossalchat_with_quoted_values_and_a_switch_for_its_tracker(tmp_path):
    text = (
        "colossalai run --nproc_per_node 8 train_ppo.py --pretrain a --rm_pretrain b \\\n"
        "    --prompt_dataset p.jsonl --num_episodes 2000 --accumulation_steps 2 \\\n"
        "    --plugin \"zero2_cpu\" --mixed_precision 'fp16' --use_wandb --grad_checkpoint \\\n"
        "    --num_collect_steps 4 --num_update_steps 2 --experience_batch_size 8\n"
    )
    script, flags, _ = migrated(tmp_path, "train_ppo.sh", text)
    assert "# unknown" not in script
    args = parse_arguments("rlhf", [word for f, v in flags.items() for word in (f"--{f}", *shlex.split(v))])
    assert (args.data.data_path, args.run.report_to, args.run.dtype) == (["p.jsonl"], ["wandb"], "fp16")
    assert (args.actor.zero_stage, args.critic.gradient_checkpointing) == (2, True)
    assert (args.rollout.generation_batches, args.ppo.ppo_epochs) == (4, 2)
    assert flags["gradient_accumulation_steps"] == "2"


def test_a_program_of_trl_is_read_for_its_literals(tmp_path):
    script, flags, notes = migrated(tmp_path, "train.py", TRL)
    args = parse_arguments("dpo", [word for f, v in flags.items() for word in (f"--{f}", *shlex.split(v))])
    assert (args.model.model_name_or_path, args.data.data_path) == ("org/model", ["org/pairs:split=train"])
    assert (args.dpo.beta, args.batch.max_seq_len, args.run.dtype) == (0.2, 512, "bf16")
    assert (args.model.lora_dim, args.model.lora_alpha, args.model.lora_module_name) == (
        16,
        32,
        "q_proj,v_proj",
    )
    assert args.model.lora_learning_rate == 5e-7
    assert "hub_token" in script
    assert notes["--hub_token"] == "not there"
    assert "# another default  --num_train_epochs is 3 there" in script


def test_ppo_of_trl(tmp_path):
    script, flags, notes = migrated(tmp_path, "run.sh", TRL_PPO)
    assert "torchrun --nproc_per_node 2 -m dschat ppo" in script
    args = parse_arguments("rlhf", [word for f, v in flags.items() for word in (f"--{f}", *shlex.split(v))])
    assert (args.actor.model_name_or_path, args.reward_path) == ("org/sft", "org/reward")
    assert (args.ppo.ppo_epochs, args.ppo.missing_eos_penalty) == (2, 1.0)
    assert args.rollout.max_answer_seq_len == 53
    assert "--total_episodes" in notes
    assert "num_train_epochs" not in flags  # episodes are no epochs


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("a.sh", "echo hello\n", "has no command that starts a training program"),
        ("a.yaml", "- one\n", "holds no mapping of flags"),
        ("a.yaml", "a: [\n", "cannot be read as YAML"),
        ("a.py", "def f(:\n", "line 1: it is no Python"),
        ("a.py", "print(1)\n", "makes no configuration of TRL"),
        ("a.sh", "llamafactory-cli train other.yaml\n", "trains with other.yaml; give that file"),
    ],
)
def test_files_that_say_nothing(tmp_path, name, text, problem):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=problem):
        read(tmp_path / name)
    with pytest.raises(UserError, match="cannot be read"):
        read(tmp_path / "missing.sh")


def test_what_a_file_does_not_tell_is_asked_for_and_a_command_that_cannot_work_is_said(tmp_path, capsys):
    path = tmp_path / "settings.yaml"
    path.write_text("learning_rate: 1e-5\nloss_type: kto\nseed: often\n")
    with pytest.raises(
        UserError, match=r"does not tell what it trains; say it with --step sft\|reward\|dpo\|ppo"
    ):
        migrate.main(migrate.parse([str(path)]))
    migrate.main(migrate.parse([str(path), "--step", "dpo"]))
    printed = capsys.readouterr().out
    assert "--loss_type kto: kto: --loss_type is sigmoid or ipo" in printed
    assert "to mend" in printed
    assert printed.splitlines()[0] == "#!/bin/bash"
