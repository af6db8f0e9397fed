/* eval.c: measures and shows what models made by train.c do.

       ./eval prefs -m runs/dpo -r base.bin -d dev.jsonl     does it prefer the chosen answers?
       ./eval loss -m model.bin -d text.txt                  how well does it predict text?
       ./eval generate -m model.bin -d prompts.jsonl         answers as JSON lines
       ./eval chat -m model.bin                              a conversation

   Results go to stdout, everything else to stderr. */
#define DPO_IMPLEMENTATION
#include "dpo.h"
#include "tools.h"
#include <signal.h>

enum { PREFS = 1, LOSS = 2, GENERATE = 4, CHAT = 8, DATA = PREFS | LOSS, TALK = GENERATE | CHAT,
       ALL = DATA | TALK };

static const tool_command commands[] = {
    {"prefs", "prefs -m MODEL -r MODEL -d FILE [options]",
     "Reward metrics of a policy against its reference on preference pairs."},
    {"loss", "loss -m MODEL -d FILE [options]",
     "Nats per token, perplexity and bits per byte on text."},
    {"generate", "generate -m MODEL [-d FILE | --prompt TEXT] [options]",
     "Continue prompts, JSON lines {\"prompt\"} in (standard input by default), JSON lines out."},
    {"chat", "chat -m MODEL [options]", "Talk with a model in the turns of Anthropic's HH data."},
};

/* ---- settings -------------------------------------------------------------------------------- */

typedef struct settings {
    const char *model, *adapter, *reference, *versus, *data, *prompt, *out;
    int json, no_verify, loss_type, truncation, dtype;
    double beta, label_smoothing, temperature, top_p;
    size_t max_length, max_prompt_length, limit, micro_tokens, max_new_tokens, top_k, seed, threads;
    size_t max_memory, skip;
    text_list stops;
} settings;

#define N_OPTIONS 32
/* Choices stand in the order of the library's enumerations. Returns how many options there are. */
static size_t list_options(option options[N_OPTIONS], settings *s, unsigned bit)
{
    const option table[] = {
        TEXT(ALL, 'm', "model", &s->model, "FILE", 1, "model or adapter file, or run directory"),
        TEXT(ALL, 0, "adapter", &s->adapter, "FILE", 0, "adapter over the model"),
        TEXT(PREFS, 'r', "reference", &s->reference, "FILE", 1, "reference model"),
        TEXT(PREFS, 0, "versus", &s->versus, "FILE", 0,
            "second policy: also prints how much better the first is, with the paired error"),
        CHOICE(ALL, "dtype", &s->dtype, "fp32|bf16", "precision of weights and products"),
        TEXT(DATA | GENERATE, 'd', "data", &s->data, "FILE", bit != GENERATE,
            bit == GENERATE ? "prompts; without it: standard input, to its end"
            : bit == LOSS ? "text, or JSON lines of {\"text\"}" : "pairs, JSON lines"),
        TEXT(GENERATE, 'p', "prompt", &s->prompt, "TEXT", 0,
            "one prompt (\\n and \\\\ are understood)"),
        REAL(PREFS, "beta", &s->beta, 1e-6, 1e6, "as in training"),
        CHOICE(PREFS, "loss-type", &s->loss_type, "sigmoid|ipo|ipo-sum|hinge", "as in training"),
        REAL(PREFS, "label-smoothing", &s->label_smoothing, 0, 0.4999, "as in training"),
        COUNT(DATA | CHAT, "max-length", &s->max_length, 0, 1e7,
            bit == LOSS ? "tokens of a window; 0: the model's context"
            : bit == CHAT ? "last tokens of the talk that are read; 0: what the answer leaves of "
                            "the model's context"
            : "tokens of prompt and answer; 0: the model's context"),
        COUNT(PREFS, "max-prompt-length", &s->max_prompt_length, 1, 1e7,
            "tokens of a prompt when the two do not fit"),
        CHOICE(PREFS, "truncation", &s->truncation, "keep_end|keep_start",
            "which part of a prompt to keep"),
        COUNT(DATA | GENERATE, "limit", &s->limit, 0, 1e15, "read this many examples; 0: all"),
        COUNT(PREFS, "skip", &s->skip, 0, 1e15,
            "leave out this many first, as those that best.bin was chosen by"),
        COUNT(DATA, "micro-tokens", &s->micro_tokens, 1, 1e7,
            "tokens computed at a time; decides about memory"),
        FLAG(DATA, "json", &s->json, "print results as JSON"),
        TEXT(PREFS, 0, "out", &s->out, "FILE", 0, "CSV file to make with a row per pair"),
        COUNT(TALK, "max-new-tokens", &s->max_new_tokens, 1, 1e6, "longest answer"),
        REAL(TALK, "temperature", &s->temperature, 0, 100, "0: always the likeliest token"),
        COUNT(TALK, "top-k", &s->top_k, 0, 1e9, "among the k likeliest tokens; 0: all"),
        REAL(TALK, "top-p", &s->top_p, 1e-9, 1, "among the likeliest of this total probability"),
        COUNT(TALK, "seed", &s->seed, 0, MAX_JSON_WHOLE, "of the sampling"),
        LIST(GENERATE, "stop", &s->stops,
            "end answers before this text (\\n understood); may be repeated"),
        FLAG(ALL, "no-verify", &s->no_verify, "do not check the model's checksums"),
        BYTES(ALL, "max-memory", &s->max_memory,
            "refuse to take more, as 8G; 0: what the machine has"),
        COUNT(ALL, "threads", &s->threads, 0, 1024, "0: one per core; results are the same"),
    };
    memcpy(options, table, sizeof table);
    return sizeof table / sizeof *table;
}

