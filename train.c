/* train.c: makes and trains language models with dpo.h.

       ./train init --preset tiny -o tiny.bin                    random weights
       ./train sft -m tiny.bin -d text.txt -o runs/sft           supervised fine-tuning, pretraining
       ./train dpo -m runs/sft/model.bin -d prefs.jsonl -o runs/dpo

   Every option has a default, which `./train dpo --help` prints. A run directory gets config.json
   (everything to repeat the run), log.csv (a row per update), eval.csv, reference.bin (the
   reference's log-probabilities) and, at the end, model.bin. */
#define DPO_IMPLEMENTATION
#include "dpo.h"
#include "tools.h"
#include <signal.h>
#include <sys/statvfs.h>

enum { INIT = 1, SFT = 2, DPO = 4, TRAIN = SFT | DPO, ALL = INIT | TRAIN };

static const tool_command commands[] = {
    {"init", "init -o MODEL [options]", "Make a model with random weights."},
    {"sft", "sft -m MODEL -d FILE -o DIR [options]",
     "Supervised fine-tuning on answers; on plain text, pretraining."},
    {"dpo", "dpo -m MODEL -d FILE -o DIR [options]",
     "Direct preference optimization on pairs of a chosen and a rejected answer."},
};

/* ---- settings -------------------------------------------------------------------------------- */

/* Choices stand in the order of the library's enumerations. */
typedef struct settings {
    const char *model, *data, *eval_data, *output, *reference, *reference_cache, *tokenizer;
    int preset, architecture, position, activation, parallel_residual, tied_head;
    size_t d_model, n_layers, n_heads, d_ff, context_length, vocab_size;
    int loss_type, sft_loss, truncation, optimizer, schedule, no_verify;
    double beta, label_smoothing;
    size_t max_length, max_prompt_length, limit, batch_size, max_steps, warmup_steps, warmup_max;
    double epochs, learning_rate, warmup_ratio, adam_beta1, adam_beta2, adam_epsilon, rmsprop_alpha;
    double weight_decay, max_grad_norm;
    size_t eval_examples, eval_steps, samples, seed, threads, micro_tokens, max_memory;
} settings;

static settings default_settings(unsigned bit)
{
    return (settings){
        .architecture = -1, .position = -1, .activation = -1, .parallel_residual = -1,
        .tied_head = -1,
        .beta = 0.1, .max_length = 512, .max_prompt_length = 256, .batch_size = 64, .epochs = 1,
        .learning_rate = bit == DPO ? 1e-6 : 2e-5,
        .schedule = bit == DPO ? DPO_CONSTANT : DPO_COSINE,
        .warmup_ratio = bit == DPO ? 0.1 : 0.03, .warmup_max = bit == DPO ? 150 : 0,
        .adam_beta1 = 0.9, .adam_beta2 = 0.999, .adam_epsilon = 1e-8, .rmsprop_alpha = 0.99,
        .max_grad_norm = 1, .eval_examples = 256, .micro_tokens = 2048,
    };
}

#define PRESETS "tiny|pythia-14m|pythia-31m|pythia-70m|pythia-160m|pythia-410m|pythia-1b|" \
                "pythia-1.4b|pythia-2.8b|btlm-3b"
static const struct preset {
    dpo_architecture architecture;
    size_t n_layers, d_model, n_heads, d_ff, context_length, vocab_size;
} presets[] = {
    {DPO_GPT_NEOX, 2, 64, 4, 256, 512, 0},
    {DPO_GPT_NEOX, 6, 128, 4, 512, 2048, 50304},
    {DPO_GPT_NEOX, 6, 256, 8, 1024, 2048, 50304},
    {DPO_GPT_NEOX, 6, 512, 8, 2048, 2048, 50304},
    {DPO_GPT_NEOX, 12, 768, 12, 3072, 2048, 50304},
    {DPO_GPT_NEOX, 24, 1024, 16, 4096, 2048, 50304},
    {DPO_GPT_NEOX, 16, 2048, 8, 8192, 2048, 50304},
    {DPO_GPT_NEOX, 24, 2048, 16, 8192, 2048, 50304},
    {DPO_GPT_NEOX, 32, 2560, 32, 10240, 2048, 50304},
    {DPO_BTLM, 32, 2560, 32, 6826, 8192, 50257},
};

