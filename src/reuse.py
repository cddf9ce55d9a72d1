"""What 01 to 03 of a chain read, kept beside their executed copies: where nothing of it changed, they need not run."""

from src import data, runs
from src.runs import files, identity, measured

RECORD = "inputs.json"
NOTEBOOKS = ("01_prepare_data", "02_train_qlora", "03_evaluate")


def inputs(recipe) -> dict:
    """What 01 to 03 read for a recipe beside its base model, by kind, as values and sha256.

    Raises data.DataError or FileNotFoundError where 01 has not prepared these rows.
    """
    report, names = data.report(recipe), [f"notebooks/{name}.ipynb" for name in NOTEBOOKS]
    origins = data.source_files(recipe).values()
    return {
        "settings": identity.plain(recipe.model_dump()),
        "rows": report["processed"] | {runs.public(path): files.sha256_file(path) for path in origins},
        "code": identity.code("*.py", "*/*.py", "recipes/*.toml"),
        "notebooks": {name: files.sha256_file(runs.ROOT / name) for name in names},
        "versions": measured.versions(measured.PACKAGES),
    }


def find(recipe) -> runs.Evaluation | None:
    """The evaluation that a chain with these settings made, with every file whole and all that it read as it was.

    None where there is none; what changed, or which file is not whole, is printed.
    """
    changed, settings = [], identity.plain(recipe.model_dump())
    found = (runs.ROOT / "outputs").glob(f"{recipe.name}-*/notebooks/{RECORD}")
    for path in sorted(found, key=lambda path: path.stat().st_mtime):
        try:
            made = files.read_sealed(path, "01_prepare_data")
            if made["settings"] != settings or not all((path.parent / f"{n}.ipynb").is_file() for n in NOTEBOOKS):
                continue
            evaluation = runs.find_evaluation(runs.Run(path.parents[1].name).check(), made["evaluation"])
            now = inputs(recipe) | {"base model": identity.base(recipe.base_model, recipe.revision)}
            made["base model"] = evaluation.run.config["identity"]["base"]
            changed = [kind for kind, value in now.items() if made[kind] != value]
            if not changed:
                files.mark_opened(evaluation.run.folder)
                files.mark_opened(evaluation.folder)
                return evaluation
        except runs.RunError as error:
            print(f"{error} It is made anew now.")
        except (data.DataError, FileNotFoundError, TypeError):  # the last: a base that the hub's cache has no more
            changed = ["rows or base model"]
    if changed:
        print(f"== nothing is reused: {' and '.join(changed)} changed since this was run", flush=True)
    return None
