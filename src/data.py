"""From published or own files to rows: fetch and verify, read, normalise, check, audit for leaks, write data/processed.

A row is {"id", "section" ("" where there is none), "dialogue", "summary"}. The published splits are kept as published.
"""

import csv
import io
import json
import random
import re
from collections import defaultdict
from pathlib import Path

from src import experiments
from src.experiments import read_json, read_jsonl, relative, sha256_file, write_json, write_jsonl

MTS_COMMIT = "3ff0801933608d6f570468c13125125fb5cabdea"
MTS_URL = f"https://raw.githubusercontent.com/abachaa/MTS-Dialog/{MTS_COMMIT}"
SAMSUM_URL = "https://arxiv.org/src/1911.12237v2/anc/corpus.7z"
MTS_FILES = {  # split: (file, sha256)
    "train": (
        "MTS-Dialog-TrainingSet.csv",
        "65a28681dd59fc159681ea026e44610f2af7bc64a0e7f892d763eb03d9f503dc",
    ),
    "validation": (
        "MTS-Dialog-ValidationSet.csv",
        "227206520c4534381c0d7fba6d3f09319a9af5a6d9603a93c0341af1198e3958",
    ),
    "test1": (
        "MTS-Dialog-TestSet-1-MEDIQA-Chat-2023.csv",
        "b4d38dd2c99b2e9860099abcf653f1e0f3e9b69f9fcc45be2a2699b37a4d2f37",
    ),
    "test2": (
        "MTS-Dialog-TestSet-2-MEDIQA-Sum-2023.csv",
        "226644466ed3af82382b327a3e684aab70aa605b96cfd93b04f584f1826ab1a6",
    ),
}
RELEASED_OUTPUTS = (
    "MTS-Dialog-Automatic-Summaries-ValidationSet.csv",
    "0ee4261f33f7001643cfb88779bf2af49a6e1829e70460bb9b67917d48276f2d",
)
MANUAL_SCORES = (
    "MTS-Dialog-Manual-Scores4CorrelationStudy.csv",
    "48344ac1ea8a8c8dc6286cebc59b734bbe29d821e32bd3cfefb4c72f0b70088d",
)
SAMSUM_ARCHIVE = ("corpus.7z", "a97674c66726f66b98a08ca5e8868fb8af9d4843f2b05c4f839bc5cfe91e8899")
SAMSUM_FILES = {
    "train": ("train.json", "c0df0898ad4322462cb73959f0ca820b31c4dc27e44b1ef64fbc34f7e12f1cb5"),
    "validation": ("val.json", "f291b34ea2a851c4fd67bc9e1c05003f0dde2c2ae1a501ba733b9d97b6166349"),
    "test": ("test.json", "eb5ac232d04982fdf70766b10bd07223732d8de0b817a0ab2a30a79ea99a693a"),
}
SHINGLE = 8  # words; two dialogues are near duplicates when they share at least half of their 8-word sequences


class DataError(ValueError):
    """A file or rows that cannot be used: what was found, what was expected, where, and what to do."""


# ---------------------------------------------------------------- files


def fetch(folder: Path, name: str, sha256: str, url: str, progress: bool = True) -> Path:
    """The verified file folder/name; downloaded under a temporary name when it is not there. Raises DataError."""
    import pooch
    import requests

    path = folder / name
    by_hand = f"Remedy: download {url} yourself and place it at {relative(path)}."
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        temporary = f".{name}.part"
        try:
            pooch.retrieve(url, known_hash=None, path=folder, fname=temporary, progressbar=progress)
        except (requests.RequestException, OSError) as error:
            (folder / temporary).unlink(missing_ok=True)
            raise DataError(
                f"{relative(path)} is missing and {url} cannot be fetched ({type(error).__name__}). "
                f"Expected a file with sha256 {sha256}. Check the network and run again. {by_hand}"
            ) from error
        (folder / temporary).replace(path)
    found = sha256_file(path)
    if found != sha256:
        raise DataError(
            f"{relative(path)} has sha256 {found}, expected {sha256}: it is not the published file, or its download broke off. "
            f"Delete it and run again. {by_hand}"
        )
    return path


