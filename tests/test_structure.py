"""The shape of the project: who imports whom, what loads torch, and how long files, lines and cells may be."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MAY_IMPORT = {  # room or file of src: what of src it may import beside itself
    "refusals": set(),
    "recipes": {"refusals"},
    "runs": {"recipes"},
    "data": {"recipes", "runs"},
    "prompts": {"recipes", "runs"},
    "intervals": {"metrics"},
    "scoring": {"recipes", "runs", "intervals"},
    "qlora": {"recipes", "runs", "data", "prompts", "scoring", "engine"},
    "reuse": {"runs", "data"},
    "run": {"recipes", "runs", "reuse", "terminal", "analysis"},  # analysis for its last words, see below
    "terminal": {"runs"},
    "lab": {"runs"},
    "colab": set(),
    "verify": {"runs", "scoring", "intervals"},
    "try_it": {"recipes", "runs", "data", "prompts", "qlora", "engine", "analysis"},  # marks in a terminal
    "gpus": {"recipes", "runs", "data", "prompts", "scoring", "qlora", "engine", "terminal"},
    "sweep": {"recipes", "runs", "data"},
    "takehome": {"runs"},
    "metrics": set(),
    "engine": set(),
    "analysis": {"recipes", "runs", "data", "scoring"},
    "published": {"recipes", "runs", "data", "prompts", "scoring", "qlora", "engine"},
    "__init__": set(),
}
WITHOUT_TORCH = (
    "sweep",
    "refusals",
    "recipes",
    "runs",
    "data",
    "scoring",
    "analysis",
    "run",
    "terminal",
    "reuse",
    "lab",
    "colab",
    "verify",
)
HEAVY = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")


def room(path: Path) -> str:
    """The file or folder directly in src that a file belongs to: recipes, engine, ..."""
    return path.relative_to(ROOT / "src").with_suffix("").parts[0]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported(source: str) -> list[tuple[str, bool]]:
    """(dotted module of src, whether the import stands inside of a function) of every import in a file."""
    tree = ast.parse(source)
    lazy = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            assert not isinstance(node, ast.ImportFrom), "relative import: write `from src...`"
            continue
        found += [(module, id(node) in lazy) for module in modules if module.split(".")[0] == "src"]
    return found


def test_the_checker_sees_every_way_to_import():
    source = (
        "import src.engine.lora\nfrom src import data, prompts\nfrom src.runs import files\nimport torch, srcs\n"
        "def f():\n    from src.analysis import tables\n    import src.qlora as q\n"
    )
    assert sorted(imported(source)) == [
        ("src.analysis.tables", True), ("src.data", False), ("src.engine.lora", False), ("src.prompts", False),
        ("src.qlora", True), ("src.runs.files", False),
    ]  # fmt: skip


def test_imports_go_one_way():
    assert len(SOURCES) >= 30
    wrong = []
    for path in SOURCES:
        own = room(path)
        if own not in MAY_IMPORT:
            wrong.append(f"{name(path)}: has no place in the design")
            continue
        allowed = MAY_IMPORT[own] | {own}
        for module, lazy in imported(path.read_text(encoding="utf-8")):
            part = module.split(".")[1]
            if part not in allowed or (own == "run" and part == "analysis" and not (lazy and "tables" in module)):
                wrong.append(f"{name(path)}: imports {module}")
    assert not wrong, "\n".join(["imports against the design:", *wrong])


def test_nothing_but_notebooks_tests_and_some_benchmarks_imports_analysis():
    # run.py for its last words; try_it.py for marks; signs.py measures it; coverage.py and pictures.py draw with it
    allowed = {"src/run.py", "src/try_it.py"} | {f"benchmarks/{name}.py" for name in ("signs", "coverage", "pictures")}
    importing = {
        name(path)
        for path in [*SOURCES, *sorted((ROOT / "benchmarks").glob("*.py")), *sorted((ROOT / "data").rglob("*.py"))]
        if any(module.startswith("src.analysis") for module, _ in imported(path.read_text(encoding="utf-8")))
    }
    strangers = {path for path in importing if not path.startswith("src/analysis/")} - allowed
    assert not strangers, f"imports src.analysis: {', '.join(sorted(strangers))}"


def run_python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)


def modules(rooms) -> list[str]:
    dotted = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in SOURCES if room(path) in rooms]
    return [module.removesuffix(".__init__") for module in dotted]


def test_what_04_needs_loads_no_torch():
    wanted = modules(WITHOUT_TORCH)
    assert len(wanted) >= 15
    code = f"import {', '.join(wanted)}, sys\nprint(sorted(set({HEAVY}) & set(sys.modules)))"
    found = run_python(code)
    assert (found.stdout, found.stderr) == ("[]\n", "")


def test_04_itself_loads_no_torch():
    cells = json.loads((ROOT / "notebooks" / "04_compare.ipynb").read_text(encoding="utf-8"))["cells"]
    lines = [line for cell in cells if cell["cell_type"] == "code" for line in "".join(cell["source"]).splitlines()]
    imports = [line for line in lines if line.startswith(("import ", "from "))]
    assert any(line.startswith("from src") for line in imports)
    code = "\n".join([*imports, "import sys", f"print(sorted(set({HEAVY}) & set(sys.modules)))"])
    found = run_python(code)
    assert (found.stdout, found.stderr) == ("[]\n", "")


def test_importing_src_prints_nothing_and_touches_no_gpu():
    wanted = [module for module in modules(MAY_IMPORT) if not module.endswith("_cuda")]  # those need Triton
    code = f"import {', '.join(wanted)}, torch\nassert not torch.cuda.is_initialized()"
    found = run_python(code)
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")


def length(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def listed(paths) -> str:
    """`lines file` of each, the longest first."""
    return "\n".join(f"{length(path):6} {name(path)}" for path in sorted(paths, key=length, reverse=True))


BUDGETS = {
    "src": 2384,
    "src/engine": 1915,
    "src/analysis": 1366,
}  # fmt: skip


@pytest.mark.parametrize(("folder", "budget"), BUDGETS.items())
def test_rooms_stay_within_their_budget(folder, budget):
    paths = sorted((ROOT / folder).glob("*.py"))
    lines = sum(map(length, paths))
    for other in ("data", "runs", "metrics", "published"):  # rooms without a budget: shown with `pytest -s`
        print(f"src/{other}: {sum(map(length, (ROOT / 'src' / other).glob('*.py')))} lines")
    assert lines <= budget, f"{folder} has {lines} lines, {budget} are meant to do:\n{listed(paths)}"


def test_no_module_is_long():
    long = [path for path in SOURCES if length(path) > 260]
    assert not long, f"modules of more than 260 lines:\n{listed(long)}"


def test_no_line_is_wide():
    paths = [*SOURCES, *sorted((ROOT / "tests").rglob("*.py"))]
    wide = [
        f"{name(path)}:{number}: {len(line)} columns"
        for path in paths
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if len(line) > 120
    ]
    assert len(paths) >= 45
    assert not wide, "\n".join(["lines of more than 120 columns:", *wide])


def test_no_notebook_cell_is_long():
    long, seen = [], 0
    for path in NOTEBOOKS:
        for number, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
            lines = len("".join(cell["source"]).splitlines())
            seen += cell["cell_type"] == "code"
            if cell["cell_type"] == "code" and lines > 25:
                long.append(f"{name(path)} cell {number}: {lines} lines")
    assert len(NOTEBOOKS) >= 5 and seen >= 50
    assert not long, "\n".join(["cells of more than 25 lines:", *long])


def test_the_page_of_recipe_fields_is_fresh():
    found = run_python("from benchmarks import docs; print(docs.FIELDS.read_text('utf-8') == docs.fields())")
    assert found.stdout == "True\n", "src/recipes/README.md is stale: python -m benchmarks.docs writes it anew"
