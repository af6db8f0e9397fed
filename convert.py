#!/usr/bin/env python3
"""convert.py: Hugging Face checkpoints and public data sets in, dpo.h's own files out, and back.

    convert.py import HF_DIR model.bin      a GPT-NeoX (Pythia) or BTLM checkpoint -> a model file
    convert.py import PEFT_DIR adapter.bin --base model.bin      a LoRA adapter of PEFT's, likewise
    convert.py export model.bin HF_DIR      a model file -> a directory that transformers loads
    convert.py export adapter.bin PEFT_DIR  an adapter file -> a directory that PEFT loads
    convert.py data shp|alpaca|messages IN OUT.jsonl     a data set -> the lines that train.c reads

It needs Python 3.8 or newer and nothing else.

The idea: dpo.h computes in C, and this program knows other people's file formats. It repacks and
never touches a number. A tensor, wherever it lies, is a place in a file (path, offset, strides);
its bytes are copied piece by piece, whatever their dtype, so a 5 GB model takes as long as copying
5 GB and a few megabytes of memory. Turning float16 into float32 and transposing are left to C.

A Hugging Face directory holds
  config.json          the model's shape, under keys that differ by architecture and by year. They
                       are reduced to one canonical set, and what dpo.h could not compute exactly is
                       refused here, with the key named
  the tensors          model.safetensors, or pytorch_model.bin, or several of either and an index.
                       A .bin file is a zip archive whose data.pkl is a *program* for Python's
                       pickle machine, which would import and call whatever the program names. Ours
                       runs with a short list of instructions and names, and makes only tensors
  the tokenizer        tokenizer.json, or vocab.json + merges.txt. It becomes plain tables of bytes
                       and ids, with the Unicode tables that splitting and normalising text need
  other small files    kept word for word inside model.bin, so that export gives them back
A directory of PEFT's, known by its adapter_config.json, holds that and adapter_model.safetensors or
.bin: two small matrices for each linear layer that its target_modules name.

A model file, like every file of dpo.h, is a container (all numbers little-endian):
  64 bytes             magic "dpo.h\\r\\n\\x1a" | u32 version = 1 | u32 kind (1 model, 2 adapter,
                       3 training state, 4 reference cache, 5 test expectations) | u64 length of the
                       file | u64 end of the table | u32 entries | u32 CRC-32 of the table | zeros
  144 bytes an entry   name, NUL-padded to 96 | u32 dtype | u32 dimensions (1 or 2) | u32 layout
                       (0 plain, 1 linear weight [out, in], 2 Conv1D weight [in, out]) | u32 CRC-32
                       of the data | u64 shape[2] | u64 offset | u64 bytes
  data                 each entry at a multiple of 64, in the table's order, zeros between
The first entry of a model is "config", canonical JSON; then the tensors under their Hugging Face
names; then "tokenizer/..." and "file/...". An adapter has "config", too, with the keys r, alpha,
dropout, rslora, target_modules ("all-linear", or names with commas between them) and base (the path
of the model file it belongs to); then "base", that file's identity (64-bit FNV-1a of its header and
table, which hold the CRC-32 of everything else); then the tensors under PEFT's names, A [r, in] and
B [out, r] of each adapted layer in the model's order; then "file/adapter_config.json" if it was
imported.

Whatever is wrong with an input is one line on stderr that says what, where and what to do. The exit
status is then 1 (2 for a wrong command line), no output is left behind, and nothing is overwritten.
"""

import argparse
import array
import collections
import contextlib
import functools
import gzip
import io
import itertools
import json
import math
import os
import pickle
import pickletools
import re
import shutil
import struct
import sys
import time
import unicodedata
import zipfile
import zlib

CHUNK = 4 << 20                 # bytes copied at a time
MAX_HEADER = 100_000_000        # bytes of a safetensors header, the format's own limit
MAX_WEIGHT = 1000               # values in one tuple of data.pkl, with all inside it
MAX_PICKLE = 64 << 20           # bytes of data.pkl; a model's is some hundred kilobytes
POINTER = b"version https://git-lfs"            # how every pointer of Git LFS begins

ITEM_BYTES = {"f32": 4, "f16": 2, "bf16": 2, "f64": 8, "i64": 8, "i32": 4, "i16": 2, "i8": 1,
              "u64": 8, "u32": 4, "u16": 2, "u8": 1, "bool": 1, "f8_e4m3": 1, "f8_e5m2": 1}
TORCH_DTYPES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}     # what parameters may be


class ConvertError(Exception):
    """Bad input. The message says what, where and what to do."""


def fail(path, message):
    raise ConvertError(f"{path}: {message}")


def note(path, message):
    print(f"convert.py: note: {path}: {message}", file=sys.stderr)


def parse_json(path, data, place=""):
    """JSON from bytes; a key that appears twice in one object is an error, not a silent choice."""
    def without_duplicates(pairs):
        result = {}
        for key, value in pairs:
            if key in result:
                raise ValueError(f"the key {key!r} appears twice")
            result[key] = value
        return result

    try:
        return json.loads(data.decode("utf-8-sig"), object_pairs_hook=without_duplicates)
    except UnicodeDecodeError as error:
        fail(path, f"{place}not UTF-8 at byte {error.start}; re-save it as UTF-8")
    except (ValueError, RecursionError) as error:
        fail(path, f"{place}not valid JSON ({error}); repair it or fetch it again")


def refuse_pointer(path, what="the file itself"):
    """A repository cloned without Git LFS has a few lines of text in place of each large file."""
    with open(path, "rb") as file:
        if file.read(len(POINTER)) == POINTER:
            fail(path, f"is a Git LFS pointer, not {what}; run `git lfs pull` in its directory")


def read_bytes(path):
    refuse_pointer(path)
    with open(path, "rb") as file:
        return file.read()


def read_json_object(path):
    value = parse_json(path, read_bytes(path))
    if not isinstance(value, dict):
        fail(path, "not a JSON object; is it the right file?")
    return value


def is_size(value):
    return type(value) is int and value >= 0


def all_sizes(values, kind):
    return isinstance(values, kind) and all(map(is_size, values))


def refuse_existing(path):
    if os.path.lexists(path):
        fail(path, "exists already and is never overwritten; choose another name")


