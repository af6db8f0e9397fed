#!/usr/bin/env python3
"""Tests of convert.py, with Python's standard library only: python3 tests/test_convert.py

They make their own little checkpoints, tokenizers and data sets in a temporary directory: right
ones, which must come through bit for bit, and wrong ones, each of which must be refused with one
line, exit status 1 and nothing left behind. If ../shared/data lies beside the project, the real
tokenizers and the golden checkpoints there are tried, too. Last come the arguments of demo/run.sh.
"""

import contextlib
import functools
import gzip
import io
import itertools
import json
import math
import os
import pickle
import random
import shutil
import struct
import subprocess
import sys
import tempfile
import types
import unicodedata
import unittest
import unittest.mock
import zipfile

PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SHARED = os.path.join(os.path.dirname(PROJECT), "shared", "data")
sys.path.insert(0, PROJECT)
import convert                                                              # noqa: E402

convert.unicode_tables = functools.lru_cache(None)(convert.unicode_tables)  # they take a second

NEOX = {"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"], "vocab_size": 320,
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 32, "rotary_pct": 0.25, "rotary_emb_base": 10000,
        "bos_token_id": 0, "eos_token_id": 0, "torch_dtype": "float16"}
BTLM = {"model_type": "btlm", "architectures": ["BTLMLMHeadModel"], "vocab_size": 320, "n_embd": 12,
        "n_layer": 2, "n_head": 3, "n_inner": 20, "n_positions": 32,
        "activation_function": "swiglu",
        "position_embedding_type": "alibi", "mup_embeddings_scale": 14.6, "mup_output_alpha": 2.22,
        "mup_width_scale": 0.1, "mup_scale_qk_dot_by_d": True, "bos_token_id": 0,
        "eos_token_id": 0, "torch_dtype": "bfloat16"}
STORAGES = {"f32": "FloatStorage", "f16": "HalfStorage", "bf16": "BFloat16Storage",
            "u8": "ByteStorage", "f64": "DoubleStorage"}


def random_tensors(hf, dtype):
    """{name: (dtype, shape, bytes)} of a checkpoint with the shapes that the config asks for."""
    rng = random.Random(1)
    size = convert.ITEM_BYTES[dtype]
    shapes = convert.expected_tensors(convert.canonical_config("test", hf))
    return {name: (dtype, shape, bytes(rng.randrange(256) for _ in range(math.prod(shape) * size)))
            for name, (shape, _layout) in shapes.items()}


