#!/usr/bin/env python3
"""LoRA adapters that PEFT made, through convert.py and back.

  - import and export give adapter_config.json and adapter_model.safetensors back byte for byte, and
    the adapter file holds what PEFT has in memory: the same layers, and their A and B bit for bit;
    the names of layers in it mean, by PEFT's own rule, those layers;
  - an adapter without an adapter_config.json, as one that was trained here is, loads in PEFT from
    the one that export makes up: logits as from PEFT's own, bit for bit, no tensor missing or left
    over;
  - what asks PEFT for more than a plain LoRA is refused, with the key or the tensor named.

On a GPT-NeoX; on a GPT-2, which is a BTLM with a table of positions and the same names; and on the
BTLM of ../btlm_torch.py with transformers' Conv1D, which is the class that PEFT looks for. All are
tiny: whether bytes are the same does not depend on sizes.
"""
import json
import pathlib
import sys
import tempfile
import warnings

import library

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import load_file, save_file
from transformers import (GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM,
                          pytorch_utils)
import btlm_torch

convert = library.load_convert()
FILES = ["adapter_config.json", "adapter_model.safetensors"]
TOKENS = torch.arange(20)[None] * 7 % 320
IDS = dict(vocab_size=320, bos_token_id=0, eos_token_id=0)
BTLM = dict(IDS, model_type="btlm", n_embd=24, n_layer=3, n_head=3, n_inner=40, n_positions=32,
            activation_function="swiglu", position_embedding_type="alibi")
GPT2 = dict(BTLM, n_inner=96, activation_function="gelu_new", position_embedding_type="learned")
ADAPTERS = {        # (what, options of LoraConfig, dtype of the adapter)
    "GPT-NeoX": [
        ("two names", dict(target_modules=["query_key_value", "dense"]), torch.float32),
        ("all-linear", dict(target_modules="all-linear", r=3, lora_alpha=5), torch.float32),
        ("rsLoRA, dropout", dict(target_modules=["dense_4h_to_h"], use_rslora=True,
                                 lora_dropout=0.25), torch.bfloat16),
        ("regular expression", dict(target_modules=r".*\.[02]\.mlp\.dense_.*"), torch.float16),
        ("layers_to_transform", dict(target_modules=["query_key_value"], layers_to_transform=[1]),
         torch.float32),
        ("exclude_modules", dict(target_modules="all-linear", exclude_modules=r".*\.1\..*"),
         torch.float32),
        ("gaussian", dict(target_modules=["dense"], init_lora_weights="gaussian"), torch.float32)],
    "GPT-2": [
        ("PEFT's default names", dict(), torch.float32),
        ("all-linear", dict(target_modules="all-linear", fan_in_fan_out=True), torch.bfloat16),
        ("c_proj of attention", dict(target_modules=r".*attn\.c_proj"), torch.float32)],
    "BTLM": [
        ("c_proj, c_attn", dict(target_modules=["c_proj", "c_attn"]), torch.float32),
        ("all-linear", dict(target_modules="all-linear", lora_alpha=1.5), torch.float16),
        ("c_fc2 of the last layer", dict(target_modules=["mlp.c_fc2"], layers_to_transform=[2],
                                         layers_pattern="h"), torch.float32)]}
REFUSED = [         # (what PEFT is asked for, what the refusal must name)
    (dict(use_dora=True), "use_dora"), (dict(bias="all"), "bias"),
    (dict(lora_bias=True), "lora_bias"), (dict(rank_pattern={"dense": 2}), "rank_pattern"),
    (dict(alpha_pattern={"dense": 2}), "alpha_pattern"),
    (dict(modules_to_save=["final_layer_norm"]), "modules_to_save"),
    (dict(init_lora_weights="pissa"), "init_lora_weights"),
    (dict(init_lora_weights="olora"), "init_lora_weights"),
    (dict(trainable_token_indices=[3]), "trainable_token_indices"),
    (dict(task_type="FEATURE_EXTRACTION"), "task_type"),
    (dict(target_modules=["dense", "embed_in"]), "embed_in"),
    (dict(target_modules=["dense", "lm_head"]), "lm_head")]