@contextlib.contextmanager
def atomic_file(path):
    """A binary file that appears under its name when it is complete, or not at all."""
    temporary = f"{path}.tmp-{os.getpid()}"
    try:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)    # what a killed process left, or a link to somebody's file
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)        # never over a file that has appeared meanwhile
            os.remove(temporary)
        except FileExistsError:
            refuse_existing(path)
        except OSError:                     # a file system without links
            refuse_existing(path)
            os.rename(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        if isinstance(error, OSError) and error.filename in (None, temporary):
            fail(path, f"cannot be written ({error.strerror}); free space or choose another place")
        raise


# ------------------------------------------------------------------------------------------------
# Tensors: places in files

# offset: bytes from the start of the file.  strides: in elements, None when contiguous.
# layout: of a container's entries and of a model's tensors.  crc: of a container's entries.
Tensor = collections.namedtuple("Tensor", "path offset dtype shape strides layout crc",
                                defaults=(None, 0, None))


def tensor_bytes(tensor):
    return math.prod(tensor.shape) * ITEM_BYTES[tensor.dtype]


def read_at(file, offset, size):
    file.seek(offset)
    data = file.read(size)
    if len(data) != size:
        fail(file.name, f"ends before byte {offset + size}; it is truncated, fetch it again")
    return data


def tensor_chunks(tensor):
    """The tensor's bytes in row-major order, a few megabytes at a time."""
    with open(tensor.path, "rb", buffering=0) as file:
        if tensor.strides:
            yield from gathered_chunks(file, tensor)
            return
        crc, end = 0, tensor.offset + tensor_bytes(tensor)
        for offset in range(tensor.offset, end, CHUNK):
            chunk = read_at(file, offset, min(CHUNK, end - offset))
            if tensor.crc is not None:
                crc = zlib.crc32(chunk, crc)
            yield chunk
        if tensor.crc not in (None, crc):
            fail(tensor.path, f"the data at byte {tensor.offset} does not match its CRC-32; "
                              "the file is damaged, make it again")


def gathered_chunks(file, tensor):
    """The chunks of a view that skips about in its storage, such as a transposed matrix.

    A block of whole rows is filled row by row or column by column, along whichever dimension has
    the smaller stride, so that elements are read in runs and not one by one.
    """
    if len(tensor.shape) > 2:
        fail(file.name, "a strided view of more than two dimensions; save it contiguously")
    n_rows, n_columns = (1, *tensor.shape)[-2:]
    row_stride, column_stride = (0, *tensor.strides)[-2:]
    size = ITEM_BYTES[tensor.dtype]
    code = {1: "B", 2: "H", 4: "I", 8: "Q"}[size]

    def run(start, count, stride):
        """`count` elements, `stride` apart, the first one `start` elements into the view."""
        result, step = array.array(code), max(1, CHUNK // size // max(stride, 1))
        for first in range(0, count, step):
            n = min(step, count - first)
            span = array.array(code, read_at(file, tensor.offset + (start + first * stride) * size,
                                             ((n - 1) * stride + 1) * size))
            result.extend(span[::stride] if stride else span * n)
        return result

    rows_at_once = max(1, 4 * CHUNK // (n_columns * size))
    for top in range(0, n_rows, rows_at_once):
        rows = min(rows_at_once, n_rows - top)
        block = array.array(code, bytes(rows * n_columns * size))
        if rows > 1 and row_stride < column_stride:
            for j in range(n_columns):
                block[j::n_columns] = run(top * row_stride + j * column_stride, rows, row_stride)
        else:
            for i in range(rows):
                block[i * n_columns:(i + 1) * n_columns] = run((top + i) * row_stride, n_columns,
                                                               column_stride)
        yield block.tobytes()


# ------------------------------------------------------------------------------------------------
# The container

MAGIC, VERSION = b"dpo.h\r\n\x1a", 1
KINDS = {1: "a model", 2: "an adapter", 3: "a training state", 4: "a reference cache",
         5: "test expectations"}
MODEL, ADAPTER = 1, 2
DTYPE_CODES = {"f32": 1, "f16": 2, "bf16": 3, "u8": 4, "u32": 5, "f64": 6, "u64": 7}
PLAIN, LINEAR, CONV1D = 0, 1, 2
HEADER = struct.Struct("<8sIIQQII24s")
RECORD = struct.Struct("<96sIIII2QQQ")


def align64(offset):
    return (offset + 63) // 64 * 64


def write_container(path, kind, entries):
    """An entry is (name, dtype, shape, layout, bytes or an iterable of chunks of bytes)."""
    entries = list(entries)
    table, table_end = bytearray(), HEADER.size + RECORD.size * len(entries)
    end = table_end
    with atomic_file(path) as file:
        for name, dtype, shape, layout, chunks in entries:
            encoded, crc = name.encode("utf-8"), 0
            if not 0 < len(encoded) < 96 or not 1 <= len(shape) <= 2:
                fail(path, f"entry {name!r} needs a name of 1 to 95 bytes and 1 or 2 dimensions")
            offset = end = align64(end)
            file.seek(offset)
            for chunk in [chunks] if isinstance(chunks, (bytes, bytearray)) else chunks:
                file.write(chunk)
                crc = zlib.crc32(chunk, crc)
                end += len(chunk)
            if end - offset != math.prod(shape) * ITEM_BYTES[dtype]:
                fail(path, f"entry {name!r} has {end - offset} bytes, which do not fit its shape")
            table += RECORD.pack(encoded, DTYPE_CODES[dtype], len(shape), layout, crc,
                                 *(*shape, 1)[:2], offset, end - offset)
        file.seek(0)            # the CRCs are known now
        file.write(HEADER.pack(MAGIC, VERSION, kind, end, table_end, len(entries),
                               zlib.crc32(table), b""))
        file.write(table)
        file.truncate(end)      # an empty last entry would otherwise leave its padding out


def open_container(path, kind=None):
    """Check header and table and return {name: Tensor}. The data is checked when it is read."""
    def damaged(what):
        fail(path, f"{what}; the file is damaged or not one of dpo.h's, make it again")

    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size < HEADER.size:
            damaged(f"{size} bytes are too few for a header")
        magic, version, found, file_bytes, table_end, n_entries, crc, rest = HEADER.unpack(
            read_at(file, 0, HEADER.size))
        if magic != MAGIC or any(rest):
            damaged("it does not begin with a header of dpo.h")
        if version != VERSION:
            fail(path, f"has version {version}, this program knows {VERSION}; use one that matches")
        if found not in KINDS or kind not in (None, found):
            fail(path, f"holds {KINDS.get(found, f'the unknown kind {found}')}, not "
                       f"{KINDS.get(kind, 'a known kind')}; give the right file")
        if not file_bytes == size >= table_end == HEADER.size + RECORD.size * n_entries:
            damaged(f"its header does not describe a file of {size} bytes")
        table = read_at(file, HEADER.size, table_end - HEADER.size)
    if zlib.crc32(table) != crc:
        damaged("the table does not match its CRC-32")
    dtypes = {code: name for name, code in DTYPE_CODES.items()}
    entries, end = {}, table_end
    for raw, code, n_dims, layout, crc, n, m, offset, n_bytes in RECORD.iter_unpack(table):
        name = raw.rstrip(b"\0").decode("utf-8", "replace")
        tensor = Tensor(path, offset, dtypes.get(code), (n, m)[:n_dims], None, layout, crc)
        if (not name or "\0" in name or raw[-1] or name in entries or code not in dtypes
                or n_dims not in (1, 2) or (n_dims == 1 and m != 1) or layout > CONV1D
                or n_bytes != tensor_bytes(tensor) or offset != align64(end)
                or offset + n_bytes > size):
            damaged(f"the table's entry {name!r} is impossible")
        entries[name] = tensor
        end = offset + n_bytes
    if end != size:
        damaged(f"{size - end} bytes follow the last entry")
    return entries


def container_kind(path):
    """The kind that a file claims to be, or None; open_container checks the claim."""
    with open(path, "rb") as file:
        head = file.read(16)
    return int.from_bytes(head[12:], "little") if head[:8] == MAGIC else None


def fnv1a(data):
    value = 0xcbf29ce484222325
    for byte in data:
        value = (value ^ byte) * 0x100000001b3 % 2**64
    return value


def identity(path, entries):
    """By what an adapter knows its base: the hash of a container's header and table."""
    with open(path, "rb") as file:
        return fnv1a(read_at(file, 0, HEADER.size + RECORD.size * len(entries)))


def read_entry(tensor):
    return b"".join(tensor_chunks(tensor))


def read_container(path, kind=None):
    """A whole container in memory, everything checked: {name: (dtype, shape, layout, bytes)}."""
    return {name: (entry.dtype, entry.shape, entry.layout, read_entry(entry))
            for name, entry in open_container(path, kind).items()}


# ------------------------------------------------------------------------------------------------
# safetensors: u64 length of a JSON header, the header, the data

def read_safetensors(path):
    """{name: Tensor}, once it is sure that the header describes every byte exactly once."""
    refuse_pointer(path, "the weights")
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = struct.unpack("<Q", read_at(file, 0, 8))[0]
        if length > MAX_HEADER or 8 + length > size:
            fail(path, f"claims a header of {length} bytes in a file of {size}; fetch it again")
        data = read_at(file, 8, length)
    header = parse_json(path, data, "its header is ")
    if data[:1] != b"{" or not isinstance(header, dict):
        fail(path, "its header is not a JSON object; is it a safetensors file?")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        fail(path, "__metadata__ must map strings to strings; save the file again")
    tensors, spans, end = {}, [], 0
    for name, entry in header.items():
        dtype, shape, span = (entry.get(key) if isinstance(entry, dict) else None
                              for key in ("dtype", "shape", "data_offsets"))
        if not (isinstance(dtype, str) and all_sizes(shape, list) and all_sizes(span, list)
                and len(span) == 2):
            fail(path, f"the header's entry of tensor {name!r} is malformed; save the file again")
        if dtype.lower() not in ITEM_BYTES:
            fail(path, f"tensor {name!r} has the unknown dtype {dtype!r}; save it as F32 or BF16")
        tensors[name] = Tensor(path, 8 + length + span[0], dtype.lower(), tuple(shape))
        if span[1] - span[0] != tensor_bytes(tensors[name]):
            fail(path, f"tensor {name!r} of shape {shape} and dtype {dtype} cannot have "
                       f"{span[1] - span[0]} bytes; save the file again")
        spans.append((*span, name))
    for first, last, name in sorted(spans):
        if first != end:
            fail(path, f"the data of tensor {name!r} begins at {first}, but must at {end}: tensors "
                       "overlap or leave a hole; save the file again")
        end = last
    if 8 + length + end != size:
        fail(path, f"has {size} bytes, but its header describes {8 + length + end}; fetch it again")
    return tensors


def write_safetensors(path, tensors):
    """In the reference writer's order: by dtype (f32, bf16, f16), then by name."""
    order = sorted(tensors, key=lambda name: (list(TORCH_DTYPES).index(tensors[name].dtype),
                                              name.encode()))
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name in order:
        first, end = end, end + tensor_bytes(tensors[name])
        header[name] = {"dtype": tensors[name].dtype.upper(), "shape": tensors[name].shape,
                        "data_offsets": [first, end]}
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    with atomic_file(path) as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name in order:
            for chunk in tensor_chunks(tensors[name]):
                file.write(chunk)


# ------------------------------------------------------------------------------------------------
# pytorch_model.bin: a zip archive with data.pkl (a pickle) and one uncompressed file per storage

Storage = collections.namedtuple("Storage", "dtype key numel")
View = collections.namedtuple("View", "storage offset shape strides")       # in elements

STORAGE_DTYPES = {"FloatStorage": "f32", "HalfStorage": "f16", "BFloat16Storage": "bf16",
                  "DoubleStorage": "f64", "LongStorage": "i64", "IntStorage": "i32",
                  "ShortStorage": "i16", "CharStorage": "i8", "ByteStorage": "u8",
                  "BoolStorage": "bool"}
PICKLE_INSTRUCTIONS = set("""
    PROTO FRAME MARK STOP NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE
    SHORT_BINUNICODE EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT
    SETITEM SETITEMS BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET GLOBAL STACK_GLOBAL BINPERSID
    REDUCE BUILD""".split())


class StateDict(dict):
    """Stands for OrderedDict; torch hangs attributes (_metadata) on it, which are not needed."""
    __slots__ = ()

    def __setstate__(self, state):
        pass


PICKLE_NAMES = {
    ("collections", "OrderedDict"): StateDict,
    ("torch._utils", "_rebuild_tensor_v2"):
        lambda storage, offset, shape, strides, *_: View(storage, offset, shape, strides),
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
    **{("torch", name): dtype for name, dtype in STORAGE_DTYPES.items()}}   # strings: not callable


def run_pickle(path, data):
    """Run the pickle that torch.save writes for a state dict, and refuse any other by name."""
    def refuse(what):
        fail(path, f"its pickle asks for {what}, which no checkpoint needs; refused: do not trust "
                   "the file, or save plain tensors as safetensors")

    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            if (module, name) not in PICKLE_NAMES:
                refuse(f"{module}.{name}")
            return PICKLE_NAMES[module, name]

        def persistent_load(self, identity):
            tag, dtype, key, _location, numel = identity
            if (tag != "storage" or dtype not in STORAGE_DTYPES.values() or not is_size(numel)
                    or not re.fullmatch("[0-9]+", key)):
                raise ValueError("a storage is malformed")
            return Storage(dtype, key, numel)

    # Python hashes a key of a dict by visiting all that it holds: tuples in tuples would exhaust
    # the C stack, or take for ever. So each value's weight, the number of values to be visited, is
    # known before anything is run. None stands for a mark.
    stack, memo = [], {}

    def weigh(instruction, argument):
        name, before, weight = instruction.name, instruction.stack_before, 1
        n_popped = len(before)
        if pickletools.markobject in before:
            n_popped = before.index(pickletools.markobject)
            while (item := stack.pop()) is not None:
                weight += item
        for _ in range(n_popped):
            weight += stack.pop()
        if weight > MAX_WEIGHT and name.startswith(("TUPLE", "REDUCE", "BINPERSID", "BUILD")):
            raise ValueError("values nested absurdly")
        if name in ("APPEND", "APPENDS", "SETITEM", "SETITEMS"):
            weight = 1              # lists and dicts have no hash
        if name in ("BINGET", "LONG_BINGET"):
            weight = memo[argument]
        if instruction.stack_after:
            stack.append(None if name == "MARK" else weight)
        if name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1]

    try:
        for instruction, argument, _position in pickletools.genops(data):
            if instruction.name not in PICKLE_INSTRUCTIONS:
                refuse(f"the instruction {instruction.name}")
            if instruction.name == "LONG_BINPUT" and argument > len(data):
                raise ValueError("a memo of absurd size")       # it would be allocated at once
            weigh(instruction, argument)
        return Unpickler(io.BytesIO(data)).load()
    except ConvertError:
        raise
    except Exception as error:      # a damaged pickle can raise almost anything
        fail(path, f"its pickle is damaged or holds no state dict ({error}); fetch it again")


def read_torch(path):
    """{name: Tensor} of a file written by torch.save since PyTorch 1.6."""
    refuse_pointer(path, "the weights")
    size = os.path.getsize(path)
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ArithmeticError, LookupError, ValueError,
            struct.error) as error:
        fail(path, f"not a zip archive as torch.save writes since PyTorch 1.6 ({error}); fetch it "
                   "again, or load it in PyTorch and save it again")
    names = {member.filename: member for member in members}
    top = members[0].filename.split("/")[0] if members else ""
    if len(names) != len(members):
        fail(path, "two members of the archive share a name; refused, fetch it again")
    if f"{top}/constants.pkl" in names:
        fail(path, "is a TorchScript program, not a checkpoint; save the model's state_dict()")

    def place(file, name):
        """A member's offset and size; its local header counts, as the central one omits padding."""
        if name not in names:
            fail(path, f"lacks {name!r}; it is no checkpoint or damaged, fetch it again")
        member = names[name]
        start = member.header_offset
        header = read_at(file, start, 30) if 0 <= start <= size - 30 else bytes(30)
        offset = start + 30 + sum(struct.unpack("<HH", header[26:30]))
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
            fail(path, f"{name!r} is compressed or encrypted; load it in PyTorch and save it again")
        if header[:4] != b"PK\3\4" or offset + member.file_size > size:
            fail(path, f"{name!r} lies outside the file; fetch it again")
        return offset, member.file_size

    def content(file, name):
        offset, length = place(file, name)
        if length > MAX_PICKLE:
            fail(path, f"{name!r} has {length} bytes, more than any checkpoint needs; refused")
        return read_at(file, offset, length)

    with open(path, "rb") as file:
        if f"{top}/byteorder" in names and content(file, f"{top}/byteorder") != b"little":
            fail(path, "is big-endian; load it in PyTorch and save it as safetensors")
        state = run_pickle(path, content(file, f"{top}/data.pkl"))
        for wrapper in ("state_dict", "model", "state"):
            if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
                state = state[wrapper]
        if not isinstance(state, dict):
            fail(path, "does not hold a state dict; save the model's state_dict()")
        tensors = {}
        for name, view in state.items():
            if not isinstance(name, str) or not isinstance(view, View):
                continue
            storage, first, shape, strides = view
            if not (isinstance(storage, Storage) and is_size(first) and all_sizes(shape, tuple)
                    and all_sizes(strides, tuple) and len(shape) == len(strides)):
                fail(path, f"tensor {name!r} is malformed; save the file again")
            offset, length = place(file, f"{top}/data/{storage.key}")
            item = ITEM_BYTES[storage.dtype]
            last = first + sum((n - 1) * stride for n, stride in zip(shape, strides))
            if 0 not in shape and (last >= storage.numel or storage.numel * item > length):
                fail(path, f"tensor {name!r} of shape {list(shape)} reaches outside its storage; "
                           "the file is damaged, fetch it again")
            contiguous = all(n == 1 or stride == math.prod(shape[i + 1:])
                             for i, (n, stride) in enumerate(zip(shape, strides)))
            tensors[name] = Tensor(path, offset + first * item, storage.dtype, shape,
                                   None if contiguous or 0 in shape else strides)
    return tensors


def read_checkpoint(directory):
    """{name: Tensor} of a directory's checkpoint, looked for in the order of transformers."""
    for name, read in (("model.safetensors", read_safetensors), ("pytorch_model.bin", read_torch)):
        path = os.path.join(directory, name)
        index = path + ".index.json"
        if os.path.exists(path):
            return read(path)
        if not os.path.exists(index):
            continue
        weight_map = read_json_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            fail(index, "has no weight_map; fetch it again")
        shards, tensors = {}, {}
        for tensor, shard in weight_map.items():
            if not isinstance(shard, str) or not re.fullmatch(r"[\w-][\w.-]*", shard):
                fail(index, f"puts tensor {tensor!r} into {shard!r}, which is no plain file name")
            if shard not in shards:
                shards[shard] = read(os.path.join(directory, shard))
            if tensor not in shards[shard]:
                fail(index, f"tensor {tensor!r} is not in {shard}; fetch both again")
        for shard, found in shards.items():
            for tensor in found.keys() & tensors.keys():
                fail(index, f"tensor {tensor!r} is in {shard} and another shard; fetch both again")
            tensors.update(found)
        return tensors
    fail(directory, "no model.safetensors, pytorch_model.bin or index of either; fetch the weights")


# ------------------------------------------------------------------------------------------------
# The model's shape: Hugging Face's config.json <-> the canonical keys

NEOX, BTLM = "gpt_neox", "btlm"
# (canonical key, type, default when absent, names in config.json by precedence). Export writes the
# first name without a dot: every version of transformers reads those. Keys beginning with "_" are
# only steps on the way to canonical ones.
CONFIG_KEYS = {
    NEOX: (
        ("vocab_size", int, 50432, "vocab_size"),
        ("context_length", int, 2048, "max_position_embeddings"),
        ("d_model", int, 6144, "hidden_size"),
        ("n_layers", int, 44, "num_hidden_layers"),
        ("n_heads", int, 64, "num_attention_heads"),
        ("d_ff", int, 24576, "intermediate_size"),
        ("_rotary_share", float, 0.25, "rope_parameters.partial_rotary_factor", "rotary_pct",
         "partial_rotary_factor"),
        ("rotary_base", float, 10000.0, "rope_parameters.rope_theta", "rotary_emb_base",
         "rope_theta"),
        ("activation", str, "gelu", "hidden_act"),
        ("parallel_residual", bool, True, "use_parallel_residual"),
        ("attention_bias", bool, True, "attention_bias"),
        ("tied_head", bool, False, "tie_word_embeddings"),
        ("norm_epsilon", float, 1e-5, "layer_norm_eps")),
    BTLM: (
        ("vocab_size", int, 50257, "vocab_size"),
        ("context_length", int, 1024, "n_positions", "max_position_embeddings"),
        ("d_model", int, 768, "n_embd", "hidden_size"),
        ("n_layers", int, 12, "n_layer", "num_hidden_layers"),
        ("n_heads", int, 12, "n_head", "num_attention_heads"),
        ("d_ff", int, None, "n_inner"),
        ("position", str, "learned", "position_embedding_type"),
        ("activation", str, "gelu_new", "activation_function"),
        ("tied_head", bool, True, "tie_word_embeddings"),
        ("norm_epsilon", float, 1e-5, "layer_norm_epsilon"),
        ("embedding_scale", float, 1.0, "mup_embeddings_scale", "embeddings_scale"),
        ("mup_width_scale", float, 1.0, "mup_width_scale"),
        ("_output_alpha", float, 1.0, "mup_output_alpha"),
        ("_scaled", bool, True, "scale_attn_weights"),
        ("_scaled_by_d", bool, False, "mup_scale_qk_dot_by_d", "scale_qk_dot_by_d"),
        ("attention_scale_by_layer", bool, False, "scale_attn_by_inverse_layer_idx"))}
TOKEN_IDS = {NEOX: {"bos": 0, "eos": 2}, BTLM: {"bos": 50256, "eos": 50256}}        # defaults
ACTIVATIONS = {"gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_new",
               "gelu_pytorch_tanh": "gelu_new", "gelu_fast": "gelu_fast", "silu": "silu",
               "quick_gelu": "quick_gelu", "swish": "silu", "relu": "relu"}
DROPOUTS = {NEOX: ("attention_dropout", "hidden_dropout"),
            BTLM: ("resid_pdrop", "embd_pdrop", "attn_pdrop")}


def setting(path, hf, kind, default, *names):
    """The first of `names` that config.json sets (null counts as absent), else the default."""
    for name in names:
        value = hf.get(name)
        if value is None:
            continue
        if kind is float and type(value) in (int, float) and abs(value) < 1e30:
            return float(value)
        if kind is not float and type(value) is kind and (kind is not int or 0 < value < 2**31):
            return value
        fail(path, f"{name} is {value!r}, not a usable {kind.__name__}; correct it")
    return default


def canonical_config(path, hf):
    """config.json -> the canonical keys; what dpo.h could not compute exactly is an error."""
    arch = hf.get("model_type")
    rope = hf.get("rope_parameters") or {}              # transformers 5 collects the rotary keys
    if arch not in (NEOX, BTLM):
        fail(path, f"model_type is {arch!r}; only gpt_neox (Pythia) and btlm can be imported")
    if not isinstance(rope, dict):
        fail(path, f"rope_parameters is {rope!r}, not a JSON object; correct it")
    hf = {**hf, **{"rope_parameters." + name: value for name, value in rope.items()}}
    config = {"arch": arch, "position": "rotary", "rotary_dims": 0, "rotary_base": 10000.0,
              "parallel_residual": False, "attention_bias": True, "embedding_scale": 1.0,
              "logit_scale": 1.0, "attention_scale_by_layer": False, "alibi_factor": 1.0,
              "mup_width_scale": 1.0,
              **{key: setting(path, hf, *rest) for key, *rest in CONFIG_KEYS[arch]}}
    if config["d_model"] % config["n_heads"]:
        fail(path, f"{config['n_heads']} heads do not divide a width of {config['d_model']}; "
                   "correct it")
    known = [*ACTIVATIONS, *(["swiglu"] if arch == BTLM else [])]
    if config["activation"] not in known:
        fail(path, f"the activation {config['activation']!r} is not supported; "
                   f"known are {', '.join(known)}")
    config["activation"] = ACTIVATIONS.get(config["activation"], config["activation"])
    (finish_neox if arch == NEOX else finish_btlm)(path, hf, config)
    for key in ("norm_epsilon", "rotary_base", "alibi_factor", "mup_width_scale"):
        if not config[key] > 0:
            fail(path, f"{key} must be positive, but is {config[key]}; correct it")
    for name, default in TOKEN_IDS[arch].items():
        token = hf.get(f"{name}_token_id", default)
        if token is not None and not (is_size(token) and token < config["vocab_size"]):
            fail(path, f"{name}_token_id is {token!r}, not an id below vocab_size; correct it")
        config[f"{name}_id"] = -1 if token is None else token
    dropouts = [name for name in DROPOUTS[arch] if hf.get(name)]
    if dropouts:
        note(path, f"the dropout it asks for ({', '.join(dropouts)}) is ignored")
    return {key: value for key, value in config.items() if not key.startswith("_")}


def finish_neox(path, hf, config):
    kind = setting(path, hf, str, "default", "rope_parameters.rope_type", "rope_parameters.type")
    if kind != "default" or hf.get("rope_scaling") is not None:
        fail(path, f"rope_type {kind!r} and rope_scaling {hf.get('rope_scaling')!r} ask for rotary "
                   "scaling, which is not supported; use a checkpoint without it")
    head_size = config["d_model"] // config["n_heads"]
    dims = config["rotary_dims"] = int(head_size * config["_rotary_share"])
    if not 0 < dims <= head_size or dims % 2:
        fail(path, f"rotates {dims} of a head's {head_size} dimensions; it must be an even number, "
                   "at least 2: correct rotary_pct")
    config["attention_scale"] = head_size ** -0.5


def finish_btlm(path, hf, config):
    head_size = config["d_model"] // config["n_heads"]
    config["d_ff"] = config["d_ff"] or 4 * config["d_model"]
    config["attention_scale"] = (1.0 if not config["_scaled"] else
                                 1 / head_size if config["_scaled_by_d"] else head_size ** -0.5)
    if config["position"] not in ("learned", "alibi"):
        fail(path, f"position_embedding_type {config['position']!r} is not supported; "
                   "it must be learned or alibi")
    scaling = hf.get("alibi_scaling")
    if config["position"] == "alibi" and scaling is not None:
        if not (isinstance(scaling, dict) and scaling.get("type") == "linear"
                and scaling.get("factor") is not None):
            fail(path, f"alibi_scaling {scaling!r} is not supported (with train_seq_len a result "
                       "would depend on its batch); give it a linear factor, or set it to null")
        config["alibi_factor"] = setting(path, scaling, float, 1.0, "factor")
    # The first release had other names: output_logits_scale for the whole multiplier of the logits
    # beside width_scale for the learning-rate scale; Jais' files have only a width_scale, and it is
    # the multiplier of the logits. The newer mup_ names win.
    for new, old in (("embeddings_scale", "embeddings_scale"), ("width_scale", "width_scale"),
                     ("output_alpha", "output_logits_scale"), ("scale_qk_dot_by_d",) * 2):
        if hf.get("mup_" + new) is not None and hf.get(old) is not None:
            note(path, f"sets both mup_{new} and the older {old}; the older is ignored")
    jais = hf.get("output_logits_scale") is None
    if hf.get("mup_width_scale") is None and not jais:
        config["mup_width_scale"] = setting(path, hf, float, 1.0, "width_scale")
    config["logit_scale"] = config["_output_alpha"] * config["mup_width_scale"]
    if hf.get("mup_output_alpha") is None and hf.get("mup_width_scale") is None:
        config["logit_scale"] = setting(path, hf, float, 1.0,
                                        "width_scale" if jais else "output_logits_scale")


def hf_config(path, config, dtype):
    """The inverse of canonical_config, for a model that never had a config.json."""
    arch, head_size = config["arch"], config["d_model"] // config["n_heads"]
    scale, dims = config["attention_scale"], config["rotary_dims"]
    close = functools.partial(math.isclose, rel_tol=1e-6)
    steps = {"_rotary_share": dims / head_size if int(dims / head_size * head_size) == dims
             else (dims + 0.5) / head_size,             # so that rounding down gives dims
             "_output_alpha": config["logit_scale"] / config["mup_width_scale"],
             "_scaled_by_d": close(scale, 1 / head_size),
             "_scaled": close(scale, 1 / head_size) or close(scale, head_size ** -0.5)}
    hf = {"architectures": ["GPTNeoXForCausalLM" if arch == NEOX else "BTLMLMHeadModel"],
          "model_type": arch, "torch_dtype": dtype, "use_cache": True,
          **{name: 0.0 for name in DROPOUTS[arch]}}
    for key, _kind, _default, *names in CONFIG_KEYS[arch]:
        hf[next(name for name in names if "." not in name)] = {**config, **steps}[key]
    for name in TOKEN_IDS[arch]:
        hf[f"{name}_token_id"] = config[f"{name}_id"] if config[f"{name}_id"] >= 0 else None
    if arch == BTLM:
        code = "cerebras/btlm-3b-8k-base--"
        hf["auto_map"] = {"AutoConfig": code + "configuration_btlm.BTLMConfig",
                          "AutoModel": code + "modeling_btlm.BTLMModel",
                          "AutoModelForCausalLM": code + "modeling_btlm.BTLMLMHeadModel"}
        if config["alibi_factor"] != 1:
            hf["alibi_scaling"] = {"type": "linear", "factor": config["alibi_factor"]}
    for key, value in canonical_config(path, hf).items():
        if value != config[key] and not (isinstance(value, float) and close(value, config[key])):
            fail(path, f"its {key} of {config[key]!r} cannot be said in a config.json of {arch}; "
                       "it can be used by dpo.h only")
    return hf


PREFIX = {NEOX: "gpt_neox.", BTLM: "transformer."}
EMBEDDING = {NEOX: "gpt_neox.embed_in.weight", BTLM: "transformer.wte.weight"}
HEAD = {NEOX: "embed_out.weight", BTLM: "lm_head.weight"}
SLOPES = "transformer.relative_pe.slopes"
# Buffers that older versions saved. Real biases end in query_key_value.bias, dense.bias, ...
IGNORED = {NEOX: (".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq"),
           BTLM: (".attn.bias", ".attn.masked_bias")}


def expected_tensors(config):
    """{name: (shape, layout)} of every tensor that such a model has, in model order."""
    arch, width, d_ff = config["arch"], config["d_model"], config["d_ff"]
    prefix, table = PREFIX[arch], {}

    def norm(name):
        table[f"{name}.weight"] = table[f"{name}.bias"] = ((width,), PLAIN)

    def linear(name, n_in, n_out, bias=True):
        table[f"{name}.weight"] = (((n_out, n_in), LINEAR) if arch == NEOX     # torch.nn.Linear
                                   else ((n_in, n_out), CONV1D))               # GPT-2's Conv1D
        if bias:
            table[f"{name}.bias"] = ((n_out,), PLAIN)

    table[EMBEDDING[arch]] = ((config["vocab_size"], width), PLAIN)
    if config["position"] == "learned":
        table[prefix + "wpe.weight"] = ((config["context_length"], width), PLAIN)
    if config["position"] == "alibi":
        table[SLOPES] = ((config["n_heads"], 1), PLAIN)
    for i in range(config["n_layers"]):
        if arch == NEOX:
            layer, bias = f"{prefix}layers.{i}.", config["attention_bias"]
            norm(layer + "input_layernorm")
            norm(layer + "post_attention_layernorm")
            linear(layer + "attention.query_key_value", width, 3 * width, bias)
            linear(layer + "attention.dense", width, width, bias)
            linear(layer + "mlp.dense_h_to_4h", width, d_ff)
            linear(layer + "mlp.dense_4h_to_h", d_ff, width)
        else:
            layer = f"{prefix}h.{i}."
            norm(layer + "ln_1")
            linear(layer + "attn.c_attn", width, 3 * width)
            linear(layer + "attn.c_proj", width, width)
            norm(layer + "ln_2")
            linear(layer + "mlp.c_fc", width, d_ff)
            if config["activation"] == "swiglu":
                linear(layer + "mlp.c_fc2", width, d_ff)
            linear(layer + "mlp.c_proj", d_ff, width)
    norm(prefix + ("final_layer_norm" if arch == NEOX else "ln_f"))
    if not config["tied_head"]:
        table[HEAD[arch]] = ((config["vocab_size"], width), LINEAR)
    return table


def match_tensors(path, config, tensors):
    """The tensors by full name in model order; any missing, extra or misshaped one is named."""
    if config["n_layers"] > len(tensors):       # and not a table of a billion layers
        fail(path, f"has {len(tensors)} tensors for {config['n_layers']} layers; fetch it again")
    arch, expected, found, tied = config["arch"], expected_tensors(config), {}, None
    for name, tensor in tensors.items():
        full = name if name in expected else PREFIX[arch] + name    # a bare model has no prefix
        full = HEAD[arch] if name in HEAD.values() else full        # transformers 5: one name
        if full in found:
            fail(tensor.path, f"tensor {full!r} is there under two names; remove one")
        if full in expected:
            shape = expected[full][0]
            if tensor.shape != shape:
                fail(tensor.path, f"tensor {name!r} has shape {list(tensor.shape)}, by the config "
                                  f"{list(shape)}; fetch both from the same model")
            if tensor.dtype not in TORCH_DTYPES:
                fail(tensor.path, f"tensor {name!r} is {tensor.dtype.upper()}; save the model as "
                                  "F32, F16 or BF16")
            found[full] = tensor
        elif full == HEAD[arch]:        # not expected, so it is tied
            tied = tensor
        elif not name.endswith(IGNORED[arch]):
            fail(tensor.path, f"tensor {name!r} is not part of the model; is config.json its own?")
    for name in expected:
        if name not in found and name != SLOPES:        # dpo.h computes slopes that are not stored
            fail(path, f"tensor {name!r} of shape {list(expected[name][0])} is missing; fetch the "
                       "weights again, with the config.json that belongs to them")
    if tied and not same_data(tied, found[EMBEDDING[arch]]):
        note(tied.path, f"{HEAD[arch]} differs from the embedding, but is dropped, since "
                        "tie_word_embeddings is true")
    return {name: found[name]._replace(layout=layout)
            for name, (_shape, layout) in expected.items() if name in found}


def same_data(a, b):
    def checksum(tensor):
        return functools.reduce(lambda crc, chunk: zlib.crc32(chunk, crc), tensor_chunks(tensor), 0)
    return a == b or ((a.dtype, a.shape) == (b.dtype, b.shape) and checksum(a) == checksum(b))


# ------------------------------------------------------------------------------------------------
# The tokenizer: byte-level BPE as tables of bytes and ids

END_OF_TEXT = "<|endoftext|>"
NO_ID = 0xFFFFFFFF
SPECIAL, NORMALIZED = 1, 2      # flags of an added token
SPECIAL_KEYS = ("bos_token", "eos_token", "unk_token", "pad_token")
# ids: {token: id}.  merges: [[left, right]] by rank.  added: objects as in tokenizer.json.
Vocabulary = collections.namedtuple("Vocabulary", "path ids merges added nfc")


def byte_symbols():
    """Byte-level BPE spells a byte as one printable character: its own, or one from U+0100 on."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in kept]
    return {**{byte: chr(byte) for byte in kept},
            **{byte: chr(0x100 + i) for i, byte in enumerate(moved)}}


SYMBOLS = byte_symbols()
BYTES = {symbol: byte for byte, symbol in SYMBOLS.items()}


def read_tokenizer(directory):
    """The directory's Vocabulary, or None if it has no tokenizer."""
    def optional(name):
        path = os.path.join(directory, name)
        return read_json_object(path) if os.path.exists(path) else {}

    settings, special = optional("tokenizer_config.json"), optional("special_tokens_map.json")
    path = os.path.join(directory, "tokenizer_config.json")
    for key in ("add_prefix_space", "add_bos_token", "add_eos_token"):
        if settings.get(key):
            fail(path, f"{key} is true, which changes the ids and is not supported; set it to "
                       "false if the model can do without")
    listed = settings.get("added_tokens_decoder") or {}         # newer files list them here, too
    if not isinstance(listed, dict) or not all(
            re.fullmatch("[0-9]{1,9}", key) and isinstance(token, dict)
            and isinstance(token.get("content"), str) for key, token in listed.items()):
        fail(path, "added_tokens_decoder does not map ids to tokens; fetch it again")
    listed = [{**token, "id": int(key)} for key, token in listed.items()]

    path = os.path.join(directory, "tokenizer.json")
    if os.path.exists(path):
        ids, merges, added, nfc = read_tokenizer_json(path)
    elif os.path.exists(os.path.join(directory, "vocab.json")):
        path = os.path.join(directory, "vocab.json")
        ids, nfc = read_json_object(path), False
        merges = read_merges(os.path.join(directory, "merges.txt"))
        named = [source.get(key) for source in (settings, special) for key in SPECIAL_KEYS]
        named = {str(token.get("content") if isinstance(token, dict) else token)
                 for token in named if token} | ({END_OF_TEXT} & ids.keys())
        known = {**ids, **optional("added_tokens.json")}
        added = [{"content": token, "id": known.get(token), "special": token in named}
                 for token in sorted(known.keys() - ids.keys() | named)]
        listed_names = {token["content"] for token in listed}
        added = [token for token in added if token["content"] not in listed_names]
    else:
        return None
    known = {token["content"] for token in added}
    return Vocabulary(path, ids, merges,
                      added + [token for token in listed if token["content"] not in known], nfc)


def read_tokenizer_json(path):
    """(ids, merges, added tokens, NFC or not), if nothing else in the file changes the ids."""
    def refuse_if(condition, what, value):
        if condition:
            fail(path, f"{what} {json.dumps(value)[:60]} changes the ids and is not supported; use "
                       "a byte-level BPE as in GPT-2 and GPT-NeoX")

    def part(owner, key):
        value = owner.get(key)
        refuse_if(not isinstance(value, (dict, type(None))), key, value)
        return value or {}

    tokenizer = read_json_object(path)
    model, normalizer, splitter, processor = (
        part(tokenizer, key) for key in ("model", "normalizer", "pre_tokenizer", "post_processor"))
    refuse_if(model.get("type", "BPE") != "BPE", "model.type", model.get("type"))
    for key in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix",
                "byte_fallback", "ignore_merges"):
        refuse_if(model.get(key), f"model.{key}", model.get(key))
    refuse_if(normalizer and normalizer.get("type") != "NFC", "normalizer", normalizer)
    refuse_if(splitter.get("type") != "ByteLevel" or splitter.get("add_prefix_space", True)
              or not splitter.get("use_regex", True), "pre_tokenizer", splitter)
    # A post-processor may move offsets, but not add tokens.
    refuse_if(processor.get("type", "ByteLevel") not in ("ByteLevel", "TemplateProcessing")
              or "SpecialToken" in json.dumps(processor.get("single")), "post_processor", processor)
    ids, merges, added = model.get("vocab"), model.get("merges"), tokenizer.get("added_tokens", [])
    if not (isinstance(ids, dict) and isinstance(merges, list) and isinstance(added, list) and all(
            isinstance(token, dict) and isinstance(token.get("content"), str) for token in added)):
        fail(path, "model.vocab, model.merges or added_tokens is malformed; fetch it again")
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    return ids, merges, added, bool(normalizer)


