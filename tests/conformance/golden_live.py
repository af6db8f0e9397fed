#!/usr/bin/env python3
"""dpo.h against golden checkpoints: tiny models in Hugging Face's file layout, with the logits,
hidden states, losses and gradients that other people's reference code computed in fp64.

Every case comes in through convert.py, from each of the file formats it has. Tolerances are
relative to each tensor's largest value: 1e-5 for logits, where a plain fp32 PyTorch run is 9e-7
away and the smallest misreading of an architecture 1.1e-4; 5e-5 for gradients, where fp32 is 7e-6
away. Losses, in nats, are means of log-probabilities: fp32 is 5e-7 away, 5e-6 are allowed.
"""
import json
import pathlib
import sys
import tempfile

import numpy as np

import library
from library import Model, SHARED, distance, worst

LOGITS, GRADIENTS, LOSS = 1e-5, 5e-5, 5e-6
HEADS = {"gpt_neox": "embed_out.weight", "btlm": "lm_head.weight"}
NORMS = {"gpt_neox": "gpt_neox.final_layer_norm.", "btlm": "transformer.ln_f."}


def sources(case, work):
    """(format, directory) for each form in which the case's weights exist, that form alone."""
    shards = sorted(case.glob("*.bin*"))
    if len(shards) > 1:
        yield ".bin shards", case
        yield "safetensors shards", case / "safetensors_shards"
        return
    for name in ("model.safetensors", "pytorch_model.bin"):
        alone = work / f"{case.name}-{name}"
        alone.mkdir()
        for file in (name, "config.json"):
            (alone / file).symlink_to(case / file)
        yield name, alone


def cut_model(convert, model, out, n_layers, plain_norm):
    """A model file of the first blocks, whose head is the identity: its logits are the final norm
    of the stream behind them; with plain_norm that of weight 1 and bias 0."""
    entries = convert.open_container(str(model), convert.MODEL)
    config = json.loads(convert.read_entry(entries["config"]))
    arch, width, vocab = config["arch"], config["d_model"], config["vocab_size"]
    config.update(n_layers=n_layers, tied_head=False, logit_scale=1.0)
    data, kept = json.dumps(config).encode(), []
    for name, entry in entries.items():
        layer = name.split(".")[2:3] if ".h." in name or ".layers." in name else []
        if name in ("config", HEADS[arch]) or (layer and int(layer[0]) >= n_layers):
            continue
        if plain_norm and name.startswith(NORMS[arch]):
            value = np.full(width, 1.0 if name.endswith("weight") else 0.0, np.float32)
            kept.append((name, "f32", (width,), convert.PLAIN, value.tobytes()))
        else:
            kept.append((name, entry.dtype, entry.shape, entry.layout, convert.read_entry(entry)))
    identity = np.eye(vocab, width, dtype=np.float32).tobytes()
    kept.append((HEADS[arch], "f32", (vocab, width), convert.LINEAR, identity))
    convert.write_container(str(out), convert.MODEL,
                            [("config", "u8", (len(data),), convert.PLAIN, data), *kept])
    return config


def check_hidden(checks, convert, path, expected, work):
    hidden, tokens = expected["hidden_0"].astype(np.float64), expected["tokens_0"]
    n_layers, furthest = len(hidden) - 2, 0.0
    for k in range(1, n_layers + 2):
        last, out = k > n_layers, work / "cut.bin"
        config = cut_model(convert, path, out, min(k, n_layers), not last)
        model = Model(out)
        ours = model.logits(tokens)[:, :config["d_model"]]
        model.close()
        out.unlink()
        truth = hidden[k]
        if not last:
            truth = truth - truth.mean(1, keepdims=True)
            variance = (truth ** 2).mean(1, keepdims=True)
            truth /= np.sqrt(variance + config["norm_epsilon"])
        furthest = max(furthest, distance(ours, truth))
    checks.near(f"stream behind each of {n_layers} blocks, normalised", furthest, LOGITS)


