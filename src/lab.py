"""Copies of the notebooks in lab/, which git ignores: `make lab` opens them, and nothing that is edited is lost."""

import shutil

from src import runs


def copy() -> list[str]:
    """Bring lab/ up to date; return what to tell. A copy that differs from what was copied is kept as it is."""
    folder, said = runs.ROOT / "lab", []
    record = folder / ".copied.json"
    copied = runs.read_json(record, "lab") if record.is_file() else {}
    folder.mkdir(exist_ok=True)
    for original in sorted((runs.ROOT / "notebooks").glob("*.ipynb")):
        path, new = folder / original.name, runs.sha256_file(original)
        if path.is_file() and runs.sha256_file(path) not in (new, copied.get(path.name)):
            if copied.get(path.name) != new:
                said.append(f"lab/{path.name} was edited and is kept; the repository's is newer: delete it to get that")
            continue
        with runs.aside(path) as whole:  # half a copy would count as edited
            shutil.copyfile(original, whole)
        copied[path.name] = new
    runs.write_json(record, copied)
    return said or ["lab/ holds copies of the notebooks; git ignores them."]


if __name__ == "__main__":
    print("\n".join(copy()))