def read_merges(path):
    try:
        lines = read_bytes(path).decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        fail(path, f"not UTF-8 at byte {error.start}; fetch it again")
    lines = [line.rstrip("\r") for line in lines[lines[0].startswith("#version"):]]
    return [line.split(" ") for line in lines if line]


def tokenizer_entries(vocabulary, vocab_size):
    """The container entries "tokenizer/..." of a Vocabulary."""
    path, ids, merges, added, nfc = vocabulary
    owners, content = {}, {}            # id -> token, id -> the bytes it stands for

    def own(token, token_id, data):
        if not is_size(token_id) or token_id >= vocab_size:
            fail(path, f"token {token!r} has the id {token_id!r}, but vocab_size is {vocab_size}; "
                       "remove the token, or use the tokenizer that belongs to the model")
        if owners.setdefault(token_id, token) != token or ids.get(token, token_id) != token_id:
            fail(path, f"token {token!r} contradicts another's id {token_id}; fetch the file again")
        content[token_id] = data

    def utf8(token):
        try:
            return token.encode("utf-8")
        except UnicodeEncodeError:
            fail(path, f"token {token!r} has a lone surrogate; fetch the file again")

    for token, token_id in ids.items():         # what is not spelled in byte symbols is plain text
        own(token, token_id, bytes(BYTES[symbol] for symbol in token)
            if all(symbol in BYTES for symbol in token) else utf8(token))
    flags = {}
    for entry in added:
        token, token_id = entry["content"], entry.get("id")
        for key in ("lstrip", "rstrip", "single_word"):
            if entry.get(key):
                fail(path, f"the added token {token!r} has {key} set, which changes the ids and is "
                           "not supported; clear it if the model can do without")
        normalized = bool(entry.get("normalized", not entry.get("special")))
        if not token or normalized and nfc and unicodedata.normalize("NFC", token) != token:
            fail(path, f"the added token {token!r} is empty or, though normalized, not in NFC; "
                       "correct it")
        own(token, token_id, utf8(token))
        flags[token_id] = (SPECIAL * bool(entry.get("special")), NORMALIZED * normalized)
    if not nfc and len({normalized for _, normalized in flags.values()}) == 1:
        # Without a normaliser the flag only ranks one kind before the other; here is one kind.
        flags = {token_id: (special, 0) for token_id, (special, _) in flags.items()}
    merged = {}                                 # (left, right) -> id, in rank order
    for rank, pair in enumerate(merges):
        if not isinstance(pair, list) or [type(token) for token in pair] != [str, str]:
            fail(path, f"merge {rank} is {pair!r}, not a pair of tokens; fetch the file again")
        left, right, both = (ids.get(token) for token in (*pair, "".join(pair)))
        if None in (left, right, both) or (left, right) in merged:
            fail(path, f"merge {rank}, {' '.join(pair)!r}, has tokens without ids or comes twice; "
                       "fetch the file again")
        merged[left, right] = both

    if not content:
        fail(path, "holds no tokens; fetch it again")
    pieces = [content.get(token_id, b"") for token_id in range(max(content) + 1)]
    unicode = unicodedata.unidata_version
    if int(unicode.split(".")[0]) < 14:
        note(path, f"Python's Unicode here is {unicode}, so letters newer than that may be "
                   "cut into other tokens than Hugging Face's; import with Python 3.11 or newer")
    info = {"n_tokens": len(pieces), "nfc": nfc, "unicode": unicode}
    tables = {"merges": [(*pair, both) for pair, both in merged.items()],
              "added": [(token_id, sum(flags[token_id])) for token_id in sorted(flags)],
              **unicode_tables(nfc)}
    return [blob("tokenizer/info", json.dumps(info).encode()),
            u32_entry("tokenizer/token_ends", itertools.accumulate(map(len, pieces))),
            blob("tokenizer/token_bytes", b"".join(pieces)),
            u32_entry("tokenizer/byte_ids", [ids.get(SYMBOLS[byte], NO_ID) for byte in range(256)]),
            *(u32_entry("tokenizer/" + name, itertools.chain(*rows), len(rows[0]))
              for name, rows in tables.items() if rows)]


