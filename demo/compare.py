#!/usr/bin/env python3
"""Show how two models answered the demo's questions, and how often each was rude.

    python3 demo/compare.py BEFORE.jsonl AFTER.jsonl     (as `eval generate` writes them)

Each question was asked several times. The first answers stand side by side, and below them the
share of all answers that begin in one of the rude ways.
"""
import json
import sys

from make_data import RUDE


def read(path):
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def is_rude(answer):
    return any(answer.strip().startswith(start.split()[0]) for start in RUDE)


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__.split("\n\n")[1].strip())
    before, after = map(read, sys.argv[1:])
    shown = set()
    print(f"{'question':<40} {'before':<48} after")
    for old, new in zip(before, after):
        question = old["prompt"].strip().splitlines()[0].split("Human: ", 1)[-1]
        if question not in shown:
            print(f"{question:<40} {old['completion'].strip():<48} {new['completion'].strip()}")
        shown.add(question)
    print()
    for name, answers in (("before", before), ("after", after)):
        rude = sum(is_rude(answer["completion"]) for answer in answers)
        print(f"{name + ':':<8}{rude} of {len(answers)} answers are rude")


if __name__ == "__main__":
    main()