#define N_OPTIONS 64
/* Fills in the table of all options, whose values live in s; returns how many there are. */
static size_t list_options(option options[N_OPTIONS], settings *s, unsigned bit)
{
    const option table[] = {
        TEXT(TRAIN, 'm', "model", &s->model, "FILE", 1, "model to start from"),
        TEXT(TRAIN, 'd', "data", &s->data, "FILE", 1, "training data, JSON lines or text"),
        TEXT(ALL, 'o', "output", &s->output, bit == INIT ? "FILE" : "DIR", 1,
            bit == INIT ? "model to make" : "run directory to make"),
        CHOICE(INIT, "preset", &s->preset, PRESETS, "sizes to start from"),
        CHOICE(INIT, "arch", &s->architecture, "gpt_neox|btlm", "not the preset's"),
        COUNT(INIT, "n-layers", &s->n_layers, 0, 1e4, "0: the preset's"),
        COUNT(INIT, "d-model", &s->d_model, 0, 1e6, "width; 0: the preset's"),
        COUNT(INIT, "n-heads", &s->n_heads, 0, 1e4, "0: the preset's"),
        COUNT(INIT, "d-ff", &s->d_ff, 0, 1e7, "0: as wide for d-model as the preset's"),
        COUNT(INIT, "context-length", &s->context_length, 0, 1e7, "0: the preset's"),
        COUNT(INIT, "vocab-size", &s->vocab_size, 0, 1e8,
            "0: the preset's, or as many as the tokenizer has"),
        CHOICE(INIT, "position", &s->position, "rotary|alibi|learned", "not the architecture's"),
        CHOICE(INIT, "activation", &s->activation,
            "gelu|gelu_new|gelu_fast|quick_gelu|silu|relu|swiglu", "not the architecture's"),
        CHOICE(INIT, "parallel-residual", &s->parallel_residual, "no|yes",
            "not the architecture's"),
        CHOICE(INIT, "tied-head", &s->tied_head, "no|yes", "not the architecture's"),
        TEXT(INIT, 0, "tokenizer", &s->tokenizer, "FILE", 0,
            "model whose tokenizer to take; none: a token per byte"),
        CHOICE(DPO, "loss-type", &s->loss_type, "sigmoid|ipo|ipo-sum|hinge",
            "sigmoid is DPO's; ipo averages per token"),
        REAL(DPO, "beta", &s->beta, 1e-6, 1e6, "how strongly the reference holds"),
        REAL(DPO, "label-smoothing", &s->label_smoothing, 0, 0.4999,
            "conservative DPO: share of wrong labels"),
        TEXT(DPO, 0, "reference", &s->reference, "FILE", 0,
            "reference model; none: the one training starts from"),
        TEXT(DPO, 0, "reference-cache", &s->reference_cache, "FILE", 0,
            "share reference.bin between runs: read if it exists, else made"),
        CHOICE(SFT, "sft-loss", &s->sft_loss, "mean|sum",
            "mean per token of the batch, or sum per answer; so are the logged losses"),
        REAL(TRAIN, "epochs", &s->epochs, 1e-9, 1e6, "passes over the data"),
        COUNT(TRAIN, "max-steps", &s->max_steps, 0, 1e12,
            "this many updates, whatever --epochs says; 0: off"),
        COUNT(TRAIN, "batch-size", &s->batch_size, 1, 1e6, "examples per update"),
        REAL(TRAIN, "learning-rate", &s->learning_rate, 0, 1e3, "at its peak"),
        CHOICE(TRAIN, "lr-scheduler-type", &s->schedule, "constant|linear|cosine",
            "after the warmup"),
        REAL(TRAIN, "warmup-ratio", &s->warmup_ratio, 0, 1, "share of all updates"),
        COUNT(TRAIN, "warmup-max", &s->warmup_max, 0, 1e12,
            "most updates that warmup-ratio may mean; 0: any"),
        COUNT(TRAIN, "warmup-steps", &s->warmup_steps, 0, 1e12, "updates; 0: by the ratio"),
        CHOICE(TRAIN, "optim", &s->optimizer, "adamw|rmsprop", "optimizer"),
        REAL(TRAIN, "adam-beta1", &s->adam_beta1, 0, 0.999999, "decay of AdamW's mean"),
        REAL(TRAIN, "adam-beta2", &s->adam_beta2, 0, 0.99999999, "decay of its mean square"),
        REAL(TRAIN, "adam-epsilon", &s->adam_epsilon, 1e-20, 1, "of either optimizer"),
        REAL(TRAIN, "rmsprop-alpha", &s->rmsprop_alpha, 0, 0.99999999,
            "decay of RMSprop's mean square"),
        REAL(TRAIN, "weight-decay", &s->weight_decay, 0, 1e3, "on matrices only"),
        REAL(TRAIN, "max-grad-norm", &s->max_grad_norm, 0, 1e9, "clip gradients; 0: off"),
        COUNT(TRAIN, "max-length", &s->max_length, 2, 1e7,
            "tokens of prompt and answer, or of a window of text"),
        COUNT(TRAIN, "max-prompt-length", &s->max_prompt_length, 1, 1e7,
            "tokens of a prompt when the two do not fit"),
        CHOICE(TRAIN, "truncation", &s->truncation, "keep_end|keep_start",
            "which part of a prompt to keep"),
        COUNT(TRAIN, "limit", &s->limit, 0, 1e15, "read this many examples; 0: all"),
        TEXT(TRAIN, 0, "eval-data", &s->eval_data, "FILE", 0, "held-out data; none: no evaluation"),
        COUNT(TRAIN, "eval-examples", &s->eval_examples, 1, 1e15, "of it, the first"),
        COUNT(TRAIN, "eval-steps", &s->eval_steps, 0, 1e12,
            "updates between evaluations; 0: 1/20 of the run"),
        COUNT(TRAIN, "sample", &s->samples, 0, 1e6, "prompts to answer at each evaluation"),
        COUNT(ALL, "seed", &s->seed, 0, MAX_JSON_WHOLE, "of weights, or of the order of the data"),
        COUNT(TRAIN, "micro-tokens", &s->micro_tokens, 1, 1e7,
            "tokens computed at a time; decides about memory"),
        FLAG(TRAIN, "no-verify", &s->no_verify, "do not check the model's checksums"),
        BYTES(ALL, "max-memory", &s->max_memory,
            "refuse to take more, as 8G; 0: what the machine has"),
        COUNT(ALL, "threads", &s->threads, 0, 1024, "0: one per core; results are the same"),
    };
    memcpy(options, table, sizeof table);
    return sizeof table / sizeof *table;
}

/* ---- init ------------------------------------------------------------------------------------ */

static void set_if_given(int *value, int choice)
{
    if (choice >= 0) *value = choice;
}