# The NFC of Hugging Face's `tokenizers` has the tables of Unicode 9 (its word pattern knows newer
# ones): these marks, added in Unicode 10 to 14, stay where they are, and U+11938 is not composed.
NEW_MARKS = {point for first, last in (
    (0x7FD, 0x7FD), (0x898, 0x89F), (0x8CA, 0x8D3), (0x9FE, 0x9FE), (0xC3C, 0xC3C), (0xD3B, 0xD3C),
    (0xEBA, 0xEBA), (0x1715, 0x1715), (0x1ABF, 0x1ACE), (0x1DF6, 0x1DFA), (0xA82C, 0xA82C),
    (0x10D24, 0x10D27), (0x10EAB, 0x10EAC), (0x10F46, 0x10F50), (0x10F82, 0x10F85),
    (0x11070, 0x11070), (0x1133B, 0x1133B), (0x1145E, 0x1145E), (0x11839, 0x1183A),
    (0x11938, 0x11938), (0x1193D, 0x1193E), (0x11943, 0x11943), (0x119E0, 0x119E0),
    (0x11A34, 0x11A34), (0x11A47, 0x11A47), (0x11A99, 0x11A99), (0x11D42, 0x11D42),
    (0x11D44, 0x11D45), (0x11D97, 0x11D97), (0x16FF0, 0x16FF1), (0x1E130, 0x1E136),
    (0x1E2AE, 0x1E2AE), (0x1E2EC, 0x1E2EF)) for point in range(first, last + 1)}