def safetensors(tensors, header=None):
    entries, data = {"__metadata__": {"format": "pt"}}, b""
    for name, (dtype, shape, content) in tensors.items():
        entries[name] = {"dtype": dtype.upper(), "shape": list(shape),
                         "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(entries if header is None else header(entries)).encode()
    return struct.pack("<Q", len(text)) + text + data


class Persistent:
    """A storage as torch.save pickles it: by reference to a member of the archive."""

    def __init__(self, dtype, key, numel):
        self.dtype, self.key, self.numel = dtype, key, numel


class Rebuilt:
    """A tensor as torch.save pickles it: a call that rebuilds it from a storage."""

    def __init__(self, storage, offset, shape, strides):
        self.arguments = (storage, offset, tuple(shape), tuple(strides), False, {})

    def __reduce__(self):
        return sys.modules["torch._utils"]._rebuild_tensor_v2, self.arguments


@contextlib.contextmanager
def pretended_torch():
    """Modules with the names that a checkpoint's pickle refers to."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    for name in STORAGES.values():
        setattr(torch, name, type(name, (), {"__module__": "torch"}))
    exec("def _rebuild_tensor_v2(*arguments): pass", utils.__dict__)
    utils._rebuild_tensor_v2.__module__ = "torch._utils"
    sys.modules.update({"torch": torch, "torch._utils": utils})
    try:
        yield torch
    finally:
        del sys.modules["torch"], sys.modules["torch._utils"]


def state_pickle(state):
    with pretended_torch() as torch:
        class Pickler(pickle.Pickler):
            def persistent_id(self, value):
                if isinstance(value, Persistent):
                    kind = getattr(torch, STORAGES[value.dtype])
                    return "storage", kind, value.key, "cpu", value.numel
                return None

        out = io.BytesIO()
        Pickler(out, 2).dump(state)
        return out.getvalue()


def torch_file(state_or_pickle, storages=(), top="archive", method=zipfile.ZIP_STORED, more=()):
    """An archive as torch.save writes it. storages: {key: bytes}."""
    out = io.BytesIO()
    data = state_or_pickle if isinstance(state_or_pickle, bytes) else state_pickle(state_or_pickle)
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, content in [("data.pkl", data), *more,
                              *(("data/" + key, dict(storages)[key]) for key in dict(storages))]:
            info = zipfile.ZipInfo(f"{top}/{name}")
            info.extra = b"FB" + struct.pack("<H", 11) + b"Z" * 11      # torch's padding
            info.compress_type = method
            archive.writestr(info, content)
    return out.getvalue()


def torch_checkpoint(tensors, strided=False):
    """The tensors as a .bin file; if strided, as views that are anything but contiguous."""
    state, storages = {}, {}
    for number, (name, (dtype, shape, content)) in enumerate(tensors.items()):
        size, key = convert.ITEM_BYTES[dtype], str(number)
        items = [content[i:i + size] for i in range(0, len(content), size)]
        strides, offset = [math.prod(shape[i + 1:]) for i in range(len(shape))], 0
        if strided and len(shape) == 2 and number % 2:          # transposed
            rows, columns = shape
            items = [items[i * columns + j] for j in range(columns) for i in range(rows)]
            strides = [1, rows]
        elif strided:                                           # every third element, from the 7th
            junk = b"\xee" * size
            items = [junk] * 7 + [piece for item in items for piece in (item, junk, junk)]
            strides, offset = [3 * stride for stride in strides], 7
        storages[key] = b"".join(items)
        state[name] = Rebuilt(Persistent(dtype, key, len(items)), offset, shape, strides)
    return torch_file(state, storages)


def byte_level_vocabulary():
    """A small byte-level BPE: ids 0 and 1 special, 256 bytes, five merges, two added tokens."""
    ids = {"<|endoftext|>": 0, "<|pad|>": 1}
    ids.update((symbol, 2 + byte) for byte, symbol in sorted(convert.SYMBOLS.items()))
    merges = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("Ġ", "Ġ"), ("Ċ", "Ċ")]
    for left, right in merges:
        ids[left + right] = len(ids)
    return ids, merges


def tokenizer_json(**changes):
    ids, merges = byte_level_vocabulary()
    flags = {"single_word": False, "lstrip": False, "rstrip": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
             "end_of_word_suffix": None, "fuse_unk": False, "vocab": ids,
             "merges": [" ".join(pair) for pair in merges]}
    added = [{"id": 0, "content": "<|endoftext|>", "normalized": False, "special": True, **flags},
             {"id": 1, "content": "<|pad|>", "normalized": False, "special": True, **flags},
             {"id": len(ids), "content": "   ", "normalized": True, "special": False, **flags},
             {"id": len(ids) + 1, "content": "\u00e9\u00e9", "normalized": True, "special": False,
              **flags}]
    model.update(changes.pop("model", {}))
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
            "normalizer": {"type": "NFC"}, "pre_tokenizer": byte_level, "decoder": byte_level,
            "post_processor": byte_level, "model": model, **changes}


class ConvertTest(unittest.TestCase):
    def setUp(self):
        self.home = tempfile.mkdtemp(prefix="test_convert.")
        self.addCleanup(shutil.rmtree, self.home)
        self.counter = itertools.count()

    def path(self, *names):
        return os.path.join(self.home, *names)

    def directory(self, **files):
        """A new directory; a key like model__safetensors is a file name with dots for __."""
        path = self.path(f"in{next(self.counter)}")
        os.mkdir(path)
        for name, content in files.items():
            if not isinstance(content, bytes):
                content = json.dumps(content).encode()
            with open(os.path.join(path, name.replace("__", ".")), "wb") as file:
                file.write(content)
        return path

    def run_main(self, *arguments):
        out, err, argv = io.StringIO(), io.StringIO(), sys.argv
        sys.argv = ["convert.py", *arguments]
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                status = convert.main()
        except SystemExit as exit_:
            status = exit_.code
        finally:
            sys.argv = argv
        return status, out.getvalue(), err.getvalue()

    def good(self, *arguments):
        status, out, err = self.run_main(*arguments)
        self.assertEqual(status, 0, err)
        return out + err

    def refused(self, pattern, *arguments):
        """One line that says why, status 1, and the directory as it was."""
        before = sorted(os.listdir(self.home))
        status, out, err = self.run_main(*arguments)
        errors = [line for line in err.splitlines() if not line.startswith("convert.py: note: ")]
        self.assertEqual((status, out, len(errors)), (1, "", 1), err)
        self.assertTrue(errors[0].startswith("convert.py: "), err)
        self.assertRegex(errors[0], pattern)
        self.assertEqual(before, sorted(os.listdir(self.home)))

    def imported(self, directory):
        model = self.path(f"model{next(self.counter)}.bin")
        self.output = self.good("import", directory, model)
        return model

    def contents(self, model, *without):
        """A container's entries but for those whose names begin with one of `without`."""
        return {name: entry for name, entry in convert.read_container(model, convert.MODEL).items()
                if not name.startswith(without or ("\0",))}


class ContainerTest(ConvertTest):
    ENTRIES = [("config", "u8", (5,), 0, b"{   }"), ("w", "f32", (3, 2), 1, bytes(range(24))),
               ("empty", "u32", (0,), 0, b""),
               ("v", "bf16", (4,), 0, [b"\1\2", b"", b"\3\4\5\6\7\0"])]

    def test_round_trip_and_layout(self):
        path = self.path("c")
        convert.write_container(path, 5, self.ENTRIES)
        read = convert.read_container(path, 5)
        self.assertEqual(list(read), ["config", "w", "empty", "v"])
        self.assertEqual(read["w"], ("f32", (3, 2), 1, bytes(range(24))))
        self.assertEqual(read["v"], ("bf16", (4,), 0, bytes([1, 2, 3, 4, 5, 6, 7, 0])))
        with open(path, "rb") as file:
            data = file.read()
        self.assertEqual(data[:16], b"dpo.h\r\n\x1a" + struct.pack("<II", 1, 5))
        self.assertEqual(struct.unpack_from("<QQI", data, 16), (len(data), 64 + 4 * 144, 4))
        self.assertEqual(struct.unpack_from("<QQ", data, 64 + 144 + 128), (704, 24))
        self.assertEqual(data[704:728], bytes(range(24)))

    def test_every_damage_is_found(self):
        path = self.path("c")
        convert.write_container(path, 1, self.ENTRIES)
        with open(path, "rb") as file:
            data = file.read()
        used = [*range(64 + 4 * 144), *range(640, 645), *range(704, 728), *range(768, 776)]
        for position in used[::2]:
            damaged = bytearray(data)
            damaged[position] ^= 1 + position % 255
            with open(path, "wb") as file:
                file.write(damaged)
            with self.assertRaises(convert.ConvertError, msg=f"byte {position}"):
                convert.read_container(path, 1)
        for length in (*range(0, len(data), 7), len(data) + 1):
            with open(path, "wb") as file:
                file.write((data + b"\0")[:length])
            with self.assertRaises(convert.ConvertError, msg=f"length {length}"):
                convert.read_container(path, 1)

    def test_wrong_size_leaves_nothing(self):
        with self.assertRaises(convert.ConvertError):
            convert.write_container(self.path("c"), 1, [("a", "f32", (3,), 0, b"1234")])
        self.assertEqual(os.listdir(self.home), [])


class CheckpointTest(ConvertTest):
    def test_safetensors_come_back_byte_for_byte(self):
        for hf, dtype in ((NEOX, "f16"), (BTLM, "bf16"), (NEOX, "f32"),
                          ({**BTLM, "position_embedding_type": "learned", "n_inner": None,
                            "activation_function": "gelu"}, "f32"),
                          ({**NEOX, "attention_bias": False, "tie_word_embeddings": True}, "bf16")):
            hf = {**hf, "torch_dtype": convert.TORCH_DTYPES[dtype]}
            tensors = random_tensors(hf, dtype)
            source = self.directory(
                config__json=b" " + json.dumps(hf).encode(),
                model__safetensors=safetensors({name: tensors[name] for name in sorted(tensors)}))
            model, target = self.imported(source), self.path(f"out{next(self.counter)}")
            self.good("export", model, target)
            back = {name: (tensor.dtype, tensor.shape, convert.read_entry(tensor))
                    for name, tensor in
                    convert.read_safetensors(os.path.join(target, "model.safetensors")).items()}
            self.assertEqual(back, tensors)
            self.assertEqual(list(back), sorted(tensors))
            with open(os.path.join(target, "config.json"), "rb") as file:
                self.assertEqual(file.read(), b" " + json.dumps(hf).encode())

    def test_all_sources_give_the_same_file(self):
        for hf in (NEOX, {**BTLM, "tie_word_embeddings": False}):
            tensors, prefix = random_tensors(hf, "f16"), convert.PREFIX[hf["model_type"]]
            names = list(tensors)
            parts = [{name: tensors[name] for name in names[k::2]} for k in range(2)]
            shards = ["model-00001-of-00002", "model-00002-of-00002"]
            index = {"metadata": {"total_size": 1}, "weight_map": {
                name: shards[i % 2] for i, name in enumerate(names)}}

            def indexed(ending):
                return json.dumps(index).replace("of-00002", "of-00002" + ending).encode()

            sources = [
                {"model__safetensors": safetensors(tensors)},
                {"pytorch_model__bin": torch_checkpoint(tensors)},
                {"pytorch_model__bin": torch_checkpoint(tensors, strided=True)},
                {"pytorch_model__bin": torch_checkpoint(
                    {name.replace(prefix, ""): tensors[name] for name in reversed(names)})},
                {"model__safetensors": safetensors({     # what transformers 5 calls the head
                    name.replace("embed_out", "lm_head"): tensors[name] for name in names})},
                {"model__safetensors__index__json": indexed(".safetensors"),
                 **{shard + "__safetensors": safetensors(part)
                    for shard, part in zip(shards, parts)}},
                {"pytorch_model__bin__index__json": indexed(".bin"),
                 **{shard + "__bin": torch_checkpoint(part) for shard, part in zip(shards, parts)}}]
            models = [self.imported(self.directory(config__json=hf, **files)) for files in sources]
            with open(models[0], "rb") as file:
                first = file.read()
            for model in models[1:]:
                with open(model, "rb") as file:
                    self.assertEqual(file.read(), first)

    def test_buffers_tied_heads_and_mixed_dtypes(self):
        tensors = random_tensors(NEOX, "f16")
        tensors["gpt_neox.final_layer_norm.bias"] = ("f32", (16,), bytes(64))
        buffers = {"gpt_neox.layers.0.attention.bias": ("bool", (1, 1, 4, 4), bytes(16)),
                   "gpt_neox.layers.0.attention.masked_bias": ("f32", (), bytes(4)),
                   "gpt_neox.layers.1.attention.rotary_emb.inv_freq": ("f16", (2,), bytes(4))}
        model = self.imported(self.directory(
            config__json=NEOX, model__safetensors=safetensors({**tensors, **buffers})))
        entries = self.contents(model, "config", "file")
        self.assertEqual({name: (e[0], e[1], e[3]) for name, e in entries.items()}, tensors)
        self.assertEqual({name: e[2] for name, e in entries.items() if e[2]},
                         {name: 1 for name in tensors if len(tensors[name][1]) == 2
                          and "embed_in" not in name})

        tied = random_tensors(BTLM, "bf16")
        del tied["transformer.relative_pe.slopes"]              # may be missing
        embedding = tied["transformer.wte.weight"]
        for head, noted in ((embedding, False), (("bf16", (320, 12), bytes(320 * 24)), True)):
            model = self.imported(self.directory(config__json=BTLM, model__safetensors=safetensors(
                {**tied, "lm_head.weight": head})))
            self.assertEqual("differs from the embedding" in self.output, noted)
            self.assertEqual(list(self.contents(model, "config", "file")), list(tied))

    def test_wrong_tensors(self):
        tensors = random_tensors(NEOX, "f16")
        name = "gpt_neox.layers.1.mlp.dense_h_to_4h.weight"
        dtype, shape, data = tensors[name]
        without = {key: value for key, value in tensors.items() if key != name}
        for wrong, pattern in (
                (without, f"'{name}' .*missing"),
                ({**tensors, "gpt_neox.extra.weight": ("f32", (1,), bytes(4))},
                 "extra.weight.*not part"),
                ({**tensors, "gpt_neox.layers.2.attention.dense.bias": ("f16", (16,), bytes(32))},
                 "layers.2.attention.dense.bias"),
                ({**tensors, name: (dtype, shape[::-1], data)}, f"'{name}' has shape"),
                ({**tensors, name: ("f64", shape, data * 4)}, f"'{name}' is F64"),
                ({**tensors, name: ("i16", shape, data)}, f"'{name}' is I16"),
                ({**tensors, name[9:]: (dtype, shape, data)}, "under two names"),
                ({}, "0 tensors for 2 layers")):
            self.refused(pattern, "import", self.directory(
                config__json=NEOX, model__safetensors=safetensors(wrong)), self.path("m"))
        self.refused("no model.safetensors", "import", self.directory(config__json=NEOX),
                     self.path("m"))
        self.refused("config.json", "import", self.directory(), self.path("m"))
        self.refused("nowhere: is no directory", "import", self.path("nowhere"), self.path("m"))

    def test_hostile_safetensors(self):
        tensors = {"a": ("f32", (2, 2), bytes(16)), "b": ("f32", (3,), bytes(12))}
        whole = safetensors(tensors)

        def changed(name, **changes):
            return safetensors(tensors, lambda header: {
                **header, name: {**header.get(name, {}), **changes}})

        text = whole[8:-28]
        for data, pattern in (
                (b"", "truncated"), (whole[:7], "truncated"), (whole[:50], "header of"),
                (whole[:-1], "describes"), (whole + b"x", "describes"),
                (struct.pack("<Q", 2**63) + whole[8:], "header of"),
                (struct.pack("<Q", 100_000_001) + bytes(100), "header of"),
                (struct.pack("<Q", 4) + b"null", "not a JSON object"),
                (struct.pack("<Q", 4) + b"{\xff\xff}", "UTF-8"),
                (struct.pack("<Q", 100_000) + b"{\"a\":" + b"[" * 99_995, "JSON"),
                (struct.pack("<Q", len(text)) + text.replace(b'"b"', b'"a"') + bytes(28), "twice"),
                (changed("a", data_offsets=[0, 12]), "cannot have"),
                (changed("b", data_offsets=[4, 16]), "overlap"),
                (changed("b", data_offsets=[20, 32]), "overlap or leave a hole"),
                (changed("b", data_offsets=[28, 16]), "cannot have"),
                (changed("b", data_offsets=[16.0, 28]), "malformed"),
                (changed("b", data_offsets=[-12, 0]), "malformed"),
                (changed("b", shape=[2**62, 2**62]), "cannot have"),
                (changed("b", shape=[True, 3]), "malformed"), (changed("b", shape=3), "malformed"),
                (changed("b", dtype="Q9"), "unknown dtype"), (changed("b", dtype=4), "malformed"),
                (changed("__metadata__", format=1), "__metadata__"),
                (safetensors(tensors, lambda header: {**header, "b": 1}), "malformed")):
            self.refused(pattern, "import",
                         self.directory(config__json=NEOX, model__safetensors=data),
                         self.path("m"))

    def test_git_lfs_pointers(self):
        """What a clone without Git LFS has in place of each large file, whichever that is."""
        pointer = (b"version https://git-lfs.github.com/spec/v1\n"
                   b"oid sha256:" + b"0f" * 32 + b"\nsize 911000000\n")
        weights = {"model__safetensors": safetensors(random_tensors(NEOX, "f16"))}
        index = {"weight_map": {"gpt_neox.embed_in.weight": "a.safetensors"}}
        ids, _merges = byte_level_vocabulary()
        for name, files in (
                ("model.safetensors", {}), ("pytorch_model.bin", {}),
                ("a.safetensors", {"model__safetensors__index__json": index}),
                ("pytorch_model.bin.index.json", {}), ("config.json", weights),
                ("tokenizer.json", weights), ("vocab.json", weights),
                ("merges.txt", {**weights, "vocab__json": ids}),
                ("generation_config.json", weights)):
            source = self.directory(**{"config__json": NEOX, **files,
                                       name.replace(".", "__"): pointer})
            what = "weights" if name.endswith((".safetensors", ".bin")) else "file itself"
            self.refused(f"/{name}: is a Git LFS pointer, not the {what}; run `git lfs pull` in "
                         "its directory$", "import", source, self.path("m"))
        base = self.imported(self.directory(config__json=NEOX, **weights))
        for name in ("adapter_model__safetensors", "adapter_model__bin"):
            source = self.directory(adapter_config__json=PEFT, **{name: pointer})
            self.refused("pointer, not the weights", "import", source, self.path("m"), "--base",
                         base)
        source = self.directory(train__json=pointer)
        for kind in ("shp", "alpaca", "messages"):
            self.refused("train.json: is a Git LFS pointer", "data", kind,
                         os.path.join(source, "train.json"), self.path("o"))

    def test_hostile_pickles(self):
        storage = Persistent("f32", "0", 4)
        ok = Rebuilt(storage, 0, (2, 2), (2, 1))
        files = {"0": bytes(16)}

        class Evil:
            def __init__(self, function, *arguments):
                self.call = function, arguments

            def __reduce__(self):
                return self.call

        flag = self.path("flag")
        for state, pattern in (
                ({"a": Evil(os.system, "touch " + flag)}, "asks for (posix|nt).system.*refused"),
                ({"a": Evil(eval, f"open({flag!r}, 'w')")},
                 "asks for builtins.eval|__builtin__.eval"),
                ({"a": Evil(getattr, ok, "count")}, "asks for .*getattr"),
                (pickle.dumps({"a": b"bytes"}, 4), "asks for the instruction SHORT_BINBYTES"),
                (pickle.dumps({"a": {1, 2}}, 4), "asks for the instruction EMPTY_SET"),
                (pickle.dumps(bytearray(3), 5), "asks for the instruction BYTEARRAY8"),
                (b"\x80\x02}q\x01" + b"ios\nsystem\n", "asks for the instruction INST"),
                (b"\x80\x02" + b"r\xff\xff\xff\xff" * 2 + b".", "damaged"),
                (b"\x80\x02}r\xff\xff\xff\xff.", "memo"),
                (b"\x80\x02ctorch\nFloatStorage\n)R.", "damaged"),
                (b"\x80\x02ccollections\nOrderedDict\n)}b.", "damaged|state dict"),
                (b"\x80\x02ccollections\nOrderedDict\n}U", "instruction|damaged"),
                (b"", "damaged"), (b"\x80\x02", "damaged"), (b"hello", "damaged|instruction"),
                (b"\x80\x02]" + b"]a" * 3 + b".", "state dict"),
                (b"\x80\x02})" + b"\x85" * 100000 + b"K\x01s.", "nested absurdly"),
                (b"\x80\x02})" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(60)) + b"K\x01s.",
                 "nested absurdly"),
                ({"a": Rebuilt(storage, 1, (2, 2), (2, 1))}, "outside its storage"),
                ({"a": Rebuilt(storage, 0, (2**40, 2**40), (1, 1))}, "outside its storage"),
                ({"a": Rebuilt(Persistent("f32", "0", 5), 0, (5,), (1,))}, "outside its storage"),
                ({"a": Rebuilt(storage, -1, (2, 2), (2, 1))}, "malformed"),
                ({"a": Rebuilt(storage, 0, (2, 2), (2, -1))}, "malformed"),
                ({"a": Rebuilt(storage, 0, (2, 2), (2,))}, "malformed"),
                ({"a": Rebuilt(None, 0, (2, 2), (2, 1))}, "malformed"),
                ({"a": Rebuilt(Persistent("f32", "7", 4), 0, (4,), (1,))},
                 "lacks 'archive/data/7'"),
                ({"a": Rebuilt(Persistent("f32", "../0", 4), 0, (4,), (1,))}, "damaged"),
                ({"a": Rebuilt(Persistent("f32", "0", -4), 0, (4,), (1,))}, "damaged"),
                ({"b": 1}, "0 tensors"), ({}, "0 tensors")):
            self.refused(pattern, "import", self.directory(
                config__json=NEOX, pytorch_model__bin=torch_file(state, files)), self.path("m"))
        self.assertFalse(os.path.exists(flag))

        whole = torch_file({"a": ok}, files)
        for data, pattern in (
                (b"", "not a zip"), (whole[:-30], "not a zip"),
                (whole[40:], "zip|outside|lacks|damaged"),
                (pickle.dumps({"a": 1}), "not a zip"),
                (torch_file({"a": ok}, files, method=zipfile.ZIP_DEFLATED), "compressed"),
                (torch_file({"a": ok}, files, more=[("constants.pkl", b"")]), "TorchScript"),
                (torch_file({"a": ok}, files, more=[("byteorder", b"big")]), "big-endian"),
                (torch_file({"a": ok}, {}), "lacks")):
            self.refused(pattern, "import", self.directory(
                config__json=NEOX, pytorch_model__bin=data), self.path("m"))

    def test_damaged_files_never_crash(self):
        """A byte changed anywhere in the structure of a checkpoint: it is read or refused."""
        tensors, rng = random_tensors(NEOX, "f16"), random.Random(2)
        for name, data in (("model.safetensors", safetensors(tensors)),
                           ("pytorch_model.bin", torch_checkpoint(tensors, strided=True))):
            path = self.path(name)
            for _ in range(400):
                damaged = bytearray(data)
                for _ in range(rng.randrange(1, 4)):
                    damaged[rng.randrange(min(6000, len(data)))
                            if rng.random() < 0.5 else -rng.randrange(1, 3000)] = rng.randrange(256)
                with open(path, "wb") as file:
                    file.write(damaged[:rng.choice((len(damaged), rng.randrange(len(damaged))))])
                try:
                    for tensor in convert.read_checkpoint(self.home).values():
                        if convert.tensor_bytes(tensor) < 1e6:
                            convert.read_entry(tensor)
                except convert.ConvertError:
                    pass
            os.remove(path)

    def test_hostile_index(self):
        name = "gpt_neox.embed_in.weight"
        one = safetensors({name: ("f16", (1,), bytes(2))})
        for index, pattern in (
                ({}, "no weight_map"), ({"weight_map": {name: "../x"}}, "file name"),
                ({"weight_map": {name: 3}}, "file name"),
                ({"weight_map": {name: ".."}}, "file name"),
                ({"weight_map": {name: "missing.safetensors"}}, "missing.safetensors"),
                ({"weight_map": {"other": "a.safetensors"}}, "'other' is not in a.safetensors"),
                ({"weight_map": {name: "a.safetensors", "b": "b.safetensors"}}, "'b' is not in"),
                ([1], "not a JSON object")):
            self.refused(pattern, "import", self.directory(
                config__json=NEOX, a__safetensors=one, b__safetensors=one,
                model__safetensors__index__json=index), self.path("m"))
        both = safetensors({name: ("f16", (1,), bytes(2)), "b": ("f16", (1,), bytes(2))})
        self.refused("another shard", "import", self.directory(
            config__json=NEOX, a__safetensors=one, b__safetensors=both,
            model__safetensors__index__json={
                "weight_map": {name: "a.safetensors", "b": "b.safetensors"}}), self.path("m"))

    def test_memory_is_bounded(self):
        """An import of a 200 MB tensor (a hole in a sparse file) stays below 60 MB."""
        hf = {**NEOX, "vocab_size": 3_250_000, "tie_word_embeddings": True}
        shapes = convert.expected_tensors(convert.canonical_config("test", hf))
        header, end = {}, 0
        for name, (shape, _layout) in shapes.items():
            header[name] = {"dtype": "F32", "shape": shape,
                            "data_offsets": [end, end + 4 * math.prod(shape)]}
            end += 4 * math.prod(shape)
        text = json.dumps(header).encode()
        source = self.directory(config__json=hf)
        with open(os.path.join(source, "model.safetensors"), "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + end)
        program = ("import convert, resource, sys; sys.argv[1:] = ['import', *sys.argv[1:]]; "
                   "status = convert.main(); print(status, "
                   "resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)")
        out = subprocess.run([sys.executable, "-c", program, source, self.path("m")], cwd=PROJECT,
                             check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout
        status, peak = map(int, out.split()[-2:])
        kilobyte = 1024 if sys.platform == "darwin" else 1
        self.assertEqual(status, 0)
        self.assertLess(peak / kilobyte, 60_000)


class AtomicFileTest(ConvertTest):
    def test_nothing_is_overwritten(self):
        """Not a file that appears meanwhile, with links or without, nor what a link in the
        temporary file's place leads to."""
        def no_links(*_):
            raise PermissionError(1, "Operation not permitted")

        def content(path):
            with open(path, "rb") as file:
                return file.read()

        for link in (os.link, no_links):
            with unittest.mock.patch.object(os, "link", link):
                out, other = self.path("out"), self.path("other")
                with convert.atomic_file(out) as file:
                    file.write(b"new")
                self.assertEqual(content(out), b"new")
                with self.assertRaisesRegex(convert.ConvertError, "exists already"):
                    with convert.atomic_file(other) as file:
                        file.write(b"late")
                        with open(other, "wb") as early:
                            early.write(b"early")
                self.assertEqual(content(other), b"early")
                os.remove(out)
                os.symlink(other, f"{out}.tmp-{os.getpid()}")
                with convert.atomic_file(out) as file:
                    file.write(b"new")
                self.assertEqual(content(other), b"early")
                self.assertFalse(os.path.islink(out))
                self.assertEqual(sorted(os.listdir(os.path.dirname(out))), ["other", "out"])
                os.remove(out)
                os.remove(other)


class ConfigTest(ConvertTest):
    def canonical(self, hf):
        with contextlib.redirect_stderr(io.StringIO()) as notes:
            config = convert.canonical_config("config.json", hf)
        self.notes = notes.getvalue()
        return config

    def expect(self, hf, changes, **expected):
        hf = {key: value for key, value in {**hf, **changes}.items() if value != "absent"}
        config = self.canonical(hf)
        self.assertEqual({key: config[key] for key in expected}, expected, changes)

    def test_neox(self):
        self.expect(NEOX, {}, arch="gpt_neox", rotary_dims=2, attention_scale=8 ** -0.5, d_ff=24,
                    parallel_residual=True, attention_bias=True, tied_head=False,
                    mup_width_scale=1.0,
                    position="rotary", activation="gelu", embedding_scale=1.0, bos_id=0, eos_id=0)
        both = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5,
                                    "partial_rotary_factor": 0.5}}
        self.expect(NEOX, both, rotary_base=5e5, rotary_dims=4)
        self.expect(NEOX, {"rope_theta": 7.0, "partial_rotary_factor": 1.0}, rotary_base=10000.0,
                    rotary_dims=2)
        self.expect(NEOX, {"rotary_emb_base": None, "rope_theta": 7, "rotary_pct": "absent",
                           "partial_rotary_factor": 1.0}, rotary_base=7.0, rotary_dims=8)
        self.expect(NEOX, {"hidden_act": "gelu_pytorch_tanh", "use_parallel_residual": False,
                           "eos_token_id": None, "bos_token_id": "absent"},
                    activation="gelu_new", parallel_residual=False, eos_id=-1, bos_id=0)
        self.expect(NEOX, {"hidden_act": "swish", "tie_word_embeddings": True,
                           "eos_token_id": "absent"},
                    activation="silu", tied_head=True, eos_id=2)
        self.expect(NEOX, {"num_attention_heads": 1, "hidden_size": 100, "rotary_pct": 0.29},
                    rotary_dims=28)                             # int(100 * 0.29): floored, as in HF

    def test_btlm(self):
        self.expect(BTLM, {}, arch="btlm", position="alibi", rotary_dims=0, attention_scale=1 / 4,
                    logit_scale=2.22 * 0.1, embedding_scale=14.6, mup_width_scale=0.1,
                    tied_head=True,
                    activation="swiglu", parallel_residual=False, attention_bias=True,
                    alibi_factor=1.0)
        self.expect(BTLM, {"mup_scale_qk_dot_by_d": False}, attention_scale=0.5)
        self.expect(BTLM, {"scale_attn_weights": False}, attention_scale=1.0)
        self.expect(BTLM, {"scale_attn_by_inverse_layer_idx": True}, attention_scale_by_layer=True)
        self.expect(BTLM, {"n_inner": None}, d_ff=48)
        self.expect(BTLM, {"alibi_scaling": {"type": "linear", "factor": 2}}, alibi_factor=2.0)
        self.expect(BTLM, {"tie_word_embeddings": False, "position_embedding_type": "absent",
                           "activation_function": "absent"},
                    tied_head=False, position="learned", activation="gelu_new")
        plain = {key: "absent" for key in BTLM if key.startswith("mup_")}
        self.expect(BTLM, plain, logit_scale=1.0, mup_width_scale=1.0, embedding_scale=1.0,
                    attention_scale=0.5)
        self.expect(BTLM, {**plain, "embeddings_scale": 14.6, "output_logits_scale": 0.222,
                           "width_scale": 0.1, "scale_qk_dot_by_d": True},
                    logit_scale=0.222, mup_width_scale=0.1, embedding_scale=14.6,
                    attention_scale=1 / 4)
        self.expect(BTLM, {**plain, "width_scale": 0.2}, logit_scale=0.2, mup_width_scale=1.0)
        self.expect(BTLM, {"embeddings_scale": 3.0, "output_logits_scale": 0.5, "width_scale": 0.5},
                    logit_scale=2.22 * 0.1, mup_width_scale=0.1, embedding_scale=14.6)
        self.assertEqual(self.notes.count("the older is ignored"), 3)
        self.expect(BTLM, {"resid_pdrop": 0.1}, d_model=12)
        self.assertIn("resid_pdrop", self.notes)

    def test_refused(self):
        for hf, changes, pattern in (
                (NEOX, {"model_type": "llama", "rope_parameters": {"rope_theta": 1e4}},
                 r"model_type is 'llama'; only gpt_neox \(Pythia\) and btlm can be imported$"),
                (NEOX, {"model_type": ["gpt_neox"]}, "model_type"),
                (NEOX, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "scaling"),
                (NEOX, {"rope_parameters": {"rope_type": "yarn"}}, "'yarn'"),
                (NEOX, {"rope_parameters": [1]},
                 r"json: rope_parameters is \[1\], not a JSON object"),
                (NEOX, {"hidden_act": "swiglu"}, "'swiglu'"),
                (NEOX, {"hidden_act": "mish"}, "'mish'"),
                (BTLM, {"activation_function": "tanh"}, "'tanh'"),
                (BTLM, {"position_embedding_type": "rotary"}, "'rotary'"),
                (BTLM, {"alibi_scaling": {"type": "linear", "train_seq_len": 2048}},
                 "train_seq_len"),
                (BTLM, {"alibi_scaling": {"type": "dynamic", "factor": 2.0}}, "alibi_scaling"),
                (BTLM, {"alibi_scaling": {"type": "linear", "factor": 0}}, "positive"),
                (NEOX, {"hidden_size": 0}, "hidden_size"),
                (NEOX, {"hidden_size": 16.0}, "hidden_size"),
                (NEOX, {"hidden_size": True}, "hidden_size"),
                (NEOX, {"hidden_size": 2**31}, "hidden_size"),
                (NEOX, {"hidden_size": 17}, "divide"), (NEOX, {"rotary_pct": 0.5001e9}, "rotates"),
                (NEOX, {"rotary_pct": 0.4}, "rotates 3"), (NEOX, {"rotary_pct": 0.01}, "rotates 0"),
                (NEOX, {"layer_norm_eps": 0.0}, "positive"), (NEOX, {"layer_norm_eps": "x"}, "eps"),
                (NEOX, {"layer_norm_eps": float("nan")}, "eps"),
                (NEOX, {"eos_token_id": 320}, "eos_token_id"), (NEOX, {"bos_token_id": -1}, "bos"),
                (NEOX, {"eos_token_id": [0]}, "eos_token_id"),
                (NEOX, {"num_hidden_layers": 2**31 - 1}, "layers; fetch"),
                (NEOX, {"use_parallel_residual": 1}, "use_parallel_residual")):
            self.refused(pattern, "import", self.directory(
                config__json={**hf, **changes}, model__safetensors=safetensors(
                    {"a": ("f32", (1,), bytes(4))})), self.path("m"))
        for data, pattern in ((b"{", "JSON"), (b"[]", "JSON object"), (b"\xff", "UTF-8"),
                              (b'{"model_type": "btlm", "model_type": "gpt_neox"}', "twice")):
            self.refused(pattern, "import", self.directory(config__json=data), self.path("m"))


