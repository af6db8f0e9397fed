/* Text: UTF-8, the tokenizer against Hugging Face's `tokenizers` (tests/make_tokenizer_fixture.py),
   JSON, JSON lines, the rules that make examples of records, and bad input to each of them. */
#include "check.h"
#include <inttypes.h>

static dpo_context context;
static char directory[] = "/tmp/dpo-test-XXXXXX", path[64];

/* Writes n bytes to a file of that name in the test's own directory; `path` is then its path. */
static void write_file(const char *name, const char *bytes, size_t n)
{
    snprintf(path, sizeof path, "%s/%s", directory, name);
    FILE *stream = fopen(path, "wb");
    if (!stream || fwrite(bytes, 1, n, stream) != n || fclose(stream)) exit(1);
}

/* A call must fail with a message that holds `wanted`. */
static void check_fails(int failed, const char *wanted, const char *what)
{
    check(failed && strstr(context.error, wanted), "%s: %s \"%s\" has no \"%s\"", what,
          failed ? "message" : "no failure;", failed ? context.error : "", wanted);
    context.error[0] = 0;
}

static int same(const dpo_string *string, const char *bytes, size_t n)
{
    return string->n == n && (n == 0 || !memcmp(string->bytes, bytes, n));
}

/* ---- UTF-8 ---- */

static void test_utf8(void)
{
    static const struct { const char *bytes, *shown; size_t bad; } cases[] = {
        { "", "", 0 }, { "abc", "abc", 3 }, { "\xC3\xA9", "\xC3\xA9", 2 },
        { "\xED\x9F\xBF\xEE\x80\x80\xF4\x8F\xBF\xBF", "\xED\x9F\xBF\xEE\x80\x80\xF4\x8F\xBF\xBF", 10 },
        { "a\x80z", "a\uFFFDz", 1 }, { "\xC0\xAF", "\uFFFD\uFFFD", 0 }, { "\xC1\xBF", "\uFFFD\uFFFD", 0 },
        { "\xE0\x9F\xBF", "\uFFFD\uFFFD\uFFFD", 0 }, { "\xED\xA0\x80", "\uFFFD\uFFFD\uFFFD", 0 },
        { "\xF0\x8F\xBF\xBF", "\uFFFD\uFFFD\uFFFD\uFFFD", 0 }, { "\xF5" "a", "\uFFFDa", 0 },
        { "\xF4\x90\x80\x80", "\uFFFD\uFFFD\uFFFD\uFFFD", 0 }, { "ok\xE4\xBD", "ok\uFFFD", 2 },
        { "\xF0\x9F\x98x", "\uFFFDx", 0 }, { "\xFF\xFE", "\uFFFD\uFFFD", 0 } };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        size_t n = strlen(cases[i].bytes);
        dpo_string string = { 0 };
        check_must(dpoi_string_append(&context, &string, cases[i].bytes, n), &context);
        check(dpoi_utf8_check(string.bytes, n) == cases[i].bad, "UTF-8 %zu: first bad byte", i);
        check_must(dpo_string_make_valid(&context, &string), &context);
        check(same(&string, cases[i].shown, strlen(cases[i].shown)), "UTF-8 %zu: made valid", i);
        dpo_string_free(&context, &string);
    }
    for (uint32_t code = 0; code < 0x110000; code++) {
        if (code - 0xD800 < 0x800) continue;
        dpo_string string = { 0 };
        size_t length;
        check_must(dpoi_utf8_append(&context, &string, code), &context);
        if (dpoi_utf8_read(string.bytes, string.n, &length) != code || length != string.n)
            check(0, "UTF-8: U+%04X does not come back", code);
        dpo_string_free(&context, &string);
    }
}

/* ---- tokenizer ---- */

static void test_vectors(const dpo_tokenizer *tokenizer)
{
    dpo_file expect;
    check_must(dpo_file_open(&context, &expect, "tests/fixtures/tokenizer.expect.bin",
                             DPO_FILE_TEST, 1), &context);
    const char *text = check_entry(&expect, "", "text")->data;
    const uint32_t *ids = check_entry(&expect, "", "ids")->data;
    const uint32_t *text_ends = check_entry(&expect, "", "text_ends")->data;
    const uint32_t *id_ends = check_entry(&expect, "", "id_ends")->data;
    size_t n = check_entry(&expect, "", "id_ends")->shape[0], start = 0, first = 0;
    dpo_tokens ours = { 0 }, again = { 0 };
    dpo_string back = { 0 };
    for (size_t i = 0; i < n; start = text_ends[i], first = id_ends[i++]) {
        size_t n_text = text_ends[i] - start, n_ids = id_ends[i] - first;
        int plain = 1;
        for (size_t j = start; j < text_ends[i]; j++) plain &= (unsigned char)text[j] < 0xCC;
        ours.n = again.n = back.n = 0;
        check_must(dpo_tokenizer_encode(&context, &ours, tokenizer, text + start, n_text), &context);
        check(ours.n == n_ids && (!n_ids || !memcmp(ours.ids, ids + first, n_ids * sizeof *ids)),
              "tokens of string %zu: \"%.*s\"", i, (int)n_text, text + start);
        check_must(dpo_tokenizer_decode(&context, &back, tokenizer, ours.ids, ours.n), &context);
        if (plain) check(same(&back, text + start, n_text), "string %zu is not decoded", i);
        else check(dpoi_utf8_check(back.bytes, back.n) == back.n, "string %zu, decoded", i);
    }
    check(n > 1000, "only %zu strings in the fixture", n);
    dpo_tokens_free(&context, &ours);
    dpo_tokens_free(&context, &again);
    dpo_string_free(&context, &back);
    dpo_file_close(&context, &expect);
}

