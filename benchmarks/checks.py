"""Writes what the tests count into results/reliability.json: `python benchmarks/checks.py [values files ...]`.

Every number is pytest's own: cases of the tests named here, and how many of them passed. `audit` is measured.
"""

import json
import random
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "reliability.json"
SECTIONS = {  # section: (file in tests, beginnings of the tests that count, what a case is)
    "values": (
        "test_values",
        ("test_a_bad_value", "test_overrides_on", "test_what_only"),
        "bad values refused by name, before torch is loaded or before any weight is",
    ),
    "files": (
        "test_files",
        ("test_a_good_file", "test_a_bad_file", "test_what_is_no_file"),
        "files of one's own that are read whole, or refused in one line without their text",
    ),
    "prompts": ("test_hostile", ("test_hostile_text",), "prompts with hostile text that stayed text"),
    "damage": (
        "test_damage",
        ("test_a_damaged", "test_damaged", "test_a_whole_folder", "test_scores_that"),
        "damaged files that were named, not used and set aside whole (tables, figures and cards of 04: named)",
    ),
    "locks": (
        "test_locks",
        ("test_",),
        "processes at a run, an evaluation or rows that another has, with and without flock, and after its kill",
    ),
    "disks": (
        "test_disk",
        ("test_a_disk", "test_a_folder", "test_make_run", "test_a_download", "test_an_install", "test_what_a_killed"),
        "writers on a full, read-only or forbidden disk, or killed, that explained it, lost nothing and ended alike",
    ),
}
GREETING = "Doctor: Good morning, my name is Doctor Smith and I will be seeing you today.\nPatient: Good morning. "


def counted(name: str) -> dict:
    """The cases of a section's tests, by pytest's own report."""
    file, tests, what = SECTIONS[name]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = ["-m", "pytest", f"tests/{file}.py"]
        subprocess.run([sys.executable, *command, f"--junitxml={report}"], cwd=ROOT, stdout=subprocess.DEVNULL)
        cases = [case for case in ElementTree.parse(report).iter("testcase") if case.get("name").startswith(tests)]
    passed = [case for case in cases if not len(case)]  # a failure, an error and a skip are children
    return {"what": what, "tried": len(cases), "handled": len(passed), "command": f"python {' '.join(command)}"}


def audited() -> dict:
    """CPU seconds and peak memory of the leak audit over rows that all begin with one greeting, in a fresh process."""
    code = (
        "import resource, sys, time\nfrom benchmarks import checks\nfrom src.data import leaks\n"
        "rows = checks.dialogues(int(sys.argv[1]))\nbegin = time.process_time()\nleaks.audit(rows)\n"
        "print(time.process_time() - begin, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    found = {}
    for n in (1000, 10_000, 100_000):
        done = subprocess.run(
            [sys.executable, "-c", code, str(n)], cwd=ROOT, capture_output=True, text=True, check=True
        )
        seconds, kib = done.stdout.split()[-2:]
        found[f"{n:,} rows"] = {"cpu seconds": round(float(seconds), 2), "peak MiB": round(int(kib) / 1024)}
    what = "rows of about 110 words, 8 of 10 to train on, all with one greeting; one core"
    return {"what": what, **found, "command": "python benchmarks/checks.py audit"}


def dialogues(n: int) -> dict[str, list[dict]]:
    """{split: rows} of random words behind one greeting."""
    draw = random.Random(0)
    words = [f"w{i}" for i in range(20_000)]
    rows = [{"id": str(i), "dialogue": GREETING + " ".join(draw.choices(words, k=100))} for i in range(n)]
    return {"train": rows[: n * 8 // 10], "validation": rows[n * 8 // 10 : n * 9 // 10], "test": rows[n * 9 // 10 :]}


def main(wanted: list[str]):
    for name in wanted or [*SECTIONS, "audit"]:
        begin = time.monotonic()
        section = audited() if name == "audit" else counted(name)
        results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
        text = json.dumps(results | {name: section}, indent=2, ensure_ascii=False)
        RESULTS.write_text(text + "\n", encoding="utf-8")
        print(name, section, f"{time.monotonic() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