/* ---- prefs and loss -------------------------------------------------------------------------- */

static dpo_model_options model_options(const settings *s)
{
    return (dpo_model_options){.no_verify = s->no_verify, .dtype = s->dtype ? DPO_BF16 : DPO_F32,
                               .frozen = 1};
}

/* Loads a model, scores all branches and lets the model go: two never share the memory. */
static void score(dpo_context *context, const settings *s, const source *from, const dpo_data *data,
                  dpo_score *scores)
{
    enum { PIECE = SCORE_PIECE };
    dpo_model model;
    size_t n_branches = data->examples[0].n_branches;
    load_model(context, &model, from, model_options(s));
    progress bar = progress_start("scoring");
    for (size_t i = 0; i < data->n; i += PIECE) {
        size_t n = data->n - i < PIECE ? data->n - i : PIECE;
        check(context, dpo_score_examples(&model, scores + i * n_branches, data->examples + i, n,
                                          s->micro_tokens));
        for (size_t j = i * n_branches; j < (i + n) * n_branches; j++)
            if (!isfinite(scores[j].logp))
                fail("%s is damaged: it gives the example at line %zu a log-probability of %g",
                     from->path, data->examples[j / n_branches].line, scores[j].logp);
        progress_show(&bar, i + n, data->n, "examples");
    }
    clear_bar();
    dpo_model_free(&model);
}

/* Opens the models for their configurations, loads the data, and sees whether each fits beside them
   into the memory. models[0] is the policy, with its tokenizer. */
static void load(dpo_context *context, const settings *s, source *models, size_t n, dpo_data *data,
                 dpo_data_use use)
{
    const char *const paths[] = {s->model, s->reference, s->versus};
    size_t longest = SIZE_MAX;      // that all models can read
    for (size_t i = 0; i < n; i++) {
        open_model(context, &models[i], paths[i], i ? NULL : s->adapter);
        check_same_tokenizer(&models[0], &models[i]);
        size_t length = models[i].config.context_length;
        if (length < longest) longest = length;
    }
    if (s->max_length && s->max_length < longest) longest = s->max_length;
    else if (s->max_length > longest) say("note    --max-length becomes %zu, the context", longest);
    load_data(context, data, s->data, &models[0].tokenizer, &models[0].config, &(dpo_data_options){
        .use = use, .max_length = longest, .max_prompt_length = s->max_prompt_length,
        .keep_start = s->truncation, .limit = s->limit ? s->limit + s->skip : 0});
    if (s->skip >= data->n) fail("--skip %zu leaves none of %zu pairs", s->skip, data->n);
    data->n -= s->skip;
    memmove(data->examples, data->examples + s->skip, data->n * sizeof *data->examples);
    for (size_t i = 0; i < n; i++) {
        dpo_plan_options plan = {.n_threads = context->n_threads, .model = model_options(s),
                                 .file = &models[i].file, .lora = models[i].lora};
        plan_scoring(&plan, data, s->micro_tokens);
        check_memory(context, &models[i].config, &plan, 0, s->max_memory, 0,
                     less_memory(context, &models[i].config, &plan, longest_example(data),
                                 s->micro_tokens, "a smaller model"));
        close_model(context, &models[i]);
    }
}

