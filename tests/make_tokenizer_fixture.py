#!/usr/bin/env python3
"""Make the committed tokenizer fixture: a small tokenizer, and what `tokenizers` says it does.

    python tests/make_tokenizer_fixture.py [OUT_DIR]   (default tests/fixtures; needs tests/setup_venv.sh)

tokenizer.model.bin (kind 1): a byte-level BPE of GPT-NeoX's form (NFC, GPT-2's words, added tokens
found in raw and in normalised text), trained here on the lines below, in a random model that is as
small as a model can be.

tokenizer.expect.bin (kind 5): strings, and their ids by Hugging Face's `tokenizers`:
    text       u8 [..]     the strings' UTF-8, end to end
    text_ends  u32 [n]     where each ends
    ids        u32 [..]    their ids, end to end
    id_ends    u32 [n]     where each string's ids end
"""

import collections
import json
import pathlib
import random
import re
import struct
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import convert  # noqa: E402

N_MERGES = 400
NO_BYTE = {0xC0, 0xC1, *range(0xF5, 0x100)}     # never in UTF-8; GPT-NeoX has no tokens for them

# Written for this fixture. The trainer sees it, and every line is a test string too.
LINES = """\
The kettle was still warm when the last guest left, and nobody had washed the cups.
We'll take the early train; they've said it's the one that doesn't stop, but I'd rather walk.
"You're late," she said. 'I'm not,' he'd answered, 'the clock's wrong.'
Human: how many apples are in 3 baskets of 12?  Assistant: there are 36 apples in them.
for (int i = 0; i < n; i++) {\n        total += values[i];\t// 8 spaces, a tab\n}
On 2019-07-04 at 23:59:58 it cost 1,234.50 (about 1.1e3), or 50% more than in 1998.
Wer früh aufsteht, hört die Vögel; über den Dächern läuft gemächlich der Nebel.
L'été dernier, nous avons mangé des crêpes à la crème près de l'église où naît la rivière.
El niño soñó con un pingüino que corría detrás de la montaña. ¿Dónde está? ¡Aquí!
Zażółć gęślą jaźń; příliš žluťoučký kůň; öğüt veren kişi ışığı gördü.
Tiếng Việt có nhiều dấu: ắ ằ ẳ ẵ ặ, ế ề ể ễ ệ, ớ ờ ở ỡ ợ, ứ ừ ử ữ ự.
Ο ήλιος ζεσταίνει τη θάλασσα· οι βάρκες γυρίζουν στο λιμάνι. ᾳ ᾧ ῥ ΐ ΰ
Старый мост скрипел, когда мимо проезжал поезд; ёлка, йод, їжак, ўсё.
האור בחדר כבה והילדים נרדמו. שָׁלוֹם עֲלֵיכֶם
كان القمر عاليا فوق البيوت القديمة. العَرَبِيَّة ١٢٣ ۴۵۶ أ إ آ ؤ ئ
सुबह की हवा ठंडी थी और नदी शांत थी। क़लम ज़रा फ़र्क १२३ हिन्दी
সকালের আলো নদীর জলে পড়েছে। কো কৌ ড় ঢ় য়
காலை வெயில் மெதுவாக வந்தது. கொ கோ கௌ
ฝนตกหนักเมื่อคืนนี้ น้ำในคลองจึงสูงขึ้น ๑๒๓
今天早上下了一场小雨，街道很安静。我们去了图书馆。
朝の光が窓から差し込み、猫は静かに眠っていた。ガギグ ｶﾞｷﾞ ヴ ば ぱ
아침에 비가 조금 내렸고 거리는 조용했다. 값 닭 흙 뷁
დილით წვიმდა და ქუჩა მშვიდი იყო. Առավոտյան անձրև էր։
ጠዋት ዝናብ ጣለ። បាយ ភ្លៀង ខ្មែរ  མཐོ་བ  သာယာ
😀 👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈 🇫🇷🇯🇵 ❤️ ☃ ♞ ⌘ 1️⃣
∀x∈ℝ: ⌈x⌉ ≠ −x ² ³ ½ ⅷ Ⅻ ① ㎏ ℃ Å Ω K ﬁ ﬂ""".split("\n")
LINES = [line.replace("\\n", "\n").replace("\\t", "\t") for line in LINES]