def unicode_tables(nfc):
    """What C needs to split text (letters, numbers) and to decompose, reorder and compose it."""
    points = [*range(0xD800), *range(0xE000, 0x110000)]         # no surrogates
    majors = {point: unicodedata.category(chr(point))[0] for point in points}

    def ranges(major):
        inside = [point for point in points if majors[point] == major]
        return list(zip([point for point in inside if majors.get(point - 1) != major],
                        [point for point in inside if majors.get(point + 1) != major]))

    tables = {"letters": ranges("L"), "numbers": ranges("N")}
    if nfc:
        known = [point for point in points if point not in NEW_MARKS]
        canonical = {}                          # code point -> its one-step decomposition
        for point in known:
            parts = unicodedata.decomposition(chr(point)).split()
            if parts and not parts[0].startswith("<"):          # "<...>" marks compatibility ones
                canonical[point] = tuple(int(part, 16) for part in (*parts, "0")[:2])
        tables["decompositions"] = [(point, *parts) for point, parts in canonical.items()]
        tables["compositions"] = sorted(
            (*parts, point) for point, parts in canonical.items()
            if parts[1] and unicodedata.normalize("NFC", "".join(map(chr, parts))) == chr(point))
        tables["classes"] = [(point, unicodedata.combining(chr(point))) for point in known
                             if unicodedata.combining(chr(point))]
    return tables


