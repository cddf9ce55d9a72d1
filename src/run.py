"""Runs notebooks 01 to 04 headless through papermill: `python -m src.run RECIPE [OVERRIDES as JSON]`."""

import json
import os
import shutil
import sys

from src import recipes, runs


def run(name: str, overrides: dict | None = None) -> tuple[runs.Run, runs.Evaluation]:
    """Run the chain for a recipe with overrides; the executed copies end up in outputs/<run>/notebooks."""
    recipes.load(name, overrides)  # a mistake is found here, before anything starts
    executed = runs.ROOT / "outputs" / ".notebooks"
    shutil.rmtree(executed, ignore_errors=True)
    executed.mkdir(parents=True)
    parameters = {"RECIPE": name, "OVERRIDES": overrides or {}}
    _execute("01_prepare_data", executed, parameters)
    _execute("02_train_qlora", executed, parameters)
    trained = runs.find(name)
    print(f"== run {trained.name}", flush=True)
    _execute("03_evaluate", executed, parameters | {"RUN": trained.name})
    evaluation = runs.find_evaluation(trained)
    _execute("04_compare", executed, parameters | {"RUN": trained.name, "EVALUATION": evaluation.name})
    shutil.rmtree(trained.folder / "notebooks", ignore_errors=True)
    executed.rename(trained.folder / "notebooks")
    return trained, evaluation


def _execute(notebook: str, folder, parameters: dict):
    import papermill

    print(f"== {notebook}", flush=True)
    papermill.execute_notebook(
        runs.ROOT / "notebooks" / f"{notebook}.ipynb",
        folder / f"{notebook}.ipynb",
        parameters=parameters,
        cwd=runs.ROOT / "notebooks",
        kernel_name="python3",
        log_output=False,
        extra_arguments=["--log-level=ERROR"],  # else it warns of sockets without encryption
    )


def main(arguments: list[str]) -> int:
    if not 1 <= len(arguments) <= 2:
        print("usage: python -m src.run RECIPE ['{\"lora.r\": 8}']")
        return 2
    from papermill.exceptions import PapermillExecutionError

    try:
        overrides = json.loads(arguments[1]) if len(arguments) == 2 else {}
        trained, evaluation = run(arguments[0], overrides)
    except json.JSONDecodeError as error:
        print(
            f"OVERRIDES is not JSON ({error}): found {arguments[1]!r}, expected something like '{{\"lora.r\": 8}}'.",
            file=sys.stderr,
        )
        return 1
    except (recipes.RecipeError, runs.RunError) as error:
        print(error, file=sys.stderr)
        return 1
    except PapermillExecutionError as error:
        print(f"{error.ename} in cell {error.exec_count}: {error.evalue}", file=sys.stderr)
        return 1
    from src.analysis import tables

    tables.print_summary(trained, evaluation)
    return 0


if __name__ == "__main__":
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")  # a debugger's warning in every notebook otherwise
    sys.exit(main(sys.argv[1:]))
