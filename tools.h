/* tools.h: what train.c and eval.c share: options and help, errors, progress, tables, CSV files.
   Not part of the library: everything here may print, and exits when something is wrong.
   Results go to stdout, everything else to stderr. Exit status 1: failed; 2: wrong usage.
   Include it after dpo.h. */
#ifndef TOOLS_H
#define TOOLS_H

#include <ctype.h>
#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static const char *tool_name = "";  // "train dpo": starts every error message
static int bar_on_screen;           // a progress bar stands on the terminal's last line

/* ---- messages -------------------------------------------------------------------------------- */

static inline void clear_bar(void)
{
    if (bar_on_screen) fputs("\r\033[K", stderr);
    bar_on_screen = 0;
}

__attribute__((format(printf, 1, 2)))
static inline void say(const char *format, ...)
{
    va_list arguments;
    clear_bar();
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fputc('\n', stderr);
}

__attribute__((noreturn))
static inline void stop(int status, const char *format, va_list arguments)
{
    fflush(stdout);
    clear_bar();
    fprintf(stderr, "%s: ", tool_name);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    exit(status);
}

__attribute__((noreturn, format(printf, 1, 2)))
static inline void fail(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    stop(1, format, arguments);
}

__attribute__((noreturn, format(printf, 1, 2)))
static inline void usage_fail(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    stop(2, format, arguments);
}

static const char *remedy = "";     // what ends errors of the library and of tables: what to do

/* Passes on a failure of the library. */
static inline void check(const dpo_context *context, int status)
{
    if (status) fail("%s%s", context->error, remedy);
}

static inline void *allocate(size_t n, size_t size)
{
    void *p = calloc(n ? n : 1, size);
    if (!p) fail("out of memory: %zu elements of %zu bytes", n, size);
    return p;
}

/* Output that did not reach its file (a full disk, a closed pipe) must not look like success. */
static inline void finish_stdout(void)
{
    if (fflush(stdout) || ferror(stdout))
        fail("cannot write to standard output: %s", strerror(errno));
}

/* Up to here every whole number is a double, which is all that JSON's readers promise. */
#define MAX_JSON_WHOLE (0x1p53 - 1)

/* ---- options: one table drives parsing, help and the record in config.json ------------------- */

typedef enum {
    OPTION_SIZE,    // size_t
    OPTION_BYTES,   // size_t, written as 500M or 8G (powers of 1000)
    OPTION_REAL,    // double
    OPTION_TEXT,    // const char *
    OPTION_LIST,    // text_list; may be given several times
    OPTION_CHOICE,  // int: position in argument's "a|b|c"; -1 is "not given"
    OPTION_FLAG     // int: 1 if given
} option_kind;

typedef struct text_list { const char *texts[16]; size_t n; } text_list;

typedef struct option {
    unsigned commands;      // bits of the commands that have it
    char letter;            // short form, or 0
    const char *name;
    option_kind kind;
    void *value;            // holds the default until parse_options
    const char *argument;   // what help calls the value; of a choice, the choices
    const char *help;
    double low, high;       // accepted numbers; of bytes any, and both are 0
    int required;           // 2: except with --resume, whose run has it
} option;

/* Rows of the table. */
#define COUNT(who, name, value, low, high, help) \
    {who, 0, name, OPTION_SIZE, value, "N", help, low, high, 0}
#define REAL(who, name, value, low, high, help) \
    {who, 0, name, OPTION_REAL, value, "X", help, low, high, 0}
#define CHOICE(who, name, value, choices, help) \
    {who, 0, name, OPTION_CHOICE, value, choices, help, 0, 0, 0}
#define TEXT(who, letter, name, value, argument, required, help) \
    {who, letter, name, OPTION_TEXT, value, argument, help, 0, 0, required}
#define LIST(who, name, value, help) {who, 0, name, OPTION_LIST, value, "TEXT", help, 0, 0, 0}
#define FLAG(who, name, value, help) {who, 0, name, OPTION_FLAG, value, NULL, help, 0, 0, 0}
#define BYTES(who, name, value, help) {who, 0, name, OPTION_BYTES, value, "BYTES", help, 0, 0, 0}

/* Bit 0 is the first command. */
typedef struct tool_command { const char *name, *synopsis, *help; } tool_command;

static inline int find_choice(const char *choices, const char *text)
{
    size_t length = strlen(text);
    for (int i = 0; *choices; i++) {
        size_t n = strcspn(choices, "|");
        if (n == length && !strncmp(choices, text, n)) return i;
        choices += n + (choices[n] == '|');
    }
    return -1;
}

/* The i-th of "a|b|c" with its length: print with %.*s. */
static inline const char *choice_text(const char *choices, int i, int *length)
{
    while (i-- > 0) choices += strcspn(choices, "|") + 1;
    *length = (int)strcspn(choices, "|");
    return choices;
}

/* The shortest decimal that reads back as x. */
static inline const char *real_text(char text[32], double x)
{
    for (int digits = 6; digits <= 17; digits++) {
        snprintf(text, 32, "%.*g", digits, x);
        if (strtod(text, NULL) == x) break;
    }
    return text;
}

/* An end of a range as people write it: 1000000, not 1e+06. */
static inline const char *limit_text(char text[32], double x)
{
    if (x != floor(x)) return real_text(text, x);
    snprintf(text, 32, "%.0f", x);
    return text;
}

