"""Pretrains the demo's base model: a small Mistral that speaks, listens and looks back, but has never seen a summary of a talk.

usage: python data/demo/pretrain.py tokenizer TEXT_DIR MTS_TRAIN.csv    (CPU, a minute: trains the tokenizer into data/demo/base)
       python data/demo/pretrain.py train TEXT_DIR MTS_TRAIN.csv MINUTES OUT_DIR    (one CUDA GPU; model shards and log to OUT_DIR)
       python data/demo/pretrain.py merge OUT_DIR    (shards to data/demo/base, loss curve beside it)

TEXT_DIR: shards <source>-NN.jsonl.gz of lines {"text": ...} (sources and licences in README.md). MTS_TRAIN.csv: MTS-Dialog's
training file; its dialogues and notes are separate documents.

Most documents are made on the fly by generate.py from seeds of their own: talks alone, notes alone, and talks followed by
something that looks back at them: the same visit told in other words, the doctor reading back what was said, questions with
short answers, a form, a later visit that recalls the first. Never a talk and its note in one document, never a talk of the
validation or test split. Documents are packed whole into rows of 512 tokens; none sees another.
"""

import csv
import gzip
import json
import multiprocessing
import random
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import generate  # noqa: E402

HERE = Path(__file__).parent
SEED = 7
VOCABULARY = 4096
ROW = 512  # tokens in a packed row
BATCH = 256  # rows in an optimizer step
PUBLIC_SHARE = 0.15  # of all rows; the rest is generated
PUBLIC_WEIGHTS = {
    "personachat-synthetic": 3,
    "qmsum-meetings": 3,
    "taskmaster3": 2,
    "medquad": 3,
    "openstax-anatomy": 2,
    "plays": 1,
    "books": 2,
    "mts": 4,
}
ARCHITECTURE = dict(
    vocab_size=VOCABULARY,
    hidden_size=320,
    intermediate_size=896,
    num_hidden_layers=8,
    num_attention_heads=10,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=4096,
    rope_theta=10000.0,
    sliding_window=None,
    tie_word_embeddings=True,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)

# ---------------------------------------------------------------- documents

HELD_OUT = {row["dialogue"].lower() for split in ("validation", "test") for row in generate.rows(split)}


def talk(s, v) -> str:
    """A talk that is in neither the validation nor the test split."""
    while (text := generate.talk(s, v)).lower() in HELD_OUT:
        pass
    return text


def read_back(s, v) -> str:
    """The doctor repeats what was said, in the second person."""
    parts = [generate.KINDS[name][3](slots) for name, slots in v["facts"]]
    start = s.pick(
        [
            "Let me read that back.",
            "So, just to be sure.",
            "Let me see if I got that.",
            "I will repeat what I heard.",
            "To sum up what you told me.",
        ]
    )
    if s.chance(0.5):
        said = " ".join(f"{generate.capital(part)}." for part in parts)
    else:
        said = f"{generate.capital(generate.listed(parts))}."
    return f"\nDoctor: {start} {said}\nPatient: {s.pick(['Yes.', 'That is right.', 'Exactly.', 'Correct.'])}"


def questions(s, v) -> str:
    """Questions about the talk with short answers, in any order."""
    pairs = [pair for name, slots in v["facts"] for pair in generate.KINDS[name][4](slots)]
    chosen = s.rng.sample(pairs, min(len(pairs), s.rng.randint(1, 5)))
    return "".join(f"\nQuestion: {question}\nAnswer: {answer}" for question, answer in chosen)


def form(s, v) -> str:
    """A form with a line for everything that can be asked, in order."""
    pairs = [pair for name, slots in v["facts"] for pair in generate.KINDS[name][4](slots)]
    return f"\n{s.pick(['Form', 'Intake form', 'Record', 'Chart entries'])}" + "".join(
        f"\n- {q.rstrip('?')}: {a}" for q, a in pairs
    )


