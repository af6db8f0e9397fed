/* Files that are damaged, hostile, or cannot be written. Each must be refused with a message that
   names the path and, where there is one, the entry; nothing may crash (run it with DEBUG=1), leak,
   or change what was there. Nor may anything when memory runs out. */
#include <stdint.h>
#include <stdlib.h>

static size_t allocations, allocations_allowed = SIZE_MAX;
static void *rationed_malloc(size_t bytes)
{
    return allocations++ < allocations_allowed ? malloc(bytes) : NULL;
}
#define DPO_MALLOC(bytes) rationed_malloc(bytes)
#define DPO_FREE(pointer) free(pointer)
#include "check.h"
#include <dirent.h>
#include <signal.h>
#include <sys/resource.h>

static dpo_context context;
static char path[CHECK_PATH_BYTES]; // of the file that the tests damage

/* ---- helpers ------------------------------------------------------------------------------------- */

static void write_bytes(const void *bytes, size_t n)
{
    FILE *stream = fopen(path, "wb");
    if (!stream || fwrite(bytes, 1, n, stream) != n || fclose(stream)) {
        perror(path);
        exit(1);
    }
}

/* A copy of a file in memory, to be damaged and written again. */
typedef struct image { unsigned char *bytes; size_t n; } image;

static image copy_file(const dpo_file *file)
{
    image copy = { malloc(file->bytes), file->bytes };
    memcpy(copy.bytes, file->map, file->bytes);
    return copy;
}

static dpoi_file_record get_record(const image *file, size_t i)
{
    dpoi_file_record record;
    memcpy(&record, file->bytes + sizeof(dpoi_file_header) + i * sizeof record, sizeof record);
    return record;
}

static void set_record(image *file, size_t i, const dpoi_file_record *record)
{
    memcpy(file->bytes + sizeof(dpoi_file_header) + i * sizeof *record, record, sizeof *record);
}

/* Makes every checksum right again, as somebody who means harm would. */
static void seal(image *file)
{
    dpoi_crc_table crc;
    dpoi_file_header header;
    dpoi_crc_fill(&crc);
    memcpy(&header, file->bytes, sizeof header);
    size_t table = header.n_entries * sizeof(dpoi_file_record);
    if (table > file->n - sizeof header) return;
    for (size_t i = 0; i < header.n_entries; i++) {
        dpoi_file_record record = get_record(file, i);
        if (record.offset <= file->n && record.bytes <= file->n - record.offset)
            record.crc = dpoi_crc(&crc, 0, file->bytes + record.offset, record.bytes);
        set_record(file, i, &record);
    }
    header.table_crc = dpoi_crc(&crc, 0, file->bytes + sizeof header, table);
    memcpy(file->bytes, &header, sizeof header);
}

/* Whether the file at `path` loads as a model. A failure must name the path and leave no memory
   behind; a model that loads must be usable. */
static int loads(const char *what, int verify)
{
    static const char text[] = "Hello <|endoftext|> w\xc3\xb6rld 12.\n";
    uint32_t tokens[] = { 0, 1, 0 };
    dpo_branch branch = { tokens, 3, 1 };
    dpo_example example = { .branches = &branch, .n_branches = 1 };
    dpo_score score;
    dpo_tokens ids = { 0 };
    dpo_string back = { 0 };
    dpo_model model;
    size_t heap = context.heap_bytes;
    context.error[0] = 0;
    if (dpo_model_load(&context, &model, path, &(dpo_model_options){ .no_verify = !verify })) {
        check(strstr(context.error, path) && context.heap_bytes == heap, "%s: the message does not name "
              "the file, or %zu bytes leak: %s", what, context.heap_bytes - heap, context.error);
        return 0;
    }
    check(!dpo_forward(&model, &score, &(dpo_batch){ &example, 1 }, 0), "%s: forward: %s", what,
          context.error);
    if (!dpo_tokenizer_encode(&context, &ids, &model.tokenizer, text, sizeof text - 1))
        check(!dpo_tokenizer_decode(&context, &back, &model.tokenizer, ids.ids, ids.n), "%s: decode", what);
    dpo_tokens_free(&context, &ids);
    dpo_string_free(&context, &back);
    dpo_model_free(&model);
    return 1;
}

__attribute__((format(printf, 2, 3)))
static void refused(const char *words, const char *format, ...)
{
    char what[300];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(what, sizeof what, format, arguments);
    va_end(arguments);
    int accepted = loads(what, 1);
    check(!accepted && strstr(context.error, words), "%s: the message does not say \"%s\": %s", what,
          words, accepted ? "it was accepted" : context.error);
}

/* Writes entries as a model that is sound as a container. */
static void write_entries(const dpo_entry *entries, size_t n)
{
    check_must(dpo_file_write(&context, path, DPO_FILE_MODEL, entries, n), &context);
}

/* The file with one entry changed. */
static void write_changed(const dpo_file *file, const char *name, dpo_entry changed)
{
    dpo_entry *entries = malloc(file->n_entries * sizeof *entries);
    memcpy(entries, file->entries, file->n_entries * sizeof *entries);
    for (size_t i = 0; i < file->n_entries; i++)
        if (!strcmp(entries[i].name, name)) entries[i] = changed;
    write_entries(entries, file->n_entries);
    free(entries);
}

