#!/usr/bin/env python3
"""dpo.h's LoRA against PEFT, and DPO with LoRA against TRL's DPOTrainer.

  - PEFT's adapters, neither factor zero, come in through convert.py over a GPT-NeoX (transformers)
    and a BTLM (../btlm_torch.py with transformers' Conv1D, whose weights are transposed): logits
    and all gradients of A and B, measured as in neox_live.py, and no gradient for any other weight;
  - `train merge` gives the weights of PEFT's merge_and_unload, and a model that computes what the
    adapter did;
  - DPO as in trl_live.py, but with an adapter that TRL makes, so that both begin at the same A
    and B = 0, and at their reference, which for TRL is the model with its adapter switched off;
  - the adapter that was trained here is exported, loaded by PEFT and merged by both.

Tolerances: neox_live.py's and trl_live.py's; 1e-6 for merged weights, of the largest, that is a few
roundings of W + s B A. Of trained factors, AdamW moves each element by about its learning rate
however small its gradient is, rounding included, so they are compared as a whole: the distance
between the two changes, by the length of TRL's.
"""
import os
import pathlib
import sys
import tempfile
import warnings

import library
from library import GPT2_TOKENIZER, HH, Model, NEOX_TOKENIZER, distance, worst
from btlm_live import CONFIG, make_btlm, save_btlm
import btlm_torch
from neox_live import make_neox, random_text, real_text
import neox_live
import trl_live

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, pytorch_utils

SIZES = dict(num_hidden_layers=4, hidden_size=192, num_attention_heads=6, intermediate_size=768,
             max_position_embeddings=1024, vocab_size=50304)
LOGITS, MERGED, CHANGE = 1e-5, 1e-6, 1e-3
RATE, STEPS = 5e-4, 20
ADAPTERS = {
    "GPT-NeoX": [
        ("all-linear", dict(target_modules="all-linear")),
        ("query_key_value alone", dict(target_modules=["query_key_value"], r=5)),
        ("dense and dense_4h_to_h, rsLoRA",
         dict(target_modules=["dense", "dense_4h_to_h"], use_rslora=True))],
    "BTLM": [
        ("all-linear", dict(target_modules="all-linear")),
        ("c_attn alone", dict(target_modules=["c_attn"], r=5)),
        ("c_proj (of both) and c_fc2, rsLoRA",
         dict(target_modules=["c_proj", "c_fc2"], use_rslora=True))]}


# --- adapters that PEFT made ---------------------------------------------------------------------

def make_base(name):
    return make_neox(31, **SIZES) if name == "GPT-NeoX" else make_btlm(32, CONFIG)


def import_base(name, work):
    """The model's file; it has its real tokenizer, if that is there."""
    folder, path = work / "hf", work / "model.bin"
    if name == "GPT-NeoX":
        make_base(name).save_pretrained(folder)
    else:
        save_btlm(make_base(name), CONFIG, folder)
    tokenizer = NEOX_TOKENIZER if name == "GPT-NeoX" else GPT2_TOKENIZER
    if tokenizer.exists():
        library.copy_tokenizer(tokenizer, folder)
    library.convert("import", folder, path)
    return path, tokenizer.exists()


def make_adapter(name, options):
    """A model under PEFT; its adapter, of which nothing is zero, changes every adapted layer by
    about half."""
    options = {"r": 8, "lora_alpha": 16, "fan_in_fan_out": name == "BTLM", **options}
    if name == "GPT-NeoX":                          # a plain torch module has no task
        options["task_type"] = "CAUSAL_LM"
    model = get_peft_model(make_base(name), LoraConfig(**options))
    random = torch.Generator().manual_seed(33)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if p.requires_grad:
                gain = 0.3 if "lora_B" in key else 1.0
                p.copy_(gain / p.shape[1] ** 0.5 * torch.randn(p.shape, generator=random))
    return model.eval()


def factors(model, of):
    """{PEFT's name in files: of(parameter)} of everything that PEFT trains."""
    return {key.replace(".default", ""): of(p) for key, p in model.named_parameters()
            if p.requires_grad}


def in_files(model):
    """{name in files: tensor} of a model without an adapter."""
    return {"embed_out.weight" if key == "lm_head.weight" else key: value.numpy()
            for key, value in model.state_dict().items()}


def check_merge(checks, path, adapter, theirs, adapted, tokens, out):
    """theirs: what merge_and_unload gave; adapted: our logits with the adapter on."""
    library.train("merge", "-m", path, "--adapter", adapter, "-o", out)
    merged = Model(out)
    apart, which = worst(merged.tensors(), in_files(theirs))
    checks.near(f"`train merge` against merge_and_unload, worst {which}", apart, MERGED)
    checks.near("logits after merging against those of the adapter",
                distance(merged.logits(tokens), adapted), LOGITS)
    merged.close()