static inline void parse_value(const option *o, const char *text)
{
    char *end, low[32], high[32];
    double number = 0, scale = 1;
    int choice;
    switch (o->kind) {
    case OPTION_TEXT: *(const char **)o->value = text; return;
    case OPTION_LIST: {
        text_list *list = o->value;
        if (list->n == sizeof list->texts / sizeof *list->texts)
            usage_fail("--%s was given more than %zu times", o->name, list->n);
        list->texts[list->n++] = text;
        return;
    }
    case OPTION_CHOICE:
        choice = find_choice(o->argument, text);
        if (choice < 0) usage_fail("--%s must be one of %s, not '%s'", o->name, o->argument, text);
        *(int *)o->value = choice;
        return;
    default: break;
    }
    int digit = isdigit((unsigned char)text[0]);
    if (o->kind == OPTION_SIZE) {
        unsigned long long n = strtoull(text, &end, 10);
        number = (double)n;
        *(size_t *)o->value = (size_t)n;
    } else {
        number = strtod(text, &end);
        digit |= strchr("+-.", text[0]) != NULL;
        if (o->kind == OPTION_BYTES && *end && strchr("KMGT", *end)) {
            scale = pow(1000, 1 + (double)(strchr("KMGT", *end) - "KMGT"));
            end++;
        }
    }
    const int is_number = digit && end != text && !*end && !isnan(number);
    if (o->kind == OPTION_BYTES) {
        if (!is_number || number < 0)
            usage_fail("--%s must be a size like 500M or 8G, not '%s'", o->name, text);
        if (number * scale >= 0x1p63)
            usage_fail("--%s %s is more than any machine has", o->name, text);
    } else if (!is_number || number < o->low || number > o->high) {
        usage_fail("--%s must be a %s from %s to %s, not '%s'", o->name,
                   o->kind == OPTION_SIZE ? "whole number" : "number", limit_text(low, o->low),
                   limit_text(high, o->high), text);
    }
    if (o->kind == OPTION_REAL) *(double *)o->value = number;
    if (o->kind == OPTION_BYTES) *(size_t *)o->value = (size_t)(number * scale);
}

/* Edits (insert, delete, replace) that turn a into b. */
static inline size_t edit_distance(const char *a, const char *b)
{
    size_t row[64], n = strlen(b);
    if (n > 63) return 64;
    for (size_t j = 0; j <= n; j++) row[j] = j;
    for (size_t i = 0; a[i]; i++) {
        size_t diagonal = row[0];
        row[0] = i + 1;
        for (size_t j = 0; j < n; j++) {
            size_t best = diagonal + (a[i] != b[j]);
            diagonal = row[j + 1];
            if (row[j] + 1 < best) best = row[j] + 1;
            if (diagonal + 1 < best) best = diagonal + 1;
            row[j + 1] = best;
        }
    }
    return row[n];
}

static inline void print_default(FILE *out, const option *o)
{
    char text[32];
    int length;
    switch (o->kind) {
    case OPTION_SIZE: case OPTION_BYTES: fprintf(out, " [%zu]", *(size_t *)o->value); break;
    case OPTION_REAL: fprintf(out, " [%s]", real_text(text, *(double *)o->value)); break;
    case OPTION_TEXT:
        if (*(const char **)o->value) fprintf(out, " [%s]", *(const char **)o->value);
        break;
    case OPTION_CHOICE:
        if (*(int *)o->value < 0) break;
        const char *choice = choice_text(o->argument, *(int *)o->value, &length);
        fprintf(out, " [%.*s]", length, choice);
        break;
    default: break;
    }
}

/* Prints the options of a command with the defaults that hold now, and exits. */
__attribute__((noreturn))
static inline void print_help(const tool_command *c, unsigned bit, const option *options, size_t n)
{
    int n_program = (int)strcspn(tool_name, " ");
    printf("usage: ./%.*s %s\n%s\n\n", n_program, tool_name, c->synopsis, c->help);
    for (const option *o = options; o < options + n; o++) {
        if (!(o->commands & bit)) continue;
        char left[160];
        int n_left = o->letter ? snprintf(left, sizeof left, "-%c, ", o->letter)
                               : snprintf(left, sizeof left, "    ");
        n_left += snprintf(left + n_left, sizeof left - (size_t)n_left, "--%s %s", o->name,
                           o->argument ? o->argument : "");
        printf("  %-34s", left);
        if (n_left > 33) printf("\n%36s", "");
        fputs(o->help, stdout);
        if (o->required)
            fputs(o->required == 2 ? " (required, except with --resume)" : " (required)", stdout);
        print_default(stdout, o);
        putchar('\n');
    }
    printf("      --help                        print this\n\n"
           "--name=value is --name value. Of numbers, choices and flags the last one counts;\n"
           "a second file or text is refused, unless the option may be repeated.\n");
    finish_stdout();
    exit(0);
}

/* What other programs call options of ours, and what is to be said after ours. (PEFT's lora-dropout
   is ours too, but other trainers of preferences take it, and this one does not.) */
