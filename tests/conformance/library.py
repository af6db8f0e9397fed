"""What the conformance scripts share: dpo.h through ctypes, convert.py, and counted checks.

dpo.h is compiled once, with shim.c, into build/ (CC and CFLAGS are honoured), by the Makefile's
flags, so that what is compared is what trains.

  DPO_SHARED   directory whose data/ has golden models, tokenizers and HH pairs; by default `shared`
               beside the project. Without it the comparisons that need it are skipped, and others
               run on generated data.
"""
import ctypes
import importlib.util
import itertools
import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import warnings

warnings.filterwarnings("ignore", category=FutureWarning)       # the peers' own about themselves
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TQDM_DISABLE="1",
                  HF_DATASETS_DISABLE_PROGRESS_BARS="1", HF_HUB_DISABLE_PROGRESS_BARS="1",
                  TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")     # threads that spin starve a shared machine

import numpy as np  # noqa: E402

HERE = pathlib.Path(__file__).resolve().parent
PROJECT = HERE.parents[1]
SHARED = pathlib.Path(os.environ.get("DPO_SHARED") or PROJECT.parent / "shared") / "data"
NEOX_TOKENIZER = SHARED / "tokenizers" / "neox20b"
GPT2_TOKENIZER = SHARED / "tokenizers" / "gpt2"
HH = SHARED / "hh" / "train.jsonl"

sys.path.insert(0, str(HERE.parent))            # btlm_torch
sys.dont_write_bytecode = True


# --- convert.py and the programs -----------------------------------------------------------------

