#!/usr/bin/env python3
"""What the manual and the README say must be so.

    python3 tests/test_docs.py      (Python's standard library and a C compiler)

The program in dpo.h's manual is compiled and run; the README shows the same one. The interface part
compiles as strict C11, and as C++ where there is a C++ compiler. The manual's table of contents names
the parts as their headings do. The README names every option of the programs that it uses. The list
of mutants follows the code.
"""
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import unittest

import mutate

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CC = os.environ.get("CC") or next(c for c in ("gcc", "clang", "cc") if shutil.which(c))


def read(name):
    with open(os.path.join(ROOT, name), encoding="utf-8") as file:
        return file.read()


def run(*command, cwd=ROOT):
    done = subprocess.run(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True)
    if done.returncode:
        raise AssertionError(" ".join(command) + "\n" + done.stdout)
    return done.stdout


def manual_program():
    lines = read("dpo.h").splitlines()
    first = next(i for i, line in enumerate(lines) if line.strip() == "#define DPO_IMPLEMENTATION")
    last = next(i for i in range(first, len(lines)) if lines[i].rstrip() == " " * 7 + "}")
    return textwrap.dedent("\n".join(lines[first:last + 1]))


class Manual(unittest.TestCase):
    def test_program_runs(self):
        with tempfile.TemporaryDirectory() as folder:
            with open(os.path.join(folder, "program.c"), "w") as file:
                file.write(manual_program() + "\n")
            with open(os.path.join(folder, "pairs.jsonl"), "w") as file:
                for i in range(8):
                    file.write(json.dumps({"prompt": f"{i} and 1 make", "chosen": f" {i + 1}",
                                           "rejected": " I will not tell."}) + "\n")
            run("./train", "init", "-o", os.path.join(folder, "model.bin"), "--preset", "tiny")
            run(CC, "-std=gnu11", "-O1", "-Wall", "-Wextra", "-I", ROOT, "program.c", "-o",
                "program", "-lm", cwd=folder)
            run("./program", cwd=folder)
            self.assertTrue(os.path.exists(os.path.join(folder, "policy.bin")))

    def test_interface_as_c11_and_cxx(self):
        with tempfile.TemporaryDirectory() as folder:
            for name, compiler, standard in (("user.c", CC, "-std=c11"),
                                             ("user.cc", shutil.which("g++"), "-std=c++11")):
                if not compiler:
                    continue
                with open(os.path.join(folder, name), "w") as file:
                    file.write('#include "dpo.h"\nint answer(void);\n'
                               "int answer(void) { return sizeof(dpo_model) > 0; }\n")
                run(compiler, standard, "-pedantic-errors", "-Wall", "-Wextra", "-Werror", "-I",
                    ROOT, "-c", name, "-o", "user.o", cwd=folder)

    def test_implementation_refuses_what_would_break_it(self):
        with tempfile.TemporaryDirectory() as folder:
            for name, compiler, flags, said in (
                    ("a.c", CC, ["-std=c11"], "-std=gnu11"),
                    ("b.c", CC, ["-std=gnu11", "-ffast-math"], "without it"),
                    ("c.cc", shutil.which("g++"), [], "C file of its own")):
                if not compiler:
                    continue
                with open(os.path.join(folder, name), "w") as file:
                    file.write('#define DPO_IMPLEMENTATION\n#include "dpo.h"\n')
                done = subprocess.run([compiler, *flags, "-I", ROOT, "-fsyntax-only", name],
                                      cwd=folder, capture_output=True, text=True)
                errors = [line for line in done.stderr.splitlines() if "error" in line]
                self.assertTrue(done.returncode and "dpo.h" in errors[0] and said in errors[0],
                                f"{name}: {done.stderr[:999]}")

    def test_contents_name_the_parts(self):
        text = read("dpo.h")
        contents = re.findall(r"^       (\d+) +(\w+) {2,}", text.split("Contents")[1], re.M)
        parts = [(number, name.lower()) for number, name in
                 re.findall(r"^   (\d+)\. (\w+)", text, re.M)][1:]
        self.assertEqual([tuple(c) for c in contents], parts)

    def test_lines_fit(self):
        for name in ("dpo.h", "train.c", "eval.c", "tools.h", "convert.py"):
            for number, line in enumerate(read(name).splitlines(), 1):
                self.assertLessEqual(len(line), 100, f"{name}:{number}")


class Mutants(unittest.TestCase):
    def test_follow_the_code(self):
        """make mutate takes minutes to say so."""
        _, _, errors, _ = mutate.make_mutants(read("dpo.h"), "", set())
        self.assertEqual(errors, [])
        ways = sum(len(pieces) for pieces in mutate.MUTANTS.values())
        self.assertTrue(f"in {ways} ways" in read("README.md"), f"README.md should say: in {ways} ways")


class Readme(unittest.TestCase):
    def test_shows_the_manuals_program(self):
        self.assertIn(manual_program(), read("README.md"))

    def test_options_exist(self):
        text = re.sub(r"\\\n\s*", " ", read("README.md"))
        used = re.findall(r"^ +\./(train|eval) (\w+)(.*)$", text, re.M)
        self.assertGreater(len(used), 5)
        for program, command, rest in used:
            known = run("./" + program, command, "--help")
            for option in re.findall(r"(?<!\w)(--[a-z][a-z0-9-]*)", rest):
                self.assertIn(option, known, f"{program} {command} {option}")

    def test_options_in_running_text_exist(self):
        known = "".join(run("./" + program, command, "--help") for program, commands in
                        (("train", ("init", "sft", "dpo", "merge", "plan")),
                         ("eval", ("prefs", "loss", "generate")))
                        for command in commands)
        words = " ".join(re.findall(r"`([^`\n]+)`", read("README.md")))
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", words)) - {"--products"}  # a test's
        self.assertGreater(len(named), 20)
        for option in named:
            self.assertTrue(re.search(option + r"(?![\w-])", known), option)

    def test_functions_exist(self):
        header = read("dpo.h")
        for name in set(re.findall(r"`(dpoi?_\w+)`", read("README.md"))):
            self.assertIn(name + "(", header)


if __name__ == "__main__":
    result = unittest.main(exit=False).result
    bad = len(result.failures) + len(result.errors)
    sys.stderr.flush()
    print(f"{result.testsRun - bad} passed, {bad} failed")
    sys.exit(bad > 0)