static const struct { const char *name, *ours, *more; } foreign_names[] = {
    {"lr", "learning-rate", ""}, {"num-train-epochs", "epochs", ""},
    {"bf16", "dtype", " bf16"}, {"precision", "dtype", ""}, {"ref-model", "reference", ""},
    {"lora-dropout", "lora-dropout", " (dpo trains without: leave it out)"},
    {"resume-from-checkpoint", "resume", " -o DIR"},
    {"per-device-train-batch-size", "batch-size", ""},
    {"gradient-accumulation-steps", "batch-size",
        ", the whole update; --micro-tokens cuts it into passes"},
};

/* Says of a long option that this command has not what may have been meant, and exits: ours for
   another program's, the same of another command, the only one that begins so, or the nearest by
   its letters. */
__attribute__((noreturn))
static inline void explain_unknown(const char *word, const tool_command *c, unsigned bit,
                                   const option *options, size_t n)
{
    char name[64], others[128] = "";
    const int length = (int)strcspn(word, "=");
    const char *ours = name, *more = "";
    const option *nearest = NULL, *begun = NULL;
    size_t distance = SIZE_MAX, used = 0, n_begun = 0;
    snprintf(name, sizeof name, "%.*s", length - 2, word + 2);
    for (char *p = name; *p; p++) if (*p == '_') *p = '-';      // as Python's programs have it
    for (size_t i = 0; i < sizeof foreign_names / sizeof *foreign_names; i++) {
        if (strcmp(foreign_names[i].name, name)) continue;
        ours = foreign_names[i].ours;
        more = foreign_names[i].more;
    }
    for (const option *o = options; o < options + n; o++) {
        const size_t d = edit_distance(name, o->name);
        const int is_ours = !strcmp(ours, o->name);
        if (o->commands & bit) {
            if (is_ours && ours != name)
                usage_fail("no option %.*s; here it is --%s%s", length, word, ours, more);
            if (d < distance) { distance = d; nearest = o; }
            if (!strncmp(name, o->name, strlen(name))) { begun = o; n_begun++; }
        } else if (is_ours) {
            const tool_command *other = c;
            for (unsigned b = bit; b > 1; b >>= 1) other--;     // the first command
            for (unsigned b = 1; b && b <= o->commands && used < sizeof others; b <<= 1, other++)
                if (o->commands & b)
                    used += (size_t)snprintf(others + used, sizeof others - used, "%s%.*s %s",
                                             used ? ", " : "", (int)strcspn(tool_name, " "),
                                             tool_name, other->name);
        }
    }
    if (used && ours != name)
        usage_fail("no option %.*s; in %s it is --%s%s", length, word, others, ours, more);
    if (used) usage_fail("no option %.*s; it is one of %s", length, word, others);
    if (n_begun == 1) { nearest = begun; distance = 0; }
    if (nearest && distance <= 1 + strlen(name) / 3)
        usage_fail("no option %.*s; did you mean --%s?", length, word, nearest->name);
    usage_fail("no option %s; try ./%s --help", word, tool_name);
}

static inline int is_help(const char *word)
{
    return !strcmp(word, "--help") || !strcmp(word, "-h");
}

/* Whether a word looks like an option: --name, or a letter without a value. */
static inline int has_option_form(const char *word)
{
    return word[0] == '-' && (word[1] == '-' || strlen(word) == 2);
}

/* The command's option that a word names (--name, --name=value, -l, -lvalue), or NULL. */
static inline const option *find_option(const char *word, unsigned bit, const option *options,
                                        size_t n)
{
    const int is_long = word[0] == '-' && word[1] == '-';
    if (word[0] != '-' || !word[1]) return NULL;
    for (const option *o = options; o < options + n; o++)
        if ((o->commands & bit) && (is_long ? strlen(o->name) == strcspn(word + 2, "=") &&
                                    !strncmp(o->name, word + 2, strlen(o->name))
                                            : o->letter == word[1])) return o;
    return NULL;
}

/* Whether a word is an option of this command, and so not the value of the one before it. */
static inline int is_option(const char *word, unsigned bit, const option *options, size_t n)
{
    return has_option_form(word) && (is_help(word) || find_option(word, bit, options, n));
}

/* Reads argv[2..]; `bit` is the command's. Every option may be --name value or --name=value. A
   second file or text is refused, not put in place of the first: the two may have been meant to add
   up. */
static inline void parse_options(int argc, char **argv, const tool_command *c, unsigned bit,
                                 const option *options, size_t n)
{
    const option *end = options + n;
    char given[n];
    memset(given, 0, n);
    for (int i = 2; i < argc; i++) {
        const char *word = argv[i], *value = NULL, *next = i + 1 < argc ? argv[i + 1] : NULL;
        if (is_help(word)) print_help(c, bit, options, n);
        if (word[0] != '-' || !word[1])
            usage_fail("'%s' is no option; try ./%s --help", word, tool_name);
        const int is_long = word[1] == '-';
        const option *found = find_option(word, bit, options, n);
        if (!found && is_long) explain_unknown(word, c, bit, options, n);
        if (!found) usage_fail("no option %s; try ./%s --help", word, tool_name);
        if (is_long && strchr(word, '=')) value = strchr(word, '=') + 1;
        if (!is_long && word[2] == '=')
            usage_fail("%s: write -%c VALUE or --%s=VALUE", word, word[1], found->name);
        if (!is_long && word[2]) value = word + 2;
        if (found->kind == OPTION_FLAG) {
            if (value) usage_fail("--%s takes no value", found->name);
            *(int *)found->value = 1;
            continue;
        }
        if (!value && !next) usage_fail("--%s needs a value", found->name);
        if (!value && is_option(next, bit, options, n))
            usage_fail("--%s needs a value before %s (if that is the value, write --%s=%s)",
                       found->name, next, found->name, next);
        if (found->kind == OPTION_TEXT && given[found - options]++)
            usage_fail("--%s was given twice; %s", found->name, strstr(found->name, "data")
                       ? "join the files with cat" : "give it once");
        if (!value) i++;
        parse_value(found, value ? value : next);
    }
    for (const option *o = options; o < end; o++) {
        const char *text = o->kind == OPTION_TEXT ? *(const char **)o->value : "";
        if ((o->commands & bit) && o->required && (!text || !*text))
            usage_fail("--%s is missing; try ./%s --help", o->name, tool_name);
    }
}

