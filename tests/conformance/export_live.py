#!/usr/bin/env python3
"""What convert.py exports, loaded by the peers.

  - models made by `train init`, before and after training: transformers' AutoModelForCausalLM and
    AutoTokenizer load a GPT-NeoX; a BTLM has its model's tensors name for name and shape for shape,
    and an independent BTLM in PyTorch loads it. Logits within 1e-5 of the largest, as fp32 sums in
    two orders are some 1e-6 apart; token ids the same;
  - a checkpoint that was imported and not touched comes back bit for bit, files included.
"""
import contextlib
import json
import pathlib
import shutil
import sys
import tempfile

import library
from library import GPT2_TOKENIZER, HH, Model, NEOX_TOKENIZER, SHARED, distance

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from btlm_live import save_btlm
from btlm_torch import BTLM

LOGITS = 1e-5
TEXTS = ["Hello, world!\n\nHuman: What's 12345 + 67?\n\nAssistant: It's 12412.",
         " a  b   c\t\n\n x", "", "naïve café \u0065\u0301 Ωmega 中文 한국어 🙂 \u00a0", "<|endoftext|>",
         "one<|endoftext|>two", "don't we'll I'VE they're"]
LESSON = "The red cat sat. The blue dog ran. Who sat? The red cat. Who ran? The blue dog.\n" * 40


def texts():
    """Short ones with every kind of trouble, and some real ones."""
    pairs = library.hh_pairs() if HH.exists() else ()
    return TEXTS + [pair["prompt"] + pair["chosen"] for pair, _ in zip(pairs, range(50))]


def make_models(checks, work):
    """(what, model file, files the source came with) for every model to export."""
    sizes = ["--d-model", 96, "--n-layers", 3, "--n-heads", 4, "--context-length", 256]
    for arch, options in (("gpt_neox", ["--parallel-residual", "no", "--activation", "gelu_new"]),
                          ("btlm", []), ("gpt_neox", ["--tied-head", "yes"]),
                          ("btlm", ["--position", "learned", "--activation", "gelu"])):
        path = work / f"{len(list(work.iterdir()))}.bin"
        library.train("init", "--arch", arch, *sizes, *options, "-o", path)
        what = " ".join([arch, *map(str, options)]).replace("--", "")
        yield f"{what}, as made", path
        (work / "lesson.txt").write_text(LESSON)
        run = work / f"{path.stem}-run"
        library.train("sft", "-m", path, "-d", work / "lesson.txt", "-o", run, "--max-length", 128,
                      "--batch-size", 8, "--max-steps", 6, "--learning-rate", 3e-3)
        yield f"{what}, trained", run / "model.bin"
    for arch, source in (("gpt_neox", NEOX_TOKENIZER), ("btlm", GPT2_TOKENIZER)):
        if not source.exists():
            checks.skip(f"a model with a real tokenizer: no {source}")
            continue
        path, tokenizer = work / f"real-{arch}.bin", work / f"tokenizer-{arch}.bin"
        make_tokenizer_model(source, tokenizer, work)
        library.train("init", "--arch", arch, *sizes, "--tokenizer", tokenizer, "-o", path)
        yield f"{arch} with the tokenizer in {source.name}", path


def make_tokenizer_model(source, path, work):
    """A model file that is there for its tokenizer."""
    folder = work / "tokenizer-source"
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(folder)
    config = dict(n_embd=8, n_layer=1, n_head=1, n_inner=8, n_positions=8, vocab_size=50304,
                  activation_function="gelu", position_embedding_type="learned")
    end = 0 if "neox" in source.name else 50256
    save_btlm(BTLM(config), {**config, "model_type": "btlm", "bos_token_id": end,
                             "eos_token_id": end}, folder)
    library.copy_tokenizer(source, folder)
    library.convert("import", folder, path)


def check_export(checks, what, path, folder):
    checks.heading(what)
    library.convert("export", path, folder)
    config = json.loads((folder / "config.json").read_text())
    exported = load_file(folder / "model.safetensors")
    model = Model(path)
    ours = {name: torch.from_numpy(value.copy()) for name, value in model.tensors().items()}
    checks.expect(ours.keys() == exported.keys() and
                  all(torch.equal(ours[name], exported[name]) for name in ours),
                  f"{len(exported)} tensors, the model's own bit for bit")
    neox = config["model_type"] == "gpt_neox"
    # For BTLM AutoTokenizer would ask whether to run the code that config.json refers to.
    loader = AutoTokenizer if neox else PreTrainedTokenizerFast
    tokenizer = loader.from_pretrained(folder)
    sample = texts()
    theirs = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in sample]
    different = [text for text, ids in zip(sample, theirs) if model.encode(text) != ids]
    checks.expect(not different, f"{sum(map(len, theirs))} token ids by {loader.__name__} from "
                                 f"{len(sample)} texts{different[:1] or ''}")
    end = config["eos_token_id"]
    checks.expect(tokenizer.convert_ids_to_tokens(end) == "<|endoftext|>"
                  and tokenizer.eos_token_id in (end, None), f"end token {end}, <|endoftext|>")
    tokens = [token for ids in theirs for token in ids][:200]
    logits, by = peer_logits(folder, config, tokens)
    mine = model.logits(tokens)
    checks.near(f"logits of {len(tokens)} tokens by {by} in fp64", distance(mine, logits), LOGITS)
    model.close()
    back = folder.with_suffix(".back")
    library.convert("import", folder, back)
    again = Model(back)
    checks.expect(np.array_equal(again.logits(tokens), mine),
                  "logits are the same bits when the export is imported again")
    again.close()