static void open_fixture(dpo_file *file, const char *name)
{
    char from[CHECK_PATH_BYTES];
    snprintf(from, sizeof from, "tests/fixtures/%s.model.bin", name);
    check_must(dpo_file_open(&context, file, from, DPO_FILE_MODEL, 1), &context);
}

/* ---- the container -------------------------------------------------------------------------------- */

static void test_not_files(void)
{
    refused("No such file", "a missing file");
    write_bytes("", 0);
    refused("empty", "an empty file");
    write_bytes("{\"a\": 1}", 8);
    refused("not a dpo.h file", "JSON");
    unlink(path);
    if (mkdir(path, 0700)) perror(path);
    refused("not a file", "a directory");
    rmdir(path);
}

static void test_truncated(const dpo_file *file)
{
    image cut = copy_file(file);
    for (size_t i = 0; i < file->bytes; i += 32) {
        cut.n = i + i % 3;      // on and off the alignment
        write_bytes(cut.bytes, cut.n);
        refused("", "the first %zu bytes", cut.n);
        check(!loads("truncated", 0), "the first %zu bytes, unverified, were accepted", cut.n);
        if (cut.n < sizeof(dpoi_file_header)) continue;
        dpoi_file_header header;
        memcpy(&header, cut.bytes, sizeof header);
        header.file_bytes = cut.n;      // so that the header tells nothing
        memcpy(cut.bytes, &header, sizeof header);
        write_bytes(cut.bytes, cut.n);
        refused("", "the first %zu bytes with their length", cut.n);
    }
    cut.bytes = realloc(cut.bytes, file->bytes + 64);
    memcpy(cut.bytes, file->map, file->bytes);
    memset(cut.bytes + file->bytes, 0, 64);
    write_bytes(cut.bytes, file->bytes + 64);
    refused("added to", "a file that is too long");
    dpoi_file_header header;
    memcpy(&header, cut.bytes, sizeof header);
    header.file_bytes += 64;
    memcpy(cut.bytes, &header, sizeof header);
    write_bytes(cut.bytes, file->bytes + 64);
    refused("follow the last entry", "bytes behind the last entry");
    free(cut.bytes);
}

/* Which changed bytes of the table may pass when the checksum is right: what follows the end of a name,
   the layout and dimensions of what is no tensor, f16 said to be bf16, and names below tokenizer/. */
static int is_harmless(const dpoi_file_record *old, size_t place)
{
    if (place < DPO_NAME_BYTES) return place > strlen(old->name) || !strncmp(old->name, "tokenizer/", 10);
    if (place < 100) return old->dtype == DPO_F16 || old->dtype == DPO_BF16;
    if (place < 108) return old->dtype == DPO_U8 || old->dtype == DPO_U32;
    return 0;
}

static void test_flips(const dpo_file *file)
{
    static const unsigned char masks[] = { 0x01, 0x80, 0xff };
    image damaged = copy_file(file);
    size_t table_end = sizeof(dpoi_file_header) + file->n_entries * sizeof(dpoi_file_record);
    for (size_t i = 0; i < table_end; i++)
        for (size_t k = 0; k < sizeof masks; k++) {
            size_t entry = i < sizeof(dpoi_file_header) ? 0 : (i - 64) / sizeof(dpoi_file_record);
            dpoi_file_record old = get_record(&damaged, entry);
            char what[200];
            snprintf(what, sizeof what, "byte %zu (entry %s) changed by %02x", i, old.name, masks[k]);
            damaged.bytes[i] ^= masks[k];
            write_bytes(damaged.bytes, damaged.n);
            if (loads(what, 0)) check(0, "%s: accepted", what);
            if (i >= sizeof(dpoi_file_header) && (i - 64) % sizeof old - 108 > 3) { // not a checksum
                seal(&damaged);
                write_bytes(damaged.bytes, damaged.n);
                if (loads(what, 1) && !is_harmless(&old, (i - 64) % sizeof old))
                    check(0, "%s and sealed: accepted", what);
            }
            memcpy(damaged.bytes, file->map, table_end);
        }
    for (size_t i = 0; i < file->n_entries; i++) { // and each entry's data, without sealing
        size_t at = (size_t)((const char *)file->entries[i].data - (const char *)file->map);
        damaged.bytes[at + file->entries[i].bytes / 2] ^= 1;
        write_bytes(damaged.bytes, damaged.n);
        refused(file->entries[i].name, "damaged data of %s", file->entries[i].name);
        memcpy(damaged.bytes, file->map, file->bytes);
    }
    free(damaged.bytes);
}