static void test_byte_tokenizer(void)
{
    static const char text[] = "a\0<|endoftext|>\xC3\xA9<|endoftext|";
    dpo_tokenizer tokenizer;
    dpo_tokens ids = { 0 };
    dpo_string back = { 0 };
    check_must(dpo_tokenizer_load(&context, &tokenizer, NULL), &context);
    check_must(dpo_tokenizer_encode(&context, &ids, &tokenizer, text, sizeof text - 1), &context);
    check(ids.n == 17 && ids.ids[0] == 'a' && ids.ids[1] == 0 && ids.ids[2] == 256 &&
          ids.ids[3] == 0xC3 && ids.ids[4] == 0xA9 && ids.ids[5] == '<', "byte tokenizer");
    uint32_t unknown[] = { 257, 4000000000u };      // rows of a padded embedding
    check_must(dpo_tokenizer_decode(&context, &back, &tokenizer, ids.ids, ids.n) ||
               dpo_tokenizer_decode(&context, &back, &tokenizer, unknown, 2), &context);
    check(same(&back, text, sizeof text - 1), "byte tokenizer, decoded");
    check_fails(dpo_tokenizer_encode(&context, &ids, &tokenizer, "ab\xFFz", 4), "byte 3", "bad byte");
    check(ids.n == 17, "a failed call leaves what was there");
    dpo_tokenizer none = { 0 };
    check_fails(dpo_tokenizer_encode(&context, &ids, &none, "a", 1), "no tokenizer", "no tokenizer");
    dpo_tokens_free(&context, &ids);
    dpo_string_free(&context, &back);
    dpo_tokenizer_free(&context, &tokenizer);
}

/* Where the words end, as GPT-2's pattern has it; tokens alone would not show every cut. */
static void test_words(const dpo_tokenizer *tokenizer)
{
    static const char *const cases[] = {        // words, with | between them
        "don|'t", "'s|'t|'re|'ve|'m|'ll|'d", "'|S", "'|r", "a| '|s", "!'|s", "they|'ll|l", "'re",
        "a| b|  | c", "a|\n\n|\n|b", "a| |\n|b", "a|\t|b", " | b", "   ", "a|   ", " ", "12|ab|34",
        " 12| ab|!?| !?_|a", "é|\u00b2\u2460|x", "e|\u0301", "\u4f60\u597d|\u3002", "a|\u200b|b",
        "a|\x1c|b", "a|\u180e|b", "a|\xC2\x85|b", "a|\u00a0|b", "a|\u1680|b", "a|\u2000|b",
        "a|\u200a|b", "a|\u2028|b", "a|\u2029|b", "a|\u202f|b", "a|\u205f|b", "a|\u3000|b",
        "!|\xC2\x85|!", "!|\u00a0|!", "!|\u1680|!", "!|\u2000|!", "!|\u200a|!", "!|\u2028|!", "!|\u2029|!",
        "!|\u202f|!", "!|\u205f|!", "!|\u3000|!", "!\u200b!", "!\x1f!", "!\u180e!", "!|\x0b|!", "!|\x0c|!",
        "!|\r|!", " |\u00a0|a", "\u00a0| a" };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        char text[64];
        size_t n = 0, end = 0;
        for (const char *c = cases[i]; *c; c++) if (*c != '|') text[n++] = *c;
        for (const char *c = cases[i]; *c; c += *c == '|') {
            const char *start = c;
            while (*c && *c != '|') c++;
            size_t length = dpoi_word(tokenizer, text + end, n - end);
            if (!check(length == (size_t)(c - start), "words of \"%s\" at %zu", cases[i], end)) break;
            end += length;
        }
    }
}