/* A row of the results; counts have 0 decimals. */
typedef struct result { const char *name; double value; int decimals; } result;

static void print_results(const result *rows, size_t n, int json)
{
    for (size_t i = 0; i < n; i++) {
        const result *r = &rows[i];
        if (!json) {
            printf("%-24s %12.*f\n", r->name, r->decimals, r->value);
            continue;
        }
        printf("%s\"%s\": ", i ? ", " : "{", r->name);
        if (isfinite(r->value)) printf("%.*g", r->decimals ? 10 : 16, r->value);
        else fputs("null", stdout);     // JSON has neither infinity nor NaN
    }
    if (json) puts("}");
}

static void write_pairs(const char *path, const dpo_data *data, const dpo_score *scores,
                        const double *reference, double beta)
{
    char *temporary = temporary_path(path);
    csv out = csv_create(temporary, path);
    csv_cell(&out, "line,rewards/chosen,rewards/rejected,rewards/margins,logps/chosen,"
             "logps/rejected,reference/chosen,reference/rejected,tokens/chosen,tokens/rejected");
    csv_end_row(&out);
    for (size_t i = 0; i < data->n; i++) {
        const dpo_score *p = scores + 2 * i;
        const double *r = reference + 2 * i;
        double chosen = beta * (p[0].logp - r[0]), rejected = beta * (p[1].logp - r[1]);
        csv_cell(&out, "%zu,%.9g,%.9g,%.9g,%.9g,%.9g,%.9g,%.9g,%zu,%zu", data->examples[i].line,
                 chosen, rejected, chosen - rejected, p[0].logp, p[1].logp, r[0], r[1],
                 p[0].n_scored, p[1].n_scored);
        csv_end_row(&out);
    }
    csv_close(&out);
    free(temporary);
}

/* Two policies on the same pairs: the mean difference of their hits, whose error is smaller than
   the two accuracies' errors say, since easy and hard pairs are the same for both. */
static void compare_policies(dpo_context *context, const settings *s, const source *versus,
                             const dpo_data *data, const double *margins, const double *reference,
                             dpo_score *scores, const dpo_loss_options *loss, result rows[3])
{
    dpo_metrics m;
    double *other = allocate(data->n, sizeof *other), mean, error;
    score(context, s, versus, data, scores);
    check(context, dpo_metrics_compute(context, &m, other, data->examples, scores, reference,
                                       data->n, loss));
    for (size_t i = 0; i < data->n; i++) other[i] = (margins[i] > 0) - (other[i] > 0);
    check(context, dpo_mean_error(context, &mean, &error, other, data->examples, data->n));
    rows[0] = (result){"versus_accuracies", m.accuracy, 4};
    rows[1] = (result){"accuracies_difference", mean, 4};
    rows[2] = (result){"difference_se", error, 4};
    free(other);
}

/* Distinct prompts among the pairs that are evaluated. */
static double count_prompts(const dpo_data *data)
{
    char *seen = allocate(data->n_groups, 1);
    double n = 0;
    for (size_t i = 0; i < data->n; i++) {
        n += !seen[data->examples[i].group];
        seen[data->examples[i].group] = 1;
    }
    free(seen);
    return n;
}

static void evaluate_prefs(dpo_context *context, const settings *s)
{
    static source models[3];
    dpo_data data;
    dpo_metrics m;
    const dpo_loss_options loss = {(dpo_loss_kind)s->loss_type, s->beta, s->label_smoothing};
    if (s->out) check_can_make(s->out);
    load(context, s, models, s->versus ? 3 : 2, &data, DPO_USE_PAIRS);
    dpo_score *scores = allocate(2 * data.n, sizeof *scores);
    double *reference = allocate(2 * data.n, sizeof *reference), values[N_METRICS];
    double *margins = allocate(data.n, sizeof *margins);
    score(context, s, &models[1], &data, scores);
    for (size_t i = 0; i < 2 * data.n; i++) reference[i] = scores[i].logp;
    score(context, s, &models[0], &data, scores);
    check(context, dpo_metrics_compute(context, &m, margins, data.examples, scores, reference,
                                       data.n, &loss));
    metric_values(values, &m);
    if (s->out) write_pairs(s->out, &data, scores, reference, s->beta);
    result rows[14] = {
        {"pairs", (double)m.n, 0}, {"prompts", count_prompts(&data), 0},
        {"ties", (double)m.ties, 0}, {metric_names[0], values[0], 4},
        {metric_names[1], values[1], 4}, {metric_names[2], values[2], 4},
        {metric_names[3], values[3], 4}, {metric_names[4], values[4], 4},
        {metric_names[5], values[5], 4}, {metric_names[6], values[6], 4},
        {"rewards/accuracies_se", m.accuracy_error, 4},
    };
    if (s->versus)
        compare_policies(context, s, &models[2], &data, margins, reference, scores, &loss,
                         rows + 11);
    print_results(rows, s->versus ? 14 : 11, s->json);
    free(scores);
    free(reference);
    free(margins);
    dpo_data_free(context, &data);
}