static void test_table(const dpo_file *file)
{
    image damaged = copy_file(file);
    const dpoi_file_record first = get_record(&damaged, 1), second = get_record(&damaged, 2);
    const uint64_t big = (uint64_t)1 << 63;
    const struct { const char *what; uint64_t shape[2], offset, bytes; uint32_t n_dims; } cases[] = {
        { "entries that overlap", { second.shape[0], 1 }, first.offset, second.bytes, 1 },
        { "an entry off its alignment", { second.shape[0], 1 }, second.offset + 8, second.bytes, 1 },
        { "an entry behind the end", { second.shape[0], 1 }, big, second.bytes, 1 },
        { "an offset that overflows", { second.shape[0], 1 }, UINT64_MAX - 63, second.bytes, 1 },
        { "a shape without end", { UINT64_MAX, 1 }, second.offset, second.bytes, 1 },
        { "a shape that overflows to 0", { big, 2 }, second.offset, 0, 2 },
        { "bytes that overflow to the right number", { second.shape[0] + big / 2, 1 }, second.offset,
          second.bytes, 1 },
        { "a shape of its bytes that the file has not", { big / 8, 1 }, second.offset, big / 4, 1 },
        { "no elements", { 0, 1 }, second.offset, 0, 1 },
        { "three dimensions", { second.shape[0], 1 }, second.offset, second.bytes, 3 },
        { "a second dimension of a vector", { second.shape[0] / 2, 2 }, second.offset, second.bytes, 1 } };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        dpoi_file_record record = second;
        memcpy(record.shape, cases[i].shape, sizeof record.shape);
        record.offset = cases[i].offset;
        record.bytes = cases[i].bytes;
        record.n_dims = cases[i].n_dims;
        set_record(&damaged, 2, &record);
        seal(&damaged);
        write_bytes(damaged.bytes, damaged.n);
        refused("entry", "%s", cases[i].what);
    }
    dpoi_file_record twin = second;
    memcpy(twin.name, first.name, sizeof twin.name);
    set_record(&damaged, 2, &twin);
    seal(&damaged);
    write_bytes(damaged.bytes, damaged.n);
    refused(first.name, "a name twice");
    memset(twin.name, 'x', sizeof twin.name);
    set_record(&damaged, 2, &twin);
    seal(&damaged);
    write_bytes(damaged.bytes, damaged.n);
    refused("entry 2", "a name without end");

    dpoi_file_header header;
    for (uint32_t kind = 0; kind < 8; kind++) {
        memcpy(damaged.bytes, file->map, file->bytes);
        memcpy(&header, damaged.bytes, sizeof header);
        header.kind = kind;
        memcpy(damaged.bytes, &header, sizeof header);
        write_bytes(damaged.bytes, damaged.n);
        if (kind != DPO_FILE_MODEL) refused(dpoi_kind_name(kind), "kind %u", kind);
    }
    const uint32_t counts[] = { 0, 1, (uint32_t)file->n_entries - 1, (uint32_t)file->n_entries + 1,
                                20000, UINT32_MAX };
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++) {
        memcpy(damaged.bytes, file->map, file->bytes);
        memcpy(&header, damaged.bytes, sizeof header);
        header.n_entries = counts[i];
        header.table_end = sizeof header + counts[i] * sizeof(dpoi_file_record);
        memcpy(damaged.bytes, &header, sizeof header);
        seal(&damaged);
        write_bytes(damaged.bytes, damaged.n);
        refused("", "%u entries", counts[i]);
    }
    free(damaged.bytes);
}

/* An entry of more than one piece, as readers take it, with a part of one at the end. */
static void test_pieces(void)
{
    dpo_file file;
    dpo_entry entry = { .name = "data", .dtype = DPO_U8, .n_dims = 1, .bytes = 2 * DPOI_READ + 3,
                        .shape = { 2 * DPOI_READ + 3, 1 } };
    unsigned char *bytes = malloc(entry.bytes), *copy = calloc(entry.bytes, 1);
    for (size_t i = 0; i < entry.bytes; i++) bytes[i] = (unsigned char)dpo_random_u64(1, 0, i);
    entry.data = bytes;
    check_must(dpo_file_write(&context, path, DPO_FILE_TEST, &entry, 1), &context);
    check_must(dpo_file_open(&context, &file, path, DPO_FILE_TEST, 1), &context);
    dpoi_entry_copy(copy, &file.entries[0]);
    check(!memcmp(copy, bytes, entry.bytes), "the copy of a large entry is another");
    image damaged = copy_file(&file);
    dpo_file_close(&context, &file);
    for (size_t piece = 0; piece < 3; piece++) {
        unsigned char *byte = damaged.bytes + damaged.n - 1 - piece * DPOI_READ;
        *byte ^= 1;
        write_bytes(damaged.bytes, damaged.n);
        *byte ^= 1;
        check(dpo_file_open(&context, &file, path, DPO_FILE_TEST, 1) &&
              strstr(context.error, "the checksum of data is wrong"), "piece %zu: damage: %s", piece,
              context.error);
    }
    free(damaged.bytes);
    free(bytes);
    free(copy);
}

