#!/usr/bin/env python3
"""dpo.h's DPO beside PyTorch's: the same model, pairs, batches and precision, in turns.

    python3 tests/bench_peers.py [--size 160m] [--batch 8 2] [--settings full lora]
        [--peers trl loop compiled] [--dtype fp32] [--pairs 16] [--rounds 3] [--threads N]
    python3 tests/bench_peers.py --products [--rounds 3] [--threads N]

Peers, in the environment that tests/setup_venv.sh makes (this script starts itself again there):

  trl       TRL's DPOTrainer as its users run it on a CPU: the reference precomputed, gradient
            checkpointing off;
  loop      the best plain PyTorch loop: eager, pairs sorted by length and padded in small passes
            with a backward each, sdpa attention without a mask, the head on scored positions only,
            the reference precomputed, fused AdamW;
  compiled  the same under torch.compile.

bf16 means what each side's users get by asking for it: --dtype bf16 of ./train; autocast over fp32
weights in PyTorch, and with LoRA over frozen weights that are bf16 in the plain loop.

Each run is a process of its own, on the same number of threads, and makes as many updates from
random weights of a Pythia's size on HH pairs that need no truncation (DPO_SHARED as in
conformance/library.py; generated ones without). It goes through all pairs twice. The first time
warms up: pages are touched, threads made, code compiled. What is timed, on every side, is the
second time, so all pairs once, whatever their order; not loading, tokens or the reference. Tokens
are those of prompt and answer, twice a pair, without padding, whatever a program computes of them.
Memory is the most that was resident.

That all compute the same is the conformance tests' business (trl_live.py, lora_live.py). Here the
first update's loss must be ln 2, the token ids must be as many on both sides, and the last update's
loss must have moved away from ln 2: otherwise the run fails.

--products: a layer's three fp32 products alone, those of `make bench` beside the library's that
PyTorch calls (MKL on Intel's and AMD's CPUs), each program by itself, in turns.
"""
import argparse
import csv
import json
import math
import os
import pathlib
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "conformance"))
# width, layers, heads
SIZES = {"70m": (512, 6, 8), "160m": (768, 12, 12), "410m": (1024, 24, 16)}
SETTINGS, PEERS = ("full", "lora"), ("trl", "loop", "compiled")
RATE, BETA, RANK, ALPHA, LONGEST = 1e-5, 0.1, 16, 32, 512
PASS = 2            # pairs that the loop pads and computes together


# --- dpo.h ---------------------------------------------------------------------------------------

def run_dpo(work, setting, dtype, batch, updates, threads):
    """One run of ./train; what it says of itself, as measure() wants it."""
    import library
    with tempfile.TemporaryDirectory(dir=work) as out:
        cache = work / f"reference.{dtype}.bin"
        command = [library.PROJECT / "train", "dpo", "-m", work / "model.bin", "-d",
                   work / "pairs.jsonl", "-o", pathlib.Path(out) / "run",
                   "--reference-cache", cache, "--batch-size", batch,
                   "--max-steps", updates, "--beta", BETA,
                   "--learning-rate", RATE, "--lr-scheduler-type", "constant", "--warmup-ratio", 0,
                   "--max-length", LONGEST, "--max-prompt-length", LONGEST - 1,
                   "--save-minutes", 0, "--threads", threads, "--dtype", dtype]
        if setting == "lora":
            command += ["--lora", "--lora-r", RANK, "--lora-alpha", ALPHA]
        with subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True) as process:
            said = process.stdout.read()
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = status
        if status:
            sys.exit(f"./train: {said}")
        with open(pathlib.Path(out) / "run" / "log.csv", newline="", encoding="utf-8") as log:
            rows = list(csv.DictReader(log))
    seconds = [float(row["seconds"]) for row in rows]
    return {"seconds": seconds[-1] - seconds[len(rows) // 2 - 1], "bytes": usage.ru_maxrss * 1024,
            "losses": [float(row["loss"]) for row in rows]}


# --- PyTorch -------------------------------------------------------------------------------------

def load(work, setting, dtype="fp32"):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    frozen = torch.bfloat16 if (setting, dtype) == ("lora", "bf16") else torch.float32
    model = AutoModelForCausalLM.from_pretrained(work / "hf", dtype=frozen,
                                                 attn_implementation="sdpa")
    lora = LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, target_modules="all-linear")
    return model, lora, get_peft_model(model, lora) if setting == "lora" else model


