"""One run on several GPUs or machines: a process a GPU, started by torchrun, over the run that 02 or 03 has opened.

    torchrun --nproc-per-node 2 -m src.gpus train RECIPE ['{"lora.r": 8}']    or a run's name in place of the recipe
    torchrun --nproc-per-node 2 -m src.gpus answer RUN EVALUATION '<recipe as JSON>'

On several machines the first line is started on each, with torchrun's or `accelerate launch`'s own options, in a folder
that all of them see: one process writes.
"""

import json
import os
import re
import subprocess
import sys
import threading
from datetime import timedelta

from src import recipes, runs

ENDS = "ENDS_WITH_ITS_PARENT"  # in the environment of processes that a notebook starts


def train(run: runs.Run, processes: int):
    """Train a run that `runs.open` has opened, by so many processes; goes on from its last checkpoint.

    What they say is printed. The processes build the run from its recipe as trained: another LoraConfig than a recipe
    can say is refused. Raises runs.RunError where one of them ends early.
    """
    from src import terminal

    with terminal.Training():  # a line a log step
        _launch(["train", run.name], processes, run)


def answer(evaluation: runs.Evaluation, recipe, processes: int):
    """Answer the rows of an opened evaluation by so many processes. The answers are kept as 03 keeps its own."""
    _launch(["answer", evaluation.run.name, evaluation.name, recipe.model_dump_json()], processes, evaluation.run)


def _launch(words: list[str], processes: int, run: runs.Run):
    from src import engine

    engine.free_cuda()
    run.unlock()  # the first process takes it
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    command = [*torchrun, "--nproc-per-node", str(processes), "--module", "src.gpus", *words]
    said, pipe = [], subprocess.PIPE
    more = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "PYTHONUNBUFFERED": "1", ENDS: "1"}
    with subprocess.Popen(
        command, cwd=runs.ROOT, env=os.environ | more, text=True, errors="replace", stdin=pipe, stdout=pipe,
        stderr=subprocess.STDOUT,
    ) as child:  # fmt: skip
        try:
            for line in child.stdout:
                said.append(line)
                print(line, end="", flush=True)
        except BaseException:  # the cell was stopped
            child.terminate()
            raise
    if child.returncode:
        raise runs.RunError(
            f"{words[0]} {run.name}: {_first(said)}, and the others were ended. What was written before is whole: run "
            "this cell, or the same command, again and it goes on from there."
        )


def _first(said: list[str]) -> str:
    """Which process ended first and how, in its own words or in torchrun's report."""
    own = next((line.strip().rstrip(".") for line in said if re.match(r"process \d+ of \d+: ", line)), None)
    if own:
        return own
    report = "".join(said).partition("Root Cause")[2]
    rank, code = re.search(r"rank +: (\d+)", report), re.search(r"exitcode +: (-?\d+)", report)
    if not (rank and code):
        return "one ended early (see above)"
    how = f"was killed by signal {-int(code[1])}" if int(code[1]) < 0 else f"ended with code {code[1]} (see above)"
    return f"process {rank[1]} {how}"


# --- what a process of torchrun does ----------------------------------------------------------------------------------


def _end_with_parent():
    """End this process when the notebook that started it ends, even by a kill: its end of the pipe closes."""
    if os.environ.get(ENDS):
        threading.Thread(target=lambda: (os.read(0, 1), os._exit(1)), daemon=True).start()


def main(words: list[str]) -> int:
    _end_with_parent()
    from src import engine, qlora

    number = f"process {os.environ.get('RANK', 0)} of {os.environ.get('WORLD_SIZE', 1)}"
    try:
        if words[:1] == ["train"] and len(words) in (2, 3):
            _train(words[1], json.loads(words[2]) if len(words) == 3 else {})
        elif words[:1] == ["answer"] and len(words) == 4:
            _answer(*words[1:])
        else:
            print(__doc__, file=sys.stderr)
            return 2
    except (runs.RunError, recipes.RecipeError, engine.PlanError, engine.TrainingError, qlora.ModelError) as error:
        print(f"{number}: {error}", file=sys.stderr, flush=True)
        return 1
    except RuntimeError as error:  # of torch.distributed, beside others
        print(f"{number} cannot go on. If its error below is a lost connection, another process has ended: see there. "
              "The same command goes on from the last checkpoint.", file=sys.stderr, flush=True)  # fmt: skip
        raise error
    return 0