/* The command that argv[1] names, or help and the end; *bit gets its bit. */
static inline const tool_command *find_command(int argc, char **argv, const tool_command *commands,
                                               size_t n, unsigned *bit)
{
    int help = argc > 1 && is_help(argv[1]);
    for (size_t i = 0; i < n && argc > 1; i++) {
        *bit = 1u << i;
        if (!strcmp(argv[1], commands[i].name)) return &commands[i];
    }
    if (argc > 1 && !help) fprintf(stderr, "%s: no command '%s'\n", tool_name, argv[1]);
    for (size_t i = 0; i < n; i++)
        fprintf(help ? stdout : stderr, "  ./%s %s\n      %s\n", tool_name, commands[i].synopsis,
                commands[i].help);
    fprintf(help ? stdout : stderr, "Each has --help.\n");
    exit(help ? 0 : 2);
}

/* ---- files and the machine ------------------------------------------------------------------- */

static inline int path_exists(const char *path)
{
    struct stat status;
    return stat(path, &status) == 0;
}

static inline char *path_join(const char *directory, const char *name)
{
    char *path = allocate(strlen(directory) + strlen(name) + 2, 1);
    sprintf(path, "%s/%s", directory, name);
    return path;
}

/* The name of a file until it is complete. */
static inline char *temporary_path(const char *path)
{
    char *temporary = allocate(strlen(path) + 32, 1);
    sprintf(temporary, "%s.tmp-%ld", path, (long)getpid());
    return temporary;
}

static inline int is_directory(const char *path)
{
    struct stat status;
    return stat(path, &status) == 0 && S_ISDIR(status.st_mode);
}

