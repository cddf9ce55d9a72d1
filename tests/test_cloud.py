"""The files in cloud/: read by the engines' own packages where there are any, and what they run."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

CLOUD = Path(__file__).resolve().parents[1] / "cloud"
READ = {  # package: file, how it reads it
    "sky": ("sky.yaml", "import sky; task = sky.Task.from_yaml(path); print(task.name, *sorted(task.envs))"),
    "dstack": (
        "dstack.yml",
        "import yaml; from dstack._internal.core.models.configurations import parse_run_configuration as read; "
        "task = read(yaml.safe_load(open(path))); print(task.name, *sorted(task.env.as_dict()))",
    ),
}


@pytest.mark.parametrize("package", READ)
def test_the_engine_itself_reads_the_file(package, tmp_path):
    python = os.environ.get(f"{package.upper()}_PYTHON")  # of an environment that has it
    if not python and not importlib.util.find_spec(package):
        pytest.skip(f"{package} is not installed: set {package.upper()}_PYTHON to a python that has it")
    name, program = READ[package]
    done = subprocess.run(
        [python or sys.executable, "-c", f"path = {str(CLOUD / name)!r}; {program}"],
        env=os.environ | {"HOME": str(tmp_path)}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = done.stdout.split()
    assert said[0] == "dialogues" and {"EXPERIMENT", "OVERRIDES", "GPUS", "SWEEP"} <= set(said[1:])


def made(tmp_path, script: str, **variables) -> list[str]:
    """The words that a script gives to `make`, in a folder with outputs; /gathered is a folder beside it."""
    stub, gathered, here = (tmp_path / name for name in ("bin", "gathered", "here"))
    for folder in (stub, gathered, here / "outputs" / "demo-12345678"):
        folder.mkdir(parents=True)
    (here / "outputs" / "demo-12345678" / "manifest.json").touch()
    (stub / "make").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n', encoding="utf-8")
    (stub / "make").chmod(0o755)
    done = subprocess.run(
        ["bash", "-euc", script.replace("/gathered", str(gathered))], cwd=here, capture_output=True, text=True,
        env=os.environ | variables | {"PATH": f"{stub}:{os.environ['PATH']}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (gathered / "demo-12345678" / "manifest.json").is_file()
    return done.stdout.splitlines()


@pytest.mark.parametrize("name", ["sky.yaml", "dstack.yml"])
def test_what_a_file_runs_is_make_run_or_make_sweep(name, tmp_path):
    task = yaml.safe_load((CLOUD / name).read_text(encoding="utf-8"))
    script = task["run"] if name == "sky.yaml" else "\n".join(task["commands"][1:])
    given = {"EXPERIMENT": "samsum", "OVERRIDES": '{"lora.r": 8}', "GPUS": "2", "SWEEP": ""}
    one = made(tmp_path / "one", script, **given)
    assert one == ["run", "EXPERIMENT=samsum", 'OVERRIDES={"lora.r": 8}', "GPUS=2"]
    many = made(tmp_path / "many", script, **given | {"SWEEP": "sweep.json"})
    assert many == ["sweep", "FILE=sweep.json", "JOBS=2"]
    assert len((CLOUD / name).read_text(encoding="utf-8").splitlines()) <= 30


def test_slurm_and_accelerate_files_are_what_their_programs_take():
    assert subprocess.run(["bash", "-n", CLOUD / "slurm.sh"]).returncode == 0
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(CLOUD / "accelerate.yaml"))
    assert (config.num_machines, config.num_processes, config.main_process_port) == (2, 16, 29500)