def make_model(name):
    """The same weights whenever it is called."""
    torch.manual_seed(5)
    if name == "GPT-NeoX":
        model = GPTNeoXForCausalLM(GPTNeoXConfig(
            **IDS, hidden_size=24, num_hidden_layers=3, num_attention_heads=3,
            intermediate_size=40, max_position_embeddings=32))
    elif name == "GPT-2":
        model = GPT2LMHeadModel(GPT2Config(**IDS, n_embd=24, n_layer=3, n_head=3, n_positions=32))
    else:
        model = btlm_torch.BTLM(BTLM)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def make_base(model, name, folder, path):
    """The model file of a model."""
    if name == "GPT-NeoX":
        model.save_pretrained(folder)
    else:
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(GPT2 if name == "GPT-2" else BTLM))
        save_file({key: value.contiguous() for key, value in model.state_dict().items()
                   if key != "lm_head.weight"}, folder / "model.safetensors",
                  metadata={"format": "pt"})
    library.convert("import", folder, path)


def make_adapter(name, options, dtype=torch.float32):
    """PEFT's adapter on a fresh model, as if it had been trained: neither A nor B is zero."""
    options = dict(dict(r=4, lora_alpha=8), **options)
    if name != "BTLM":              # a plain torch module has no task
        options.setdefault("task_type", "CAUSAL_LM")
    model = get_peft_model(make_model(name), LoraConfig(**options))
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            torch.nn.init.normal_(parameter, std=0.1)
            parameter.data = parameter.data.to(dtype)
    return model.eval()


def logits(model, name):
    with torch.no_grad():
        return model(TOKENS[0]) if name == "BTLM" else model(TOKENS).logits[0]


def bits(tensor):
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()


def same_files(one, other):
    return [file for file in FILES if (one / file).read_bytes() != (other / file).read_bytes()]


def check_adapter(checks, name, what, options, dtype, base, work):
    model = make_adapter(name, options, dtype)
    source, adapter, back = work / "peft", work / "adapter.bin", work / "back"
    model.save_pretrained(source)
    library.convert("import", source, adapter, "--base", base)
    library.convert("export", adapter, back)
    checks.expect(not same_files(source, back) and sorted(FILES) == sorted(
        path.name for path in back.iterdir()), f"{what}: both files come back byte for byte")

    entries = convert.read_container(adapter, convert.ADAPTER)
    tensors = {key: entry for key, entry in entries.items() if "lora_" in key}
    memory = {key.replace(".default", ""): value for key, value in model.named_parameters()
              if "lora_" in key}
    sort = str(dtype).split(".")[-1].replace("bfloat", "bf").replace("float", "f")
    checks.expect(list(tensors) == in_model_order(memory, base) and all(
        entry == (sort, tuple(memory[key].shape), convert.LINEAR, bits(memory[key]))
        for key, entry in tensors.items()),
        f"{what}: {len(tensors)} tensors in model order, PEFT's own bit for bit ({sort})")

    config = json.loads(entries["config"][3])
    names = config["target_modules"]
    rule = LoraConfig(target_modules=names.split(","))
    linear = [key for key, module in make_model(name).named_modules()
              if isinstance(module, (torch.nn.Linear, pytorch_utils.Conv1D)) and key != "lm_head"
              and key != "embed_out"]
    meant = linear if names == "all-linear" else [
        key for key in linear if check_target_module_exists(rule, key)]
    adapted = {key.split(".lora_")[0].replace("base_model.model.", "") for key in memory}
    checks.expect(set(meant) == adapted,
                  f"{what}: {names[:50]} means the {len(adapted)} adapted layers to PEFT")

    check_made_up(checks, name, what, entries, work)
    old = work / "old"                          # torch.save, and the adapter's name in each key
    old.mkdir()
    (old / FILES[0]).write_bytes((source / FILES[0]).read_bytes())
    torch.save({key.replace(".weight", ".default.weight"): value
                for key, value in load_file(source / FILES[1]).items()}, old / "adapter_model.bin")
    library.convert("import", old, work / "old.bin", "--base", base)
    checks.expect((work / "old.bin").read_bytes() == adapter.read_bytes(),
                  f"{what}: the same from adapter_model.bin with names of old versions")


