"""The notebooks' own cells, for tests that follow a value from a recipe to the objects that compute; demo rows."""

import csv
import json
from pathlib import Path

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
CHANGED = {  # every field of these sections, at a value that is not its default
    "quantization.load_in_4bit": False, "quantization.bnb_4bit_quant_type": "fp4",
    "quantization.bnb_4bit_use_double_quant": False, "quantization.bnb_4bit_compute_dtype": "bfloat16",
    "lora.r": 3, "lora.lora_alpha": 7, "lora.lora_dropout": 0.25, "lora.target_modules": ["k_proj"],
    "training.num_train_epochs": 1.5, "training.max_steps": 11, "training.per_device_train_batch_size": 5,
    "training.gradient_accumulation_steps": 6, "training.learning_rate": 0.125, "training.warmup_steps": 1.0,
    "training.lr_scheduler_type": "constant_with_warmup", "training.weight_decay": 0.5, "training.max_grad_norm": 0.75,
    "training.optim": "sgd", "training.eval_steps": 9, "training.early_stopping_patience": 2,
    "training.load_best_model_at_end": False, "training.metric_for_best_model": "rougeL", "training.sample_rows": 8,
    "training.keep_checkpoints": True,
    "generation.max_new_tokens": 33, "generation.min_new_tokens": 2, "generation.num_beams": 4,
    "generation.early_stopping": True, "generation.length_penalty": 0.5, "generation.no_repeat_ngram_size": 3,
    "generation.repetition_penalty": 1.25,
    "generation.do_sample": True, "generation.temperature": 0.5, "generation.top_p": 0.25,
    "engine.packing": "on", "engine.fused": "off", "engine.checkpointing": "off", "engine.memory_gib": 12.0,
    "engine.tokens_per_pass": 77, "engine.checkpoint_minutes": 7.0, "engine.dequantize": "off", "engine.batch_size": 13,
    "engine.fp8": "on", "engine.graphs": "off",
}  # fmt: skip
BEAMS = ("generation.num_beams", "generation.early_stopping", "generation.length_penalty")
SAMPLING = ("generation.do_sample", "generation.temperature", "generation.top_p")


def cell(notebook: str, *words: str) -> str:
    """The source of the one code cell of a notebook that holds all of the words."""
    cells = json.loads((NOTEBOOKS / f"{notebook}.ipynb").read_text(encoding="utf-8"))["cells"]
    found = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    found = [source for source in found if all(word in source for word in words)]
    assert len(found) == 1, f"{notebook}: {len(found)} cells hold {words}"
    return found[0]


def demo_rows(root, counts: dict[str, int]):
    """Write the first rows of the demo's splits into data/demo of another repository: {split: how many}."""
    (root / "data" / "demo").mkdir(parents=True)
    for split, count in counts.items():
        lines = list(
            csv.reader((NOTEBOOKS.parent / "data" / "demo" / f"{split}.csv").open(encoding="utf-8", newline=""))
        )
        with (root / "data" / "demo" / f"{split}.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows(lines[: count + 1])
