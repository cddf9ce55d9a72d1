"""Notebooks on Google Colab: keep the torch, numpy and pandas that are there, install what else is missing.

Only the standard library is imported: this runs before anything is installed.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KEPT = ("torch", "torchvision", "torchaudio", "numpy", "pandas", "scipy", "matplotlib")  # built for each other and CUDA
UNUSED = ("jupyter", "pytest", "pytest-timeout", "hypothesis", "ruff")  # by notebooks
LOWEST = {"torch": (2, 6), "pandas": (2, 2)}  # transformers' own bound; the oldest pandas that was tried
DRIVE = "/content/drive"


class RestartNeeded(RuntimeError):
    """Modules that this session has imported were replaced: it has to start anew."""


def setup(outputs: str = ""):
    """Install what is missing, and keep outputs/ in another folder if one is named. Nothing is done twice.

    Raises RuntimeError if Colab's own packages are too old or pip fails, RestartNeeded if the session has to restart.
    """
    if outputs:
        keep_outputs(outputs)
    installed = _versions()
    for name, lowest in LOWEST.items():
        found = installed.get(name, "")
        if found and tuple(int(part) for part in re.findall(r"\d+", found)[:2]) < lowest:
            raise RuntimeError(
                f"Colab's {name} is {found}: expected {'.'.join(map(str, lowest))} or newer, pick it there."
            )
    missing = wanted(installed)
    if missing:
        _install(missing, {name: installed[name] for name in KEPT if name in installed})
        changed = {name for name, version in _versions().items() if installed.get(name, version) != version}
        modules = metadata.packages_distributions()
        loaded = {_plain(name) for module in set(sys.modules) & set(modules) for name in modules[module]}
        if changed & loaded:
            raise RestartNeeded(
                f"Installed. {', '.join(sorted(changed & loaded))} changed under this session: "
                "Runtime > Restart session, then Runtime > Run all. Nothing is installed a second time."
            )


def wanted(installed: dict[str, str]) -> list[str]:
    """The lines of requirements.txt (`name==version`) that notebooks need and that are not installed as they say."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pins = [line.split("#")[0].strip().split("==") for line in lines if "==" in line.split("#")[0]]
    return [
        f"{name}=={version}"
        for name, version in pins
        if name not in UNUSED and installed.get(_plain(name)) != version and not (name in KEPT and name in installed)
    ]


def keep_outputs(folder: str):
    """Let outputs/ be `folder`, which outlives the machine: on Colab one of a mounted Drive. What is there stays."""
    outputs, target = ROOT / "outputs", Path(folder)
    if folder.startswith(DRIVE) and not Path(DRIVE, "MyDrive").is_dir():
        from google.colab import drive

        drive.mount(DRIVE)
    if outputs.is_symlink():
        return
    shutil.copytree(outputs, target, dirs_exist_ok=True)
    shutil.rmtree(outputs)
    outputs.symlink_to(target.resolve(), target_is_directory=True)


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _versions() -> dict[str, str]:
    return {
        _plain(found.metadata["Name"]): found.version for found in metadata.distributions() if found.metadata["Name"]
    }


def _install(lines: list[str], kept: dict[str, str]):
    """pip install, with what is kept as a constraint. Nothing is printed unless it fails."""
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "kept.txt"
        constraints.write_text("".join(f"{name}=={version}\n" for name, version in kept.items()), encoding="utf-8")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        done = subprocess.run([*command, "-c", str(constraints), *lines], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"pip could not install {', '.join(lines)} beside {kept}:\n{done.stderr.strip()[-1500:]}")