def run_trl(work, setting, dtype, batch, updates):
    import datasets
    import transformers
    from trl import DPOConfig, DPOTrainer
    pairs = [json.loads(line) for line in (work / "pairs.jsonl").open(encoding="utf-8")]
    model, lora, _ = load(work, "full")
    settings = DPOConfig(
        output_dir=str(work / "trl"), beta=BETA, learning_rate=RATE, lr_scheduler_type="constant",
        warmup_steps=0, per_device_train_batch_size=batch, max_steps=updates, max_grad_norm=1.0,
        max_length=LONGEST, precompute_ref_log_probs=True, precompute_ref_batch_size=batch,
        use_cpu=True, bf16=dtype == "bf16", gradient_checkpointing=False, logging_steps=1,
        logging_first_step=True, report_to="none", save_strategy="no", disable_tqdm=True)

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, _, state, *__, **___):
            self.ended = time.perf_counter()
            if state.global_step == updates // 2:
                self.began = self.ended

    clock = Clock()
    trainer = DPOTrainer(model=model, args=settings,
                         train_dataset=datasets.Dataset.from_list(pairs),
                         processing_class=transformers.AutoTokenizer.from_pretrained(work / "hf"),
                         peft_config=lora if setting == "lora" else None, callbacks=[clock])
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    tokens = sum(2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"])
                 for row in trainer.train_dataset)
    return {"seconds": clock.ended - clock.began, "tokens": tokens,
            "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row]}


def sequence_logps(model, sequences):
    """Sum of log p of each sequence's answer; sequences are (ids, where the answer begins)."""
    import torch
    longest = max(len(ids) for ids, _ in sequences)
    ids = torch.zeros(len(sequences), longest, dtype=torch.long)
    for row, (tokens, _) in enumerate(sequences):
        ids[row, :len(tokens)] = torch.tensor(tokens)
    # Padded behind, where causal attention sees none of it: no mask, which sdpa would have to add.
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = base.base_model(input_ids=ids).last_hidden_state
    rows = [hidden[row, begin - 1:len(tokens) - 1]
            for row, (tokens, begin) in enumerate(sequences)]
    targets = torch.cat([ids[row, begin:len(tokens)]
                         for row, (tokens, begin) in enumerate(sequences)])
    logits = base.get_output_embeddings()(torch.cat(rows)).float()
    logp = -torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    return torch.stack([part.sum() for part in logp.split([len(row) for row in rows])])


def run_loop(work, setting, dtype, batch, updates, compiled):
    import torch
    from torch.nn.functional import logsigmoid
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(work / "hf")
    pairs = []
    for line in (work / "pairs.jsonl").open(encoding="utf-8"):
        record = json.loads(line)
        prompt = tokenizer(record["prompt"])["input_ids"]
        pairs.append([(prompt + tokenizer(record[part])["input_ids"] + [tokenizer.eos_token_id],
                       len(prompt)) for part in ("chosen", "rejected")])
    model = load(work, setting, dtype)[2].train()       # Pythia has no dropout
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16")
    forward = torch.compile(sequence_logps, dynamic=True) if compiled else sequence_logps
    passes, reference = [], []          # of each update: its pairs' sequences, sorted by length
    for first in range(0, len(pairs), batch):
        together = sorted(pairs[first:first + batch], key=lambda pair: max(len(s[0]) for s in pair))
        passes.append([[s for pair in together[i:i + PASS] for s in pair]
                       for i in range(0, batch, PASS)])
    with torch.no_grad(), autocast:
        for update in passes:
            reference.append([sequence_logps(model, sequences) for sequences in update])

    trained = [p for p in model.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0, fused=True)
    losses = []
    for step in range(updates):
        if step == updates // 2:
            began = time.perf_counter()
        total = 0.0
        for sequences, before in zip(passes[step % len(passes)], reference[step % len(passes)]):
            with autocast:
                logps = forward(model, sequences)
            rewards = BETA * (logps - before).view(-1, 2)
            loss = -logsigmoid(rewards[:, 0] - rewards[:, 1]).sum() / batch
            loss.backward()             # a pass at a time, so that one graph is kept
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        adam.step()
        adam.zero_grad(set_to_none=True)
        losses.append(total)
    return {"seconds": time.perf_counter() - began, "losses": losses,
            "tokens": sum(len(ids) for pair in pairs for ids, _ in pair)}


def run_peer(work, peer, setting, dtype, batch, updates, threads):
    """In this process; prints a line of JSON."""
    import torch
    torch.set_num_threads(threads)
    done = run_trl(work, setting, dtype, batch, updates) if peer == "trl" else \
        run_loop(work, setting, dtype, batch, updates, peer == "compiled")
    done["bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print("\n" + json.dumps(done))


# --- the comparison ------------------------------------------------------------------------------

def prepare(work, size, n):
    """A model of that size for both sides, and n pairs; returns their tokens."""
    import library
    import trl_live
    from neox_live import make_neox
    from transformers import AutoTokenizer
    width, layers, heads = SIZES[size]
    model = make_neox(1, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
                      intermediate_size=4 * width, max_position_embeddings=2048, vocab_size=50304)
    model.save_pretrained(work / "hf")
    if not library.NEOX_TOKENIZER.exists():
        sys.exit(f"{library.NEOX_TOKENIZER} is not there; DPO_SHARED says where to look")
    library.copy_tokenizer(library.NEOX_TOKENIZER, work / "hf")
    (work / "hf" / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": trl_live.END,
         "bos_token": trl_live.END, "pad_token": trl_live.END}), "utf-8")
    library.convert("import", work / "hf", work / "model.bin")
    tokenizer = AutoTokenizer.from_pretrained(work / "hf")
    pairs = trl_live.choose_pairs(n, tokenizer, LONGEST)
    trl_live.write_pairs(work / "pairs.jsonl", pairs)
    tokens = {part: sum(len(tokenizer(pair[part])["input_ids"]) for pair in pairs)
              for part in ("prompt", "chosen", "rejected")}
    return 2 * tokens["prompt"] + tokens["chosen"] + tokens["rejected"] + 2 * len(pairs)  # ends