def blob(name, data):
    return name, "u8", (len(data),), PLAIN, data


def u32_entry(name, numbers, columns=None):
    data = array.array("I", numbers)
    shape = (len(data) // columns, columns) if columns else (len(data),)
    return name, "u32", shape, PLAIN, struct.pack(f"<{len(data)}I", *data)


def hf_tokenizer(path, entries, config):
    """tokenizer.json and tokenizer_config.json (as objects) from the entries "tokenizer/..."."""
    def numbers(name, columns=1):
        data = read_entry(entries["tokenizer/" + name]) if "tokenizer/" + name in entries else b""
        return list(zip(*[iter(struct.unpack(f"<{len(data) // 4}I", data))] * columns))

    data, flags = read_entry(entries["tokenizer/token_bytes"]), dict(numbers("added", 2))
    ends = [end for end, in numbers("token_ends")]
    names = [data[start:end] for start, end in zip([0, *ends], ends)]
    names = [name.decode() if token_id in flags else "".join(SYMBOLS[byte] for byte in name)
             for token_id, name in enumerate(names)]
    ids = {name: token_id for token_id, name in enumerate(names) if name}
    if len(ids) != len(names) - names.count(""):
        fail(path, "two of its tokens have the same bytes, which tokenizer.json cannot say")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                  "use_regex": True}
    nfc = parse_json(path, read_entry(entries["tokenizer/info"]))["nfc"]
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": token_id, "content": names[token_id], "single_word": False,
                          "lstrip": False, "rstrip": False, "normalized": bool(bits & NORMALIZED),
                          "special": bool(bits & SPECIAL)} for token_id, bits in flags.items()],
        "normalizer": {"type": "NFC"} if nfc else None, "pre_tokenizer": byte_level,
        "post_processor": byte_level, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": False,
                  "continuing_subword_prefix": None, "end_of_word_suffix": None, "vocab": ids,
                  "merges": [f"{names[left]} {names[right]}"
                             for left, right, _ in numbers("merges", 3)]}}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "add_prefix_space": False,
                "clean_up_tokenization_spaces": False, "model_max_length": config["context_length"],
                **{f"{key}_token": names[config[f"{key}_id"]] for key in ("bos", "eos")
                   if config[f"{key}_id"] in flags}}
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": settings}


# ------------------------------------------------------------------------------------------------
# LoRA adapters: PEFT's adapter_config.json and the tensors beside it
#
# An adapted linear layer computes W x + s B A x, where A [r, in] and B [out, r] are the adapter's
# and s is alpha / r, or alpha / sqrt(r) with rsLoRA. Whatever asks for more than that is refused.

PEFT_CONFIG = "adapter_config.json"
PEFT_TENSORS = "adapter_model.safetensors"
# Files of old versions have the adapter's own name before ".weight".
LORA_NAME = re.compile(r"base_model\.model\.(.+)\.(lora_[AB])(?:\.[^.]+)?\.weight")
IN_BLOCKS = re.compile(r"((?:gpt_neox\.layers|transformer\.h)\.[0-9]+\..+)\.weight")
OUTSIDE = ("embed_out", "lm_head", "gpt_neox.embed_in", "transformer.wte", "transformer.wpe")
# (key, values that a plain LoRA may have). init_lora_weights counts after training, too: PEFT
# changes the base's weights before it loads an adapter that began with PiSSA and its like.
PEFT_VALUES = (("peft_type", ("LORA",)), ("task_type", (None, "CAUSAL_LM")),
               ("bias", (None, "none")),
               ("init_lora_weights", (None, True, False, "gaussian", "eva", "orthogonal")))
# Read by adapter_settings and is_target, or not at all: where an adapter comes from, how it began,
# and details of what is refused under another key. Any other key must be null, false or empty.
PEFT_KEYS = {*dict(PEFT_VALUES), *"""
    r lora_alpha lora_dropout use_rslora fan_in_fan_out target_modules exclude_modules
    layers_to_transform layers_pattern base_model_name_or_path revision peft_version auto_mapping
    inference_mode runtime_config loftq_config eva_config corda_config lora_ga_config megatron_core
    qalora_group_size ensure_weight_tying""".split()}


def lora_name(module, part):
    return f"base_model.model.{module}.{part}.weight"


def adapter_settings(path, hf):
    """adapter_config.json -> the settings in an adapter file; what is no plain LoRA is an error."""
    def refuse(key, what):
        fail(path, f"{key} is {json.dumps(hf.get(key))[:60]}, {what}")

    for key, values in PEFT_VALUES:
        if hf.get(key) not in values:
            refuse(key, "which is not supported; train the adapter with "
                        + json.dumps([value for value in values if value is not None])[1:-1])
    for key in sorted(hf.keys() - PEFT_KEYS):
        if hf[key]:
            refuse(key, "which is not supported, as it could change what the adapter computes; "
                        "train the adapter without it")
    settings = {"r": setting(path, hf, int, 8, "r"),                    # with PEFT's defaults
                "alpha": setting(path, hf, float, 8.0, "lora_alpha"),
                "dropout": setting(path, hf, float, 0.0, "lora_dropout"),
                "rslora": setting(path, hf, bool, False, "use_rslora")}
    if not settings["alpha"] > 0:
        refuse("lora_alpha", "but must be positive; correct it")
    if not 0 <= settings["dropout"] < 1:
        refuse("lora_dropout", "but must be at least 0 and below 1; correct it")

    for key in ("target_modules", "exclude_modules"):
        names = hf.get(key)
        if isinstance(names, str):
            try:
                re.compile(names)
            except (re.error, OverflowError, RecursionError) as error:
                refuse(key, f"which is no regular expression ({error}); correct it")
        elif not (isinstance(names, list) and all(isinstance(name, str) for name in names)
                  or names is None and key == "exclude_modules"):
            refuse(key, "but must be a list of names, a regular expression or all-linear; set it")
    layers, patterns = hf.get("layers_to_transform"), hf.get("layers_pattern") or []
    if not (layers is None or is_size(layers) or all_sizes(layers, list)) \
            or layers is not None and isinstance(hf["target_modules"], str):
        refuse("layers_to_transform", "but must be a list of numbers, and target_modules a list of "
                                      "names; correct it")
    patterns = [patterns] if isinstance(patterns, str) else patterns
    if not isinstance(patterns, list) or any(name not in ("layers", "h") for name in patterns):
        refuse("layers_pattern", 'but the layers are called "layers" or "h"; set it to null')
    return settings


def is_target(hf, module):
    """Whether PEFT, told by adapter_config.json, adapts the linear layer with this path."""
    def named(names):
        if isinstance(names, str):
            return re.fullmatch(names, module) is not None
        return any(module == name or module.endswith("." + name) for name in names or ())

    targets, layers = hf["target_modules"], hf.get("layers_to_transform")
    if hf.get("exclude_modules") and named(hf["exclude_modules"]):
        return False
    if asks_for_all(hf):
        return module not in OUTSIDE
    if isinstance(targets, str) or module in targets or layers in (None, []):
        return named(targets)           # a whole path counts whatever layers_to_transform says
    layers = layers if isinstance(layers, list) else [layers]
    return named(targets) and any(number in map(str, layers) for number in module.split(".")[2:3])


def asks_for_all(hf):
    return isinstance(hf["target_modules"], str) and hf["target_modules"].lower() == "all-linear"


def target_names(hf, layers, adapted):
    """Names for an adapter file, which by PEFT's rule for lists mean `adapted` and nothing else.

    Those that adapter_config.json lists are kept where they do. For a regular expression, and where
    other keys take layers out again, names are found: the last part of a path ("c_proj") if it
    means no other layer, else the part inside the layer ("attn.c_proj"), else the whole path.
    """
    def reached(name):
        return {module for module in layers if module == name or module.endswith("." + name)}

    if asks_for_all(hf) and len(adapted) == len(layers):
        return "all-linear"
    adapted, listed = dict.fromkeys(adapted), hf["target_modules"]
    names = [name for name in dict.fromkeys(listed if isinstance(listed, list) else ())
             if reached(name) and reached(name) <= adapted.keys()]
    covered = set().union(*map(reached, names))
    for module in adapted:
        if module not in covered:
            names.append(next(name for name in (module.split(".")[-1], module.split(".", 3)[3],
                                                module) if reached(name) <= adapted.keys()))
            covered |= reached(names[-1])
    return ",".join(names)


def linear_layers(path, entries):
    """{path: (in, out)} of the linear layers inside a model's blocks, in model order."""
    layers = {}
    for name, entry in entries.items():
        match = IN_BLOCKS.fullmatch(name)
        if match and entry.layout != PLAIN and len(entry.shape) == 2:
            layers[match[1]] = entry.shape[::-1] if entry.layout == LINEAR else entry.shape
    if not layers:
        fail(path, "has no linear layers to adapt; the file is malformed, make it again")
    return layers


def lora_tensors(tensors):
    """The tensors under the names that PEFT gives them today; any other one is an error."""
    result = {}
    for name, tensor in tensors.items():
        match = LORA_NAME.fullmatch(name)
        if any(f".{module}." in name for module in OUTSIDE):
            fail(tensor.path, f"tensor {name!r} adapts the output head or the embeddings; dpo.h "
                              "adapts the linear layers inside the blocks: train it without")
        if not match:
            fail(tensor.path, f"tensor {name!r} is no lora_A or lora_B of a linear layer; dpo.h "
                              "knows no other: train the adapter without it")
        if tensor.dtype not in TORCH_DTYPES:
            fail(tensor.path, f"tensor {name!r} is {tensor.dtype.upper()}; save the adapter as "
                              "F32, F16 or BF16")
        if lora_name(*match.groups()) in result:
            fail(tensor.path, f"tensor {name!r} is there twice, for two adapters; save only one")
        result[lora_name(*match.groups())] = tensor
    return result


def peft_config(config, modules):
    """An adapter_config.json for an adapter that never had one."""
    alpha, targets = config["alpha"], config["target_modules"]
    return {"alpha_pattern": {}, "base_model_name_or_path": config["base"], "bias": "none",
            "fan_in_fan_out": modules[0].startswith(PREFIX[BTLM]), "inference_mode": True,
            "init_lora_weights": True, "layers_pattern": None, "layers_to_transform": None,
            "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
            "lora_dropout": config["dropout"], "modules_to_save": None, "peft_type": "LORA",
            "r": config["r"], "rank_pattern": {}, "revision": None,
            "target_modules": targets if targets == "all-linear" else targets.split(","),
            "task_type": "CAUSAL_LM", "use_rslora": config["rslora"]}


# ------------------------------------------------------------------------------------------------
# import and export