def recall(s, v) -> str:
    """A later visit: the doctor remembers the first, the patient says whether it is still so."""
    lines = []
    for name, slots in v["facts"]:
        start = s.pick(
            [
                "Last time you told me that",
                "In my notes from the last visit,",
                "I remember that",
                "When you were here before, you said",
            ]
        )
        lines.append(
            f"Doctor: {start} {generate.KINDS[name][3](slots)}.\nPatient: {s.pick(['Yes, I said that.', 'True.', 'That has not changed.', 'Right.'])}"
        )
    return f"\n\n{s.pick(['Two weeks later', 'A month later', 'The next visit', 'The following week'])}\n" + "\n".join(
        lines
    )


def glossary(s) -> str:
    """Everyday and medical words for the same thing, and numbers in words and digits."""
    pairs = [
        (k, v)
        for table in (
            generate.DISEASES,
            generate.CAUSES,
            generate.REACTIONS,
            generate.FREQUENCIES,
            generate.VACCINES,
        )
        for k, v in table.items()
    ]
    pairs += [(k.format(side="left"), v.format(side="left")) for k, v in generate.SURGERIES.items()]
    pairs += [
        (generate.spell(n), str(n))
        for n in s.rng.sample(range(1, 100), 15) + s.rng.sample(generate.DOSES, 8) + s.rng.sample(range(1970, 2025), 15)
    ]
    chosen = s.rng.sample(pairs, 24)
    return "\n".join(f"{a} = {b}" if s.chance(0.5) else f"{b} = {a}" for a, b in chosen)


def induction(s) -> str:
    """A list of names, drugs and numbers, then the same list again."""
    items = [
        s.pick([generate.DRUGS, generate.JOBS, generate.SURNAMES, generate.ALLERGENS])
        for _ in range(s.rng.randint(8, 24))
    ]
    words = [s.pick(pool) if s.chance(0.7) else str(s.rng.randint(1, 999)) for pool in items]
    return f"{', '.join(words)}\n{', '.join(words)}"


def wide_visit(s) -> dict:
    """Facts of several sections in one visit, so that looking back means searching."""
    visits = [generate.visit(s) for _ in range(s.rng.randint(1, 3))]
    facts = [fact for v in visits for fact in v["facts"]]
    return {"section": visits[0]["section"], "facts": facts}


def notes(s) -> str:
    """A note of several sections; its talk is not in the document."""
    visits = [generate.visit(s) for _ in range(s.rng.randint(1, 5))]
    return "\n".join(f"{v['section']}: {generate.note(v)}" if s.chance(0.7) else generate.note(v) for v in visits)


def document(s) -> str:
    kind = s.rng.random()
    if kind < 0.10:
        return notes(s)
    if kind < 0.13:
        return glossary(s)
    if kind < 0.16:
        return induction(s)
    v = generate.visit(s) if s.chance(0.5) else wide_visit(s)
    if not v["facts"] or kind < 0.24:
        return talk(s, v)
    first = talk(s, v)
    if kind < 0.40:
        return f"{first}\n\n{talk(s, v)}"
    looks_back = s.rng.choices([read_back, questions, form, recall], [4, 3, 3, 3], k=s.rng.choice([1, 1, 2]))
    return first + "".join(look(s, v) for look in looks_back)