static void evaluate_loss(dpo_context *context, const settings *s)
{
    dpo_data data;
    double nats = 0, n = 0;
    static source model;
    load(context, s, &model, 1, &data, DPO_USE_TEXT);
    if (!data.counts.bytes) fail("%s: only end tokens are read of it, which have no text", s->data);
    dpo_score *scores = allocate(data.n, sizeof *scores);
    score(context, s, &model, &data, scores);
    for (size_t i = 0; i < data.n; i++) {
        nats -= scores[i].logp;
        n += (double)scores[i].n_scored;
    }
    const result rows[] = {
        {"windows", (double)data.n, 0}, {"tokens", n, 0}, {"bytes", (double)data.counts.bytes, 0},
        {"nats_per_token", nats / n, 4}, {"perplexity", exp(nats / n), 4},
        {"bits_per_byte", nats / (log(2) * (double)data.counts.bytes), 4},
    };
    print_results(rows, sizeof rows / sizeof *rows, s->json);
    free(scores);
    dpo_data_free(context, &data);
}

/* ---- generate and chat ----------------------------------------------------------------------- */

/* Prompts as text and as tokens. */
typedef struct prompt { char *text; size_t n; dpo_tokens tokens; } prompt;
typedef struct prompts { prompt *all; size_t n, longest; } prompts;

static void add_prompt(dpo_context *context, prompts *p, const dpo_tokenizer *tokenizer,
                       const char *text, size_t n)
{
    p->all = realloc(p->all, (p->n + 1) * sizeof *p->all);
    if (!p->all) fail("out of memory");
    prompt *new = &p->all[p->n++];
    *new = (prompt){.text = allocate(n, 1), .n = n};
    if (n) memcpy(new->text, text, n);
    check(context, dpo_tokenizer_encode(context, &new->tokens, tokenizer, text, n));
    if (new->tokens.n > p->longest) p->longest = new->tokens.n;
}

/* Reads all of them, so that what is wrong is known before anything is answered. */
static void read_prompts(dpo_context *context, const settings *s, prompts *p,
                         const dpo_tokenizer *tokenizer)
{
    const char *path = s->data ? s->data : "/dev/stdin";
    dpo_jsonl reader;
    int found = 0;
    if (!s->data && isatty(STDIN_FILENO))
        say("reading prompts from standard input, {\"prompt\": \"...\"} on each line");
    check(context, dpo_jsonl_open(context, &reader, path));
    while (!s->limit || p->n < s->limit) {
        const int failed = dpo_jsonl_next(context, &reader, &found);
        const dpo_string *line = &reader.buffer;
        size_t blank = 0;
        while (blank < line->n && isspace((unsigned char)line->bytes[blank])) blank++;
        const unsigned char first = blank < line->n ? (unsigned char)line->bytes[blank] : '{';
        if (failed && reader.line && first < 0x80 && first != '{')  // mere text
            fail("%s:%zu: {\"prompt\": \"...\"} is expected on each line; one prompt can be given "
                 "by -p TEXT", path, reader.line);
        check(context, failed);
        if (!found) break;
        const dpo_json_value *text = dpo_json_member(&reader.json, reader.json.values, "prompt");
        if (!text || text->kind != DPO_JSON_STRING)
            fail("%s:%zu: a \"prompt\" with a string is expected", path, reader.line);
        add_prompt(context, p, tokenizer, reader.json.text.bytes + text->string, text->n_string);
    }
    dpo_jsonl_close(context, &reader);
}

/* The most tokens of a prompt that are read, its last ones: the answer gets room for
   --max-new-tokens, but at most half of the context; chat's --max-length may lower it. */
static size_t most_read(const settings *s, size_t context_length)
{
    size_t half = context_length / 2;
    size_t most = context_length - (s->max_new_tokens < half ? s->max_new_tokens : half);
    return s->max_length && s->max_length < most ? s->max_length : most;
}