/* One number of one table changed: the file must be refused, by the name of the table. */
static void test_hostile_tables(const dpo_file *good)
{
    static const struct { const char *name; size_t index; uint32_t value; const char *wanted; } bad[] = {
        { "token_ends", 0, 0x7FFFFFFF, "token_ends" }, { "token_ends", 300, 0, "token_ends" },
        { "token_ends", 3, 0xFFFFFFFF, "token_ends" }, { "byte_ids", 'a', 0xFFFFFFFE, "byte_ids" },
        { "byte_ids", 'a', 0, "byte_ids" }, { "merges", 0, 0xFFFFFFFF, "merges" },
        { "merges", 4, 1000000, "merges" }, { "merges", 5, 70, "merges" },
        { "added", 0, 0xFFFFFFFF, "added" }, { "letters", 0, 0xFFFFFFFF, "letters" },
        { "numbers", 4, 0, "numbers" }, { "decompositions", 6, 0, "decompositions" },
        { "compositions", 3, 0, "compositions" }, { "classes", 2, 0, "classes" } };
    size_t n_bad = sizeof bad / sizeof bad[0];
    for (size_t i = 0; i < n_bad + good->n_entries; i++) {
        dpo_entry *entries = calloc(good->n_entries, sizeof *entries);
        uint32_t *changed = NULL;
        size_t n = 0;
        const char *wanted = i < n_bad ? bad[i].wanted : "tokenizer";
        int tokenizer_entry = i < n_bad;
        for (size_t j = 0; j < good->n_entries; j++) {
            dpo_entry *entry = &entries[n];
            *entry = good->entries[j];
            int is_tokenizer = !strncmp(entry->name, "tokenizer/", 10);
            if (i == n_bad + j) {                           // or the whole table left out
                tokenizer_entry = is_tokenizer && strcmp(entry->name, "tokenizer/info") &&
                    strcmp(entry->name, "tokenizer/added") && strcmp(entry->name, "tokenizer/merges") &&
                    strcmp(entry->name, "tokenizer/numbers") && strcmp(entry->name, "tokenizer/classes") &&
                    strcmp(entry->name, "tokenizer/compositions");
                continue;
            }
            if (i < n_bad && is_tokenizer && !strcmp(entry->name + 10, bad[i].name)) {
                changed = malloc(entry->bytes);
                memcpy(changed, entry->data, entry->bytes);
                changed[bad[i].index] = bad[i].value;
                entry->data = changed;
            }
            n++;
        }
        dpo_file file;
        dpo_tokenizer tokenizer;
        write_file("hostile.bin", "", 0);
        check_must(dpo_file_write(&context, path, DPO_FILE_MODEL, entries, n), &context);
        check_must(dpo_file_open(&context, &file, path, DPO_FILE_MODEL, 1), &context);
        int failed = dpo_tokenizer_load(&context, &tokenizer, &file);
        if (tokenizer_entry) check_fails(failed, wanted, i < n_bad ? bad[i].name : "table left out");
        if (!failed) {
            dpo_tokens ids = { 0 };
            if (tokenizer.n_tokens)     // without merges, say: other tokens, but no harm
                check_must(dpo_tokenizer_encode(&context, &ids, &tokenizer, "the e\u0301\u1100  2", 13),
                           &context);
            dpo_tokens_free(&context, &ids);
            dpo_tokenizer_free(&context, &tokenizer);
        }
        dpo_file_close(&context, &file);
        free(changed);
        free(entries);
    }
}

static void test_tokenizer(void)
{
    dpo_file file;
    dpo_tokenizer tokenizer;
    check_must(dpo_file_open(&context, &file, "tests/fixtures/tokenizer.model.bin", DPO_FILE_MODEL, 1),
               &context);
    check_must(dpo_tokenizer_load(&context, &tokenizer, &file), &context);
    const dpo_entry *info = dpo_file_find(&file, "tokenizer/info");
    char text[256];
    snprintf(text, sizeof text, "%.*s", (int)info->bytes, (const char *)info->data);
    check(tokenizer.nfc && strstr(text, "\"14.0.0\""), "tables of Unicode 14: %s", text);
    test_vectors(&tokenizer);
    test_words(&tokenizer);
    test_hostile_tables(&file);
    dpo_tokenizer_free(&context, &tokenizer);
    dpo_file_close(&context, &file);
}

/* ---- JSON ---- */

