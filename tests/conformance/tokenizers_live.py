#!/usr/bin/env python3
"""Compare dpo.h's tokenizer with Hugging Face's `tokenizers`, id by id.

    python tests/conformance/tokenizers_live.py [DATA_DIR] [--encode PROGRAM]

With the fixture's tokenizer, and every tokenizer.json under DATA_DIR if one is given:
  - every code point assigned in Unicode 14, alone and in several neighbourhoods,
  - random strings of the characters that some step treats in its own way,
  - runs of up to a million characters, with the time they take,
  - every text file under DATA_DIR whole, and every string inside its JSON files.
PROGRAM is tests/encode_lines.c, compiled (default: compiled here by $CC or cc). Exit status 1 if
anything differs.
"""

import argparse
import itertools
import json
import os
import pathlib
import random
import shutil
import struct
import subprocess
import sys
import tempfile
import unicodedata

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import make_tokenizer_fixture as fixture  # noqa: E402  (brings convert along)
from tokenizers import Tokenizer  # noqa: E402

AROUND = ["{}", "a{}b", " {}", "{}\u0301", "{}\u0301\u0323", "\u1100{}", "1{} {}"]


def c_ids(program, model, texts):
    """The ids of each string by dpo.h, and what the encoder said of its speed."""
    encoded = [text.encode() for text in texts]
    data = b"".join(struct.pack("<I", len(text)) + text for text in encoded)
    run = subprocess.run([program, model], input=data, capture_output=True, check=False)
    message = run.stderr.decode().strip()
    if run.returncode:
        sys.exit(f"{program} {model}: exit status {run.returncode}: {message}")
    numbers = memoryview(run.stdout).cast("I")
    ids, place = [], 0
    for _ in texts:
        n = numbers[place]
        ids.append(None if n == 0xFFFFFFFF else numbers[place + 1:place + 1 + n].tolist())
        place += 1 + (0 if n == 0xFFFFFFFF else n)
    return ids, message.splitlines()[-1]


def compare(program, model, tokenizer, what, texts):
    """Compares in portions; returns how many strings differ."""
    texts, wrong, n, n_ids, n_bytes, seconds = iter(texts), 0, 0, 0, 0, 0.0
    while part := list(itertools.islice(texts, 200_000)):
        ours, message = c_ids(program, model, part)
        theirs = tokenizer.encode_batch_fast(part, add_special_tokens=False)
        words = message.split()
        n, n_bytes, seconds = n + len(part), n_bytes + int(words[0]), seconds + float(words[4])
        for text, mine, other in zip(part, ours, theirs):
            n_ids += len(other)
            if mine != other.ids:
                wrong += 1
                if wrong <= 5:
                    print(f"    {text[:60]!r}: {str(mine)[:80]}, expected {str(other.ids)[:80]}")
    print(f"  {what}: {n:,} strings, {n_bytes / 1e6:.2f} MB, {n_ids:,} ids, {wrong} differ; "
          f"{n_bytes / 1e6 / max(seconds, 1e-9):.1f} MB/s", flush=True)
    return wrong


def code_points():
    for code in range(0x110000):
        if unicodedata.category(chr(code)) not in ("Cn", "Cs"):
            yield from (form.format(chr(code), chr(code)) for form in AROUND)


def random_strings(n):
    generator = random.Random(3)
    pieces = [chr(code) for code in range(0x110000) if unicodedata.combining(chr(code))
              or unicodedata.decomposition(chr(code))[:1].isalnum()]
    pieces = [pieces, [chr(code) for code in range(0x80)],
              [*"  \t\n\u00a0\u3000\u2028ab12'!é가", "\u1161", "\u11a8", "'s", "'ll", "<|endoftext|>"],
              [text for text in fixture.test_strings() if 0 < len(text) < 8]]
    for _ in range(n):
        yield "".join(generator.choice(generator.choice(pieces))
                      for _ in range(generator.randrange(1, 20)))


def long_runs():
    for piece in ("a", "ab", " ", "\n", "!", "é", "e\u0301", "\u0323\u0301", "1234567890", "中", "aA ",
                  "the ", "가"):
        yield piece * (1_000_000 // len(piece))


def texts_of(directory):
    """Every text file whole, and every string inside JSON and JSON lines."""
    def strings(value):
        if isinstance(value, str):
            yield value
        elif isinstance(value, (list, dict)):
            for item in value if isinstance(value, list) else [*value, *value.values()]:
                yield from strings(item)

    for path in sorted(pathlib.Path(directory).rglob("*")):
        if not path.is_file():
            continue
        try:
            text = path.read_bytes().decode()
        except UnicodeDecodeError:
            continue
        yield text
        if path.suffix == ".json":
            yield from strings(json.loads(text))
        elif path.suffix == ".jsonl":
            for line in text.split("\n"):
                yield from strings(json.loads(line)) if line.strip() else ()
        else:
            yield from text.split("\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("data", nargs="?", help="a directory of text and tokenizers")
    parser.add_argument("--encode", help="tests/encode_lines.c, compiled")
    arguments = parser.parse_args()
    if unicodedata.unidata_version != "14.0.0":
        print(f"this Python has Unicode {unicodedata.unidata_version}; the comparison is meant for 14")
    wrong = 0
    with tempfile.TemporaryDirectory() as work:
        program = arguments.encode or os.path.join(work, "encode_lines")
        if not arguments.encode:
            subprocess.run([os.environ.get("CC", "cc"), "-std=gnu11", "-O3", "-o", program,
                            str(HERE.parent / "encode_lines.c"), "-lm"], check=True)
        folder = pathlib.Path(work, "fixture")
        folder.mkdir()
        (folder / "tokenizer.json").write_text(json.dumps(fixture.tokenizer_json()), "utf-8")
        sources = [folder / "tokenizer.json"]
        if arguments.data:
            sources += sorted(pathlib.Path(arguments.data).rglob("tokenizer.json"))
        for i, source in enumerate(sources):
            tokenizer = Tokenizer.from_file(str(source))
            folder = pathlib.Path(work, str(i))
            folder.mkdir()
            shutil.copyfile(source, folder / "tokenizer.json")
            fixture.make_model(folder, tokenizer.get_vocab_size() + 64)
            model = str(folder / "model.bin")
            fixture.convert.import_model(str(folder), model)
            print(f"{source}", flush=True)
            for what, texts in (("code points", code_points()),
                                ("random strings", random_strings(200_000)),
                                ("long runs", long_runs()),
                                ("data", texts_of(arguments.data) if arguments.data else ())):
                wrong += compare(program, model, tokenizer, what, texts)
    print("token ids are identical" if wrong == 0 else f"{wrong} strings differ")
    return wrong > 0


if __name__ == "__main__":
    sys.exit(main())
