"""The end of a process that was a rank of several."""

import subprocess
import sys

import pytest
from processes import environment

from dschat.distributed.process_end import errors_end_ranks


@pytest.mark.slow
def test_an_error_ends_a_watched_rank_with_its_exit_code_after_what_was_registered_for_its_end():
    program = (
        "import atexit, os, sys\n"
        "from dschat.distributed import watchdog\n"
        "from dschat.program import readable_errors\n"
        "atexit.register(print, 'registered')\n"
        "class Late:\n"
        "    def __del__(self): print('torn down')\n"
        "late = Late()\n"
        "with readable_errors():\n"
        "    watchdog.start_watching([os.getpid()] * 2, [1, 1], rank=0)\n"
        "    print('unflushed', end=' ')\n"
        "    exec(sys.argv[1])\n"
    )
    errors = {
        "sys.exit(3)": (3, ""),
        "sys.exit('why')": (1, "why"),
        "1 / 0": (1, "ZeroDivisionError: division by zero"),
    }
    for error, (code, said) in errors.items():
        result = subprocess.run(
            [sys.executable, "-c", program, error],
            capture_output=True, text=True, env=environment(), check=False,
        )  # fmt: skip
        assert result.returncode == code
        assert result.stdout == "unflushed registered\n"
        assert result.stderr.strip().endswith(said)


def test_without_other_ranks_an_error_goes_on_as_it_is():
    with pytest.raises(ZeroDivisionError), errors_end_ranks():
        raise ZeroDivisionError