static void test_json(void)
{
    static const char good[] = " {\"a\" : [1, -0.5e+2, true,false,null, {}, []],\r\n\t\"b\\u0041\":"
        "\"\\\"\\\\\\/\\b\\f\\n\\r\\t\\u00e9\\ud83d\\ude00\\u0000\\uD800x\\udc00\\ud800\\u0041\", "
        "\"\":{\"a\":\"\xE4\xBD\xA0\"} } ";
    static const char string[] = "\"\\/\b\f\n\r\t\u00e9\U0001F600\0\uFFFDx\uFFFD\uFFFDA";
    dpo_json json = { 0 };
    dpo_string quoted = { 0 };
    check_must(dpo_json_parse(&context, &json, good, sizeof good - 1, "good"), &context);
    const dpo_json_value *a = dpo_json_member(&json, json.values, "a");
    const dpo_json_value *b = dpo_json_member(&json, json.values, "bA");
    const dpo_json_value *c = dpo_json_member(&json, json.values, "");
    check(a && a->kind == DPO_JSON_ARRAY && b && b->kind == DPO_JSON_STRING && c &&
          c->kind == DPO_JSON_OBJECT && !dpo_json_member(&json, json.values, "c") &&
          !dpo_json_member(&json, a, "a"), "JSON members");
    static const dpo_json_kind kinds[] = { DPO_JSON_NUMBER, DPO_JSON_NUMBER, DPO_JSON_BOOL,
        DPO_JSON_BOOL, DPO_JSON_NULL, DPO_JSON_OBJECT, DPO_JSON_ARRAY };
    static const double numbers[] = { 1, -50, 1, 0, 0, 0, 0 };
    size_t n = 0;
    for (size_t i = a->first_child; i; i = json.values[i].next, n++)
        check(n < 7 && json.values[i].kind == kinds[n] && json.values[i].number == numbers[n],
              "JSON element %zu", n);
    check(n == 7, "JSON: %zu elements", n);
    check(b->n_string == sizeof string - 1 &&
          !memcmp(json.text.bytes + b->string, string, sizeof string - 1), "JSON escapes");

    check_must(dpo_json_quote(&context, &quoted, string, sizeof string - 1) ||
               dpo_json_parse(&context, &json, quoted.bytes, quoted.n, "quoted"), &context);
    check(json.values[0].n_string == sizeof string - 1 &&
          !memcmp(json.text.bytes + json.values[0].string, string, sizeof string - 1), "quoted string");
    dpo_string_free(&context, &quoted);

    static const struct { const char *text, *wanted; } bad[] = {
        { "", "ends" }, { "  ", "ends" }, { "{", "string" }, { "[1,", "ends" }, { "[1,]", "value" },
        { "{\"a\":1,}", "string" }, { "{\"a\" 1}", "':'" }, { "{a:1}", "string" }, { "[1 2]", "','" },
        { "{\"a\":1 \"b\":2}", "','" }, { "1 2", "follows" }, { "{}x", "follows" }, { "\"ab", "ends" },
        { "\"a\nb\"", "control" }, { "\"\\x\"", "escape" }, { "\"\\", "escape" }, { "\"\\u12g4\"", "hexa" },
        { "\"\\ud83d\\uZZZZ\"", "hexa" }, { "01", "follows" }, { "-", "digit" }, { "1.", "digit" },
        { ".5", "value" }, { "1e", "digit" }, { "+1", "value" }, { "1e999", "represented" },
        { "NaN", "value" }, { "Infinity", "value" }, { "nul", "value" }, { "True", "value" },
        { "'a'", "value" }, { "// c\n1", "value" }, { "\"\xFF\"", "byte 2: not UTF-8" },
        { "\"\xED\xA0\x80\"", "not UTF-8" }, { "{\"a\":1,\"b\":2,\"a\":3}", "twice" },
        { "{\"\\u0061\":1,\"a\":3}", "twice" }, { "]", "value" }, { "[}", "value" } };
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++)
        check_fails(dpo_json_parse(&context, &json, bad[i].text, strlen(bad[i].text), "here"),
                    bad[i].wanted, bad[i].text);
    check_fails(dpo_json_parse(&context, &json, "\"a\0b\"", 5, "here"), "control", "NUL");
    char nested[200];
    memset(nested, '[', 100);
    memset(nested + 100, ']', 100);
    check_must(dpo_json_parse(&context, &json, nested + 36, 128, "deep"), &context);
    check_fails(dpo_json_parse(&context, &json, nested + 35, 130, "here"), "64", "too deep");
    dpo_json_free(&context, &json);
}

static void test_jsonl(void)
{
    static const char lines[] = "\xEF\xBB\xBF{\"n\":1}\n\n  \t\r\n{\"n\":2}\r\n{\"n\":3}";
    dpo_jsonl reader;
    int found;
    write_file("lines.jsonl", lines, sizeof lines - 1);
    check_must(dpo_jsonl_open(&context, &reader, path), &context);
    static const size_t numbers[] = { 1, 4, 5 };
    for (size_t i = 0; i < 3; i++) {
        check_must(dpo_jsonl_next(&context, &reader, &found), &context);
        const dpo_json_value *n = found ? dpo_json_member(&reader.json, reader.json.values, "n") : NULL;
        check(n && n->number == (double)(i + 1) && reader.line == numbers[i], "JSON lines, record %zu", i);
    }
    check(!dpo_jsonl_next(&context, &reader, &found) && !found, "JSON lines: the end");
    dpo_jsonl_close(&context, &reader);

    size_t n_long = 3000000;
    char *text = malloc(n_long);
    memset(text, 'x', n_long);
    memcpy(text, "{\"a\":\"", 6);
    memcpy(text + n_long - 2, "\"}", 2);
    write_file("long.jsonl", text, n_long);
    check_must(dpo_jsonl_open(&context, &reader, path) || dpo_jsonl_next(&context, &reader, &found),
               &context);
    check(found && reader.json.values[1].n_string == n_long - 8, "a line of 3 MB");
    dpo_jsonl_close(&context, &reader);
    free(text);

    static const struct { const char *text, *wanted; } bad[] = {
        { "{}\n[1]\n", "lines.jsonl:2: an object" }, { "\n{\"a\":}\n", "lines.jsonl:2: byte 6: a value" },
        { "{}\n{}\n{\"a\":\"\x80\"}", "lines.jsonl:3: byte 7: not UTF-8" }, { "{\"a\":", "lines.jsonl:1" },
        { "{\n\"a\":1}\n", "lines.jsonl:1" }, { "{}{}\n", "follows" } };
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        write_file("lines.jsonl", bad[i].text, strlen(bad[i].text));
        check_must(dpo_jsonl_open(&context, &reader, path), &context);
        int failed = 0;
        for (found = 1; !failed && found;) failed = dpo_jsonl_next(&context, &reader, &found);
        check_fails(failed, bad[i].wanted, bad[i].text);
        dpo_jsonl_close(&context, &reader);
    }
    check_fails(dpo_jsonl_open(&context, &reader, "/nowhere/a.jsonl"), "/nowhere/a.jsonl", "no file");
    check_must(dpo_jsonl_open(&context, &reader, directory), &context);
    check_fails(dpo_jsonl_next(&context, &reader, &found), "cannot be read", "a directory");
    dpo_jsonl_close(&context, &reader);
}