/* A path as a shell takes it, in commands that are printed to be pasted. */
static inline const char *shell_path(const char *path)
{
    static const char plain[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
                                "0123456789_./-";
    if (!path[strspn(path, plain)]) return path;
    char *quoted = allocate(4 * strlen(path) + 3, 1), *end = quoted;
    *end++ = '\'';
    for (; *path; path++) end += sprintf(end, *path == '\'' ? "'\\''" : "%c", *path);
    *end = '\'';
    return quoted;
}

/* The file in a run directory, or NULL. */
static inline char *run_file(const char *directory, const char *name)
{
    char *path = path_join(directory, name);
    if (path_exists(path)) return path;
    free(path);
    return NULL;
}

/* What an argument of a command line names: the word after --name or its letter, also as
   --name=word; the last if there are several, as parse_options has it, and NULL without one. For
   what must be known before options are read. */
static inline const char *given_value(int argc, char **argv, const char *name, char letter)
{
    const char *value = NULL;
    size_t n = strlen(name);
    for (int i = 2; i < argc; i++) {
        const char *word = argv[i], *next = i + 1 < argc ? argv[i + 1] : "";
        if (word[0] == '-' && word[1] == letter && letter) value = word[2] ? word + 2 : next;
        if (strncmp(word, "--", 2) || strncmp(word + 2, name, n)) continue;
        if (word[2 + n] == '=') value = word + 3 + n;
        if (!word[2 + n]) value = next;
    }
    return value;
}

/* `name` is what messages call it: of a temporary file, what it will be. */
static inline FILE *create_file(const char *path, const char *name)
{
    FILE *file = fopen(path, "wx");     // x: never over an existing file
    if (!file) fail("cannot create %s: %s; choose another place", name, strerror(errno));
    return file;
}

static inline void close_file(FILE *file, const char *path)
{
    int failed = ferror(file);
    if (fclose(file) || failed) fail("cannot write %s: %s", path, strerror(errno));
}

/* Finds out at once, and not after hours of computing, whether a file can be made. */
static inline void check_can_make(const char *path)
{
    if (path_exists(path)) fail("%s exists already; nothing was changed", path);
    char *temporary = temporary_path(path);
    FILE *file = create_file(temporary, path);
    remove(temporary);      // before anything can fail
    close_file(file, path);
    free(temporary);
}

/* A table. With a target it is written under a temporary path and renamed when it is complete. */
typedef struct csv { FILE *file; const char *path, *target; int cells; } csv;

/* Opens a file of an interrupted run again, without what was written after `bytes`. */
static inline FILE *reopen_file(const char *path, size_t bytes)
{
    struct stat status;
    if (stat(path, &status) || (size_t)status.st_size < bytes)
        fail("%s is missing or shorter than when the run was interrupted; put it back, or begin "
             "another run", path);
    FILE *file = truncate(path, (off_t)bytes) ? NULL : fopen(path, "a");
    if (!file) fail("cannot continue %s: %s", path, strerror(errno));
    return file;
}

static inline csv csv_create(const char *path, const char *target)
{
    return (csv){create_file(path, target ? target : path), path, target, 0};
}

static inline void csv_check(const csv *c, int failed)
{
    if (!failed) return;
    int reason = errno;
    if (c->target) remove(c->path);
    fail("cannot write %s: %s%s", c->target ? c->target : c->path, strerror(reason), remedy);
}

__attribute__((format(printf, 2, 3)))
static inline void csv_cell(csv *c, const char *format, ...)
{
    va_list arguments;
    if (c->cells++) fputc(',', c->file);
    va_start(arguments, format);
    vfprintf(c->file, format, arguments);
    va_end(arguments);
}

/* Every row reaches the file at once, so that a run can be watched. */
static inline void csv_end_row(csv *c)
{
    c->cells = 0;
    fputc('\n', c->file);
    csv_check(c, fflush(c->file) || ferror(c->file));
}

static inline void csv_close(csv *c)
{
    int failed = ferror(c->file);
    csv_check(c, fclose(c->file) || failed);
    csv_check(c, c->target && rename(c->path, c->target));
}

/* What a container may take, in bytes (cgroup 2 and 1); SIZE_MAX where nothing limits it. */
static inline size_t container_memory(void)
{
    static const char *const paths[] = {"/sys/fs/cgroup/memory.max",
                                        "/sys/fs/cgroup/memory/memory.limit_in_bytes"};
    size_t least = SIZE_MAX, bytes;
    for (size_t i = 0; i < sizeof paths / sizeof *paths; i++) {
        FILE *file = fopen(paths[i], "r");
        if (file && fscanf(file, "%zu", &bytes) == 1 && bytes < least) least = bytes;
        if (file) fclose(file);
    }
    return least;
}

/* Memory that can be had now, in bytes; 0 if the machine does not say. */
static inline size_t available_memory(void)
{
    size_t most = container_memory();
    char line[128];
    size_t kilobytes = 0;
    FILE *file = fopen("/proc/meminfo", "r");
    while (file && !kilobytes && fgets(line, sizeof line, file))
        sscanf(line, "MemAvailable: %zu", &kilobytes);
    if (file) fclose(file);
    long pages = sysconf(_SC_PHYS_PAGES), page = sysconf(_SC_PAGESIZE);
    size_t bytes = kilobytes ? kilobytes * 1024
                 : pages > 0 && page > 0 ? (size_t)pages * (size_t)page : 0;
    return bytes < most ? bytes : most;
}

/* The most memory that this process has had so far, in bytes; 0 if the machine does not say. */
static inline size_t peak_memory(void)
{
    char line[128];
    size_t kilobytes = 0;
    FILE *file = fopen("/proc/self/status", "r");
    while (file && !kilobytes && fgets(line, sizeof line, file))
        sscanf(line, "VmHWM: %zu", &kilobytes);
    if (file) fclose(file);
    return kilobytes * 1024;
}

static inline double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* ---- what both programs print ---------------------------------------------------------------- */

/* OpenMP's threads spin while they wait. Beside other programs they take the cores from whoever is
   being waited for, so a busy machine is worth a word. */
static inline void note_busy_machine(size_t n_threads)
{
#ifdef _OPENMP
    double load;
    const long processors = sysconf(_SC_NPROCESSORS_ONLN);
    if (n_threads == 1 || getenv("OMP_WAIT_POLICY") || getloadavg(&load, 1) != 1) return;
    if (processors > 0 && 2 * load > (double)processors)
        say("note    the machine is busy (load %.1f): OMP_WAIT_POLICY=passive may be several times "
            "faster", load);
#else
    (void)n_threads;
#endif
}

static size_t context_bytes;    // what dpo_context_init took, which memory plans call scratch

static inline void start_context(dpo_context *context, size_t threads)
{
    check(context, dpo_context_init(context, (int)threads));
    context_bytes = context->heap_bytes;
}

/* Long scoring goes by so many examples, to show how far it is. */
enum { SCORE_PIECE = 64 };

static inline void plan_scoring(dpo_plan_options *plan, const dpo_data *data, size_t micro_tokens)
{
    for (size_t i = 0; i < data->n; i += SCORE_PIECE)
        dpo_plan_passes(plan, data->examples + i,
                        data->n - i < SCORE_PIECE ? data->n - i : SCORE_PIECE, micro_tokens, 0);
}

/* Rows of the longest example: the largest micro-batch cannot have fewer. */
static inline size_t longest_example(const dpo_data *data)
{
    size_t longest = 0;
    for (size_t i = 0; i < data->n; i++) {
        const size_t rows = dpo_example_rows(&data->examples[i]);
        if (rows > longest) longest = rows;
    }
    return longest;
}

/* Advice for check_memory: of the ways to need less, those that are not in use and lower this very
   plan, and then `last`. Shorter examples alone help where no two of them fit a micro-batch. */
static inline const char *less_memory(dpo_context *context, const dpo_config *config,
                                      const dpo_plan_options *plan, size_t longest,
                                      size_t micro_tokens, const char *last)
{
    static char text[512];
    const int all = plan->train && !plan->lora.r, half = plan->model.dtype == DPO_BF16;
    dpo_plan_options recompute = *plan, adapter = *plan, bf16 = *plan;
    recompute.model.recompute = plan->train;
    if (all) {
        adapter.lora = (dpo_lora){.r = 16, .alpha = 1, .targets = "all-linear"};   // the defaults
        adapter.model.frozen = 1;
        adapter.model.stochastic = 0;
    }
    bf16.model.dtype = DPO_BF16;
    bf16.model.stochastic = all;
    // A frozen model's file in bf16 is used as it lies; but an adapter belongs to the file it has.
    int convert = plan->model.frozen && !(plan->train && plan->lora.base_identity);
    for (size_t i = 0; i < plan->file->n_entries; i++)
        convert &= plan->file->entries[i].dtype != DPO_BF16;
    const struct { const char *name; const dpo_plan_options *plan; int sure; } ways[] = {
        {longest < plan->max_rows ? "a lower --micro-tokens"
         : micro_tokens > longest / 2 ? "a lower --max-length and --micro-tokens"
                                      : "a lower --max-length", NULL, 1},
        {"--gradient-checkpointing", &recompute, 0},
        {plan->model.stochastic ? "--lora without --stochastic-rounding" : "--lora", &adapter, 0},
        {!all ? "--dtype bf16" : half ? "--stochastic-rounding"
                                      : "--dtype bf16 --stochastic-rounding", &bf16, 0},
        {half ? "a bf16 file of the model (./train merge --dtype bf16)"
              : "a bf16 file of the model (./train merge --dtype bf16) with --dtype bf16",
            NULL, convert},
    };
    dpo_memory now, then;
    check(context, dpo_memory_plan(context, &now, config, plan));
    size_t n = 0;
    for (size_t i = 0; i < sizeof ways / sizeof *ways; i++) {
        int lower = ways[i].sure;
        if (ways[i].plan) {
            check(context, dpo_memory_plan(context, &then, config, ways[i].plan));
            lower = then.total < now.total;
        }
        if (lower)
            n += (size_t)snprintf(text + n, sizeof text - n, "%s%s", n ? ", " : "use ",
                                  ways[i].name);
    }
    snprintf(text + n, sizeof text - n, ", or %s", last);
    return text;
}

/* Prints the plan (with `show`) and refuses what does not fit. `other` is what neither the plan nor
   the context knows of. max_memory 0: what the machine has. `advice` says how to need less. */
static inline dpo_memory check_memory(dpo_context *context, const dpo_config *config,
                                      const dpo_plan_options *plan, size_t other,
                                      size_t max_memory, int show, const char *advice)
{
    dpo_memory m;
    check(context, dpo_memory_plan(context, &m, config, plan));
    size_t data = context->heap_bytes - context_bytes + other;
    m.heap += data;
    m.total += data;
    size_t free_bytes = available_memory();
    size_t limit = max_memory ? max_memory : free_bytes;
    const struct { const char *name; size_t bytes; } rows[] = {
        {"weights", m.weights}, {"gradients", m.gradients}, {"optimizer", m.optimizer},
        {"activations", m.activations}, {"head", m.head}, {"samples", m.cache},
        {"scratch", m.scratch}, {"data", data}, {"mapped file", m.mapped},
    };
    if (show) {
        say("memory  %10.1f MB of %.1f MB %s", 1e-6 * (double)m.total, 1e-6 * (double)limit,
            max_memory ? "allowed" : "available");
        for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
            if (rows[i].bytes) say("  %-12s%10.1f MB", rows[i].name, 1e-6 * (double)rows[i].bytes);
    }
    if (limit && m.total > limit)
        fail("needs %.1f MB of memory, and %.1f MB are %s; %s%s", 1e-6 * (double)m.total,
             1e-6 * (double)limit, max_memory ? "allowed by --max-memory" : "available", advice,
             max_memory ? "" : " (--max-memory overrules what the machine says)");
    return m;
}

static inline size_t count_tokens(const dpo_example *e)
{
    size_t n = e->n_prompt;
    for (size_t b = 0; b < e->n_branches; b++) n += e->branches[b].n;
    return n;
}

/* What was read, and why some of it was not: no record disappears silently. */
static inline void print_counts(const char *path, const dpo_data *data, const char *what)
{
    const dpo_data_counts *c = &data->counts;
    size_t tokens = 0;      // as they were cut
    for (const dpo_example *e = data->examples; e < data->examples + data->n; e++)
        tokens += count_tokens(e);
    const struct { size_t n; const char *why; } rows[] = {
        {c->prompts_differ, "dropped: the rejected text does not begin with the prompt"},
        {c->no_prompt, "dropped: no \"\\n\\nAssistant:\" in the text"},
        {c->empty_answers, "dropped: an answer or a text without tokens"},
        {c->end_token_inside, "dropped: the text spells the end token"},
        {c->repeated_prompts, "merged: the prompt came again (the last answer stays)"},
        {c->ties, "kept, but chosen and rejected are equal"},
        {c->cut_prompts, "kept, prompt cut"},
        {c->cut_answers, "kept, answer cut (and its end token with it)"},
    };
    if (c->bytes)       // a window's last token is the first of the next
        say("data    %s: %zu records, %zu bytes; %zu windows of text, %zu tokens", path, c->records,
            c->bytes, data->n, tokens - data->n + (data->n > 0));
    else
        say("data    %s: %zu records; %zu %s of %zu prompts, %zu tokens", path, c->records, data->n,
            what, data->n_groups, tokens);
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
        if (rows[i].n) say("  %8zu %s", rows[i].n, rows[i].why);
    if (!data->n) fail("%s: nothing in it can be used", path);
}

/* A model as the command line names it: a model file, or an adapter over one. */
typedef struct source {
    const char *path;           // of the model file
    const char *adapter;        // or NULL
    uint64_t adapter_identity;  // 0 without
    dpo_lora lora;              // lora.r 0 without
    dpo_file file;              // the model's, while it is open
    dpo_config config;
    dpo_tokenizer tokenizer;
} source;

/* Whether a file is an adapter: a container of that kind. */
static inline int is_adapter(const char *path)
{
    uint32_t head[4] = {0};     // magic, version, kind
    struct stat status;
    if (stat(path, &status) || !S_ISREG(status.st_mode)) return 0;  // a pipe would keep us waiting
    FILE *file = fopen(path, "rb");
    if (!file) return 0;
    size_t n = fread(head, sizeof *head, 4, file);
    fclose(file);
    return n == 4 && !memcmp(head, "dpo.h", 5) && head[3] == DPO_FILE_ADAPTER;
}

/* Whether a training run began there: its config.json starts with the command, as no other does. */
static inline int is_run(const char *directory)
{
    char *path = path_join(directory, "config.json"), quote = 0;
    FILE *file = fopen(path, "r");
    free(path);
    const int named = file && fscanf(file, " { \"command%c", &quote) == 1 && quote == '"';
    if (file) fclose(file);
    return named || run_file(directory, "log.csv");
}

/* Finds out what `path` means: a model file, an adapter over the base that it was made for, or a
   run directory with one of the two. */
static inline void find_model(dpo_context *context, source *s, const char *path,
                              const char *adapter)
{
    *s = (source){.path = path, .adapter = adapter};
    if (is_directory(path)) {
        s->path = run_file(path, "model.bin");
        if (!s->path) s->path = run_file(path, "adapter.bin");
        const char *state = run_file(path, "state.bin"), *best = run_file(path, "best.bin");
        if (!s->path && state)
            fail("%s holds an unfinished run, which has no model yet; go on with it (--resume)%s%s",
                 path, best ? ", or name its " : "", best ? "best.bin" : "");
        if (state)
            say("note    %s holds an unfinished run: its model is as old as its last interrupt",
                path);
        if (!s->path && is_run(path) && best)
            fail("%s holds a run whose last model is not there; name its best, %s", path, best);
        if (!s->path && is_run(path))
            fail("%s holds a run that has saved no model; if it has ended, begin it anew with "
                 "another -o", path);
        if (!s->path)
            fail("%s: neither model.bin nor adapter.bin in this directory; a Hugging Face "
                 "checkpoint is made one by `python3 convert.py import %s model.bin`", path,
                 shell_path(path));
    }
    if (adapter && is_directory(adapter)) {
        s->adapter = run_file(adapter, "adapter.bin");
        if (!s->adapter) fail("%s: no adapter.bin in this directory", adapter);
    }
    if (is_adapter(s->path)) {
        if (adapter) fail("%s is an adapter itself, so --adapter cannot go over it", s->path);
        s->adapter = s->path;
    }
    if (!s->adapter) return;
    dpo_file file;
    check(context, dpo_file_open(context, &file, s->adapter, DPO_FILE_ADAPTER, 0));
    check(context, dpo_lora_read(context, &s->lora, &file));
    for (const dpo_entry *e = file.entries; e < file.entries + file.n_entries; e++)
        if (strstr(e->name, ".lora_A.") && e->shape[0] != s->lora.r)    // plans go by the config
            fail("%s: its config says r %zu, but %s has rank %zu: the file is damaged; make it "
                 "again", s->adapter, s->lora.r, e->name, e->shape[0]);
    s->adapter_identity = file.identity;
    dpo_file_close(context, &file);
    if (s->path != s->adapter) return;
    s->path = s->lora.base;
    if (!path_exists(s->path))
        fail("%s: its base model was %s, which is not there now; put it back, or name it by -m "
             "BASE --adapter %s", s->adapter, *s->path ? s->path : "at a path too odd or long to "
             "keep", shell_path(s->adapter));
}

/* Opens what find_model found, for its configuration and tokenizer, which say what it will need. */
static inline void open_found(dpo_context *context, source *s)
{
    check(context, dpo_file_open(context, &s->file, s->path, DPO_FILE_MODEL, 0));
    if (s->adapter)
        check(context, dpo_lora_check_base(context, &s->lora, s->adapter, s->file.identity));
    check(context, dpo_config_load(context, &s->config, &s->file));
    if (dpo_tokenizer_load(context, &s->tokenizer, &s->file))
        fail("%s: %s", s->path, context->error);
    if (!s->tokenizer.n_tokens)
        fail("%s has no tokenizer; import it from a folder that has one", s->path);
    dpo_plan_options plan = {.n_threads = 1, .model.frozen = s->adapter != NULL, .lora = s->lora};
    dpo_memory memory;
    const dpo_config *c = &s->config;
    if (dpo_memory_plan(context, &memory, c, &plan))
        fail("%s: %s", s->adapter ? s->adapter : s->path, context->error);
    say("model   %s: %s, %zu layers, width %zu, %zu heads, vocabulary %zu, context %zu, "
        "%.2f M parameters, %016llx", s->path, c->architecture == DPO_BTLM ? "btlm" : "gpt_neox",
        c->n_layers, c->d_model, c->n_heads, c->vocab_size, c->context_length,
        1e-6 * (double)memory.params, (unsigned long long)s->file.identity);
    if (s->adapter)
        say("adapter %s: r %zu, alpha %g%s, on %s, %016llx", s->adapter, s->lora.r, s->lora.alpha,
            s->lora.rslora ? " (rslora)" : "", s->lora.targets,
            (unsigned long long)s->adapter_identity);
}

static inline void open_model(dpo_context *context, source *s, const char *path,
                              const char *adapter)
{
    find_model(context, s, path, adapter);
    open_found(context, s);
}

static inline void close_model(dpo_context *context, source *s)
{
    dpo_tokenizer_free(context, &s->tokenizer);
    dpo_file_close(context, &s->file);
}

/* Loads an opened or found model with its adapter, to be used as it is. */
static inline void load_model(dpo_context *context, dpo_model *model, const source *s,
                              dpo_model_options options)
{
    options.frozen = 1;
    check(context, dpo_model_load(context, model, s->path, &options));
    if (s->adapter) check(context, dpo_lora_load(model, s->adapter));
}

/* Two models can be compared on the same tokens only. */
static inline void check_same_tokenizer(const source *a, const source *b)
{
    static const char *const parts[] = {"tokenizer/token_ends", "tokenizer/token_bytes",
                                        "tokenizer/merges", "tokenizer/added"};
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        const dpo_entry *x = dpo_file_find(&a->file, parts[i]);
        const dpo_entry *y = dpo_file_find(&b->file, parts[i]);
        if (!x && !y) continue;
        if (!x || !y || x->bytes != y->bytes || memcmp(x->data, y->data, x->bytes))
            fail("%s and %s have different tokenizers", a->path, b->path);
    }
}

