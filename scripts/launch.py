"""DeepSpeed's launcher, whose arguments reach the programs on other hosts as they were given.

python scripts/launch.py --hostfile hostfile step1_sft/main.py --data_path "my 'data'; $HOME.jsonl" ...
It takes what `deepspeed` takes; `deepspeed --help` lists its flags. For other hosts that goes through pdsh,
which hands a line to a shell there, and quotes only arguments with a space: quotes, `$`, `;`, `<` or `*` are
the shell's then.
"""

import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dschat.arguments import as_typed
from dschat.errors import UserError
from dschat.program import readable_errors


def quoted(word: str) -> str:
    """The word for the shell of another host; pdsh reads %h, %n and %u as its own, and %% as %."""
    return shlex.quote(word).replace("%", "%%")


def main() -> None:
    """Let DeepSpeed's runner for pdsh quote all that comes from here, and start it."""
    from deepspeed.launcher import runner
    from deepspeed.launcher.multinode_runner import PDSHRunner

    class QuotingRunner(PDSHRunner):
        """PDSHRunner whose words are the shell's words."""

        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, **kwargs)
            self.user_script = quoted(self.user_script)

        def parse_user_args(self) -> list[str]:
            return [quoted(word) for word in self.args.user_args]

        def add_export(self, key: str, var: str) -> None:
            self.exports[key.strip()] = quoted(var.strip())

        def get_cmd(self, environment: dict, active_resources: dict) -> tuple[list[str], list[str], dict]:
            command, kill_command, environment = super().get_cmd(environment, active_resources)
            folder = str(Path.cwd())
            command = [f"cd {quoted(folder)};" if word == f"cd {folder};" else word for word in command]
            return command, kill_command, environment

    runner.PDSHRunner = QuotingRunner
    try:
        runner.main()
    except (RuntimeError, ValueError) as error:  # no pdsh, a host that is not reached, a faulty hostfile
        raise UserError(f"{error}") from error


if __name__ == "__main__":
    if sys.argv[1:] in (["-h"], ["--help"]):  # without torch, which DeepSpeed's own imports
        print(as_typed(__doc__))
        sys.exit()
    with readable_errors():
        main()