static dpo_config make_config(dpo_context *context, const settings *s)
{
    const struct preset *p = &presets[s->preset];
    dpo_config c = {0};
    c.d_model = s->d_model ? s->d_model : p->d_model;
    c.n_layers = s->n_layers ? s->n_layers : p->n_layers;
    c.n_heads = s->n_heads ? s->n_heads : p->n_heads;
    c.d_ff = s->d_ff ? s->d_ff : p->d_ff * c.d_model / p->d_model;
    c.context_length = s->context_length ? s->context_length : p->context_length;

    dpo_tokenizer tokenizer;
    dpo_file file = {0};
    dpo_config source;
    if (s->tokenizer) open_model(context, &file, &source, &tokenizer, s->tokenizer);
    else check(context, dpo_tokenizer_init_bytes(context, &tokenizer));
    size_t n_tokens = tokenizer.n_tokens;
    dpo_tokenizer_free(context, &tokenizer);
    dpo_file_close(context, &file);
    c.vocab_size = s->tokenizer && p->vocab_size > n_tokens ? p->vocab_size : n_tokens;
    if (s->vocab_size && s->vocab_size < n_tokens)
        fail("--vocab-size %zu is too small for %zu tokens", s->vocab_size, n_tokens);
    if (s->vocab_size) c.vocab_size = s->vocab_size;

    int architecture = s->architecture < 0 ? (int)p->architecture : s->architecture;
    dpo_config_default(&c, (dpo_architecture)architecture);
    if (s->position >= 0) c.position = (dpo_position)s->position;
    if (s->activation >= 0) c.activation = (dpo_activation)s->activation;
    set_if_given(&c.parallel_residual, s->parallel_residual);
    set_if_given(&c.tied_head, s->tied_head);
    if (c.position != DPO_ROTARY) c.rotary_dims = 0;
    else if (!c.rotary_dims) c.rotary_dims = c.d_model / c.n_heads / 4 * 2;
    c.bos_id = c.eos_id = (int64_t)n_tokens - 1;    // the byte tokenizer's <|endoftext|>
    if (s->tokenizer) {
        c.bos_id = source.bos_id;
        c.eos_id = source.eos_id;
    }
    check(context, dpo_config_check(context, &c));
    return c;
}

static void init_model(dpo_context *context, const settings *s)
{
    check_can_make(s->output);
    dpo_config config = make_config(context, s);
    dpo_plan_options plan = {.n_threads = context->n_threads};
    check_memory(context, &config, &plan, 0, s->max_memory, 0, "make a smaller model");
    dpo_model model;
    check(context, dpo_model_init(context, &model, &config, s->tokenizer, s->seed));
    check(context, dpo_model_save(&model, s->output));
    say("made    %s: %.2f M parameters, vocabulary %zu", s->output, 1e-6 * (double)model.n_params,
        config.vocab_size);
    dpo_model_free(&model);
}

/* ---- a training run -------------------------------------------------------------------------- */

typedef struct run {
    const settings *s;
    unsigned bit;               // SFT or DPO
    dpo_context *context;
    dpo_config config;
    dpo_model model;
    dpo_optimizer optimizer;
    dpo_loss_options loss;
    dpo_data data, eval;        // eval.n is 0 without --eval-data
    size_t n_branches;          // of every example: 2 for dpo, 1 for sft
    double *reference;          // [2 data.n, then 2 eval.n] reference log-probabilities; dpo only
    uint64_t reference_identity, reference_file_identity;
    size_t *order;              // [data.n] this epoch's order
    dpo_example *batch;         // [batch_size] the update's examples ...
    double *batch_reference;    // [2 batch_size] and their reference
    dpo_score *scores;          // [the larger of batch and eval, times n_branches]
    double *dlogp;              // [2 batch_size]
    size_t n_metrics;           // columns in the logs: all for dpo, the loss for sft
    size_t steps, warmup, step, examples, tokens;
    dpo_metrics first_eval, last_eval;
    size_t last_eval_step;
    csv log, eval_log;
    FILE *samples;
    const char *reference_path, *model_path, *samples_path;
    int failed;                 // an update came out not finite
} run;

static volatile sig_atomic_t interrupted;

/* The first signal lets the update end and saves; SA_RESETHAND makes a second one final. */
static void on_signal(int signal_number)
{
    interrupted = signal_number;
}

static void catch_signals(void)
{
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = (int)SA_RESETHAND | SA_RESTART};
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
}

static size_t count_tokens(const dpo_example *e)
{
    size_t n = e->n_prompt;
    for (size_t b = 0; b < e->n_branches; b++) n += e->branches[b].n;
    return n;
}

/* Scored tokens of an sft example; without a prompt the first token has nothing to predict it. */
static size_t count_scored(const dpo_example *e)
{
    const dpo_branch *b = &e->branches[0];
    return b->n - (b->first_scored ? b->first_scored : e->n_prompt == 0);
}

static void load_examples(run *r, dpo_data *data, const char *path, const dpo_tokenizer *tokenizer,
                          size_t limit)
{
    const settings *s = r->s;
    load_data(r->context, data, path, tokenizer, &r->config, (dpo_data_options){
        .use = r->bit == DPO ? DPO_USE_PAIRS : DPO_USE_SFT, .max_length = s->max_length,
        .max_prompt_length = s->max_prompt_length, .keep_start = s->truncation, .limit = limit});
}

/* ---- the run directory ----------------------------------------------------------------------- */

