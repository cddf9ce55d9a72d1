"""One dialogue, two summaries, in a terminal: `make try FILE=chat.txt`. Notebook 06 does the same in its cells.

What can be wrong about the dialogue is found before torch is imported, which takes seconds.
"""

import difflib
import itertools
import shutil
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path

from src import data, recipes, runs
from src.analysis import marks

DEMO = runs.Run("demo")  # the adapter of `make demo`, which is committed
MOST = 1_000_000  # bytes of a dialogue's file
FLAGS = {"number", "drug", "new"}  # kinds of marks that say: the dialogue lacks it


class TryError(ValueError):
    """A dialogue, a section or a run that cannot be used. The message says what was found, expected, and the remedy."""


def find(name: str = "") -> runs.Run:
    """The run of that name; of a recipe's name, its newest finished run; of "", the newest finished run of any recipe.

    The committed demo adapter stands in where "" or "demo" finds no run. Raises runs.RunError.
    """
    known = [run for run in runs.finished() if run.config["recipe"]["name"] in recipes.names()]
    if name:
        known = [run for run in known if name in (run.name, run.config["recipe"]["name"])]
    if not known and name in ("", DEMO.name):
        return DEMO
    return known[-1] if known else runs.find(name, name)


def read_dialogue(file: str) -> str:
    """The dialogue in a text file, or typed into the terminal where there is no file. Raises TryError."""
    if not file and sys.stdin.isatty():
        print("Type or paste a dialogue, a line a turn. Ctrl-D on a line of its own ends it.", file=sys.stderr)
    expected = "expected a UTF-8 text file with one dialogue, a line a turn: make try FILE=chat.txt"
    try:
        with Path(file).open("rb") if file else sys.stdin.buffer as source:
            raw = source.read(MOST + 1)
        text = data.normalise(raw.decode("utf-8-sig"))
    except OSError as error:
        raise TryError(f"{file!r} cannot be read ({error.strerror}): {expected}.") from None
    except UnicodeDecodeError as error:
        raise TryError(f"{file!r} is not UTF-8 text (byte {error.start}): {expected}.") from None
    if len(raw) > MOST:
        raise TryError(f"{file!r} is too long, more than {MOST:,} bytes: {expected}.")
    if not any(character.isalnum() for character in text):
        raise TryError(f"{file or 'The dialogue'!r} is empty, or holds no letter: {expected}.")
    return text


def read_split(recipe, split: str = "train") -> list[dict]:
    """The rows of a split, for examples, names of sections and scores. Those of the demo need no notebook first."""
    if recipe.data.dataset == "demo":
        return data.read_rows(runs.ROOT / "data" / "demo" / f"{split}.csv")
    return data.load_split(recipe, split)


def sections(recipe) -> list[str]:
    """The sections that a recipe's prompts may name, the most frequent first; none where its prompts name none."""
    if "{section}" not in recipe.prompt.instruction:
        return []
    return [name for name, _ in Counter(row["section"] for row in read_split(recipe)).most_common() if name]


def choose_section(recipe, wanted: str = "") -> str:
    """The section as the training rows write it; the most frequent one where none is wanted. Raises TryError."""
    known = sections(recipe)
    if not wanted:
        return known[0] if known else ""
    if not known:
        told = "leave it out, or name another run (RUN=demo)."
        raise TryError(f"SECTION is {wanted!r}, and the prompts of recipe {recipe.name} name none: {told}")
    if wanted.upper() in (same := {name.upper(): name for name in known}):
        return same[wanted.upper()]
    close = difflib.get_close_matches(wanted.upper(), list(same), 1)
    hint = f" Did you mean {same[close[0]]!r}?" if close else ""
    raise TryError(f"SECTION is {wanted!r}: expected one of {', '.join(known)}.{hint}")


def load(run: runs.Run):
    """(tokenizer, model) of a run: its base model with its adapter, for `answers`.

    Raises runs.RunError where the adapter's files or the base model are not those of its training.
    """
    from peft import PeftModel

    from src import engine, qlora
    from src.runs import identity

    qlora.quiet()
    recipe = run.recipe()
    adapter = run.check().adapter if run.finished else run.adapter  # git keeps the demo's
    tokenizer = qlora.load_tokenizer(recipe)
    base = qlora.load_base(recipe, tokenizer, qlora.resolve_device(recipe.device))
    found, expected = identity.base(recipe.base_model, recipe.revision), run.config["identity"]["base"]
    if found != expected:
        raise runs.RunError(
            f"{run.name} was trained on another base model than {recipe.base_model}: found {found}, expected "
            f"{expected}. Put its files back, or train again with 02."
        )
    model = PeftModel.from_pretrained(base, adapter).eval()
    if engine.dequantized_fits(model):
        engine.dequantize(model)  # the same function, faster
    return tokenizer, model