FILES = ("config.json", "generation_config.json", "tokenizer.json", "vocab.json", "merges.txt",
         "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def run_file(path, *names):
    """A run directory stands for the first of its files, as in the C programs."""
    if not os.path.isdir(path):
        return path
    paths = [os.path.join(path, name) for name in names]
    return next(filter(os.path.exists, paths), paths[0])


def is_run(directory):
    """Whether train made it: the config.json of a run says what was to be done, and how."""
    path = os.path.join(directory, "config.json")
    return os.path.exists(path) and {"command", "options"} <= read_json_object(path).keys()


def import_directory(directory, output, base):
    if not os.path.isdir(directory):    # first: of swapped names the other exists already
        fail(directory, "is no directory; the order is import DIR FILE")
    if is_run(directory):
        fail(directory, "is a run directory of train, and what it trained is in dpo.h's own format "
                        "already; `convert.py export` makes a checkpoint of its model or adapter")
    refuse_existing(output)
    is_adapter = os.path.exists(os.path.join(directory, PEFT_CONFIG))
    if is_adapter and base is None:
        fail(directory, f"holds {PEFT_CONFIG}, so it is a PEFT adapter: name the model it belongs "
                        f"to (--base model.bin), or take {PEFT_CONFIG} out of a whole checkpoint")
    if base is None:
        import_model(directory, output)
    elif is_adapter:
        import_adapter(directory, output, run_file(base, "model.bin"))
    else:
        fail(directory, f"has no {PEFT_CONFIG}, so it is no PEFT adapter; leave --base out to "
                        "import a whole checkpoint")


def import_model(directory, output):
    started, config_path = time.monotonic(), os.path.join(directory, "config.json")
    config = canonical_config(config_path, read_json_object(config_path))
    tensors = match_tensors(directory, config, read_checkpoint(directory))
    vocabulary = read_tokenizer(directory)
    entries = [blob("config", json.dumps(config).encode())]
    entries += [(name, tensor.dtype, tensor.shape, tensor.layout, tensor_chunks(tensor))
                for name, tensor in tensors.items()]
    if vocabulary:
        entries += tokenizer_entries(vocabulary, config["vocab_size"])
    else:
        note(directory, "no tokenizer.json or vocab.json: the model file will have no tokenizer")
    for name in FILES:
        path = os.path.join(directory, name)
        if os.path.exists(path):
            entries.append(blob("file/" + name, read_bytes(path)))
    write_container(output, MODEL, entries)
    report(output, config["arch"], tensors, started)


def import_adapter(directory, output, base):
    started, path = time.monotonic(), os.path.join(directory, PEFT_CONFIG)
    hf, base_entries = read_json_object(path), open_container(base, MODEL)
    settings, layers = adapter_settings(path, hf), linear_layers(base, base_entries)
    outside = [module for module in OUTSIDE if is_target(hf, module)]
    if outside:
        fail(path, f"target_modules or another key names {outside[0]}; dpo.h adapts the linear "
                   "layers inside the blocks only: train the adapter without it")
    # Only how a base stores its weight hangs on this, not the adapter's tensors; PEFT corrects it
    # itself in either direction when it meets the layer, and says so.
    conv1d = next(iter(layers)).startswith(PREFIX[BTLM])
    if hf.get("fan_in_fan_out") not in (None, conv1d):
        note(path, f"fan_in_fan_out should be {json.dumps(conv1d)} for such a base; ignored, as "
                   "PEFT does")
    adapted = [module for module in layers if is_target(hf, module)]
    if not adapted:
        fail(path, f"target_modules name no linear layer of {base}; give the adapter's own base")

    source = os.path.join(directory, PEFT_TENSORS)
    if os.path.exists(source):
        found = read_safetensors(source)
    elif os.path.exists(os.path.join(directory, "adapter_model.bin")):
        source = os.path.join(directory, "adapter_model.bin")
        found = read_torch(source)
    else:
        fail(directory, f"has neither {PEFT_TENSORS} nor adapter_model.bin; fetch it")
    found, r = lora_tensors(found), settings["r"]
    shapes = {lora_name(module, part): shape for module in adapted for part, shape in (
        ("lora_A", (r, layers[module][0])), ("lora_B", (layers[module][1], r)))}
    for name in found:
        if name not in shapes:
            fail(source, f"tensor {name!r} belongs to no linear layer of {base} that "
                         f"{PEFT_CONFIG} has as a target; fetch both again, and give their base")
    for name, shape in shapes.items():
        if name not in found:
            fail(source, f"tensor {name!r} is missing, though {PEFT_CONFIG} has the layer as a "
                         "target; fetch both again, and give their base")
        if found[name].shape != shape:
            fail(source, f"tensor {name!r} has shape {list(found[name].shape)}, by r and the base "
                         f"{list(shape)}; fetch both again, and give their base")
    place = os.path.realpath(base)  # as dpo_lora_save: one that it cannot keep is left out
    if len(os.fsencode(place)) > 1023 or any("\ud800" <= c <= "\udfff" for c in place):
        place = ""
    config = {**settings, "target_modules": target_names(hf, layers, adapted), "base": place}
    tensors = {name: found[name]._replace(layout=LINEAR) for name in shapes}
    write_container(output, ADAPTER, [
        blob("config", json.dumps(config).encode()),
        ("base", "u64", (1,), PLAIN, struct.pack("<Q", identity(base, base_entries))),
        *((name, tensor.dtype, tensor.shape, tensor.layout, tensor_chunks(tensor))
          for name, tensor in tensors.items()),
        blob("file/" + PEFT_CONFIG, read_bytes(path))])
    report(output, f"LoRA of rank {r}", tensors, started)


def is_hf_folder(path):
    """A run directory has a config.json, too, but one of its own."""
    config = os.path.join(path, "config.json")
    return (os.path.exists(os.path.join(path, PEFT_CONFIG)) or
            os.path.exists(config) and "model_type" in read_json_object(config))


def export_file(path, directory):
    directory = directory.rstrip("/") or "/"
    folder, path = path, run_file(path, "model.bin", "adapter.bin")
    if not os.path.exists(path) and is_hf_folder(folder):
        fail(folder, "is a Hugging Face folder, and export makes one; did you mean import?")
    if os.path.lexists(directory) and not (os.path.isdir(directory) and not os.listdir(directory)):
        fail(directory, "is not an empty directory and never overwritten; choose another name")
    (export_adapter if container_kind(path) == ADAPTER else export_model)(path, directory)


def export_model(model, directory):
    started, entries = time.monotonic(), open_container(model, MODEL)
    files = {name: read_entry(entries["file/" + name])
             for name in FILES if "file/" + name in entries}
    try:
        config = parse_json(model, read_entry(entries["config"]), "its entry config is ")
        tensors = match_tensors(model, config, {
            name: entry for name, entry in entries.items()
            if name != "config" and not name.startswith(("tokenizer/", "file/"))})
        dtype = matrix_dtype(tensors)
        if "config.json" in files:
            files["config.json"] = with_true_dtype(model, files["config.json"], dtype)
        else:
            generated = {"config.json": hf_config(model, config, dtype)}
            if "tokenizer/info" in entries:
                generated.update(hf_tokenizer(model, entries, config))
            files.update((name, json_text(value)) for name, value in generated.items())
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError,
            struct.error) as error:
        fail(model, f"its config or tokenizer is malformed ({error!r}); make the file again")
    write_directory(directory, "model.safetensors", tensors, files)
    report(directory, config["arch"], tensors, started)


def export_adapter(adapter, directory):
    started, entries = time.monotonic(), open_container(adapter, ADAPTER)
    try:
        config = parse_json(adapter, read_entry(entries.pop("config")), "its entry config is ")
        entries.pop("base")
        original = entries.pop("file/" + PEFT_CONFIG, None)
        tensors = lora_tensors({name: entry for name, entry in entries.items()
                                if not name.startswith("file/")})
        modules = list(dict.fromkeys(LORA_NAME.fullmatch(name)[1] for name in tensors))
        for module in modules:
            a, b = (tensors[lora_name(module, part)].shape for part in ("lora_A", "lora_B"))
            if not len(a) == len(b) == 2 or not a[0] == b[1] == config["r"]:
                raise ValueError(f"the shapes of {module}'s lora_A and lora_B")
        data = json_text(peft_config(config, modules))
        if original and still_describes(adapter, read_entry(original), config, modules):
            data = read_entry(original)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError,
            struct.error) as error:
        fail(adapter, f"its entries are malformed ({error!r}); make the file again")
    write_directory(directory, PEFT_TENSORS, tensors, {PEFT_CONFIG: data})
    report(directory, f"LoRA of rank {config['r']}", tensors, started)


def still_describes(path, data, config, modules):
    """Whether the adapter_config.json that an adapter came with is true of what it is now."""
    hf = parse_json(path, data, f"its {PEFT_CONFIG} is ")
    settings = adapter_settings(path, hf)
    return (all(math.isclose(settings[key], config[key], rel_tol=1e-6) for key in settings)
            and all(is_target(hf, module) for module in modules))


def write_directory(directory, tensors_name, tensors, files):
    """Make a directory, or fill an empty one, with tensors and small files {name: bytes}."""
    temporary = f"{directory}.tmp-{os.getpid()}"
    os.mkdir(temporary)
    try:
        write_safetensors(os.path.join(temporary, tensors_name), tensors)
        for name, data in files.items():
            with atomic_file(os.path.join(temporary, name)) as file:
                file.write(data)
        os.rename(temporary, directory)         # replaces an empty directory
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def report(path, what, tensors, started):
    count = sum(math.prod(tensor.shape) for tensor in tensors.values())
    size = sum(map(tensor_bytes, tensors.values()))
    print(f"{path}: {what}, {len(tensors)} tensors, {count:,} parameters, "
          f"{size / 1e6:,.1f} MB in {time.monotonic() - started:.1f} s")


def json_text(value):
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def matrix_dtype(tensors):
    """The dtype of a model as config.json has it: the matrices', as vectors may be kept in f32."""
    sizes = collections.Counter()
    for tensor in tensors.values():
        sizes[tensor.dtype] += math.prod(tensor.shape) if len(tensor.shape) == 2 else 0
    return TORCH_DTYPES[max(sizes, key=sizes.get)]


def with_true_dtype(path, data, dtype):
    """config.json word for word, unless it names another dtype than the matrices'."""
    hf = parse_json(path, data, "its config.json is ")
    wrong = {key: dtype for key in ("dtype", "torch_dtype")
             if hf.get(key) is not None and str(hf[key]).split(".")[-1] != dtype}
    return json_text({**hf, **wrong}) if wrong else data