static void check_directory(const char *directory)
{
    static const char *const ours[] = {
        "config.json", "log.csv", "eval.csv", "samples.jsonl", "reference.bin", "model.bin",
        "adapter.bin", "best.bin", "state.bin",
    };
    for (size_t i = 0; i < sizeof ours / sizeof *ours; i++) {
        char *path = path_join(directory, ours[i]);
        if (path_exists(path))
            fail("%s holds another run (%s); choose another -o", directory, ours[i]);
        free(path);
    }
}

static void make_directories(const char *path)
{
    char *copy = path_join(path, "");
    for (char *slash = strchr(copy + 1, '/'); slash; slash = strchr(slash + 1, '/')) {
        *slash = 0;
        if (mkdir(copy, 0777) && errno != EEXIST) fail("cannot make %s: %s", copy, strerror(errno));
        *slash = '/';
    }
    struct stat status;
    if (stat(path, &status) || !S_ISDIR(status.st_mode)) fail("%s is not a directory", path);
    free(copy);
}

static void check_disk(const run *r, double bytes)
{
    struct statvfs disk;
    if (statvfs(r->s->output, &disk)) return;
    double free_bytes = (double)disk.f_bavail * (double)disk.f_frsize;
    say("disk    %10.1f MB of %.1f MB free", 1e-6 * bytes, 1e-6 * free_bytes);
    if (bytes > free_bytes) fail("%s: the disk has too little room for the run", r->s->output);
}

/* Everything needed to repeat the run: every option, and what its files held. */
static void write_config(const run *r, const option *options, size_t n_options)
{
    char *path = path_join(r->s->output, "config.json"), number[32];
    FILE *file = create_file(path);
    fprintf(file, "{\n  \"command\": \"%s\",\n  \"options\": {", r->bit == DPO ? "dpo" : "sft");
    const char *separator = "";
    for (const option *o = options; o < options + n_options; o++) {
        if (!(o->commands & r->bit)) continue;
        fprintf(file, "%s\n    \"%s\": ", separator, o->name);
        separator = ",";
        int length;
        const char *text;
        switch (o->kind) {
        case OPTION_SIZE: case OPTION_BYTES: fprintf(file, "%zu", *(size_t *)o->value); break;
        case OPTION_REAL: fputs(real_text(number, *(double *)o->value), file); break;
        case OPTION_FLAG: fputs(*(int *)o->value ? "true" : "false", file); break;
        case OPTION_CHOICE:
            text = choice_text(o->argument, *(int *)o->value, &length);
            fprintf(file, "\"%.*s\"", length, text);
            break;
        default:
            text = *(const char **)o->value;
            if (text) write_quoted(r->context, file, text, strlen(text));
            else fputs("null", file);
        }
    }
    fprintf(file, "\n  },\n"
            "  \"model_identity\": \"%016llx\",\n  \"reference_identity\": \"%016llx\",\n"
            "  \"reference_file_identity\": \"%016llx\",\n"
            "  \"data_hash\": \"%016llx\",\n  \"eval_data_hash\": \"%016llx\",\n"
            "  \"parameters\": %zu,\n  \"examples\": %zu,\n  \"prompts\": %zu,\n"
            "  \"eval_examples\": %zu,\n  \"steps\": %zu,\n  \"warmup_steps\": %zu,\n"
            "  \"compiler\": ",
            (unsigned long long)r->model.identity, (unsigned long long)r->reference_identity,
            (unsigned long long)r->reference_file_identity, (unsigned long long)r->data.hash,
            (unsigned long long)r->eval.hash, r->model.n_params, r->data.n, r->data.n_groups,
            r->eval.n, r->steps, r->warmup);
    write_quoted(r->context, file, __VERSION__, strlen(__VERSION__));
    fputs("\n}\n", file);
    close_file(file, path);
    free(path);
}

static csv create_log(const run *r, const char *name, const char *before, const char *prefix,
                      const char *after)
{
    csv log = csv_create(path_join(r->s->output, name), NULL);
    csv_cell(&log, "%s", before);
    for (size_t i = 0; i < r->n_metrics; i++) csv_cell(&log, "%s%s", prefix, metric_names[i]);
    if (*after) csv_cell(&log, "%s", after);
    csv_end_row(&log);
    return log;
}

static void create_logs(run *r)
{
    r->log = create_log(r, "log.csv", "step,examples,tokens,epoch,learning_rate", "",
                        "grad_norm,tokens_per_second,seconds");
    if (r->eval.n)
        r->eval_log = create_log(r, "eval.csv", "step,examples,tokens", "eval_",
                                 r->bit == DPO ? "eval_ties,eval_rewards/accuracies_se" : "");
    if (!r->s->samples) return;
    r->samples_path = path_join(r->s->output, "samples.jsonl");
    r->samples = create_file(r->samples_path);
}

/* ---- updates --------------------------------------------------------------------------------- */

/* Gathers the next update's examples, shuffling at the start of every pass over the data. The last
   batch of a pass is smaller; its mean is over what it has. */
static size_t start_batch(run *r)
{
    size_t per_epoch = (r->data.n + r->s->batch_size - 1) / r->s->batch_size;
    size_t epoch = r->step / per_epoch, start = r->step % per_epoch * r->s->batch_size, n;
    if (start == 0)
        check(r->context, dpo_data_shuffle(r->context, r->order, &r->data,
                                           dpo_random_u64(r->s->seed, epoch, 0)));
    for (n = 0; n < r->s->batch_size && start + n < r->data.n; n++) {
        size_t i = r->order[start + n];
        r->batch[n] = r->data.examples[i];
        for (size_t b = 0; r->bit == DPO && b < 2; b++)
            r->batch_reference[2 * n + b] = r->reference[2 * i + b];
    }
    return n;
}