/* Reads the prompts (of chat, where p is NULL, any may come), sees whether the longest of them with
   its answer fits the memory, and loads the model. */
static void load_speaker(dpo_context *context, const settings *s, dpo_model *model, prompts *p)
{
    static source from;
    const dpo_config *config = &from.config;
    open_model(context, &from, s->model, s->adapter);
    if (p && s->prompt) add_prompt(context, p, &from.tokenizer, s->prompt, strlen(s->prompt));
    else if (p) read_prompts(context, s, p, &from.tokenizer);
    for (size_t i = 0; p && i < p->n; i++)
        if (!p->all[i].tokens.n && config->eos_id < 0)
            fail("prompt %zu is empty, and needs an end token in its place, which the model does "
                 "not name", i + 1);
    size_t context_length = config->context_length, longest = most_read(s, context_length);
    if (p && p->longest < longest) longest = p->longest ? p->longest : 1;
    size_t positions = context_length - longest < s->max_new_tokens ? context_length
                                                                    : longest + s->max_new_tokens;
    dpo_plan_options plan = {.max_rows = longest, .max_scored = 1, .max_span = longest,
                             .max_positions = positions, .n_threads = context->n_threads,
                             .model = model_options(s), .file = &from.file, .lora = from.lora};
    // Where prompt and answer fill the context, a shorter answer makes room for a longer prompt.
    const int fills = positions == context_length;
    check_memory(context, config, &plan, 0, s->max_memory, 0,
                 !p ? "give a lower --max-length, or take a smaller model"
                 : fills ? "shorten the prompts, or take a smaller model"
                 : "lower --max-new-tokens, shorten the prompts, or take a smaller model");
    close_model(context, &from);
    load_model(context, model, &from, model_options(s));
}

static dpo_sampling sampling_of(const settings *s)
{
    return (dpo_sampling){.max_new_tokens = s->max_new_tokens, .temperature = s->temperature,
                          .top_k = s->top_k, .top_p = s->top_p, .seed = s->seed,
                          .stops = s->stops.texts, .n_stops = s->stops.n};
}

/* \n and \\ as a shell's arguments can hardly say them. */
static const char *unescape(const char *text)
{
    char *out = allocate(strlen(text) + 1, 1), *end = out;
    for (; *text; text++) {
        int escaped = text[0] == '\\' && (text[1] == 'n' || text[1] == '\\');
        text += escaped;
        *end++ = escaped && *text == 'n' ? '\n' : *text;
    }
    return out;
}

static void answer_prompt(dpo_model *model, const settings *s, const dpo_sampling *sampling,
                          const prompt *p)
{
    dpo_context *context = model->context;
    dpo_string answer = {0};
    const uint32_t end = (uint32_t)model->config.eos_id;     // a text begins where another ended
    const uint32_t *ids = p->tokens.n ? p->tokens.ids : &end;
    const size_t n = p->tokens.n ? p->tokens.n : 1;
    const size_t most = most_read(s, model->config.context_length), cut = n > most ? n - most : 0;
    if (cut)
        say("note    of a prompt of %zu tokens the last %zu are read: the context is %zu, and the "
            "answer needs room", n, most, model->config.context_length);
    check(context, dpo_generate(model, &answer, ids + cut, n - cut, sampling, NULL, NULL));
    check(context, dpo_string_make_valid(context, &answer));
    fputs("{\"prompt\": ", stdout);
    write_quoted(context, stdout, p->text, p->n);
    fputs(", \"completion\": ", stdout);
    write_quoted(context, stdout, answer.bytes, answer.n);
    puts("}");
    finish_stdout();
    dpo_string_free(context, &answer);
}

static void generate(dpo_context *context, const settings *s)
{
    dpo_model model;
    prompts p = {0};
    if (s->prompt && s->data) usage_fail("--prompt and --data exclude each other");
    load_speaker(context, s, &model, &p);
    dpo_sampling sampling = sampling_of(s);
    for (size_t i = 0; i < p.n; i++) {
        // Every prompt of a file has its own numbers.
        if (!s->prompt) sampling.seed = dpo_random_u64(s->seed, i, 0);
        answer_prompt(&model, s, &sampling, &p.all[i]);
        dpo_tokens_free(context, &p.all[i].tokens);
        free(p.all[i].text);
    }
    free(p.all);
    dpo_model_free(&model);
}