/* What no reader would take is not written, nor is anything but a file replaced or followed. */
static void test_refused_writes(void)
{
    static const char text[] = "12345678";
    const dpo_entry good = { .name = "data", .dtype = DPO_U8, .n_dims = 1, .bytes = 8, .shape = { 8, 1 },
                             .data = text };
    dpo_entry bad[7];
    for (size_t i = 0; i < 7; i++) bad[i] = good;
    bad[0].name[0] = 0;
    bad[1].bytes = 4;
    bad[2].dtype = (dpo_dtype)99;
    bad[3].n_dims = 3;
    bad[4].shape[1] = 2;
    bad[5].data = NULL;
    bad[6].layout = (dpo_layout)9;
    unlink(path);
    const dpo_entry twice[] = { good, good };
    check(dpo_file_write(&context, path, DPO_FILE_TEST, twice, 2) && strstr(context.error, "both called data"),
          "two of a name: %s", context.error);
    for (size_t i = 0; i < 7; i++) {
        const dpo_entry both[] = { good, bad[i] };
        check(dpo_file_write(&context, path, DPO_FILE_TEST, both, 2) &&
              strstr(context.error, "entry 1") && access(path, F_OK), "bad entry %zu: %s", i, context.error);
    }
    const dpo_entry nothing = { .name = "nothing", .dtype = DPO_F32, .n_dims = 2, .shape = { 4, 0 } };
    char temporary[CHECK_PATH_BYTES + 32], other[CHECK_PATH_BYTES];
    check_path(other, "other");
    snprintf(temporary, sizeof temporary, "%s.tmp-%ld", path, (long)getpid());
    FILE *stream = fopen(other, "w");
    check(stream && !fclose(stream) && !symlink(other, temporary), "cannot make a link");
    check_must(dpo_file_write(&context, path, DPO_FILE_TEST, &nothing, 1), &context);
    struct stat status;
    check(!stat(other, &status) && status.st_size == 0 && !lstat(path, &status) &&
          S_ISREG(status.st_mode), "a link in the temporary's place was followed");
    unlink(path);
    unlink(other);
    check(!mkfifo(path, 0600), "cannot make a pipe");
    dpo_file file;
    check(dpo_file_open(&context, &file, path, DPO_FILE_TEST, 1) && strstr(context.error, "is not a file"),
          "a pipe: %s", context.error);
    check(dpo_file_write(&context, path, DPO_FILE_TEST, &good, 1) && strstr(context.error, "is not a file"),
          "a pipe: %s", context.error);
    unlink(path);
}

/* ---- models ---------------------------------------------------------------------------------------- */

static void test_tensors(const dpo_file *file, const char *fixture)
{
    dpo_entry *entries = malloc((file->n_entries + 1) * sizeof *entries);
    size_t n = file->n_entries;
    for (size_t i = 0; i < n; i++) {
        const dpo_entry *entry = &file->entries[i];
        const char *name = entry->name;
        if (entry->dtype == DPO_U8 || entry->dtype == DPO_U32) continue; // not a tensor
        memcpy(entries, file->entries, i * sizeof *entries);
        memcpy(entries + i, file->entries + i + 1, (n - i - 1) * sizeof *entries);
        write_entries(entries, n - 1);
        if (!strstr(name, "slopes")) refused(name, "%s without %s", fixture, name);

        dpo_entry changed = *entry;
        changed.shape[0] = entry->shape[1];
        changed.shape[1] = entry->shape[0];
        changed.n_dims = 2;
        write_changed(file, name, changed);
        if (entry->shape[0] != entry->shape[1]) refused(name, "%s, transposed", name);
        changed = *entry;
        changed.shape[0] -= 1;
        changed.bytes -= entry->bytes / entry->shape[0];
        write_changed(file, name, changed);
        refused(name, "%s, a row short", name);
        changed = *entry;
        changed.layout = entry->layout == DPO_LINEAR ? DPO_CONV1D : DPO_LINEAR;
        write_changed(file, name, changed);
        refused(name, "%s in another layout", name);
        changed = *entry;
        changed.dtype = entry->dtype == DPO_F32 ? DPO_U32 : DPO_U8;
        changed.shape[0] *= entry->dtype == DPO_F32 ? 1 : 2;
        write_changed(file, name, changed);
        refused(name, "%s as integers", name);

        static const uint32_t bad[][2] = { { DPO_F32, 0x7f800000 }, { DPO_F32, 0xffc00001 },
            { DPO_F16, 0x7c00 }, { DPO_F16, 0xfe01 }, { DPO_BF16, 0xff80 }, { DPO_BF16, 0x7fc0 } };
        for (size_t k = 0; k < sizeof bad / sizeof *bad; k++) {
            if (bad[k][0] != entry->dtype) continue;
            size_t size = dpoi_dtype_bytes(entry->dtype);
            unsigned char *data = malloc(entry->bytes);
            memcpy(data, entry->data, entry->bytes);
            memcpy(data + entry->bytes - size, &bad[k][1], size); // little-endian
            changed = *entry;
            changed.data = data;
            write_changed(file, name, changed);
            refused(name, "%s with element %x", name, bad[k][1]);
            free(data);
        }
    }
    memcpy(entries, file->entries, n * sizeof *entries);
    entries[n] = file->entries[1];
    snprintf(entries[n].name, sizeof entries[n].name, "gpt_neox.layers.7.extra");
    write_entries(entries, n + 1);
    refused("gpt_neox.layers.7.extra", "a tensor too many");
    free(entries);
}

/* The config with the value of `key` replaced by `value`, or without the key when that is NULL. */
static void write_config(const dpo_file *file, const char *key, const char *value)
{
    const dpo_entry *config = dpo_file_find(file, "config");
    char text[2000], changed[2200], quoted[100];
    snprintf(text, sizeof text, "%.*s", (int)config->bytes, (const char *)config->data);
    snprintf(quoted, sizeof quoted, "\"%s\"", key);
    char *start = strstr(text, quoted), *end = start + strcspn(start, ",}");
    if (value)
        snprintf(changed, sizeof changed, "%.*s%s: %s%s", (int)(start - text), text, quoted, value, end);
    else
        snprintf(changed, sizeof changed, "%.*s\"other\": 1%s", (int)(start - text), text, end);
    dpo_entry entry = *config;
    entry.data = changed;
    entry.bytes = entry.shape[0] = strlen(changed);
    write_changed(file, "config", entry);
}