/* Ends the run before the weights are touched, naming the update's examples by their lines. What
   the updates before it made is saved, as after an interrupt. */
static void stop_not_finite(run *r, const char *what, const dpo_example *examples, size_t n)
{
    char lines[256] = "";
    size_t length = 0, shown = 0;
    for (; shown < n && examples[shown].line && length < 200; shown++)
        length += (size_t)snprintf(lines + length, sizeof lines - length, "%s%zu",
                                   shown ? ", " : " at lines ", examples[shown].line);
    if (shown && shown < n)
        snprintf(lines + length, sizeof lines - length, " and %zu more", n - shown);
    if (!r->step)
        fail("update 1 was not made and no model saved: %s; its examples: %zu of %s%s", what, n,
             r->s->data, lines);
    say("%s: update %zu was not made: %s; its examples: %zu of %s%s; the run ends with the "
        "model as update %zu left it", tool_name, r->step + 1, what, n, r->s->data, lines, r->step);
    r->failed = 1;
}

/* One update on r->batch[0 .. n-1]: gradients of the mean loss, micro-batch by micro-batch, then
   the optimizer. Leaves the batch's metrics, as they were before the update, or sets r->failed. */
static void update(run *r, size_t n, double learning_rate, dpo_metrics *metrics, double *norm)
{
    const settings *s = r->s;
    double divisor = (double)n, loss_sum = 0;
    if (r->bit == SFT && s->sft_loss == 0) {
        divisor = 0;
        for (size_t i = 0; i < n; i++) divisor += (double)count_scored(&r->batch[i]);
    }
    check(r->context, dpo_model_zero_grad(&r->model));
    for (size_t start = 0; start < n; ) {
        dpo_batch micro = {.examples = r->batch + start};
        micro.n = dpo_micro_batch(micro.examples, n - start, s->micro_tokens);
        dpo_score *scores = r->scores + start * r->n_branches;
        check(r->context, dpo_forward(&r->model, scores, &micro, 1));
        for (size_t i = 0; i < micro.n; i++) {
            double loss = -scores[i].logp;
            if (r->bit == DPO) {
                const double *reference = r->batch_reference + 2 * (start + i);
                dpo_pair pair = dpo_pair_loss(scores + 2 * i, reference, &r->loss);
                loss = pair.loss;
                r->dlogp[2 * i] = pair.dlogp[0] / divisor;
                r->dlogp[2 * i + 1] = pair.dlogp[1] / divisor;
            } else {
                r->dlogp[i] = -1 / divisor;
            }
            if (!isfinite(loss)) {
                stop_not_finite(r, "the loss is not finite; a lower --learning-rate may help",
                                &micro.examples[i], 1);
                return;
            }
            loss_sum += loss;
        }
        check(r->context, dpo_backward(&r->model, &micro, r->dlogp));
        start += micro.n;
    }
    if (dpo_grad_norm(&r->model, norm)) {
        stop_not_finite(r, r->context->error, r->batch, n);
        return;
    }
    *metrics = (dpo_metrics){.n = n, .loss = loss_sum / divisor};
    if (r->bit == DPO)
        check(r->context, dpo_metrics_compute(r->context, metrics, NULL, r->batch, r->scores,
                                              r->batch_reference, n, &r->loss));
    check(r->context, dpo_optimizer_step(&r->model, &r->optimizer, learning_rate,
                                         dpo_clip_scale(*norm, s->max_grad_norm)));
    r->step++;
    r->examples += n;
    for (size_t i = 0; i < n; i++) r->tokens += count_tokens(&r->batch[i]);
}

/* ---- the reference --------------------------------------------------------------------------- */

/* Summed log-probabilities of every branch under the model, in pieces so that progress shows. */
static void score_reference(run *r, double *logp, const dpo_data *data)
{
    enum { PIECE = 64 };
    dpo_score scores[2 * PIECE];
    progress bar = progress_start("reference");
    for (size_t i = 0; i < data->n && !interrupted; i += PIECE) {
        size_t n = data->n - i < PIECE ? data->n - i : PIECE;
        check(r->context, dpo_score_examples(&r->model, scores, data->examples + i, n,
                                             r->s->micro_tokens));
        for (size_t j = 0; j < 2 * n; j++) {
            logp[2 * i + j] = scores[j].logp;
            if (!isfinite(scores[j].logp))
                fail("the reference model is damaged: it gives an answer at line %zu a "
                     "log-probability of %g", data->examples[i + j / 2].line, scores[j].logp);
        }
        progress_show(&bar, i + n, data->n, "pairs");
    }
    clear_bar();
    if (interrupted) fail("stopped before the first update; nothing was saved");
}

/* Before the first update the policy is the reference, so the first micro-batch, computed in
   another order and grouping than the reference was, must give margins of exactly 0. */
