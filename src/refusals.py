"""How a recipe's values are refused: fields that exclude each other, the words for a value, the name that was meant."""

import difflib
import re

from pydantic import AfterValidator

FILLED = ("section", "Section", "SECTION", "dialogue", "summary")  # a name in braces that looks meant to be filled in


def like(pattern: str, expected: str) -> AfterValidator:
    """A check of a text field: refuse what does not match as a whole."""

    def check(text: str) -> str:
        if not re.fullmatch(pattern, text, re.S):
            raise ValueError(f"expected {expected}")
        return text

    return AfterValidator(check)


def conflicts(recipe, scored: tuple[str, ...]) -> list[str]:
    """What cannot be together in a recipe whose fields are right one by one. `scored`: splits that 03 can score."""
    d, p, t, g = recipe.data, recipe.prompt, recipe.training, recipe.generation
    custom, files = d.dataset == "custom", [f for f in (d.train_file, d.validation_file, d.test_file) if f]
    rows, warmup = t.per_device_train_batch_size * t.gradient_accumulation_steps, t.warmup_steps
    words = [word for word in re.findall(r"\{(\w+)\}", p.instruction) if word != "section" and closest(word, FILLED)]
    found = {
        "training.max_steps is 0: expected -1 (by epochs) or at least 1.": t.max_steps == 0,
        f"training.warmup_steps is {warmup}: expected whole steps, or a share of all steps below 1.": (
            warmup > 1 and not warmup.is_integer()
        ),
        f"training.warmup_steps ({warmup:g}) takes all of training.max_steps ({t.max_steps}): set it lower.": (
            0 < t.max_steps <= warmup and warmup >= 1
        ),
        "training.warmup_steps does not act with lr_scheduler_type 'constant': set it to 0, or the type to "
        "'constant_with_warmup'.": t.lr_scheduler_type == "constant" and warmup > 0,
        f"training.learning_rate is {t.learning_rate}: expected more than 1e-7, where 'polynomial' ends.": (
            t.lr_scheduler_type == "polynomial" and t.learning_rate <= 1e-7
        ),
        f"training.per_device_train_batch_size x gradient_accumulation_steps is {rows}: expected at most 65536.": (
            rows > 2**16
        ),
        "quantization.bnb_4bit_compute_dtype is 'float16', which device 'cpu' does not train in: choose 'auto'.": (
            recipe.device == "cpu" and recipe.quantization.bnb_4bit_compute_dtype == "float16"
        ),
        f"prompt.instruction holds {{{', '.join(words)}}}: expected none but {{section}}.": words,
        "prompt.cue only acts with prompt.style 'plain': leave it out.": p.style == "chat" and p.cue != "Summary:",
        f"prompt.few_shot is {p.few_shot}: expected less than data.train_rows ({d.train_rows}).": (
            p.few_shot >= (d.train_rows or 65)
        ),
        "generation.do_sample and num_beams > 1 exclude each other: choose one.": g.do_sample and g.num_beams > 1,
        "generation.temperature and top_p only act when generation.do_sample is true: set it too.": (
            not g.do_sample and (g.temperature, g.top_p) != (1, 1)
        ),
        "generation.early_stopping and length_penalty only act with num_beams > 1: set it too.": (
            g.num_beams == 1 and (g.early_stopping or g.length_penalty != 1)
        ),
        f"generation.min_new_tokens ({g.min_new_tokens}) exceeds generation.max_new_tokens ({g.max_new_tokens}).": (
            g.min_new_tokens > g.max_new_tokens
        ),
        "data.train_file is missing: expected a file of your own (CSV, TSV, JSON, JSONL, parquet).": (
            custom and not d.train_file
        ),
        f"data.train_file and the like are for the custom dataset, not {d.dataset!r}.": files and not custom,
        "Only one of data.validation_file and data.test_file is given: give both, or neither to have train_file "
        "split by data.split_seed.": bool(d.validation_file) != bool(d.test_file),
        f"data.train_file, validation_file and test_file name a file twice: {shown(files)}.": (
            len(set(files)) < len(files)
        ),
        f"evaluation.split is {shown(recipe.evaluation.split)}: {d.dataset} can be scored on {', '.join(scored)}.": (
            recipe.evaluation.split not in scored
        ),
    }
    return [message for message, is_broken in found.items() if is_broken]


def shown(value) -> str:
    """The value as a message shows it: control characters escaped, 200 characters at most."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no number of more than 4,300 digits
        text = "a number of thousands of digits"
    return text if len(text) <= 200 else f"{text[:200]}..."


def closest(word, choices) -> str:
    """` Did you mean 'lora.r'?` for the choice that holds the word (in its own section first), or looks like it."""
    word = word[:200] if isinstance(word, str) else ""
    section, _, field = word.rpartition(".")
    part = field.replace("_", "")
    holding = [choice for choice in choices if part and part in choice.rpartition(".")[2].replace("_", "")]
    holding.sort(key=lambda choice: (not choice.startswith(f"{section}."), not choice.endswith(f".{field}")))
    close = holding or difflib.get_close_matches(word, list(choices), 1)
    return f" Did you mean {close[0]!r}?" if word and close else ""