# ------------------------------------------------------------------------------------------------
# Data sets -> {"prompt", "chosen", "rejected"} or {"prompt", "completion"}; text stays as it is

HUMAN, ASSISTANT = "\n\nHuman: ", "\n\nAssistant:"          # HH's turns; answers begin with a space
ALPACA = ("Below is an instruction that describes a task{}. Write a response that appropriately "
          "completes the request.\n\n### Instruction:\n{}{}\n\n### Response:")
ALPACA_INPUT = ", paired with an input that provides further context"


class Record:
    """One JSON object of a data set, which knows where it stands."""

    def __init__(self, path, place, value):
        self.path, self.place, self.value = path, place, value
        if not isinstance(value, dict):
            self.fail("is not a JSON object; correct it")

    def fail(self, message):
        fail(self.path, f"{self.place}: {message}")

    def get(self, key, kind, default=None):
        value = self.value.get(key)
        value = default if value is None else value
        if value is None:
            self.fail(f"has no {key!r}; add it, or is the file of another kind?")
        if type(value) is not kind:
            self.fail(f"{key!r} is {json.dumps(value)[:40]}, not a {kind.__name__}; correct it")
        if kind is str and re.search("[\ud800-\udfff]", value):
            self.fail(f"{key!r} has a lone surrogate (half of a \\u pair); correct it")
        return value


def read_records(path):
    """The Records of a file of JSON lines or with one JSON array, either perhaps gzipped."""
    refuse_pointer(path)
    with open(path, "rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    try:
        with (gzip.open if zipped else open)(path, "rb") as file:
            lines = ((number, line) for number, line in enumerate(file, 1) if line.strip())
            number, line = next(lines, (0, b""))
            if line.strip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
                values = parse_json(path, line + file.read())
                yield from (Record(path, f"record {i}", value) for i, value in enumerate(values, 1))
            elif line:
                for number, line in itertools.chain([(number, line)], lines):
                    place = f"line {number}"
                    yield Record(path, place, parse_json(path, line, place + ": "))
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        fail(path, f"its gzip data is damaged ({error}); fetch it again")


# A converter turns a Record into one that train.c reads, or into the reason why it is dropped.

def finished(prompt, **answers):
    if not all(answer.strip() for answer in answers.values()):
        return "empty answer"
    return {"prompt": prompt, **answers}


def shp_record(record, _template):
    """Two comments on a post, one of which scored at least twice as high (the paper's filter)."""
    answers = [" " + record.get(key, str) for key in ("human_ref_A", "human_ref_B")]
    scores = [record.get(key, int) for key in ("score_A", "score_B")]
    label = str(record.value.get("labels"))
    if label not in ("0", "1", "False", "True"):
        record.fail("'labels' must be 1 (A is preferred) or 0 (B is); correct it")
    history, better = record.get("history", str), 0 if label in ("1", "True") else 1
    if not history.strip():
        return "empty post"
    if min(scores) <= 0 or max(scores) < 2 * min(scores):
        return "score ratio below 2 (or a score below 1)"
    result = finished(HUMAN + history + ASSISTANT, chosen=answers[better],
                      rejected=answers[1 - better])
    return result if isinstance(result, str) else {**result, "score": scores[better]}


def alpaca_record(record, template):
    instruction, context = record.get("instruction", str), record.get("input", str, "")
    if not instruction.strip():
        return "empty instruction"
    if template == "hh":
        space, prompt = " ", HUMAN + instruction + ("\n" + context if context else "") + ASSISTANT
    else:
        space, prompt = "", ALPACA.format(ALPACA_INPUT if context else "", instruction,
                                          f"\n\n### Input:\n{context}" if context else "")
    if {"chosen", "rejected"} & record.value.keys():
        return finished(prompt, **{key: space + record.get(key, str)
                                   for key in ("chosen", "rejected")})
    return finished(prompt, completion=space + record.get("output", str))


def text_record(record, names):
    """A record in train.c's own fields: its text stays as it is, no turns are put around it."""
    whole = names == ("text",) or ("chosen" in names and record.value.get("prompt") is None)
    texts = {name: record.get(name, str) for name in (names if whole else ("prompt", *names))}
    if not all(texts[name].strip() for name in names):
        return "empty answer"
    if whole and ASSISTANT not in texts.get("chosen", ASSISTANT):
        return "neither a prompt nor Anthropic HH's turns"
    return {name.replace("response", "completion"): text for name, text in texts.items()}


def messages_record(record, _template):
    """TRL's forms: text, or messages; chosen and rejected may or may not repeat the prompt."""
    def turns(key):
        if key == "prompt" and isinstance(record.value.get(key), str):
            return [("user", record.get(key, str))]
        return [(message.get("role", str), message.get("content", str)) for message in (
            Record(record.path, f"{record.place}, message {i} of {key!r}", value)
            for i, value in enumerate(record.get(key, list, []), 1))]

    names = next((names for names in (("chosen", "rejected"), ("completion",), ("messages",),
                                      ("response",), ("text",))
                  if {*names} & record.value.keys()), None)
    if names is None:
        record.fail("has no chosen, completion, messages, response or text; is the file of another "
                    "kind?")
    types = {type(record.value.get(name)) for name in names}
    if names == ("text",) or (names != ("messages",) and str in types and list not in types):
        return text_record(record, names)
    prompt, listed = turns("prompt"), isinstance(record.value.get("prompt"), list)
    talks = {name: turns(name) for name in names}
    for name, talk in talks.items():        # a prompt given as text is in a talk that has its own
        if talk[:len(prompt)] != prompt and (listed or talk[:1] and talk[0][0] == "assistant"):
            talks[name] = prompt + talk
    before = talks[names[0]][:-1]
    if not all(talk and talk[-1][0] == "assistant" for talk in talks.values()):
        return "does not end with an assistant message"
    if any(talk[:-1] != before for talk in talks.values()):
        return "chosen and rejected differ before their last message"
    if not before or before[-1][0] != "user":
        return "no user message before the answer"
    if not {role for role, _ in before} <= {"system", "user", "assistant"}:
        return "a role other than system, user and assistant"
    text, system = "", ""               # HH has no system turn: its text opens the next human turn
    for role, content in before:
        if role == "system":
            system += content + "\n\n"
        else:
            text += HUMAN + system + content if role == "user" else f"{ASSISTANT} {content}"
            system = system if role == "assistant" else ""
    return finished(text + ASSISTANT, **{
        "completion" if name in ("messages", "response") else name: " " + talk[-1][1]
        for name, talk in talks.items()})


CONVERTERS = {"shp": shp_record, "alpaca": alpaca_record, "messages": messages_record}


def convert_data(kind, source, output, template):
    refuse_existing(output)
    dropped = collections.Counter()

    def kept():
        fields = None
        for record in read_records(source):
            result = CONVERTERS[kind](record, template)
            if isinstance(result, str):
                dropped[result] += 1
                continue
            if fields not in (None, result.keys()):
                record.fail(f"has {'/'.join(result)}, those before it {'/'.join(fields)}: two "
                            "kinds are mixed in one file; separate them")
            fields = result.keys()
            yield result

    n_kept = 0
    with atomic_file(output) as file:
        # Of SHP's pairs on one post the one with the best answer comes last: SFT's target. Records
        # without a prompt are groups of their own.
        for _, group in itertools.groupby(kept(), lambda result: result.get("prompt", result)):
            for result in sorted(group, key=lambda result: result.pop("score", 0)):
                file.write(json.dumps(result, ensure_ascii=False).encode() + b"\n")
                n_kept += 1
        reasons = [f"{count} dropped: {reason}" for reason, count in dropped.most_common()]
        if not n_kept:
            fail(source, f"no record was kept ({'; '.join(reasons) or 'the file is empty'}); "
                         f"is it {kind} data?")
    n_read = n_kept + sum(dropped.values())
    print(f"{output}: {n_kept} of {n_read} records kept", *reasons, sep="\n")


# ------------------------------------------------------------------------------------------------
# Command line

def parse_arguments():
    parser = argparse.ArgumentParser(prog="convert.py", description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="import|export|data")

    def command(name, text):
        return commands.add_parser(name, help=text, description=text)

    sub = command("import", "make a model file from a GPT-NeoX (Pythia) or BTLM checkpoint, or an "
                            "adapter file from a LoRA adapter of PEFT's")
    sub.add_argument("DIR", help="directory with config.json, the weights and the tokenizer; or "
                                 "with adapter_config.json and adapter_model.safetensors or .bin")
    sub.add_argument("FILE", help="file to make; it must not exist")
    sub.add_argument("--base", metavar="MODEL",
                     help="model file that the adapter belongs to (adapters only)")
    sub = command("export", "make a directory that transformers loads from a model file, or one "
                            "that PEFT loads from an adapter file")
    sub.add_argument("FILE", help="model or adapter file, or a run directory with one")
    sub.add_argument("DIR", help="directory to make; it must not exist, or be empty")
    sub = command("data", "make lines of prompts and answers that train reads, and count what was "
                          "dropped and why")
    sub.add_argument("KIND", choices=list(CONVERTERS),
                     help="shp: Stanford Human Preferences, pairs whose scores differ by a factor "
                          "of 2 or more. alpaca: instruction, input, and output or chosen and "
                          "rejected. messages: conversations as TRL and UltraFeedback have them; "
                          "or text in train's own fields (prompt with chosen and rejected, or with "
                          "completion or response; HH's chosen and rejected; text), which stays as "
                          "it is")
    sub.add_argument("IN", help="JSON lines or one JSON array, may be gzipped")
    sub.add_argument("OUT", help="JSON lines to make; the file must not exist")
    sub.add_argument("--template", choices=("alpaca", "hh"),
                     help="form of alpaca's prompts: Alpaca's headings (the default), or Anthropic "
                          "HH's turns, which shp and conversations always have")
    options = parser.parse_args()
    if options.command == "data" and options.template and options.KIND != "alpaca":
        sub.error("--template is for alpaca only")
    return options


def main():
    options = parse_arguments()
    try:
        if options.command == "import":
            import_directory(options.DIR, options.FILE, options.base)
        elif options.command == "export":
            export_file(options.FILE, options.DIR)
        else:
            convert_data(options.KIND, options.IN, options.OUT, options.template)
        return 0
    except ConvertError as error:
        message = str(error)
    except OSError as error:
        message = f"{error.filename or options.command}: {error.strerror}; check that path"
    except MemoryError:
        message = f"{options.command}: out of memory; free some, if the input is not damaged"
    except KeyboardInterrupt:
        message = f"{options.command}: interrupted; nothing was written"
    print("convert.py: " + message.replace("\n", " "), file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
