"""Every hash and score again, from the files: `python -m src.verify [RUN | all]`. Reads only, needs no model."""

import re
import sys
from collections.abc import Iterator

from src import intervals, runs, scoring
from src.runs import files, identity
from src.runs.evaluation import SYSTEMS, Evaluation

VALUES = ("run", "split", "rows", "prompts", "generation", "seed")  # what an evaluation is named after


def run_differences(run: runs.Run) -> Iterator[str]:
    """What of a finished run is not as it was written: its seals, files and name."""
    try:
        config, manifest = run.config, run.manifest
    except (files.Damage, FileNotFoundError) as error:
        yield str(error)
        return
    yield from files.differences(run.folder, manifest["sha256"])
    named = identity.name(config["recipe"]["name"], config["identity"])
    if {named, config["run"], manifest["run"]} != {run.name}:
        yield (
            f"outputs/{run.name}: manifest.json is of run {manifest['run']}, config.json of {config['run']}, and its "
            f"values make {named}."
        )


def evaluation_differences(evaluation: Evaluation) -> Iterator[str]:
    """What of a scored evaluation is not as it was written, and which scores its predictions do not have."""
    try:
        config, metrics, adapter = evaluation.config, evaluation.metrics, evaluation.run.manifest["sha256"]
    except (files.Damage, FileNotFoundError) as error:
        yield str(error)
        return
    where, broken = files.relative(evaluation.folder), list(files.differences(evaluation.folder, metrics["sha256"]))
    yield from broken
    named = identity.name(config["split"], {key: config[key] for key in VALUES if key in config})
    if {named, config["evaluation"], metrics["evaluation"]} != {evaluation.name}:
        yield (
            f"{where}: metrics.json is of {metrics['evaluation']}, evaluation.json of {config['evaluation']}, and its "
            f"values make {named}."
        )
    if not config["inputs"]["adapter"] == metrics["inputs"]["adapter"] == adapter["adapter/adapter_model.safetensors"]:
        yield f"{where} was answered by another adapter than the run's."
    for system in SYSTEMS if not any("predictions/" in text for text in broken) else ():
        rows = evaluation.predictions[system]
        scored = scoring.score_rows([row["prediction"] for row in rows], [row["reference"] for row in rows])
        for column, value in intervals.corpus(scored).items():
            written = metrics["systems"][system]["all"][column]["value"]
            if abs(written - value) > 1e-9:
                yield (
                    f"{where}/metrics.json says {column} {written} of {system}: its predictions have {value} (scored "
                    f"then by {metrics['settings']['versions']})."
                )


def comparison_differences(run: runs.Run, scored: list[Evaluation]) -> Iterator[str]:
    """What of 04's files is not as it was written; a run's card is the one that 04 wrote for one of its evaluations."""
    cards = []
    for evaluation in (evaluation for evaluation in scored if evaluation.comparison.is_dir()):
        try:
            files.check(evaluation.folder, "comparison.json", evaluation.compared, "evaluation")
            cards.append(list(files.differences(run.adapter, evaluation.compared["card"])))
        except (files.Damage, FileNotFoundError) as error:
            yield str(error)
    if cards and all(cards):
        yield cards[-1][0]


def data_differences(dataset: str) -> Iterator[str]:
    """Which of the prepared files of a dataset are not as 01 wrote them; none where 01 has not run."""
    folder = runs.ROOT / "data" / "processed" / dataset
    try:
        sums = files.read_sealed(folder / "report.json", "01_prepare_data")["processed"]
    except files.Damage as error:
        yield str(error)
    except FileNotFoundError:
        return
    else:
        names = {name: f"{name}.json" if name == "leaks" else f"{name}.jsonl" for name in sums}
        yield from files.differences(folder, {names[name]: sha for name, sha in sums.items()})


def verify(run: runs.Run) -> tuple[list[str], str]:
    """(what differs in a run, its evaluations and its prepared rows; one line about what was looked at)."""
    found, scored = list(run_differences(run)), sorted((run.folder / "evaluations").glob("*/metrics.json"))
    scored = [Evaluation(run, path.parent.name) for path in scored if re.search("-[0-9a-f]{8}$", path.parent.name)]
    if not (run.folder / "manifest.json").is_file():
        return found, "not finished"
    for evaluation in scored:
        found += evaluation_differences(evaluation)
    found += comparison_differences(run, scored)
    try:
        found += data_differences(run.config["recipe"]["data"]["dataset"])
    except (files.Damage, FileNotFoundError):
        pass  # said already
    return found, f"{len(scored)} evaluation(s)"


def main(arguments: list[str]) -> int:
    """Print a line for each run and for each difference; 1 if there is a difference, or no such run."""
    wanted = arguments[0] if arguments and arguments[0] else "all"
    known = [path for path in sorted((runs.ROOT / "outputs").glob("*")) if re.search("-[0-9a-f]{8}$", path.name)]
    known = [path for path in known if wanted in ("all", path.name)]
    if not known:
        print(f"No run {wanted!r} under outputs/: expected the name of a folder there, or all.")
    wrong = not known
    for path in known:
        unfinished = wanted == "all" and not (path / "manifest.json").exists() and not (path / "adapter").exists()
        found, seen = ([], "not finished") if unfinished else verify(runs.Run(path.name))
        print(f"outputs/{path.name}: {seen}, {f'{len(found)} difference(s)' if found else 'as it was written'}")
        print("".join(f"  {text}\n" for text in found), end="")
        wrong = wrong or bool(found)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