static void self_check(run *r, int cached)
{
    const double beta = r->s->beta;
    const double expected = r->loss.kind == DPO_LOSS_SIGMOID ? log(2)
                          : r->loss.kind == DPO_LOSS_HINGE ? 1 : 1 / (4 * beta * beta);
    size_t n = start_batch(r);
    dpo_batch batch = {r->batch, dpo_micro_batch(r->batch, n, r->s->micro_tokens)};
    for (size_t i = 0, j = batch.n - 1; i < j; i++, j--) {
        dpo_example swap = r->batch[i];
        r->batch[i] = r->batch[j];
        r->batch[j] = swap;
    }
    check(r->context, dpo_forward(&r->model, r->scores, &batch, 0));
    for (size_t i = 0; i < batch.n; i++) {
        const double *reference = r->batch_reference + 2 * (batch.n - 1 - i);
        dpo_pair pair = dpo_pair_loss(r->scores + 2 * i, reference, &r->loss);
        int exact = pair.reward[0] == 0 && pair.reward[1] == 0;
        if (exact && fabs(pair.loss / expected - 1) < 1e-12) continue;
        fail("self-check failed: model and reference are the same, but the pair at line %zu has "
             "rewards %g and %g and loss %.9g instead of 0, 0 and %.9g; %s", r->batch[i].line,
             pair.reward[0], pair.reward[1], pair.loss, expected,
             cached ? "another build of the program made the reference cache: delete it"
                    : "please report this");
    }
}

/* Loads the policy, and the reference's log-probabilities from the cache if it exists, or else
   from the reference model, which is in memory before the policy and never beside it. The run
   directory gets its own copy: 16 bytes a pair. */
static void load_models(run *r, uint64_t policy_identity)
{
    const settings *s = r->s;
    const char *cache = s->reference_cache;
    size_t n = 2 * (r->data.n + r->eval.n);
    uint64_t key = dpo_random_u64(r->data.hash, r->eval.hash, 0);   // of both data sets
    int cached = cache && path_exists(cache), loaded = 0;
    if (cached) {
        check(r->context, dpo_reference_load(r->context, cache, r->reference_identity, key,
                                             r->reference, n));
        say("reference log-probabilities read from %s", cache);
    } else if (r->bit == DPO) {
        loaded = r->reference_identity == policy_identity;
        check(r->context, dpo_model_load(r->context, &r->model, loaded ? s->model : s->reference,
                                         !s->no_verify));
        score_reference(r, r->reference, &r->data);
        score_reference(r, r->reference + 2 * r->data.n, &r->eval);
        if (!loaded) dpo_model_free(&r->model);
    }
    if (!loaded)
        check(r->context, dpo_model_load(r->context, &r->model, s->model, !s->no_verify));
    if (r->bit == DPO && r->reference_identity == policy_identity) self_check(r, cached);
    if (r->bit != DPO) return;
    const char *const paths[] = {cache, r->reference_path};
    for (int i = 0; i < 2; i++)
        if (paths[i] && !path_exists(paths[i]))
            check(r->context, dpo_reference_save(r->context, paths[i], r->reference_identity, key,
                                                 r->reference, n));
    dpo_file file;
    check(r->context, dpo_file_open(r->context, &file, r->reference_path, DPO_FILE_REFERENCE, 0));
    r->reference_file_identity = file.identity;
    dpo_file_close(r->context, &file);
}

/* ---- evaluation ------------------------------------------------------------------------------ */

static void log_metrics(const run *r, csv *log, const dpo_metrics *m)
{
    double values[N_METRICS];
    metric_values(values, m);
    for (size_t i = 0; i < r->n_metrics; i++) csv_cell(log, "%.9g", values[i]);
}

/* Greedy answers to the first prompts, to be read beside the numbers. Text without prompts lends
   its first tokens. */
static void write_samples(run *r)
{
    static const char *const stops[] = {"\n\nHuman:"};
    const dpo_sampling sampling = {.max_new_tokens = 64, .top_p = 1, .stops = stops, .n_stops = 1};
    const dpo_data *data = r->eval.n ? &r->eval : &r->data;
    const dpo_tokenizer *tokenizer = &r->model.tokenizer;
    for (size_t i = 0; i < r->s->samples && i < data->n; i++) {
        const dpo_example *e = &data->examples[i];
        const dpo_branch *b = &e->branches[0];
        dpo_string prompt = {0}, answer = {0};
        const uint32_t *tokens = e->n_prompt ? e->prompt : b->tokens;
        size_t n = e->n_prompt ? e->n_prompt : b->n < 16 ? b->n : 16;
        check(r->context, dpo_tokenizer_decode(r->context, &prompt, tokenizer, tokens, n));
        check(r->context, dpo_generate(&r->model, &answer, tokens, n, &sampling, NULL, NULL));
        check(r->context, dpo_string_make_valid(r->context, &prompt));
        check(r->context, dpo_string_make_valid(r->context, &answer));
        size_t tail = prompt.n < 60 ? prompt.n : 60;
        while (tail > 0 && prompt.bytes[prompt.n - tail] == '\n') tail--;
        say("--- sample %zu\n%s%.*s|%.*s", i + 1, tail < prompt.n ? "..." : "", (int)tail,
            prompt.bytes + prompt.n - tail, (int)answer.n, answer.n ? answer.bytes : "");
        fprintf(r->samples, "{\"step\": %zu, \"prompt\": ", r->step);
        write_quoted(r->context, r->samples, prompt.bytes, prompt.n);
        fputs(", \"completion\": ", r->samples);
        write_quoted(r->context, r->samples, answer.bytes, answer.n);
        fputs("}\n", r->samples);
        dpo_string_free(r->context, &prompt);
        dpo_string_free(r->context, &answer);
    }
    if (fflush(r->samples)) fail("cannot write %s: %s", r->samples_path, strerror(errno));
}