class TokenizerTest(ConvertTest):
    def import_tokenizer(self, hf=NEOX, **files):
        if not hasattr(self, "weights"):
            self.weights = safetensors(random_tensors(NEOX, "f16"))
        model = self.imported(self.directory(config__json=hf, model__safetensors=self.weights,
                                             **files))
        return {name[10:]: entry for name, entry in self.contents(model).items()
                if name.startswith("tokenizer/")}

    def test_tables(self):
        ids, merges = byte_level_vocabulary()
        tables = self.import_tokenizer(tokenizer__json=tokenizer_json())
        n = len(ids) + 2
        self.assertEqual(json.loads(tables["info"][3]), {
            "n_tokens": n, "nfc": True, "unicode": unicodedata.unidata_version})
        ends = struct.unpack(f"<{n}I", tables["token_ends"][3])
        data = tables["token_bytes"][3]
        tokens = [data[start:end] for start, end in zip((0, *ends), ends)]
        self.assertEqual(tokens[2:258], [bytes([byte]) for byte in range(256)])
        self.assertEqual(tokens[258:], [b" t", b"he", b" the", b"  ", b"\n\n", b"   ",
                                        b"\xc3\xa9" * 2])
        self.assertEqual(tokens[0], b"<|endoftext|>")
        self.assertEqual(struct.unpack("<256I", tables["byte_ids"][3]), tuple(range(2, 258)))
        self.assertEqual(tables["merges"][1], (5, 3))
        self.assertEqual(struct.unpack("<15I", tables["merges"][3])[6:9], (258, 259, 260))
        self.assertEqual(struct.unpack("<8I", tables["added"][3]), (0, 1, 1, 1, 263, 2, 264, 2))

    def test_unicode_tables(self):
        tables = convert.unicode_tables(True)
        for name, major in (("letters", "L"), ("numbers", "N")):
            covered = [point for first, last in tables[name] for point in range(first, last + 1)]
            self.assertEqual(covered, [
                point for point in range(0x110000) if unicodedata.category(chr(point))[0] == major])
        for rows in tables.values():
            self.assertEqual(rows, sorted(rows))
        classes = dict(tables["classes"])
        parts = {point: [p for p in pair if p] for point, *pair in tables["decompositions"]}
        pairs = {(first, second): point for first, second, point in tables["compositions"]}

        def nfc(text):          # decompose, put marks in order, compose
            points = [ord(c) for c in text]
            while any(point in parts for point in points):
                points = [part for point in points for part in parts.get(point, [point])]
            for i in range(1, len(points)):
                while i and 0 < classes.get(points[i], 0) < classes.get(points[i - 1], 0):
                    points[i - 1], points[i] = points[i], points[i - 1]
                    i -= 1
            out, starter, last = [], None, 0
            for point in points:
                rank = classes.get(point, 0)
                if starter is not None and (last < rank or last == 0 and starter == len(out) - 1):
                    joined = pairs.get((out[starter], point))
                    if joined:
                        out[starter] = joined
                        continue
                out.append(point)
                last = rank
                if not rank:
                    starter = len(out) - 1
            return "".join(map(chr, out))

        rng = random.Random(3)
        interesting = [*parts, *classes, *(p for pair in pairs for p in pair), 0x20, 0x41, 0x3042]
        for point in interesting:
            self.assertEqual(nfc(chr(point)), unicodedata.normalize("NFC", chr(point)))
        for _ in range(3000):
            text = "".join(chr(rng.choice(interesting)) for _ in range(rng.randrange(1, 6)))
            self.assertEqual(nfc(text), unicodedata.normalize("NFC", text))

    def test_forms_agree(self):
        ids, merges = byte_level_vocabulary()
        strings = self.import_tokenizer(tokenizer__json=tokenizer_json())
        pairs = self.import_tokenizer(tokenizer__json=tokenizer_json(model={
            "merges": [list(pair) for pair in merges], "ignore_merges": False,
            "byte_fallback": False}))
        self.assertEqual(strings, pairs)

        plain = tokenizer_json(normalizer=None)
        plain["added_tokens"] = plain["added_tokens"][:2]
        for token in plain["added_tokens"]:
            token["normalized"] = True
        form = self.import_tokenizer(tokenizer__json=plain)
        self.assertFalse(json.loads(form["info"][3])["nfc"])
        self.assertNotIn("decompositions", form)
        lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
        old = {"vocab__json": ids, "merges__txt": "\n".join(lines).encode(),
               "special_tokens_map__json": {"pad_token": {"content": "<|pad|>"}}}
        self.assertEqual(self.import_tokenizer(**old), form)
        del ids["<|pad|>"]
        self.assertEqual(self.import_tokenizer(**old, added_tokens__json={"<|pad|>": 1}), form)
        listed = {"1": {"content": "<|pad|>", "special": True, "normalized": False}}
        self.assertEqual(self.import_tokenizer(
            **old, tokenizer_config__json={"added_tokens_decoder": listed}), form)
        # '#version' is skipped in the first line only; '#' is a token like any other.
        ids.update({"##": 263, "###": 264})
        merged = self.import_tokenizer(**{**old, "special_tokens_map__json": {}}, **{
            "added_tokens__json": {"<|pad|>": 1}})
        self.assertEqual(merged["merges"][1], (5, 3))
        old["merges__txt"] = b"# #\n## #\n"
        old["special_tokens_map__json"] = {}
        self.assertEqual(self.import_tokenizer(**old)["merges"][1], (2, 3))

    def test_refused(self):
        ids, merges = byte_level_vocabulary()

        def added(**changes):
            tokens = tokenizer_json()["added_tokens"]
            tokens[2].update(changes)
            return {"added_tokens": tokens}

        byte_level = {"type": "ByteLevel", "add_prefix_space": False}
        special = {"type": "TemplateProcessing",
                   "single": [{"SpecialToken": {"id": "x", "type_id": 0}}]}
        for changes, pattern in (
                ({"normalizer": {"type": "NFKC"}}, "NFKC"),
                ({"normalizer": {"type": "Sequence", "normalizers": []}}, "Sequence"),
                ({"normalizer": "NFC"}, "normalizer"),
                ({"pre_tokenizer": {**byte_level, "add_prefix_space": True}}, "pre_tokenizer"),
                ({"pre_tokenizer": {**byte_level, "use_regex": False}}, "pre_tokenizer"),
                ({"pre_tokenizer": {"type": "Whitespace"}}, "Whitespace"),
                ({"pre_tokenizer": None}, "pre_tokenizer"),
                ({"post_processor": special}, "post_proc"),
                ({"model": {"type": "Unigram"}}, "Unigram"),
                ({"model": {"dropout": 0.1}}, "dropout"),
                ({"model": {"unk_token": "x"}}, "unk_token"),
                ({"model": {"byte_fallback": True}}, "byte_fallback"),
                ({"model": {"ignore_merges": True}}, "ignore_merges"),
                ({"model": {"end_of_word_suffix": "</w>"}}, "end_of_word_suffix"),
                ({"model": {"vocab": {}}}, "merge 0"),
                ({"model": {"vocab": [], "merges": []}}, "malformed"),
                ({"model": {"merges": ["a b c"]}}, "merge 0"),
                ({"model": {"merges": [1]}}, "merge 0"),
                ({"model": {"merges": ["q q"]}}, "merge 0, 'q q'"),
                ({"model": {"merges": ["h e", "h e"]}}, "merge 1, 'h e'"),
                ({"model": {"vocab": {**ids, "x": -1}}}, "'x' has the id -1"),
                ({"model": {"vocab": {**ids, "x": 320}}}, "'x' has the id 320"),
                ({"model": {"vocab": {**ids, "xx": 5}}}, "'xx' contradicts"),
                ({"model": {"vocab": {**ids, "\ud800": 300}}}, "surrogate"),
                (added(lstrip=True), "lstrip"), (added(rstrip=True), "rstrip"),
                (added(single_word=True), "single_word"), (added(content="e\u0301"), "NFC"),
                (added(content=""), "empty"), (added(content=None), "malformed"),
                (added(id=400), "id 400"), (added(id=5), "contradicts"),
                (added(id=None), "id None"),
                (added(content="he"), "contradicts"), ({"added_tokens": [1]}, "malformed")):
            self.refused(pattern, "import", self.directory(
                config__json=NEOX, model__safetensors=safetensors(random_tensors(NEOX, "f16")),
                tokenizer__json=tokenizer_json(**changes)), self.path("m"))
        merges_txt = "\n".join(" ".join(pair) for pair in merges).encode()
        for files, pattern in (
                ({"vocab__json": ids}, "merges.txt"),
                ({"vocab__json": ids, "merges__txt": b"a\n"}, "merge 0"),
                ({"vocab__json": ids, "merges__txt": b"\xff"}, "UTF-8"),
                ({"vocab__json": {}, "merges__txt": b""}, "no tokens"),
                ({"vocab__json": ids, "merges__txt": merges_txt,
                  "special_tokens_map__json": {"pad_token": "[PAD]"}},
                 r"'\[PAD\]' has the id None"),
                ({"tokenizer__json": tokenizer_json(),
                  "tokenizer_config__json": {"add_prefix_space": True}}, "add_prefix_space"),
                ({"tokenizer__json": tokenizer_json(),
                  "tokenizer_config__json": {"add_bos_token": True}}, "add_bos_token"),
                ({"tokenizer__json": tokenizer_json(),
                  "tokenizer_config__json": {"added_tokens_decoder": {"x": 1}}},
                 "added_tokens_decoder")):
            self.refused(pattern, "import", self.directory(
                config__json=NEOX, model__safetensors=safetensors(random_tensors(NEOX, "f16")),
                **files),
                self.path("m"))


