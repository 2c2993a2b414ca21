"""scripts/doctor.py on machines with something wrong."""

import argparse
import json
import os
import socket
import sys
import sysconfig

from huggingface_hub import constants
from processes import ROOT, python

from scripts import doctor

DOCTOR = ROOT / "scripts" / "doctor.py"


def by_subject(findings) -> dict[str, doctor.Finding]:
    return {finding.subject: finding for finding in findings}


def test_without_a_compiler_offload_is_what_will_not_work(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    found = by_subject(doctor.compilers())["g++"]
    assert found.status == "warning"
    assert "--offload" in found.text
    assert "apt install g++" in found.remedy
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / name))
    assert "apt install python3-dev" in by_subject(doctor.compilers())["Python.h"].remedy


def test_a_torch_that_cannot_be_imported_and_one_that_is_too_old(tmp_path):
    """A torch of another release, in front of the right one: the report names it and goes on."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('undefined symbol: nms')\n")
    (tmp_path / "torch-1.13.0.dist-info").mkdir()
    (tmp_path / "torch-1.13.0.dist-info" / "METADATA").write_text("Name: torch\nVersion: 1.13.0\n")
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = python(
        DOCTOR, "--json", "--offline", check=False, afresh=True, env={"PYTHONPATH": paths}, cwd=tmp_path
    )
    assert done.returncode == 1, done.stderr
    found = [entry for entry in json.loads(done.stdout) if entry["status"] == "problem"]
    texts = {entry["subject"]: entry["text"] for entry in found if entry["subject"] != "imports"}
    assert "cannot be imported: undefined symbol: nms" in texts["torch"]
    assert any(entry["text"] == "version 1.13.0; >=2.11 is needed" for entry in found)
    assert any(entry["subject"] == "imports" for entry in found)
    assert all(entry["remedy"] for entry in found)


def test_a_cpu_build_beside_a_gpu(monkeypatch):
    monkeypatch.setattr(doctor, "answer_of", lambda *command: "570.1, H100, 81559 MiB")
    monkeypatch.setattr("torch.version.cuda", None)  # whichever build the tests run with
    [found] = doctor.torch_and_devices()
    assert found.status == "problem"
    assert "is the CPU build, and there is a GPU" in found.text


def test_a_full_disk_a_small_one_and_a_folder_that_is_not_ours(monkeypatch, tmp_path):
    class Full:
        def __enter__(self):
            raise OSError(28, "No space left on device")

        def __exit__(self, *error):
            """Never entered."""

    missing = tmp_path / "not" / "there" / "yet"
    assert doctor.storage("output", missing, "--output_dir").text.endswith(f"free in {tmp_path}")
    monkeypatch.setattr(doctor, "LEAST_DISK", 2**60)
    small = doctor.storage("output", missing, "--output_dir")
    assert (small.status, small.remedy) == ("warning", "make room, or set --output_dir to a larger disk")
    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", lambda dir: Full())
    full = doctor.storage("output", missing, "--output_dir")
    assert (full.status, full.remedy) == ("problem", f"make room in {tmp_path}, or set --output_dir")
    assert not missing.exists()


def test_a_port_in_use():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = taken.getsockname()[1]
        found = doctor.port(number)
    assert found.status == "warning"
    assert "--master_port" in found.remedy
    assert doctor.port(number).status == "ok"


def test_little_shared_memory(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "LEAST_SHARED", 2**60)
    assert "--shm-size" in doctor.shared_memory(tmp_path).remedy
    assert doctor.shared_memory(tmp_path / "none").status == "warning"


def test_the_limit_of_a_container(tmp_path):
    limit = tmp_path / "memory.max"
    for text, expected in (("max\n", None), ("8589934592\n", 8 * 2**30)):
        limit.write_text(text)
        assert doctor.memory_limit(limit) == expected
    assert doctor.memory_limit(tmp_path / "none") is None


def test_variables_left_by_a_launcher_and_a_proxy_whose_password_is_not_shown(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("https_proxy", "http://me:secret@proxy:3128")
    found = by_subject(doctor.variables())
    assert "unset" in found["launcher"].remedy
    assert "WORLD_SIZE=4" in found["launcher"].text
    assert found["proxy"].text == "https_proxy is http://***@proxy:3128"


def test_a_hub_that_cannot_be_reached(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    [found] = doctor.hub(is_offline=False)
    assert found.status == "warning"
    assert "HF_ENDPOINT" in found.remedy
    [found] = doctor.hub(is_offline=True)
    assert found.status == "note"


def test_packages_that_are_missing_and_imports_that_fail(monkeypatch):
    monkeypatch.setattr(doctor, "clashes", lambda: iter(()))
    monkeypatch.setattr(
        doctor, "requires", lambda name: ["no-such-package>=2", "torch>=99", "wandb; extra == 'w'"]
    )
    found = by_subject(doctor.packages())
    assert found["no-such-package"].remedy == "pip install 'no-such-package>=2'"
    assert found["torch"].status == "problem"
    assert set(found) == {"no-such-package", "torch"}
    assert (
        doctor.failure_of("import nothing_of_this_name")
        == "ModuleNotFoundError: No module named 'nothing_of_this_name'"
    )
    assert doctor.failure_of("import sys") == ""
    assert doctor.failure_of("import time; time.sleep(9)", patience=0.2) == "no end after 0.2 s"


def test_the_report_counts_and_its_exit_code_says_whether_runs_fail(monkeypatch, capsys):
    findings = [
        doctor.Finding("disk", "problem", "full", "make room"),
        doctor.Finding("port", "warning", "taken"),
    ]
    monkeypatch.setattr(doctor, "examine", lambda args: iter(findings))
    assert doctor.main(argparse.Namespace(json=False)) == 1
    printed = capsys.readouterr().out
    assert (
        printed == "problem  disk: full\n         -> make room\nwarning  port: taken\n1 problem, 1 warning\n"
    )
    findings.pop(0)
    assert doctor.main(argparse.Namespace(json=True)) == 0
    assert json.loads(capsys.readouterr().out)[0]["subject"] == "port"
    assert doctor.python_version().status in ("ok", "note")
    assert sys.version_info >= (3, 11)