static void test_config(const dpo_file *file)
{
    for (const dpoi_field *field = dpoi_config_fields; field->name; field++) {
        static const char *const wrong[][6] = { // for each kind
            [DPOI_SIZE] = { "-1", "1.5", "1e300", "16777217", "true", "\"8\"" },
            [DPOI_REAL] = { "true", "\"1\"", "null", "[1]", "-1", "1e400" },
            [DPOI_FLAG] = { "1", "\"true\"", "null", "{}", "[]", "0.5" },
            [DPOI_ID] = { "-2", "0.5", "1e9", "null", "\"0\"", "true" },
            [DPOI_CHOICE] = { "\"\"", "\"nonsense\"", "0", "null", "true", "[\"gelu\"]" } };
        write_config(file, field->name, NULL);
        refused(field->name, "config without %s", field->name);
        for (size_t k = 0; k < 6; k++) {
            write_config(file, field->name, wrong[field->kind][k]);
            refused(strcmp(field->name, "context_length") ? "" : "context_length", "config with %s: %s",
                    field->name, wrong[field->kind][k]);
        }
    }
    static const char *const absurd[][3] = { // sound by itself, but not with the rest
        { "n_layers", "3", "layers" }, { "n_layers", "16777216", "layers" }, { "d_model", "13", "" },
        { "d_model", "24", "" }, { "n_heads", "5", "n_heads" }, { "vocab_size", "50", "" },
        { "vocab_size", "16777216", "" }, { "d_ff", "16777216", "" }, { "rotary_dims", "3", "rotary_dims" },
        { "rotary_dims", "64", "rotary_dims" }, { "position", "\"alibi\"", "" },
        { "activation", "\"swiglu\"", "" }, { "arch", "\"btlm\"", "" }, { "tied_head", "true", "" },
        { "eos_id", "49", "eos_id" }, { "norm_epsilon", "0", "norm_epsilon" } };
    size_t heap = context.heap_bytes;
    for (size_t i = 0; i < sizeof absurd / sizeof *absurd; i++) {
        context.heap_peak = 0;
        write_config(file, absurd[i][0], absurd[i][1]);
        refused(absurd[i][2], "config with %s: %s", absurd[i][0], absurd[i][1]);
        check(context.heap_peak < heap + 1000000, "config with %s: %s takes %zu bytes to refuse",
              absurd[i][0], absurd[i][1], context.heap_peak - heap);
    }
    static const char *const texts[] = { "", "{", "[]", "1", "{}", "null", "{\"arch\": \"gpt_neox\"",
                                         "{\"arch\": 1, \"arch\": 2}", "\xff\xfe", "{\"a\": 1} {}" };
    dpo_entry entry = *dpo_file_find(file, "config");
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        entry.data = texts[i];
        entry.bytes = entry.shape[0] = strlen(texts[i]);
        write_changed(file, "config", entry);
        refused("", "the config %s", texts[i]);
    }
    static char deep[20000];
    memset(deep, '[', sizeof deep);
    entry.data = deep;
    entry.bytes = entry.shape[0] = sizeof deep;
    write_changed(file, "config", entry);
    refused("nested", "a config of brackets");
    entry = *dpo_file_find(file, "config");
    snprintf(entry.name, sizeof entry.name, "file/config");
    write_changed(file, "config", entry);
    refused("config", "no config");
}

/* ---- tokenizer tables ------------------------------------------------------------------------------- */