def measure(work, program, setting, batch, options):
    updates = 2 * options.pairs // batch
    if program == "dpo.h":
        done = run_dpo(work, setting, options.dtype, batch, updates, options.threads)
    else:
        process = subprocess.run([sys.executable, __file__, "--worker", str(work), program, setting,
                                  options.dtype, str(batch), str(updates), str(options.threads)],
                                 capture_output=True, text=True, check=False)
        if process.returncode:
            said = process.stderr.strip().splitlines()
            return said[-1] if process.returncode > 0 and said else "died (out of memory?)"
        done = json.loads(process.stdout.strip().splitlines()[-1])
    losses = done["losses"]
    near = 1e-4 if options.dtype == "fp32" else 0.05    # TRL pads reference and policy otherwise
    if len(losses) != updates or abs(losses[0] - math.log(2)) > near or \
            updates > 1 and abs(losses[-1] - math.log(2)) < 1e-5:
        sys.exit(f"{program}, {setting}: losses {losses}: not DPO from its own reference")
    if done.setdefault("tokens", options.tokens) != options.tokens:
        sys.exit(f"{program}: {done['tokens']} tokens, and {options.tokens} in the pairs")
    return done


def spread(values, form):
    low, high = min(values), max(values)
    return " / ".join(form.format(value) for value in (low, statistics.median(values), high))


def compare(work, setting, batch, options):
    """A table's rows; every round runs every program once."""
    runs, dropped = {name: [] for name in ("dpo.h", *options.peers)}, {}
    for _ in range(options.rounds):
        for name in runs:
            if name not in dropped:
                done = measure(work, name, setting, batch, options)
                if isinstance(done, str):
                    dropped[name] = done
                else:
                    runs[name].append(done)
    for name, rows in runs.items():
        if name in dropped:
            print(f"| {setting}, batch {batch} | {name} | fails: {dropped[name]} | | | | |")
            continue
        ours = runs["dpo.h"]
        times = [row["seconds"] for row in rows]
        faster = [row["seconds"] / own["seconds"] for row, own in zip(rows, ours)]
        larger = [row["bytes"] / own["bytes"] for row, own in zip(rows, ours)]
        print(f"| {setting}, batch {batch} | {name} "
              f"| {spread([options.pairs / t for t in times], '{:.2f}')} "
              f"| {options.tokens / statistics.median(times):.0f} "
              f"| {statistics.median(row['bytes'] for row in rows) / 1e9:.2f} "
              f"| {spread(faster, '{:.2f}')} | {spread(larger, '{:.2f}')} |", flush=True)


# --- products ------------------------------------------------------------------------------------

def torch_products(shapes):
    """GFLOP/s of y = x W^T, dx = dy W, dW += dy^T x by torch: medians of nine samples of at least
    10 ms, as tests/bench.c takes them, on numbers like its own."""
    import torch
    speeds = []
    for M, N, K in shapes:
        x, W, dy = (torch.rand(shape) - 0.5 for shape in ((M, K), (N, K), (M, N)))
        y, dx, dW = torch.empty(M, N), torch.empty(M, K), torch.zeros(N, K)
        for product in (lambda: torch.mm(x, W.t(), out=y), lambda: torch.mm(dy, W, out=dx),
                        lambda: dW.addmm_(dy.t(), x)):
            samples = []
            for _ in range(10):
                start, times, seconds = time.perf_counter(), 0, 0
                while seconds < 0.01:
                    product()
                    times += 1
                    seconds = time.perf_counter() - start
                samples.append(2e-9 * M * N * K * times / seconds)
            speeds.append(statistics.median(samples[1:]))   # the first warms up
    print(json.dumps(speeds))