RAW = ["<|endoftext|>", "<|pad|>"]                      # special, found in raw text
ADDED = [("##", False), ("####", False), ("<tag>", False), ("<tag>s", False), ("e\u0301!", False),
         ("<caf\u00e9>", True), ("<x##", True), ("\u1ee5\u0308", True), ("--", True), ("---", True),
         *((" " * n, True) for n in range(8, 1, -1))]


def words(text):
    return re.findall(r" ?[^\W\d_]+| ?\d+| ?[^\w\s]+|\s", text)


def train(lines, n_merges):
    """Byte-pair encoding's training: merge the most frequent pair, again and again."""
    counts = collections.Counter(
        tuple(convert.SYMBOLS[byte] for byte in word.encode()) for line in lines for word in words(line))
    merges = []
    while len(merges) < n_merges:
        pairs = collections.Counter()
        for word, count in counts.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += count
        best = max(sorted(pairs), key=pairs.get)
        merges.append(best)
        merged = collections.Counter()
        for word, count in counts.items():
            parts = list(word)
            for i in range(len(parts) - 2, -1, -1):     # from the right: only ends of runs differ
                if (parts[i], *parts[i + 1:i + 2]) == best:
                    parts[i:i + 2] = ["".join(best)]
            merged[tuple(parts)] += count
        counts = merged
    return merges


def tokenizer_json():
    merges = train(LINES, N_MERGES)
    symbols = [convert.SYMBOLS[byte] for byte in range(256) if byte not in NO_BYTE]
    vocabulary = RAW + sorted(symbols) + ["".join(pair) for pair in merges]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(vocabulary))}
    ends = [(token, i, True, False) for i, token in enumerate(RAW)]
    ends += [(token, len(vocabulary) + i, False, normalized)
             for i, (token, normalized) in enumerate(ADDED)]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {"version": "1.0", "truncation": None, "padding": None,
            "added_tokens": [{"id": i, "content": token, "single_word": False, "lstrip": False,
                              "rstrip": False, "normalized": normalized, "special": special}
                             for token, i, special, normalized in ends],
            "normalizer": {"type": "NFC"}, "pre_tokenizer": byte_level,
            "post_processor": byte_level, "decoder": byte_level,
            "model": {"type": "BPE", "dropout": None, "unk_token": None,
                      "continuing_subword_prefix": None, "end_of_word_suffix": None,
                      "fuse_unk": False, "vocab": vocabulary,
                      "merges": [list(pair) for pair in merges]}}


def make_model(directory, vocab_size):
    """The smallest GPT-NeoX that convert.py imports, to carry the tokenizer that lies there."""
    directory = pathlib.Path(directory)
    config = {"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"],
              "vocab_size": vocab_size, "hidden_size": 4, "num_hidden_layers": 1,
              "num_attention_heads": 2, "intermediate_size": 8, "rotary_pct": 1.0,
              "max_position_embeddings": 64, "tie_word_embeddings": True, "bos_token_id": 0,
              "eos_token_id": 0, "torch_dtype": "float32"}
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    generator = random.Random(1)
    raw, tensors = directory / "raw", {}
    with open(raw, "wb") as file:
        expected = convert.expected_tensors(convert.canonical_config(str(directory), config))
        for name, (shape, _) in expected.items():
            tensors[name] = convert.Tensor(str(raw), file.tell(), "f32", shape)
            n = shape[0] * (shape[1] if len(shape) > 1 else 1)
            file.write(struct.pack(f"<{n}f", *(generator.gauss(0, 0.1) for _ in range(n))))
    convert.write_safetensors(str(directory / "model.safetensors"), tensors)
    raw.unlink()


