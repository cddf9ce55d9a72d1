"""Texts that a program writes: the page of recipe fields, and the repository's address in badges and links.

`python -m benchmarks.docs` makes src/recipes/README.md from the comments of src/recipes.py; with OWNER/NAME after it
(`make links`) it writes the address too.
"""

import ast
import io
import json
import re
import sys
import tokenize
from pathlib import Path

from src import recipes, runs

COLAB = "https://colab.research.google.com"
BADGE = r"\[!\[Open in Colab\]\([^)]*\)\]\([^)]*\)"
FIELDS = runs.ROOT / "src" / "recipes" / "README.md"
HEAD = """# Recipes, field by field

Written by `python -m benchmarks.docs` from [recipes.py](../recipes.py): change a field there, not here. A recipe is
one TOML file of this folder; a field that it leaves out has its default. `OVERRIDES` and `make run` replace fields by
these names.
"""


def fields() -> str:
    """The text of src/recipes/README.md: a table a section, one row a field with default, values and meaning."""
    source = (Path(recipes.__file__)).read_text(encoding="utf-8")
    comments = {
        token.start[0]: (token.string.lstrip("# "), token.line.lstrip().startswith("#"))
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    classes = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
    schema = recipes.Recipe.model_json_schema()
    text = [HEAD, "## The recipe itself", *_table(classes["Recipe"], recipes.Recipe, "", comments, schema)]
    for section, field in recipes.Recipe.model_fields.items():
        if isinstance(field.default, recipes.Section):
            kind = type(field.default)
            about = comments.get(classes[kind.__name__].lineno, ("",))[0]
            text += ["", f"## [{section}]", *([f"\n{about[0].upper()}{about[1:]}."] if about else [])]
            text += _table(classes[kind.__name__], kind, f"{section}.", comments, schema["$defs"][kind.__name__])
    return "\n".join(text) + "\n"


def _table(node: ast.ClassDef, kind, prefix: str, comments: dict, schema: dict) -> list[str]:
    """Markdown lines of the table of a class's fields; its sections are left out."""
    lines = ["", "| field | default | values | what it does |", "| --- | --- | --- | --- |"]
    for item in node.body:
        if not isinstance(item, ast.AnnAssign) or item.target.id not in kind.model_fields:
            continue
        name, default = item.target.id, kind.model_fields[item.target.id]
        if isinstance(default.default, recipes.Section):
            continue
        above, line = [], item.lineno - 1
        while comments.get(line, ("", False))[1]:  # whole lines of comment before the field
            above, line = [comments[line][0], *above], line - 1
        what = ". ".join(filter(None, [comments.get(item.end_lineno, ("",))[0], " ".join(above)]))
        value = "(the file's name)" if default.is_required() else f"`{default.default!r}`"
        cells = [f"`{prefix}{name}`", value, _values(schema["properties"][name]), what]
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return lines


def _values(schema: dict) -> str:
    """What a field accepts, in words: `whole number, 1 to 64`, `nf4, fp4`, `text, None`."""
    if "anyOf" in schema:
        return ", ".join(map(_values, schema["anyOf"]))
    if "enum" in schema:
        return ", ".join(map(str, schema["enum"]))
    word = {"boolean": "True, False", "string": "text", "null": "None", "array": "names"}.get(schema["type"])
    if word:
        return word
    low = f"{schema['minimum']:,}" if "minimum" in schema else ""
    low = low or (f"above {schema['exclusiveMinimum']:,}" if "exclusiveMinimum" in schema else "")
    high = f"{schema['maximum']:,}" if "maximum" in schema else ""
    high = high or (f"below {schema['exclusiveMaximum']:,}" if "exclusiveMaximum" in schema else "")
    kind = "whole number" if schema["type"] == "integer" else "number"
    return f"{kind}, {f'{low} to {high}' if high else f'{low} or more'}" if low or high else kind


def links(repository: str) -> list[Path]:
    """Write "owner/name" into notebooks (badge, what Colab clones), README.md's table and CITATION.cff; return them.

    An address that stands there is replaced. Raises ValueError if it is no owner/name, or has no place in a file.
    """
    if not re.fullmatch(r"[\w-]+/[\w.-]+", repository, re.ASCII):
        raise ValueError(f"REPOSITORY is {repository!r}: expected owner/name, as in make links REPOSITORY=owner/name.")
    address, written = f"https://github.com/{repository}", {}

    def badge(path: str) -> str:
        return f"[![Open in Colab]({COLAB}/assets/colab-badge.svg)]({COLAB}/github/{repository}/blob/main/{path})"

    def put(path: Path, text: str, pattern: str, new: str):
        """Replace the one place that matches; `new` may name groups."""
        changed, count = re.subn(pattern, new, text, flags=re.M)
        if count != 1:
            raise ValueError(f"{runs.relative(path)}: {count} places for the address, expected 1 ({pattern}).")
        return changed

    notebooks = sorted((runs.ROOT / "notebooks").glob("*.ipynb"))
    for path in [*notebooks, runs.ROOT / "benchmarks" / "t4_proof.ipynb"]:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        first, setup = (next(c for c in notebook["cells"] if c["cell_type"] == kind) for kind in ("markdown", "code"))
        shown = badge(runs.relative(path))
        for cell, pattern, new in (
            (first, rf"^(# .*)$(\n\n{BADGE})?", rf"\1\n\n{shown}"),
            (setup, r'^REPOSITORY = ".*?"', f'REPOSITORY = "{address}"'),
        ):
            cell["source"] = put(path, "".join(cell["source"]), pattern, new).splitlines(keepends=True)
        written[path] = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
    readme, citation = runs.ROOT / "README.md", runs.ROOT / "CITATION.cff"
    written[readme] = readme.read_text(encoding="utf-8")
    for path in notebooks:
        row = rf"^(\| \[{path.stem}\]\([^)]*\))( {BADGE})?"
        written[readme] = put(readme, written[readme], row, rf"\1 {badge(runs.relative(path))}")
    text = citation.read_text(encoding="utf-8")
    written[citation] = put(
        citation, text, r"^(license: .*)(\nrepository-code: .*)?", rf"\1\nrepository-code: {address}"
    )
    for path, text in written.items():  # all or none
        runs.write_atomic(path, text)
    return list(written)


def main(arguments: list[str]) -> int:
    runs.write_atomic(FIELDS, fields())
    try:
        written = [FIELDS, *(links(arguments[0]) if arguments else [])]
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"wrote {', '.join(map(runs.relative, written))}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