def load_convert():
    """convert.py as a module, for its reader and writer of containers."""
    spec = importlib.util.spec_from_file_location("convert", PROJECT / "convert.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*command, fails=False):
    """Runs a program; returns what it wrote to stderr (fails) or stdout."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True,
                          check=False)
    if (done.returncode != 0) != fails:
        sys.exit(f"{shlex.join(map(str, command))}: exit status {done.returncode}\n{done.stderr}")
    return done.stderr if fails else done.stdout


def convert(*arguments, fails=False):
    return run(sys.executable, PROJECT / "convert.py", *arguments, fails=fails)


def train(*arguments):
    """The train program, made by `make`."""
    if not (PROJECT / "train").exists():
        run("make", "-C", PROJECT, "train")
    return run(PROJECT / "train", *arguments)


# --- dpo.h ---------------------------------------------------------------------------------------

def build():
    """The shared library's path; compiled if dpo.h, shim.c or the command has changed."""
    source, out = HERE / "shim.c", PROJECT / "build" / "conformance.so"
    out.parent.mkdir(exist_ok=True)
    command = [*shlex.split(os.environ.get("CC", "cc")), "-shared", "-fPIC", "-std=gnu11", "-O3",
               "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math",
               *shlex.split(os.environ.get("CFLAGS", "")), str(source)]
    stamp = out.with_suffix(".command")
    newest = max(path.stat().st_mtime for path in (source, PROJECT / "dpo.h"))
    if out.exists() and stamp.exists() and stamp.read_text() == shlex.join(command) \
            and out.stat().st_mtime > newest:
        return out
    fresh = out.with_suffix(".new")
    for cpu, openmp in itertools.product((["-march=native"], ["-mcpu=native"], []),
                                         (["-fopenmp"], [])):       # the best that compiles
        done = subprocess.run([*command, *cpu, *openmp, "-o", str(fresh), "-lm"],
                              capture_output=True, text=True, check=False)
        if done.returncode == 0:
            break
    else:
        sys.exit(done.stderr)
    fresh.rename(out)
    stamp.write_text(shlex.join(command))
    return out


def array(values, dtype):
    return np.ascontiguousarray(values, dtype=dtype)


DTYPES = {"fp32": 1, "bf16": 3}
LOSSES = {"sigmoid": 0, "ipo": 1, "ipo-sum": 2, "hinge": 3}
COLUMNS = ["loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins",
           "logps/chosen", "logps/rejected"]


class Model:
    """A model file, loaded by dpo.h; with an adapter file over it, that alone is trained. A batch
    is a list of (prompt, [(branch, first_scored)])."""

    shared = None

    def __init__(self, path, adapter=None, dtype="fp32", threads=0):
        if Model.shared is None:
            Model.shared = ctypes.CDLL(str(build()))
            for name in ("shim_new", "shim_pair_tokens"):
                getattr(Model.shared, name).restype = ctypes.c_void_p
            for name in ("shim_vocab_size", "shim_n_tensors", "shim_tensor"):
                getattr(Model.shared, name).restype = ctypes.c_size_t
            Model.shared.shim_error.restype = ctypes.c_char_p
        self.handle = ctypes.c_void_p(Model.shared.shim_new(ctypes.c_int(threads)))
        self.call("load", str(path).encode(), adapter and str(adapter).encode(), DTYPES[dtype])
        self.vocab_size = Model.shared.shim_vocab_size(self.handle)

    def close(self):
        Model.shared.shim_free(self.handle)
        self.handle = None

    def call(self, name, *arguments):
        """Arrays go as pointers, ints as size_t, floats as double."""
        def plain(value):
            if isinstance(value, np.ndarray):
                return ctypes.c_void_p(value.ctypes.data)
            if isinstance(value, float):
                return ctypes.c_double(value)
            return ctypes.c_size_t(value) if isinstance(value, int) else value

        if getattr(Model.shared, "shim_" + name)(self.handle, *map(plain, arguments)):
            raise RuntimeError(Model.shared.shim_error(self.handle).decode())

    def tensors(self, grads=False):
        """{name: array}: the parameters, or the gradients that there are; fp32 ones are views, bf16
        ones copies."""
        result = {}
        for i in range(Model.shared.shim_n_tensors(self.handle)):
            name, shape = ctypes.c_char_p(), (ctypes.c_size_t * 2)()
            place, dtype = ctypes.c_void_p(), ctypes.c_int()
            n_dims = Model.shared.shim_tensor(
                self.handle, ctypes.c_size_t(i), ctypes.c_int(grads), ctypes.byref(name), shape,
                ctypes.byref(place), ctypes.byref(dtype))
            if not place:
                continue
            half = dtype.value == DTYPES["bf16"]
            sort = ctypes.POINTER(ctypes.c_uint16 if half else ctypes.c_float)
            values = np.ctypeslib.as_array(ctypes.cast(place, sort), shape[:n_dims])
            if half:            # a bf16 is the upper half of a float
                values = (values.astype(np.uint32) << 16).view(np.float32)
            result[name.value.decode()] = values
        return result

    def save(self, path):
        self.call("save", str(path).encode())

    def logits(self, tokens):
        tokens = array(tokens, np.uint32)
        out = np.empty((len(tokens), self.vocab_size), np.float32)
        self.call("logits", out, tokens, len(tokens))
        return out

    def forward(self, batch, keep=False):
        """(logp, n_scored, greedy) of every branch."""
        prompts = array([len(prompt) for prompt, _ in batch], np.uint32)
        rows = array([(e, first, len(branch)) for e, (_, branches) in enumerate(batch)
                      for branch, first in branches], np.uint32)
        tokens = array([t for prompt, branches in batch
                        for part in (prompt, *(b for b, _ in branches)) for t in part], np.uint32)
        self.call("set_batch", prompts, len(prompts), rows, len(rows), tokens, len(tokens))
        logp = np.empty(len(rows))
        n_scored, greedy = np.empty(len(rows), np.uint32), np.empty(len(rows), np.uint32)
        self.call("forward", logp, n_scored, greedy, ctypes.c_int(keep))
        return logp, n_scored, greedy

    def gradients(self, batch, dlogp):
        """(logp, {name: gradient of sum of dlogp * logp}), the latter a view."""
        self.call("zero_grad")
        logp, _, _ = self.forward(batch, keep=True)
        self.call("backward", array(dlogp, np.float64))
        return logp, self.tensors(grads=True)

    def start_training(self, weight_decay=0.0):
        """AdamW with its defaults."""
        self.call("optimizer", ctypes.c_int(0), weight_decay)

    def dpo_step(self, batch, reference, loss, beta, learning_rate, max_norm):
        """One update; the log's columns before it, the gradients' norm before clipping, and the
        pairs' margins."""
        self.call("zero_grad")
        rewards = beta * (self.forward(batch, keep=True)[0] - reference)
        columns, dlogp = np.empty(len(COLUMNS)), np.empty(2 * len(batch))
        self.call("pair_losses", columns, dlogp, array(reference, np.float64),
                  ctypes.c_int(LOSSES[loss]), beta, 0.0)
        self.call("backward", dlogp)
        norm = np.empty(1)
        self.call("step", norm, learning_rate, max_norm)
        return {**dict(zip(COLUMNS, columns.tolist())), "grad_norm": float(norm[0]),
                "margins": rewards[0::2] - rewards[1::2]}

    def encode(self, text):
        data = text.encode()
        ids, n = ctypes.POINTER(ctypes.c_uint32)(), ctypes.c_size_t()
        self.call("encode", ctypes.byref(ids), ctypes.byref(n), data, len(data))
        return ids[:n.value] if n.value else []

    def load_pairs(self, path, max_length, max_prompt_length):
        """[(prompt, chosen, rejected)] of token ids, as train.c would have them."""
        n = ctypes.c_size_t()
        self.call("load_pairs", ctypes.byref(n), str(path).encode(), max_length, max_prompt_length)

        def part(i, which):
            size = ctypes.c_size_t()
            place = Model.shared.shim_pair_tokens(self.handle, ctypes.byref(size),
                                                  ctypes.c_size_t(i), ctypes.c_size_t(which))
            return (ctypes.c_uint32 * size.value).from_address(place)[:] if size.value else []
        return [tuple(part(i, which) for which in range(3)) for i in range(n.value)]


# --- checks --------------------------------------------------------------------------------------

def distance(ours, truth, relative=True):
    """Largest |ours - truth|, relative to the largest |truth|. What is not finite is far away."""
    ours, truth = np.asarray(ours, np.float64), np.asarray(truth, np.float64)
    if ours.shape != truth.shape or not (np.isfinite(ours).all() and np.isfinite(truth).all()):
        return float("inf")
    apart = float(np.abs(ours - truth).max())
    if not relative:
        return apart
    largest = float(np.abs(truth).max())
    return apart / largest if largest else (0.0 if apart == 0 else float("inf"))


def worst(ours, truth):
    """(distance, name) of the tensor that is furthest; the names must be the same."""
    if set(ours) != set(truth):
        return float("inf"), f"other names: {sorted(set(ours) ^ set(truth))[:4]}"
    return max((distance(ours[name], truth[name]), name) for name in truth)


class Checks:
    """Counts, and prints a line for each."""

    def __init__(self, title):
        self.passed = self.failed = 0
        print(title, flush=True)

    def heading(self, text):
        print(f"  {text}", flush=True)

    def expect(self, ok, what):
        self.passed, self.failed = self.passed + bool(ok), self.failed + (not ok)
        print(f"    {'✓' if ok else '✗ FAILED:'} {what}", flush=True)

    def near(self, what, apart, tolerance, note=""):
        self.expect(apart <= tolerance, f"{what}: {apart:.1e} (allowed {tolerance:.0e})"
                                        f"{', ' + note if note else ''}")

    def skip(self, what):
        print(f"    - skipped: {what}", flush=True)

    def done(self):
        print(f"{self.passed} passed, {self.failed} failed", flush=True)
        return 1 if self.failed else 0


# --- inputs --------------------------------------------------------------------------------------

def copy_tokenizer(source, directory):
    """Tokenizer files without a config.json beside them."""
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        if (source / name).exists():
            shutil.copyfile(source / name, pathlib.Path(directory) / name)


def hh_pairs():
    """HH's records as {"prompt", "chosen", "rejected"}, but those whose prompts differ."""
    mark = "\n\nAssistant:"
    for line in HH.read_text("utf-8").splitlines():
        record = json.loads(line)
        cut = record["chosen"].rindex(mark) + len(mark)
        prompt = record["chosen"][:cut]
        if record["rejected"].startswith(prompt):
            yield {"prompt": prompt, "chosen": record["chosen"][cut:],
                   "rejected": record["rejected"][cut:]}
