"""Runs notebooks 01 to 04 headless through papermill: `python -m src.run RECIPE [OVERRIDES as JSON [GPUS]]`."""

import json
import os
import re
import shutil
import sys

from src import recipes, runs


def run(name: str, overrides: dict | None = None, gpus: int = 1, prepared=False) -> tuple[runs.Run, runs.Evaluation]:
    """Run the chain for a recipe with overrides; the executed copies end up in outputs/<run>/notebooks.

    prepared: leave out 01, because its rows are there and other processes read them. Where nothing changed that 01 to
    03 read, what they made is used and 04 alone is run: it looks at other runs and at rating sheets too.
    """
    recipe = recipes.load(name, overrides)  # a mistake is found here, before anything starts
    from src import reuse, terminal

    executed = runs.ROOT / "outputs" / f".notebooks{f'-{os.getpid()}' if prepared else ''}"
    shutil.rmtree(executed, ignore_errors=True)
    executed.mkdir(parents=True)
    parameters = {"RECIPE": name, "OVERRIDES": overrides or {}}
    os.environ["CHAIN"], training = str(os.getpid()), terminal.Training()
    try:
        evaluation = reuse.find(recipe)
        if evaluation:
            notebooks = evaluation.run.folder / "notebooks"
            shutil.copytree(notebooks, executed, dirs_exist_ok=True)
            print("== 01, 02, 03 are not run again: nothing that they read has changed.")
            print(f"== reused: run {evaluation.run.name} and its evaluation {evaluation.name}")
            print(f"   (delete {runs.relative(notebooks)} to run them, the folder above it to train again)", flush=True)
        else:
            if not prepared:
                _execute("01_prepare_data", executed, parameters)
            read = reuse.inputs(recipe)
            with training:
                _execute("02_train_qlora", executed, parameters | {"NUM_GPUS": gpus})
            trained = _opened(executed / "02_train_qlora.ipynb")
            print(f"== run {trained.name}", flush=True)
            _execute("03_evaluate", executed, parameters | {"NUM_GPUS": gpus, "RUN": trained.name})
            evaluation = runs.find_evaluation(trained)
            runs.write_sealed(executed / reuse.RECORD, read | {"evaluation": evaluation.name})
        trained = evaluation.run
        _execute("04_compare", executed, parameters | {"RUN": trained.name, "EVALUATION": evaluation.name})
    except KeyboardInterrupt:
        raise KeyboardInterrupt(terminal.next_step(training.run())) from None
    shutil.rmtree(trained.folder / "notebooks", ignore_errors=True)
    executed.rename(trained.folder / "notebooks")
    return trained, evaluation


def _opened(notebook) -> runs.Run:
    """The run that an executed 02 names last: the newest one may be another process's."""
    cells = runs.read_json(notebook, "02_train_qlora")["cells"]
    said = "".join(text for cell in cells for out in cell.get("outputs", []) for text in out.get("text", []))
    return runs.Run(re.findall(r"^run (\S+-[0-9a-f]{8})$", said, re.M)[-1])


def _execute(notebook: str, folder, parameters: dict):
    import papermill

    from src import terminal

    print(f"== {notebook}", flush=True)
    papermill.execute_notebook(
        os.path.relpath(runs.ROOT / "notebooks" / f"{notebook}.ipynb"),  # the copy names both: no folder of a machine
        os.path.relpath(folder / f"{notebook}.ipynb"),
        parameters=parameters,
        cwd=runs.ROOT / "notebooks",
        kernel_name="python3",
        engine_name="speaking",
        progress_bar=False,
        stderr_file=terminal.Warnings(),
        extra_arguments=["--log-level=CRITICAL"],  # else it warns of sockets, and traces its own end after Ctrl-C
    )


def main(arguments: list[str]) -> int:
    gpus = arguments[2] if len(arguments) > 2 else "1"
    if not 1 <= len(arguments) <= 4 or arguments[3:] not in ([], ["prepared"]) or not gpus.isdecimal() or int(gpus) < 1:
        print("usage: python -m src.run RECIPE ['{\"lora.r\": 8}' [GPUS, a number]]")
        return 2
    try:
        overrides = json.loads(arguments[1], object_pairs_hook=_once) if len(arguments) > 1 else {}
        recipes.load(arguments[0], overrides)  # a mistake is told before papermill is imported, which takes seconds
    except recipes.RecipeError as error:
        print(error, file=sys.stderr)
        return 1
    except (ValueError, RecursionError) as error:
        found = recipes.shown(arguments[1])
        print(
            f"OVERRIDES is not JSON ({error}): found {found}, expected something like '{{\"lora.r\": 8}}'.",
            file=sys.stderr,
        )
        return 1
    try:
        trained, evaluation = _told(arguments[0], overrides, int(gpus), len(arguments) == 4)
    except KeyboardInterrupt as stop:
        print(f"\nStopped. The same command goes on {stop or 'from the start'}.", file=sys.stderr)
        return 130
    if trained is None:
        return 1
    from src.analysis import tables

    tables.print_summary(trained, evaluation)
    return 0


def _once(pairs: list[tuple]) -> dict:
    """A JSON object whose keys are all different, or else json would take the last of two values."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a field more than once")
    return found


def _told(name: str, overrides: dict, gpus: int, prepared: bool) -> tuple[runs.Run | None, runs.Evaluation | None]:
    """`run`, with the errors that a person can mend in one line on stderr, and (None, None) returned."""
    from papermill.exceptions import PapermillExecutionError

    try:
        with runs.writing(runs.ROOT / "outputs"):  # the executed notebooks
            return run(name, overrides, gpus, prepared)
    except runs.RunError as error:
        print(error, file=sys.stderr)
    except PapermillExecutionError as error:
        print(f"{error.ename} in cell {error.exec_count}: {error.evalue}", file=sys.stderr)
    return None, None


if __name__ == "__main__":
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")  # a debugger's warning in every notebook otherwise
    sys.exit(main(sys.argv[1:]))