class ExportTest(ConvertTest):
    def stripped(self, model, **changed):
        """The model as `train init` would have made it: without files of Hugging Face's."""
        path = self.path(f"model{next(self.counter)}.bin")
        convert.write_container(path, convert.MODEL, [
            changed.get(name, (name, *entry))
            for name, entry in self.contents(model, "file").items()])
        return path

    def test_generated_files_import_again(self):
        for hf in (NEOX, {**NEOX, "rotary_pct": 1.0, "hidden_act": "gelu_pytorch_tanh",
                          "eos_token_id": None}, BTLM,
                   {**BTLM, "position_embedding_type": "learned", "scale_attn_weights": False,
                    "alibi_scaling": None, "activation_function": "relu"},
                   {**BTLM, "mup_scale_qk_dot_by_d": False,
                    "alibi_scaling": {"type": "linear", "factor": 2.5}}):
            source = self.directory(config__json=hf, tokenizer__json=tokenizer_json(),
                                    model__safetensors=safetensors(random_tensors(hf, "f16")))
            model = self.stripped(self.imported(source))
            target = self.path(f"out{next(self.counter)}")
            self.good("export", model, target)
            again = self.stripped(self.imported(target))
            first, second = self.contents(model), self.contents(again)
            config, config_again = (json.loads(entries.pop("config")[3])
                                    for entries in (first, second))
            self.assertEqual(first, second)
            for key, value in config.items():
                self.assertAlmostEqual(value, config_again[key], 12) if isinstance(value, float) \
                    else self.assertEqual(value, config_again[key])
            with open(os.path.join(target, "config.json"), "rb") as file:
                written = json.load(file)
            self.assertEqual(written["torch_dtype"], "float16")
            self.assertIn("rotary_pct" if hf["model_type"] == "gpt_neox" else "auto_map", written)
            with open(os.path.join(target, "tokenizer.json"), "rb") as file:
                made, given = json.load(file), tokenizer_json()
            self.assertEqual(made["added_tokens"], given["added_tokens"])
            self.assertEqual(made["model"]["merges"], given["model"]["merges"])
            self.assertLessEqual(given["model"]["vocab"].items(), made["model"]["vocab"].items())

    def test_byte_tokenizer_without_merges(self):
        model = self.imported(self.directory(
            config__json=NEOX, tokenizer__json=tokenizer_json(),
            model__safetensors=safetensors(random_tensors(NEOX, "f32"))))
        end = "<|endoftext|>".encode()
        entries = [(name, *entry)
                   for name, entry in self.contents(model, "file", "tokenizer").items()]
        entries += [convert.blob("tokenizer/info",
                                 b'{"n_tokens":257,"nfc":false,"unicode":"14.0.0"}'),
                    convert.u32_entry("tokenizer/token_ends", [
                        len(end), *(len(end) + 1 + i for i in range(256))]),
                    convert.blob("tokenizer/token_bytes", end + bytes(range(256))),
                    convert.u32_entry("tokenizer/byte_ids", range(1, 257)),
                    convert.u32_entry("tokenizer/added", [0, 1], 2)]
        path, target = self.path("init.bin"), self.path("out")
        convert.write_container(path, convert.MODEL, entries)
        self.good("export", path, target)
        with open(os.path.join(target, "tokenizer.json"), "rb") as file:
            made = json.load(file)
        self.assertEqual((made["model"]["merges"], made["normalizer"]), ([], None))
        self.assertEqual(made["model"]["vocab"]["Ġ"], 33)
        self.assertEqual(len(made["model"]["vocab"]), 257)

    def test_dtype_tells_the_truth(self):
        for key in ("torch_dtype", "dtype"):
            hf = {**{k: v for k, v in NEOX.items() if k != "torch_dtype"}, "note": "\u00fc",
                  key: "float16"}
            model = self.imported(self.directory(
                config__json=hf, model__safetensors=safetensors(random_tensors(NEOX, "f32"))))
            target = self.path(f"out{next(self.counter)}")
            self.good("export", model, target)
            with open(os.path.join(target, "config.json"), "rb") as file:
                self.assertEqual(json.load(file), {**hf, key: "float32"})

    def test_dtype_is_that_of_the_matrices(self):
        """Matrices in bf16 beside vectors in f32, which are many more tensors, and the reverse."""
        for hf, matrices, vectors in ((NEOX, "bf16", "f32"), (BTLM, "f32", "bf16")):
            wide, narrow = random_tensors(hf, matrices), random_tensors(hf, vectors)
            tensors = {name: wide[name] if len(wide[name][1]) == 2 else narrow[name]
                       for name in wide}
            truth, told = (convert.TORCH_DTYPES[dtype] for dtype in (matrices, vectors))
            model, word_for_word = (self.imported(self.directory(
                config__json={**hf, "torch_dtype": value}, model__safetensors=safetensors(tensors)))
                for value in (told, "torch." + truth))
            target = self.path(f"out{next(self.counter)}")
            self.good("export", word_for_word, target)
            self.assertEqual(convert.read_bytes(os.path.join(target, "config.json")),
                             json.dumps({**hf, "torch_dtype": "torch." + truth}).encode())
            for path in (model, self.stripped(model)):
                target = self.path(f"out{next(self.counter)}")
                self.good("export", path, target)
                with open(os.path.join(target, "config.json"), "rb") as file:
                    self.assertEqual(json.load(file)["torch_dtype"], truth)
                back = convert.read_safetensors(os.path.join(target, "model.safetensors"))
                self.assertEqual({name: (tensor.dtype, tensor.shape, convert.read_entry(tensor))
                                  for name, tensor in back.items()}, tensors)
                order = [convert.ITEM_BYTES[tensor.dtype] for tensor in back.values()]
                self.assertEqual(order, sorted(order, reverse=True))
                self.assertEqual(self.contents(self.imported(target), "file", "config"),
                                 self.contents(path, "file", "config"))

    def test_refused(self):
        model = self.imported(self.directory(
            config__json=NEOX, model__safetensors=safetensors(random_tensors(NEOX, "f16"))))
        target = self.path("full")
        os.mkdir(target)
        self.good("export", model, target)                      # an empty directory is filled
        self.refused("not an empty directory", "export", model, target)
        self.refused("not an empty directory", "export", model, model)
        self.refused("exists already and is never overwritten; choose another name$",
                     "import", target, model)
        self.refused(r"model\d.bin: is no directory; the order is import DIR FILE",
                     "import", model, target)                   # swapped
        self.refused("is no directory", "import", self.path("new.bin"), target)
        self.refused("full: is a Hugging Face folder.*did you mean import", "export", target,
                     self.path("x"))
        adapter = self.directory(adapter_config__json=PEFT)
        self.refused("is a Hugging Face folder", "export", adapter, self.path("x"))
        unfinished = self.directory(config__json={"command": "dpo"})
        self.refused("model.bin: No such file", "export", unfinished, self.path("x"))
        self.refused("No such file", "export", self.path("nothing"), self.path("x"))
        run = self.directory(config__json={"command": "sft", "options": {"model": "m"}},
                             model__bin=convert.read_bytes(model))
        for options in ([], ["--base", model]):
            self.refused(r"in\d+: is a run directory of train.*`convert.py export` makes a "
                         "checkpoint of its model or adapter$",
                         "import", run, self.path("x"), *options)
        self.good("export", run, self.path("of_run"))
        self.refused("header", "export", os.path.join(target, "config.json"), self.path("x"))
        config = json.loads(self.contents(model)["config"][3])
        for change in ({"logit_scale": 0.5}, {"attention_scale": 0.3}, {"n_layers": 10**9},
                       {"d_model": "x"}, {"arch": "llama"}):
            wrong = self.stripped(model, config=convert.blob("config", json.dumps(
                {**config, **change}).encode()))
            self.refused("cannot be said|malformed|layers|shape", "export", wrong, self.path("x"))
        wrong = self.stripped(model, config=convert.blob("config", b"{}"))
        self.refused("malformed", "export", wrong, self.path("x"))
        state = self.path("state.bin")
        convert.write_container(state, 3, [("config", "u8", (2,), 0, b"{}")])
        self.refused("holds a training state, not a model", "export", state, self.path("x"))
        with open(model, "r+b") as file:
            file.seek(-3, os.SEEK_END)
            file.write(b"\xff\xee\xdd")
        self.refused("CRC-32", "export", model, self.path("x"))


