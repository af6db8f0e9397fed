#!/usr/bin/env python3
"""The real GPT-NeoX and GPT-2 tokenizers on published vectors, where they are at hand.

    python3 tests/test_golden_tokens.py [SHARED]    (default: $DPO_SHARED or ../shared)

The tokenizers are too large to commit: SHARED/docs/tok_golden.json holds the vectors, and
SHARED/data/tokenizers the tokenizers, in the three forms in which they are found. Without them
there is nothing to test. Needs Python's standard library and a C compiler ($CC or cc).
"""

import json
import os
import pathlib
import shutil
import struct
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import make_tokenizer_fixture as fixture  # noqa: E402

CASES = [("neox", "neox20b", ["tokenizer.json"]), ("neox", "pythia410m_hf", ["tokenizer.json"]),
         ("gpt2", "gpt2", ["tokenizer.json"]), ("gpt2", "gpt2", ["vocab.json", "merges.txt"])]


def encode(program, model, texts):
    data = b"".join(struct.pack("<I", len(text)) + text for text in texts)
    run = subprocess.run([program, model], input=data, capture_output=True, check=False)
    if run.returncode:
        return [run.stderr.decode()] * len(texts)
    numbers = memoryview(run.stdout).cast("I").tolist()
    ids = []
    while numbers:
        n = numbers[0]
        ids.append(numbers[1:1 + n])
        del numbers[:1 + n]
    return ids


def main():
    shared = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else
                          os.environ.get("DPO_SHARED", HERE.parent.parent / "shared"))
    golden = shared / "docs" / "tok_golden.json"
    if not golden.exists():
        print(f"{golden} is not there: nothing to test")
        print("0 passed, 0 failed")
        return 0
    vectors = json.loads(golden.read_text("utf-8"))
    texts = [vector["text"].encode() for vector in vectors]
    passed = failed = 0
    with tempfile.TemporaryDirectory() as work:
        program = os.path.join(work, "encode_lines")
        subprocess.run([os.environ.get("CC", "cc"), "-std=gnu11", "-O1", "-o", program,
                        str(HERE / "encode_lines.c"), "-lm"], check=True)
        for i, (key, name, files) in enumerate(CASES):
            folder = pathlib.Path(work, str(i))
            folder.mkdir()
            for file in files:
                shutil.copyfile(shared / "data" / "tokenizers" / name / file, folder / file)
            fixture.make_model(folder, 50400)
            model = str(folder / "model.bin")
            subprocess.run([sys.executable, str(HERE.parent / "convert.py"), "import", str(folder),
                            model], check=True, stdout=subprocess.DEVNULL,
                           stderr=subprocess.DEVNULL)
            for vector, ids in zip(vectors, encode(program, model, texts)):
                if ids == vector[key]:
                    passed += 1
                else:
                    failed += 1
                    print(f"FAILED: {name} {vector['text']!r}: {ids}, expected {vector[key]}")
    print(f"{passed} passed, {failed} failed")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
