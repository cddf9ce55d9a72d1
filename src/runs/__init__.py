"""Folders of runs and evaluations, what their names are made of, and files that are written whole or not at all.

A *run* is what was trained, an *evaluation* is a run scored on one split with one way of decoding. Both names end in a
hash of what ran (identity.py), so other values are another folder.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # tests point it at a temporary folder


class RunError(RuntimeError):
    """A run or evaluation that cannot be opened, found or continued. The message says why and what to do."""


from src.runs.card import card_data  # noqa: E402
from src.runs.evaluation import Evaluation, evaluations, find_evaluation, open_evaluation  # noqa: E402
from src.runs.files import (  # noqa: E402
    Damage,
    aside,
    public,
    read_json,
    read_jsonl,
    read_sealed,
    relative,
    scratch,
    set_aside,
    sha256_file,
    write_atomic,
    write_json,
    write_jsonl,
    write_sealed,
    writing,
)  # fmt: skip
from src.runs.locks import held  # noqa: E402
from src.runs.run import Run, find, finished, open  # noqa: E402

__all__ = [
    "ROOT", "Damage", "Evaluation", "Run", "RunError", "aside", "card_data", "evaluations", "find", "find_evaluation",
    "finished", "held", "open", "open_evaluation", "public", "read_json", "read_jsonl", "read_sealed", "relative",
    "scratch", "set_aside", "sha256_file", "write_atomic", "write_json", "write_jsonl", "write_sealed", "writing",
]  # fmt: skip