def public_documents(folder: Path, mts: Path, log=print) -> dict[str, list[str]]:
    """{source: texts}; MTS-Dialog's dialogues and notes are separate texts, shuffled apart."""
    texts = {}
    for path in sorted(folder.glob("*.jsonl.gz")):
        source = next((name for name in PUBLIC_WEIGHTS if path.name.startswith(name)), None)
        if source is None:
            raise SystemExit(f"{path}: unknown source; a name begins with one of {', '.join(PUBLIC_WEIGHTS)}")
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            texts.setdefault(source, []).extend(json.loads(line)["text"] for line in lines)
    with open(mts, encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    texts["mts"] = [row[c].replace("\r\n", "\n").strip() for c in ("dialogue", "section_text") for row in table]
    log({source: len(found) for source, found in texts.items()})
    return texts


# ---------------------------------------------------------------- tokens


def train_tokenizer(folder: Path, mts: Path):
    """Byte-level BPE, digits one by one, <unk> <s> </s> at 0, 1, 2 as in Mistral's own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    s = generate.Speech(random.Random(SEED), "pretrain")
    texts = [document(s) for _ in range(60000)]
    for found in public_documents(folder, mts).values():
        texts += random.Random(SEED).sample(found, min(len(found), 1200))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )
    fast.save_pretrained(HERE / "base")


def pack(documents: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """First-fit packing, longest first. Returns token ids and positions (restarting at every document), both (rows, ROW) uint16."""
    rows, free = [], []
    for ids in sorted(documents, key=len, reverse=True):
        place = next((i for i in range(max(0, len(rows) - 40), len(rows)) if free[i] >= len(ids)), None)
        if place is None:
            place = len(rows)
            rows.append([])
            free.append(ROW)
        rows[place].append(ids)
        free[place] -= len(ids)
    tokens, positions = np.zeros((len(rows), ROW), np.uint16), np.zeros((len(rows), ROW), np.uint16)
    for i, row in enumerate(rows):
        start = 0
        for ids in row:
            tokens[i, start : start + len(ids)] = ids
            positions[i, start : start + len(ids)] = np.arange(len(ids))
            start += len(ids)
    return tokens, positions


def _generated(number: int) -> tuple[np.ndarray, np.ndarray]:
    s = generate.Speech(random.Random(f"pretrain-{SEED}-{number}"), "pretrain")
    return pack(_encode([document(s) for _ in range(1500)]))


def _encode(texts: list[str]) -> list[list[int]]:
    tokenizer = _encode.__dict__.setdefault("tokenizer", None)
    if tokenizer is None:
        from tokenizers import Tokenizer

        tokenizer = _encode.tokenizer = Tokenizer.from_file(str(HERE / "base" / "tokenizer.json"))
    pieces = []
    for encoded in tokenizer.encode_batch(texts, add_special_tokens=False):
        ids = [1, *encoded.ids, 2]
        pieces += [ids[i : i + ROW] for i in range(0, len(ids), ROW)]
    return [p for p in pieces if len(p) > 8]


def public_rows(folder: Path, mts: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All public text packed, and the probability of drawing each row, so that sources have their weights."""
    tokens, positions, chances = [], [], []
    for source, texts in public_documents(folder, mts).items():
        t, p = pack(_encode(texts))
        tokens.append(t), positions.append(p)
        chances.append(np.full(len(t), PUBLIC_WEIGHTS[source] / len(t)))
    chances = np.concatenate(chances)
    return np.concatenate(tokens), np.concatenate(positions), chances / chances.sum()


# ---------------------------------------------------------------- training


def build_model():
    import torch
    from transformers import AttentionInterface, MistralConfig, MistralForCausalLM

    AttentionInterface.register("documents", _document_attention)
    torch.manual_seed(SEED)
    return MistralForCausalLM(MistralConfig(**ARCHITECTURE, attn_implementation="documents", initializer_range=0.02))


def _document_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention(query, key, value, block_mask=attention_mask, scale=scaling, enable_gqa=True).transpose(
        1, 2
    ), None


def learning_rate(share: float) -> float:
    """Warm-up over the first 2% of the time, constant, linear to zero over the last 35%."""
    return 3e-3 * min(1.0, share / 0.02, max(0.0, (1 - share) / 0.35))


def train(folder: Path, mts: Path, minutes: float, out: Path):
    import torch
    import torch.nn.functional as F
    from torch.nn.attention.flex_attention import create_block_mask

    out.mkdir(parents=True, exist_ok=True)
    pool = multiprocessing.get_context("fork").Pool(12)
    chunks = pool.imap_unordered(_generated, range(10**9))
    public_tokens, public_positions, chances = public_rows(folder, mts)
    rng, device = np.random.default_rng(SEED), torch.device("cuda")
    torch.set_float32_matmul_precision("high")
    model = build_model().to(device)
    n_public = round(PUBLIC_SHARE * BATCH)
    document_ids = torch.zeros(BATCH, ROW, dtype=torch.int32, device=device)

    def same_document(b, h, q, k):
        return (q >= k) & (document_ids[b, q] == document_ids[b, k])

    make_mask = torch.compile(create_block_mask)

    def loss_of(ids, positions, mask):
        hidden = model.model(
            input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False
        ).last_hidden_state
        logits = model.lm_head(hidden[:, :-1])
        targets = torch.where(positions[:, 1:] == 0, -100, ids[:, 1:])
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-100)

    loss_of = torch.compile(loss_of, dynamic=False)
    decay = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
        lr=0.0,
        betas=(0.9, 0.95),
        fused=True,
    )
    buffer_t, buffer_p, step, seen, start, log = [], [], 0, 0, None, []
    have = 0
    while True:
        while have < BATCH - n_public:
            t, p = next(chunks)
            buffer_t.append(t), buffer_p.append(p)
            have += len(t)
        t, p = np.concatenate(buffer_t), np.concatenate(buffer_p)
        drawn = rng.choice(len(chances), n_public, p=chances)
        ids = np.concatenate([t[: BATCH - n_public], public_tokens[drawn]]).astype(np.int64)
        positions = np.concatenate([p[: BATCH - n_public], public_positions[drawn]]).astype(np.int64)
        buffer_t, buffer_p = [t[BATCH - n_public :]], [p[BATCH - n_public :]]
        have = len(buffer_t[0])
        ids, positions = (torch.from_numpy(a).pin_memory().to(device, non_blocking=True) for a in (ids, positions))
        document_ids.copy_((positions == 0).cumsum(1))
        mask = make_mask(same_document, BATCH, None, ROW, ROW, device=device)
        if step == 3:  # compiled and warm
            torch.cuda.synchronize()
            start = time.time()
        share = (time.time() - start) / (60 * minutes) if start else 0.0
        if share >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(max(share, 0.002))
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = loss_of(ids, positions, mask)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step, seen = step + 1, seen + int(BATCH * ROW)
        if step % 50 == 0:
            elapsed = time.time() - start
            log.append(
                {
                    "step": step,
                    "tokens": seen,
                    "seconds": round(elapsed, 1),
                    "loss": round(loss.item(), 4),
                    "lr": round(optimizer.param_groups[0]["lr"], 6),
                }
            )
            if step % 500 == 0:
                print(json.dumps(log[-1]), flush=True)
    pool.terminate()
    model.to(torch.bfloat16).save_pretrained(out, max_shard_size="12MB")
    about = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "minutes": minutes,
        "seed": SEED,
        "batch_tokens": BATCH * ROW,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    (out / "pretrain_log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [about, *log]), encoding="utf-8")
    print(json.dumps({**about, **log[-1]}))


def merge(out: Path):
    """One safetensors file and config.json from the shards; the loss curve from the log."""
    import matplotlib.pyplot as plt
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16, attn_implementation="sdpa")
    model.generation_config.pad_token_id = 0
    model.save_pretrained(HERE / "base")
    about, *log = [json.loads(line) for line in (out / "pretrain_log.jsonl").read_text(encoding="utf-8").splitlines()]
    (HERE / "pretrain_log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [about, *log]), encoding="utf-8")
    fig, axis = plt.subplots(figsize=(7, 3), layout="constrained")
    axis.plot([row["tokens"] / 1e6 for row in log], [row["loss"] for row in log], color="#2b6ca3", lw=1)
    axis.set(
        xlabel="million tokens (packed rows, padding included)",
        ylabel="loss (nats a token)",
        title=f"Pretraining the demo's base, {about['gpu']}",
        ylim=(0, 4),
    )
    axis.spines[["top", "right"]].set_visible(False)
    fig.savefig(HERE / "pretrain_loss.png", dpi=120)


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    if command == "tokenizer":
        train_tokenizer(Path(arguments[0]), Path(arguments[1]))
    elif command == "train":
        train(Path(arguments[0]), Path(arguments[1]), float(arguments[2]), Path(arguments[3]))
    else:
        merge(Path(arguments[0]))