PEFT = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8,
        "lora_dropout": 0.05, "bias": "none", "target_modules": ["dense", "query_key_value"],
        "fan_in_fan_out": False, "init_lora_weights": True, "use_rslora": False, "use_dora": False,
        "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None, "exclude_modules": None,
        "layers_to_transform": None, "inference_mode": True, "peft_version": "0.21.2",
        "megatron_core": "megatron.core", "qalora_group_size": 16, "use_qalora": False,
        "base_model_name_or_path": "EleutherAI/pythia-14m"}
LAYERS = {"gpt_neox": {"attention.query_key_value": (16, 48),       # (in, out)
                       "attention.dense": (16, 16),
                       "mlp.dense_h_to_4h": (16, 24), "mlp.dense_4h_to_h": (24, 16)},
          "btlm": {"attn.c_attn": (12, 36), "attn.c_proj": (12, 12), "mlp.c_fc": (12, 20),
                   "mlp.c_fc2": (12, 20), "mlp.c_proj": (20, 12)}}


class AdapterTest(ConvertTest):
    def base(self, hf):
        return self.imported(self.directory(
            config__json=hf, model__safetensors=safetensors(random_tensors(hf, "f16"))))

    def modules(self, hf, *parts, layers=(0, 1)):
        """The paths of some linear layers (all of them by default), in model order."""
        arch = hf["model_type"]
        path = "gpt_neox.layers.{}.{}" if arch == "gpt_neox" else "transformer.h.{}.{}"
        return [path.format(i, part) for i in layers for part in LAYERS[arch]
                if not parts or part in parts]

    def tensors(self, hf, modules, dtypes=("f32",), r=4):
        """{name: (dtype, shape, bytes)} as PEFT saves them, in model order."""
        rng, dtypes, result = random.Random(3), itertools.cycle(dtypes), {}
        for module in modules:
            n_in, n_out = LAYERS[hf["model_type"]][module.split(".", 3)[3]]
            for part, shape in (("A", (r, n_in)), ("B", (n_out, r))):
                dtype = next(dtypes)
                size = math.prod(shape) * convert.ITEM_BYTES[dtype]
                result[f"base_model.model.{module}.lora_{part}.weight"] = (
                    dtype, shape, bytes(rng.randrange(256) for _ in range(size)))
        return result

    def saved(self, tensors):
        """A file as safetensors' save_file writes it: wide dtypes first, then by name."""
        rank = {"f32": 0, "bf16": 1, "f16": 2}
        ordered = {name: tensors[name]
                   for name in sorted(tensors, key=lambda name: (rank[tensors[name][0]], name))}
        data = safetensors(ordered)
        length = 8 + struct.unpack("<Q", data[:8])[0]
        text = json.dumps(json.loads(data[8:length]), separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text + data[length:]

    def adapter(self, config, tensors, base):
        path = self.path(f"adapter{next(self.counter)}.bin")
        source = self.directory(adapter_config__json=config,
                                adapter_model__safetensors=self.saved(tensors))
        self.output = self.good("import", source, path, "--base", os.path.relpath(base))
        return path

    def rewritten(self, entries, changes):
        """An adapter file with some entries changed (config: an object), or left out (None)."""
        path = self.path(f"adapter{next(self.counter)}.bin")
        blobs = {name: convert.blob(name, json.dumps(value).encode())[1:]
                 for name, value in changes.items() if isinstance(value, (dict, list))}
        convert.write_container(path, convert.ADAPTER, [
            (name, *entry) for name, entry in {**entries, **changes, **blobs}.items() if entry])
        return path

    def exported(self, adapter):
        target = self.path(f"out{next(self.counter)}")
        self.good("export", adapter, target)
        self.assertEqual(sorted(os.listdir(target)),
                         ["adapter_config.json", "adapter_model.safetensors"])
        return [convert.read_bytes(os.path.join(target, name))
                for name in sorted(os.listdir(target))]

    def test_comes_back_byte_for_byte(self):
        for hf, changes, dtypes in (
                (NEOX, {"target_modules": ["dense", "query_key_value"]}, ["f32"]),
                (NEOX, {"target_modules": "all-linear"}, ["bf16", "f32", "f16"]),
                (BTLM, {"target_modules": ["c_proj", "c_attn"], "fan_in_fan_out": True}, ["f16"]),
                (BTLM, {"target_modules": self.modules(BTLM)[::-1], "fan_in_fan_out": True,
                        "use_rslora": True, "lora_alpha": 2.5, "r": 1}, ["bf16"])):
            base, config = self.base(hf), {**PEFT, **changes}
            names = config["target_modules"]
            modules = [module for module in self.modules(hf) if names == "all-linear"
                       or any(("." + module).endswith("." + name) for name in names)]
            tensors = self.tensors(hf, modules, dtypes, config["r"])
            text = json.dumps(config, sort_keys=True).encode() + b"  "
            adapter = self.adapter(text, tensors, base)
            self.assertNotIn("note:", self.output)
            self.assertIn(f"{len(tensors)} tensors", self.output)

            entries = convert.read_container(adapter, convert.ADAPTER)
            self.assertEqual(list(entries),
                             ["config", "base", *tensors, "file/adapter_config.json"])
            self.assertEqual(json.loads(entries["config"][3]), {
                "r": config["r"], "alpha": config["lora_alpha"], "dropout": 0.05,
                "rslora": config["use_rslora"], "base": os.path.realpath(base),
                "target_modules": names if names == "all-linear" else ",".join(names)})
            data = convert.read_bytes(base)
            table_end, = struct.unpack_from("<Q", data, 24)
            self.assertEqual(entries["base"], ("u64", (1,), 0, struct.pack(
                "<Q", convert.fnv1a(data[:table_end]))))
            for name, tensor in tensors.items():
                self.assertEqual(entries[name], (*tensor[:2], 1, tensor[2]))
            self.assertEqual(entries["file/adapter_config.json"][3], text)
            self.assertEqual(self.exported(adapter), [text, self.saved(tensors)])

    def test_hash(self):
        for text, value in ((b"", 0xcbf29ce484222325), (b"a", 0xaf63dc4c8601ec8c),
                            (b"foobar", 0x85944171f73967e8)):       # its authors' test vectors
            self.assertEqual(convert.fnv1a(text), value)

    def test_targets(self):
        """Names for the file that mean the adapted layers and no others, whatever PEFT was told."""
        every, attn = self.modules(BTLM), "attn.c_attn,attn.c_proj".split(",")
        for changes, modules, names in (
                ({"target_modules": "All-Linear"}, every, "all-linear"),
                ({"target_modules": "all-linear", "exclude_modules": ["c_fc2"]},
                 self.modules(BTLM, *attn, "mlp.c_fc", "mlp.c_proj"), "c_attn,c_proj,c_fc"),
                ({"target_modules": ["c_proj", "attn.c_attn", "q_proj", "c_proj"]},
                 self.modules(BTLM, *attn, "mlp.c_proj"), "c_proj,attn.c_attn"),
                ({"target_modules": r".*c_(attn|fc)"},
                 self.modules(BTLM, "attn.c_attn", "mlp.c_fc"), "c_attn,c_fc"),
                ({"target_modules": r".*\.attn\..*"}, self.modules(BTLM, *attn),
                 "c_attn,attn.c_proj"),
                ({"target_modules": r".*\.h\.1\.mlp.c_fc2?"},
                 self.modules(BTLM, "mlp.c_fc", "mlp.c_fc2", layers=[1]),
                 "transformer.h.1.mlp.c_fc,transformer.h.1.mlp.c_fc2"),
                ({"target_modules": ["c_attn", "h.0.mlp.c_fc", "transformer.h.0.mlp.c_fc2"],
                  "layers_to_transform": [1], "layers_pattern": "h"},
                 ["transformer.h.0.mlp.c_fc2", "transformer.h.1.attn.c_attn"],
                 "transformer.h.0.mlp.c_fc2,transformer.h.1.attn.c_attn"),
                ({"target_modules": ["c_attn"], "layers_to_transform": [0, 1]},
                 self.modules(BTLM, "attn.c_attn"), "c_attn"),
                ({"target_modules": ["c_attn"], "layers_to_transform": 0, "layers_pattern": []},
                 self.modules(BTLM, "attn.c_attn", layers=[0]), "transformer.h.0.attn.c_attn"),
                ({"target_modules": ["c_attn", "c_proj"], "exclude_modules": r".*mlp.*"},
                 self.modules(BTLM, *attn), "c_attn,attn.c_proj")):
            base, tensors = self.base(BTLM), self.tensors(BTLM, modules)
            config = {**PEFT, "fan_in_fan_out": True, **changes}
            adapter = self.adapter(config, tensors, base)
            entries = convert.read_container(adapter)
            self.assertEqual(json.loads(entries["config"][3])["target_modules"], names, changes)
            self.assertEqual([name for name in entries if "lora" in name], list(tensors))
            meant = [module for module in every if names == "all-linear" or any(
                ("." + module).endswith("." + name) for name in names.split(","))]
            self.assertEqual(meant, modules)
            self.assertEqual(self.exported(adapter)[0], json.dumps(config).encode())

    def test_all_sources_give_the_same_tensors(self):
        base, tensors = self.base(NEOX), self.tensors(
            NEOX, self.modules(NEOX, "attention.query_key_value", "attention.dense"))
        named = {name.replace(".weight", ".default.weight"): tensor
                 for name, tensor in tensors.items()}
        shuffled = dict(sorted(tensors.items(), key=lambda item: item[1][2]))
        expected = convert.read_container(self.adapter(PEFT, tensors, base))
        for files in ({"adapter_model__safetensors": safetensors(named)},
                      {"adapter_model__safetensors": safetensors(shuffled),
                       "adapter_model__bin": b"not read"},
                      {"adapter_model__bin": torch_checkpoint(named)},
                      {"adapter_model__bin": torch_checkpoint(shuffled, strided=True)}):
            path = self.path(f"adapter{next(self.counter)}.bin")
            self.good("import", self.directory(adapter_config__json=PEFT, **files), path, "--base",
                      base)
            self.assertEqual(convert.read_container(path), expected)

    def test_defaults_notes_and_run_directories(self):
        run = self.directory(model__bin=convert.read_bytes(self.base(BTLM)))
        config = {"peft_type": "LORA", "target_modules": ["c_fc2"], "fan_in_fan_out": False,
                  "some_day": None, "loftq_config": {}, "eva_config": {"rho": 2}}
        tensors = self.tensors(BTLM, self.modules(BTLM, "mlp.c_fc2"), r=8)
        adapter = self.adapter(config, tensors, run)
        self.assertIn("fan_in_fan_out should be true", self.output)
        self.assertEqual(json.loads(convert.read_container(adapter)["config"][3]), {
            "r": 8, "alpha": 8, "dropout": 0, "rslora": False, "target_modules": "c_fc2",
            "base": os.path.realpath(os.path.join(run, "model.bin"))})
        lora_run = self.directory(adapter__bin=convert.read_bytes(adapter))
        self.assertEqual(self.exported(lora_run), self.exported(adapter))

    def test_generated_config(self):
        """What ./train made has no adapter_config.json; what it changed, an untrue one."""
        for hf, names, parts in ((NEOX, "all-linear", ()), (BTLM, "c_attn,mlp.c_proj", (
                "attn.c_attn", "mlp.c_proj"))):
            base, tensors = self.base(hf), self.tensors(hf, self.modules(hf, *parts))
            fan = hf is BTLM
            listed = names if names == "all-linear" else names.split(",")
            adapter = self.adapter({**PEFT, "target_modules": listed, "fan_in_fan_out": fan},
                                   tensors, base)
            entries = convert.read_container(adapter)
            config, original = json.loads(entries["config"][3]), "file/adapter_config.json"
            for change in ({}, {"alpha": 16.5}, {"dropout": 0.1}, {"rslora": True}):
                now = {**config, **change}
                made, data = self.exported(self.rewritten(
                    entries, {"config": now} if change else {original: None}))
                self.assertEqual(data, self.saved(tensors))
                made = json.loads(made)
                for key, value in (
                        ("peft_type", "LORA"), ("task_type", "CAUSAL_LM"), ("r", 4),
                        ("lora_alpha", now["alpha"]), ("lora_dropout", now["dropout"]),
                        ("use_rslora", now["rslora"]), ("fan_in_fan_out", fan), ("bias", "none"),
                        ("init_lora_weights", True), ("base_model_name_or_path", base),
                        ("target_modules", listed)):
                    self.assertEqual(made[key], value)
                self.assertIs(type(made["lora_alpha"]), float if "alpha" in change else int)
                again = self.adapter(made, tensors, base)
                self.assertEqual(json.loads(convert.read_container(again)["config"][3]), now)
            rounded = self.rewritten(entries, {                     # as C prints a float
                "config": {**config, "dropout": 0.05000000074505806}})
            self.assertEqual(self.exported(rounded)[0], entries[original][3])
            other = self.rewritten(entries, {original: {**PEFT, "target_modules": ["q_proj"]}})
            self.assertEqual(json.loads(self.exported(other)[0])["target_modules"], listed)

    def test_refused_configs(self):
        base = self.base(NEOX)
        tensors = self.saved(self.tensors(NEOX, self.modules(
            NEOX, "attention.query_key_value", "attention.dense")))
        for changes, pattern in (
                ({"peft_type": "LOHA"}, "peft_type.*LOHA"), ({"peft_type": None}, "peft_type"),
                ({"task_type": "SEQ_CLS"}, "task_type"), ({"bias": "lora_only"}, "bias"),
                ({"use_dora": True}, "use_dora"), ({"modules_to_save": ["embed_in"]}, "modules_to"),
                ({"rank_pattern": {"dense": 2}}, "rank_pattern"),
                ({"alpha_pattern": {"dense": 2}}, "alpha_pattern"),
                ({"lora_bias": True}, "lora_bias"), ({"use_qalora": True}, "use_qalora"),
                ({"trainable_token_indices": [1]}, "trainable_token_indices"),
                ({"megatron_config": {"a": 1}}, "megatron_config"),
                ({"layer_replication": [[0, 1]]}, "layer_replication"),
                ({"target_parameters": ["x"]}, "target_parameters"),
                ({"from_the_future": 1}, "from_the_future"),
                ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
                ({"init_lora_weights": "olora"}, "init_lora_weights"),
                ({"init_lora_weights": ["x"]}, "init_lora_weights"),
                ({"r": 0}, "r is 0"), ({"r": 4.0}, "r is 4.0"), ({"lora_alpha": 0}, "lora_alpha"),
                ({"lora_alpha": "8"}, "lora_alpha"), ({"lora_dropout": 1}, "lora_dropout"),
                ({"lora_dropout": -0.5}, "lora_dropout"), ({"use_rslora": 1}, "use_rslora"),
                ({"target_modules": None}, "target_modules is null"),
                ({"target_modules": {}}, "target_modules"), ({"target_modules": [3]}, "target_mod"),
                ({"target_modules": []}, "no linear layer"),
                ({"target_modules": ["q_proj"]}, "no linear layer"),
                ({"target_modules": "(dense"}, "target_modules.*regular expression"),
                ({"exclude_modules": "*"}, "exclude_modules.*regular expression"),
                ({"exclude_modules": 3}, "exclude_modules"),
                ({"target_modules": ["dense", "embed_out"]}, "embed_out.*inside the blocks"),
                ({"target_modules": ["dense", "lm_head"]}, "lm_head.*inside the blocks"),
                ({"target_modules": ["dense", "embed_in"]}, "embed_in.*inside the blocks"),
                ({"target_modules": ".*"}, "embed_out|lm_head"),
                ({"layers_to_transform": [-1]}, "layers_to_transform"),
                ({"layers_to_transform": "0"}, "layers_to_transform"),
                ({"layers_to_transform": True}, "layers_to_transform"),
                ({"layers_to_transform": [0], "target_modules": "all-linear"},
                 "layers_to_transform"),
                ({"layers_pattern": "blocks"}, "layers_pattern"),
                ({"layers_pattern": [["layers"]]}, "layers_pattern"),
                ({"layers_pattern": 1}, "layers_pattern")):
            self.refused(pattern, "import", self.directory(
                adapter_config__json={**PEFT, **changes}, adapter_model__safetensors=tensors),
                self.path("a"), "--base", base)
        for text in (b"[]", b"{", b"\xff"):
            self.refused("adapter_config.json", "import", self.directory(
                adapter_config__json=text, adapter_model__safetensors=tensors), self.path("a"),
                "--base", base)

    def test_refused_tensors(self):
        base, modules = self.base(NEOX), self.modules(NEOX, "attention.query_key_value",
                                                      "attention.dense")
        tensors = self.tensors(NEOX, modules)
        name = "base_model.model.gpt_neox.layers.1.attention.dense.lora_B.weight"
        _dtype, shape, data = tensors[name]

        def other(old, new):
            return {**tensors, name.replace(old, new): tensors[name]}

        for wrong, pattern in (
                ({k: v for k, v in tensors.items() if k != name}, f"'{name}' is missing"),
                ({**tensors, name: ("f32", shape[::-1], data)}, f"'{name}' has shape"),
                ({**tensors, name: ("f32", (math.prod(shape),), data)}, f"'{name}' has shape"),
                ({**tensors, name: ("f64", shape, data * 2)}, f"'{name}' is F64"),
                (other(".weight", ".second.weight"), "twice"),
                (other("lora_B.weight", "lora_B.bias"), "lora_B.bias.*no lora_A or lora_B"),
                (other("lora_B.weight", "lora_magnitude_vector"), "lora_magnitude_vector"),
                (other("base_model.model.", ""), "no lora_A or lora_B"),
                (other("layers.1", "layers.2"), "layers.2.*belongs to no linear layer"),
                (other("attention.dense", "mlp.dense_h_to_4h"), "dense_h_to_4h.*belongs to no"),
                (other("gpt_neox.layers.1.attention.dense", "embed_out"), "embed_out.*output head"),
                (other("gpt_neox.layers.1.attention.dense", "lm_head"), "lm_head.*output head"),
                (other("layers.1.attention.dense.lora_B.weight", "embed_in.lora_embedding_B"),
                 "embeddings"),
                (self.tensors(NEOX, modules, r=2), "has shape .*by r and the base"),
                ({}, "missing")):
            self.refused(pattern, "import", self.directory(
                adapter_config__json=PEFT, adapter_model__safetensors=safetensors(wrong)),
                self.path("a"), "--base", base)
        source = self.directory(adapter_config__json=PEFT,
                                adapter_model__safetensors=safetensors(tensors))
        adapter = self.path("good.bin")
        self.good("import", source, adapter, "--base", base)
        self.refused("--base model.bin", "import", source, self.path("a"))
        self.refused("has no adapter_config.json", "import", self.directory(config__json=NEOX),
                     self.path("a"), "--base", base)
        self.refused("exists already", "import", source, adapter, "--base", base)
        self.refused("No such file", "import", source, self.path("a"), "--base", self.path("no"))
        self.refused("holds an adapter, not a model", "import", source, self.path("a"), "--base",
                     adapter)
        self.refused("missing|no linear layer", "import", source, self.path("a"), "--base",
                     self.base(BTLM))
        wider = self.base({**NEOX, "hidden_size": 32})
        self.refused("has shape", "import", source, self.path("a"), "--base", wider)
        self.refused("neither adapter_model.safetensors nor adapter_model.bin", "import",
                     self.directory(adapter_config__json=PEFT), self.path("a"), "--base", base)

    def test_refused_exports(self):
        base, tensors = self.base(NEOX), self.tensors(NEOX, self.modules(NEOX, "attention.dense"))
        config = {**PEFT, "target_modules": ["dense"]}
        entries = convert.read_container(self.adapter(config, tensors, base))
        settings = json.loads(entries["config"][3])
        name = next(iter(tensors))
        for change, pattern in (
                ({"config": None}, "malformed"), ({"base": None}, "malformed"),
                ({name: None}, "malformed"), ({name: ("f32", (4, 16), 1, bytes(256))}, None),
                ({name: ("f32", (16, 4), 1, bytes(256))}, "malformed"),
                ({name: ("f32", (64,), 0, bytes(256))}, "malformed"),
                ({name: ("f64", (4, 16), 1, bytes(512))}, "is F64"),
                ({"extra": ("f32", (1,), 0, bytes(4))}, "'extra' is no lora_A"),
                ({name: None for name in tensors}, "malformed"),
                *(({"config": value}, "malformed") for value in (
                    [], {}, {**settings, "r": 5}, {**settings, "alpha": "8"},
                    {**settings, "alpha": math.inf}, {**settings, "target_modules": 3})),
                ({"config": ("u8", (1,), 0, b"{")}, "not valid JSON"),
                ({"file/adapter_config.json": ("u8", (1,), 0, b"{")}, "not valid JSON")):
            path = self.rewritten(entries, change)
            if pattern:
                self.refused(pattern, "export", path, self.path("x"))
            else:
                self.good("export", path, self.path("ok"))
                self.refused("not an empty directory", "export", path, self.path("ok"))


class DataTest(ConvertTest):
    def file(self, content, name=None):
        path = self.path(name or f"data{next(self.counter)}")
        if not isinstance(content, bytes):
            content = "\n".join(json.dumps(row) for row in content).encode()
        with open(path, "wb") as file:
            file.write(content)
        return path

    def converted(self, kind, content, *options):
        out = self.path(f"out{next(self.counter)}.jsonl")
        self.output = self.good("data", kind, self.file(content), out, *options)
        with open(out, encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    def test_shp(self):
        def row(a, b, label, history="Why?", ref_a="because", ref_b="dunno"):
            return {"history": history, "human_ref_A": ref_a, "human_ref_B": ref_b, "score_A": a,
                    "score_B": b, "labels": label, "post_id": "x"}

        rows = self.converted("shp", [row(9, 2, 1), row(2, 4, 0, ref_b="yes"), row(3, 2, True),
                                      row(5, 0, 1),
                                      row(8, 1, 1, ref_b=" "), row(8, 1, 1, " "),
                                      row(4, 1, "1", "Who?")])
        prompt = "\n\nHuman: Why?\n\nAssistant:"
        self.assertEqual(rows, [      # the best answer of a post comes last
            {"prompt": prompt, "chosen": " yes", "rejected": " because"},
            {"prompt": prompt, "chosen": " because", "rejected": " dunno"},
            {"prompt": "\n\nHuman: Who?\n\nAssistant:", "chosen": " because",
             "rejected": " dunno"}])
        self.assertIn("3 of 7 records kept", self.output)
        self.assertIn("2 dropped: score ratio below 2", self.output)
        self.assertIn("1 dropped: empty answer", self.output)
        for wrong, pattern in (({"labels": 2}, "line 1: 'labels'"),
                               ({"score_A": "9"}, "'score_A' is"),
                               ({"human_ref_A": None}, "no 'human_ref_A'")):
            self.refused(pattern, "data", "shp", self.file([{**row(9, 2, 1), **wrong}]),
                         self.path("o"))

    def test_alpaca(self):
        rows = [{"instruction": "Add.", "input": "1 2", "output": "3"},
                {"instruction": "Sing.", "input": "", "output": "La \u00fc"},
                {"instruction": "Rest.", "output": " "}, {"instruction": "", "output": "x"}]
        array = json.dumps(rows, indent=1).encode()
        expected = self.converted("alpaca", array)
        self.assertEqual(expected, self.converted("alpaca", rows))
        self.assertEqual(expected, self.converted("alpaca", b"\xef\xbb\xbf" + array))
        self.assertEqual(expected, self.converted("alpaca", gzip.compress(array)))
        self.assertEqual(expected[0], {"prompt": (
            "Below is an instruction that describes a task, paired with an input that provides "
            "further context. Write a response that appropriately completes the request.\n\n"
            "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:"), "completion": "3"})
        self.assertEqual(expected[1], {"prompt": (
            "Below is an instruction that describes a task. Write a response that appropriately "
            "completes the request.\n\n### Instruction:\nSing.\n\n### Response:"),
            "completion": "La \u00fc"})
        self.assertIn("2 of 4 records kept", self.output)
        self.assertEqual(self.converted("alpaca", rows, "--template", "hh"), [
            {"prompt": "\n\nHuman: Add.\n1 2\n\nAssistant:", "completion": " 3"},
            {"prompt": "\n\nHuman: Sing.\n\nAssistant:", "completion": " La \u00fc"}])
        pair = {"instruction": "{}", "output": "o", "chosen": "c", "rejected": "r"}
        self.assertEqual([{"chosen": "c", "rejected": "r"}], [
            {key: row[key] for key in row if key != "prompt"}
            for row in self.converted("alpaca", [pair])])
        self.refused("record 2: .*mixed", "data", "alpaca",
                     self.file(json.dumps([rows[0], pair]).encode()),
                     self.path("o"))
        self.refused("no 'rejected'", "data", "alpaca", self.file([{**pair, "rejected": None}]),
                     self.path("o"))

    def test_messages(self):
        def talk(*contents, system=None):
            messages = [{"role": ("user", "assistant")[i % 2], "content": text}
                        for i, text in enumerate(contents)]
            return [{"role": "system", "content": system}] * (system is not None) + messages

        def answer(text):
            return [{"role": "assistant", "content": text}]

        pair = {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " good", "rejected": " bad"}
        for row in ({"prompt": "Hi", "chosen": talk("Hi", "good"), "rejected": talk("Hi", "bad")},
                    {"chosen": talk("Hi", "good"), "rejected": talk("Hi", "bad")},
                    {"prompt": "Hi", "chosen": answer("good"), "rejected": answer("bad")},
                    {"prompt": talk("Hi"), "chosen": answer("good"), "rejected": answer("bad")},
                    {"prompt": talk("Hi"), "chosen": talk("Hi", "good"),
                     "rejected": talk("Hi", "bad"),
                     "messages": talk("Hi", "good"), "score_chosen": 9.0}):
            self.assertEqual(self.converted("messages", [row]), [pair])
        long = {"prompt": "\n\nHuman: Be kind.\n\nHi\n\nAssistant: Hello\n\nHuman: Bye\n\n"
                          "Assistant:",
                "completion": " So long"}
        turns = talk("Hi", "Hello", "Bye", "So long", system="Be kind.")
        self.assertEqual(self.converted("messages", [{"messages": turns}]), [long])
        self.assertEqual(self.converted("messages",
                                        [{"prompt": turns[:-1], "completion": turns[-1:]}]),
                         [long])
        self.assertEqual(self.converted("messages", [
            {"prompt": turns[:1], "chosen": talk("Hi", "a"),
             "rejected": talk("Hi", "b")}])[0]["prompt"],
            "\n\nHuman: Be kind.\n\nHi\n\nAssistant:")
        good = {"chosen": talk("Hi", "good"), "rejected": talk("Hi", "bad")}
        self.assertEqual(len(self.converted("messages", [
            good, {**good, "rejected": talk("Ho", "bad")},
            {**good, "rejected": talk("Hi", "b", "c")},
            {**good, "rejected": []}, {"chosen": answer("x"), "rejected": answer("y")},
            {**good, "rejected": talk("Hi", "")},
            {"chosen": [{"role": "tool", "content": ""}] + talk("Hi", "a"),
             "rejected": [{"role": "tool", "content": ""}] + talk("Hi", "b")}])), 1)
        for reason in ("2 dropped: does not end with an assistant",
                       "1 dropped: chosen and rejected differ",
                       "1 dropped: no user message", "1 dropped: empty answer",
                       "1 dropped: a role"):
            self.assertIn(reason, self.output)
        for wrong, pattern in (
                ({"prompt": "x"}, "no chosen"),
                ({"chosen": "x", "rejected": answer("y")}, "'chosen' is \"x\", not a list"),
                ({"messages": [1]}, "message 1 of 'messages': is not a JSON object"),
                ({"messages": [{"role": "user"}]}, "message 1 of 'messages': has no 'content'"),
                ({"messages": talk("a", 3)}, "message 2 of 'messages': 'content' is 3")):
            self.refused("line 1.*" + pattern, "data", "messages", self.file([wrong]),
                         self.path("o"))

    def test_text_in_trains_own_fields(self):
        """It stays as it is, whether it comes in lines or in an array."""
        start = "\n\nHuman: Hi\n\nAssistant:"
        for rows in ([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2,
                     [{"chosen": start + " b", "rejected": start + " c"}] * 2,
                     [{"prompt": "", "completion": "b"}, {"prompt": "a", "completion": " \u00fc"}],
                     [{"text": "a\n"}, {"text": "b"}, {"text": "b"}]):
            array = json.dumps(rows, indent=1).encode()
            self.assertEqual(self.converted("messages", rows), rows)
            self.assertEqual(self.converted("messages", gzip.compress(array)), rows)
            more = [{**row, "id": 7} for row in rows]
            self.assertEqual(self.converted("messages", more), rows)
            self.refused(r"line 2: has prompt/completion, those before it prompt/chosen/rejected.*"
                         "mixed", "data", "messages", self.file([
                             {"prompt": "a", "chosen": "b", "rejected": "c"},
                             {"prompt": "a", "response": "b"}]), self.path("o"))
        turn = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "b"}]
        self.assertEqual(self.converted("messages", [
            {"prompt": "a", "response": "b"}, {"prompt": turn[:1], "response": turn[1:]},
            {"prompt": "a", "response": " "}]),
            [{"prompt": "a", "completion": "b"}, {"prompt": start, "completion": " b"}])
        self.assertIn("1 dropped: empty answer", self.output)
        # A list beside the text is the conversation that it was taken from.
        self.assertEqual(self.converted("messages", [
            {"prompt": "Hi", "messages": turn, "response": "b", "text": "Hi b"}]),
            [{"prompt": start, "completion": " b"}])
        for wrong, pattern in (
                ({"prompt": "a", "chosen": "b"}, "line 1: has no 'rejected'"),
                ({"completion": "b"}, "line 1: has no 'prompt'"),
                ({"messages": "b"}, "line 1: 'messages' is \"b\", not a list"),
                ({"prompt": turn[:1], "chosen": "b", "rejected": "c"}, "line 1: 'prompt' is"),
                ({"prompt": "a", "chosen": "b", "rejected": 3}, "line 1: 'rejected' is 3"),
                ({"text": 3}, "line 1: 'text' is 3, not a str"),
                ({"question": "a", "chosen": "b", "rejected": "c"},
                 "1 dropped: neither a prompt nor")):
            self.refused(pattern, "data", "messages", self.file([wrong]), self.path("o"))

    def test_refused(self):
        row = {"instruction": "a", "output": "b"}
        line = json.dumps(row).encode() + b"\n"
        for content, pattern in (
                (b"", "no record was kept .*empty"), (b"\n \n", "empty"),
                (line + b"{\n", "line 2: .*JSON"),
                (line + b"\n\n3", "line 4: is not a JSON object"), (b"[1]", "record 1: is not"),
                (b"[", "JSON"), (line + b'{"instruction": "\xff"}', "line 2: not UTF-8"),
                (line[:-2] + b', "output": "c"}', "twice"),
                (line + b'{"instruction": "\\ud83d", "output": "b"}',
                 "line 2: 'instruction' has a lone"),
                (line + b'{"instruction": 5, "output": "b"}', "line 2: 'instruction' is 5"),
                (b"[" * 100_000, "JSON"), (gzip.compress(line * 99)[:-9], "gzip"),
                (gzip.compress(line)[:10] + b"\xff" * 20, "gzip"),
                (b'{"instruction": "a", "output": ""}',
                 "no record was kept .1 dropped: empty answer")):
            self.refused(pattern, "data", "alpaca", self.file(content), self.path("out"))
        there = self.file([row])
        self.refused("exists already", "data", "alpaca", there, there)
        self.refused("No such file", "data", "alpaca", self.path("nothing"), self.path("out"))
        self.refused("cannot be written", "data", "alpaca", there, self.path("no", "such", "place"))

    def test_command_line(self):
        for arguments in ([], ["frobnicate"], ["import", "x"], ["data", "csv", "a", "b"],
                          ["data", "shp", "a", "b", "--template", "hh"]):
            status, _out, err = self.run_main(*arguments)
            self.assertEqual(status, 2, arguments)
            self.assertIn("usage:", err)
        for arguments in (["--help"], ["import", "--help"], ["export", "--help"],
                          ["data", "--help"]):
            status, out, _err = self.run_main(*arguments)
            self.assertEqual(status, 0)
            self.assertIn("usage: convert.py", out)


class DemoTest(ConvertTest):
    """demo/run.sh beside programs that only write down how they were called."""

    def setUp(self):
        super().setUp()
        os.makedirs(self.path("demo"))
        os.makedirs(self.path("build", "demo"))
        shutil.copy(os.path.join(PROJECT, "demo", "run.sh"), self.path("demo"))
        for program in ("train", "eval"):
            with open(self.path(program), "w") as file:
                file.write(f'#!/bin/sh\necho "{program} $*" >> calls\n')
            os.chmod(self.path(program), 0o755)

    def demo(self, *arguments):
        """Status, what was said, whether the last demo is still there, how programs were called."""
        for path in (self.path("calls"), self.path("build", "demo", "last")):
            with open(path, "w"):
                pass
        done = subprocess.run(["sh", self.path("demo", "run.sh"), *arguments], text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              env={**os.environ, "PYTHON": "true"})
        with open(self.path("calls")) as file:
            calls = file.read()
        return (done.returncode, done.stdout + done.stderr,
                os.path.exists(self.path("build", "demo", "last")), calls)

    def test_refused_arguments_remove_nothing(self):
        for arguments in (["abc"], ["7", "-1"], ["--lora", "x"], ["--lara"], [""], ["1" * 16]):
            status, said, kept, calls = self.demo(*arguments)
            self.assertEqual((status, kept, calls), (2, True, ""), arguments)
            self.assertRegex(said, f"^demo: '{arguments[-1]}' is no seed.*usage: .*\n$")
        for arguments in (["--help"], ["-h"], ["7", "--help"]):
            self.assertEqual(self.demo(*arguments), (
                0, "usage: sh demo/run.sh [SEED] [--lora]\n", True, ""))

    def test_arguments_reach_the_programs(self):
        for arguments, seed, lora in (([], "1", False), (["7"], "7", False),
                                      (["--lora"], "1", True),
                                      (["123456789012345", "--lora"], "123456789012345", True),
                                      (["--lora", "0"], "0", True)):
            _status, _said, kept, calls = self.demo(*arguments)
            self.assertFalse(kept)
            for command in ("init", "sft", "dpo"):
                self.assertRegex(calls, f"train {command} .*--seed {seed}\\b")
            self.assertEqual(" --lora\n" in calls, lora, calls)


@unittest.skipUnless(os.path.isdir(SHARED), "no ../shared/data beside the project")
class SharedDataTest(ConvertTest):
    def test_golden_checkpoints(self):
        golden = os.path.join(SHARED, "golden")
        for case in sorted(os.listdir(golden)):
            source = os.path.join(golden, case)
            if not os.path.isdir(source):
                continue
            first = self.imported(source)
            self.good("export", first, self.path(case))
            if os.path.exists(os.path.join(source, "model.safetensors")):
                second = self.path(case + "_bin")
                os.mkdir(second)
                for name in ("config.json", "pytorch_model.bin"):
                    shutil.copyfile(os.path.join(source, name), os.path.join(second, name))
                both = [convert.read_safetensors(os.path.join(path, "model.safetensors"))
                        for path in (source, self.path(case))]
                data = [{name: (t.dtype, t.shape, convert.read_entry(t))
                         for name, t in tensors.items()
                         if not name.endswith(convert.IGNORED["gpt_neox"])} for tensors in both]
                self.assertEqual(*data)
            else:
                second = os.path.join(source, "safetensors_shards")
            self.assertEqual(self.contents(first), self.contents(self.imported(second)))

    def test_real_tokenizers(self):
        def tables(*names):
            path = os.path.join(SHARED, "tokenizers", names[0])
            files = {name.replace(".", "__"): convert.read_bytes(os.path.join(path, name))
                     for name in names[1:]}
            vocabulary = convert.read_tokenizer(self.directory(**files))
            return {name: data for name, *_, data in convert.tokenizer_entries(vocabulary, 50304)}

        self.assertEqual(tables("gpt2", "tokenizer.json"),
                         tables("gpt2", "vocab.json", "merges.txt"))
        neox = tables("neox20b", "tokenizer.json")
        pairs = tables("pythia410m_hf", "tokenizer.json", "tokenizer_config.json",
                       "special_tokens_map.json")
        for name in neox:       # pythia410m_hf has one more added token, [PAD]
            if name == "tokenizer/token_bytes":
                self.assertEqual(neox[name] + b"[PAD]", pairs[name])
            elif name != "tokenizer/info":
                self.assertEqual(neox[name], pairs[name][:len(neox[name])])


if __name__ == "__main__":
    result = unittest.main(exit=False).result
    failed = len(result.failures) + len(result.errors)
    sys.stderr.flush()
    print(f"{result.testsRun - failed - len(result.skipped)} passed, {failed} failed")
    sys.exit(failed > 0)
