"""Training runs through the programs: resuming bit for bit, killed runs, the best checkpoint and
patience, adapters and merging, memory against its plan, and what bad input gets.

Needs train and eval (make), and nothing else. Prints "N passed, N failed".
"""
import csv
import json
import os
import pathlib
import pty
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import convert

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
passed = failed = 0
KIND = ["Gladly! ", "Good question. ", "Happy to help. "]
RUDE = ["Go away. ", "Who cares? ", "Not you again. "]
THINGS = ["bake bread", "plant a tree", "make tea", "save money", "learn chess", "grow basil"]
MODES = {
    "fp32": [],
    "bf16": ["--dtype", "bf16"],
    "bf16, stochastic rounding": ["--dtype", "bf16", "--stochastic-rounding"],
    "LoRA": ["--lora"],
    "LoRA over bf16, recomputed": ["--lora", "--dtype", "bf16", "--gradient-checkpointing"],
}


def check(ok, message):
    global passed, failed
    passed += bool(ok)
    failed += not ok
    if not ok:
        print("FAILED:", message)
    return ok


def check_peak(text, mapped, what):
    """The programs and their libraries take some 5 MB that no plan knows of."""
    line = [line for line in text.splitlines() if line.startswith("memory  planned")][0]
    words = line.split()
    plan, planned_map, peak = float(words[2]), float(words[4].lstrip("(")), float(words[-4])
    heap = plan - planned_map
    low = heap * 0.98 + (planned_map * 0.9 if mapped else 0)
    check(low < peak < plan + 6, f"{what}: {line}")
    data = [line.split()[1] for line in text.splitlines() if line.startswith("  data ")]
    check(data and float(data[0]) < 0.3, f"{what}: 40 pairs and a byte tokenizer take {data} MB")


