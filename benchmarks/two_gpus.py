"""Training and generation on several GPUs beside one, with Mistral-7B's shapes and random weights (as speed.py).

    python benchmarks/two_gpus.py FOLDER OUT.json            all setups, each in processes of its own: 8 minutes at most
    python benchmarks/two_gpus.py FOLDER OUT.json SETUP ...  these alone; what OUT holds of other setups stays
    SECONDS_AT_MOST=900 GPUS=4 python benchmarks/two_gpus.py FOLDER OUT.json    other limits

FOLDER: random weights, made there first where it is empty (14.5 GB). OUT holds what is done after every setup, and what
went wrong as "error"; the lines printed are the same. Nothing is downloaded; requirements.txt is all that is needed.

train_N_54: 54 rows a step for each GPU, in at most 64 GiB. train_N_16: 16 rows a step for all of them, the recipe's.
generate_N: 819 prompts, 64 new tokens each. profile_N_16: what such a step is made of. ddp_plain, fsdp1, fsdp2:
transformers' own Trainer with a whole 4-bit copy on each GPU, and with its weights shared out.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import kernels, speed

GPUS = int(os.environ.get("GPUS", 2))
SMALL = bool(os.environ.get("SMALL"))  # a trial on a CPU: few rows and steps
ORDER = ("train_1_54", "train_{}_54", "train_1_16", "train_{}_16", "generate_1", "generate_{}")
ORDER += ("profile_{}_16", "ddp_plain_{}", "fsdp2_{}", "profile_1_16", "fsdp1_{}")  # what matters less comes last
SETUPS = tuple(name.format(GPUS) for name in ORDER)
LIMIT = 110 if not SMALL else 300  # seconds a setup


def overrides(setup: str) -> dict:
    _, gpus, rows = setup.split("_")
    if SMALL:
        return {speed.ROWS: 4, "training.max_steps": 8, "engine.tokens_per_pass": 600, "device": "cpu"}
    if rows == "54":
        return {speed.ROWS: 54 * int(gpus), "training.max_steps": 25, "engine.memory_gib": 64.0}
    return {speed.ROWS: 16, "training.max_steps": 240}  # in half of them the sizes of steps are recorded


def device() -> dict:
    return {"device": "cpu"} if SMALL else {}


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def profile(folder: str, setup: str) -> dict:
    """Milliseconds of a step of 16 rows on the first GPU: kernels by kind, and the wall clock's."""
    return kernels.training(folder, setup, overrides(setup), *((2, 1) if SMALL else (10, 200)))


def generate(folder: str, setup: str) -> dict:
    """New tokens a second of both systems together, as `speed.generate`, with the prompts shared out."""
    import torch
    from accelerate import PartialState
    from transformers import GenerationConfig

    from src import engine

    state = PartialState(cpu=SMALL)
    share = {"rank": state.process_index, "ranks": state.num_processes}
    model, tokenizer = speed.loaded_model(folder, device())
    if engine.dequantized_fits(model):
        engine.dequantize(model)
    prompts, new = speed.rows("test"), 4 if SMALL else 64
    prompts = prompts.select(range(12)) if SMALL else prompts
    exactly = GenerationConfig(max_new_tokens=new, min_new_tokens=new)
    engine.generate(model, tokenizer, prompts.select(range(8)), exactly, progress=False)  # warm-up
    seconds, said = {}, {}
    for system in ("base", "finetuned"):
        state.wait_for_everyone()
        start = time.perf_counter()
        with model.disable_adapter() if system == "base" else contextlib.nullcontext():
            said[system] = engine.generate(model, tokenizer, prompts, exactly, progress=False, **share)
        seconds[system] = time.perf_counter() - start
    count = len(prompts) * new
    assert all(answer["tokens"] == new for answers in said.values() for answer in answers)
    cuda = torch.cuda.is_available()
    return {
        "setup": setup,
        "new_tok_s": round(2 * count / sum(seconds.values())),
        "base_new_tok_s": round(count / seconds["base"]),
        "finetuned_new_tok_s": round(count / seconds["finetuned"]),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if cuda else None,
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "torch": torch.__version__,
    }