def peer_logits(folder, config, tokens):
    with torch.no_grad():
        if config["model_type"] == "gpt_neox":
            peer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64,
                                                        attn_implementation="sdpa")
            return peer(torch.tensor([tokens])).logits[0].numpy(), "AutoModelForCausalLM"
        tensors = load_file(folder / "model.safetensors")
        peer = BTLM(config).load({name: value.float() for name, value in tensors.items()})
        return peer.double()(torch.tensor(tokens)).numpy(), "btlm_torch"


def check_saved(checks, case, work):
    """A checkpoint that went through dpo.h, which saves fp32."""
    first, saved, folder = work / "first.model", work / "saved.model", work / "saved"
    library.convert("import", case, first)
    model = Model(first)
    model.save(saved)
    model.close()
    library.convert("export", saved, folder)
    source = read_checkpoint(case)
    back = load_file(folder / "model.safetensors")
    checks.expect(all(name in source and value.dtype == torch.float32
                      and torch.equal(value, source[name].float()) for name, value in back.items()),
                  f"{case.name}: {len(back)} tensors, the source's names and values in float32")
    config = json.loads((folder / "config.json").read_text())
    checks.expect(config == {**json.loads((case / "config.json").read_text()),
                             "torch_dtype": "float32"},
                  f"{case.name}: config.json says float32 and is the source's otherwise")
    truth = np.load((case if (case / "expected.npz").exists() else case.parent) / "expected.npz")
    logits, by = peer_logits(folder, config, truth["tokens_0"].tolist())
    checks.near(f"{case.name}: logits by {by} in fp64 are the golden ones",
                distance(logits, truth["logits_0"]), LOGITS)
    shutil.rmtree(folder)
    first.unlink()
    saved.unlink()


def read_checkpoint(case):
    tensors = {}
    for path in sorted(case.glob("*.safetensors")) or sorted(case.glob("*.bin")):
        tensors.update(load_file(path) if path.suffix == ".safetensors" else
                       torch.load(path, weights_only=True))
    return tensors


def check_round_trip(checks, case, work):
    """Import and export give the checkpoint back; importing that gives the same model file."""
    first, folder, again = work / "first.model", work / "back", work / "again.model"
    library.convert("import", case, first)
    library.convert("export", first, folder)
    source = read_checkpoint(case)
    back = load_file(folder / "model.safetensors")
    extra = sorted(set(source) - set(back))
    same = all(name in source and value.dtype == source[name].dtype
               and torch.equal(value, source[name]) for name, value in back.items())
    tied = [name for name in extra if name == "lm_head.weight"
            and torch.equal(source[name], source["transformer.wte.weight"])]
    buffers = [name for name in extra
               if name.endswith((".attention.bias", ".attention.masked_bias", ".inv_freq"))]
    checks.expect(same and len(back) == len(source) - len(extra)
                  and len(tied) + len(buffers) == len(extra),
                  f"{case.name}: {len(back)} tensors come back bit for bit and in their dtype"
                  f" ({len(tied)} tied, {len(buffers)} buffers left out)")
    checks.expect((folder / "config.json").read_bytes() == (case / "config.json").read_bytes(),
                  f"{case.name}: config.json comes back word for word")
    library.convert("import", folder, again)
    checks.expect(first.read_bytes() == again.read_bytes(),
                  f"{case.name}: importing the export makes the same file")
    shutil.rmtree(folder)
    first.unlink()
    again.unlink()


def main():
    checks = library.Checks("exports, loaded by the peers")
    with tempfile.TemporaryDirectory() as work:
        work = pathlib.Path(work)
        for i, (what, path) in enumerate(make_models(checks, work)):
            check_export(checks, what, path, work / f"export-{i}")
        checks.heading("golden checkpoints: untouched, and saved by dpo.h")
        golden = sorted(path.parent for path in (SHARED / "golden").rglob("config.json"))
        if not golden:
            checks.skip(f"no golden models in {SHARED / 'golden'}; set DPO_SHARED")
        for case in golden:
            check_round_trip(checks, case, work)
            check_saved(checks, case, work)
    return checks.done()


if __name__ == "__main__":
    sys.exit(main())