/* ---- examples ---- */

/* With the byte tokenizer a token is a byte, and the end token 256. */
static dpo_tokenizer bytes;
enum { END = 256 };

static int load(dpo_data *data, const char *name, const char *text, dpo_data_options options)
{
    if (text) write_file(name, text, strlen(text));
    return dpo_data_load(&context, data, path, &bytes, END, &options);
}

/* Whether tokens are those of a text, where '$' stands for the end token. */
static int spells(const uint32_t *tokens, size_t n, const char *text)
{
    if (n != strlen(text)) return 0;
    for (size_t i = 0; i < n; i++)
        if (tokens[i] != (text[i] == '$' ? (uint32_t)END : (unsigned char)text[i])) return 0;
    return 1;
}

/* Checks example i: prompt, then its branches ('$' the end token). */
static void check_example(const dpo_data *data, size_t i, const char *prompt, const char *first,
                          const char *second)
{
    if (!check(i < data->n, "there is no example %zu", i)) return;
    const dpo_example *e = &data->examples[i];
    check(spells(e->prompt, e->n_prompt, prompt), "prompt %zu is not \"%s\"", i, prompt);
    check(e->n_branches == (second ? 2 : 1) && spells(e->branches[0].tokens, e->branches[0].n, first) &&
          (!second || spells(e->branches[1].tokens, e->branches[1].n, second)),
          "branches %zu are not \"%s\" and \"%s\"", i, first, second ? second : "");
    for (size_t b = 0; b < e->n_branches; b++)
        check(e->branches[b].first_scored == (e->n_prompt == 0), "first scored token of %zu", i);
}

#define PAIR(prompt, chosen, rejected) \
    "{\"prompt\":\"" prompt "\",\"chosen\":\"" chosen "\",\"rejected\":\"" rejected "\"}\n"
#define HH(chosen, rejected) "{\"chosen\":\"" chosen "\",\"rejected\":\"" rejected "\"}\n"

static const dpo_data_options pairs = { DPO_USE_PAIRS, 12, 6, 0, 0 };
static const dpo_data_options sft = { DPO_USE_SFT, 12, 6, 0, 0 };
static const dpo_data_options wide = { DPO_USE_PAIRS, 200, 100, 0, 0 };

static void test_pairs(void)
{
    dpo_data data;
    check_must(load(&data, "p.jsonl",
                    "{\"extra\":[1],\"chosen\":\" b\",\"prompt\":\"p\",\"rejected\":\" c\"}\n"
                    PAIR("q", "x", "x") PAIR("p", "d", "e") PAIR("p", "", "e") PAIR("p", "e", "")
                    PAIR("a<|endoftext|>", "b", "c") PAIR("a", "b<|endoftext|>", "c") PAIR("", "ab", "c"),
                    pairs), &context);
    check_example(&data, 0, "p", " b$", " c$");
    check_example(&data, 1, "q", "x$", "x$");
    check_example(&data, 2, "p", "d$", "e$");
    check_example(&data, 3, "", "ab$", "c$");
    check(data.n == 4 && data.n_groups == 3 && data.examples[0].group == 0 &&
          data.examples[1].group == 1 && data.examples[2].group == 0 && data.examples[3].group == 2,
          "groups of pairs");
    check(data.counts.records == 8 && data.counts.ties == 1 && data.counts.empty_answers == 2 &&
          data.counts.end_token_inside == 2 && data.counts.cut_prompts == 0 &&
          data.counts.cut_answers == 0 && data.counts.repeated_prompts == 0, "counts of pairs");
    check(dpo_example_rows(&data.examples[0]) == 1 + 2 + 2 && dpo_example_rows(&data.examples[3]) == 3,
          "rows of an example");
    check(dpo_micro_batch(data.examples, 4, 5) == 1 && dpo_micro_batch(data.examples, 4, 8) == 2 &&
          dpo_micro_batch(data.examples, 4, 1) == 1 && dpo_micro_batch(data.examples, 4, 100) == 4 &&
          dpo_micro_batch(data.examples, 0, 100) == 0, "micro-batches");
    uint64_t hash = data.hash;
    dpo_data_free(&context, &data);

    // The hash is of tokens and arrangement: the same file again, then one letter, then one border.
    static const char *const texts[] = { PAIR("ab", "cd", "e"), PAIR("ab", "cd", "f"),
                                         PAIR("abc", "d", "e"), PAIR("ab", "c", "de") };
    uint64_t hashes[5] = { hash };
    for (size_t i = 0; i < 4; i++) {
        check_must(load(&data, "p.jsonl", texts[i], pairs), &context);
        hashes[i + 1] = data.hash;
        dpo_data_free(&context, &data);
        check_must(load(&data, "p.jsonl", texts[i], pairs), &context);
        check(data.hash == hashes[i + 1], "the hash of the same data");
        dpo_data_free(&context, &data);
        for (size_t j = 0; j <= i; j++) check(hashes[j] != hashes[i + 1], "hashes of %zu, %zu", j, i);
    }

    dpo_data_options limited = pairs;
    limited.limit = 1;
    check_must(load(&data, "p.jsonl", PAIR("p", "", "r") PAIR("p", "c", "r") PAIR("q", "c", "r"), limited),
               &context);
    check(data.n == 1 && data.counts.records == 2, "limit");
    dpo_data_free(&context, &data);
}

