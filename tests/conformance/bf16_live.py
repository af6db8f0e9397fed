#!/usr/bin/env python3
"""dpo.h's bf16 against its fp32, and against PyTorch's bf16.

Gradients of a pair's loss, a GPT-NeoX (transformers) and a BTLM (../btlm_torch.py), both with
weights that bf16 holds exactly, so that only the computation differs. The truth is dpo.h in fp32,
which neox_live.py and btlm_live.py hold to PyTorch's fp64. For every tensor, in bf16:

  - the gradient has the truth's direction (cosine above 0.999) and length (within 2 %);
  - it is no further from the truth than PyTorch's, of the same model in bf16: dpo.h carries the
    residual stream and the gradients of activations in fp32, PyTorch rounds them to bf16 as well.

The biases of keys have no gradient but rounding, since softmax does not see what all scores of a
row have in common; they are a third of a tensor with the biases of queries and values, which do
have one, so that no tensor needs to be left out.

PyTorch is given its best: logits widened before the softmax, rotary tables in fp32, and BTLM's
text no longer than 256 tokens, since its ALiBi computes distances in bf16, which skips numbers
above 256.

Then training. A small model learns to read a little by SFT, and is trained by 50 updates of DPO in
fp32, in bf16, and in fp32 with the same pairs in another order. On held-out pairs the margins of
bf16 and fp32 correlate above 0.99, and disagree about which answer is better for no more pairs
than the two orders do: the choice of precision matters less than one that nobody thinks about. The
same with an adapter instead of full fine-tuning.
"""
import csv
import pathlib
import sys
import tempfile

import library
from library import GPT2_TOKENIZER, HH, Model, NEOX_TOKENIZER
from btlm_live import CONFIG, make_btlm, save_btlm
from neox_live import backward, make_neox, named, random_text, real_text, whole
from trl_live import generated_pairs, write_pairs

import numpy as np
import torch

SIZES = dict(num_hidden_layers=4, hidden_size=256, num_attention_heads=4, intermediate_size=1024,
             max_position_embeddings=1024, vocab_size=50304)
COSINE, LENGTH, CORRELATION = 0.999, 0.02, 0.99
LENGTHS = ["--max-length", 192, "--max-prompt-length", 96]
TRAINED = {         # (what, options of `train dpo`)
    "full fine-tuning": ["--learning-rate", 2e-4],
    "an adapter": ["--lora", "--learning-rate", 1e-3]}


# --- gradients -----------------------------------------------------------------------------------

def import_model(name, work):
    """A model whose weights are bf16's, in fp32, and its file."""
    folder, path = work / name, work / f"{name}.bin"
    model = make_neox(41, **SIZES) if name == "GPT-NeoX" else make_btlm(42, CONFIG)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.bfloat16())
    if name == "GPT-NeoX":
        model.save_pretrained(folder)
    else:
        save_btlm(model, CONFIG, folder)
    tokenizer = NEOX_TOKENIZER if name == "GPT-NeoX" else GPT2_TOKENIZER
    if tokenizer.exists():
        library.copy_tokenizer(tokenizer, folder)
    library.convert("import", folder, path)
    return model, path


def torch_gradients(name, model, batch, dlogp):
    """Of the model in bf16."""
    if name == "GPT-NeoX":          # not the buffers: those are the rotary tables
        for p in model.parameters():
            p.data = p.data.bfloat16()
        backward(model, lambda ids: model(ids[None], use_cache=False).logits[0].float(), batch,
                 dlogp)
        return named(model, lambda p: p.grad.float().numpy())
    model.bfloat16()
    backward(model, lambda ids: model(ids).float(), batch, dlogp)
    return {key: p.grad.float().numpy() for key, p in model.named_parameters()}


def our_gradients(path, batch, dlogp, dtype):
    model = Model(path, dtype=dtype)
    logp, grads = model.gradients(batch, dlogp)
    grads = {key: value.astype(np.float64) for key, value in grads.items()}
    model.close()
    return logp, grads