def check_adapter(checks, name, options, path, document, pair, work):
    work.mkdir()
    model = make_adapter(name, options)
    model.save_pretrained(work / "peft")
    library.convert("import", work / "peft", work / "adapter.bin", "--base", path)
    base, ours = Model(path), Model(path, work / "adapter.bin")
    adapted = ours.logits(document)
    moved = distance(base.logits(document), adapted)
    checks.expect(moved > 0.1, f"the adapter moves logits by {moved:.2f} of the largest")
    base.close()
    run = model if name == "BTLM" else lambda ids: model(ids[None], use_cache=False).logits[0]
    neox_live.compare(checks, ours, model, run, factors, document, pair)
    n_frozen = sum(not p.requires_grad for p in model.parameters())
    n_grads, n_factors = len(ours.tensors(grads=True)), len(factors(model, id))
    checks.expect(n_grads == n_factors, f"{n_frozen} frozen tensors have no gradient")
    ours.close()
    check_merge(checks, path, work / "adapter.bin", model.float().merge_and_unload(), adapted,
                document, work / "merged.bin")


def check_adapters(checks, work):
    for name, adapters in ADAPTERS.items():
        folder = work / name
        folder.mkdir()
        path, real = import_base(name, folder)
        document, pair = random_text(50257, 300)
        if real and HH.exists():
            model = Model(path)
            document, pair = real_text(model.encode, 300)
            model.close()
        else:
            checks.skip("real text: no HH or no tokenizer; random tokens instead")
        for number, (what, options) in enumerate(adapters):
            checks.heading(f"{name}, PEFT's {what}")
            check_adapter(checks, name, options, path, document, pair, folder / str(number))


# --- DPO with an adapter -------------------------------------------------------------------------

def read_factors(folder):
    return {key: value.numpy() for key, value in
            load_file(folder / "adapter_model.safetensors").items()}


def check_change(checks, ours, theirs, before):
    """How far apart the changes are that training made, of A and of B."""
    for part in "AB":
        names = sorted(name for name in before if f"lora_{part}" in name)
        mine, other, start = (np.concatenate([tensors[name].ravel() for name in names])
                              for tensors in (ours, theirs, before))
        length = float(np.linalg.norm(other - start))
        checks.near(f"trained {part}, distance by the length of TRL's change",
                    float(np.linalg.norm(mine - other)) / length, CHANGE,
                    f"a change of {length / np.linalg.norm(start):.3g} of {part}'s beginning"
                    if part == "A" else f"length {length:.3g}, from 0")


def check_training(checks, work, real):
    folder, path = trl_live.make_model(work, real)
    pairs = trl_live.choose_pairs(20, AutoTokenizer.from_pretrained(folder), 100 if real else 400)
    lora = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear",
                      task_type="CAUSAL_LM")
    adapter = work / "before.bin"
    for what, n, batch in (("4 of 20 pairs", 20, 4), ("the same 8 pairs", 8, 8)):
        checks.heading(f"{STEPS} updates of {what}, all-linear, r 8, beta 0.1, rate {RATE}")
        theirs, ids = trl_live.trl_run(folder, work, pairs[:n], batch, STEPS, "sigmoid", 0.1, RATE,
                                       lora)
        adapter.unlink(missing_ok=True)
        library.convert("import", work / "before", adapter, "--base", path)
        if n != batch:
            ours = trl_live.our_run(path, ids, batch, STEPS, "sigmoid", 0.1, RATE, adapter)
        else:               # the train program shuffles: every update takes all pairs
            ours = trl_live.cli_run(path, work, pairs[:n], STEPS, 0.1, RATE, "--adapter",
                                    adapter)
        trl_live.compare(checks, ours, theirs)

    checks.heading("the adapter that the train program made of the latter")
    trained, back = work / "run" / "adapter.bin", work / "back"
    library.convert("export", trained, back)
    before = read_factors(work / "before")
    zero = all(not value.any() for name, value in before.items() if "lora_B" in name)
    checks.expect(zero, "B was zero before")
    ours = read_factors(back)
    check_change(checks, ours, read_factors(work / "after"), before)

    tokens = [token for part in ids[0][:2] for token in part]
    base, mine = Model(path), Model(path, trained)
    adapted = mine.logits(tokens)
    moved = distance(base.logits(tokens), adapted)
    base.close()
    mine.close()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        peer = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa"), back).eval()
    said = [str(warning.message) for warning in caught if warning.category is UserWarning]
    with torch.no_grad():
        logits = peer(torch.tensor([tokens]), use_cache=False).logits[0].numpy()
    checks.expect(not said, f"PEFT loads it without a warning{said[:1] or ''}")
    checks.near("its logits in PEFT", distance(adapted, logits), LOGITS,
                f"training moved them by {moved:.2f}")
    check_merge(checks, path, trained, peer.merge_and_unload(), adapted, tokens,
                work / "merged.bin")


def main():
    btlm_torch.Conv1D = lambda n_in, n_out: pytorch_utils.Conv1D(n_out, n_in)
    checks = library.Checks("LoRA against PEFT and TRL's DPOTrainer")
    with tempfile.TemporaryDirectory() as work:
        work = pathlib.Path(work)
        os.environ["HF_HOME"] = str(work / "cache")
        check_adapters(checks, work)
        real = NEOX_TOKENIZER.exists()
        if not real:
            checks.skip(f"a real tokenizer: no {NEOX_TOKENIZER}; a token for every byte instead")
        if not HH.exists():
            checks.skip(f"HH's pairs: no {HH}; generated ones instead")
        check_training(checks, work / "dpo", real)
    return checks.done()


if __name__ == "__main__":
    sys.exit(main())