static void test_truncation(void)
{
    dpo_data data;          // max_length 12, max_prompt_length 6
    static const char text[] = PAIR("01234567", "abc", "de")            // 12 tokens: fits
        PAIR("01234567", "abcd", "e") PAIR("0123", "abcdefghij", "k")   // one too many; only the answer
        PAIR("01234567", "abcdefghij", "klmnopqrst") PAIR("0123456", "abcde", "abcdeX")
        PAIR("0123456", "abcdef", "abcdefX");
    check_must(load(&data, "t.jsonl", text, pairs), &context);
    check_example(&data, 0, "01234567", "abc$", "de$");
    check_example(&data, 1, "234567", "abcd$", "e$");
    check_example(&data, 2, "0123", "abcdefgh", "k$");
    check_example(&data, 3, "234567", "abcdef", "klmnop");
    check_example(&data, 4, "123456", "abcde$", "abcdeX");
    check_example(&data, 5, "123456", "abcdef", "abcdef");              // equal after the cut
    check(data.counts.cut_prompts == 4 && data.counts.cut_answers == 6 && data.counts.ties == 1,
          "counts of cut prompts %zu, answers %zu, ties %zu", data.counts.cut_prompts,
          data.counts.cut_answers, data.counts.ties);
    check(data.n_groups == 3 && data.examples[1].group == data.examples[3].group,
          "cut prompts are grouped by the whole");
    dpo_data_free(&context, &data);

    dpo_data_options keep_start = pairs;
    keep_start.keep_start = 1;
    check_must(load(&data, "t.jsonl", text, keep_start), &context);
    check_example(&data, 1, "012345", "abcd$", "e$");
    check_example(&data, 3, "012345", "abcdef", "klmnop");
    dpo_data_free(&context, &data);
}

static void test_transcripts(void)
{
    dpo_data data;
    static const char text[] =
        HH("\\n\\nHuman: a\\n\\nAssistant: b\\n\\nHuman: c\\n\\nAssistant: d",
           "\\n\\nHuman: a\\n\\nAssistant: b\\n\\nHuman: c\\n\\nAssistant: e")
        HH("\\n\\nHuman: a\\n\\nAssistant: b", "\\n\\nHuman: A\\n\\nAssistant: b")
        HH("\\n\\nHuman: a\\n\\nAssistant: b", "\\n\\nHuman: a") HH("Assistant: no turn", "x")
        HH("\\n\\nHuman: a\\n\\nAssistant: b", "\\n\\nHuman: a\\n\\nAssistant:");
    check_must(load(&data, "h.jsonl", text, wide), &context);
    check_example(&data, 0, "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:", " d$", " e$");
    check(data.n == 1 && data.counts.records == 5 && data.counts.prompts_differ == 2 &&
          data.counts.no_prompt == 1 && data.counts.empty_answers == 1, "counts of transcripts");
    dpo_data_free(&context, &data);
}

static void test_sft(void)
{
    dpo_data data;
    check_must(load(&data, "s.jsonl", PAIR("p", "1", "x") PAIR("q", "2", "x") PAIR("p", "345", "x")
                    PAIR("", "66", "x") PAIR("", "77", "x") PAIR("p", "", "x") PAIR("q", "8", ""), sft),
               &context);
    check_example(&data, 0, "p", "345$", NULL);     // the last answer at the first one's place
    check_example(&data, 1, "q", "8$", NULL);
    check_example(&data, 2, "", "66$", NULL);
    check_example(&data, 3, "", "77$", NULL);
    check(data.n == 4 && data.n_groups == 4 && data.counts.repeated_prompts == 2 &&
          data.counts.empty_answers == 1, "counts of SFT on pairs");
    dpo_data_free(&context, &data);

    check_must(load(&data, "s.jsonl", "{\"prompt\":\"p\",\"completion\":\"1\"}\n{\"prompt\":\"p\","
                    "\"completion\":\"2\"}\n{\"prompt\":\"\",\"completion\":\"abcdefghijklmno\"}\n", sft),
               &context);
    check_example(&data, 0, "p", "1$", NULL);
    check_example(&data, 1, "p", "2$", NULL);
    check_example(&data, 2, "", "abcdefghijkl", NULL);
    check(data.n == 3 && data.n_groups == 2 && data.counts.cut_answers == 1, "counts of completions");
    dpo_data_free(&context, &data);
}

