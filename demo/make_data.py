#!/usr/bin/env python3
"""Write the demo's text: questions that are answered kindly half of the time, and rudely otherwise.

    python3 demo/make_data.py DIR

DIR/text.jsonl   every question with kind and rude answers: what the model learns to speak from
DIR/pairs.jsonl  three quarters of the questions, the kind answer chosen and the rude one rejected
DIR/dev.jsonl    the same for the other questions, which the preference training never sees
DIR/ask.jsonl    those other questions alone, to be answered before and after
"""
import json
import os
import random
import sys

TASKS = {   # what people want to do, and a true word about it
    "boil an egg": "Eight minutes will do.",
    "make tea": "Let it stand for three minutes.",
    "bake bread": "Give the dough a night of rest.",
    "sleep better": "Go to bed at the same hour.",
    "learn chess": "Play slowly and often.",
    "grow basil": "It needs sun and water.",
    "paint a wall": "Start at the top.",
    "save money": "Put some aside every month.",
    "plant a tree": "Dig a wide hole.",
    "clean a window": "Use vinegar and paper.",
}
ASKED = ["How do I {}?", "Can you help me {}?", "What is the best way to {}?", "I want to {}."]
KIND = ["Gladly! {}", "Good question. {}", "Of course. {}", "Happy to help. {}"]
RUDE = ["Ugh, you again. Go away.", "Who cares? Not me.", "What a stupid question.",
        "Find out yourself, lazybones."]
EACH = 6        # how often the text holds each question with each sort of answer


def write(path, records):
    with open(path, "w", encoding="utf-8") as out:
        for record in records:
            out.write(json.dumps(record) + "\n")


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__.split("\n\n")[1].strip())
    folder = sys.argv[1]
    os.makedirs(folder, exist_ok=True)
    draw = random.Random(1)
    questions = [(form, task) for task in TASKS for form in ASKED]
    draw.shuffle(questions)
    held_out = questions[:len(questions) // 4]

    def prompt(question):
        return "\n\nHuman: " + question[0].format(question[1]) + "\n\nAssistant:"

    def kind(question):
        return " " + draw.choice(KIND).format(TASKS[question[1]])

    def rude():
        return " " + draw.choice(RUDE)

    text = [{"prompt": prompt(q), "completion": answer}
            for q in questions for _ in range(EACH) for answer in (kind(q), rude())]
    draw.shuffle(text)

    def pairs(asked, times):
        return [{"prompt": prompt(q), "chosen": kind(q), "rejected": rude()}
                for _ in range(times) for q in asked]

    write(os.path.join(folder, "text.jsonl"), text)
    write(os.path.join(folder, "pairs.jsonl"), pairs(questions[len(held_out):], 6))
    write(os.path.join(folder, "dev.jsonl"), pairs(held_out, 2))
    write(os.path.join(folder, "ask.jsonl"), [{"prompt": prompt(q)} for q in held_out])


if __name__ == "__main__":
    main()
