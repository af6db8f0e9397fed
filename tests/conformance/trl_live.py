#!/usr/bin/env python3
"""dpo.h's DPO against TRL's DPOTrainer, update by update.

The same model, the same pairs in the same order and batches, AdamW at the same constant rate, fp32,
clipping at norm 1, no dropout, no gradient checkpointing; pairs come round several times, so
that the margins grow. TRL tokenises prompt and answer jointly and appends the end token as text;
dpo.h tokenises them apart and appends the id: only pairs that need no truncation take part, and
that both sides have the same ids is a check of its own.

Tolerance: 1e-3 nats at every update, for the loss, rewards, margins and log-probabilities. Both
sides differ by fp32 rounding: some 1e-5 nats in a sum of log-probabilities of 300 nats, a tenth of
that in rewards. AdamW divides by the gradient's own size, so it turns rounding in near-zero
gradients into whole updates, and the runs drift apart slowly. A wrong sign, scale or order of
anything is off by more than 1e-2 within a few updates. Accuracies must be the same, but for pairs
whose margin is itself below the tolerance (before the first update all are 0).
"""
import csv
import json
import os
import pathlib
import random
import shutil
import sys
import tempfile

import library
from library import COLUMNS, HH, Model, NEOX_TOKENIZER, distance
from neox_live import make_neox

import datasets
import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
from trl import DPOConfig, DPOTrainer

NATS, NORM = 1e-3, 1e-3
RATE = 1e-4
END = "<|endoftext|>"
SIZES = dict(num_hidden_layers=4, hidden_size=128, num_attention_heads=4, intermediate_size=512,
             max_position_embeddings=1024)


# --- the pairs -----------------------------------------------------------------------------------

def generated_pairs():
    """HH-like pairs, for want of HH: dull, but every one another."""
    words = "the a cat dog house tree river stone cloud walks sees finds holds under near".split()
    generator = random.Random(5)

    def say(n):
        return " ".join(generator.choice(words) for _ in range(n))
    while True:
        turns = "".join(f"\n\nHuman: {say(generator.randrange(3, 12))}?\n\nAssistant:"
                        for _ in range(generator.randrange(1, 3)))
        yield {"prompt": turns, "chosen": f" {say(generator.randrange(2, 20))}.",
               "rejected": f" {say(generator.randrange(2, 20))}!"}


def choose_pairs(n, tokenizer, longest):
    """The first n pairs that fit, without ties."""
    chosen = []
    for pair in library.hh_pairs() if HH.exists() else generated_pairs():
        lengths = [len(tokenizer(pair["prompt"] + pair[part])["input_ids"])
                   for part in ("chosen", "rejected")]
        if max(lengths) < longest and pair["chosen"] != pair["rejected"]:
            chosen.append(pair)
        if len(chosen) == n:
            return chosen
    sys.exit(f"{HH} has too few short pairs")


# --- TRL -----------------------------------------------------------------------------------------

def trl_run(folder, work, pairs, batch, steps, loss, beta, rate, lora=None):
    """TRL's log, a row per update, and its token ids as [(prompt, chosen, rejected)]. With a
    LoraConfig it trains an adapter, which is in work / "before" and then in work / "after"."""
    def model():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32,
                                                    attn_implementation="sdpa")
    settings = DPOConfig(
        output_dir=str(work / "trl"), loss_type=[loss], beta=beta, learning_rate=rate,
        lr_scheduler_type="constant", warmup_steps=0, optim="adamw_torch", weight_decay=0.0,
        max_grad_norm=1.0, per_device_train_batch_size=batch, gradient_accumulation_steps=1,
        max_steps=steps, train_sampling_strategy="sequential", max_length=1024, use_cpu=True,
        bf16=False, gradient_checkpointing=False, disable_dropout=True, logging_steps=1,
        logging_first_step=True, report_to="none", save_strategy="no", disable_tqdm=True)
    trainer = DPOTrainer(model=model(), ref_model=None if lora else model(), args=settings,
                         peft_config=lora, train_dataset=datasets.Dataset.from_list(pairs),
                         processing_class=AutoTokenizer.from_pretrained(folder))
    trainer.remove_callback(PrinterCallback)
    if lora:
        trainer.model.save_pretrained(work / "before")
    trainer.train()
    if lora:
        trainer.model.save_pretrained(work / "after")
    ids = [(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"])
           for row in trainer.train_dataset]
    return [row for row in trainer.state.log_history if "loss" in row], ids


# --- dpo.h ---------------------------------------------------------------------------------------

def our_run(path, tokens, batch, steps, loss, beta, rate, adapter=None):
    """The same through the library, in the order of the pairs."""
    model = Model(path, adapter)
    examples = [(prompt, [(chosen, 0), (rejected, 0)]) for prompt, chosen, rejected in tokens]
    rows, reference = [], []
    for start in range(0, len(examples), batch):
        reference.append(model.forward(examples[start:start + batch])[0])
    model.start_training()
    for step in range(steps):
        at = step % len(reference)
        row = model.dpo_step(examples[at * batch:(at + 1) * batch], reference[at], loss, beta, rate,
                             1.0)
        row["close"] = float(np.mean(np.abs(row["margins"]) < NATS))
        rows.append(row)
    model.close()
    return rows


def cli_run(path, work, pairs, steps, beta, rate, *options):
    """The same through the train program, which shuffles: every update takes all pairs, so that no
    order is left. Its log.csv."""
    file, out = work / "pairs.jsonl", work / "run"
    write_pairs(file, pairs)
    library.train("dpo", "-m", path, "-d", file, "-o", out, "--batch-size", len(pairs),
                  "--max-steps", steps, "--beta", beta, "--learning-rate", rate,
                  "--lr-scheduler-type", "constant", "--warmup-ratio", 0, "--max-grad-norm", 1,
                  "--max-length", 1024, *options)
    with open(out / "log.csv", newline="", encoding="utf-8") as log:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(log)]