static void test_text_windows(void)
{
    dpo_data data;
    dpo_data_options text = { DPO_USE_TEXT, 4, 256, 0, 0 };
    static const char lines[] = "{\"text\":\"abcdef\"}\n{\"text\":\"\"}\n{\"text\":\"gh\"}\n";
    check_must(load(&data, "t.jsonl", lines, text), &context);     // abcdef$gh$
    check_example(&data, 0, "", "abcde", NULL);
    check_example(&data, 1, "", "ef$gh", NULL);
    check_example(&data, 2, "", "h$", NULL);
    check(data.n == 3 && data.n_groups == 3 && data.counts.bytes == 8 && data.counts.records == 3 &&
          data.counts.empty_answers == 1 && data.counts.cut_answers == 0, "counts of text");
    dpo_data_free(&context, &data);

    check_must(load(&data, "t.txt", "\xEF\xBB\xBF" "abcdefg<|endoftext|>", text), &context);
    check_example(&data, 0, "", "abcde", NULL);
    check_example(&data, 1, "", "efg$$", NULL);     // nothing is left to predict after the last
    check(data.n == 2 && data.counts.records == 1 && data.counts.bytes == 7, "a plain file");
    dpo_data_free(&context, &data);

    text.limit = 1;
    check_must(load(&data, "t.jsonl", lines, text), &context);
    check_example(&data, 0, "", "abcde", NULL);
    check(data.n == 1 && data.counts.bytes == 5, "text with a limit: %zu bytes", data.counts.bytes);
    dpo_data_free(&context, &data);
    check_must(load(&data, "t.txt", "abc<|endoftext|>defghijklmno<|endoftext|>pq", text), &context);
    check_example(&data, 0, "", "abc$d", NULL);
    check(data.counts.bytes == 4, "end tokens and a limit: %zu bytes", data.counts.bytes);
    dpo_data_free(&context, &data);

    text = (dpo_data_options){ DPO_USE_SFT, 4, 2, 0, 0 };
    check_must(load(&data, "t.jsonl", lines, text), &context);
    check(data.n == 3, "SFT on text");
    dpo_data_free(&context, &data);
    check_must(load(&data, "t.txt", "ab", text), &context);
    check_example(&data, 0, "", "ab$", NULL);
    dpo_data_free(&context, &data);
    check_must(load(&data, "t.jsonl", "{\"prompt\":\"zz\",\"text\":\"ab\"}\n", text), &context);
    check_example(&data, 0, "", "ab$", NULL);       // a field of other kinds is none of text's
    dpo_data_free(&context, &data);
    check_must(load(&data, "t.txt", "a {\n{", text), &context);
    dpo_data_free(&context, &data);
    static const char *const names[] = { "t.ndjson", "t.JSONL", "T.Json" };
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        check_must(load(&data, names[i], lines, text), &context);
        check(data.counts.records == 3, "%s is read as JSON lines", names[i]);
        dpo_data_free(&context, &data);
    }
}

static void test_shuffle(void)
{
    dpo_data data;
    static const char text[] = PAIR("a", "1", "x") PAIR("b", "1", "x") PAIR("a", "2", "x")
        PAIR("c", "1", "x") PAIR("d", "1", "x") PAIR("b", "2", "x") PAIR("a", "3", "x");
    check_must(load(&data, "s.jsonl", text, pairs), &context);
    size_t order[7], again[7], orders = 0;
    int seen_first[4] = { 0 };
    uint32_t last = 0;
    for (uint64_t seed = 0; seed < 100; seed++) {
        check_must(dpo_data_shuffle(&context, order, &data, seed) ||
                   dpo_data_shuffle(&context, again, &data, seed), &context);
        int used[7] = { 0 }, ok = !memcmp(order, again, sizeof order);
        for (size_t i = 0; i < 7; i++) {
            ok &= order[i] < 7 && !used[order[i]];
            if (ok) used[order[i]] = 1;
            // within a group file order, and a group's members follow each other
            if (ok && i && data.examples[order[i]].group == data.examples[order[i - 1]].group)
                ok &= order[i] > order[i - 1];
            else if (ok && i)
                for (size_t j = 0; j < i; j++)
                    ok &= data.examples[order[j]].group != data.examples[order[i]].group;
        }
        check(ok, "shuffle with seed %" PRIu64, seed);
        if (!ok) break;
        seen_first[data.examples[order[0]].group]++;
        orders += order[0] != last;
        last = (uint32_t)order[0];
    }
    check(seen_first[0] > 10 && seen_first[1] > 10 && seen_first[2] > 10 && seen_first[3] > 10 && orders > 40,
          "every group comes first: %d %d %d %d", seen_first[0], seen_first[1], seen_first[2], seen_first[3]);
    dpo_data_free(&context, &data);
}

