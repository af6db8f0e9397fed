/* eval.c: measures and shows what models made by train.c do.

       ./eval prefs -m runs/dpo -r base.bin -d dev.jsonl     does it prefer the chosen answers?
       ./eval loss -m model.bin -d text.txt                  how well does it predict text?
       ./eval generate -m model.bin -d prompts.jsonl         answers as JSON lines
       ./eval chat -m model.bin                              a conversation

   Results go to stdout, everything else to stderr. */
#define DPO_IMPLEMENTATION
#include "dpo.h"
#include "tools.h"

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
    const char *model, *reference, *data, *prompt, *out;
    int json, no_verify, loss_type, truncation;
    double beta, label_smoothing, temperature, top_p;
    size_t max_length, max_prompt_length, limit, micro_tokens, max_new_tokens, top_k, seed, threads;
    size_t max_memory;
    text_list stops;
} settings;

#define N_OPTIONS 32
/* Choices stand in the order of the library's enumerations. Returns how many options there are. */
static size_t list_options(option options[N_OPTIONS], settings *s, unsigned bit)
{
    const option table[] = {
        TEXT(ALL, 'm', "model", &s->model, "FILE", 1, "model file or run directory"),
        TEXT(PREFS, 'r', "reference", &s->reference, "FILE", 1, "reference model"),
        TEXT(DATA | GENERATE, 'd', "data", &s->data, "FILE", bit != GENERATE,
            bit == GENERATE ? "prompts; none: standard input"
            : bit == LOSS ? "text, or JSON lines of {\"text\"}" : "pairs, JSON lines"),
        TEXT(GENERATE, 'p', "prompt", &s->prompt, "TEXT", 0,
            "one prompt (\\n and \\\\ are understood)"),
        REAL(PREFS, "beta", &s->beta, 1e-6, 1e6, "as in training"),
        CHOICE(PREFS, "loss-type", &s->loss_type, "sigmoid|ipo|ipo-sum|hinge", "as in training"),
        REAL(PREFS, "label-smoothing", &s->label_smoothing, 0, 0.4999, "as in training"),
        COUNT(DATA, "max-length", &s->max_length, 0, 1e7,
            bit == LOSS ? "tokens of a window; 0: the model's context"
            : "tokens of prompt and answer; 0: the model's context"),
        COUNT(PREFS, "max-prompt-length", &s->max_prompt_length, 1, 1e7,
            "tokens of a prompt when the two do not fit"),
        CHOICE(PREFS, "truncation", &s->truncation, "keep_end|keep_start",
            "which part of a prompt to keep"),
        COUNT(DATA | GENERATE, "limit", &s->limit, 0, 1e15, "read this many examples; 0: all"),
        COUNT(DATA, "micro-tokens", &s->micro_tokens, 1, 1e7,
            "tokens computed at a time; decides about memory"),
        FLAG(DATA, "json", &s->json, "print results as JSON"),
        TEXT(PREFS, 0, "out", &s->out, "FILE", 0, "CSV file to make with a row per pair"),
        COUNT(TALK, "max-new-tokens", &s->max_new_tokens, 1, 1e6, "longest answer"),
        REAL(TALK, "temperature", &s->temperature, 0, 100, "0: always the likeliest token"),
        COUNT(TALK, "top-k", &s->top_k, 0, 1e9, "among the k likeliest tokens; 0: all"),
        REAL(TALK, "top-p", &s->top_p, 1e-9, 1, "among the likeliest of this total probability"),
        COUNT(TALK, "seed", &s->seed, 0, 0, "of the sampling"),
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

/* Loads a model, scores all branches and lets the model go: two never share the memory. */
static void score(dpo_context *context, const settings *s, const char *path, const dpo_data *data,
                  dpo_score *scores)
{
    enum { PIECE = 64 };
    dpo_model model;
    size_t n_branches = data->examples[0].n_branches;
    check(context, dpo_model_load(context, &model, path, !s->no_verify));
    progress bar = progress_start("scoring");
    for (size_t i = 0; i < data->n; i += PIECE) {
        size_t n = data->n - i < PIECE ? data->n - i : PIECE;
        check(context, dpo_score_examples(&model, scores + i * n_branches, data->examples + i, n,
                                          s->micro_tokens));
        for (size_t j = i * n_branches; j < (i + n) * n_branches; j++)
            if (!isfinite(scores[j].logp))
                fail("%s is damaged: it gives the example at line %zu a log-probability of %g",
                     path, data->examples[j / n_branches].line, scores[j].logp);
        progress_show(&bar, i + n, data->n, "examples");
    }
    clear_bar();
    dpo_model_free(&model);
}

/* Opens the model for its configuration, loads the data, and sees whether both fit the memory. */
static void load(dpo_context *context, const settings *s, dpo_data *data, dpo_data_use use)
{
    dpo_file file, other;
    dpo_config config;
    dpo_tokenizer tokenizer;
    dpo_plan_options plan = {.n_threads = context->n_threads};
    open_model(context, &file, &config, &tokenizer, s->model);
    if (s->reference) {
        check(context, dpo_file_open(context, &other, s->reference, DPO_FILE_MODEL, 0));
        check_same_tokenizer(&file, s->model, &other, s->reference);
        dpo_file_close(context, &other);
    }
    load_data(context, data, s->data, &tokenizer, &config, (dpo_data_options){
        .use = use, .max_length = s->max_length ? s->max_length : config.context_length,
        .max_prompt_length = s->max_prompt_length, .keep_start = s->truncation, .limit = s->limit});
    dpo_tokenizer_free(context, &tokenizer);
    dpo_file_close(context, &file);
    plan_data(&plan, data, s->micro_tokens);
    check_memory(context, &config, &plan, 0, s->max_memory, 0);
}

static void write_pairs(const char *path, const dpo_data *data, const dpo_score *scores,
                        const double *reference, double beta)
{
    csv out = csv_create(path);
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
    close_file(out.file, path);
}

static void evaluate_prefs(dpo_context *context, const settings *s)
{
    dpo_data data;
    dpo_metrics m;
    const dpo_loss_options loss = {(dpo_loss_kind)s->loss_type, s->beta, s->label_smoothing};
    if (s->out && path_exists(s->out)) fail("%s exists already; nothing was changed", s->out);
    load(context, s, &data, DPO_USE_PAIRS);
    dpo_score *scores = allocate(2 * data.n, sizeof *scores);
    double *reference = allocate(2 * data.n, sizeof *reference), values[N_METRICS];
    score(context, s, s->reference, &data, scores);
    for (size_t i = 0; i < 2 * data.n; i++) reference[i] = scores[i].logp;
    score(context, s, s->model, &data, scores);
    check(context, dpo_metrics_compute(context, &m, NULL, data.examples, scores, reference, data.n,
                                       &loss));
    metric_values(values, &m);
    printf(s->json ? "{\"%s\": %zu" : "%-24s %12zu\n", "pairs", m.n);
    printf(s->json ? ", \"%s\": %zu" : "%-24s %12zu\n", "prompts", data.n_groups);
    printf(s->json ? ", \"%s\": %zu" : "%-24s %12zu\n", "ties", m.ties);
    for (size_t i = 0; i < N_METRICS; i++)
        printf(s->json ? ", \"%s\": %.9g" : "%-24s %12.4f\n", metric_names[i], values[i]);
    printf(s->json ? ", \"%s\": %.9g}\n" : "%-24s %12.4f\n", "rewards/accuracies_se",
           m.accuracy_error);
    if (s->out) write_pairs(s->out, &data, scores, reference, s->beta);
    free(scores);
    free(reference);
    dpo_data_free(context, &data);
}

static void evaluate_loss(dpo_context *context, const settings *s)
{
    dpo_data data;
    double nats = 0, n = 0;
    load(context, s, &data, DPO_USE_TEXT);
    dpo_score *scores = allocate(data.n, sizeof *scores);
    score(context, s, s->model, &data, scores);
    for (size_t i = 0; i < data.n; i++) {
        nats -= scores[i].logp;
        n += (double)scores[i].n_scored;
    }
    const struct { const char *name; double value; } rows[] = {
        {"windows", (double)data.n}, {"tokens", n}, {"bytes", (double)data.counts.bytes},
        {"nats_per_token", nats / n}, {"perplexity", exp(nats / n)},
        {"bits_per_byte", nats / (log(2) * (double)data.counts.bytes)},
    };
    const char *separator = "{";
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++, separator = ", ") {
        if (s->json) printf("%s\"%s\": %.10g", separator, rows[i].name, rows[i].value);
        else printf("%-24s %12.*f\n", rows[i].name, i < 3 ? 0 : 4, rows[i].value);
    }
    if (s->json) puts("}");
    free(scores);
    dpo_data_free(context, &data);
}

/* ---- generate and chat ----------------------------------------------------------------------- */

static void load_model(dpo_context *context, const settings *s, dpo_model *model)
{
    dpo_file file;
    dpo_config config;
    dpo_tokenizer tokenizer;
    dpo_plan_options plan = {.n_threads = context->n_threads};
    open_model(context, &file, &config, &tokenizer, s->model);
    dpo_tokenizer_free(context, &tokenizer);
    dpo_file_close(context, &file);
    size_t cache = 2 * config.n_layers * config.context_length * config.d_model * sizeof(float);
    check_memory(context, &config, &plan, cache, s->max_memory, 0);
    check(context, dpo_model_load(context, model, s->model, !s->no_verify));
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

static void answer_prompt(dpo_model *model, const dpo_sampling *sampling, const char *prompt,
                          size_t n)
{
    dpo_context *context = model->context;
    dpo_tokens tokens = {0};
    dpo_string answer = {0};
    check(context, dpo_tokenizer_encode(context, &tokens, &model->tokenizer, prompt, n));
    const uint32_t end = (uint32_t)model->config.eos_id;     // a text begins where another ended
    const uint32_t *ids = tokens.n ? tokens.ids : &end;
    check(context, dpo_generate(model, &answer, ids, tokens.n ? tokens.n : 1, sampling, NULL,
                                NULL));
    check(context, dpo_string_make_valid(context, &answer));
    fputs("{\"prompt\": ", stdout);
    write_quoted(context, stdout, prompt, n);
    fputs(", \"completion\": ", stdout);
    write_quoted(context, stdout, answer.bytes, answer.n);
    puts("}");
    finish_stdout();
    dpo_string_free(context, &answer);
    dpo_tokens_free(context, &tokens);
}

static void generate(dpo_context *context, const settings *s)
{
    const char *path = s->data ? s->data : "/dev/stdin";
    dpo_model model;
    dpo_jsonl reader;
    int found = 0;
    if (s->prompt && s->data) usage_fail("--prompt and --data exclude each other");
    if (!s->prompt) check(context, dpo_jsonl_open(context, &reader, path));
    load_model(context, s, &model);
    dpo_sampling sampling = sampling_of(s);
    if (s->prompt) answer_prompt(&model, &sampling, s->prompt, strlen(s->prompt));
    for (size_t i = 0; !s->prompt && (!s->limit || i < s->limit); i++) {
        check(context, dpo_jsonl_next(context, &reader, &found));
        if (!found) break;
        const dpo_json_value *prompt = dpo_json_member(&reader.json, reader.json.values, "prompt");
        if (!prompt || prompt->kind != DPO_JSON_STRING)
            fail("%s:%zu: a \"prompt\" with a string is expected", path, reader.line);
        sampling.seed = dpo_random_u64(s->seed, i, 0);  // its own numbers for every prompt
        answer_prompt(&model, &sampling, reader.json.text.bytes + prompt->string, prompt->n_string);
    }
    if (!s->prompt) dpo_jsonl_close(context, &reader);
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
    size_t capacity = 0, used = 0;
    load_model(context, s, &model);
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
        if (!strcmp(line, "/help")) say("/reset forgets the conversation, /quit leaves");
        if (n == 0 || line[0] == '/') continue;
        transcript = realloc(transcript, used + (size_t)n + 32);
        if (!transcript) fail("out of memory");
        size_t turn = (size_t)sprintf(transcript + used, "\n\nHuman: %s\n\nAssistant:", line);
        tokens.n = answer.n = 0;
        if (dpo_tokenizer_encode(context, &tokens, &model.tokenizer, transcript, used + turn)) {
            say("%s", context->error);  // the turn is dropped
            continue;
        }
        check(context, dpo_generate(&model, &answer, tokens.ids, tokens.n, &sampling, print_piece,
                                    NULL));
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
    const tool_command *c = find_command(argc, argv, commands, n_commands, &bit);
    tool_name = names[c - commands];
    if (bit == LOSS) s.max_length = 0;
    parse_options(argc, argv, c, bit, options, list_options(options, &s, bit));
    s.model = model_path(s.model);
    if (s.reference) s.reference = model_path(s.reference);
    if (s.prompt) s.prompt = unescape(s.prompt);
    for (size_t i = 0; i < s.stops.n; i++) {
        if (!*s.stops.texts[i]) usage_fail("--stop must not be empty");
        s.stops.texts[i] = unescape(s.stops.texts[i]);
    }
    if (s.label_smoothing > 0 && s.loss_type != DPO_LOSS_SIGMOID)
        usage_fail("--label-smoothing goes with --loss-type sigmoid only");

    dpo_context context;
    check(&context, dpo_context_init(&context, (int)s.threads));
    run[c - commands](&context, &s);
    finish_stdout();
    dpo_context_free(&context);
    return 0;
}
