"""dschat: staged RLHF (SFT, reward model, PPO) on plain DeepSpeed and Hugging Face transformers."""

import sys
from importlib.util import find_spec
from pathlib import Path

NEEDED = ("torch", "deepspeed", "transformers", "datasets", "psutil", "rich")

if missing := [name for name in NEEDED if not find_spec(name)]:  # most often the system's Python was taken
    activate = Path(__file__).parents[1] / ".venv" / "bin" / "activate"
    remedy = f"source {activate}" if activate.is_file() else "bash scripts/setup.sh, or pip install dschat"
    message = f"{sys.executable} has no {', '.join(missing)}. Run {remedy}, and start this again."
    raise SystemExit(f"error: {message}") if sys.argv[0].endswith(".py") else ModuleNotFoundError(message)