static void test_bad_data(void)
{
    static const dpo_data_options text = { DPO_USE_TEXT, 12, 6, 0, 0 };
    static const struct { const dpo_data_options *options; const char *text, *wanted; } bad[] = {
        { &pairs, "", "d.jsonl: no records" }, { &pairs, "\n \n", "no records" },
        { &pairs, "{\"prompt\":\"a\",\"chosen\":\"b\"}\n", "d.jsonl:1: a record of an unknown kind" },
        { &pairs, "{\"rejected\":\"b\"}\n", "unknown kind" },
        { &sft, "{\"prompt\":\"b\"}\n", "unknown kind" },
        { &sft, "\xFF\xFE{", "d.jsonl:1: UTF-16" }, { &sft, "[{\"text\":\"b\"}]\n", "an object {...}" },
        { &sft, "{\"completion\":\"b\"}\n", "unknown kind" },
        { &pairs, "{\"prompt\":3,\"chosen\":\"b\",\"rejected\":\"c\"}\n", "\"prompt\" is not a string" },
        { &pairs, "{\"chosen\":[{\"role\":\"user\"}],\"rejected\":\"c\"}\n", "d.jsonl:1: \"chosen\" is not" },
        { &pairs, "{\"prompt\":\"a\",\"chosen\":\"b\",\"rejected\":null}\n", "\"rejected\" is not" },
        { &text, "{\"text\":1}\n", "\"text\" is not a string" },
        { &pairs, "{\"q\":\"a\"}\n", "unknown kind" }, { &text, PAIR("a", "b", "c"), "text is read" },
        { &pairs, "{\"text\":\"a\"}\n", "d.jsonl:1: a record of an unknown" },
        { &pairs, "{\"prompt\":\"a\",\"completion\":\"b\"}\n", "preferences are read" },
        { &pairs, PAIR("a", "b", "c") HH("a", "b"), "d.jsonl:2: a record of another kind" },
        { &sft, PAIR("a", "b", "c") "{\"text\":\"a\"}\n", "d.jsonl:2" },
        { &pairs, PAIR("a", "b", "c") "{\"prompt\":\n", "d.jsonl:2" },
        { &pairs, "[{\"prompt\":\"a\"}]\n", "an object" },
        { &pairs, PAIR("a", "", "c") HH("x", "y"), "d.jsonl:2" },
        { &pairs, PAIR("a", "", "c") PAIR("a<|endoftext|>", "b", "c"), "none of 2 records" },
        { &pairs, HH("x", "y"), "1 have no" }, { &pairs, PAIR("a", "b", "\xC3"), "not UTF-8" },
        { &text, "{\"text\":\"\"}\n", "none of 1" } };
    dpo_data data;
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++)
        check_fails(load(&data, "d.jsonl", bad[i].text, *bad[i].options), bad[i].wanted, bad[i].text);
    check_fails(load(&data, "d.txt", "ab\xFF", text), "d.txt: byte 3", "plain text that is not UTF-8");
    check_fails(load(&data, "d.txt", "", text), "d.txt: no records", "an empty file");
    check_fails(load(&data, "d.txt", "\xEF\xBB\xBF \r\n\t" PAIR("a", "b", "c"), sft),
                "d.txt: looks like JSON lines", "pairs as plain text");
    check_fails(load(&data, "d.txt", "{}", text), "ends in .jsonl", "JSON lines as plain text");
    check_fails(load(&data, "d.json", "[\n{\"text\":\"a\"}]\n", text), "d.json:1", "a JSON array");

    dpo_data_options options = pairs;
    options.max_prompt_length = 12;
    check_fails(load(&data, "d.jsonl", PAIR("a", "b", "c"), options), "max-prompt-length 12", "lengths");
    options.max_length = 1;
    check_fails(load(&data, "d.jsonl", NULL, options), "max-length 1", "lengths");
    check_fails(dpo_data_load(&context, &data, path, &bytes, 257, &pairs), "end token", "end token");
    dpo_tokenizer none = { 0 };
    check_fails(dpo_data_load(&context, &data, path, &none, 0, &pairs), "tokenizer", "no tokenizer");
    snprintf(path, sizeof path, "%s", "/nowhere/x.txt");
    check_fails(load(&data, NULL, NULL, text), "/nowhere/x.txt: cannot be opened", "missing text");
    check_fails(load(&data, NULL, NULL, pairs), "/nowhere/x.txt: cannot be opened", "missing pairs");
    snprintf(path, sizeof path, "%s", directory);
    check_fails(load(&data, NULL, NULL, text), "cannot be read", "a directory as text");
    check_fails(load(&data, NULL, NULL, pairs), "cannot be read", "a directory as pairs");
}

int main(void)
{
    if (!mkdtemp(directory) || dpo_context_init(&context, 1)) return 1;
    size_t heap = context.heap_bytes;
    test_utf8();
    test_tokenizer();
    test_byte_tokenizer();
    test_json();
    test_jsonl();
    check_must(dpo_tokenizer_load(&context, &bytes, NULL), &context);
    test_pairs();
    test_truncation();
    test_transcripts();
    test_sft();
    test_text_windows();
    test_shuffle();
    test_bad_data();
    dpo_tokenizer_free(&context, &bytes);
    check(context.heap_bytes == heap, "%zu bytes were not freed", context.heap_bytes - heap);
    dpo_context_free(&context);
    static const char *const names[] = { "hostile.bin", "lines.jsonl", "long.jsonl", "p.jsonl", "t.jsonl",
                                         "h.jsonl", "s.jsonl", "t.txt", "d.jsonl", "d.txt", "d.json",
                                         "t.ndjson", "t.JSONL", "T.Json" };
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        snprintf(path, sizeof path, "%s/%s", directory, names[i]);
        remove(path);
    }
    check(!rmdir(directory), "files are left in %s", directory);
    return check_done();
}