/* Loads a data file for a model; lengths beyond its context are lowered to it, in *options, too. */
static inline void load_data(dpo_context *context, dpo_data *data, const char *path,
                             const dpo_tokenizer *tokenizer, const dpo_config *config,
                             dpo_data_options *options)
{
    if (config->context_length < 2)
        fail("the model's context is one token, too few to predict one from another");
    if (options->max_length > config->context_length) {
        options->max_length = config->context_length;
        say("note    --max-length becomes %zu, the model's context", options->max_length);
    }
    if (options->use != DPO_USE_TEXT && options->max_prompt_length >= options->max_length) {
        options->max_prompt_length = options->max_length / 2;
        say("note    --max-prompt-length becomes %zu, half of --max-length",
            options->max_prompt_length);
    }
    if (config->eos_id < 0)
        fail("the model names no end token (eos_token_id in config.json), and answers need one");
    check(context, dpo_data_load(context, data, path, tokenizer, (uint32_t)config->eos_id,
                                 options));
    print_counts(path, data, options->use == DPO_USE_PAIRS ? "pairs" : "answers");
}

static inline void write_quoted(dpo_context *context, FILE *file, const char *bytes, size_t n)
{
    dpo_string quoted = {0};
    check(context, dpo_json_quote(context, &quoted, bytes, n));
    fwrite(quoted.bytes, 1, quoted.n, file);
    dpo_string_free(context, &quoted);
}

