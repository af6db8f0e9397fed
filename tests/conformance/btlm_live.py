#!/usr/bin/env python3
"""dpo.h against an independent BTLM in PyTorch (../btlm_torch.py), at a medium size, on real text.

ALiBi, SwiGLU, five heads of 64, and muP's scales as BTLM-3B has them. Everything else (what is
compared, the truth, the tolerances) is neox_live.py's.
"""
import json
import pathlib
import sys
import tempfile

import library
from library import GPT2_TOKENIZER, HH, Model
from neox_live import compare, random_text, real_text

import torch
from safetensors.torch import save_file
from btlm_torch import BTLM

CONFIG = dict(
    model_type="btlm", architectures=["BTLMLMHeadModel"], n_embd=320, n_layer=4, n_head=5,
    n_inner=853, n_positions=2048, vocab_size=50257, activation_function="swiglu",
    position_embedding_type="alibi", mup_embeddings_scale=14.6, mup_output_alpha=2.22,
    mup_width_scale=0.8, mup_scale_qk_dot_by_d=True, scale_attn_weights=True,
    layer_norm_epsilon=1e-5, bos_token_id=50256, eos_token_id=50256, torch_dtype="float32")


def make_btlm(seed, config):
    """Random weights: embeddings as BTLM initialises them, everything else as in make_neox."""
    model = BTLM(config)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=random)
            if p.dim() == 1:
                p.copy_((1 if ".ln_" in name and name.endswith("weight") else 0) + 0.2 * noise)
            elif "wte" in name or "wpe" in name:
                p.copy_(0.073 * noise)
            else:
                # q.k is divided by D, not by its root: queries and keys are larger for it
                gain = 2.5 if "c_attn" in name else 1.0
                p.copy_(gain / p.shape[0] ** 0.5 * noise)
    return model


def save_btlm(model, config, folder):
    """As the checkpoints in circulation are: slopes stored, the tied head not."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: value.contiguous() for name, value in model.state_dict().items()},
              str(folder / "model.safetensors"), metadata={"format": "pt"})


def main():
    checks = library.Checks("BTLM at width 320 against an independent PyTorch model")
    model = make_btlm(3, CONFIG)
    real = HH.exists() and GPT2_TOKENIZER.exists()
    with tempfile.TemporaryDirectory() as work:
        folder, path = pathlib.Path(work, "hf"), pathlib.Path(work, "model.bin")
        save_btlm(model, CONFIG, folder)
        if real:
            library.copy_tokenizer(GPT2_TOKENIZER, folder)
        else:
            checks.skip(f"real text: no {HH} or {GPT2_TOKENIZER}; random tokens instead")
        checks.heading(library.convert("import", folder, path).strip())
        ours = Model(path)
        document, pair = real_text(ours.encode, 700) if real else random_text(50257, 700)
        compare(checks, ours, model, model,
                lambda module, of: {name: of(p) for name, p in module.named_parameters()},
                document, pair)
        ours.close()
    return checks.done()


if __name__ == "__main__":
    sys.exit(main())