def compare_products(options):
    import library
    library.run("make", "-C", library.PROJECT, "build/bench")
    row = re.compile(r"(.+?) +(\d+) +(\d+) +(\d+) +(\S+ \+?= \S+ \S+)" + 3 * r" +([\d.]+)")
    ours, theirs, names = [], [], []
    for _ in range(options.rounds):
        text = subprocess.run([library.PROJECT / "build" / "bench", "products", "quick"], text=True,
                              stdout=subprocess.PIPE, check=False).stdout  # it fails if one is WRONG
        text = text[text.rindex("% of peak: median, best (fp32)"):]    # with all threads
        rows = [m for m in map(row.match, text[:text.rindex("layer ")].splitlines()) if m]
        names = [f"{m[1]} | {m[2]} | {m[3]} | {m[4]} | {m[5]}" for m in rows]
        ours.append([float(m[7]) for m in rows])
        shapes = [[int(m[i]) for i in (2, 3, 4)] for m in rows[::3]]
        done = library.run(sys.executable, __file__, "--worker-products", json.dumps(shapes))
        theirs.append(json.loads(done.strip().splitlines()[-1]))
    print("| layer | M | N | K | product | dpo.h, GFLOP/s | PyTorch | dpo.h is faster by |\n"
          "|---|---|---|---|---|---|---|---|")
    for name, own, other in zip(names, zip(*ours), zip(*theirs)):
        print(f"| {name} | {spread(own, '{:.0f}')} | {spread(other, '{:.0f}')} | "
              f"{spread([a / b for a, b in zip(own, other)], '{:.2f}')} |")


def environment(options):
    import peft
    import torch
    import transformers
    import trl
    cpu = platform.processor() or platform.machine()
    if pathlib.Path("/proc/cpuinfo").exists():
        lines = pathlib.Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        cpu = next((line.split(": ")[1] for line in lines if line.startswith("model name")), cpu)
    print(f"{cpu}, {options.threads} threads on each side; torch {torch.__version__}, transformers "
          f"{transformers.__version__}, trl {trl.__version__}, peft {peft.__version__}")
    print(f"Pythia-{options.size}'s shape, {options.dtype}, {options.pairs} pairs of "
          f"{options.tokens} tokens timed in a run, {options.rounds} rounds; min / median / max")
    print("\n| setting | program | pairs/s | tokens/s | peak GB | dpo.h is faster by "
          "| takes less memory by |\n|---|---|---|---|---|---|---|", flush=True)


def main():
    if sys.argv[1:2] == ["--worker"]:
        work, peer, setting, dtype, *numbers = sys.argv[2:]
        return run_peer(pathlib.Path(work), peer, setting, dtype, *map(int, numbers))
    if sys.argv[1:2] == ["--worker-products"]:
        return torch_products(json.loads(sys.argv[2]))
    parser = argparse.ArgumentParser(description="dpo.h's DPO beside TRL's and PyTorch's.")
    parser.add_argument("--size", choices=SIZES, default="160m", help="of which Pythia [160m]")
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 2],
                        help="pairs an update [8 2]")
    parser.add_argument("--settings", choices=SETTINGS, nargs="+", default=SETTINGS)
    parser.add_argument("--peers", choices=PEERS, nargs="+", default=PEERS)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="[fp32]")
    parser.add_argument("--pairs", type=int, default=16, help="of a run, twice each [16]")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each program [3]")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each [all]")
    parser.add_argument("--products", action="store_true", help="a layer's products instead")
    options = parser.parse_args()
    if any(batch < 1 or options.pairs % batch for batch in options.batch):
        parser.error("--pairs must be a multiple of every --batch")
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    try:
        import trl  # noqa: F401
    except ImportError:
        done = subprocess.run(["sh", HERE / "setup_venv.sh"], stdout=subprocess.PIPE, text=True,
                              check=False)
        if done.returncode:
            sys.exit("tests/setup_venv.sh could not make PyTorch's environment")
        python = done.stdout.strip().splitlines()[-1]
        os.execv(python, [python, __file__, *sys.argv[1:]])
    if options.products:
        return compare_products(options)
    import library
    library.run("make", "-C", library.PROJECT, "train")
    with tempfile.TemporaryDirectory() as directory:
        work = pathlib.Path(directory)
        options.tokens = prepare(work, options.size, options.pairs)
        environment(options)
        for batch in options.batch:
            for setting in options.settings:
                compare(work, setting, batch, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