static void evaluate(run *r)
{
    dpo_metrics *m = &r->last_eval;
    if (r->s->samples) write_samples(r);
    if (!r->eval.n) return;
    check(r->context, dpo_score_examples(&r->model, r->scores, r->eval.examples, r->eval.n,
                                         r->s->micro_tokens));
    if (r->bit == DPO) {
        check(r->context, dpo_metrics_compute(r->context, m, NULL, r->eval.examples, r->scores,
                                              r->reference + 2 * r->data.n, r->eval.n, &r->loss));
        say("step %zu: eval loss %.4f, accuracy %.3f +- %.3f, margin %.4f, %zu ties", r->step,
            m->loss, m->accuracy, m->accuracy_error, m->margin, m->ties);
    } else {
        double logp = 0, scored = 0;
        for (size_t i = 0; i < r->eval.n; i++) {
            logp += r->scores[i].logp;
            scored += (double)r->scores[i].n_scored;
        }
        int sum = r->s->sft_loss;       // the loss is what training minimises
        *m = (dpo_metrics){.n = r->eval.n, .loss = -logp / (sum ? (double)r->eval.n : scored)};
        say("step %zu: eval loss %.4f nats per %s, perplexity %.2f", r->step, m->loss,
            sum ? "answer" : "token", exp(-logp / scored));
    }
    if (!isfinite(m->loss))
        fail("the evaluation after update %zu gives a loss of %g, so no model was saved; a lower "
             "--learning-rate may help", r->step, m->loss);
    csv_cell(&r->eval_log, "%zu,%zu,%zu", r->step, r->examples, r->tokens);
    log_metrics(r, &r->eval_log, m);
    if (r->bit == DPO) csv_cell(&r->eval_log, "%zu,%.9g", m->ties, m->accuracy_error);
    csv_end_row(&r->eval_log);
    if (r->step == 0) r->first_eval = *m;
    r->last_eval_step = r->step;
}

/* ---- the loop -------------------------------------------------------------------------------- */

static void train(run *r)
{
    const settings *s = r->s;
    size_t eval_steps = s->eval_steps ? s->eval_steps : (r->steps + 19) / 20;
    double start = now();
    progress bar = progress_start(r->bit == DPO ? "dpo" : "sft");
    evaluate(r);
    while (r->step < r->steps && !interrupted) {
        double began = now(), norm, rate = s->learning_rate *
            dpo_schedule_factor((dpo_schedule)s->schedule, r->step, r->steps, r->warmup);
        size_t before = r->tokens;
        dpo_metrics m;
        update(r, start_batch(r), rate, &m, &norm);
        if (r->failed) break;
        double speed = (double)(r->tokens - before) / (now() - began);
        csv_cell(&r->log, "%zu,%zu,%zu,%.6f,%.9g", r->step, r->examples, r->tokens,
                 (double)r->examples / (double)r->data.n, rate);
        log_metrics(r, &r->log, &m);
        csv_cell(&r->log, "%.9g,%.1f,%.3f", norm, speed, now() - start);
        csv_end_row(&r->log);
        char details[96], accuracy[32] = "";
        if (r->bit == DPO) snprintf(accuracy, sizeof accuracy, " accuracy %.3f", m.accuracy);
        snprintf(details, sizeof details, "loss %.4f%s %.0f tokens/s", m.loss, accuracy, speed);
        progress_show(&bar, r->step, r->steps, details);
        if (r->step % eval_steps == 0 || r->step == r->steps) evaluate(r);
    }
    clear_bar();
}

static void save(run *r)
{
    for (size_t i = 0; i < r->model.n_params; i++)
        if (!isfinite(r->model.params[i]))
            fail("update %zu left weights that are not finite, so no model was saved; a lower "
                 "--learning-rate may help", r->step);
    check(r->context, dpo_model_save(&r->model, r->model_path));
}

static void print_results(const run *r)
{
    double first[N_METRICS], last[N_METRICS];
    metric_values(first, &r->first_eval);
    metric_values(last, &r->last_eval);
    if (r->eval.n) {
        printf("%-24s %12s %7s%5zu\n", "step", "0", "", r->last_eval_step);
        for (size_t i = 0; i < r->n_metrics; i++)
            printf("eval_%-19s %12.4f %12.4f\n", metric_names[i], first[i], last[i]);
        if (r->bit == DPO)
            printf("eval_%-19s %12.4f %12.4f\neval_%-19s %12zu %12zu\n", "rewards/accuracies_se",
                   r->first_eval.accuracy_error, r->last_eval.accuracy_error, "ties",
                   r->first_eval.ties, r->last_eval.ties);
    }
    printf("%zu of %zu updates, %zu examples, %zu tokens; model saved: %s\n", r->step, r->steps,
           r->examples, r->tokens, r->model_path);
}

static void plan_steps(run *r)
{
    const settings *s = r->s;
    double per_epoch = ceil((double)r->data.n / (double)s->batch_size);
    r->steps = s->max_steps ? s->max_steps : (size_t)ceil(s->epochs * per_epoch);
    r->warmup = (size_t)ceil(s->warmup_ratio * (double)r->steps);
    if (s->warmup_max && r->warmup > s->warmup_max) r->warmup = s->warmup_max;
    if (s->warmup_steps) r->warmup = s->warmup_steps;
    say("plan    %zu updates of %zu examples, warmup %zu", r->steps, s->batch_size, r->warmup);
}

/* Buffers of the programs' own; everything large is the library's. */
static void allocate_buffers(run *r)
{
    size_t batch = r->s->batch_size < r->data.n ? r->s->batch_size : r->data.n;
    size_t most = batch > r->eval.n ? batch : r->eval.n;
    r->order = allocate(r->data.n, sizeof *r->order);
    r->batch = allocate(batch, sizeof *r->batch);
    r->scores = allocate(most * r->n_branches, sizeof *r->scores);
    r->dlogp = allocate(2 * batch, sizeof *r->dlogp);
    if (r->bit != DPO) return;
    r->reference = allocate(2 * (r->data.n + r->eval.n), sizeof *r->reference);
    r->batch_reference = allocate(2 * batch, sizeof *r->batch_reference);
}