def check_case(checks, convert, case, work):
    expected = np.load(case / "expected.npz")
    facts = json.loads((case / "expected.json").read_text())
    tensors = {}
    for form, directory in sources(case, work):
        checks.heading(f"{case.name}, {form}")
        path = work / f"{case.name}-{form.replace(' ', '-')}.model"
        library.convert("import", directory, path)
        model = Model(path)
        for i in (0, 1):
            tokens = expected[f"tokens_{i}"]
            checks.near(f"logits, {len(tokens)} tokens",
                        distance(model.logits(tokens), expected[f"logits_{i}"]), LOGITS,
                        f"fp32 torch {facts['fp32_vs_fp64'][f'logits_{i}_max_rel']:.0e}")
        losses = []
        for i in (1, 0):                        # sequence 0 last: its gradients are wanted
            tokens = expected[f"tokens_{i}"].tolist()
            logp, grads = model.gradients([([], [(tokens, 1)])], [-1 / (len(tokens) - 1)])
            losses.append(abs(-logp[0] / (len(tokens) - 1) - float(expected[f"loss_{i}"])))
        checks.near("losses, nats", max(losses), LOSS)
        truth = {name[5:]: expected[name] for name in expected.files if name.startswith("grad.")}
        apart, name = worst(grads, truth)
        checks.near(f"{len(truth)} gradients, worst {name}", apart, GRADIENTS,
                    f"fp32 torch {facts['fp32_vs_fp64']['grads_max_rel']:.0e}")
        check_hidden(checks, convert, path, expected, work)
        loaded = {name: value.copy() for name, value in model.tensors().items()}
        if tensors:
            checks.expect(tensors.keys() == loaded.keys() and
                          all(np.array_equal(tensors[name], loaded[name]) for name in loaded),
                          f"the same {len(loaded)} tensors, bit for bit, as from the other form")
        tensors = loaded
        model.close()
        check_variants(checks, directory, expected, facts, work)


def check_variants(checks, directory, expected, facts, work):
    """A scale that depends on the sequence's own length is refused. For a sequence of that length
    it is a fixed factor, which is supported: the variant's numbers are a truth for it too."""
    for variant in facts.get("variants") or []:
        scaling = variant["set"]["alibi_scaling"]
        altered = work / "altered"
        altered.mkdir()
        for file in directory.iterdir():
            if file.is_file() and file.name != "config.json":
                (altered / file.name).symlink_to(file)
        config = json.loads((directory / "config.json").read_text())
        (altered / "config.json").write_text(json.dumps({**config, **variant["set"]}))
        out = work / "altered.model"
        message = library.convert("import", altered, out, fails=True).strip()
        checks.expect("train_seq_len" in message and len(message.splitlines()) == 1
                      and not out.exists(), f"{variant['name']} is refused: {message}")
        for i in (0, 1):
            tokens = expected[f"tokens_{i}"]
            factor = max(1.0, len(tokens) / scaling["train_seq_len"])
            fixed = {**config, "alibi_scaling": {"type": "linear", "factor": factor}}
            (altered / "config.json").write_text(json.dumps(fixed))
            library.convert("import", altered, out)
            model = Model(out)
            truth = expected[f"variant.{variant['name']}.logits_{i}"]
            checks.near(f"logits with slopes divided by {factor}",
                        distance(model.logits(tokens), truth), LOGITS)
            model.close()
            out.unlink()
        for file in altered.iterdir():
            file.unlink()
        altered.rmdir()


def main():
    checks = library.Checks("golden models (fp64, by others' reference code)")
    cases = sorted(path.parent for path in (SHARED / "golden").glob("*/expected.npz"))
    if not cases:
        checks.skip(f"no golden models in {SHARED / 'golden'}; set DPO_SHARED")
    convert = library.load_convert()
    with tempfile.TemporaryDirectory() as work:
        for case in cases:
            check_case(checks, convert, case, pathlib.Path(work))
    return checks.done()


if __name__ == "__main__":
    sys.exit(main())
