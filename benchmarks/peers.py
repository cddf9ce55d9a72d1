"""Training speed and memory of what a user would pick instead, on the model and rows of speed.py.

    python benchmarks/speed.py make-model FOLDER
    python benchmarks/speed.py rows ROWS.json
    python benchmarks/peers.py SETUP FOLDER ROWS.json      prints one JSON line; a process for each setup

SETUP: recipe1 | recipe2 | hf_padded | unsloth_padded | unsloth_packed_8k | unsloth_packed_16k |
unsloth_packed_16k_checkpointed. Needs a CUDA GPU with 80 GB or more for the largest; the unsloth setups also unsloth,
unsloth_zoo, trl <= 1.15, datasets < 5 and transformers 5.17, so give them their own environment. tok_s counts real
(not padding) prompt and summary tokens a second after 5 warm-up steps; peak_gib is allocated memory.
"""

import json
import os
import sys
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
import torch

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Stopwatch:
    """Times optimizer steps after `warmup`, with the GPU drained at both ends."""

    def __init__(self, warmup, steps):
        from transformers import TrainerCallback

        watch = self

        class Callback(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step == warmup:
                    torch.cuda.synchronize()
                    torch.cuda.reset_peak_memory_stats()
                    watch.start = time.time()
                if state.global_step == steps:
                    torch.cuda.synchronize()
                    watch.seconds = time.time() - watch.start

        self.callback = Callback()


def report(setup, tokens, rows, seconds):
    mean = sum(len(r["p"]) + len(r["s"]) for r in rows) / len(rows)
    print(
        json.dumps(
            {
                "setup": setup,
                "ours": False,
                "tok_s": round(tokens / seconds),
                "samples_s": round(tokens / mean / seconds, 2),
                "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
                "gpu": torch.cuda.get_device_name(),
                "torch": torch.__version__,
            }
        )
    )


def hf(
    setup,
    model_dir,
    rows,
    *,
    modules,
    rank,
    alpha,
    dropout,
    batch,
    accumulate,
    checkpointing,
    fp16,
    optim,
    steps,
    dtype,
    compute_dtype,
    double_quant,
    pad_to=None,
    completion_only=False,
):
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
    )
    reentrant = {"use_reentrant": True} if checkpointing else None
    model = AutoModelForCausalLM.from_pretrained(
        model_dir, quantization_config=quantization, device_map={"": 0}, dtype=dtype
    )
    model = prepare_model_for_kbit_training(
        model, use_gradient_checkpointing=checkpointing, gradient_checkpointing_kwargs=reentrant
    )
    model = get_peft_model(
        model, LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, task_type="CAUSAL_LM", target_modules=modules)
    )
    seen = []

    def collate(batch_rows):
        sequences = [(r["p"] + r["s"])[:pad_to] for r in batch_rows]
        seen.append(sum(map(len, sequences)))
        width = pad_to or max(map(len, sequences))
        ids = torch.zeros(len(sequences), width, dtype=torch.long)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for i, (sequence, r) in enumerate(zip(sequences, batch_rows, strict=True)):
            ids[i, : len(sequence)] = labels[i, : len(sequence)] = torch.tensor(sequence)
            mask[i, : len(sequence)] = 1
            if completion_only:
                labels[i, : len(r["p"])] = -100
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    watch = Stopwatch(5, steps)
    args = TrainingArguments(
        output_dir="peer_run",
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulate,
        gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs=reentrant,
        fp16=fp16,
        bf16=not fp16,
        optim=optim,
        max_steps=steps,
        learning_rate=3e-4,
        max_grad_norm=0.3,
        logging_steps=1000,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        dataloader_drop_last=True,
    )
    Trainer(model=model, args=args, train_dataset=rows, data_collator=collate, callbacks=[watch.callback]).train()
    report(setup, sum(seen[5 * accumulate : steps * accumulate]), rows, watch.seconds)


def unsloth(setup, model_dir, rows, *, checkpointing, batch, packing, steps=20, width=2048):
    import unsloth  # noqa: F401  (patches transformers, so it comes first)
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    from unsloth import FastLanguageModel

    model, tokenizer = FastLanguageModel.from_pretrained(
        model_dir, max_seq_length=width, dtype=torch.bfloat16, load_in_4bit=True, local_files_only=True
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=32,
        lora_alpha=64,
        lora_dropout=0,
        bias="none",
        target_modules=LINEAR,
        use_gradient_checkpointing=checkpointing,
        max_seq_length=width,
    )
    watch = Stopwatch(5, steps)
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        callbacks=[watch.callback],
        train_dataset=Dataset.from_list([{"input_ids": r["p"] + r["s"]} for r in rows]),
        args=SFTConfig(
            output_dir="peer_run",
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=1,
            max_steps=steps,
            learning_rate=3e-4,
            bf16=True,
            optim="adamw_8bit",
            packing=packing,
            max_length=width,
            logging_steps=1000,
            save_strategy="no",
            report_to="none",
            dataset_num_proc=1,
            dataloader_drop_last=True,
        ),
    )
    seen, collate = [], trainer.data_collator

    def counting(batch_rows):
        seen.append(sum(len(r["input_ids"]) for r in batch_rows))
        return collate(batch_rows)

    trainer.data_collator = counting
    trainer.train()
    report(setup, sum(seen[5:steps]), rows, watch.seconds)


SETUPS = {
    "recipe1": (
        hf,
        dict(
            modules=["q_proj", "v_proj"],
            rank=4,
            alpha=32,
            dropout=0.05,
            batch=4,
            accumulate=4,
            checkpointing=False,
            fp16=True,
            optim="adamw_torch",
            steps=12,
            dtype=torch.float16,
            compute_dtype=torch.float32,
            double_quant=False,
            pad_to=512,
        ),
    ),
    "recipe2": (
        hf,
        dict(
            modules=LINEAR + ["lm_head"],
            rank=32,
            alpha=64,
            dropout=0.1,
            batch=1,
            accumulate=3,
            checkpointing=True,
            fp16=True,
            optim="paged_adamw_32bit",
            steps=25,
            dtype=torch.float32,
            compute_dtype=torch.float16,
            double_quant=False,
        ),
    ),
    "hf_padded": (
        hf,
        dict(
            modules=LINEAR,
            rank=32,
            alpha=64,
            dropout=0.05,
            batch=8,
            accumulate=1,
            checkpointing=True,
            fp16=False,
            optim="adamw_torch_fused",
            steps=15,
            dtype=torch.bfloat16,
            compute_dtype=torch.bfloat16,
            double_quant=True,
            completion_only=True,
        ),
    ),
    "unsloth_padded": (unsloth, dict(checkpointing=False, batch=16, packing=False)),
    "unsloth_packed_8k": (unsloth, dict(checkpointing=False, batch=4, packing=True)),
    "unsloth_packed_16k": (unsloth, dict(checkpointing=False, batch=8, packing=True)),
    "unsloth_packed_16k_checkpointed": (unsloth, dict(checkpointing="unsloth", batch=8, packing=True)),
}

if __name__ == "__main__":
    setup, model_dir, path = sys.argv[1:]
    run, options = SETUPS[setup]
    with open(path, encoding="utf-8") as file:
        run(setup, model_dir, json.load(file), **options)