def source_files(experiment, progress: bool = True) -> dict[str, Path]:
    """The raw file of every split, fetched and verified for the published datasets. One entry, `train`, when a custom file is to be split."""
    raw, d = experiments.ROOT / "data" / "raw", experiment.data
    if d.dataset == "demo":
        return {split: experiments.ROOT / "data" / "demo" / f"{split}.csv" for split in experiments.splits("demo")}
    if d.dataset == "mts_dialog":
        return {
            s: fetch(raw / "mts-dialog", name, sha, f"{MTS_URL}/Main-Dataset/{name}", progress)
            for s, (name, sha) in MTS_FILES.items()
        }
    if d.dataset == "samsum":
        folder = raw / "samsum"
        if any(not (folder / name).exists() for name, _ in SAMSUM_FILES.values()):
            import py7zr

            archive = fetch(folder, *SAMSUM_ARCHIVE, SAMSUM_URL, progress)
            with py7zr.SevenZipFile(archive) as packed:
                packed.extract(folder, targets=[name for name, _ in SAMSUM_FILES.values()])
        return {s: fetch(folder, name, sha, SAMSUM_URL, progress) for s, (name, sha) in SAMSUM_FILES.items()}
    given = {"train": d.train_file, "validation": d.validation_file, "test": d.test_file}
    if bool(d.validation_file) != bool(d.test_file):
        raise DataError(
            "Only one of data.validation_file and data.test_file is given: give both, or neither to have train_file split by data.split_seed."
        )
    return {split: experiments.ROOT / name for split, name in given.items() if name}


def released_outputs(progress: bool = True) -> list[dict]:
    """The four EACL-2023 systems' summaries of MTS-Dialog's validation split, in file order (CC BY 4.0).

    400 rows: ID, Dialogue, Reference Summary, Automatic Summary.
    """
    return _table(_correlation_study(*RELEASED_OUTPUTS, progress))


def manual_scores(progress: bool = True) -> list[dict[str, float]]:
    """What people found in each row of `released_outputs`: FactualPrecision, FactualRecall, HallucinationRate, OmissionRate, ... in 0-1."""
    return [{k: float(v) for k, v in row.items()} for row in _table(_correlation_study(*MANUAL_SCORES, progress))]


def _correlation_study(name: str, sha256: str, progress: bool) -> Path:
    folder = experiments.ROOT / "data" / "raw" / "mts-dialog"
    return fetch(folder, name, sha256, f"{MTS_URL}/Correlation-Study/{name}", progress)


def others(experiment, progress: bool = True) -> dict[str, tuple[str, list[str], list[str]]]:
    """Summaries that other systems or people made of the dataset: {name: (split, summaries, references)}.

    MTS-Dialog: the released outputs, one system after the other (each starts where the ids start anew). SAMSum: one
    annotator's summary against another's, for every dialogue that occurs with two different ones.
    """
    systems = {}
    if experiment.data.dataset == "mts_dialog":
        rows = released_outputs(progress)
        for row in rows:
            if row["ID"] == rows[0]["ID"]:
                systems[f"EACL-2023 system {len(systems) + 1} (released outputs)"] = ("validation", [], [])
            _, summaries, references = list(systems.values())[-1]
            summaries.append(row["Automatic Summary"])
            references.append(row["Reference Summary"])
    if experiment.data.dataset == "samsum":
        pairs = human_pairs([load_split(experiment, split) for split in experiments.splits("samsum")])
        systems["one human against another"] = ("all", [p for p, _ in pairs], [r for _, r in pairs])
    return systems


def human_pairs(splits: list[list[dict]]) -> list[tuple[str, str]]:
    """(one annotator's summary, another's), one pair for every dialogue that occurs with two different summaries."""
    summaries = defaultdict(list)
    for row in (row for split in splits for row in split):
        if row["summary"] not in summaries[key(row)]:
            summaries[key(row)].append(row["summary"])
    return [(found[1], found[0]) for found in summaries.values() if len(found) > 1]


# ---------------------------------------------------------------- reading and checking


