"""What happens beside the steps of a training: time is counted, answers are sampled, a log is written."""

import json
import os
import time
from contextlib import contextmanager

import torch
from transformers import TrainerCallback

from src.engine import decode


class Progress(TrainerCallback):
    """Counts the seconds in optimizer steps, without evaluations and saving, and knows the newest checkpoint."""

    seconds, start, checkpoint = 0.0, None, None

    def on_train_begin(self, args, state, control, **kwargs):
        self.seconds, self.start = max((row.get("seconds", 0.0) for row in state.log_history), default=0.0), None

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = time.perf_counter() if self.start is None else self.start

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_log or control.should_evaluate or control.should_save or control.should_training_stop:
            self.on_epoch_end(args, state, control)

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.start is not None:
            if args.device.type == "cuda":
                torch.cuda.synchronize(args.device)
            self.seconds, self.start = self.seconds + time.perf_counter() - self.start, None

    def on_save(self, args, state, control, **kwargs):
        self.checkpoint = os.path.join(args.output_dir, f"checkpoint-{state.global_step}")


class TimedCheckpoints(TrainerCallback):
    """Saves a checkpoint when `minutes` have passed since the last one or the start, beside those of evaluations.

    Not at the last step of an epoch or of the training: going on from there would pass over what comes at its end.
    """

    def __init__(self, minutes: float):
        self.minutes, self.saved = minutes, None

    def on_train_begin(self, args, state, control, **kwargs):
        self.saved = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        if args.save_strategy == "no" or state.epoch % 1 == 0 or state.global_step >= state.max_steps:
            return
        due = time.monotonic() - self.saved >= 60 * self.minutes
        if args.world_size > 1 and control.should_log:  # processes save together, and wait for each other at logs only
            due = torch.tensor(float(due), device=args.device)
            torch.distributed.all_reduce(due, torch.distributed.ReduceOp.MAX)
        elif args.world_size > 1:
            return
        control.should_save = control.should_save or bool(due)

    def on_save(self, args, state, control, **kwargs):
        self.saved = time.monotonic()


def seen(text: str) -> str:
    """The text with control, ANSI and bidi characters written out, so that a terminal shows them and obeys none."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


class SampleAnswers(TrainerCallback):
    """Answers rows at every evaluation; prints `shown` of them and keeps these in the log beside the losses.

    score: what rates the answers, (predictions, references) to {name: value}; the values join the validation loss as
    eval_<name>, where metric_for_best_model finds them.
    """

    def __init__(self, rows, tokenizer, generation, shown=None, score=None):
        self.rows, self.tokenizer, self.generation = list(rows), tokenizer, generation
        self.shown, self.score = len(self.rows) if shown is None else shown, score

    def on_evaluate(self, args, state, control, model=None, metrics=None, **kwargs):
        share = {"rank": args.process_index, "ranks": args.world_size}
        answers = decode.generate(model, self.tokenizer, self.rows, self.generation, args.seed, progress=False, **share)
        if self.score:
            found = self.score([a["prediction"] for a in answers], [row["answer_text"] for row in self.rows])
            found = {f"eval_{name}": value for name, value in found.items()}
            metrics.update(found)
            state.log_history.append({"step": state.global_step, **found})
        for row, answer in list(zip(self.rows, answers, strict=True))[: self.shown]:
            reference, text, step = row["answer_text"], answer["prediction"], state.global_step
            state.log_history.append({"step": step, "id": row["id"], "reference": reference, "sample": text})
            if not state.is_world_process_zero:
                continue
            print(
                f"step {step}, row {row['id']}\n  reference: {seen(reference)}\n  generated: {seen(text)}", flush=True
            )


class LogFile(TrainerCallback):
    """Keeps the JSON Lines file at a Path equal to the Trainer's log_history; writes it aside and renames it."""

    def __init__(self, path):
        self.path = path

    def on_log(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in state.log_history), "utf-8")
        temporary.replace(self.path)

    on_evaluate = on_train_end = on_log


@contextmanager
def short_walks(model):
    """Keep parameters(), zero_grad() and train() from visiting every module at every step: 15 ms of a 7B."""
    model.train()  # a fresh adapter says it is training while the base model under it is not
    trainable = [p for p in model.parameters() if p.requires_grad]

    def zero_grad():
        for p in trainable:
            p.grad = None

    def train(mode: bool = True):
        return model if model.training is mode else type(model).train(model, mode)

    model.parameters, model.zero_grad, model.train = (lambda recurse=True: iter(trainable)), zero_grad, train
    try:
        yield
    finally:
        del model.parameters, model.zero_grad, model.train
