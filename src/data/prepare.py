"""The datasets: fetch and verify, split, write data/processed, and give each recipe its rows.

Published splits stay as published.
"""

import os
import random
import tomllib
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path

from src import recipes, runs
from src.data.leaks import NEAR, audit, key, overlaps, sequences
from src.data.records import read_rows, usable
from src.data.tables import DataError, delimiter, verified

SOURCES = Path(__file__).resolve().parents[2] / "data" / "sources.toml"


def source(dataset: str) -> dict:
    """A published dataset's entry in data/sources.toml, with "files" as {key: {"name", "sha256", "url"}}."""
    entry = tomllib.loads(SOURCES.read_text(encoding="utf-8"))[dataset]
    for name, file in entry["files"].items():
        url = f"{entry['url']}/{file['path']}"
        entry["files"][name] = {"name": file.get("name", Path(url).name), "sha256": file["sha256"], "url": url}
    return entry


def fetch(folder: Path, name: str, sha256: str, url: str) -> Path:
    """Return folder/name, verified. If it is missing, it is downloaded, and has its name only once it is verified."""
    path = folder / name
    by_hand = f"Or download {url} yourself and place it at {runs.relative(folder / Path(url).name)}."
    if path.exists():
        return verified(path, sha256, by_hand)
    import pooch

    try:
        with runs.scratch(path) as new:  # pooch's own temporary name outlives a kill
            return Path(pooch.retrieve(url, known_hash=sha256, path=new, fname=name, progressbar=True)).replace(path)
    except OSError as error:  # requests' errors too
        raise DataError(
            f"{runs.relative(path)} is missing and {url} cannot be fetched ({type(error).__name__}). Expected a file "
            f"with sha256 {sha256}. Check the network and run again. {by_hand}"
        ) from error
    except ValueError as error:  # pooch's, which deletes a download with another checksum
        found = f"{runs.relative(path)} from {url} broke off, or is not the published file"
        raise DataError(f"{found}: {error} Run again. {by_hand}") from error


def published_file(dataset: str, which: str) -> Path:
    """Return a dataset's file (a split, "released_outputs") from data/raw, fetched if it is missing, and verified."""
    entry = source(dataset)
    return fetch(runs.ROOT / "data" / "raw" / entry["folder"], **entry["files"][which])


def source_files(recipe) -> dict[str, Path]:
    """Return the raw file of every split, fetched if it is missing. An own file to be split is {"train": path}."""
    d = recipe.data
    if d.dataset == "demo":
        return {split: runs.ROOT / "data" / "demo" / f"{split}.csv" for split in recipes.splits("demo")}
    if d.dataset != "custom":
        if d.dataset == "samsum":
            _unpack_samsum()
        return {split: published_file(d.dataset, split) for split in recipes.splits(d.dataset)}
    given = {"train": d.train_file, "validation": d.validation_file, "test": d.test_file}
    return {split: runs.ROOT / Path(name).expanduser() for split, name in given.items() if name}


def _unpack_samsum():
    """Unpack the splits that are not in data/raw from the archive, each under a temporary name first."""
    entry = source("samsum")
    folder = runs.ROOT / "data" / "raw" / entry["folder"]
    names = [entry["files"][split]["name"] for split in recipes.splits("samsum")]
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        import py7zr

        archive = published_file("samsum", "archive")
        with runs.scratch(folder / missing[0]) as unpacked, py7zr.SevenZipFile(archive) as packed:
            packed.extract(unpacked, targets=missing)
            for name in missing:
                (unpacked / name).replace(folder / name)


