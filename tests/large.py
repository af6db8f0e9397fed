"""Models of the true sizes with random weights: the memory that DPO takes beside its plan, and how
soon a run begins. Not a part of `make test`: wants 20 GB of memory, 15 GB of disk and half an hour.

    python3 tests/large.py PAIRS.jsonl [DIRECTORY]      make large PAIRS=hh/train.jsonl

PAIRS are HH's; tokens are bytes here, so pairs fill all 512 of a run's --max-length.
Prints a table and "N passed, N failed".
"""
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# size, what init makes of it, how it is trained, what it may take (GB)
RUNS = [
    ("pythia-410m", [], [], 9),
    ("pythia-1.4b", ["--dtype", "bf16"],
     ["--dtype", "bf16", "--stochastic-rounding", "--micro-tokens", "1024"], 20),
    ("pythia-2.8b", ["--dtype", "bf16"],
     ["--dtype", "bf16", "--lora", "--micro-tokens", "1024"], 9),
    ("pythia-2.8b", ["--dtype", "bf16"],
     ["--dtype", "bf16", "--lora", "--gradient-checkpointing"], 9),
    ("btlm-3b", ["--dtype", "bf16"], ["--dtype", "bf16", "--lora", "--micro-tokens", "1024"], 9),
]


def train(*words):
    done = subprocess.run(["./train", *map(str, words)], cwd=ROOT, capture_output=True, text=True,
                          check=False)
    if done.returncode:
        sys.exit(f"./train {' '.join(map(str, words))}: {done.stderr}")
    return done.stderr


def seconds_to_first_update(command, out):
    """log.csv is made when everything is ready."""
    started = time.monotonic()
    with subprocess.Popen(["./train", *map(str, command)], cwd=ROOT, stderr=subprocess.DEVNULL,
                          stdout=subprocess.DEVNULL) as process:
        while not (out / "log.csv").exists() and process.poll() is None:
            time.sleep(0.01)
        seconds = time.monotonic() - started
        process.kill()
    return seconds


def main():
    if len(sys.argv) < 2 or not pathlib.Path(sys.argv[1]).exists():
        sys.exit("tests/large.py: give a file of HH pairs")
    pairs = pathlib.Path(sys.argv[1]).resolve()
    passed = failed = 0
    with tempfile.TemporaryDirectory(dir=sys.argv[2] if len(sys.argv) > 2 else None) as directory:
        work, made = pathlib.Path(directory), None
        model, out, cache = work / "model.bin", work / "run", work / "reference.bin"
        print(f"{'':58} {'planned':>9} {'mapped':>9} {'resident':>9} {'allowed':>9}  MB")
        for size, init, options, allowed in RUNS:
            if made != size:
                model.unlink(missing_ok=True)
                train("init", "--preset", size, "--vocab-size", 50304, "-o", model, *init)
                made = size
            cache.unlink(missing_ok=True)
            command = ["dpo", "-m", model, "-d", pairs, "-o", out, "--limit", 16, "--batch-size", 8,
                       "--max-steps", 2, "--save-minutes", 0, "--reference-cache", cache, *options]
            text = train(*command)
            found = re.search(r"planned ([\d.]+) MB \(([\d.]+) MB of it mapped\), at most ([\d.]+)",
                              text)
            planned, mapped, resident = map(float, found.groups())
            ok = resident < 1000 * allowed and resident < planned * 1.02
            print(f"{size + ' ' + ' '.join(options):58} {planned:9.1f} {mapped:9.1f} "
                  f"{resident:9.1f} {1000 * allowed:9.1f}  {'ok' if ok else 'TOO MUCH'}",
                  flush=True)
            passed, failed = passed + ok, failed + (not ok)
            shutil.rmtree(out)
            if size == "pythia-2.8b" and "--micro-tokens" in options:
                subprocess.run(["cat", model], stdout=subprocess.DEVNULL, check=True)   # cached
                seconds = seconds_to_first_update(command, out)
                shutil.rmtree(out)
                ok = seconds < 10
                print(f"{'  with its reference cached, begins its first update after':58} "
                      f"{seconds:.1f} s of 10 allowed", flush=True)
                passed, failed = passed + ok, failed + (not ok)
    print(f"{passed} passed, {failed} failed")
    sys.exit(failed > 0)


main()