static void print_piece(void *user, const char *bytes, size_t n)
{
    (void)user;
    fwrite(bytes, 1, n, stdout);
    fflush(stdout);
}

/* A growing transcript, encoded afresh at every turn. */
static void chat(dpo_context *context, const settings *s)
{
    static const char *const stops[] = {"\n\nHuman:"};
    dpo_model model;
    dpo_tokens tokens = {0};
    dpo_string answer = {0};
    char *line = NULL, *transcript = allocate(1, 1);
    size_t capacity = 0, used = 0, cut = 0;
    load_speaker(context, s, &model, NULL);
    const size_t most = most_read(s, model.config.context_length);
    dpo_sampling sampling = sampling_of(s);
    sampling.stops = stops;
    sampling.n_stops = 1;
    say("Write to the model; /reset forgets the conversation, /quit or the end of input leaves.");
    for (;; sampling.seed++) {
        fputs("\n> ", stdout);
        fflush(stdout);
        ssize_t n = getline(&line, &capacity, stdin);
        if (n < 0) break;
        while (n > 0 && isspace((unsigned char)line[n - 1])) line[--n] = 0;
        if (!strcmp(line, "/quit")) break;
        if (!strcmp(line, "/reset")) used = 0;
        else if (line[0] == '/')
            say("%s/reset forgets the conversation, /quit leaves; a question may begin with a "
                "space and a /", strcmp(line, "/help") ? "no such command; " : "");
        if (n == 0 || line[0] == '/') continue;
        transcript = realloc(transcript, used + (size_t)n + 32);
        if (!transcript) fail("out of memory");
        size_t turn = (size_t)sprintf(transcript + used, "\n\nHuman: %s\n\nAssistant:", line);
        tokens.n = answer.n = 0;
        if (dpo_tokenizer_encode(context, &tokens, &model.tokenizer, transcript, used + turn)) {
            say("not read: %s", context->error);
            continue;
        }
        if (tokens.n > most && !cut)
            say("note    the talk is longer than %zu tokens: its start is no longer read", most);
        cut = tokens.n > most ? tokens.n - most : 0;
        check(context, dpo_generate(&model, &answer, tokens.ids + cut, tokens.n - cut, &sampling,
                                    print_piece, NULL));
        check(context, dpo_string_make_valid(context, &answer));
        putchar('\n');
        used += turn;
        transcript = realloc(transcript, used + answer.n + 1);
        if (!transcript) fail("out of memory");
        if (answer.n) memcpy(transcript + used, answer.bytes, answer.n);
        used += answer.n;
    }
    putchar('\n');
    free(line);
    free(transcript);
    dpo_string_free(context, &answer);
    dpo_tokens_free(context, &tokens);
    dpo_model_free(&model);
}

int main(int argc, char **argv)
{
    static void (*const run[])(dpo_context *, const settings *) = {
        evaluate_prefs, evaluate_loss, generate, chat,
    };
    static const char *const names[] = {"eval prefs", "eval loss", "eval generate", "eval chat"};
    static const size_t n_commands = sizeof commands / sizeof *commands;
    static settings s = {.beta = 0.1, .temperature = 0.7, .top_p = 0.9, .max_length = 512,
                         .max_prompt_length = 256, .micro_tokens = 2048, .max_new_tokens = 128};
    unsigned bit;
    option options[N_OPTIONS];
    tool_name = "eval";
    signal(SIGXFSZ, SIG_IGN);   // a file at ulimit -f is then an error as a full disk is
    const tool_command *c = find_command(argc, argv, commands, n_commands, &bit);
    tool_name = names[c - commands];
    if (bit != PREFS) s.max_length = 0;
    parse_options(argc, argv, c, bit, options, list_options(options, &s, bit));
    if (s.prompt) s.prompt = unescape(s.prompt);
    for (size_t i = 0; i < s.stops.n; i++) {
        if (!*s.stops.texts[i]) usage_fail("--stop must not be empty");
        s.stops.texts[i] = unescape(s.stops.texts[i]);
    }
    if (s.label_smoothing > 0 && s.loss_type != DPO_LOSS_SIGMOID)
        usage_fail("--label-smoothing goes with --loss-type sigmoid only");
    note_busy_machine(s.threads);

    dpo_context context;
    start_context(&context, s.threads);
    run[c - commands](&context, &s);
    finish_stdout();
    dpo_context_free(&context);
    return 0;
}