def test_strings():
    """Every kind of character and of neighbourhood that some step treats in its own way."""
    spaces = [" ", "  ", "   ", "\t", "\n", "\r\n", "\x0b", "\x0c", "\x85", "\u00a0", "\u1680",
              "\u2003", "\u2028", "\u2029", "\u202f", "\u205f", "\u3000"]
    not_spaces = ["\x00", "\x1c", "\x1f", "\x7f", "\u180e", "\u200b", "\u200d", "\u2060", "\ufeff",
                  "\ufffd", "\uffff", "\U0010ffff", "\ue000"]
    marks = ["\u0301", "\u0323", "\u0308", "\u0327", "\u0345", "\u0334", "\u3099", "\u09be",
             "\u0bd7", "\u0f71", "\u0f72", "\U0001d165", "\U0001d16d", "\ufe0f"]
    letters = ["a", "E", "é", "e\u0301", "ß", "ı", "λ", "ж", "ש", "ا", "क", "க", "ก", "中", "か", "가",
               "\u1100", "\u1161", "\u11a8", "각", "\uac00\u11a8", "ª", "ʰ", "ǅ", "\U00010400",
               "\u212b", "\u2126", "\u0344", "\u0958", "\u0f73", "\u1e69", "\uf900", "\ufb1d",
               "\U0002f800", "\U0001d15e", "\u0ccb", "\u1112\u1161\u11ab", "\u1112\u1175\u11c2", "\u1113\u1161",
               "\u1100\u1176", "\uac00\u11a7", "\uac01\u11a8", "\ud7a3", "\u1100\u1160"]
    numbers = ["7", "٣", "३", "²", "½", "Ⅷ", "①", "〇", "\U0001d7d8"]
    others = ["!", "'", "-", "—", "“", "€", "😀", "👍🏽", "\u0600", "_"]
    added = RAW + [token for token, _ in ADDED] + ["<cafe\u0301>", "u\u0323\u0308", "u\u0308\u0323"]
    contractions = ["'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'S", "'r", "'v", "'l", "''s"]

    strings = ["", *LINES]
    classes = [spaces, not_spaces, marks, letters, numbers, others, added, contractions]
    for one in (piece for group in classes for piece in group):
        strings += [one, "a" + one + "b", " " + one, one + one + " " + one, "3" + one + "!"]
    strings += [" " * n + "x" for n in range(1, 20)] + ["x" + " " * n for n in range(1, 20)]
    strings += [token[:-1] + "|" + token[:n] for token in added for n in range(1, len(token))]
    strings += ["a" * 1000, "ab" * 700, " " * 300, "e\u0301" * 300, "\u0323\u0301" * 200,
                "a" + "\u0301\u0323\u0345\u0334" * 100, "\u1100\u1161\u11a8" * 100, "'s" * 100]
    generator = random.Random(2)
    pieces = [piece for group in classes for piece in group]
    for _ in range(300):
        strings.append("".join(generator.choice(generator.choice(classes))
                               for _ in range(generator.randrange(1, 12))))
    for _ in range(100):
        strings.append("".join(generator.choice(pieces) for _ in range(30)))
    return strings


def packed(lists):
    """Several lists end to end, and where each ends."""
    flat, ends = [], []
    for items in lists:
        flat += items
        ends.append(len(flat))
    return flat, ends


def u32(name, numbers):
    return name, "u32", (len(numbers),), convert.PLAIN, struct.pack(f"<{len(numbers)}I", *numbers)


def main():
    from tokenizers import Tokenizer
    out = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else HERE / "fixtures")
    spec = tokenizer_json()
    vocab_size = max(entry["id"] for entry in spec["added_tokens"]) + 3     # with padding rows
    with tempfile.TemporaryDirectory() as directory:
        source = pathlib.Path(directory)
        # not \u escapes: the file is a fixture of the JSON reader's UTF-8 too
        (source / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False), "utf-8")
        make_model(source, vocab_size)
        model = out / "tokenizer.model.bin"
        model.unlink(missing_ok=True)
        convert.import_model(directory, str(model))
        tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))

    strings = test_strings()
    ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in strings]
    text, text_ends = packed(text.encode() for text in strings)
    flat, id_ends = packed(ids)
    convert.write_container(str(out / "tokenizer.expect.bin"), 5, [
        ("text", "u8", (len(text),), convert.PLAIN, bytes(text)), u32("text_ends", text_ends),
        u32("ids", flat), u32("id_ends", id_ends)])
    print(f"{len(strings)} strings, {len(text)} bytes, {len(flat)} ids")


if __name__ == "__main__":
    main()