def write_pairs(path, pairs):
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), "utf-8")


# --- comparison ----------------------------------------------------------------------------------

def compare(checks, ours, theirs, names=(*COLUMNS, "grad_norm")):
    checks.expect(len(ours) == len(theirs), f"{len(theirs)} updates")
    for name in names:
        mine, other = [row[name] for row in ours], [row[name] for row in theirs]
        apart = distance(mine, other, relative=False)
        span = f"TRL's {other[0]:.4f} .. {other[-1]:.4f}"
        if name == "grad_norm":
            checks.near("grad_norm, of the largest", distance(mine, other), NORM, span)
        elif name == "rewards/accuracies":
            beyond = max(abs(a - b) - row.get("close", 0.0) for row, a, b in zip(ours, mine, other))
            checks.expect(beyond < 1e-6, f"rewards/accuracies: {apart:.1e} apart, {span}")
        else:
            checks.near(name, apart, NATS, span)


def make_model(work, real):
    """A model's directory and model file. Its tokenizer is GPT-NeoX's, or dpo.h's own, which takes
    a byte for a token."""
    work.mkdir()
    folder, path = work / "hf", work / "model.bin"
    if real:
        make_neox(20, vocab_size=50304, **SIZES).save_pretrained(folder)
        library.copy_tokenizer(NEOX_TOKENIZER, folder)
        (folder / "tokenizer_config.json").write_text(json.dumps({
            "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END}))
    else:
        library.train("init", "--preset", "tiny", "-o", work / "bytes.bin")
        library.convert("export", work / "bytes.bin", work / "bytes")
        make_neox(20, vocab_size=257, eos_token_id=256, **SIZES).save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(work / "bytes" / name, folder / name)
    library.convert("import", folder, path)
    return folder, path


def check_runs(checks, work, real, runs, longest):
    """runs: (loss, updates, pairs, beta); four pairs an update. Then the train program."""
    folder, path = make_model(work, real)
    pairs = choose_pairs(20, AutoTokenizer.from_pretrained(folder), longest)
    write_pairs(work / "all.jsonl", pairs)
    model = Model(path)
    tokens = model.load_pairs(work / "all.jsonl", 1024, 512)
    model.close()
    for loss, steps, n, beta in runs:
        checks.heading(f"{loss}, {steps} updates of 4 of {n} pairs, beta {beta}, rate {RATE}")
        theirs, ids = trl_run(folder, work, pairs[:n], 4, steps, loss, beta, RATE)
        n_tokens = sum(len(part) for pair in ids for part in pair)
        checks.expect(ids == tokens[:n], f"{n_tokens} token ids are the same")
        compare(checks, our_run(path, tokens[:n], 4, steps, loss, beta, RATE), theirs)
    if not real:
        checks.heading("the train program, sigmoid, 10 updates of the same 8 pairs")
        theirs, _ = trl_run(folder, work, pairs[:8], 8, 10, "sigmoid", 0.1, RATE)
        compare(checks, cli_run(path, work, pairs[:8], 10, 0.1, RATE), theirs)


def main():
    checks = library.Checks("DPO against TRL's DPOTrainer")
    if not HH.exists():
        checks.skip(f"HH's pairs: no {HH}; generated ones instead")
    sigmoid = ("sigmoid", 20, 20, 0.1)
    others = [("ipo", 10, 20, 0.1), ("hinge", 10, 8, 0.1)]
    with tempfile.TemporaryDirectory() as work:
        work = pathlib.Path(work)
        os.environ["HF_HOME"] = str(work / "cache")
        if NEOX_TOKENIZER.exists():
            checks.heading("with GPT-NeoX's tokenizer")
            check_runs(checks, work / "real", True, [sigmoid], 100)
        else:
            checks.skip(f"a real tokenizer: no {NEOX_TOKENIZER}")
            others.insert(0, sigmoid)
        checks.heading("with a token for every byte")
        check_runs(checks, work / "bytes", False, others, 400)
    return checks.done()


if __name__ == "__main__":
    sys.exit(main())