def prompt_rows(dialogue: str, section: str, tokenizer, prompt, shots=()):
    """The dialogue as a dataset of one row for `engine.generate`. Raises TryError where it is too long for the prompt.

    prompt: recipe.prompt. shots: records to be shown, as many as prompt.few_shot says.
    """
    from src import prompts

    record = {"id": "dialogue", "section": section, "dialogue": dialogue, "summary": ""}
    rows = prompts.build_all([record], tokenizer, prompt, shots)
    if cut := rows[0]["cut_tokens"]:
        raise TryError(
            f"The dialogue is too long: its prompt has {len(rows[0]['prompt_ids']) + cut} tokens, expected at most "
            f"{prompt.max_tokens} (prompt.max_tokens of this run). Take out about {cut} tokens, a word or two each."
        )
    return rows


def answers(model, tokenizer, rows, generation) -> dict[str, dict]:
    """What the base and the fine-tuned model answer to the first row, as `engine.generate` does, and "seconds"."""
    from src import engine

    def answer():
        start = time.perf_counter()
        found = engine.generate(model, tokenizer, rows, generation, progress=False)[0]
        return found | {"seconds": time.perf_counter() - start}

    with model.disable_adapter():
        base = answer()
    return {"base": base, "fine-tuned": answer()}


def speed(answer: dict) -> str:
    """How long an answer is, how it ended, and how fast it came."""
    rate, end = answer["tokens"] / answer["seconds"], "" if answer["stop"] == "eos" else ", cut at the cap"
    return f"{answer['tokens']} tokens{end}, {answer['seconds']:.1f} s, {rate:.0f} tokens/s"


def side_by_side(found: dict[str, dict], dialogue: str, width: int) -> str:
    """The answers in columns, `width` characters together, with marks at what the dialogue lacks."""
    each = max(20, (width - 3) // len(found))
    columns = []
    for name, answer in found.items():
        text = marks.marked_text(answer["prediction"], dialogue) or "(empty)"
        lines = [name.upper(), "-" * each]
        for line in [*text.split("\n"), "", f"({speed(answer)})"]:
            lines += textwrap.wrap(line.expandtabs(4), each, drop_whitespace=True) or [""]
        columns.append(lines)
    rows = itertools.zip_longest(*columns, fillvalue="")
    return "\n".join(" | ".join(f"{line:<{each}}" for line in row).rstrip() for row in rows)


def main(file: str = "", section: str = "", run_name: str = "") -> int:
    """Print the two summaries of a dialogue. Returns 1, after a message, where that cannot be done."""
    try:
        run = find(run_name)
        recipe = run.recipe()
        chosen, dialogue = choose_section(recipe, section), read_dialogue(file)
        print(f"Loading run {run.name} (base model {recipe.base_model}) ...", file=sys.stderr, flush=True)
        from src import prompts, qlora

        try:
            tokenizer, model = load(run)
            shots = read_split(recipe) if recipe.prompt.few_shot else ()
            rows = prompt_rows(dialogue, chosen, tokenizer, recipe.prompt, shots)
            found = answers(model, tokenizer, rows, qlora.generation_config(recipe))
        except (qlora.ModelError, prompts.PromptError) as error:
            raise TryError(str(error)) from error
    except (TryError, data.DataError, recipes.RecipeError, runs.RunError, FileNotFoundError) as error:
        print(marks.visible(str(error)), file=sys.stderr)
        return 1
    if chosen:
        others = "" if section else f", the most frequent one; SECTION= takes {', '.join(sections(recipe)[1:])}"
        print(f"section {chosen}{others}")
    print(side_by_side(found, dialogue, shutil.get_terminal_size((100, 24)).columns))
    if any(kind in FLAGS for a in found.values() for _, kind in marks.pieces(a["prediction"], dialogue)):
        print(marks.TEXT_LEGEND)
    if recipe.data.dataset == "demo":
        print("The demo learnt from a few kinds of dialogues: outside of these it invents. Not for clinical use.")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