static void test_tokenizer(const dpo_file *file)
{
    enum { INFO, ENDS, BYTES, IDS, MERGES, ADDED, LETTERS, NUMBERS, DECOMPOSITIONS, COMPOSITIONS,
           CLASSES, TABLES };
    static const char *const names[TABLES] = {
        "tokenizer/info", "tokenizer/token_ends", "tokenizer/token_bytes", "tokenizer/byte_ids",
        "tokenizer/merges", "tokenizer/added", "tokenizer/letters", "tokenizer/numbers",
        "tokenizer/decompositions", "tokenizer/compositions", "tokenizer/classes" };
    const uint32_t n_tokens = (uint32_t)dpo_file_find(file, names[ENDS])->shape[0];
    const struct { int table; size_t at; uint32_t value; } numbers[] = {
        { ENDS, 5, 0 }, { ENDS, 5, 5000000 }, { ENDS, n_tokens - 1, UINT32_MAX }, { IDS, 65, 0 },
        { IDS, 65, n_tokens }, { IDS, 65, UINT32_MAX - 1 }, { MERGES, 0, n_tokens },
        { MERGES, 1, UINT32_MAX }, { MERGES, 2, UINT32_MAX - 1 }, { MERGES, 5, 0 },
        { ADDED, 0, n_tokens }, { ADDED, 2, UINT32_MAX }, { LETTERS, 0, 0x110000 },
        { NUMBERS, 4, 0 }, { DECOMPOSITIONS, 3, 0 }, { COMPOSITIONS, 0, 0x10FFFF },
        { CLASSES, 0, UINT32_MAX }, { CLASSES, 2, 0 } };
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++) {
        const char *name = names[numbers[i].table];
        dpo_entry entry = *dpo_file_find(file, name);
        uint32_t *data = malloc(entry.bytes);
        memcpy(data, entry.data, entry.bytes);
        data[numbers[i].at] = numbers[i].value;
        entry.data = data;
        write_changed(file, name, entry);
        refused(name, "%s with number %zu %u", name, numbers[i].at, numbers[i].value);
        free(data);
    }
    for (int table = 0; table < TABLES; table++) {
        const dpo_entry *entry = dpo_file_find(file, names[table]);
        dpo_entry changed = *entry;
        snprintf(changed.name, sizeof changed.name, "file/elsewhere");
        write_changed(file, names[table], changed);
        // merges and added tokens are optional; without `info` there is no tokenizer
        if (table != MERGES && table != ADDED && table != INFO)
            refused("tokenizer", "no %s", names[table]);
        changed = *entry;
        if (entry->dtype != DPO_U32) continue;
        changed.dtype = DPO_F32;
        write_changed(file, names[table], changed);
        refused(names[table], "%s as floats", names[table]);
        changed = *entry;
        changed.n_dims = 2;
        changed.shape[1] = 4;
        changed.shape[0] = entry->bytes / 16;
        changed.bytes = entry->bytes / 16 * 16;
        write_changed(file, names[table], changed);
        refused(names[table], "%s of four columns", names[table]);
        changed = *entry;
        changed.shape[0] -= 1;
        changed.bytes -= entry->bytes / entry->shape[0];
        write_changed(file, names[table], changed);
        if (table == IDS) refused("tokenizer", "%s, a row short", names[table]);
    }
    static const char *const infos[] = { "", "[]", "{}", "{\"nfc\": true", "{\"n_tokens\": 3}" };
    dpo_entry info = *dpo_file_find(file, names[INFO]);
    for (size_t i = 0; i < sizeof infos / sizeof *infos; i++) {
        info.data = infos[i];
        info.bytes = info.shape[0] = strlen(infos[i]);
        write_changed(file, names[INFO], info);
        refused("tokenizer/", "tokenizer/info %s", infos[i]);
    }
}

/* ---- chance ---------------------------------------------------------------------------------------- */

/* A few bytes anywhere set to anything, all checksums right: it loads or it says why not. */
static void test_chance(const dpo_file *file, size_t trials, uint64_t seed)
{
    image damaged = copy_file(file);
    size_t refusals = 0, table_end = 64 + file->n_entries * sizeof(dpoi_file_record);
    for (uint64_t trial = 0; trial < trials; trial++) {
        size_t n = 1 + dpo_random_u64(seed, trial, 0) % 6;
        for (size_t i = 1; i <= n; i++) { // a third of them in the table
            uint64_t number = dpo_random_u64(seed, trial, i), value = number >> 40;
            size_t at = number % (i % 3 ? file->bytes : table_end);
            damaged.bytes[at] = (unsigned char)(value % 3 ? value >> 8 : value % 2 ? 0xff : 0);
        }
        seal(&damaged);
        write_bytes(damaged.bytes, damaged.n);
        char what[60];
        snprintf(what, sizeof what, "seed %d, trial %d", (int)seed, (int)trial);
        refusals += !loads(what, 1);
        memcpy(damaged.bytes, file->map, file->bytes);
    }
    check(refusals > trials / 10, "only %zu of %zu damaged files were refused", refusals, trials);
    free(damaged.bytes);
}

/* ---- reference caches -------------------------------------------------------------------------------- */

static const dpo_reference_key cache_key = { 1, 3, DPO_F32, 2, 4 };

static void cache_refused(const char *words, const char *what)
{
    double logp[4] = { 7, 7, 7, 7 };
    size_t heap = context.heap_bytes;
    check(dpo_reference_load(&context, path, &cache_key, logp, 3), "%s: accepted", what);
    check(strstr(context.error, path) && strstr(context.error, words), "%s: the message does not say "
          "\"%s\": %s", what, words, context.error);
    check(logp[0] == 7 && logp[3] == 7 && context.heap_bytes == heap, "%s: it left something", what);
}

