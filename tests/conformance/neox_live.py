#!/usr/bin/env python3
"""dpo.h against transformers' GPTNeoXForCausalLM, at Pythia-70m's size, on real text.

The model has random weights of a trained model's scale, is saved by save_pretrained, and comes in
through convert.py. The truth is transformers in fp64 (its rotary tables stay fp32); its own fp32 is
measured beside ours. Tolerances are relative to each tensor's largest value: 1e-5 for logits and
5e-5 for gradients, some ten times what a sum in another order moves them.
"""
import itertools
import pathlib
import sys
import tempfile

import library
from library import HH, Model, NEOX_TOKENIZER, distance, worst

import numpy as np
import torch
from torch.nn import functional as F
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

LOGITS, GRADIENTS, LOGP = 1e-5, 5e-5, 1e-6
PYTHIA_70M = dict(num_hidden_layers=6, hidden_size=512, num_attention_heads=8, vocab_size=50304,
                  intermediate_size=2048, max_position_embeddings=2048)


def make_neox(seed, **sizes):
    """A model in fp32 with attention far from uniform, logits of a few nats, and norms and biases
    that matter. sdpa, since the eager attention computes its softmax in fp32 whatever the model."""
    config = GPTNeoXConfig(**{"rotary_pct": 0.25, "bos_token_id": 0, "eos_token_id": 0, **sizes})
    config._attn_implementation = "sdpa"
    model = GPTNeoXForCausalLM(config).float().eval()
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=random)
            if p.dim() == 1:
                p.copy_((1 if name.endswith("norm.weight") else 0) + 0.2 * noise)
            elif "embed_in" in name:
                p.copy_(0.5 * noise)
            else:
                gain = {"query_key_value": 1.5, "lm_head": 2.0}.get(name.split(".")[-2], 1.0)
                p.copy_(gain / p.shape[1] ** 0.5 * noise)
    return model


def named(model, of):
    """{name in files: of(parameter)}."""
    return {"embed_out.weight" if name == "lm_head.weight" else name: of(p)
            for name, p in model.named_parameters()}


def backward(model, run, batch, dlogp):
    """Every branch in a pass of its own; leaves the gradients of the sum of dlogp * logp in the
    parameters and returns the logps."""
    logps = []
    model.zero_grad(set_to_none=True)
    for (tokens, first), coefficient in zip(batch, dlogp):
        tokens = torch.tensor(tokens)
        rows = run(tokens)[first - 1:-1]
        logp = -F.cross_entropy(rows, tokens[first:], reduction="sum")
        (coefficient * logp).backward()
        logps.append(logp.item())
    return logps


def whole(batch):
    """Our batch's branches as [(prompt and branch, its first scored token)]."""
    return [(prompt + branch, len(prompt) + first) for prompt, branches in batch
            for branch, first in branches]


def compare(checks, ours, model, run, names, document, pair):
    """ours: a library.Model of the same weights; run: tokens -> logits [T, V]; names: its
    parameters under the names they have in files. The model ends up in fp64."""
    batches = {
        f"a document of {len(document)} tokens": ([([], [(document, 1)])],
                                                  [-1 / (len(document) - 1)]),
        f"a pair of {len(pair[1])} and {len(pair[2])} tokens behind one prompt of {len(pair[0])}":
            ([(pair[0], [(pair[1], 0), (pair[2], 0)])], [0.05, -0.03])}
    tokens = torch.tensor(document)
    with torch.no_grad():
        single = run(tokens).numpy()
    singles = {}
    for what, (batch, dlogp) in batches.items():
        logps = backward(model, run, whole(batch), dlogp)
        singles[what] = logps, names(model, lambda p: p.grad.numpy().copy())
    model.double()
    with torch.no_grad():
        truth = run(tokens).numpy()
    checks.near(f"logits at all {len(document)} positions, up to {np.abs(truth).max():.1f}",
                distance(ours.logits(document), truth), LOGITS,
                f"fp32 torch {distance(single, truth):.1e}")
    for what, (batch, dlogp) in batches.items():
        logps = backward(model, run, whole(batch), dlogp)
        grads = names(model, lambda p: p.grad.numpy())
        our_logps, our_grads = ours.gradients(batch, dlogp)
        checks.near(f"{what}: logp, relative", distance(our_logps, logps), LOGP,
                    f"fp32 torch {distance(singles[what][0], logps):.1e}; logp "
                    + ", ".join(f"{logp:.1f}" for logp in logps))
        apart, name = worst(our_grads, grads)
        theirs, their_name = worst(singles[what][1], grads)
        checks.near(f"{what}: all {len(grads)} gradients, worst {name}", apart, GRADIENTS,
                    f"fp32 torch {theirs:.1e} ({their_name})")


def real_text(encode, length):
    """Token ids of HH: a document of that length, and a pair whose prompt is not short."""
    pairs = [[encode(pair[part]) for part in ("prompt", "chosen", "rejected")]
             for pair in itertools.islice(library.hh_pairs(), 200)]
    document = [token for prompt, chosen, _ in pairs[:100] for token in prompt + chosen]
    return document[:length], next(pair for pair in pairs if len(pair[0]) > 150 and
                                   min(len(pair[1]), len(pair[2])) > 30)


def random_text(vocab_size, length):
    """For want of real text: ids as frequent as words are, the pair's beginning alike."""
    ids = np.minimum(np.random.RandomState(7).zipf(1.3, length + 300), vocab_size) - 1
    ids = ids.tolist()
    return ids[:length], (ids[length:-130], ids[-130:-60], ids[-60:])


def main():
    checks = library.Checks("GPT-NeoX at Pythia-70m's size against transformers")
    model = make_neox(70, **PYTHIA_70M)
    real = HH.exists() and NEOX_TOKENIZER.exists()
    with tempfile.TemporaryDirectory() as work:
        folder, path = pathlib.Path(work, "hf"), pathlib.Path(work, "model.bin")
        model.save_pretrained(folder)
        if real:
            library.copy_tokenizer(NEOX_TOKENIZER, folder)
        else:
            checks.skip(f"real text: no {HH} or {NEOX_TOKENIZER}; random tokens instead")
        checks.heading(library.convert("import", folder, path).strip())
        ours = Model(path)
        document, pair = real_text(ours.encode, 768) if real else random_text(50257, 768)
        compare(checks, ours, model, lambda tokens: model(tokens[None], use_cache=False).logits[0],
                named, document, pair)
        ours.close()
    return checks.done()


if __name__ == "__main__":
    sys.exit(main())
