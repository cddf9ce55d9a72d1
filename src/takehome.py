"""What notebook 06 takes a run elsewhere with: the card's code in a fresh process, a merged model's files and card."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from src import runs


def follow_the_card(adapter: Path, section: str, dialogue: str) -> str:
    """What the model card's own Python prints for a dialogue, run in a fresh process inside of the adapter's folder.

    Raises runs.RunError where the card is missing or its code fails.
    """
    card = adapter / "README.md"
    if not card.is_file():
        raise runs.RunError(f"{runs.relative(card)} is missing: run notebooks/04_compare.ipynb first.")
    code = re.search(r"```python\n(.*?)```", card.read_text(encoding="utf-8"), re.S)[1]
    code = re.sub(r"^dialogue = .*$", lambda _: f"dialogue = {dialogue!r}", code, flags=re.M)
    code = re.sub('"{section}", ".*?"', lambda _: f'"{{section}}", {section!r}', code)
    command = [sys.executable, "-W", "ignore", "-c", code]
    environment = {**os.environ, "PYTHONUTF8": "1"}
    done = subprocess.run(command, cwd=adapter, env=environment, capture_output=True, encoding="utf-8")
    if done.returncode:
        raise runs.RunError(f"The code in {runs.relative(card)} failed:\n{done.stderr[-2000:]}")
    return done.stdout.strip()


def without_bos(template: dict, tokenizer) -> str:
    """The prompt of prompt_template.json for servers that add the BOS token themselves (Ollama does)."""
    return template["prompt"].removeprefix(tokenizer.bos_token or "")


def modelfile(template: dict, tokenizer, generation, gguf: str = "model.gguf") -> str:
    """Ollama's Modelfile: renders the prompt of training exactly, and decodes as `generation` (a GenerationConfig).

    template: prompt_template.json. The user's message is the dialogue, the system message names the section.
    Raises ValueError for a prompt with three quotes, which a Modelfile cannot hold.
    """
    prompt = without_bos(template, tokenizer)
    if '"""' in prompt:
        raise ValueError('The prompt holds """, which ends a TEMPLATE in a Modelfile: change prompt.instruction.')
    parts = re.split(r"(\{section\}|\{dialogue\})", prompt)
    fields = {"{section}": "{{ .System }}", "{dialogue}": "{{ .Prompt }}"}
    text = "".join(fields.get(part) or part.replace("{{", '{{ "{{" }}') for part in parts)
    parameters = {
        "stop": json.dumps(tokenizer.eos_token),
        "temperature": generation.temperature or 1 if generation.do_sample else 0,
        "repeat_penalty": generation.repetition_penalty or 1.0,  # Ollama's own is 1.1
        "num_predict": generation.max_new_tokens,
        "num_ctx": template["max_tokens"] + generation.max_new_tokens,
    }
    lines = [f"FROM ./{gguf}", f'TEMPLATE """{text}"""']
    return "\n".join([*lines, *(f"PARAMETER {name} {value}" for name, value in parameters.items())]) + "\n"


def render(modelfile: str, section: str, dialogue: str) -> str:
    """What Ollama makes of a Modelfile's TEMPLATE, for these few fields; llama.cpp puts the BOS token before it."""
    text = re.search(r'^TEMPLATE """(.*?)"""$', modelfile, re.S | re.M)[1]
    values = {"{{ .System }}": section, "{{ .Prompt }}": dialogue, '{{ "{{" }}': "{{"}
    return re.sub("|".join(map(re.escape, values)), lambda found: values[found[0]], text)


def serving(folder: Path, template: dict, generation, section: str) -> str:
    """Shell lines that serve a merged folder: by vLLM, and by Ollama after llama.cpp's converter."""
    where, name = runs.relative(folder), folder.name
    prompt = template["prompt"].replace("{section}", section).replace("{dialogue}", "Doctor: Any allergies? ...")
    asked = {"model": name, "prompt": prompt, "add_special_tokens": False, "max_tokens": generation.max_new_tokens}
    asked = json.dumps(asked | {"temperature": 0}).replace("'", "'\\''")
    return f"""# vLLM, on a GPU
vllm serve {where} --served-model-name {name}
curl -s localhost:8000/v1/completions -H 'Content-Type: application/json' -d '{asked}'

# llama.cpp and Ollama
python convert_hf_to_gguf.py {where} --outtype bf16 --outfile {where}/model.gguf  # in a clone of llama.cpp
ollama create {name} -f {where}/Modelfile
ollama run {name}  # /set system {section or "..."}, then a dialogue between three quotes
"""


def to_gguf(folder: Path) -> Path | None:
    """folder/model.gguf made by llama.cpp's converter; None where that is not on the PATH, RunError where it fails."""
    converter = shutil.which("convert_hf_to_gguf.py") or shutil.which("convert-hf-to-gguf")
    if not converter:
        return None
    path = folder / "model.gguf"
    with runs.aside(path) as whole:
        done = subprocess.run([converter, str(folder), "--outtype", "bf16", "--outfile", str(whole)])
        if done.returncode:
            raise runs.RunError(f"{Path(converter).name} failed (see above), so {runs.relative(path)} was not written.")
    return path


def merged_card(run, scores: dict, n: int, split: str) -> str:
    """README.md of a merged model. scores: {column: value} of its answers to the first n rows of the split.

    Raises ValueError, without a network, where huggingface_hub does not read the same scores back from its metadata.
    """
    from huggingface_hub import ModelCard

    recipe = run.recipe()
    metadata = runs.card_data(f"{run.name}-merged", recipe, "transformers", ["summarization", "qlora"], split, scores)
    shown = "\n".join(f"| {column} | {value:.3f} |" for column, value in scores.items())
    card = ModelCard(
        f"---\n{metadata.to_yaml()}\n---\n# {run.name}, merged\n\nThe adapter {run.name} merged into "
        f"`{recipe.base_model}` in 16 bits. `prompt_template.json` holds the prompt of training; it spells the special "
        f"tokens out.\n\n| first {n} rows of {split}; F1, 0-1, no stemmer | |\n|---|---|\n{shown}\n\nThe adapter was "
        "trained on a 4-bit base; this is another model, with scores of its own. The licences of base and data apply. "
        "Not for clinical use.\n"
    )
    if ModelCard(str(card)).data.eval_results != metadata.eval_results:
        raise ValueError("huggingface_hub reads other scores from this card than were written: see merged_card.")
    return str(card)