/* TRL's names of dpo_metrics, and their values in the same order. */
#define N_METRICS 7
static const char *const metric_names[N_METRICS] = {
    "loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins",
    "logps/chosen", "logps/rejected",
};
static inline void metric_values(double values[N_METRICS], const dpo_metrics *m)
{
    const double all[N_METRICS] = {m->loss, m->reward[0], m->reward[1], m->accuracy, m->margin,
                                   m->logp[0], m->logp[1]};
    memcpy(values, all, sizeof all);
}

/* ---- progress: a bar on a terminal, lines elsewhere ------------------------------------------ */

typedef struct progress {
    const char *label;
    double start, last;
    size_t before, twentieths;      // done before the start
} progress;

static inline progress progress_start(const char *label)
{
    return (progress){.label = label, .start = now(), .last = now()};
}

static inline void progress_show(progress *p, size_t done, size_t total, const char *details)
{
    size_t here = done - p->before;
    double t = now(), left = here ? (t - p->start) / (double)here * (double)(total - done) : 0;
    size_t s = (size_t)(left + 0.5), filled = 24 * done / total;
    int terminal = isatty(STDERR_FILENO);
    // A bar ten times a second; lines every half minute, or every second with a twentieth done.
    double pause = terminal ? 0.1 : 20 * done / total > p->twentieths ? 1 : 30;
    if (t - p->last < pause && done < total) return;
    p->last = t;
    p->twentieths = 20 * done / total;
    if (terminal)
        fprintf(stderr, "\r%s %zu/%zu [%.*s%.*s] %s %zu:%02zu:%02zu left\033[K", p->label, done,
                total, (int)filled, "########################", (int)(24 - filled),
                "........................", details, s / 3600, s / 60 % 60, s % 60);
    else
        fprintf(stderr, "%s %zu/%zu %s %zu:%02zu:%02zu left\n", p->label, done, total, details,
                s / 3600, s / 60 % 60, s % 60);
    bar_on_screen = terminal;
}

#endif
