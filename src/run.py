"""Runs notebooks 01 to 04 headless through papermill: `python -m src.run EXPERIMENT [OVERRIDES as JSON]`."""

import json
import os
import sys

from src import experiments

CHAIN = ("01_prepare_data", "02_train_qlora", "03_evaluate", "04_compare")


def run(name: str, overrides: dict | None = None, notebooks=CHAIN):
    """Run the notebooks with these parameters; the executed copies go to outputs/<run>/notebooks. Returns the experiment."""
    import papermill

    experiment = experiments.load_experiment(name, **(overrides or {}))
    folder = experiment.run_dir / "notebooks"
    folder.mkdir(parents=True, exist_ok=True)
    for notebook in notebooks:
        print(f"== {notebook} ({experiment.run_id})", flush=True)
        papermill.execute_notebook(
            experiments.ROOT / "notebooks" / f"{notebook}.ipynb",
            folder / f"{notebook}.ipynb",
            parameters={"EXPERIMENT": name, "OVERRIDES": overrides or {}},
            cwd=experiments.ROOT / "notebooks",
            kernel_name="python3",
            log_output=False,
            extra_arguments=["--log-level=ERROR"],  # else it warns of sockets without encryption
        )
    return experiment


def main(arguments: list[str]) -> int:
    if not 1 <= len(arguments) <= 2:
        print("usage: python -m src.run EXPERIMENT ['{\"lora.rank\": 8}']")
        return 2
    from papermill.exceptions import PapermillExecutionError

    try:
        overrides = json.loads(arguments[1]) if len(arguments) == 2 else {}
        if not isinstance(overrides, dict):
            raise experiments.ExperimentError(
                f"OVERRIDES is {arguments[1]}: expected a JSON object such as '{{\"lora.rank\": 8}}'."
            )
        experiment = run(arguments[0], overrides)
    except json.JSONDecodeError as error:
        print(
            f"OVERRIDES is not JSON ({error}): found {arguments[1]!r}, expected something like '{{\"lora.rank\": 8}}'.",
            file=sys.stderr,
        )
        return 1
    except experiments.ExperimentError as error:
        print(error, file=sys.stderr)
        return 1
    except PapermillExecutionError as error:
        print(f"{error.ename} in cell {error.exec_count}: {error.evalue}", file=sys.stderr)
        return 1
    from src import reporting

    reporting.print_summary(experiment)
    return 0


if __name__ == "__main__":
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")  # a debugger's warning in every notebook otherwise
    sys.exit(main(sys.argv[1:]))
