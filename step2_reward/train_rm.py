"""Step 2 by the flags of ColossalChat's train_rm.py, which it translates and prints.

torchrun --nproc_per_node=4 train_rm.py --pretrain M --dataset D --plugin zero2 --loss_fn log_sig --save_dir S
torchrun --nproc_per_node=8 train_rm.py --pretrain M --dataset D --plugin 3d --tp 2 --pp 2 --grad_checkpoint
"""

import importlib.util
import os
import shlex
import sys
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dschat.arguments import TrainRmCall, without_secrets
from dschat.console import messages
from dschat.program import readable_errors, run_step

STEP = Path(__file__).resolve().with_name("main.py")


def main() -> NoReturn:
    """Translate the flags, and run step 2 with them."""
    with readable_errors():
        call = TrainRmCall.parse()
        words = translated(call)
        if os.environ.get("RANK", "0") == "0":
            call.write_config()
    command = f"{STEP.parent.name}/{STEP.name} {without_secrets(shlex.join(words))}"
    messages.info(f"train_rm.py is step 2 with other flags; the same run:\n{command}")
    # A run that starts again for want of memory reads its flags from both.
    sys.argv = [str(STEP), *words]
    sys.orig_argv = [sys.executable, *sys.argv]
    run_step("reward", str(STEP))


def translated(call: TrainRmCall) -> list[str]:
    """The command line of step 2 on this machine."""
    from dschat.distributed.device import device_type  # which imports torch: --help is to answer at once

    has_package = importlib.util.find_spec("flash_attn") is not None
    return call.words(on_gpu=device_type() != "cpu", has_flash_attention=has_package)


if __name__ == "__main__":
    main()