def in_model_order(memory, base):
    """By the base's table, A before B."""
    modules = [name[:-len(".weight")] for name in convert.open_container(base)
               if name.endswith(".weight")]
    return [f"base_model.model.{module}.lora_{part}.weight" for module in modules for part in "AB"
            if f"base_model.model.{module}.lora_A.weight" in memory]


def check_made_up(checks, name, what, entries, work):
    trained, made = work / "trained.bin", work / "made"
    config = json.loads(entries["config"][3])
    if what == "all-linear":                    # PEFT makes a list of it when it saves
        config["target_modules"] = what
    convert.write_container(str(trained), convert.ADAPTER, [
        convert.blob("config", json.dumps(config).encode()) if key == "config" else (key, *entry)
        for key, entry in entries.items() if not key.startswith("file/")])
    library.convert("export", trained, made)
    said = []
    peers = [load_adapter(name, work / "peft", []), load_adapter(name, made, said)]
    theirs, ours = ({key: bits(value) for key, value in peer.named_parameters() if "lora_" in key}
                    for peer in peers)
    theirs["logits"], ours["logits"] = (bits(logits(peer, name)) for peer in peers)
    moved = float((logits(peers[1], name) - logits(make_model(name), name)).abs().max())
    checks.expect(theirs == ours and moved > 1e-3 and not said,
                  f"{what}: PEFT loads the config made up by export; the logits' bits are the same "
                  f"(the adapter moves them by {moved:.2g}){said[:1] or ''}")


def load_adapter(name, folder, said):
    """PEFT's model of a directory; its warnings, of tensors missing say, are added to `said`."""
    options = {}
    if name == "BTLM":                          # a plain torch module has no task
        options["config"] = PeftConfig.from_pretrained(folder)
        options["config"].task_type = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        peer = PeftModel.from_pretrained(make_model(name), folder, **options).eval()
    said += [str(warning.message) for warning in caught if warning.category is UserWarning]
    return peer


def check_refusals(checks, base, work):
    for number, (options, key) in enumerate(REFUSED):
        source, adapter = work / f"refused{number}", work / "refused.bin"
        options = dict(dict(target_modules=["dense"], r=4), **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            make_adapter("GPT-NeoX", options).save_pretrained(source)
        said = library.convert("import", source, adapter, "--base", base, fails=True)
        checks.expect(key in said and said.count("\n") == 1 and not adapter.exists(),
                      f"{key}: {said.split(': ', 2)[-1].strip()[:90]}")
        if key in ("use_dora", "lora_bias", "embed_in", "lm_head"):     # the tensors alone
            config = json.loads((source / FILES[0]).read_text())
            (source / FILES[0]).write_text(json.dumps(dict(
                config, use_dora=False, lora_bias=False, target_modules=["dense"])))
            said = library.convert("import", source, adapter, "--base", base, fails=True)
            checks.expect("tensor 'base_model" in said and not adapter.exists(),
                          f"{key}: {said.split(': ', 2)[-1].strip()[:90]}")


def main():
    btlm_torch.Conv1D = lambda n_in, n_out: pytorch_utils.Conv1D(n_out, n_in)
    checks = library.Checks("LoRA adapters of PEFT, in and out")
    with tempfile.TemporaryDirectory() as work:
        work = pathlib.Path(work)
        for name, adapters in ADAPTERS.items():
            checks.heading(name)
            base = work / f"{name}.bin"
            model = make_model(name)
            make_base(model, name, work / name, base)
            mine = library.Model(base)
            checks.near("the base's logits", library.distance(
                mine.logits(TOKENS[0].numpy()), logits(model, name).numpy()), 1e-5)
            mine.close()
            for number, (what, options, dtype) in enumerate(adapters):
                folder = work / f"{name}-{number}"
                folder.mkdir()
                with warnings.catch_warnings():         # fan_in_fan_out, which PEFT then corrects
                    warnings.simplefilter("ignore")
                    check_adapter(checks, name, what, options, dtype, base, folder)
        checks.heading("what is no plain LoRA is refused")
        check_refusals(checks, work / "GPT-NeoX.bin", work)
    return checks.done()


if __name__ == "__main__":
    sys.exit(main())