def split_by_seed(rows: list[dict], seed: int, path: Path) -> dict[str, list[dict]]:
    """Split the rows of a file 80/10/10 into train, validation and test. Rows with the same dialogue stay together."""
    groups = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    if len(groups) < 3:
        raise DataError(
            f"{runs.relative(path)}: {len(groups)} different dialogue(s) cannot be split: expected 3. Add rows."
        )
    order = list(groups.values())
    random.Random(seed).shuffle(order)
    tenth = max(1, len(order) // 10)
    parts = {"train": order[2 * tenth :], "validation": order[tenth : 2 * tenth], "test": order[:tenth]}
    return {split: [row for group in part for row in group] for split, part in parts.items()}


def processed_dir(recipe) -> Path:
    """The folder of the rows that 01 wrote for the recipe's dataset."""
    return runs.ROOT / "data" / "processed" / recipe.data.dataset


def prepare(recipe) -> dict:
    """Fetch, verify, read, check and audit the recipe's dataset; write data/processed/<dataset>. Returns the report.

    Writes <split>.jsonl, leaks.json (the ids of `audit`) and, last, report.json. Raises DataError before any of them.
    """
    dataset, files = recipe.data.dataset, source_files(recipe)
    if dataset == "mts_dialog":
        published_file(dataset, "released_outputs")  # 03 scores them, and may have no network
    rows, dropped, largest = {}, {}, recipe.data.max_file_mb
    for split, path in files.items():
        rows[split], dropped[split] = usable(read_rows(path, largest), path, dataset == "custom")
    one_file = list(rows) == ["train"]
    if one_file:
        rows = split_by_seed(rows["train"], recipe.data.split_seed, files["train"])
    leaks, folder = audit(rows), processed_dir(recipe)
    with runs.held(folder, "being prepared"):
        return _write(recipe, folder, files, rows, dropped, leaks)


def _write(recipe, folder: Path, files, rows, dropped, leaks) -> dict:
    """Write the rows of every split, the leaks and the report; damaged files that lie there are set aside before."""
    try:
        _check(folder)
    except FileNotFoundError:
        pass  # the first time
    except DataError as damage:
        print(f"{damage}They are made anew now.")
    dataset, one_file = recipe.data.dataset, list(files) == ["train"]
    with ExitStack() as stack:  # nothing is replaced unless the disk holds all of it

        def new(name: str) -> Path:
            return stack.enter_context(runs.aside(folder / name))

        written = {split: runs.write_jsonl(new(f"{split}.jsonl"), part) for split, part in rows.items()}
        written["leaks"] = runs.write_json(new("leaks.json"), leaks)
        processed = {name: runs.sha256_file(path) for name, path in written.items()}
        (folder / "report.json").unlink(missing_ok=True)  # without it, what a kill leaves here counts as not prepared
    summary = {
        "dataset": dataset,
        "sources": {split: _origin(path) for split, path in files.items()},
        "split_seed": recipe.data.split_seed if one_file else None,
        "rows": {split: len(part) for split, part in rows.items()},
        "dropped": {split: items for split, items in dropped.items() if items},
        "leaks": {name: {pair: len(ids) for pair, ids in part.items()} for name, part in leaks.items()},
        "processed": processed,
    }
    runs.write_sealed(folder / "report.json", summary)
    return summary


def _check(folder: Path, again: str = "") -> dict:
    """01's report of a folder; files that are not as 01 wrote them are set aside under another name: DataError."""
    try:
        found = runs.read_sealed(folder / "report.json", "01_prepare_data")
    except runs.Damage as error:
        aside = runs.relative(runs.set_aside(folder / "report.json"))
        raise DataError(f"{error} It was set aside as {aside}. {again}") from None
    damage = ""
    for name, sha256 in found["processed"].items():
        path = folder / (f"{name}.json" if name == "leaks" else f"{name}.jsonl")
        if not path.is_file() or runs.sha256_file(path) != sha256:
            damage += f"{runs.relative(path)} is not the file that 01 wrote: found another sha256 or no file, expected "
            damage += f"{sha256}. "
            damage += f"It was set aside as {runs.relative(runs.set_aside(path))}. " if path.exists() else ""
    if damage:
        raise DataError(damage + again)
    return found


def _origin(path: Path) -> dict[str, str]:
    """The file that rows come from, and its delimiter if that is not a comma."""
    if not path.is_file():
        raise DataError(f"{runs.relative(path)} is missing: expected the file that 01 read.")
    found, character = {"file": runs.public(path), "sha256": runs.sha256_file(path)}, delimiter(path)
    outside = {} if os.path.abspath(path) == str(runs.ROOT / found["file"]) else {"outside": True}
    return found | outside | ({} if character == "," else {"delimiter": character})


def report(recipe) -> dict:
    """Read 01's report.json and check it: another own file or split_seed, or rows edited since, is a DataError."""
    folder = processed_dir(recipe)
    again = f"Run notebooks/01_prepare_data.ipynb again with the same RECIPE and OVERRIDES. ({runs.relative(folder)})"
    found = _check(folder, again)
    if recipe.data.dataset == "custom":
        sources = {}
        for split, path in source_files(recipe).items():
            known = found["sources"].get(split, {})
            gone = known.get("outside") and not path.is_file() and path.name == known["file"]
            sources[split] = known if gone else _origin(path)  # a run keeps of a file outside its name alone
        seed = recipe.data.split_seed if len(sources) == 1 else None
        if (found["sources"], found["split_seed"]) != (sources, seed):
            raise DataError(
                f"The prepared rows come from {found['sources']}, seed {found['split_seed']}; expected {sources}, "
                f"seed {seed}. {again}"
            )
    return found


def fingerprint(recipe) -> dict[str, str]:
    """The sha256 of every processed split, for the manifest."""
    return report(recipe)["processed"]


def load_split(recipe, split: str) -> list[dict]:
    """All processed rows of a split, in file order."""
    report(recipe)
    return runs.read_jsonl(processed_dir(recipe) / f"{split}.jsonl", "01_prepare_data")


def train_rows(recipe) -> list[dict]:
    """The rows to train on: the first data.train_rows.

    With data.drop_leaked, rows whose dialogue or a near duplicate of it is in another split are left out before.
    """
    rows = load_split(recipe, "train")
    if recipe.data.drop_leaked:
        held_out = [row for split in recipes.splits(recipe.data.dataset)[1:] for row in load_split(recipe, split)]
        leaked = {key(row) for row in held_out}
        compared = overlaps([sequences(row) for row in held_out], [sequences(row) for row in rows])
        near = {position for shares in compared for position, share in shares.items() if share >= NEAR}
        rows = [row for position, row in enumerate(rows) if position not in near and key(row) not in leaked]
    if not rows:
        raise DataError(
            "data.drop_leaked leaves no row to train on: every training dialogue, or a near duplicate of it, is in "
            "another split too. Set it to false, or give other files."
        )
    return rows[: recipe.data.train_rows]


def validation_rows(recipe) -> list[dict]:
    """The rows of the validation loss: the first data.validation_rows."""
    return load_split(recipe, "validation")[: recipe.data.validation_rows]


def evaluation_rows(recipe) -> list[dict]:
    """The rows that 03 scores: the first evaluation.rows of evaluation.split."""
    return load_split(recipe, recipe.evaluation.split)[: recipe.evaluation.rows]


def load(recipe):
    """Return a datasets.DatasetDict: "train", "validation", and "evaluation", the rows that 03 scores."""
    from datasets import Dataset, DatasetDict

    parts = {"train": train_rows(recipe), "validation": validation_rows(recipe), "evaluation": evaluation_rows(recipe)}
    return DatasetDict({name: Dataset.from_list(rows) for name, rows in parts.items()})