static void test_reference(const dpo_file *model)
{
    double logp[6] = { -1, -2, -3, -4, -5, -6 };
    uint64_t key[5];
    memcpy(key, &cache_key, sizeof key);
    cache_refused("No such file", "a missing cache");
    static const char *const differ[] = { "another reference model", "another adapter",
        "another precision", "other data", "another truncation" };
    for (size_t i = 0; i < 5; i++) {
        dpo_reference_key other;
        key[i]++;
        memcpy(&other, key, sizeof other);
        key[i]--;
        check_must(dpo_reference_save(&context, path, &other, logp, 3), &context);
        cache_refused(differ[i], differ[i]);
    }
    check_must(dpo_reference_save(&context, path, &cache_key, logp, 2), &context);
    cache_refused("number of answers", "a cache of fewer answers");
    write_bytes(model->map, model->bytes);
    cache_refused("the kind \"model\"; \"reference cache\" is expected", "a model as cache");
    const dpo_entry good[] = {
        { .name = "key", .dtype = DPO_U64, .n_dims = 1, .shape = { 5, 1 }, .data = key, .bytes = 40 },
        { .name = "logp", .dtype = DPO_F64, .n_dims = 1, .shape = { 3, 1 }, .data = logp, .bytes = 24 } };
    const struct { const char *what; int entry; dpo_entry is; } bad[] = {
        { "no key", 0, { .name = "kez", .dtype = DPO_U64, .n_dims = 1, .shape = { 5, 1 }, .data = key,
                         .bytes = 40 } },
        { "a key of one number", 0, { .name = "key", .dtype = DPO_U64, .n_dims = 1, .shape = { 1, 1 },
                                      .data = key, .bytes = 8 } },
        { "logp in two columns", 1, { .name = "logp", .dtype = DPO_F64, .n_dims = 2, .shape = { 3, 2 },
                                      .data = logp, .bytes = 48 } },
        { "logp as f32", 1, { .name = "logp", .dtype = DPO_F32, .n_dims = 1, .shape = { 3, 1 },
                              .data = logp, .bytes = 12 } },
        { "no logp", 1, { .name = "log", .dtype = DPO_F64, .n_dims = 1, .shape = { 3, 1 }, .data = logp,
                          .bytes = 24 } } };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        dpo_entry entries[2] = { good[0], good[1] };
        entries[bad[i].entry] = bad[i].is;
        check_must(dpo_file_write(&context, path, DPO_FILE_REFERENCE, entries, 2), &context);
        cache_refused("", bad[i].what);
    }
}

/* ---- writing ---------------------------------------------------------------------------------------- */

static size_t files_in_directory(void)
{
    size_t n = 0;
    DIR *directory = opendir(check_directory);
    while (directory && readdir(directory)) n++;
    if (directory) closedir(directory);
    return n - 2; // . and ..
}

static void not_written(dpo_model *model, const char *to, const char *what)
{
    size_t heap = context.heap_bytes, files = files_in_directory();
    check(dpo_model_save(model, to, DPO_F32), "%s: it was written", what);
    check(strstr(context.error, to) != NULL, "%s: the message does not name the file: %s", what,
          context.error);
    check(context.heap_bytes == heap && files_in_directory() == files, "%s: something is left", what);
}

static void test_writing(const dpo_file *file)
{
    char other[CHECK_PATH_BYTES], below[CHECK_PATH_BYTES + 10];
    static char long_path[5000];
    dpo_model model = check_load(&context, "neox_f16");
    write_bytes("untouched", 9);
    snprintf(below, sizeof below, "%s/model.bin", path);
    not_written(&model, below, "a file as directory");
    check_path(other, "missing/model.bin");
    not_written(&model, other, "a missing directory");
    memset(long_path, 'x', sizeof long_path - 1);
    check(dpo_model_save(&model, long_path, DPO_F32), "a long path: written");
    check_path(other, "directory");
    if (mkdir(other, 0700)) perror(other);
    not_written(&model, other, "a directory as target");
    rmdir(other);

    // A full disk: files may grow to 4096 bytes. Neither a new file nor an old one's changes appear.
    struct rlimit limit, small;
    getrlimit(RLIMIT_FSIZE, &limit);
    small = limit;
    small.rlim_cur = 4096;
    signal(SIGXFSZ, SIG_IGN);
    setrlimit(RLIMIT_FSIZE, &small);
    check_path(other, "new.bin");
    not_written(&model, other, "a full disk");
    not_written(&model, path, "a full disk, over another file");
    double logp[1000] = { 0 };
    check(dpo_reference_save(&context, path, &cache_key, logp, 1000) && strstr(context.error, path),
          "a reference cache on a full disk");
    setrlimit(RLIMIT_FSIZE, &limit);
    check(files_in_directory() == 1, "a full disk leaves files");
    char text[20] = { 0 };
    FILE *stream = fopen(path, "rb");
    check(stream && fread(text, 1, sizeof text, stream) == 9 && !memcmp(text, "untouched", 9),
          "a failed write changed the file that was there");
    if (stream) fclose(stream);
    check(!dpo_model_save(&model, path, DPO_F32) && loads("written", 1), "the disk has room again: %s",
          context.error);
    // a saved model may replace the file that it came from and still has mapped
    dpo_model same;
    write_bytes(file->map, file->bytes);
    check_must(dpo_model_load(&context, &same, path, NULL), &context);
    check(!dpo_model_save(&same, path, DPO_F32) && loads("saved over itself", 1),
          "saving a model over its own file: %s", context.error);
    dpo_model_free(&same);
    dpo_model_free(&model);
}

/* ---- memory that runs out --------------------------------------------------------------------------- */