def read_rows(path: Path) -> list[dict]:
    """Rows of a CSV, JSON or JSONL file, line ends normalised to \\n, values as they are ("None" stays text). Raises DataError.

    Accepts MTS-Dialog's column names (ID, section_header, section_text) beside ours (id, section, summary).
    """
    table = _table(path)
    if not table:
        raise DataError(f"{relative(path)} holds no rows: expected at least one with dialogue and summary.")
    names = {"ID": "id", "section_header": "section", "section_text": "summary"}
    table = [{names.get(key, key): value for key, value in row.items()} for row in table]
    missing = [column for column in ("dialogue", "summary") if any(column not in row for row in table)]
    if missing:
        lacking = [n for n, row in enumerate(table, 1) if any(column not in row for column in missing)]
        where = "every row" if len(lacking) == len(table) else _some(lacking, "row")
        raise DataError(
            f"{relative(path)} has the columns {', '.join(map(str, table[0]))}; {', '.join(missing)} missing in {where}. Expected dialogue and summary "
            "(optional: id, section), or MTS-Dialog's ID, section_header, section_text, dialogue."
        )
    wrong = [
        n for n, row in enumerate(table, 1) if not all(isinstance(row.get(c), str) for c in ("dialogue", "summary"))
    ]
    if wrong:
        raise DataError(
            f"{relative(path)}: dialogue or summary is not text in {_some(wrong, 'row')}. Expected strings."
        )
    return [
        {
            "id": str(row.get("id", number)),
            "section": str(row.get("section") or ""),
            "dialogue": normalise(row["dialogue"]),
            "summary": normalise(row["summary"]),
        }
        for number, row in enumerate(table, 1)
    ]