def plain(folder: str, setup: str) -> dict:
    """transformers' Trainer, padded, two rows a GPU: GiB after a step (weights, adapter, moments) and at the peak."""
    import tempfile

    import torch
    from accelerate.utils import gather_object
    from peft import LoraConfig, get_peft_model
    from transformers import (
        AutoModelForCausalLM,
        BitsAndBytesConfig,
        DataCollatorForSeq2Seq,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )  # fmt: skip

    from src import qlora

    recipe = speed.setup_of(folder, device())[0]
    where = qlora.resolve_device(recipe.device)
    cuda, dtype = where.type == "cuda", torch.bfloat16 if where.type == "cuda" else torch.float32
    version, seen = setup.partition("_")[0], {}
    shared = {}
    if version.startswith("fsdp"):
        config = {"version": int(version[-1]), "transformer_layer_cls_to_wrap": ["MistralDecoderLayer"]}
        config |= {"use_orig_params": "false", "sync_module_states": "false"} if version == "fsdp1" else {}
        shared = {"fsdp": True, "fsdp_config": config}
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(), max_steps=4 if SMALL else 10, per_device_train_batch_size=2, learning_rate=2e-4,
        bf16=cuda, use_cpu=not cuda, save_strategy="no", report_to="none", logging_steps=1, disable_tqdm=True,
        ddp_find_unused_parameters=False, optim="adamw_torch", **shared,
    )  # fmt: skip
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,  # 4-bit weights packed in the type that the other weights have: FSDP asks for one
    )  # fmt: skip
    tokenizer = qlora.load_tokenizer(recipe)
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantization, dtype=dtype, device_map={"": where}, attn_implementation="sdpa"
    )
    model.config.use_cache = False
    lora = LoraConfig(task_type="CAUSAL_LM", r=32, lora_alpha=64, target_modules="all-linear")
    model = get_peft_model(model, lora, autocast_adapter_dtype=False)
    encoded = speed.rows("sample").select_columns(["input_ids", "labels"]).select(range(64))

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if cuda:
                torch.cuda.synchronize()
                seen.setdefault("after", []).append(torch.cuda.memory_allocated() / 2**30)
            if state.global_step == 2:  # loading and compiling are over
                seen["start"] = time.perf_counter()
                torch.cuda.reset_peak_memory_stats() if cuda else None
            seen["end"] = time.perf_counter()

    trainer = Trainer(model, arguments, DataCollatorForSeq2Seq(tokenizer), encoded, callbacks=[Watch()])
    trainer.train()
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
    every = gather_object([[seen.get("after", [0.0])[-1], peak]])
    return {
        "setup": setup,
        "rows_per_step": 2 * arguments.world_size,
        "weights_gib": [round(after, 2) for after, _ in every],
        "peak_gib": [round(peak, 2) for _, peak in every],
        "seconds_a_step": round((seen["end"] - seen["start"]) / (arguments.max_steps - 2), 3),
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "torch": torch.__version__,
    }


def one(folder: str, setup: str):
    """What a process does."""
    kind = setup.partition("_")[0]
    if kind == "train":
        result = speed.train(folder, setup, overrides=overrides(setup))
    else:
        result = {"generate": generate, "profile": profile}.get(kind, plain)(folder, setup)
    if rank() == 0:
        print("RESULT " + json.dumps(result), flush=True)


def measure(folder: str, setup: str, limit: float) -> dict:
    """One setup in processes of its own; what went wrong is kept as "error"."""
    gpus = next(int(part) for part in setup.split("_") if part.isdigit())
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", f"--nproc-per-node={gpus}"]
    command = [sys.executable, *(torchrun if gpus > 1 else []), __file__, "one", folder, setup]
    start, found = time.monotonic(), {"setup": setup}
    child = subprocess.Popen(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True, errors="replace"
    )
    try:
        said, _ = child.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, 15)  # torchrun ends its processes
        try:
            said, _ = child.communicate(timeout=15)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, 9)
            said, _ = child.communicate()
        found["error"] = f"not done within {limit:.0f} s"
    for line in said.splitlines():
        if line.startswith("RESULT "):
            found = json.loads(line.removeprefix("RESULT "))
    if "gpu" not in found:
        found.setdefault("error", f"ended with code {child.returncode}")
        print("\n".join(said.splitlines()[-60:]), flush=True)
        told = [line.strip() for line in said.splitlines() if "Error" in line and "ChildFailed" not in line]
        found["said"] = told[-1][-300:] if told else ""
    return found | {
        "gpus": gpus,
        "ours": setup.startswith(("train", "generate")),
        "wall_seconds": round(time.monotonic() - start),
    }


def with_speedup(results: dict) -> list[dict]:
    """The results by setup, each beside its own with one GPU."""
    for setup, result in results.items():
        alone = results.get(setup.replace(f"_{result['gpus']}", "_1", 1), {})
        rate = next((key for key in ("tok_s", "new_tok_s") if key in result and key in alone), None)
        if rate and result["gpus"] > 1:
            result["speedup"] = round(result[rate] / alone[rate], 2)
    return list(results.values())


def main(words: list[str]) -> int:
    if words[:1] == ["one"]:
        one(*words[1:])
        return 0
    if len(words) < 2 or not set(words[2:]) <= set(SETUPS):
        print(__doc__, *SETUPS, sep="\n")
        return 2
    folder, out, end = Path(words[0]).resolve(), Path(words[1]), time.monotonic()
    end += float(os.environ.get("SECONDS_AT_MOST", 470))
    results = {r["setup"]: r for r in json.loads(out.read_text("utf-8"))} if out.is_file() else {}
    if not (folder / "config.json").is_file():
        print("making random weights", flush=True)
        subprocess.run([sys.executable, speed.__file__, "make-model", str(folder)], check=True, timeout=300)
    for setup in words[2:] or SETUPS:
        left = end - time.monotonic()
        if left < 20:
            print(f"{setup}: no time left", flush=True)
            continue
        print(f"{setup}: {left:.0f} s are left", flush=True)
        results[setup] = measure(str(folder), setup, min(LIMIT, left))
        print(json.dumps(results[setup]), flush=True)
        out.write_text(json.dumps(with_speedup(results), indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
