"""Writes the tables of README.md and benchmarks/README.md, between their markers, from committed results.

python benchmarks/tables.py
"""

import csv
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def results(name: str) -> list[dict] | dict:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def markdown(header: list[str], rows: list[list]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def demo() -> str:
    """The demo's ROUGE-L, from outputs/demo/scores.csv."""
    with (ROOT / "outputs" / "demo" / "scores.csv").open(encoding="utf-8", newline="") as file:
        systems = {row["system"]: row for row in csv.DictReader(file)}
    chosen = ("base", "fine-tuned", "whole dialogue", "nearest training summary")
    return "ROUGE-L: " + ", ".join(f"{name} {systems[name]['ROUGE-L']}" for name in chosen) + "."


def cpu() -> str:
    """Training on two CPU cores, from results/cpu.json."""
    rows = [
        [r["setup"], f"{r['tok_s']:,}", f"{r['padding']:.0%}", r["passes"], r["loss"], r["matmul_gflops"]]
        for r in results("cpu")
    ]
    header = ["setup", "tokens/s", "padding", "passes a step", "loss at the end", "the cores' GFLOP/s"]
    return markdown(header, rows)


def gpu(name: str = "h200") -> str:
    """Training, ours and the peers', then generation and the whole job."""
    header = "setup, rows a step, tokens/s, samples/s, of the matmul rate, peak GiB, predicted GiB, plan, call".split(
        ", "
    )
    rows, found = [], results(name)
    for r in found:
        if "tok_s" in r and r["setup"] != "job":
            rows.append(_ours(r) if r["ours"] else _peer(r))
    lines = [markdown(header, rows)]
    for r in found:
        if "new_tok_s" in r:
            lines.append(
                f"\nGeneration ({r['setup']}), 819 prompts, 64 new tokens each, reading the prompts included: "
                f"{r['new_tok_s']:,} new tokens/s (base {r['base_new_tok_s']:,}, fine-tuned "
                f"{r['finetuned_new_tok_s']:,}), peak {r['peak_gib']:.1f} GiB."
            )
        if r["setup"] == "job":
            lines.append(_job(r))
    return "\n".join(lines)


def _peer(r: dict) -> list:
    rates = [f"{r['tok_s']:,}", f"{r['samples_s']:.1f}", "", f"{r['peak_gib']:.1f}"]
    return [r["setup"], "", *rates, "", "peers.py", r["call"]]


def _ours(r: dict) -> list:
    p = r["plan"]
    weights = "8-bit weights" if p.get("fp8") else "16-bit weights" if p["dequantized"] else "4-bit weights"
    plan = f"{p['passes']} x {p['tokens']:,} tokens, {weights}" + (", checkpointing" if p["checkpointing"] else "")
    cap = f" (limit {r['capped_gib']:.0f} GiB)" if r["capped_gib"] else ""
    rates = [f"{r['tok_s']:,}", r["samples_s"], f"{r['matmul_share']:.0%} of {r['matmul_tflops']} TFLOP/s"]
    memory = [f"{r['peak_gib']:.1f}", f"{r['predicted_gib']:.1f}"]
    return [f"{r['setup']}{cap}", p["rows_per_step"], *rates, *memory, plan, r["call"]]


def _job(r: dict) -> str:
    seconds = r["generation_seconds"]
    return (
        f"\nThe whole job: {r['minutes']:.1f} minutes. Training 7,366 rows for 3 epochs, {r['plan']['rows_per_step']} "
        f"rows a step, {r['training_minutes']:.1f} ({r['predicted_minutes']:.1f} predicted; {r['tok_s']:,} tokens/s); "
        f"819 answers of 256 tokens from the base model {seconds['base'] / 60:.1f}, of 100 from the fine-tuned one "
        f"{seconds['finetuned'] / 60:.1f}; loading {r['load_seconds'] / 60:.1f}."
    )


def signs() -> str:
    """The warning signs on references and against people, from results/signs.json."""
    found = results("signs")
    on, people = [], []
    for r in found["references"]:
        spoiled = f"{r['found']} of {r['spoiled']}" if "spoiled" in r else ""
        on.append([r["sign"], r["dataset"], f"{r['flagged']} of {r['n']}", spoiled])
    for r in found["people"]:
        area = f"{r['AUC']:.2f} [{r['low']:.2f}, {r['high']:.2f}]"
        flagged = [r["flagged"], f"{r['precision']:.2f}", f"{r['recall']:.2f}"] if "flagged" in r else ["", "", ""]
        people.append([r["sign"], r["people"], area, *flagged, f"{r['base rate']:.3f}"])
    header = ["sign", "people found", "AUC", "flagged", "precision", "recall", "base rate"]
    first = markdown(["sign", "references of", "flagged", "spoiled ones found"], on)
    return f"{first}\n\n{markdown(header, people)}"


def before_and_after() -> str:
    """The first build beside this code, one after the other on one H100, from results/h100.json."""
    rows = []
    for r in results("h100"):
        rate = f"{r['tok_s']:,}" if "tok_s" in r else f"{r['new_tok_s']:,} new"
        code = {"89fec59": "the first build", "rooms": "this one"}.get(r.get("code"), r.get("code", ""))
        rows.append([r["setup"], code, rate, f"{r['peak_gib']:.1f}", r["call"]])
    return markdown(["setup", "code", "tokens/s", "peak GiB", "call"], rows)


def small() -> str:
    """SmolLM2-135M, 16 rows a step, with and without recorded steps, from results/small.json."""
    rows = []
    for r in results("small"):
        steps = f"{r['steps_s']:.1f}" if "steps_s" in r else f"{r['steps'] / r['train_seconds']:.1f}"
        rows.append(
            [r["setup"], "yes" if r["plan"]["graphs"] else "no", steps, f"{r['tok_s']:,}", f"{r['peak_gib']:.1f}"]
        )
    return markdown(["setup", "recorded", "steps/s", "tokens/s", "peak GiB"], rows)


def kernels() -> str:
    """Milliseconds of kernels by kind, from results/kernels.json: a training step, and generation as a whole."""
    found = {r["setup"]: r["ms_a_step"] for r in results("kernels") if "ms_a_step" in r}
    found |= {f"generate, {k}": ms for r in results("kernels") for k, ms in r.get("ms", {}).items()}
    kinds = ["matrix products", "attention", "element-wise, fused", "dropout", "copies", "rest"]
    rows = []
    for setup, ms in found.items():
        idle = ms["wall"] - sum(value for kind, value in ms.items() if kind != "wall")
        share = f"{ms['matrix products'] / ms['wall']:.0%}"
        rows.append([setup, *(f"{x:,.0f}" for x in (ms["wall"], *(ms.get(k, 0) for k in kinds), max(idle, 0))), share])
    return markdown(["ms of", "wall", *kinds, "waiting", "matrix products, share"], rows)


def coverage() -> str:
    """How often intervals hold the truth and p errs, from results/coverage.json: lowest to highest over systems."""
    found = {}
    for r in results("coverage"):
        key = (r["n"], r["seeds"]) if "seeds" in r else (r["n"], None)
        column = r["column"] if r["column"] in ("sacreBLEU", "chrF") else "ROUGE"
        found.setdefault(key, {}).setdefault((r["kind"], column), []).append(r["share"])

    def cell(shares):
        known = [share for share in shares if share is not None]
        low, high = (f"{100 * bound:.0f}" for bound in (min(known, default=0), max(known, default=0)))
        return "none" if not known else f"{low}%" if low == high else f"{low}-{high}%"

    columns = ("ROUGE", "sacreBLEU", "chrF")
    kinds = ("interval of a score", "interval of a difference", "p < .05 of equal systems")
    names = [f"{kind}, {c}" for kind in ("score", "difference", "p < .05") for c in columns]
    by_rows = [
        [n, *(cell(cells.get((kind, c), [])) for kind in kinds for c in columns)]
        for (n, seeds), cells in sorted(found.items(), key=lambda item: item[0][0])
        if seeds is None
    ]
    by_seeds = [
        [seeds, n, *(cell(cells.get(("interval over seeds", c), [])) for c in columns)]
        for (n, seeds), cells in sorted(found.items(), key=lambda item: (item[0][1] or 0, item[0][0]))
        if seeds
    ]
    return "\n\n".join([markdown(["n", *names], by_rows), markdown(["seeds", "n", *columns], by_seeds)])


def real() -> str:
    """SmolLM2 on SAMSum and MTS-Dialog, from results/real.json, and what a reader of its answers found."""
    chosen = [r for r in results("real") if r["setting"] == "as the recipe" and r["seed"] == "mean"]
    splits = [("samsum", "test", True), ("mts_dialog", "test1", True), ("mts_dialog", "test2", False)]
    rows = []
    for dataset, split, was_read in splits:
        found = {r["system"]: r for r in chosen if (r["dataset"], r["split"]) == (dataset, split)}
        if len(found) < 2:
            continue
        name = {"samsum": "SAMSum", "mts_dialog": "MTS-Dialog"}[dataset]
        about = f"{name} {split}, n={found['base']['n']}, {found['base']['scorer'].split(', ')[1]}"
        for system, label in {"base": "base", "finetuned": "fine-tuned"}.items():
            r, faithful = found[system], ratings(dataset)["faithful"][label] if was_read else ""
            cells = [interval(r, column) for column in ("rouge1", "rouge2", "rougeL")]
            rows.append([about, label, *cells, faithful])
            about = ""
    return markdown(["SmolLM2-135M, 4 bits", "", "ROUGE-1", "ROUGE-2", "ROUGE-L", "faithful, as read"], rows)


def card() -> str:
    """The first of the demo's random rows in 04: a dialogue of ours beside the three summaries of it."""
    with (ROOT / "outputs" / "demo" / "examples.csv").open(encoding="utf-8", newline="") as file:
        row = next(row for row in csv.DictReader(file) if row["rows"] == "random")
    cells = {name: text.replace("|", "\\|").replace("\n", "<br>") for name, text in row.items()}
    answers = [f"**{name}**: {cells[name]}" for name in ("base", "fine-tuned", "reference")]
    head = [f"dialogue (invented), for the section {cells['section']}", "summary"]
    return markdown(head, [[cells["dialogue"], "<br><br>".join(answers)]])


def comparisons() -> str:
    """SmolLM2 on SAMSum's test split by training rows, and by the bits of its weights, from results/real.json."""
    found = [r for r in results("real") if (r["dataset"], r["split"], r["seed"]) == ("samsum", "test", "mean")]
    base = {r["setting"]: r for r in found if r["system"] == "base"}
    tuned = {r["setting"]: r for r in found if r["system"] == "finetuned"}

    none, whole, short = base["as the recipe"]["rougeL"], tuned["as the recipe"], "3,000 rows, 1 epoch"
    curve = []
    for r in sorted((r for r in tuned.values() if "best of" in r["setting"] or r is whole), key=lambda r: r["rows"]):
        gain = (r["rougeL"] - none) / (whole["rougeL"] - none)
        curve.append([f"{r['rows']:,}", interval(r, "rougeL"), f"{gain:.0%}"])
    bits = [
        ["16 bits", "16 bits", f"{short}, 16 bits"],
        ["NF4", "as the recipe", short],
        ["FP4", "fp4", f"{short}, fp4"],
    ]
    weights = [[name, interval(base[b], "rougeL"), interval(tuned[t], "rougeL")] for name, b, t in bits]
    by_rows = markdown(["training rows", "ROUGE-L", "of the whole gain over the base"], curve)
    return f"{by_rows}\n\n{markdown(['weights', 'ROUGE-L, base', f'fine-tuned ({short})'], weights)}"


def interval(r: dict, column: str) -> str:
    return f"{r[column]:.1f} [{r[f'{column}_low']:.1f}, {r[f'{column}_high']:.1f}]"


def ratings(dataset: str) -> dict[str, dict]:
    """{column of the rating sheet: {"reader", "base", "fine-tuned", ...}}."""
    with (ROOT / "outputs" / f"{dataset}_small" / "ratings.csv").open(encoding="utf-8", newline="") as file:
        return {row["what was read"]: row for row in csv.DictReader(file)}


def two_gpus() -> str:
    """Several GPUs beside one, from results/two_gpus.json, where that was measured."""
    if not (RESULTS / "two_gpus.json").is_file():
        return "Not measured yet."
    rows, steps = [], []
    for r in results("two_gpus"):
        rate = r.get("tok_s") or r.get("new_tok_s")
        held = r.get("weights_gib", [])
        peak = max(r["peak_gib"]) if isinstance(r.get("peak_gib"), list) else r.get("peak_gib", "")
        what = r["error"] if "error" in r else f"{rate:,}" if rate else f"{r.get('seconds_a_step', '')} s a step"
        if "ms_a_step" in r:
            steps.append(f"{r['setup']}: " + ", ".join(f"{kind} {value:g}" for kind, value in r["ms_a_step"].items()))
        else:
            held = f"{max(held):.1f}" if held else ""
            rows.append([r["setup"], r["gpus"], what, r.get("speedup", ""), held, peak, r.get("gpu", "")])
    header = ["setup", "GPUs", "tokens/s", "times one GPU", "GiB a GPU between steps", "peak GiB a GPU", "GPU"]
    told = ["Milliseconds of a step, by kind (kernels: how many):", "", *(f"- {line}" for line in steps)]
    return "\n".join([markdown(header, rows), *(["", *told] if steps else [])])


TOKENS, ADAPTER = 202, 335.5e6  # a SAMSum row; bytes of the gradients of rank 32 on all linear layers, in float32
LINKS = {"NVLink": 329e9, "100 Gbit/s": 12.5e9}  # bytes a second; NVLink as measured with NCCL on two H100s


def step_seconds(rows: int, gpus: int, link: str) -> float:
    """Seconds of an optimizer step, calculated: one GPU's share as measured on one H200, then the sum of gradients.

    A pass takes as long as launching its kernels (a step of 3 rows is nothing else), or as long as its tokens.
    """
    found = {r["setup"]: r["tok_s"] for r in results("h200") if "tok_s" in r}
    floor, share = 3 * TOKENS / found["ours_batch_3"], TOKENS * rows / gpus
    rate = found["ours_64gib"] if rows / gpus >= 32 else found["ours_batch_16"]
    return max(floor, share / rate) + 2 * (gpus - 1) / gpus * ADAPTER / LINKS[link] * (gpus > 1)


def spread() -> str:
    """What several GPUs bring and cost, by calculation: 7,366 SAMSum rows for 3 epochs."""
    lines = []
    for rows in (16, 54, 432):
        for gpus, link in ((1, "NVLink"), (2, "NVLink"), (8, "NVLink"), (8, "100 Gbit/s")):
            seconds = step_seconds(rows, gpus, link)
            minutes = 3 * 7366 / rows * seconds / 60
            where = f"{gpus} machines" if link != "NVLink" else f"{gpus} GPU{'s' * (gpus > 1)}"
            times = step_seconds(rows, 1, link) / seconds
            lines.append(
                [f"one run, {rows} rows a step", where, f"{times:.1f}", f"{minutes:.1f}", f"{minutes * gpus:.1f}"]
            )
    minutes = 3 * 7366 / 16 * step_seconds(16, 1, "NVLink") / 60
    for gpus in (1, 2, 8, 64):
        where = f"{gpus} GPUs, a run each" if gpus > 1 else "1 GPU"
        lines.append(
            ["64 runs, 16 rows a step", where, f"{gpus:.1f}", f"{64 * minutes / gpus:.0f}", f"{64 * minutes:.0f}"]
        )
    return markdown(["what (calculated)", "on", "times as fast", "minutes of training", "GPU minutes"], lines)


def reliability() -> str:
    """What was tried and how much of it was handled, from results/reliability.json."""
    found = results("reliability")
    parts = [
        found[name] for name in ("values", "files", "prompts", "damage", "locks", "disks", "kills") if name in found
    ]
    rows = [[part["what"], f"{part['tried']:,}", f"{part['handled']:,}", f"`{part['command']}`"] for part in parts]
    return markdown(["what", "tried", "handled", "command"], rows)


BLOCKS = {  # file: {marker: what stands between <!-- marker --> and <!-- end -->}
    "README.md": {"card": card, "real": real, "demo": demo},
    "benchmarks/README.md": {
        "h200": gpu,
        "h100": before_and_after,
        "small": small,
        "kernels": kernels,
        "cpu": cpu,
        "signs": signs,
        "coverage": coverage,
        "comparisons": comparisons,
        "two_gpus": two_gpus,
        "spread": spread,
        "reliability": reliability,
    },  # fmt: skip
}


def filled(file: str) -> str:
    """The text of a file with every block made again."""
    text = (ROOT / file).read_text(encoding="utf-8")
    for marker, make in BLOCKS[file].items():
        block = re.compile(rf"(<!-- {marker} -->\n).*?(<!-- end -->)", re.S)
        if not block.search(text):
            raise ValueError(f"{file} has no block <!-- {marker} --> ... <!-- end -->.")
        table = make()
        text = block.sub(lambda found, table=table: f"{found[1]}{table}\n{found[2]}", text)
    return text


if __name__ == "__main__":
    for name in BLOCKS:
        (ROOT / name).write_text(filled(name), encoding="utf-8")