def _train(name: str, overrides: dict):
    import transformers
    from accelerate.utils import broadcast_object_list
    from peft import LoraConfig

    from src import data, engine, prompts, qlora, scoring

    qlora.quiet()
    named = runs.Run(name)
    given = bool(re.search("-[0-9a-f]{8}$", name)) and named.folder.is_dir()
    recipe = recipes.build(named.config["recipe"], overrides) if given else recipes.load(name, overrides)
    device, training = qlora.resolve_device(recipe.device), recipe.training
    steps, when = training.eval_steps, "steps" if training.eval_steps else "epoch"
    often = {"eval_strategy": when, "eval_steps": steps, "save_strategy": when, "save_steps": steps or 500}
    arguments = qlora.training_arguments(recipe, device, **often, save_total_limit=2)  # joins the processes
    records, tokenizer = data.load(recipe), qlora.load_tokenizer(recipe)
    parts = ("train", "validation")
    rows = [prompts.build_all(records[part], tokenizer, recipe.prompt, records["train"]) for part in parts]
    quantization, lora = qlora.quantization_config(recipe, device), LoraConfig("CAUSAL_LM", **recipe.lora.model_dump())
    limits = recipe.engine.limits()
    plan = engine.plan(qlora.load_config(recipe), lora, quantization, arguments, rows[0], device, **limits)
    model = qlora.load_adapted(recipe, tokenizer, device)

    rouge = training.metric_for_best_model == "rougeL"
    answered, score = (rows[1], scoring.rouge_l) if rouge else (rows[1].take(training.sample_rows), None)
    greedy = transformers.GenerationConfig(max_new_tokens=recipe.generation.max_new_tokens, do_sample=False)
    callbacks = [engine.SampleAnswers(answered, tokenizer, greedy, training.sample_rows, score)]
    callbacks.append(engine.TimedCheckpoints(recipe.engine.checkpoint_minutes))
    if training.early_stopping_patience:
        callbacks.append(transformers.EarlyStoppingCallback(training.early_stopping_patience))
    trainer = engine.FastTrainer(model, arguments, *rows, tokenizer, plan, callbacks)
    trainer.remove_callback(transformers.PrinterCallback)

    if given:
        _check(named, trainer)
    first = arguments.process_index == 0
    run = runs.open(recipe, trainer, prompts.template(tokenizer, recipe.prompt)) if first else None
    known = [run and (run.name, run.finished, run.checkpoint())]
    name, finished, checkpoint = broadcast_object_list(known)[0]
    trainer.args.output_dir = os.path.relpath(runs.Run(name).checkpoints)
    if finished:
        print(f"outputs/{name} holds this run, finished." if first else "", end="\n" if first else "")
        return
    trainer.add_callback(engine.LogFile(runs.Run(name).folder / "train_log.jsonl"))
    trainer.train(resume_from_checkpoint=checkpoint)
    if first:
        run.save(trainer, tokenizer, data.fingerprint(recipe))
        print("run", name, flush=True)


def _check(run: runs.Run, trainer):
    try:
        run.check_trainer(trainer)
    except runs.RunError as error:
        raise runs.RunError(
            f"{error} Several processes build a run from its recipe alone. What a cell of 02 holds beside, as rows "
            "left out by hand or use_rslora in LoraConfig, trains with NUM_GPUS = 1."
        ) from None


def _answer(run: str, evaluation: str, recipe: str):
    import transformers
    from accelerate import PartialState

    from src import data, engine, prompts, qlora
    from src.runs import identity

    qlora.quiet()
    run, recipe = runs.Run(run), recipes.build(json.loads(recipe))
    device = qlora.resolve_device(recipe.device)
    state = PartialState(cpu=device.type == "cpu", timeout=timedelta(hours=6))
    evaluation = runs.Evaluation(run, evaluation)
    records, tokenizer = data.load(recipe), qlora.load_tokenizer(recipe)
    rows = prompts.build_all(records["evaluation"], tokenizer, recipe.prompt, records["train"])
    generation = transformers.GenerationConfig(**evaluation.config["generation"])
    values = identity.of_evaluation(run, recipe.evaluation.split, rows, generation, recipe.seed)
    if identity.name(recipe.evaluation.split, values) != evaluation.name:
        raise runs.RunError(
            f"{evaluation.name} has other prompts or another decoding than its recipe says: rows changed by hand in 03 "
            "are answered with NUM_GPUS = 1."
        )
    share = {"rank": state.process_index, "ranks": state.num_processes}
    kept = {system: evaluation.keep(system, state.process_index) for system in ("base", "finetuned")}
    state.wait_for_everyone()  # every process has read what was kept before any adds to it
    model = qlora.load_finetuned(run, recipe, tokenizer)
    wanted = recipe.engine.dequantize
    if wanted == "on" or (wanted == "auto" and engine.dequantized_fits(model)):
        engine.dequantize(model)
    decoding = {"seed": recipe.seed, "batch_size": recipe.engine.batch_size, "progress": False, **share}
    with model.disable_adapter():
        engine.generate(model, tokenizer, rows, generation, keep=kept["base"], **decoding)
    engine.generate(model, tokenizer, rows, generation, keep=kept["finetuned"], **decoding)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    import torch

    if not code and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    sys.exit(code)