def start(*words, **options):
    return subprocess.Popen([str(word) for word in words], cwd=ROOT, text=True, errors="replace",
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def run(*words, status=0, **options):
    """Runs a program; returns stdout + stderr. An unexpected exit status counts as a failure."""
    process = start(*words, **options)
    out, err = process.communicate(timeout=120)
    if process.returncode != status:
        check(False, f"{' '.join(map(str, words))}: exit status {process.returncode}, "
                     f"not {status}:\n{out}{err}")
    return out + err


def refused(words, *say, status=1):
    """The program must stop with that status and one line that says all of that."""
    text = run(*words, status=status)
    last = text.strip().splitlines()[-1] if text.strip() else ""
    for part in say:
        check(part in last, f"{' '.join(map(str, words[:3]))}: the message does not say {part!r}: "
                            f"{last}")
    return text


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def same_files(a, b, names, what):
    for name in names:
        if (a / name).exists() or (b / name).exists():
            check((a / name).read_bytes() == (b / name).read_bytes(), f"{what}: another {name}")


# Comes before a program's own functions: the N-th rename to a name kills it at that instant, a disk
# has as little room, and a machine as much to do, as a test wants.
SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/statvfs.h>
int rename(const char *from, const char *to)
{
    static int n;
    int (*real)(const char *, const char *) = dlsym(RTLD_NEXT, "rename");
    const char *name = getenv("KILL_BEFORE"), *slash = strrchr(to, '/');
    if (name && !strcmp(slash ? slash + 1 : to, name) && ++n == atoi(getenv("KILL_AT")))
        raise(SIGKILL);
    return real(from, to);
}
int statvfs(const char *path, struct statvfs *disk)
{
    int (*real)(const char *, struct statvfs *) = dlsym(RTLD_NEXT, "statvfs");
    int failed = real(path, disk);
    if (getenv("FREE_BYTES")) disk->f_bavail = atoll(getenv("FREE_BYTES")) / disk->f_frsize;
    return failed;
}
int getloadavg(double *load, int n)
{
    *load = atof(getenv("LOAD") ? getenv("LOAD") : "0");
    return n < 1 ? n : 1;
}
"""


def shim(data):
    """The environment that puts SHIM before a program; None where there is no such thing."""
    source, library = data / "shim.c", data / "shim.so"
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not sys.platform.startswith("linux") or not compiler:
        return None
    if not library.exists():
        source.write_text(SHIM)
        run(compiler, "-shared", "-fPIC", source, "-o", library, "-ldl")
    return {**os.environ, "LD_PRELOAD": str(library)}


def forget_killed():
    """LLVM's OpenMP registers each process in memory, in a file of its number. A process that is
    killed leaves that behind, empty if it had just begun, and then the next process that happens to
    get its number dies of SIGBUS."""
    for path in pathlib.Path("/dev/shm").glob(f"__KMP_REGISTERED_LIB_*_{os.getuid()}"):
        if not pathlib.Path("/proc", path.name.split("_")[-2]).exists():
            path.unlink(missing_ok=True)


def kill(process):
    """Returns what it said on stderr."""
    process.kill()
    _, err = process.communicate()
    forget_killed()
    return err


def killed(words, environment, name, n):
    """Runs a program that is killed when it is about to give a file its name for the n-th time."""
    process = start(*words, env={**environment, "KILL_BEFORE": name, "KILL_AT": str(n)})
    _, err = process.communicate(timeout=120)
    forget_killed()
    return check(process.returncode == -signal.SIGKILL, f"not killed at {name} {n}: {err}")


def write_pairs(path, seed, n):
    random.seed(seed)
    with open(path, "w") as file:
        for _ in range(n):
            thing = random.choice(THINGS)
            file.write(json.dumps({"prompt": f"\n\nHuman: How do I {thing}?\n\nAssistant:",
                                   "chosen": " " + random.choice(KIND) + thing,
                                   "rejected": " " + random.choice(RUDE) * random.randint(1, 3)}))
            file.write("\n")


def write_hard_pairs(data):
    """Pairs of which no one can be told from another, some of them trained on and some not: their
    accuracies go up and down."""
    random.seed(3)
    word = lambda n: "".join(random.choice("abcdefghijklmnop") for _ in range(n))
    lines = [json.dumps({"prompt": f"\n\nHuman: {word(6)}\n\nAssistant:", "chosen": " " + word(10),
                         "rejected": " " + word(10)}) + "\n" for _ in range(50)]
    (data / "hard.jsonl").write_text("".join(lines[:40]))
    tie = {"prompt": "\n\nHuman: a tie?\n\nAssistant:", "chosen": " yes", "rejected": " yes"}
    (data / "hard_held.jsonl").write_text("".join(lines[30:49]) + json.dumps(tie) + "\n")


def hard(data):
    return ["-d", data / "hard.jsonl", "--eval-data", data / "hard_held.jsonl"]


def begin(base, data, out, *more):
    """Of numbers the last one counts; files are those of `more`, if it names any."""
    files = [word for option, name in (("-d", "pairs.jsonl"), ("--eval-data", "held.jsonl"))
             if option not in more for word in (option, data / name)]
    return ["./train", "dpo", "-m", base, *files, "-o", out, "--batch-size", "8", "--max-length",
            "96", "--max-prompt-length", "48", "--learning-rate", "1e-3", "--eval-steps", "2",
            *more]


def test_resume(data, base):
    """10 updates equal 5, killed, and 5 more, whatever the mode and the threads."""
    adapter = data / "adapter"
    run(*begin(base, data, adapter, "--max-steps", "2", "--lora"))
    others = {"SFT": [], "SFT of an adapter": ["--lora", "--lora-dropout", "0.1"],
              "an adapter trained further": []}
    for name, options in {**MODES, **others}.items():
        whole, cut = data / "whole", data / "cut"
        model = adapter if "further" in name else base
        command = "sft" if "SFT" in name else "dpo"
        more = ["--max-steps", "10", "--sample", "1", *options]
        run("./train", command, *begin(model, data, whole, *more)[2:])
        process = start("./train", command, *begin(model, data, cut, *more)[2:], "--save-steps",
                        "5", "--threads", "1")
        while not (cut / "state.bin").exists() and process.poll() is None:
            time.sleep(0.002)
        kill(process)
        with (cut / "log.csv").open("a") as file:   # what a crash may leave
            file.write("11,1,1,half a row")
        (cut / "state.bin.tmp-123").write_text("half a file")
        (cut / "notes.tmp-123").write_text("somebody else's")
        moved = data / "moved"      # a run is known by what it holds, not by where it lies
        cut.rename(moved)
        cut = moved
        shutil.copy(base, data / "copy.bin")
        copy = [] if "--lora" in options or model != base else ["-m", data / "copy.bin"]
        # (adapters say where their base is, and would be other files)
        text = run("./train", command, "--resume", "-o", cut, "--threads", "3", *copy)
        check("resumed after update" in text, f"{name}: {text}")
        same_files(whole, cut, ["model.bin", "adapter.bin", "best.bin", "eval.csv",
                                "samples.jsonl", "reference.bin"], f"{name}, resumed")
        changing = ("tokens_per_second", "seconds")
        logs = [[{k: v for k, v in row.items() if k not in changing} for row in rows(d / "log.csv")]
                for d in (whole, cut)]
        check(len(logs[0]) == 10 and logs[0] == logs[1], f"{name}: another log.csv after resuming")
        left = sorted(path.name for path in cut.iterdir() if "tmp" in path.name or
                      path.name == "state.bin")
        check(left == ["notes.tmp-123"], f"{name}: a finished run keeps {left}")
        shutil.rmtree(whole)
        shutil.rmtree(cut)
    shutil.rmtree(adapter)


def test_killed(data, base, *options):
    """Killed at any instant, again and again, a run still comes to the same end."""
    whole, cut = data / "whole", data / "cut"
    more = ["--max-steps", "30", "--save-steps", "1", *hard(data), *options]
    run(*begin(base, data, whole, *more))
    random.seed(1)
    kills, finished = 0, False
    for attempt in range(200):
        # A run that was killed before its first state has nothing to go on from, and begins anew.
        resumes = (cut / "state.bin").exists()
        if cut.exists() and not resumes:
            shutil.rmtree(cut)
        process = start(*(["./train", "dpo", "--resume", "-o", cut] if resumes
                          else begin(base, data, cut, *more)))
        try:
            _, err = process.communicate(timeout=(0.03 + 0.06 * random.random()) *
                                         (1 + attempt / 10))     # in the end long enough
            finished = check(process.returncode == 0, f"after {kills} kills: {err}")
            break
        except subprocess.TimeoutExpired:
            kill(process)
            kills += 1
    check(finished and kills > 1, f"{kills} kills, finished: {finished}")
    files = ["model.bin", "adapter.bin", "best.bin", "eval.csv"]
    same_files(whole, cut, files, f"{options}, after {kills} kills")
    for number in (signal.SIGINT, signal.SIGTERM):
        shutil.rmtree(cut)
        process = start(*begin(base, data, cut, "--max-steps", "30", *hard(data), *options))
        while not (cut / "log.csv").exists() or len((cut / "log.csv").read_text().split()) < 4:
            time.sleep(0.002)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
        check(process.returncode == 128 + number and "--resume" in err, f"signal {number}: {err}")
        check((cut / "state.bin").exists() and any((cut / name).exists() for name in files[:2]),
              "no state was left")
        run("./train", "dpo", "--resume", "-o", cut)
        same_files(whole, cut, files, f"{options}, after signal {number}")
    shutil.rmtree(whole)
    shutil.rmtree(cut)


def leave(words, out):
    """Starts a run and kills it when it has a state."""
    process = start(*words, "--save-steps", "1")
    while not (out / "state.bin").exists() and process.poll() is None:
        time.sleep(0.002)
    err = kill(process)
    check((out / "state.bin").exists(), f"no state was left: {err}")


def interrupt_resumed(*words):
    """Goes on with a run and interrupts it as soon as it says so; what it said."""
    process = start(*words)
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("resumed"):
            process.send_signal(signal.SIGINT)
    process.communicate()
    text = "".join(lines)
    check(process.returncode == 128 + signal.SIGINT, text)
    return text


def replaced(path, content, words, *say):
    """What is refused while a file has another content."""
    before = path.read_bytes()
    path.write_bytes(content)
    text = refused(words, *say)
    path.write_bytes(before)
    return text


def test_resume_refusals(data, base):
    cut, other = data / "cut", data / "other"
    resume = ["./train", "dpo", "--resume", "-o", cut]
    refused(resume, "it does not exist; check -o")
    cut.write_text("a file")
    refused(resume, "cut is a file; -o names a directory")
    text = refused(begin(base, data, cut), "cut is a file; -o names a directory")
    check("data    " not in text, f"-o is looked at after the data: {text}")
    cut.unlink()
    cut.mkdir()
    refused(resume, "cannot be resumed", "no config.json", "without --resume", "same -o")
    (cut / "reference.bin").write_text("")
    refused(resume, "no config.json; begin anew with another -o", "--reference-cache")
    refused(["./train", "sft", *resume[2:]], "no config.json; begin anew with another -o")
    (cut / "reference.bin").rename(cut / "log.csv")
    text = refused(resume, "no config.json", "put it back", "another -o")
    check("--reference-cache" not in text and "same -o" not in text, text)
    shutil.rmtree(cut)
    begun = ["--max-steps", "500", "--adapter", data / "adapter", "--reference", data / "ref.bin"]
    run(*begin(base, data, data / "adapter", "--max-steps", "1", "--lora"))
    run("./train", "init", "-o", data / "ref.bin", "--seed", "8", "--d-model", "32")
    run(*begin(base, data, other, "--max-steps", "1", "--lora", "--seed", "2"))
    leave(begin(os.path.relpath(base, ROOT), data, cut, *begun), cut)
    config, state = json.loads((cut / "config.json").read_text()), (cut / "state.bin").read_bytes()
    check(all(config["options"][name].startswith(str(data.resolve())) for name in
              ("model", "adapter", "reference", "data", "eval-data", "output")),
          f"paths are not absolute: {config['options']}")
    for option, value, now in (("beta", "0.2", "0.1"), ("learning-rate", "0.0001", "0.001"),
                               ("optim", "rmsprop", "adamw"), ("seed", "9", "0"),
                               ("dtype", "bf16", "fp32"), ("micro-tokens", "900", "2048"),
                               ("lr-scheduler-type", "cosine", "constant"), ("limit", "9", "0")):
        refused(resume + ["--" + option, value], f"--{option} was ", now, value, "--max-memory")
    for option, value in (("batch-size", 0), ("batch-size", 1.5), ("batch-size", "8"),
                          ("seed", 1e300), ("beta", -1), ("beta", 1e7), ("loss-type", "other"),
                          ("data", 5), ("lora", 1)):
        edited = {**config, "options": {**config["options"], option: value}}
        replaced(cut / "config.json", json.dumps(edited).encode(), resume, f"--{option} ",
                 str(cut / "config.json"), "as the run wrote it")
    for text in (b'{"command": "dpo"', b'{"command": "dpo"}', b"[1]"):
        replaced(cut / "config.json", text, resume, "config.json", "as the run wrote it")
    refused(["./train", "sft", "--resume", "-o", cut], "no run of ./train sft")
    for path, option in ((data / "held.jsonl", "--eval-data"), (data / "pairs.jsonl", "--data"),
                         (pathlib.Path(base), "--model"), (data / "adapter", "--adapter")):
        moved = path.rename(data / "moved")
        refused(resume, f"{path.name} ({option}): No such file", f"by {option}")
        run(*resume, option, moved, "--dry-run")
        moved.rename(path)
    log = (cut / "log.csv").read_bytes()
    text = replaced(cut / "log.csv", log[:-1], resume, "log.csv", "shorter than", "put it back")
    check("resumed" not in text, f"before it is certain: {text}")
    cached = (cut / "reference.bin").read_bytes()
    for content, say in ((cached[:-1], "whole copy"), (b"", "is empty"),
                         ((other / "reference.bin").read_bytes(),
                          "was made for another reference model")):
        replaced(cut / "reference.bin", content, resume, "reference.bin", say,
                 "put back the run's own", "begin another run")
    for words in ([], ["-o"], ["-o", ""], ["--output="]):
        refused(["./train", "dpo", "--resume", *words], "--resume needs -o DIR", status=2)
    text = run(*resume, "--max-memory", "5M", status=1)     # what could not change is no advice
    check("5.0 MB are allowed" in text and "larger machine" in text and "--lora," not in text, text)
    refused(["./eval", "generate", "-m", cut, "--prompt", "x"], "unfinished run", "go on with it (--resume)")
    refused(begin(base, data, cut), "holds another run", "--resume")
    run("./train", "init", "-o", data / "other.bin", "--seed", "7", "--d-model", "32")
    for name, option in (("pairs.jsonl", "--data"), ("held.jsonl", "--eval-data")):
        path = data / name
        replaced(path, path.read_bytes().replace(b"Gladly", b"Kindly"), resume, name, option,
                 "has not the content")
    replaced(data / "adapter" / "adapter.bin", (other / "adapter.bin").read_bytes(), resume,
             "adapter.bin (--adapter)", "has not the content")
    run(*begin(base, data, data / "rank", "--max-steps", "1", "--lora", "--lora-r", "4"))
    refused(resume + ["--adapter", data / "rank"], "rank/adapter.bin (--adapter)",
            "has not the content")
    shutil.rmtree(data / "rank")
    refused(resume + ["--reference", data / "other.bin"], "other.bin (--reference)",
            "has not the content")
    shutil.rmtree(other)
    model = pathlib.Path(base).read_bytes()
    for n in (len(state) - 10, 80):
        replaced(cut / "state.bin", state[:n], resume, "state.bin", "cut short or added to; put a "
                 "whole copy in its place; without a whole state.bin, begin anew with another -o",
                 "--reference-cache")
    replaced(cut / "state.bin", model, resume, 'the kind "model"; "training state" is expected')
    leave(begin(base, data, other, *begun, "--seed", "4"), other)
    replaced(cut / "state.bin", (other / "state.bin").read_bytes(), resume, "state.bin",
             "another run", "--seed was 4 there, and is 0 here")
    damaged = bytearray(state)
    damaged[-100] ^= 1
    for words in (resume, resume + ["--dry-run"]):
        replaced(cut / "state.bin", bytes(damaged), words, "state.bin", "checksum",
                 "cut short; put a whole copy", "begin anew")
    hidden = (cut / "reference.bin").rename(cut / "hidden")
    refused(resume, "reference.bin is missing; put back the run's own", "begin another run")
    (cut / "state.bin").unlink()
    text = run(*resume, status=1)
    step = int(rows(cut / "log.csv")[-1]["step"])
    said = f"no state.bin, and its log ends at update {step} of 500; begin anew with another -o"
    check(said in text and "reference.bin" not in text, text)
    hidden.rename(cut / "reference.bin")
    refused(resume, said, "reference.bin serves as --reference-cache")
    (cut / "adapter.bin").write_text("that of an interrupt")
    text = refused(resume, said)
    check("patience" not in text, text)
    for path in (cut, other, data / "adapter"):
        shutil.rmtree(path)
    leave(begin(base, data, cut, "--max-steps", "500"), cut)
    refused(resume + ["--lora"], "--lora was false there, and is true now")
    replaced(pathlib.Path(base), (data / "other.bin").read_bytes(), resume, "base.bin (--model)",
             "has not the content")
    shutil.rmtree(cut)
    leave(begin(base, data, cut, "--max-steps", "500", "--lora"), cut)
    refused(resume + ["--lora-r", "8"], "--lora-r was 16 there, and is 8 now")
    config = (cut / "config.json").read_bytes()
    replaced(cut / "config.json", config.replace(b'"lora-r"', b'"lora-dropout": 0,\n    "lora-r"'),
             resume, "was begun by another version of this program", "serves as --reference-cache")
    shutil.rmtree(cut)
    run(*begin(base, data, cut, "--max-steps", "5", "--patience", "1", "--learning-rate", "0",
               "--eval-steps", "1"))
    refused(resume, "its log ends at update 2 of 5 (if --patience ended it there, it is complete)")
    shutil.rmtree(cut)
    run(*begin(base, data, cut, "--max-steps", "2"))
    refused(resume, "the run is complete, with 2 updates; for more of them begin another run")
    run("./train", "init", "-o", data / "new.bin", "--tokenizer", cut)
    (data / "new.bin").unlink()
    (cut / "model.bin").unlink()    # as if it had been killed before the end
    refused(resume, "its log ends at update 2 of 2; begin anew")
    refused(["./eval", "chat", "-m", cut], "whose last model is not there", f"{cut / 'best.bin'}")
    (cut / "best.bin").unlink()
    refused(["./eval", "chat", "-m", cut], "holds a run that has saved no model", "begin it anew")
    (cut / "log.csv").unlink()
    refused(["./eval", "chat", "-m", cut], "holds a run that has saved no model")
    (cut / "config.json").write_text('{"architectures": ["GPTNeoXForCausalLM"]}')
    refused(["./eval", "chat", "-m", cut], "a Hugging Face checkpoint", "convert.py import")
    shutil.rmtree(cut)
    environment = shim(data)
    if environment:     # a run that has no whole config.json was never there
        sft = ["./train", "sft", "-m", base, "-d", data / "pairs.jsonl", "-o", cut, "--max-length",
               "96", "--max-prompt-length", "48"]
        killed(sft, environment, "config.json", 1)
        check(not (cut / "config.json").exists(), "half a config.json")
        run(*sft)
        check(not list(cut.glob("*.tmp-*")), "a temporary file is left")
        shutil.rmtree(cut)


def test_odd_paths(data, base):
    """A path that is not UTF-8 cannot be in config.json; a run that has one goes on if it is named
    again."""
    odd, out = data / "odd\udcff", data / "run"
    try:
        odd.mkdir()
    except OSError:     # of a file system that has UTF-8 only
        return
    model, adapter, pairs = odd / "base.bin", odd / "adapter", odd / "pairs.jsonl"
    run(*begin(base, data, adapter, "--max-steps", "1", "--lora"))
    shutil.copy(base, model)
    shutil.copy(data / "pairs.jsonl", pairs)
    leave(begin(model, data, out, "-d", pairs, "--adapter", adapter, "--reference", model,
                "--max-steps", "500"), out)
    options = json.loads((out / "config.json").read_text())["options"]
    check([options[name] for name in ("model", "data", "adapter", "reference")] == 4 * [None] and
          options["eval-data"] == str((data / "held.jsonl").resolve()), f"paths: {options}")
    resume = ["./train", "dpo", "--resume", "-o", out]
    refused(resume, "--model is missing", status=2)
    resume += ["-m", model, "-d", pairs]
    refused(resume, "another --adapter; give that again")
    resume += ["--adapter", adapter]
    refused(resume, "another --reference; give that again")
    text = interrupt_resumed(*resume, "--reference", model)
    check("path of --data is not UTF-8" in text, text)
    shutil.rmtree(out)
    shutil.rmtree(odd)


def test_pasted(data, base):
    """Commands that are printed can be pasted, whatever the path."""
    out = data / "it's a run"
    process = start(*begin(base, data, out, "--max-steps", "5000"))
    while not (out / "log.csv").exists() and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    command = err.strip().splitlines()[-1].partition("go on by ")[2]
    check(shlex.split(command) == ["./train", "dpo", "--resume", "-o", str(out)], err)
    shutil.rmtree(out)
    out.mkdir()
    text = refused(["./eval", "chat", "-m", out], "convert.py")
    check(shlex.split(text.split("`")[1])[2:] == ["import", str(out), "model.bin"], text)
    out.rmdir()


def test_save_minutes(data, base):
    """--save-minutes alone saves the state, and 0 does not."""
    out = data / "run"
    words = ["./train", "sft", "-m", base, "-d", data / "pairs.jsonl", "-o", out, "--max-length",
             "96", "--max-prompt-length", "48", "--epochs", "30"]
    process = start(*words, "--save-minutes", "1e-4", "--epochs", "10000")
    while not (out / "state.bin").exists() and process.poll() is None:
        time.sleep(0.002)
    kill(process)
    check((out / "state.bin").exists(), "no state after 6 milliseconds")
    shutil.rmtree(out)
    environment = shim(data)
    if environment:
        text = run(*words, "--save-minutes", "0",
                   env={**environment, "KILL_BEFORE": "state.bin", "KILL_AT": "1"})
        check("30 of 30 updates" in text, text)
        shutil.rmtree(out)


def test_one_process(data, base):
    """Two processes never train in one directory, and a start that fails leaves none behind."""
    out = data / "deep" / "run"
    process = start(*begin(base, data, out, "--max-steps", "5000", "--save-steps", "1"))
    while not (out / "state.bin").exists() and process.poll() is None:
        time.sleep(0.002)
    temporary = out / "best.bin.tmp-1"
    temporary.write_text("the other process is writing this")
    text = refused(["./train", "dpo", "--resume", "-o", out], "another process is training in",
                   "deep/run; wait until it ends, or stop it by Ctrl-C")
    check("data    " not in text, f"the lock is tried after the data: {text}")
    refused(begin(base, data, out), "another process is training in", "or choose another -o")
    check(temporary.exists(), "a process that has no business there cleans up")
    kill(process)
    shutil.rmtree(data / "deep")
    (data / "used").mkdir()
    for path in (data / "used", data / "deep" / "run"):
        refused(begin(base, data, path, "--reference-cache", data / "none" / "cache.bin"),
                "cannot create")
    check((data / "used").exists() and not (data / "deep").exists(), "directories after a failure")
    (data / "used").rmdir()


def test_disk(data, base):
    """Too little disk is refused before training, also of a run that goes on, whose own files count
    as room."""
    environment, out = shim(data), data / "run"
    if not environment:
        return
    few = {**environment, "FREE_BYTES": "300000"}
    words = ["--max-steps", "4", "--eval-steps", "2"]
    text = run(*begin(base, data, out, *words), status=1, env=few)
    check("the run needs 1.5 MB of disk" in text and "0.3 MB are free" in text and
          "choose an -o on another disk" in text and not out.exists(), text)
    killed(begin(base, data, out, *words), environment, "model.bin", 1)
    resume = ["./train", "dpo", "--resume", "-o", out]
    own = sum((out / name).stat().st_size for name in ("best.bin", "state.bin", "reference.bin"))
    text = run(*resume, status=1, env={**few, "FREE_BYTES": "100000"})
    needs = float(text.split("the run needs ")[1].split()[0])
    check(abs(needs - 1.5 + own / 1e6) < 0.06 and "besides what it has" in text and
          "larger disk" in text, f"{own} bytes are there: {text}")
    run(*resume, env={**few, "FREE_BYTES": "1000000"})
    shutil.rmtree(out)
    # Without held-out pairs, an interrupt leaves a result that its successor is written beside.
    alone = ["./train", "sft", "-m", base, "-d", data / "pairs.jsonl", "-o", out, "--max-length",
             "96", "--max-prompt-length", "48", "--save-minutes", "0", "--epochs", "1000"]
    process = start(*alone)
    while not (out / "log.csv").exists() or len((out / "log.csv").read_text().split()) < 4:
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    disk = [float(line.split()[1]) for line in err.splitlines() if line.startswith("disk")][0]
    size = (out / "model.bin").stat().st_size / 1e6
    state = (out / "state.bin").stat().st_size / 1e6
    text = run("./train", "sft", "--resume", "-o", out, status=1, env={**few, "FREE_BYTES": "1000"})
    again = [float(line.split()[1]) for line in text.splitlines() if line.startswith("disk")][0]
    check(abs(disk - size - state) < 0.1 and abs(again - disk - size - state) < 0.1,
          f"{disk} MB, and {again} after an interrupt, with {size} MB of result")
    shutil.rmtree(out)


def test_help():
    """Help says of each command what is true of it."""
    texts = {name: run("./train", name, "--help")
             for name in ("init", "sft", "dpo", "merge", "plan")}
    for name, option, said in (
            ("dpo", "-d, --data", "pairs, JSON lines (required, except with --resume)"),
            ("sft", "-d, --data", "JSON lines or plain text (required, except with --resume)"),
            ("sft", "-m, --model", "directory (required, except with --resume)"),
            ("merge", "-m, --model", "directory (required)"), ("sft", "-o, --output", "(required)"),
            ("dpo", "--lora-r", "with --lora: "), ("plan", "--lora-r", "rank of the adapter [16]"),
            ("init", "--seed", "of the random weights [0]"), ("dpo", "--seed", "order of the data"),
            ("init", "--arch", "instead of the preset's")):
        line = texts[name].partition(f" {option} ")[2].partition("\n  ")[0]
        check(said in line, f"{name} --help, {option}: {line}")


def test_unknown_options():
    """An unknown option is explained by what it is elsewhere, before what is spelled like it."""
    for command, option, said in (
            ("train sft", "--beta", "one of train dpo"), ("train dpo", "--sft-loss=sum", "train sft"),
            ("train merge", "--limit", "no option --limit; it is one of train sft, train dpo"),
            ("train dpo", "--preset", "it is one of train init"),
            ("eval loss", "--top-k", "it is one of eval generate, eval chat"),
            ("train dpo", "--lr", "no option --lr; here it is --learning-rate"),
            ("train sft", "--bf16", "here it is --dtype bf16"),
            ("train sft", "--num_train_epochs=2", "no option --num_train_epochs; here it is --epochs"),
            ("train sft", "--per-device-train-batch-size", "here it is --batch-size"),
            ("train dpo", "--lora-dropout=0.1", "(dpo trains without: leave it out)"),
            ("train dpo", "--ref_model", "no option --ref_model; here it is --reference"),
            ("eval prefs", "--ref-model=x", "no option --ref-model; here it is --reference"),
            ("train sft", "--ref-model", "no option --ref-model; in train dpo it is --reference"),
            ("train dpo", "--resume-from-checkpoint", "here it is --resume -o DIR"),
            ("train sft", "--gradient_accumulation_steps=4", "here it is --batch-size, the whole "
             "update; --micro-tokens cuts it into passes"),
            ("eval loss", "--precision", "no option --precision; here it is --dtype"),
            ("train plan", "--precision", "in train init, train sft, train dpo, train merge it is "
             "--dtype"),
            ("train dpo", "--batch", "no option --batch; did you mean --batch-size?"),
            ("train dpo", "--reference-c=x", "did you mean --reference-cache?"),
            ("train dpo", "--gradient", "did you mean --gradient-checkpointing?"),
            ("train dpo", "--warmup", "no option --warmup; try ./train dpo --help"),
            ("train sft", "--max_length_", "did you mean --max-length?"),
            ("train sft", "--learning_rate", "did you mean --learning-rate?"),
            ("train dpo", "--betta", "did you mean --beta?"), ("eval chat", "--lr", "try ./eval chat"),
            ("train dpo", "--zzzzzzzzzzzz", "no option --zzzzzzzzzzzz; try ./train dpo --help"),
            ("train dpo", "--" + "x" * 99, "try ./train dpo --help"), ("train dpo", "--=", "--help"),
            ("train sft", "-r", "no option -r; try ./train sft --help")):
        refused(["./" + command.split()[0], command.split()[1], option], said, status=2)


def test_option_values(data, base):
    """A value that is missing is missed where it is, of one that cannot be the range is said, and
    none is let go for another that may have been meant to be added."""
    dpo = ["./train", "dpo"]
    for words, said in (
            (["-m", "--max-steps", "1"], "--model needs a value before --max-steps"),
            (["--beta", "--max-steps=1"], "--beta needs a value before --max-steps=1"),
            (["-o", "-m", base], "--output needs a value before -m"),
            (["-m", base, "-o", "--help"], "--output needs a value before --help"),
            (["-m", base, "-o", "--resume"], "--resume needs -o DIR"),
            (["--resume", "-o", "-d", "x"], "--resume needs -o DIR"),
            (["-d", "--data", "x"], "--data needs a value before --data"),
            (["-d"], "--data needs a value"), (["-o=x"], "-o=x: write -o VALUE or --output=VALUE")):
        refused(dpo + words, said, status=2)
    refused(dpo + ["-m", "--ada", "-d", "no", "-o", data / "no"], "--ada: cannot be opened")
    whole, huge = "must be a whole number from", 20 * "9"
    for option, value, said in (
            ("batch-size", huge, f"{whole} 1 to 1000000, not '{huge}'"),
            ("limit", "-3", f"{whole} 0 to 1000000000000000, not '-3'"),
            ("seed", str(2 ** 64), f"{whole} 0 to {2 ** 53 - 1}, not"),
            ("seed", str(2 ** 53), f"{whole} 0 to {2 ** 53 - 1}, not"), ("seed", "-1", whole),
            ("max-steps", "1e3", whole), ("max-steps", "", whole), ("lora-r", "many", whole),
            ("epochs", "0", "must be a number from 1e-09 to 1000000, not '0'"),
            ("beta", "1e999", "must be a number from 1e-06 to 1000000, not '1e999'"),
            ("beta", "-nan", "must be a number from"), ("beta", "0.1x", "must be a number from"),
            ("adam-beta2", "1", "must be a number from 0 to 0.99999999, not '1'"),
            ("max-memory", "-1", "must be a size like 500M or 8G, not '-1'"),
            ("max-memory", "8Q", "must be a size like 500M or 8G, not '8Q'"),
            ("max-memory", "1e999", "--max-memory 1e999 is more than any machine has"),
            ("max-memory", huge + "G", f"--max-memory {huge}G is more than any machine has")):
        refused(dpo + ["--" + option, value], "--" + option, said, status=2)
    train, pairs = begin(base, data, data / "no"), data / "pairs.jsonl"
    prefs = ["./eval", "prefs", "-m", base, "-r", base, "-d", pairs]
    for words, option, now in (
            (train, ["-d", pairs], "--data was given twice; join the files with cat"),
            (train, ["--eval-data", pairs], "--eval-data was given twice; join the files with cat"),
            (train, [f"--model={base}"], "--model was given twice; give it once"),
            (train, ["-o", data / "other"], "--output was given twice; give it once"),
            (prefs, ["--reference", base], "--reference was given twice; give it once"),
            (prefs, ["--versus", base, "--versus", base], "--versus was given twice"),
            (["./eval", "generate"], ["-p", "a", "--prompt", ""], "--prompt was given twice")):
        refused(words + option, now, status=2)
    text = run(*train, "--batch-size", "20", "--max-steps", "3", "--epochs", "2", "--max-steps",
               "0", "--dry-run", "--dry-run")    # of numbers and flags the last counts
    check("plan    4 updates" in text, text)
    run("./eval", "generate", "-m", base, "-p", "a", "--max-new-tokens", "1", "--stop", "x",
        "--stop", "y")
    # what is no option of this command is a value, as is all that stands after = or a letter
    refused(dpo + ["-m", "--top-k", "-d-m", "-o", "-x"], "--top-k: cannot be opened")
    refused(dpo + ["--model=--data", "-d", "-x", "-o-d"], "--data: cannot be opened")


def test_useless_options(data, base):
    """An option that would have no effect is refused before anything is read; a run that goes on
    has all options, and is asked for none."""
    out, rmsprop = data / "run", ["--optim", "rmsprop"]
    alone = ["./train", "dpo", "-m", base, "-d", data / "none.jsonl", "-o", out]
    none = alone + ["--dtype", "bf16", "--stochastic-rounding"]
    for words, said in (
            (alone + ["--eval-examples", "3"], "--eval-examples needs --eval-data"),
            (alone + ["--eval-steps", "3"], "--eval-steps needs --eval-data or --sample"),
            (alone + ["--rmsprop-alpha", "0.9"], "--rmsprop-alpha goes with --optim rmsprop"),
            (alone + ["--adam-beta1", "0.8", *rmsprop], "--adam-beta1 goes with --optim adamw"),
            (alone + [*rmsprop, "--adam-beta2=0.8"], "--adam-beta2 goes with --optim adamw"),
            (none + ["--lora"], "--stochastic-rounding is for training all weights, not an"),
            (none + ["--adapter", data / "none"], "--stochastic-rounding is for training all")):
        refused(words, said, status=2)
    run(*begin(base, data, out, *rmsprop, "--rmsprop-alpha", "0.9", "--adam-epsilon", "1e-7",
               "--eval-examples", "3", "--dry-run"))
    leave(begin(base, data, out, *rmsprop, "--rmsprop-alpha", "0.9", "--max-steps", "500",
                "--eval-examples", "3"), out)
    resume = ["./train", "dpo", "--resume", "-o", out]
    run(*resume, "--rmsprop-alpha", "0.9", "--eval-examples", "3", "--dry-run")
    refused(resume + ["--adam-beta1", "0.9"], "--adam-beta1 goes with --optim adamw", status=2)
    shutil.rmtree(out)


def test_text_as_prompts(data, base):
    """What eval says of text, and of nothing, where prompts are expected."""
    text = data / "words.txt"
    text.write_text("\n  some words\n" * 40)
    said = run("./eval", "loss", "-m", base, "-d", text, "--max-length", "32")
    check("max-prompt-length" not in said, f"an option that loss has not: {said}")
    scored = next(line.split()[1] for line in said.splitlines() if line.startswith("tokens"))
    check(f"windows of text, {int(scored) + 1} tokens" in said, f"windows share a token: {said}")
    ends = data / "ends.txt"
    ends.write_text("<|endoftext|>" * 3)
    refused(["./eval", "loss", "-m", base, "-d", ends], "ends.txt: only end tokens are read")
    (data / "wide.jsonl").write_bytes('{"prompt": "a"}\n'.encode("utf-16"))
    refused(["./eval", "generate", "-m", base, "-d", data / "wide.jsonl"], "wide.jsonl:1: UTF-16")
    run("./train", "init", "-o", data / "one.bin", "--d-model", "32", "--context-length", "1")
    refused(["./eval", "loss", "-m", data / "one.bin", "-d", text], "context is one token")
    generate = ["./eval", "generate", "-m", base, "--max-new-tokens", "1"]
    refused(generate + ["-d", text], 'words.txt:2: {"prompt": "..."} is expected', "-p TEXT")
    text.write_text('{"prompt": }\n')
    refused(generate + ["-d", text], "words.txt:1: ")
    terminal, ours = pty.openpty()
    process = start(*generate, stdin=ours)
    os.write(terminal, b'{"prompt": "a"}\n\x04')
    out, err = process.communicate(timeout=60)
    check(process.returncode == 0 and "completion" in out and
          "reading prompts from standard input" in err, f"on a terminal: {out}{err}")
    os.close(terminal)
    os.close(ours)
    process = start(*generate, stdin=subprocess.PIPE)
    out, err = process.communicate('{"prompt": "a"}\n', timeout=60)
    check("completion" in out and "reading" not in err, f"in a pipe: {out}{err}")


def test_divergence(data, base):
    """What a run does to itself is not mended by going on with it."""
    out = data / "run"
    for command, more in (("sft", ["--sample", "1", "--eval-steps", "1"]), ("dpo", [])):
        words = begin(base, data, out, "--weight-decay", "1000", "--lr-scheduler-type", "constant",
                      "--save-steps", "1", "--max-steps", "30", *more)
        words[words.index("1e-3")] = "1000"
        words[1] = command
        if command == "sft":
            at = words.index("--eval-data")
            del words[at:at + 2]
        text = run(*words, status=1)
        check("lower --learning-rate may help" in text and "--resume" not in text,
              f"advice that cannot help: {text}")
        check((out / "state.bin").exists(), "no state was saved")
        shutil.rmtree(out)


def test_long_prompts(base):
    """What does not fit into the context of 128 with its answer loses its start, not its answer."""
    said = run("./eval", "generate", "-m", base, "-p", "word " * 60, "--max-new-tokens", "40",
               "--temperature", "0")
    answer = json.loads(next(line for line in said.splitlines() if line[0] == "{"))["completion"]
    check("of 300 tokens the last 88 are read" in said and len(answer) > 20, f"generate: {said}")
    process = start("./eval", "chat", "-m", base, "--max-new-tokens", "30", "--temperature", "0",
                    stdin=subprocess.PIPE)
    out, err = process.communicate("How are you, my friend?\n" * 6, timeout=60)
    check(err.count("the talk is longer than 98 tokens") == 1 and len(out.split("> ")[6]) > 10,
          f"chat: {out}{err}")


def test_dry_run(data, base):
    """It says what a run would, and makes nothing; the run itself is as if it had not been."""
    out, there = data / "deep" / "run", data / "there"
    there.mkdir()
    for command in ("dpo", "sft"):
        for place in (out, there):
            words = begin(base, data, place, "--max-steps", "2", "--dry-run")
            words[1] = command
            before = sorted(data.rglob("*"))
            text = run(*words)
            for said in ("memory  ", "disk    ", "data    ", "plan    2 updates", "trains  ",
                         "dry run: nothing was made", "checksums are checked then"):
                check(said in text, f"{command} --dry-run does not say {said!r}: {text}")
            check(("reference: " in text) == (command == "dpo"), f"{command}'s reference: {text}")
            check("step 0" not in text and sorted(data.rglob("*")) == before,
                  f"{command} --dry-run makes something: {text}")
    there.rmdir()
    refused(begin(base, data, out, "--dry-run", "--max-memory", "1"), "allowed by --max-memory")
    leave(begin(base, data, out, "--max-steps", "500"), out)
    (out / "state.bin.tmp-1").write_text("half a file")
    before = {path: path.read_bytes() for path in out.iterdir()}
    text = run("./train", "dpo", "--resume", "-o", out, "--dry-run")
    check("dry run" in text and before == {path: path.read_bytes() for path in out.iterdir()},
          f"--resume --dry-run changes something: {text}")
    refused(begin(base, data, out, "--dry-run"), "holds another run")
    (out / "state.bin").write_bytes(before[out / "state.bin"][:-10])
    refused(["./train", "dpo", "--resume", "-o", out, "--dry-run"], "state.bin", "cut short")
    shutil.rmtree(data / "deep")


def test_warmup(data, base):
    """A run that is all warmup never gets to its learning rate, and says so."""
    for options, most in ((["--warmup-steps", "9"], "at most 0.0009); lower --warmup-steps"),
                          (["--warmup-ratio", "1"], "at most 0.0009); lower --warmup-ratio"),
                          (["--warmup-steps", "8"], None)):
        words = begin(base, data, data / "run", "--max-steps", "9", *options, "--dry-run")
        text = run(*words)
        check(most in text if most else "warmup lasts" not in text, f"{options}: {text}")


def test_unwritable(data, base):
    """Errors name what was to be made, and not its temporary file."""
    nowhere, pairs = data / "nowhere", data / "pairs.jsonl"
    for words, name in ((["./train", "init", "-o", nowhere / "a.bin"], "a.bin"),
                        (["./train", "merge", "-m", base, "-o", nowhere / "b.bin"], "b.bin"),
                        (["./eval", "prefs", "-m", base, "-r", base, "-d", pairs, "--out",
                          nowhere / "c.csv"], "c.csv")):
        refused(words, f"cannot create {nowhere / name}: No such file or directory; choose")


def test_file_limit(data, base):
    """ulimit -f is reported as a full disk is, and leaves no half of a file."""
    place = data / "limited"
    place.mkdir()
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10000, 10000))
    text = run("./train", "init", "-o", place / "a.bin", status=1, preexec_fn=limit)
    check("a.bin: cannot be written: File too large" in text, text)
    # not less than 1024, which clang's OpenMP takes of shared memory
    text = run("./eval", "prefs", "-m", base, "-r", base, "-d", data / "pairs.jsonl", "--out",
               place / "b.csv", status=1,
               preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024)))
    check("cannot write" in text and "b.csv: File too large" in text, text)
    check(not list(place.iterdir()), f"left: {list(place.iterdir())}")
    words = begin(base, data, place / "run", "--max-steps", "500", "--save-steps", "1")
    text = run(*words, status=1, preexec_fn=limit)
    check("state.bin: cannot be written: File too large" in text and
          "no state was saved yet: when that is mended, begin anew" in text, text)
    shutil.rmtree(place / "run")
    leave(words, place / "run")
    text = run("./train", "dpo", "--resume", "-o", place / "run", status=1, preexec_fn=limit)
    check("File too large" in text and
          f"go on by ./train dpo --resume -o {place / 'run'}" in text, text)
    shutil.rmtree(place)


def test_busy_machine(data, base):
    """Threads that spin beside other programs are slow, which is said only where it is so."""
    environment, text = shim(data), data / "busy.txt"
    text.write_text("some text")
    program = (ROOT / "eval").read_bytes()
    if not environment or not (b"GOMP_parallel" in program or b"__kmpc_fork" in program):
        return
    loud = {**environment, "LOAD": str(os.cpu_count() / 2 + 0.1)}
    del loud["OMP_WAIT_POLICY"]
    note = f"the machine is busy (load {os.cpu_count() / 2 + 0.1:.1f}): OMP_WAIT_POLICY=passive"
    words = ["./eval", "loss", "-m", base, "-d", text]
    check(note in run(*words, env=loud), "eval on a busy machine")
    sft = ["./train", "sft", "-m", base, "-d", text, "--max-steps", "1", "-o", data / "busy"]
    check(note in run(*sft, env=loud), "train on a busy machine")
    shutil.rmtree(data / "busy")
    for quiet in ({**loud, "OMP_WAIT_POLICY": "active"},
                  {**loud, "LOAD": str(os.cpu_count() / 2 - 0.1)}):
        check("is busy" not in run(*words, env=quiet), "a note without a cause")
    check("is busy" not in run(*words, "--threads", "1", env=loud), "one thread waits for no other")


def test_reference_model(data, base):
    """--reference names another model: its memory is checked unless a cache has what it said, its
    rewards are not 0 at step 0, which is yet never the best, and resuming does without it."""
    other, out, cache = data / "reference_model.bin", data / "run", data / "cache.bin"
    run("./train", "init", "-o", other, "--d-model", "512", "--context-length", "128")
    words = [*hard(data), "--reference", other, "--max-steps", "6", "--eval-steps", "1",
             "--learning-rate", "1e-4"]
    alone = run(*begin(base, data, out, *hard(data), "--max-steps", "1"))   # what the policy needs
    limit = f"{float(alone.split('memory  planned ')[1].split()[0]) + 0.5:.1f}"
    shutil.rmtree(out)
    short = data / "short.bin"
    run("./train", "init", "-o", short, "--d-model", "32", "--context-length", "30")
    refused(begin(base, data, out, *hard(data), "--reference", short), "short.bin (--reference)",
            "reads 30 tokens", "at line 1 of", "lower --max-length to 30")
    check(not out.exists(), "a reference that is too short leaves a directory")
    run(*begin(base, data, out, *hard(data), "--reference", short, "--max-length", "30",
               "--max-steps", "1"))
    shutil.rmtree(out)
    refused(begin(base, data, out, *words, "--max-memory", limit + "M"), f"{limit} MB are allowed",
            "it is the model of --reference")
    text = run(*begin(base, data, out, *words, "--reference-cache", cache, "--learning-rate", "0"))
    check_peak(text, 1, "--reference")
    check("reference model" in text and "reference model" not in alone, f"memory: {text}")
    log = rows(out / "eval.csv")
    accuracy = float(log[0]["eval_rewards/accuracies"])
    check(accuracy > 0 and "step 1, accuracy" in text and
          "as good: step 2, 3, 4, 5, 6\n" in text and
          f"started from, was as good: accuracy {accuracy:.4f}" in text, f"step 0: {text}")
    shutil.rmtree(out)
    process = start(*begin(base, data, out, *words, "--reference-cache", cache, "--max-memory",
                           limit + "M", "--save-steps", "1", "--epochs", "9", "--max-steps",
                           "300"))
    while not (out / "state.bin").exists() and process.poll() is None:
        time.sleep(0.002)
    err = kill(process)
    check((out / "state.bin").exists(), f"a cache that spares the model: {err}")
    hidden = other.rename(data / "hidden.bin")
    cache.unlink()
    interrupt_resumed("./train", "dpo", "--resume", "-o", out)
    refused(["./train", "dpo", "--resume", "-o", out, "--reference", base],
            "base.bin (--reference)", "has not the content")
    refused(["./train", "dpo", "--resume", "-o", out, "--reference", other], "reference_model.bin")
    hidden.unlink()
    shutil.rmtree(out)


def test_best_and_state(data, base):
    """Killed at any instant between a new best.bin and the state that knows of it, a run that is
    resumed reports the model that best.bin holds."""
    environment = shim(data)
    if not environment:
        return
    whole, cut, models = data / "whole", data / "cut", data / "models"
    words = ["--max-steps", "12", "--eval-steps", "1", "--save-minutes", "0", *hard(data)]
    run(*begin(base, data, whole, *words))
    models.mkdir()
    bests, highest = [], -1
    for row in rows(whole / "eval.csv")[1:]:
        if float(row["eval_rewards/accuracies"]) > highest:
            highest = float(row["eval_rewards/accuracies"])
            bests.append(int(row["step"]))
    check(len(bests) > 1, f"only the evaluations after {bests} were the best so far")
    for name in ("next_best.bin", "state.bin", "best.bin"):
        for n in range(1, 3):
            killed(begin(base, data, cut, *words), environment, name, n)
            known = n if name == "best.bin" else n - 1     # what the last state knows
            state = cut / "state.bin"
            if not check(state.exists() == (known > 0), f"killed before {name} {n}: state.bin"):
                continue
            if known:
                (cut / "log.csv").rename(cut / "hidden")    # it ends when all but that is read
                refused(["./train", "dpo", "--resume", "-o", cut], "log.csv")
                (cut / "hidden").rename(cut / "log.csv")
                check(not (cut / "next_best.bin").exists(), "next_best.bin is left")
                model = models / f"{known}.bin"
                if not model.exists():
                    shutil.copy(cut / "best.bin", model)
                check((cut / "best.bin").read_bytes() == model.read_bytes(),
                      f"killed before {name} {n}: best.bin is not what the state knows")
                text = run("./train", "dpo", "--resume", "-o", cut)
                check(f"resumed after update {bests[known - 1]} of" in text, f"{name} {n}: {text}")
                same_files(whole, cut, ["model.bin", "best.bin", "eval.csv"], f"{name} {n}")
            shutil.rmtree(cut)
    killed(begin(base, data, cut, *words), environment, "best.bin", 2)
    (cut / "best.bin").write_bytes((whole / "model.bin").read_bytes())
    (cut / "next_best.bin").rename(cut / "hidden")
    refused(["./train", "dpo", "--resume", "-o", cut], "is not the model that", "best.bin")
    damaged = bytearray((cut / "hidden").read_bytes())
    damaged[-100] ^= 1
    (cut / "best.bin").write_bytes(damaged)
    refused(["./train", "dpo", "--resume", "-o", cut], "/best.bin is damaged", "or move it away")
    (cut / "best.bin").rename(cut / "next_best.bin")
    refused(["./train", "dpo", "--resume", "-o", cut], "next_best.bin is damaged", "or move it away")
    (cut / "next_best.bin").unlink()    # which nobody but the user may do
    text = run("./train", "dpo", "--resume", "-o", cut)
    check("best.bin is not there any more" in text, text)
    for path in (whole, cut, models):
        shutil.rmtree(path)


def test_best(data, base):
    """best.bin is the first of the best evaluations after step 0; patience counts from it."""
    out, held = data / "best", data / "hard_held.jsonl"
    text = run(*begin(base, data, out, *hard(data), "--max-steps", "24", "--eval-steps", "1"))
    log = rows(out / "eval.csv")
    accuracy = [float(row["eval_rewards/accuracies"]) for row in log]
    best = 1 + max(range(len(accuracy) - 1), key=lambda i: (accuracy[i + 1], -i))
    check(f"step {best}, accuracy {accuracy[best]:.4f}" in text and "confirm it" in text,
          f"best is step {best}: {text}")
    equal = [step for step in range(best + 1, 25) if accuracy[step] == accuracy[best]]
    said = ", ".join(map(str, equal[:8])) + (f" and {len(equal) - 8} more" if equal[8:] else "")
    check(f"as good: step {said}\n" in text if equal else "as good" not in text,
          f"equal to the best are {equal}: {text}")
    report = {line.split()[0]: line.split()[1:] for line in text.splitlines()
              if line.startswith(("eval_", "step     "))}
    check(report["step"] == ["0", "24", "best", str(best)], f"columns: {report}")
    for name, values in report.items():
        if name != "step":
            column = [float(row[name]) for row in log]
            check(all(abs(float(a) - b) < 6e-5 for a, b in
                      zip(values, (column[0], column[24], column[best]))), f"{name}: {values}")
    check(report["eval_ties"] == ["20", "1", "1"], f"ties: {report}")
    for row, mean in zip(log, accuracy):    # every prompt stands alone
        error = (mean * (1 - mean) / 19) ** 0.5
        check(abs(float(row["eval_rewards/accuracies_se"]) - error) < 1e-8, f"{mean}: {row}")
    again = data / "again"      # the same run, up to that step
    run(*begin(base, data, again, *hard(data), "--max-steps", "24", "--eval-steps", str(best)))
    check((again / "best.bin").read_bytes() == (out / "best.bin").read_bytes(),
          "best.bin is not the model of its step")
    for patience, delta in ((3, 0), (2, 0.05), (4, 0.05), (6, 0.05)):
        shutil.rmtree(again)
        text = run(*begin(base, data, again, *hard(data), "--max-steps", "24", "--eval-steps", "1",
                          "--patience", str(patience), "--min-delta", str(delta)))
        highest, waited, end = None, 0, 24
        for step in range(1, 25):
            better = highest is None or accuracy[step] - highest > delta + 1e-9
            waited = 0 if better else waited + 1
            highest = accuracy[step] if better else highest
            if waited == patience:
                end = step
                break
        check(f"{end} of 24 updates" in text, f"patience {patience}, delta {delta}: not at step "
                                              f"{end}: {text}")
    for steps in (3, 4):    # patience that ends with the run has ended nothing
        shutil.rmtree(again)
        text = run(*begin(base, data, again, "--max-steps", steps, "--eval-steps", "1",
                          "--patience", "2", "--learning-rate", "0"))
        check(f"3 of {steps} updates" in text and ("out of patience" in text) == (steps > 3), text)
    refused(["./train", "dpo", "-m", base, "-d", data / "pairs.jsonl", "-o", data / "no",
             "--patience", "2"], "--eval-data", status=2)
    shutil.rmtree(again)
    words = begin(base, data, again, "--max-steps", "6", "--learning-rate", "3")
    words[1] = "sft"
    text = run(*words)
    losses = [float(row["eval_loss"]) for row in rows(again / "eval.csv")]
    check(min(losses[1:]) > losses[0] and "training started from, was better: loss "
          f"{losses[0]:.4f}" in text, f"SFT that only worsens, {losses}: {text}")
    wild = ["--lora", "--learning-rate", "1e3", "--weight-decay", "1e3", "--warmup-ratio", "0",
            "--eval-steps"]     # the adapter's product overflows in its second update
    for steps, saved in (("1", f"but that of update 1, {again / 'best.bin'}"),
                         ("2", "so no model was saved;")):
        shutil.rmtree(again)
        refused(begin(base, data, again, *wild, steps), "after update 2 gives a loss of", saved)
        check((again / "best.bin").exists() == ("best" in saved), saved)
    text = run("./eval", "prefs", "-m", out / "best.bin", "-r", base, "-d", held, "--versus",
               out, "--skip", "4", "--max-length", "96", "--json")
    result = json.loads(text[text.index("{"):text.rindex("}") + 1])
    paths = [data / "a.csv", data / "b.csv"]
    for path, model in zip(paths, (out / "best.bin", out)):
        run("./eval", "prefs", "-m", model, "-r", base, "-d", held, "--skip", "4",
            "--max-length", "96", "--out", path)
    hits = [[float(row["rewards/margins"]) > 0 for row in rows(path)] for path in paths]
    mean = sum(a - b for a, b in zip(*hits)) / len(hits[0])
    skipped = (held).read_text().splitlines()[4:]
    check(result["prompts"] == len({json.loads(line)["prompt"] for line in skipped}),
          f"prompts after --skip: {result}")
    check(result["pairs"] == len(hits[0]) and abs(result["accuracies_difference"] - mean) < 1e-9
          and abs(result["versus_accuracies"] - sum(hits[1]) / len(hits[1])) < 1e-9,
          f"versus: {result}, not {mean}")
    differences, prompts = [a - b for a, b in zip(*hits)], {}
    records = [json.loads(line) for line in (held).read_text().splitlines()][4:]
    for record, difference in zip(records, differences):
        prompts.setdefault(record["prompt"], []).append(difference - mean)
    squares = sum(sum(values) ** 2 for values in prompts.values())
    error = (squares * len(prompts) / (len(prompts) - 1)) ** 0.5 / len(differences)
    check(abs(result["difference_se"] - error) < 1e-9, f"paired error {error}: {result}")
    refused(["./eval", "prefs", "-m", out, "-r", base, "-d", held, "--skip", "1000"],
            "--skip 1000")
    shutil.rmtree(out)
    shutil.rmtree(again)


def test_adapters(data, base):
    """SFT with LoRA, then DPO with LoRA: continued or merged, the reference is where it starts."""
    sft, dpo, merged = data / "sft", data / "dpo", data / "merged.bin"
    lora = ["--lora", "--lora-r", "4"]
    run("./train", "sft", "-m", base, "-d", data / "pairs.jsonl", "-o", sft, "--max-length", "96",
        "--max-prompt-length", "48", "--batch-size", "8", "--max-steps", "5", "--learning-rate",
        "1e-2", "--lora-dropout", "0.2", *lora)
    run("./train", "merge", "-m", sft, "-o", merged)
    text = run(*begin(sft, data, dpo, "--max-steps", "4"))
    check("adapter.bin, the model that training starts from" in text and
          "trains without dropout: the adapter's 0.2 becomes 0" in text, f"reference: {text}")
    first = rows(dpo / "log.csv")[0]
    check(first["rewards/margins"] == "0" and abs(float(first["loss"]) - 0.693147181) < 1e-9,
          f"continued, dropout off: the first update is not at the reference: {first}")
    check((dpo / "adapter.bin").exists() and not (dpo / "model.bin").exists(), "an adapter is kept")
    other = data / "merged"
    text = run(*begin(merged, data, other, "--max-steps", "4", *lora))
    check("merged.bin, the model that training starts from" in text, f"reference: {text}")
    a, b = (float(rows(d / "log.csv")[0]["logps/chosen"]) for d in (dpo, other))
    check(abs(a - b) < 1e-3 * abs(a), f"merged and continued start at {a} and {b}")
    text = run(*begin(base, data, data / "named", "--max-steps", "1", "--adapter", dpo,
                      "--reference", base))
    check("as --reference says" in text and
          rows(data / "named" / "log.csv")[0]["rewards/margins"] != "0", f"--reference: {text}")
    run("./train", "init", "-o", data / "new.bin", "--tokenizer", sft)  # that of its base
    # --adapter over its base is the same as the run directory; a merged bf16 file is mapped
    generate = ["--prompt", "How do I make tea?", "--temperature", "0", "--max-new-tokens", "12"]
    ways = (["-m", dpo], ["-m", base, "--adapter", dpo], ["-m", dpo / "adapter.bin"])
    texts = [run("./eval", "generate", *words, *generate).split('"completion"')[1].split("\n")[0]
             for words in ways]
    check(texts[0] == texts[1] == texts[2], f"three ways: {texts}")
    half = data / "half.bin"
    run("./train", "merge", "-m", dpo, "-o", half, "--dtype", "bf16")
    check(half.stat().st_size < 0.7 * merged.stat().st_size, "bf16 is half as large")
    run("./eval", "generate", "-m", half, "--dtype", "bf16", *generate)
    refused(["./train", "merge", "-m", base, "-o", half], "exists already")
    check("--seed" not in run("./train", "merge", "--help"), "merge has nothing to draw")
    run("./train", "init", "-o", data / "alien.bin", "--seed", "5")
    refused(["./train", "merge", "-m", data / "alien.bin", "--adapter", dpo, "-o", data / "x.bin"],
            "another model")
    refused(["./eval", "generate", "-m", data / "alien.bin", "--adapter", dpo, *generate],
            "another model")
    check(not (data / "x.bin").exists(), "a model that does not fit its adapter leaves a file")
    refused(begin(base, data, data / "x", "--lora", "--lora-target-modules", "attention.dense,qkv"),
            "qkv", "mlp.dense_h_to_4h")
    refused(begin(base, data, data / "x", "--lora", "--lora-target-modules", "embed_out"),
            "the head takes no adapter here")
    refused(begin(base, data, data / "x", "--lora", "--lora-target-modules", "dense,"),
            '"" is no linear layer')
    refused(begin(base, data, data / "x", "--lora-r", "8"), "--lora-r goes with --lora", status=2)
    refused(begin(sft, data, data / "x", "--lora-r", "8"), "its own", status=2)
    refused(begin(sft, data, data / "x", "--lora", "--lora-r", "8"), status=2)
    refused(begin(sft, data, data / "x", "--lora"), "merge", status=2)
    run(*begin(base, data, data / "high", "--lora", "--lora-r", "150", "--max-steps", "1"))
    run("./train", "merge", "-m", data / "high", "-o", data / "high.bin")
    refused(begin(base, data, data / "x", "--stochastic-rounding"), "--dtype bf16", status=2)
    moved = data / "moved"
    shutil.copytree(sft, moved)
    hidden = pathlib.Path(base).rename(data / "hidden.bin")
    refused(["./eval", "generate", "-m", moved, *generate], "base model", "not there")
    run("./eval", "generate", "-m", hidden, "--adapter", moved, *generate)
    hidden.rename(base)
    # PEFT's own config of an imported adapter, for the way back
    entries = convert.open_container(str(sft / "adapter.bin"), convert.ADAPTER)
    peft = convert.blob("file/adapter_config.json", b'{"peft_type": "LORA"}')
    imported = data / "imported.bin"
    convert.write_container(str(imported), convert.ADAPTER, [
        *((name, entry.dtype, entry.shape, entry.layout, convert.read_entry(entry))
          for name, entry in entries.items()), peft])
    run(*begin(imported, data, data / "further", "--max-steps", "2"))
    for name in ("adapter.bin", "best.bin"):
        now = convert.open_container(str(data / "further" / name), convert.ADAPTER)
        check(list(now) == [*entries, peft[0]] and convert.read_entry(now[peft[0]]) == peft[-1],
              f"{name} of an imported adapter holds {list(now)}")
    shutil.rmtree(data / "further")
    # An adapter that cannot be, from a file that another program made: its path, whoever reads it
    bad = data / "bad.bin"
    entries = convert.open_container(str(sft / "adapter.bin"), convert.ADAPTER)
    contents = {name: convert.read_entry(entry) for name, entry in entries.items()}
    contents["config"] = contents["config"].replace(b'"alpha": 32', b'"alpha": -2')
    bad.unlink(missing_ok=True)
    convert.write_container(str(bad), convert.ADAPTER, [
        (name, entry.dtype, entry.shape, entry.layout, contents[name])
        for name, entry in entries.items()])
    for words in (begin(bad, data, data / "x"), begin(base, data, data / "x", "--adapter", bad),
                  ["./eval", "generate", "-m", bad, *generate],
                  ["./eval", "prefs", "-m", base, "-r", bad, "-d", data / "pairs.jsonl"],
                  ["./train", "merge", "-m", bad, "-o", data / "x.bin"]):
        refused(words, "bad.bin: LoRA: r is 4, alpha -2")
    config = contents.pop("config").replace(b'"alpha": -2', b'"alpha": 32')
    bad.unlink(missing_ok=True)
    convert.write_container(str(bad), convert.ADAPTER, [
        convert.blob("config", config.replace(b'"r": 4', b'"r": 1000000')),
        *((name, entries[name].dtype, entries[name].shape, entries[name].layout, content)
          for name, content in contents.items())])
    for words in (begin(bad, data, data / "x"), ["./eval", "generate", "-m", bad, *generate]):
        refused(words, "bad.bin: its config says r 1000000", "has rank 4")
    for path in (sft, dpo, other, moved, data / "named", data / "high"):
        shutil.rmtree(path)


def test_reference_cache(data, base):
    cache = data / "reference.bin"
    with_cache = ["--max-steps", "1", "--reference-cache", cache]
    run(*begin(base, data, data / "a", *with_cache))
    text = run(*begin(base, data, data / "b", *with_cache, "--beta", "0.4", "--loss-type", "ipo"))
    check("read from" in text, f"the cache serves another beta and loss: {text}")
    # the context is 128: what counts is what was applied
    long = ["--max-steps", "1", "--reference-cache", data / "long.bin"]
    run(*begin(base, data, data / "long", *long, "--max-length", "600", "--max-prompt-length",
               "900"))
    shutil.rmtree(data / "long")
    text = run(*begin(base, data, data / "long", *long, "--max-length", "700",
                      "--max-prompt-length", "800"))
    check("read from" in text, f"a cache of the same tokens: {text}")
    check(text.count("--max-length becomes 128") == 1, f"said for each data file: {text}")
    shutil.rmtree(data / "long")
    words = begin(base, data, data / "c", *with_cache)
    refused(words + ["--dtype", "bf16"], "another precision")
    check(not (data / "c").exists(), "a cache that does not fit leaves a directory")
    refused(words + ["--max-length", "80"], "another truncation")
    refused(words + ["--limit", "9"], "other data")
    run("./train", "init", "-o", data / "another.bin", "--seed", "6", "--d-model", "32")
    words[3] = data / "another.bin"
    refused(words, "another reference model")
    for name in "ab":
        shutil.rmtree(data / name)


def test_memory(data):
    """The plan against the most that was resident: no more, and less than the heap by 2 % at most;
    also of a run that goes on, which reads its state beside all that it trains."""
    model, out = data / "large.bin", data / "run"
    run("./train", "init", "-o", model, "--preset", "pythia-70m", "--d-model", "512")
    for options, mapped in (([], 0), (["--dtype", "bf16"], 0), (["--lora"], 1),
                            (["--dtype", "bf16", "--stochastic-rounding"], 0),
                            (["--lora", "--gradient-checkpointing"], 1)):
        check_peak(run(*begin(model, data, out, "--max-steps", "2", *options)), mapped, options)
        shutil.rmtree(out)
        if not mapped:
            few = ["--batch-size", "1", "--micro-tokens", "64", "--max-length", "64", *options]
            leave(begin(model, data, out, "--max-steps", "4", *few), out)
            check_peak(run("./train", "dpo", "--resume", "-o", out), mapped, [*few, "resumed"])
            shutil.rmtree(out)
    refused(begin(model, data, data / "x", "--max-memory", "50M"), "50.0 MB are allowed by "
            "--max-memory", "--lora,")
    check(not (data / "x").exists(), "a run that does not fit leaves a directory")


def test_advice(data):
    """What is advised where memory is too small is not in use yet, and lowers the need."""
    model, half, text = data / "large.bin", data / "half_as_large.bin", data / "words.txt"
    text.write_text("some words " * 100)
    run("./train", "merge", "-m", model, "-o", half, "--dtype", "bf16")
    micro, shorter = "a lower --micro-tokens", "a lower --max-length"
    again, bf16, rounding = "--gradient-checkpointing", ["--dtype", "bf16"], "--stochastic-rounding"
    file = "a bf16 file of the model (./train merge --dtype bf16)"
    both = shorter + " and --micro-tokens"
    ways = {micro: ["--micro-tokens", "150"], shorter: ["--max-length", "32"],
            both: ["--max-length", "32", "--micro-tokens", "32"], file: ["-m", half, *bf16]}

    def need(words):
        while words.count("-m") > 1:    # the last model counts
            at = words.index("-m")
            words = words[:at] + words[at + 2:]
        said = run(*words, "--max-memory", "1M", status=1).partition("needs ")[2].strip()
        return float(said.split()[0]), said.partition("; use ")[2].split(", ")

    train = begin(model, data, data / "x", "--dry-run")
    least = ["--lora", *bf16, again, "--micro-tokens", "1"]
    loss = ["./eval", "loss", "-m", model, "-d", text, "--max-length", "64"]
    for words, options, expected in (
            (train, [], [micro, again, "--lora", "--dtype bf16 --stochastic-rounding"]),
            (train, bf16, [micro, again, "--lora", rounding]),
            (train, [*bf16, rounding, again], [micro, "--lora without --stochastic-rounding"]),
            (train, ["--lora"], [micro, again, file + " with --dtype bf16"]),
            (train, least, [shorter, file]),
            (train, [*least, "-m", half], [shorter]),
            (train, ["-m", half, "--lora"], [micro, again, "--dtype bf16"]),
            (loss, [], [micro, file + " with --dtype bf16"]),
            (loss, bf16, [micro, file]),
            (loss, ["-m", half, "--micro-tokens", "64"], [both, "--dtype bf16"]),
            (loss, ["-m", half, *bf16, "--micro-tokens", "1"], [shorter])):
        before, advice = need([*words, *options])
        check(advice == [*expected, "or a smaller model"], f"{words[1]} {options}: {advice}")
        for way in advice[:-1]:
            kept = [o for o in options if o != rounding or "without" not in way]
            name = way.partition(" with")[0]
            after, _ = need([*words, *kept, *ways.get(name, name.split())])
            check(after < before, f"{words[1]} {options}, {way}: {before} MB, then {after}")


def main():
    forget_killed()     # of an earlier test that was interrupted
    with tempfile.TemporaryDirectory() as directory:
        data = pathlib.Path(directory)
        base = data / "base.bin"
        write_pairs(data / "pairs.jsonl", 1, 40)
        write_pairs(data / "held.jsonl", 2, 24)
        write_hard_pairs(data)
        run("./train", "init", "-o", base, "--d-model", "32", "--context-length", "128")
        test_resume(data, base)
        test_killed(data, base)
        test_killed(data, base, "--lora", "--dtype", "bf16")
        test_resume_refusals(data, base)
        test_odd_paths(data, base)
        test_pasted(data, base)
        test_save_minutes(data, base)
        test_one_process(data, base)
        test_disk(data, base)
        test_help()
        test_unknown_options()
        test_option_values(data, base)
        test_useless_options(data, base)
        test_text_as_prompts(data, base)
        test_long_prompts(base)
        test_divergence(data, base)
        test_dry_run(data, base)
        test_warmup(data, base)
        test_unwritable(data, base)
        test_file_limit(data, base)
        test_busy_machine(data, base)
        test_reference_model(data, base)
        test_best_and_state(data, base)
        test_best(data, base)
        test_adapters(data, base)
        test_reference_cache(data, base)
        test_memory(data)
        test_advice(data)
    print(f"{passed} passed, {failed} failed")
    sys.exit(failed > 0)


main()