/* A short life of everything; nonzero if any of it failed. */
static int live(dpo_context *own, const char *data_path, const char *model_path)
{
    dpo_model model = { .context = own };
    dpo_data data = { 0 };
    dpo_optimizer adam = { 0 };
    dpo_string out = { 0 };
    dpo_score *scores = NULL;
    double logp[64] = { 0 }, dlogp[64] = { 1, -1 }, norm;
    size_t order[32];
    dpo_metrics metrics;
    dpo_memory plan;
    dpo_sampling sampling = { .max_new_tokens = 4, .temperature = 1, .top_k = 3, .top_p = 1 };
    dpo_data_options options = { .use = DPO_USE_PAIRS, .max_length = 30, .max_prompt_length = 20 };
    dpo_loss_options loss = { DPO_LOSS_SIGMOID, 0.1, 0 };
    dpo_plan_options planned = { .max_rows = 9, .max_scored = 9, .max_span = 9, .n_threads = 1 };
    int failed = dpo_context_init(own, 1);
    if (!failed) failed = dpo_model_load(own, &model, "tests/fixtures/tokenizer.model.bin", NULL);
    int loaded = !failed;
    if (!failed) failed = dpo_data_load(own, &data, data_path, &model.tokenizer, 0, &options);
    if (!failed) scores = calloc(2 * data.n, sizeof *scores);
    dpo_batch batch = { data.examples, data.n };
    failed = failed || dpo_data_shuffle(own, order, &data, 1) ||
             dpo_memory_plan(own, &plan, &model.config, &planned) ||
             dpo_score_examples(&model, scores, data.examples, data.n, 20) ||
             dpo_metrics_compute(own, &metrics, NULL, data.examples, scores, logp, data.n, &loss) ||
             dpo_reference_save(own, data_path, &cache_key, logp, 2 * data.n) ||
             dpo_reference_load(own, data_path, &cache_key, logp, 2 * data.n) ||
             dpo_model_zero_grad(&model) || dpo_forward(&model, scores, &batch, 1) ||
             dpo_backward(&model, &batch, dlogp) || dpo_grad_norm(&model, &norm) ||
             dpo_optimizer_init(&model, &adam, DPO_ADAMW) ||
             dpo_optimizer_step(&model, &adam, 1e-3, 1) ||
             dpo_model_save(&model, model_path, DPO_F32) ||
             dpo_generate(&model, &out, data.examples->prompt, 3, &sampling, NULL, NULL);
    if (loaded) {
        dpo_optimizer_free(&model, &adam);
        dpo_model_free(&model);
    }
    dpo_config config = { .vocab_size = 260, .context_length = 8, .d_model = 8, .n_layers = 1,
                          .n_heads = 1 };
    dpo_config_default(&config, DPO_BTLM);
    failed = failed || dpo_model_init(own, &model, &config, NULL, 1, NULL);
    if (!failed) {
        failed = dpo_model_save(&model, model_path, DPO_F32);
        dpo_model_free(&model);
    }
    dpo_data_free(own, &data);
    dpo_string_free(own, &out);
    dpo_context_free(own);
    free(scores);
    return failed;
}

static void test_memory(void)
{
    static const char pairs[] =
        "{\"prompt\": \"One and two \", \"chosen\": \"are three.\", \"rejected\": \"five\"}\n"
        "{\"prompt\": \"W\\u00f6rld\", \"chosen\": \"! <|endoftext\", \"rejected\": \"?\"}\n";
    char model_path[CHECK_PATH_BYTES], kept[CHECK_PATH_BYTES];
    dpo_context own;
    check_path(model_path, "model.bin");
    snprintf(kept, sizeof kept, "%s", path);
    snprintf(path, sizeof path, "%s/pairs.jsonl", check_directory);
    for (size_t allowed = 0; allowed < 5000; allowed++) {
        write_bytes(pairs, sizeof pairs - 1);
        allocations = 0;
        allocations_allowed = allowed;
        int failed = live(&own, path, model_path);
        allocations_allowed = SIZE_MAX;
        check(own.heap_bytes == 0, "%zu allocations: %zu bytes leak", allowed, own.heap_bytes);
        if (!failed) break;
        check(strstr(own.error, "memory") != NULL, "%zu allocations: %s", allowed, own.error);
    }
    check(allocations > 50 && allocations < 5000, "%zu allocations in all", allocations);
    unlink(model_path);
    unlink(path);
    memcpy(path, kept, sizeof path);
}

int main(void)
{
    dpo_file small, tokenizer, btlm;
    check_must(dpo_context_init(&context, 1), &context);
    check_path(path, "damaged.bin");
    open_fixture(&small, "neox_f16");
    open_fixture(&tokenizer, "tokenizer");
    open_fixture(&btlm, "btlm_stored_slopes");
    test_not_files();
    write_bytes(small.map, small.bytes);
    check(loads("the fixture", 1), "the fixture itself: %s", context.error);
    test_truncated(&small);
    test_flips(&small);
    test_table(&small);
    test_pieces();
    test_refused_writes();
    test_tensors(&small, "neox_f16");
    test_tensors(&btlm, "btlm_stored_slopes");
    test_config(&small);
    test_tokenizer(&tokenizer);
    test_chance(&small, 1500, 1);
    test_chance(&tokenizer, 500, 2);
    unlink(path);
    test_reference(&small);
    test_writing(&small);
    test_memory();
    unlink(path);
    check(!rmdir(check_directory), "files are left in %s", check_directory);
    dpo_file_close(&context, &small);
    dpo_file_close(&context, &tokenizer);
    dpo_file_close(&context, &btlm);
    dpo_context_free(&context);
    check(context.heap_bytes == 0, "%zu bytes were not freed", context.heap_bytes);
    return check_done();
}