def _table(path: Path) -> list[dict]:
    if not path.is_file():
        raise DataError(
            f"{relative(path)} is missing: expected a CSV or JSONL file with the columns dialogue and summary at that path."
        )
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise DataError(
            f"{relative(path)} is not UTF-8: byte {raw[error.start : error.start + 1]!r} at offset {error.start} (line {line}). "
            "Save the file as UTF-8 and run again."
        ) from None
    try:
        if path.suffix == ".json":
            table = json.loads(text)
        elif path.suffix == ".jsonl":
            table = [_json_line(line, n) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
        else:
            csv.field_size_limit(2**31 - 1)
            table = list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
    except (ValueError, csv.Error) as error:
        raise DataError(
            f"{relative(path)} cannot be parsed as {path.suffix[1:] or 'CSV'} ({error}): expected CSV, JSON or JSONL."
        ) from None
    if not isinstance(table, list) or not all(isinstance(row, dict) for row in table):
        raise DataError(
            f"{relative(path)} is not a list of records: expected one object with dialogue and summary a row."
        )
    uneven = [n for n, row in enumerate(table, 1) if None in row or None in row.values()]
    if uneven and path.suffix == ".csv":
        raise DataError(
            f"{relative(path)} has more or fewer fields than its header in {_some(uneven, 'row')}: quote fields that hold commas."
        )
    return table


def _json_line(line: str, number: int) -> dict:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {number}, column {error.colno}: {error.msg}") from None


def normalise(text: str) -> str:
    """CRLF and CR become LF, blanks around the text go. The published files mix line ends between splits."""
    return text.replace("\r\n", "\n").replace("\r", "\n").strip()


def _some(items, word: str) -> str:
    more = f" and {len(items) - 10} more" if len(items) > 10 else ""
    return f"{word}{'s' if len(items) > 1 else ''} {', '.join(map(str, items[:10]))}{more}"


def usable(rows: list[dict], path: Path, strict: bool) -> tuple[list[dict], list[dict]]:
    """(rows with text on both sides, dropped [{"id", "reason"}]). `strict` (own files): a dropped row is a DataError instead."""
    seen, duplicates = set(), []
    for row in rows:
        (duplicates.append if row["id"] in seen else seen.add)(row["id"])
    if "" in seen:
        raise DataError(f"{relative(path)} has rows whose id is empty: give every row an id, or leave the column out.")
    if duplicates:
        raise DataError(
            f"{relative(path)} uses {_some(duplicates, 'id')} more than once: every row of a file needs an id of its own."
        )
    dropped = [{"id": r["id"], "reason": f"empty {c}"} for r in rows for c in ("dialogue", "summary") if not r[c]]
    if dropped and strict:
        raise DataError(
            f"{relative(path)}: empty dialogue or summary in {_some([d['id'] for d in dropped], 'row')}. Fill or remove them."
        )
    ids = {d["id"] for d in dropped}
    return [row for row in rows if row["id"] not in ids], dropped


def split_by_seed(rows: list[dict], seed: int) -> dict[str, list[dict]]:
    """80/10/10 in train, validation and test; rows with the same dialogue stay together."""
    groups = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    if len(groups) < 3:
        raise DataError(
            f"{len(groups)} different dialogue(s) cannot be split into train, validation and test: expected at least 3."
        )
    order = list(groups.values())
    random.Random(seed).shuffle(order)
    tenth = max(1, len(order) // 10)
    parts = {"test": order[:tenth], "validation": order[tenth : 2 * tenth], "train": order[2 * tenth :]}
    return {split: [row for group in parts[split] for row in group] for split in ("train", "validation", "test")}


# ---------------------------------------------------------------- leak audit


def key(row: dict) -> str:
    """A dialogue lower-cased, without punctuation and spaces: what "the same dialogue" means here."""
    return re.sub(r"[\W_]+", "", row["dialogue"].lower())


def audit(rows: dict[str, list[dict]]) -> dict:
    """Dialogues that occur twice, within and across splits.

    Returns {"within": {split: ids of extra copies}, "across": {"test in train": ids}, "near": {"test in train": [{id, other, share}]}};
    `near` holds pairs that share at least half of the smaller one's 8-word sequences without being the same.
    """
    keys = {split: [key(row) for row in part] for split, part in rows.items()}
    names = list(rows)
    within = {}
    for split in names:
        seen = set()
        within[split] = [r["id"] for r, k in zip(rows[split], keys[split], strict=True) if k in seen or seen.add(k)]
    across, near = {}, {}
    for i, first in enumerate(names):
        known, index = set(keys[first]), defaultdict(set)
        for n, row in enumerate(rows[first]):
            for shingle in _shingles(row):
                index[shingle].add(n)
        for second in names[i + 1 :]:
            pair = f"{second} in {first}"
            across[pair] = [r["id"] for r, k in zip(rows[second], keys[second], strict=True) if k in known]
            near[pair] = [
                hit
                for r, k in zip(rows[second], keys[second], strict=True)
                if k not in known and (hit := _nearest(r, rows[first], index))
            ]
    return {"within": within, "across": across, "near": near}


def _shingles(row) -> set[int]:
    words = re.findall(r"\w+", row["dialogue"].lower())
    return {hash(tuple(words[i : i + SHINGLE])) for i in range(len(words) - SHINGLE + 1)}


def _nearest(row, others, index) -> dict | None:
    own, counts = _shingles(row), defaultdict(int)
    for shingle in own:
        for n in index.get(shingle, ()):
            counts[n] += 1
    if not counts:
        return None
    best = max(counts, key=lambda n: (counts[n], -n))
    share = counts[best] / max(1, min(len(own), len(_shingles(others[best]))))
    return {"id": row["id"], "other": others[best]["id"], "share": round(share, 3)} if share >= 0.5 else None


# ---------------------------------------------------------------- the processed files


def prepare(experiment, progress: bool = True) -> dict:
    """Fetch, verify, read, check and audit the experiment's dataset; write data/processed/<dataset>. Returns the report.

    Writes <split>.jsonl, leaks.json (the ids of `audit`) and, last, report.json. Raises DataError before anything is written.
    """
    files, custom = source_files(experiment, progress), experiment.data.dataset == "custom"
    if experiment.data.dataset == "mts_dialog":
        released_outputs(progress)  # scored in 03, which may have no network
    rows, dropped = {}, {}
    for split, path in files.items():
        rows[split], dropped[split] = usable(read_rows(path), path, strict=custom)
    if list(rows) == ["train"]:
        rows = split_by_seed(rows["train"], experiment.data.split_seed)
    leaks = audit(rows)
    folder = experiment.processed_dir
    written = {split: write_jsonl(folder / f"{split}.jsonl", part) for split, part in rows.items()}
    report = {
        "dataset": experiment.data.dataset,
        "sources": {split: {"file": relative(path), "sha256": sha256_file(path)} for split, path in files.items()},
        "split_seed": experiment.data.split_seed if custom and len(files) == 1 else None,
        "rows": {split: len(part) for split, part in rows.items()},
        "dropped": {split: items for split, items in dropped.items() if items},
        "leaks": {name: {pair: len(ids) for pair, ids in part.items()} for name, part in leaks.items()},
        "processed": {split: sha256_file(path) for split, path in written.items()},
    }
    write_json(folder / "leaks.json", leaks)
    write_json(folder / "report.json", report)
    return report


def report(experiment) -> dict:
    """report.json of notebook 01, checked against the experiment: another custom file or seed, or edited rows, is a DataError."""
    found = read_json(experiment.processed_dir / "report.json", "01_prepare_data")
    again = f"Run notebooks/01_prepare_data.ipynb again with the same EXPERIMENT and OVERRIDES. ({relative(experiment.processed_dir)})"
    d = experiment.data
    if d.dataset == "custom":
        sources = {
            s: n for s, n in (("train", d.train_file), ("validation", d.validation_file), ("test", d.test_file)) if n
        }
        expected = {
            s: {"file": relative(experiments.ROOT / n), "sha256": sha256_file(experiments.ROOT / n)}
            for s, n in sources.items()
        }
        if found["sources"] != expected or (len(expected) == 1 and found["split_seed"] != experiment.data.split_seed):
            raise DataError(
                f"The prepared rows come from {found['sources']}, seed {found['split_seed']}; expected {expected}, seed {experiment.data.split_seed}. {again}"
            )
    for split, sha in found["processed"].items():
        path = experiment.processed_dir / f"{split}.jsonl"
        if not path.is_file() or sha256_file(path) != sha:
            raise DataError(
                f"{relative(path)} is not the file that 01 wrote: found another sha256 or no file, expected {sha}. {again}"
            )
    return found


def fingerprint(experiment) -> dict[str, str]:
    """sha256 of every processed split, for the manifest."""
    return report(experiment)["processed"]


def load_split(experiment, split: str) -> list[dict]:
    """All processed rows of a split, in file order."""
    report(experiment)
    return read_jsonl(experiment.processed_dir / f"{split}.jsonl", "01_prepare_data")


def train_rows(experiment) -> list[dict]:
    """The rows to train on: without those that also occur in another split (data.drop_leaked), then the first data.train_rows."""
    rows = load_split(experiment, "train")
    if experiment.data.drop_leaked:
        held_out = {
            key(row)
            for split in experiments.splits(experiment.data.dataset)[1:]
            for row in load_split(experiment, split)
        }
        rows = [row for row in rows if key(row) not in held_out]
    return rows[: experiment.data.train_rows]


def validation_rows(experiment) -> list[dict]:
    """The rows of the validation loss: the first data.validation_rows."""
    return load_split(experiment, "validation")[: experiment.data.validation_rows]


def eval_rows(experiment) -> list[dict]:
    """The rows that 03 scores: the first data.eval_rows of data.eval_split."""
    return load_split(experiment, experiment.data.eval_split)[: experiment.data.eval_rows]


def seen_ids(records, train) -> set[str]:
    """Ids of the records whose dialogue was trained on; scores are reported with and without them."""
    trained = {key(row) for row in train}
    return {row["id"] for row in records if key(row) in trained}


def leaked_ids(experiment, split: str) -> set[str]:
    """Ids of `split` whose dialogue also occurs in the training file, whichever of its rows a run trains on."""
    return set(
        read_json(experiment.processed_dir / "leaks.json", "01_prepare_data")["across"].get(f"{split} in train", [])
    )