/* Reads all that can be wrong (files, data, memory) before anything large or lasting is made. */
static uint64_t prepare(run *r)
{
    const settings *s = r->s;
    dpo_file file, other;
    dpo_config other_config = {0};
    dpo_tokenizer tokenizer, other_tokenizer;
    check_directory(s->output);
    open_model(r->context, &file, &r->config, &tokenizer, s->model);
    uint64_t identity = r->reference_identity = file.identity;
    size_t carried = 0;     // tokenizer and original files, which the saved model holds as well
    for (size_t i = 0; i < file.n_entries; i++)
        if (strchr(file.entries[i].name, '/')) carried += file.entries[i].bytes;
    if (s->reference) {
        open_model(r->context, &other, &other_config, &other_tokenizer, s->reference);
        check_same_tokenizer(&file, s->model, &other, s->reference);
        r->reference_identity = other.identity;
        dpo_tokenizer_free(r->context, &other_tokenizer);
        dpo_file_close(r->context, &other);
    }
    load_examples(r, &r->data, s->data, &tokenizer, s->limit);
    if (s->eval_data) load_examples(r, &r->eval, s->eval_data, &tokenizer, s->eval_examples);
    else say("note    no --eval-data: nothing held out is evaluated");
    dpo_tokenizer_free(r->context, &tokenizer);
    dpo_file_close(r->context, &file);
    dpo_plan_options plan = {.train = 1, .optimizer = (dpo_optimizer_kind)s->optimizer,
                             .n_threads = r->context->n_threads};
    plan_data(&plan, &r->data, s->micro_tokens);
    plan_data(&plan, &r->eval, s->micro_tokens);
    plan_steps(r);
    size_t reference = 2 * (r->data.n + r->eval.n) * sizeof(double);
    size_t weights = check_memory(r->context, &r->config, &plan, reference, s->max_memory, 1,
                                  LESS_MEMORY);
    plan.train = 0;
    if (s->reference)
        check_memory(r->context, &other_config, &plan, reference, s->max_memory, 0, LESS_MEMORY);
    make_directories(s->output);
    check_can_make(r->model_path);
    if (s->reference_cache && !path_exists(s->reference_cache)) check_can_make(s->reference_cache);
    check_disk(r, (double)(weights + reference + carried));
    return identity;
}

/* Returns the exit status. */
static int run_training(dpo_context *context, const settings *s, unsigned bit,
                        const option *options, size_t n_options)
{
    static run r;   // lives as long as the program
    r = (run){.s = s, .bit = bit, .context = context,
              .n_branches = bit == DPO ? 2 : 1, .n_metrics = bit == DPO ? N_METRICS : 1,
              .loss = {(dpo_loss_kind)s->loss_type, s->beta, s->label_smoothing}};
    if (s->label_smoothing > 0 && s->loss_type != DPO_LOSS_SIGMOID)
        usage_fail("--label-smoothing goes with --loss-type sigmoid only");
    catch_signals();
    r.model_path = path_join(s->output, "model.bin");
    r.reference_path = path_join(s->output, "reference.bin");
    uint64_t identity = prepare(&r);
    allocate_buffers(&r);
    load_models(&r, identity);
    write_config(&r, options, n_options);
    create_logs(&r);
    check(context, dpo_optimizer_init(&r.model, &r.optimizer, (dpo_optimizer_kind)s->optimizer));
    r.optimizer.beta1 = s->adam_beta1;
    r.optimizer.beta2 = s->optimizer == DPO_RMSPROP ? s->rmsprop_alpha : s->adam_beta2;
    r.optimizer.epsilon = s->adam_epsilon;
    r.optimizer.weight_decay = s->weight_decay;
    train(&r);
    save(&r);
    csv_close(&r.log);
    if (r.eval.n) csv_close(&r.eval_log);
    if (r.samples) close_file(r.samples, r.samples_path);
    print_results(&r);
    finish_stdout();
    if (interrupted) say("interrupted: the model is as update %zu left it", r.step);
    dpo_optimizer_free(&r.model, &r.optimizer);
    dpo_model_free(&r.model);
    dpo_data_free(context, &r.data);
    dpo_data_free(context, &r.eval);
    return r.failed ? 1 : interrupted ? 128 + interrupted : 0;
}

int main(int argc, char **argv)
{
    static const size_t n_commands = sizeof commands / sizeof *commands;
    unsigned bit;
    tool_name = "train";
    const tool_command *c = find_command(argc, argv, commands, n_commands, &bit);
    static settings s;
    s = default_settings(bit);
    option options[N_OPTIONS];
    size_t n_options = list_options(options, &s, bit);
    tool_name = bit == INIT ? "train init" : bit == SFT ? "train sft" : "train dpo";
    parse_options(argc, argv, c, bit, options, n_options);
    s.model = s.model ? model_path(s.model) : NULL;
    s.reference = s.reference ? model_path(s.reference) : NULL;

    dpo_context context;
    check(&context, dpo_context_init(&context, (int)s.threads));
    int status = 0;
    if (bit == INIT) init_model(&context, &s);
    else status = run_training(&context, &s, bit, options, n_options);
    dpo_context_free(&context);
    return status;
}
