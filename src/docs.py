"""Texts that a program writes: `python -m src.docs` makes src/recipes/README.md from the comments of src/recipes.py."""

import ast
import io
import tokenize
from pathlib import Path

from src import recipes, runs

FIELDS = runs.ROOT / "src" / "recipes" / "README.md"
HEAD = """# Recipes, field by field

Written by `python -m src.docs` from [recipes.py](../recipes.py): change a field there, not here. A recipe is one TOML
file of this folder; a field that it leaves out has its default. `OVERRIDES` and `make run` replace fields by these
names.
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


def main():
    runs.write_atomic(FIELDS, fields())
    print(f"wrote {runs.relative(FIELDS)}")


if __name__ == "__main__":
    main()