def check_gradients(checks, name, work):
    model, path = import_model(name, work)
    if HH.exists() and (NEOX_TOKENIZER if name == "GPT-NeoX" else GPT2_TOKENIZER).exists():
        ours = Model(path)
        _, pair = real_text(ours.encode, 2)
        ours.close()
    else:
        checks.skip("real text: no HH or no tokenizer; random tokens instead")
        _, pair = random_text(50257, 2)
    prompt, chosen, rejected = pair
    checks.heading(f"{name}, gradients of a pair of {len(chosen)} and {len(rejected)} tokens "
                   f"behind one prompt of {len(prompt)}")
    batch, dlogp = [(prompt, [(chosen, 0), (rejected, 0)])], [0.05, -0.03]
    (logp, truth), (half_logp, ours) = (our_gradients(path, batch, dlogp, dtype)
                                        for dtype in ("fp32", "bf16"))
    theirs = torch_gradients(name, model, whole(batch), dlogp)
    checks.expect(set(truth) == set(ours) == set(theirs), f"the same {len(truth)} tensors")
    apart = np.abs(half_logp - logp) / np.abs(logp)
    checks.near("logp, relative", float(apart.max()), 1e-3, f"logp {logp[0]:.1f}, {logp[1]:.1f}")
    rows = []
    for key, g in truth.items():
        length, mine = np.linalg.norm(g), np.linalg.norm(ours[key])
        rows.append((key, float((g * ours[key]).sum() / (length * mine)), float(mine / length - 1),
                     float(np.linalg.norm(ours[key] - g) / length),
                     float(np.linalg.norm(theirs[key] - g) / length)))
    key, cosine, *_ = min(rows, key=lambda row: row[1])
    checks.expect(cosine > COSINE, f"cosine with fp32's at least {cosine:.6f} (needed {COSINE}), "
                                   f"worst {key}")
    key, _, longer, *_ = max(rows, key=lambda row: abs(row[2]))
    checks.near(f"length against fp32's, worst {key}", abs(longer), LENGTH)
    key, _, _, mine, other = max(rows, key=lambda row: row[3] / row[4])
    checks.expect(all(row[3] <= row[4] for row in rows),
                  f"every tensor is nearer to fp32 than PyTorch's: at most {mine / other:.2f} of "
                  f"its distance, {key} ({mine:.1e}, PyTorch {other:.1e})")
    mine, other = (np.array([row[at] for row in rows]) for at in (3, 4))
    checks.heading(f"  distances from fp32: median {np.median(mine):.1e}, largest {mine.max():.1e};"
                   f" PyTorch median {np.median(other):.1e}, largest {other.max():.1e}")


# --- training ------------------------------------------------------------------------------------

def write_data(work):
    """Pairs to train on and pairs to judge by."""
    if HH.exists():
        return HH, HH.with_name("dev.jsonl")
    train, dev = work / "train.jsonl", work / "dev.jsonl"
    pairs = [pair for pair, _ in zip(generated_pairs(), range(800))]
    write_pairs(train, pairs[:400])
    write_pairs(dev, pairs[400:])
    return train, dev


def evaluate(*arguments):
    if not (library.PROJECT / "eval").exists():
        library.run("make", "-C", library.PROJECT, "eval")
    return library.run(library.PROJECT / "eval", *arguments)


def margins(base, data, out, dtype):
    """Of the run in that directory, by line of the data."""
    evaluate("prefs", "-m", out, "-r", base, "-d", data, "--dtype", dtype, *LENGTHS,
             "--out", out / "prefs.csv")
    with open(out / "prefs.csv", newline="", encoding="utf-8") as file:
        return {row["line"]: float(row["rewards/margins"]) for row in csv.DictReader(file)}


def check_training(checks, work, tokenizer):
    train, dev = write_data(work)
    library.train("init", "--preset", "pythia-14m", "-o", work / "new.bin",
                  *(["--tokenizer", tokenizer] if tokenizer else []))
    library.train("sft", "-m", work / "new.bin", "-d", train, "-o", work / "sft", "--limit", 800,
                  "--batch-size", 16, "--learning-rate", 1e-3, *LENGTHS)
    base = work / "sft" / "model.bin"
    for what, options in TRAINED.items():
        checks.heading(f"50 updates of DPO, {what}, rate {options[-1]:g}")
        run = {}
        for name, dtype, seed in (("fp32", "fp32", 0), ("other order", "fp32", 1),
                                  ("bf16", "bf16", 0)):
            out = work / f"{what}, {name}"
            library.train("dpo", "-m", base, "-d", train, "-o", out, "--limit", 400,
                          "--batch-size", 8, "--dtype", dtype, "--seed", seed, *LENGTHS, *options)
            run[name] = margins(base, dev, out, dtype)
        lines = list(run["fp32"])
        checks.expect(all(list(other) == lines for other in run.values()) and len(lines) >= 250,
                      f"the same {len(lines)} held-out pairs")
        fp32, other, half = (np.array([run[name][line] for line in lines])
                             for name in ("fp32", "other order", "bf16"))
        moved = float(np.abs(fp32).mean())
        checks.expect(moved > 0.05, f"training did something: margins of {moved:.2f} nats")
        correlation = float(np.corrcoef(fp32, half)[0, 1])
        checks.expect(correlation > CORRELATION,
                      f"margins of bf16 and fp32 correlate by {correlation:.6f} (needed "
                      f"{CORRELATION}), {np.abs(half - fp32).mean():.1e} apart on average; of the "
                      f"two orders, by {np.corrcoef(fp32, other)[0, 1]:.3f}, "
                      f"{np.abs(other - fp32).mean():.1e} apart")
        flips, usual = (int(((fp32 > 0) != (x > 0)).sum()) for x in (half, other))
        checks.expect(flips <= usual, f"their signs differ for {flips} pairs; of the two orders, "
                                      f"for {usual}")


def main():
    checks = library.Checks("bf16 against fp32 and PyTorch's bf16")
    with tempfile.TemporaryDirectory() as work:
        work = pathlib.Path(work)
        for name in ("GPT-NeoX", "BTLM"):
            check_gradients(checks, name, work)
        real = NEOX_TOKENIZER.exists()
        if not real:
            checks.skip(f"a real tokenizer: no {NEOX_TOKENIZER}; a token for every byte instead")
        if not HH.exists():
            checks.skip(f"HH's pairs: no {HH}; generated ones instead")
        check_training(checks, work, work / "GPT-NeoX.bin" if real else None)
    return checks.done()


if __name__ == "__main__":
    sys.exit(main())
