/* train.c: makes and trains language models with dpo.h.

       ./train init --preset tiny -o tiny.bin                    random weights
       ./train sft -m tiny.bin -d text.txt -o runs/sft           supervised fine-tuning, pretraining
       ./train dpo -m runs/sft -d prefs.jsonl -o runs/dpo        on pairs, all weights
       ./train dpo -m runs/sft -d prefs.jsonl -o runs/lora --lora --dtype bf16    or an adapter only
       ./train merge -m runs/lora -o merged.bin                  folds the adapter into its model
       ./train plan                                              what fits into which memory

   Every option has a default, which `./train dpo --help` prints (`./train dpo --lora --help` those
   of adapters). A run directory gets config.json (everything to repeat the run), log.csv (a row per
   update), eval.csv, reference.bin (the reference's log-probabilities), state.bin (to resume from),
   best.bin (the best of the evaluations) and, at the end, model.bin or adapter.bin. */
#define DPO_IMPLEMENTATION
#include "dpo.h"
#include "tools.h"
#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/statvfs.h>

enum { INIT = 1, SFT = 2, DPO = 4, MERGE = 8, PLAN = 16, TRAIN = SFT | DPO, FROM = TRAIN | MERGE,
       MAKE = INIT | FROM, ALL = MAKE | PLAN };

static const tool_command commands[] = {
    {"init", "init -o MODEL [options]", "Make a model with random weights."},
    {"sft", "sft -m MODEL -d FILE -o DIR [options]",
     "Supervised fine-tuning on answers; on plain text, pretraining."},
    {"dpo", "dpo -m MODEL -d FILE -o DIR [options]",
     "Direct preference optimization on pairs of a chosen and a rejected answer."},
    {"merge", "merge -m MODEL -o MODEL [options]",
     "Fold an adapter into its model, or store a model in another precision."},
    {"plan", "plan [options]", "Print the memory that DPO takes, for all sizes and settings."},
};

/* ---- settings -------------------------------------------------------------------------------- */

/* Choices stand in the order of the library's enumerations. */
typedef struct settings {
    const char *model, *adapter, *data, *eval_data, *output, *reference, *reference_cache;
    const char *tokenizer, *lora_targets;
    int preset, architecture, position, activation, parallel_residual, tied_head;
    size_t d_model, n_layers, n_heads, d_ff, context_length, vocab_size;
    int loss_type, sft_loss, truncation, optimizer, schedule, no_verify;
    double beta, label_smoothing;
    size_t max_length, max_prompt_length, limit, batch_size, max_steps, warmup_steps, warmup_max;
    double epochs, learning_rate, warmup_ratio, adam_beta1, adam_beta2, adam_epsilon, rmsprop_alpha;
    double weight_decay, max_grad_norm;
    size_t eval_examples, eval_steps, samples, seed, threads, micro_tokens, max_memory;
    int dtype, stochastic_rounding, recompute, lora, rslora, resume, dry_run;
    size_t lora_r, save_steps, patience;
    double lora_alpha, lora_dropout, save_minutes, min_delta;
    // Of a run that goes on: what config.json says of a reference that is not named anew, and how
    // many updates the run has.
    int reference_known;
    uint64_t reference_identity, reference_adapter_identity;
    size_t steps_before;
} settings;

/* Fewer numbers learn at a higher rate, so defaults depend on whether an adapter is trained. */
static settings default_settings(unsigned bit, int lora)
{
    return (settings){
        .architecture = -1, .position = -1, .activation = -1, .parallel_residual = -1,
        .tied_head = -1,
        .beta = 0.1, .max_length = 512, .max_prompt_length = 256, .batch_size = 64, .epochs = 1,
        .learning_rate = bit == DPO ? (lora ? 5e-5 : 1e-6) : lora ? 2e-4 : 2e-5,
        .schedule = bit == DPO ? DPO_CONSTANT : DPO_COSINE,
        .warmup_ratio = bit == DPO ? 0.1 : 0.03, .warmup_max = bit == DPO ? 150 : 0,
        .adam_beta1 = 0.9, .adam_beta2 = 0.999, .adam_epsilon = 1e-8, .rmsprop_alpha = 0.99,
        .max_grad_norm = 1, .eval_examples = 256, .micro_tokens = 2048,
        .lora_r = 16, .lora_alpha = 32, .lora_targets = "all-linear", .save_minutes = 30,
    };
}

#define PRESETS "tiny|pythia-14m|pythia-31m|pythia-70m|pythia-160m|pythia-410m|pythia-1b|" \
                "pythia-1.4b|pythia-2.8b|pythia-6.9b|pythia-12b|btlm-3b"
static const struct preset {
    const char *name;
    dpo_architecture architecture;
    size_t n_layers, d_model, n_heads, d_ff, context_length, vocab_size;
} presets[] = {
    {"tiny", DPO_GPT_NEOX, 2, 64, 4, 256, 512, 0},
    {"pythia-14m", DPO_GPT_NEOX, 6, 128, 4, 512, 2048, 50304},
    {"pythia-31m", DPO_GPT_NEOX, 6, 256, 8, 1024, 2048, 50304},
    {"pythia-70m", DPO_GPT_NEOX, 6, 512, 8, 2048, 2048, 50304},
    {"pythia-160m", DPO_GPT_NEOX, 12, 768, 12, 3072, 2048, 50304},
    {"pythia-410m", DPO_GPT_NEOX, 24, 1024, 16, 4096, 2048, 50304},
    {"pythia-1b", DPO_GPT_NEOX, 16, 2048, 8, 8192, 2048, 50304},
    {"pythia-1.4b", DPO_GPT_NEOX, 24, 2048, 16, 8192, 2048, 50304},
    {"pythia-2.8b", DPO_GPT_NEOX, 32, 2560, 32, 10240, 2048, 50304},
    {"pythia-6.9b", DPO_GPT_NEOX, 32, 4096, 32, 16384, 2048, 50432},
    {"pythia-12b", DPO_GPT_NEOX, 36, 5120, 40, 20480, 2048, 50688},
    {"btlm-3b", DPO_BTLM, 32, 2560, 32, 6826, 8192, 50257},
};

#define N_OPTIONS 80
/* Fills in the table of all options, whose values live in s; returns how many there are. */
static size_t list_options(option options[N_OPTIONS], settings *s, unsigned bit)
{
    const option table[] = {
        TEXT(FROM, 'm', "model", &s->model, "FILE", bit & TRAIN ? 2 : 1,
            "model to start from: its file, an adapter, or a run directory"),
        TEXT(FROM, 0, "adapter", &s->adapter, "FILE", 0,
            bit == MERGE ? "adapter to fold into it" : "adapter over the model, to train further"),
        TEXT(TRAIN, 'd', "data", &s->data, "FILE", bit & TRAIN ? 2 : 1,
            bit == DPO ? "training pairs, JSON lines" : "training data, JSON lines or plain text"),
        TEXT(MAKE, 'o', "output", &s->output, bit & TRAIN ? "DIR" : "FILE", 1,
            bit & TRAIN ? "run directory to make" : "model to make"),
        CHOICE(MAKE, "dtype", &s->dtype, "fp32|bf16", bit & TRAIN
            ? "precision of weights, products and kept activations"
            : "precision of the matrices in the file"),
        FLAG(TRAIN, "stochastic-rounding", &s->stochastic_rounding,
            "bf16 without fp32 masters: weights and gradients rounded by chance"),
        FLAG(TRAIN | PLAN, "gradient-checkpointing", &s->recompute,
            "compute blocks again in the backward: less memory, a third more time"),
        FLAG(TRAIN, "lora", &s->lora, "train an adapter, leaving the model as it is"),
        COUNT(TRAIN | PLAN, "lora-r", &s->lora_r, 1, 1 << 20,
            bit == PLAN ? "rank of the adapter" : "with --lora: rank of the adapter"),
        REAL(TRAIN, "lora-alpha", &s->lora_alpha, 1e-6, 1e6,
            "with --lora: the adapter counts alpha / r times"),
        FLAG(TRAIN, "use-rslora", &s->rslora,
            "with --lora: the adapter counts alpha / sqrt(r) times"),
        REAL(SFT, "lora-dropout", &s->lora_dropout, 0, 0.99,
            "with --lora: dropout of the adapter's inputs (dpo trains without)"),
        TEXT(TRAIN, 0, "lora-target-modules", &s->lora_targets, "NAMES", 0,
            "with --lora: layers to adapt, names with commas between, as PEFT matches them"),
        CHOICE(INIT, "preset", &s->preset, PRESETS, "sizes to start from"),
        CHOICE(INIT, "arch", &s->architecture, "gpt_neox|btlm",
            "instead of the preset's"),
        COUNT(INIT, "n-layers", &s->n_layers, 0, 1e4, "0: the preset's"),
        COUNT(INIT, "d-model", &s->d_model, 0, 1e6, "width; 0: the preset's"),
        COUNT(INIT, "n-heads", &s->n_heads, 0, 1e4, "0: the preset's"),
        COUNT(INIT, "d-ff", &s->d_ff, 0, 1e7, "0: as wide for d-model as the preset's"),
        COUNT(INIT, "context-length", &s->context_length, 0, 1e7, "0: the preset's"),
        COUNT(INIT, "vocab-size", &s->vocab_size, 0, 1e8,
            "0: the preset's, or without --tokenizer as many as bytes need"),
        CHOICE(INIT, "position", &s->position, "rotary|alibi|learned",
            "instead of the architecture's"),
        CHOICE(INIT, "activation", &s->activation,
            "gelu|gelu_new|gelu_fast|quick_gelu|silu|relu|swiglu",
            "instead of the architecture's"),
        CHOICE(INIT, "parallel-residual", &s->parallel_residual, "no|yes",
            "instead of the architecture's"),
        CHOICE(INIT, "tied-head", &s->tied_head, "no|yes", "instead of the architecture's"),
        TEXT(INIT, 0, "tokenizer", &s->tokenizer, "FILE", 0,
            "model whose tokenizer to take; without it: a token per byte"),
        CHOICE(DPO, "loss-type", &s->loss_type, "sigmoid|ipo|ipo-sum|hinge",
            "sigmoid is DPO's; ipo averages per token"),
        REAL(DPO, "beta", &s->beta, 1e-6, 1e6, "how strongly the reference holds"),
        REAL(DPO, "label-smoothing", &s->label_smoothing, 0, 0.4999,
            "conservative DPO: share of wrong labels"),
        TEXT(DPO, 0, "reference", &s->reference, "FILE", 0,
            "reference model; without it: the one training starts from"),
        TEXT(DPO, 0, "reference-cache", &s->reference_cache, "FILE", 0,
            "share reference.bin between runs: read if it exists, else made"),
        CHOICE(SFT, "sft-loss", &s->sft_loss, "mean|sum",
            "mean per token of the batch, or sum per answer; so are the logged losses"),
        REAL(TRAIN, "epochs", &s->epochs, 1e-9, 1e6, "passes over the data"),
        COUNT(TRAIN, "max-steps", &s->max_steps, 0, 1e12,
            "this many updates, whatever --epochs says; 0: off"),
        COUNT(TRAIN, "batch-size", &s->batch_size, 1, 1e6, "examples per update"),
        REAL(TRAIN, "learning-rate", &s->learning_rate, 0, 1e3, bit == DPO
            ? "at its peak; 5e-05 for an adapter, 1e-06 otherwise"
            : "at its peak; 2e-04 for an adapter, 2e-05 otherwise"),
        CHOICE(TRAIN, "lr-scheduler-type", &s->schedule, "constant|linear|cosine",
            "after the warmup"),
        REAL(TRAIN, "warmup-ratio", &s->warmup_ratio, 0, 1, "share of all updates"),
        COUNT(TRAIN, "warmup-max", &s->warmup_max, 0, 1e12,
            "most updates that warmup-ratio may mean; 0: any"),
        COUNT(TRAIN, "warmup-steps", &s->warmup_steps, 0, 1e12, "updates; 0: by the ratio"),
        CHOICE(TRAIN | PLAN, "optim", &s->optimizer, "adamw|rmsprop", "optimizer"),
        REAL(TRAIN, "adam-beta1", &s->adam_beta1, 0, 0.999999, "decay of AdamW's mean"),
        REAL(TRAIN, "adam-beta2", &s->adam_beta2, 0, 0.99999999, "decay of its mean square"),
        REAL(TRAIN, "adam-epsilon", &s->adam_epsilon, 1e-20, 1, "of either optimizer"),
        REAL(TRAIN, "rmsprop-alpha", &s->rmsprop_alpha, 0, 0.99999999,
            "decay of RMSprop's mean square"),
        REAL(TRAIN, "weight-decay", &s->weight_decay, 0, 1e3, "on matrices only"),
        REAL(TRAIN, "max-grad-norm", &s->max_grad_norm, 0, 1e9, "clip gradients; 0: off"),
        COUNT(TRAIN | PLAN, "max-length", &s->max_length, 2, 1e7,
            "tokens of prompt and answer, or of a window of text"),
        COUNT(TRAIN, "max-prompt-length", &s->max_prompt_length, 1, 1e7,
            "tokens of a prompt when the two do not fit"),
        CHOICE(TRAIN, "truncation", &s->truncation, "keep_end|keep_start",
            "which part of a prompt to keep"),
        COUNT(TRAIN, "limit", &s->limit, 0, 1e15, "read this many examples; 0: all"),
        TEXT(TRAIN, 0, "eval-data", &s->eval_data, "FILE", 0,
            "held-out data; without it: no evaluation"),
        COUNT(TRAIN, "eval-examples", &s->eval_examples, 1, 1e15, "of it, the first"),
        COUNT(TRAIN, "eval-steps", &s->eval_steps, 0, 1e12,
            "updates between evaluations; 0: 1/20 of the run"),
        COUNT(TRAIN, "patience", &s->patience, 0, 1e9,
            "stop after this many evaluations without a better one; 0: off"),
        REAL(TRAIN, "min-delta", &s->min_delta, 0, 1e9,
            "for --patience: better is more than this (and 1e-9) above the last that was"),
        COUNT(TRAIN, "sample", &s->samples, 0, 1e6, "prompts to answer at each evaluation"),
        REAL(TRAIN, "save-minutes", &s->save_minutes, 0, 1e6,
            "between saves of the run's state (each new best.bin saves it too); 0: not by time"),
        COUNT(TRAIN, "save-steps", &s->save_steps, 0, 1e12,
            "updates between saves of the run's state; 0: only by time"),
        FLAG(TRAIN, "resume", &s->resume,
            "go on with the interrupted run in -o, by its config.json"),
        FLAG(TRAIN, "dry-run", &s->dry_run,
            "print what the run will be and take, and stop before anything is made"),
        COUNT(INIT | TRAIN, "seed", &s->seed, 0, MAX_JSON_WHOLE,
            bit == INIT ? "of the random weights"
            : bit == SFT ? "of the order of the data, of a new adapter, of dropout and of rounding"
            : "of the order of the data, of a new adapter and of rounding"),
        COUNT(TRAIN | PLAN, "micro-tokens", &s->micro_tokens, 1, 1e7,
            "tokens computed at a time; decides about memory"),
        FLAG(FROM, "no-verify", &s->no_verify, "do not check the model's checksums"),
        BYTES(MAKE & ~(unsigned)MERGE, "max-memory", &s->max_memory,
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

/* Finds the model of --tokenizer as well, and leaves it closed. */
static dpo_config make_config(dpo_context *context, const settings *s, source *other)
{
    const struct preset *p = &presets[s->preset];
    dpo_config c = {0};
    c.d_model = s->d_model ? s->d_model : p->d_model;
    c.n_layers = s->n_layers ? s->n_layers : p->n_layers;
    c.n_heads = s->n_heads ? s->n_heads : p->n_heads;
    c.d_ff = s->d_ff ? s->d_ff : p->d_ff * c.d_model / p->d_model;
    c.context_length = s->context_length ? s->context_length : p->context_length;

    if (s->tokenizer) open_model(context, other, s->tokenizer, NULL);
    else check(context, dpo_tokenizer_load(context, &other->tokenizer, NULL));
    size_t n_tokens = other->tokenizer.n_tokens;
    close_model(context, other);
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
        c.bos_id = other->config.bos_id;
        c.eos_id = other->config.eos_id;
    }
    check(context, dpo_config_check(context, &c));
    return c;
}

static const dpo_dtype dtypes[] = {DPO_F32, DPO_BF16};

static void init_model(dpo_context *context, const settings *s)
{
    static source other;    // whose path is NULL without --tokenizer
    check_can_make(s->output);
    dpo_config config = make_config(context, s, &other);
    const dpo_dtype dtype = dtypes[s->dtype];
    dpo_plan_options plan = {.n_threads = context->n_threads,
                             .model = {.dtype = dtype, .stochastic = 1}};
    check_memory(context, &config, &plan, 0, s->max_memory, 0, "make a smaller model");
    dpo_model model;
    check(context, dpo_model_init(context, &model, &config, other.path, s->seed, &plan.model));
    check(context, dpo_model_save(&model, s->output, dtype));
    say("made    %s: %.2f M parameters, vocabulary %zu", s->output, 1e-6 * (double)model.n_params,
        config.vocab_size);
    dpo_model_free(&model);
}

/* ---- merge ----------------------------------------------------------------------------------- */

/* Tensor by tensor, from the mapped file: takes little more memory than the largest tensor. */
static void merge_model(dpo_context *context, const settings *s)
{
    static source from;
    dpo_model model;
    check_can_make(s->output);
    open_model(context, &from, s->model, s->adapter);
    close_model(context, &from);
    load_model(context, &model, &from, (dpo_model_options){.no_verify = s->no_verify, .stored = 1});
    check(context, dpo_model_save(&model, s->output, dtypes[s->dtype]));
    say("made    %s: %s%s in %s", s->output, from.path, from.adapter ? " with its adapter" : "",
        s->dtype ? "bf16" : "fp32");
    dpo_model_free(&model);
}

/* ---- plan ------------------------------------------------------------------------------------ */

/* Each size and setting by the plan that a run would print, with micro-batches as large as they may
   get, and every row of them scored. */
static void print_plans(dpo_context *context, const settings *s)
{
    const struct { const char *name; dpo_model_options model; int lora; } columns[] = {
        {"fp32", {0}, 0}, {"bf16", {.dtype = DPO_BF16}, 0},
        {"bf16, stochastic", {.dtype = DPO_BF16, .stochastic = 1}, 0},
        {"LoRA, fp32", {.frozen = 1}, 1}, {"LoRA, bf16", {.dtype = DPO_BF16, .frozen = 1}, 1},
    };
    enum { N = sizeof columns / sizeof *columns };
    printf("GB for DPO%s, micro-batches of %zu tokens, %s, LoRA's r %zu\n%-14s %10s",
           s->recompute ? " with --gradient-checkpointing" : "", s->micro_tokens,
           s->optimizer == DPO_ADAMW ? "AdamW" : "RMSprop", s->lora_r, "size", "parameters");
    for (size_t j = 0; j < N; j++) printf(" %17s", columns[j].name);
    for (size_t i = 1; i < sizeof presets / sizeof *presets; i++) {
        const struct preset *p = &presets[i];
        dpo_config config = {.d_model = p->d_model, .n_layers = p->n_layers, .n_heads = p->n_heads,
            .d_ff = p->d_ff, .context_length = p->context_length, .vocab_size = p->vocab_size};
        dpo_config_default(&config, p->architecture);
        for (size_t j = 0; j < N; j++) {
            dpo_memory memory;
            dpo_plan_options plan = {.model = columns[j].model, .train = 1,
                .lora = {.r = columns[j].lora ? s->lora_r : 0, .alpha = 1, .targets = "all-linear"},
                .optimizer = (dpo_optimizer_kind)s->optimizer, .max_rows = s->micro_tokens,
                .kept_rows = s->micro_tokens, .max_scored = s->micro_tokens,
                .max_span = s->max_length, .n_threads = context->n_threads};
            plan.model.recompute = s->recompute;
            check(context, dpo_memory_plan(context, &memory, &config, &plan));
            if (!j) printf("\n%-14s %8.1f M", p->name, 1e-6 * (double)memory.params);
            printf(" %17.2f", 1e-9 * (double)memory.total);
        }
    }
    putchar('\n');
    finish_stdout();
}

/* ---- a training run -------------------------------------------------------------------------- */

/* How far a run is: what state.bin holds besides weights and optimizer. */
typedef struct position {
    size_t step, examples, tokens;
    double seconds;
    size_t log_bytes, eval_bytes, samples_bytes;    // lengths of the files then
    dpo_metrics first_eval, last_eval, best;        // best.n 0: none yet
    size_t last_eval_step, best_step, evaluations;
    uint64_t best_identity;                         // of best.bin; 0: none yet
    size_t n_equal, equal_steps[8];                 // later evaluations as good, the first of them
    size_t waited;                                  // evaluations without a better one ...
    double to_beat;                                 // ... than this by --min-delta
} position;

typedef struct run {
    const settings *s;
    unsigned bit;               // SFT or DPO
    dpo_context *context;
    source source, reference_source;
    dpo_lora lora;              // lora.r 0: all weights are trained
    dpo_model model;
    dpo_optimizer optimizer;
    dpo_loss_options loss;
    dpo_data data, eval;        // eval.n is 0 without --eval-data
    dpo_data_options cut;       // how they are cut; lengths beyond the context are lowered
    size_t n_branches;          // of every example: 2 for dpo, 1 for sft
    double *reference;          // [2 data.n, then 2 eval.n] reference log-probabilities; dpo only
    int reference_cached;       // they were read from a file
    size_t *order;              // [data.n] the order of epoch `order_of`
    size_t order_of;
    dpo_example *batch;         // [batch_size] the update's examples ...
    double *batch_reference;    // [2 batch_size] and their reference
    dpo_score *scores;          // [the larger of batch and eval, times n_branches]
    double *dlogp;              // [2 batch_size]
    size_t n_metrics;           // columns in the logs: all for dpo, the loss for sft
    size_t steps, warmup;
    position at;
    double started;             // clock at the start, less what earlier parts of the run took
    double saved;               // clock when the state was saved last ...
    size_t saved_step;          // ... and after which update
    dpo_memory memory;          // the plan
    csv log, eval_log;
    FILE *samples;
    const char *config_path, *reference_path, *result_path, *best_path, *next_best_path;
    const char *state_path, *samples_path;
    char *description;          // what config.json says, and ...
    uint64_t identity;          // ... its fingerprint: tells runs apart
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

/* Scored tokens of an sft example; without a prompt the first token has nothing to predict it. */
static size_t count_scored(const dpo_example *e)
{
    const dpo_branch *b = &e->branches[0];
    return b->n - (b->first_scored ? b->first_scored : e->n_prompt == 0);
}

static void load_examples(run *r, dpo_data *data, const char *path, size_t limit)
{
    r->cut.limit = limit;
    load_data(r->context, data, path, &r->source.tokenizer, &r->source.config, &r->cut);
}

/* The model of --reference has to read the same tokens, and its context may be shorter. */
static void check_reference_context(const run *r, const dpo_data *data, const char *path)
{
    const source *from = &r->reference_source;
    size_t context = from->config.context_length;
    if (from->config.position == DPO_ALIBI) return;     // which goes on beyond
    for (const dpo_example *e = data->examples; e < data->examples + data->n; e++)
        for (size_t b = 0; b < e->n_branches; b++)
            if (e->n_prompt + e->branches[b].n - 1 > context)
                fail("%s (--reference) reads %zu tokens, and the pair at line %zu of %s has %zu; "
                     "lower --max-length to %zu", from->path, context, e->line, path,
                     e->n_prompt + e->branches[b].n, context);
}

static dpo_model_options model_options(const run *r)
{
    return (dpo_model_options){.no_verify = r->s->no_verify, .dtype = dtypes[r->s->dtype],
        .frozen = r->lora.r > 0, .stochastic = r->s->stochastic_rounding,
        .recompute = r->s->recompute};
}

/* ---- the run directory ----------------------------------------------------------------------- */

static const char *const run_files[] = {
    "config.json", "log.csv", "eval.csv", "samples.jsonl", "reference.bin", "model.bin",
    "adapter.bin", "best.bin", "next_best.bin", "state.bin",
};
enum { N_RUN_FILES = sizeof run_files / sizeof *run_files };

/* A run that was killed while it wrote leaves a part of a file under a temporary name. */
static void remove_temporaries(const char *directory)
{
    DIR *stream = opendir(directory);
    for (struct dirent *entry; stream && (entry = readdir(stream));)
        for (size_t i = 0; i < N_RUN_FILES; i++) {
            size_t n = strlen(run_files[i]);
            if (strncmp(entry->d_name, run_files[i], n) || strncmp(entry->d_name + n, ".tmp-", 5))
                continue;
            char *path = path_join(directory, entry->d_name);
            remove(path);
            free(path);
        }
    if (stream) closedir(stream);
}

static char *read_text(const char *path)
{
    struct stat status;
    FILE *file = fopen(path, "rb");
    if (!file || fstat(fileno(file), &status)) fail("%s: %s", path, strerror(errno));
    size_t n = (size_t)status.st_size;
    char *text = allocate(n + 1, 1);
    if (fread(text, 1, n, file) != n) fail("%s cannot be read", path);
    fclose(file);
    return text;
}

/* The update of the last whole row in a run's log. */
static size_t last_step(const char *directory)
{
    const char *path = run_file(directory, "log.csv");
    char *text = path ? read_text(path) : NULL, *end = text ? strrchr(text, '\n') : NULL;
    if (!end) return 0;
    *end = 0;
    const char *row = strrchr(text, '\n');
    return row ? strtoull(row + 1, NULL, 10) : 0;
}

/* What is left to do with a run that cannot go on. */
static const char *begin_anew(const char *directory, unsigned bit)
{
    return bit == DPO && run_file(directory, "reference.bin")
         ? "begin anew with another -o (its reference.bin serves as --reference-cache)"
         : "begin anew with another -o";
}

static void check_directory(const run *r)
{
    const char *directory = r->s->output;
    if (r->s->resume) {
        if (path_exists(r->state_path)) return;
        const size_t last = last_step(directory), all = r->s->steps_before;
        const int saved = path_exists(r->result_path);
        if (saved && all && last >= all)
            fail("%s cannot be resumed: the run is complete, with %zu updates; for more of them "
                 "begin another run, from this one's model", directory, all);
        fail("%s cannot be resumed: it has no state.bin, and its log ends at update %zu of %zu%s; "
             "%s", directory, last, all, saved && r->s->patience
             ? " (if --patience ended it there, it is complete)" : "",
             begin_anew(directory, r->bit));
    }
    for (size_t i = 0; i < N_RUN_FILES; i++)
        if (run_file(directory, run_files[i]))
            fail("%s holds another run (%s); choose another -o%s", directory, run_files[i],
                 path_exists(r->state_path) ? ", or go on with that one by --resume" : "");
}

/* Directories that were made for the run, the innermost last; a run that does not get as far as a
   file takes them away again. */
static char *made_directories[64];
static size_t n_made_directories;

static void remove_empty_directories(void)
{
    while (n_made_directories && !rmdir(made_directories[--n_made_directories]));
}

static void check_no_file(const char *path)
{
    if (path_exists(path) && !is_directory(path))
        fail("%s is a file; -o names a directory", path);
}

static void make_directories(const char *path)
{
    enum { MOST = sizeof made_directories / sizeof *made_directories };
    char *copy = path_join(path, "");
    atexit(remove_empty_directories);
    for (char *slash = strchr(copy + 1, '/'); slash; slash = strchr(slash + 1, '/')) {
        *slash = 0;
        if (!mkdir(copy, 0777)) {
            if (n_made_directories < MOST) made_directories[n_made_directories++] = strdup(copy);
        } else if (errno != EEXIST) {
            fail("cannot make %s: %s", copy, strerror(errno));
        }
        *slash = '/';
    }
    free(copy);
}

/* One process at a time trains in a directory: it holds a lock on it until it ends, however it
   ends. A file system without locks has to do without. */
static void lock_directory(const run *r)
{
    const char *directory = r->s->output;
    int descriptor = open(directory, O_RDONLY | O_CLOEXEC);
    if (descriptor < 0) fail("cannot open %s: %s", directory, strerror(errno));
    if (!flock(descriptor, LOCK_EX | LOCK_NB) || errno != EWOULDBLOCK) return;
    n_made_directories = 0;     // it is the other's now
    fail("another process is training in %s; %s", directory, r->s->resume
         ? "wait until it ends, or stop it by Ctrl-C, which saves its state"
         : "wait for it, or choose another -o");
}

/* From here on the run directory, which exists, is this process's alone. */
static void enter_directory(const run *r)
{
    lock_directory(r);
    check_directory(r);
    if (!r->s->dry_run) remove_temporaries(r->s->output);
}

/* The run's files at the worst moment: the best model beside its successor, the result of an
   interrupt (beside its own successor, where there is no best), and two states. Those that are
   there already will be replaced. */
static void check_disk(const run *r, size_t result)
{
    const settings *s = r->s;
    const char *const files[] = {r->result_path, r->best_path, r->next_best_path, r->state_path,
                                 r->reference_path};
    struct statvfs disk;
    struct stat status;
    if (statvfs(s->output, &disk)) return;
    int states = s->resume || s->save_steps || s->save_minutes > 0 || r->eval.n ? 2 : 1;
    int results = r->eval.n ? 3 : path_exists(r->result_path) ? 2 : 1;
    double bytes = (double)results * (double)result +
                   (double)states * (double)r->memory.state_file, own = 0;
    if (r->bit == DPO) bytes += 16.0 * (double)(r->data.n + r->eval.n);
    for (size_t i = 0; i < sizeof files / sizeof *files; i++)
        if (!stat(files[i], &status)) own += (double)status.st_size;
    double free_bytes = (double)disk.f_bavail * (double)disk.f_frsize;
    say("disk    %10.1f MB of %.1f MB free%s: result %.1f MB%s, state %.1f MB (while the run "
        "lasts)", 1e-6 * bytes, 1e-6 * (free_bytes + own), own > 0 ? " or the run's" : "",
        1e-6 * (double)result, r->eval.n ? " and best.bin" : "",
        1e-6 * (double)r->memory.state_file);
    if (bytes > free_bytes + own)
        fail("the run needs %.1f MB of disk in %s%s, and %.1f MB are free there; make room, or %s",
             1e-6 * (bytes - own), s->output, own > 0 ? " besides what it has" : "",
             1e-6 * free_bytes, s->resume ? "move the directory to a larger disk"
                                          : "choose an -o on another disk");
}

/* Options that change neither results nor the run's files. Paths are free, since fingerprints of
   what they lead to are compared too: a run may have been moved. */
static int is_free(const char *name)
{
    static const char *const names[] = {"threads", "max-memory", "no-verify", "resume",
                                        "dry-run", "save-steps", "save-minutes",
                                        "reference-cache", "output", "model", "adapter",
                                        "reference", "data", "eval-data"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (!strcmp(names[i], name)) return 1;
    return 0;
}

/* JSON is UTF-8, which a path need not be. */
static int is_utf8(dpo_context *context, const char *text)
{
    dpo_string given = {0}, valid = {0};
    check(context, dpo_json_quote(context, &given, text, strlen(text)));
    check(context, dpo_json_quote(context, &valid, text, strlen(text)));
    check(context, dpo_string_make_valid(context, &valid));
    const int same = given.n == valid.n && !memcmp(given.bytes, valid.bytes, given.n);
    dpo_string_free(context, &given);
    dpo_string_free(context, &valid);
    return same;
}

/* Files and directories are written as a run finds them from wherever it goes on. */
static void write_option(dpo_context *context, FILE *file, const option *o)
{
    char number[32], *absolute;
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
        absolute = text && strcmp(o->argument, "NAMES") ? realpath(text, NULL) : NULL;
        if (absolute) text = absolute;
        if (text && !is_utf8(context, text)) {
            say("note    the path of --%s is not UTF-8, so config.json has null for it: give it "
                "again with --resume", o->name);
            text = NULL;
        }
        if (text) write_quoted(context, file, text, strlen(text));
        else fputs("null", file);
        free(absolute);
    }
}

/* Everything needed to repeat the run: every option, and what its files held. One member a line. */
static void describe_run(const run *r, FILE *file, const option *options, size_t n_options)
{
    fprintf(file, "{\n  \"command\": \"%s\",\n  \"options\": {", r->bit == DPO ? "dpo" : "sft");
    const char *separator = "";
    for (const option *o = options; o < options + n_options; o++) {
        if (!(o->commands & r->bit)) continue;
        fprintf(file, "%s\n    \"%s\": ", separator, o->name);
        separator = ",";
        write_option(r->context, file, o);
    }
    const struct { const char *name; uint64_t value; } identities[] = {
        {"model_identity", r->source.file.identity},
        {"adapter_identity", r->source.adapter_identity},
        {"reference_identity", r->reference_source.file.identity},
        {"reference_adapter_identity", r->reference_source.adapter_identity},
        {"data_hash", r->data.hash}, {"eval_data_hash", r->eval.hash},
    };
    const struct { const char *name; size_t value; } counts[] = {
        {"parameters", r->memory.params}, {"trained_parameters", r->memory.trainable},
        {"examples", r->data.n}, {"prompts", r->data.n_groups}, {"eval_examples", r->eval.n},
        {"steps", r->steps}, {"warmup_steps", r->warmup},
    };
    fputs("\n  },\n", file);
    for (size_t i = 0; i < sizeof identities / sizeof *identities; i++)
        fprintf(file, "  \"%s\": \"%016llx\",\n", identities[i].name,
                (unsigned long long)identities[i].value);
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++)
        fprintf(file, "  \"%s\": %zu,\n", counts[i].name, counts[i].value);
    fputs("  \"compiler\": ", file);
    write_quoted(r->context, file, __VERSION__, strlen(__VERSION__));
    fputs("\n}\n", file);
}

/* The next line that two descriptions of runs do not share; a line is one member, so it names what
   is different. */
typedef struct difference {
    char name[64];
    int is_option;
    const char *before, *after;
    int n_before, n_after;
} difference;

/* What a line of config.json, `"name": value,`, says of a name; its length in *length. */
static const char *line_value(const char *line, int *length)
{
    size_t n = strcspn(line, "\n"), start = strcspn(line, ":") + 2;
    if (n && line[n - 1] == ',') n--;
    *length = start < n ? (int)(n - start) : 0;
    return line + start;
}

static int next_difference(const char **before, const char **after, difference *d)
{
    while (**before && **after) {
        const char *x = *before, *y = *after;
        size_t n = strcspn(x, "\n"), m = strcspn(y, "\n");
        int indentation = 0;
        *before += n + (x[n] == '\n');
        *after += m + (y[m] == '\n');
        if (n == m && !memcmp(x, y, n)) continue;
        *d = (difference){0};
        d->before = line_value(x, &d->n_before);
        d->after = line_value(y, &d->n_after);
        sscanf(x, " %n\"%63[^\"]", &indentation, d->name);
        d->is_option = indentation == 4;
        return 1;
    }
    return 0;
}

/* Fails if a difference is that of a file's content, naming the option and the file. */
static void check_same_file(const run *r, const char *name)
{
    const settings *s = r->s;
    const struct { const char *name, *option, *path; } files[] = {
        {"model_identity", "model", r->source.path},
        {"adapter_identity", s->adapter || !r->source.adapter ? "adapter" : "model",
            r->source.adapter},
        {"reference_identity", "reference", s->reference ? r->reference_source.path : NULL},
        {"reference_adapter_identity", "reference",
            s->reference ? r->reference_source.adapter : NULL},
        {"data_hash", "data", s->data}, {"eval_data_hash", "eval-data", s->eval_data},
    };
    for (size_t i = 0; i < sizeof files / sizeof *files; i++)
        if (!strcmp(files[i].name, name) && !files[i].path)
            fail("%s cannot go on: the run began with another --%s; give that again", s->output,
                 files[i].option);
        else if (!strcmp(files[i].name, name))
            fail("%s cannot go on: %s (--%s) has not the content that the run began with; give "
                 "the file that has it, or begin another run", s->output, files[i].path,
                 files[i].option);
}

/* Whether two descriptions have the same members in the same order. */
static int same_members(const char *a, const char *b)
{
    while (*a && *b) {
        const size_t n = strcspn(a, ":\n");
        if (n != strcspn(b, ":\n") || memcmp(a, b, n)) return 0;
        a += strcspn(a, "\n");
        b += strcspn(b, "\n");
        a += *a == '\n';
        b += *b == '\n';
    }
    return *a == *b;
}

/* Another model comes first: what options say may only follow from it, as an adapter's rank. Data
   come in their turn, since their hash follows from options. */
static void check_same_run(const run *r, const char *then, const char *now_text)
{
    const char *const starts[] = {then, now_text};
    difference d;
    if (!same_members(then, now_text))
        fail("%s was begun by another version of this program, which alone can go on with it; %s",
             r->s->output, begin_anew(r->s->output, r->bit));
    while (next_difference(&then, &now_text, &d))
        if (strstr(d.name, "_identity")) check_same_file(r, d.name);
    then = starts[0];
    now_text = starts[1];
    while (next_difference(&then, &now_text, &d)) {
        if (!strcmp(d.name, "compiler")) {
            say("note    the run was begun by another build: its last bits may differ");
        } else if (!is_free(d.name)) {
            check_same_file(r, d.name);
            fail("%s cannot go on: %s%s was %.*s there, and is %.*s now; only --threads, "
                 "--max-memory, --no-verify, paths and the times of saving may change, for all "
                 "else begin another run", r->s->output, d.is_option ? "--" : "", d.name,
                 d.n_before, d.before, d.n_after, d.after);
        }
    }
}

/* A file that is there whole or not at all. */
static void write_text(const char *path, const char *text, size_t n)
{
    char *temporary = temporary_path(path);
    FILE *file = create_file(temporary, path);
    fwrite(text, 1, n, file);
    int failed = ferror(file) || fflush(file) || fsync(fileno(file));
    if (fclose(file) || failed || rename(temporary, path)) {
        const int reason = errno;
        remove(temporary);
        fail("cannot write %s: %s", path, strerror(reason));
    }
    free(temporary);
}

/* Writes config.json, or compares it with this run when that goes on. */
static void settle_config(run *r, const option *options, size_t n_options)
{
    char *text = NULL;
    size_t n = 0;
    FILE *memory = open_memstream(&text, &n);
    if (!memory) fail("out of memory");
    describe_run(r, memory, options, n_options);
    const int cut = ferror(memory);
    if (fclose(memory) || cut || !text) fail("out of memory");
    r->description = text;
    if (r->s->resume) {
        r->description = read_text(r->config_path);
        check_same_run(r, r->description, text);
        free(text);
    } else {
        write_text(r->config_path, text, n);
    }
    r->identity = dpo_hash(DPO_HASH_START, r->description, strlen(r->description));
}

static uint64_t read_identity(const dpo_json *json, const char *name)
{
    const dpo_json_value *value = dpo_json_member(json, json->values, name);
    char digits[17] = "";
    if (value && value->kind == DPO_JSON_STRING && value->n_string < sizeof digits)
        memcpy(digits, json->text.bytes + value->string, value->n_string);
    return strtoull(digits, NULL, 16);
}

/* Whether an option can have a value that config.json gives it; people edit such files. */
static int is_possible(const option *o, const dpo_json_value *value, const char *text)
{
    const double number = value->number;
    switch (o->kind) {
    case OPTION_FLAG: return value->kind == DPO_JSON_BOOL;
    case OPTION_TEXT: return value->kind == DPO_JSON_STRING;
    case OPTION_CHOICE:
        return value->kind == DPO_JSON_STRING && find_choice(o->argument, text) >= 0;
    default:
        return value->kind == DPO_JSON_NUMBER && number >= o->low &&
               (o->kind == OPTION_BYTES || number <= o->high) &&
               (o->kind == OPTION_REAL || (number == floor(number) && number < 0x1p63));
    }
}

/* Gives every option the value that config.json says a run had. */
static void read_config(const char *directory, unsigned bit, const option *options,
                        size_t n_options, settings *s)
{
    dpo_context context;
    dpo_json json = {0};
    static const char put_back[] = "put back the file as the run wrote it, or begin another run";
    const char *path = run_file(directory, "config.json");
    const char *reference = run_file(directory, "reference.bin");
    int begun = 0;      // reference.bin is made before config.json
    for (size_t i = 0; i < N_RUN_FILES && !path; i++)
        begun |= strcmp(run_files[i], "reference.bin") && run_file(directory, run_files[i]);
    check_no_file(directory);
    if (!path && !is_directory(directory))
        fail("%s cannot be resumed: it does not exist; check -o", directory);
    if (!path)
        fail("%s cannot be resumed: it has no config.json; %s%s", directory,
             begun ? "put it back, or " : "", begun || reference ? begin_anew(directory, bit)
             : "begin it without --resume (the same -o will do)");
    char *text = read_text(path);
    check(&context, dpo_context_init(&context, 1));
    if (dpo_json_parse(&context, &json, text, strlen(text), path))
        fail("%s; %s", context.error, put_back);
    const dpo_json_value *command = dpo_json_member(&json, json.values, "command");
    const dpo_json_value *all = dpo_json_member(&json, json.values, "options");
    const char *name = bit == DPO ? "dpo" : "sft";
    if (!all || !command)
        fail("%s names no command or no options; %s", path, put_back);
    if (command->kind != DPO_JSON_STRING || command->n_string != 3 ||
        memcmp(json.text.bytes + command->string, name, 3))
        fail("%s is no run of ./train %s", directory, name);
    for (const option *o = options; o < options + n_options; o++) {
        const dpo_json_value *value = dpo_json_member(&json, all, o->name);
        if (!(o->commands & bit) || !value || value->kind == DPO_JSON_NULL) continue;
        char *copy = allocate(value->n_string + 1, 1);
        if (value->kind == DPO_JSON_STRING)
            memcpy(copy, json.text.bytes + value->string, value->n_string);
        if (!is_possible(o, value, copy))
            fail("%s: --%s cannot have the value that stands there; %s", path, o->name, put_back);
        if (o->kind == OPTION_FLAG) *(int *)o->value = value->number != 0;
        else if (o->kind == OPTION_REAL) *(double *)o->value = value->number;
        else if (value->kind == DPO_JSON_STRING) parse_value(o, copy);
        else *(size_t *)o->value = (size_t)value->number;
    }
    s->reference_identity = read_identity(&json, "reference_identity");
    s->reference_adapter_identity = read_identity(&json, "reference_adapter_identity");
    const dpo_json_value *steps = dpo_json_member(&json, json.values, "steps");
    if (steps && steps->kind == DPO_JSON_NUMBER && steps->number > 0)
        s->steps_before = (size_t)steps->number;
    dpo_json_free(&context, &json);
    dpo_context_free(&context);
    free(text);
}

/* What config.json names may have moved since. */
static void check_inputs(const settings *s)
{
    const struct { const char *option, *path; } inputs[] = {
        {"model", s->model}, {"adapter", s->adapter}, {"data", s->data},
        {"eval-data", s->eval_data}};
    for (size_t i = 0; i < sizeof inputs / sizeof *inputs; i++)
        if (inputs[i].path && !path_exists(inputs[i].path))
            fail("%s (--%s): %s; give the place it has now by --%s", inputs[i].path,
                 inputs[i].option, strerror(errno), inputs[i].option);
}

static csv create_log(const run *r, const char *name, const char *before, const char *prefix,
                      const char *after, size_t bytes)
{
    char *path = path_join(r->s->output, name);
    if (r->s->resume) return (csv){reopen_file(path, bytes), path, NULL, 0};
    csv log = csv_create(path, NULL);
    csv_cell(&log, "%s", before);
    for (size_t i = 0; i < r->n_metrics; i++) csv_cell(&log, "%s%s", prefix, metric_names[i]);
    if (*after) csv_cell(&log, "%s", after);
    csv_end_row(&log);
    return log;
}

/* Logs of a run that goes on lose what was written after its last state. */
static void create_logs(run *r)
{
    r->log = create_log(r, "log.csv", "step,examples,tokens,epoch,learning_rate", "",
                        "grad_norm,tokens_per_second,seconds", r->at.log_bytes);
    if (r->eval.n)
        r->eval_log = create_log(r, "eval.csv", "step,examples,tokens", "eval_",
                                 r->bit == DPO ? "eval_ties,eval_rewards/accuracies_se" : "",
                                 r->at.eval_bytes);
    if (!r->s->samples) return;
    r->samples_path = path_join(r->s->output, "samples.jsonl");
    r->samples = r->s->resume ? reopen_file(r->samples_path, r->at.samples_bytes)
                              : create_file(r->samples_path, r->samples_path);
}

/* The length of a log, all of which is on the disk before a state says that it is. */
static size_t synced_bytes(FILE *file, const char *path)
{
    struct stat status;
    if (!file) return 0;
    if (fflush(file) || fsync(fileno(file)) || fstat(fileno(file), &status))
        fail("cannot write %s: %s%s", path, strerror(errno), remedy);
    return (size_t)status.st_size;
}

static const char *resume_command(const run *r)
{
    static char text[8192];
    snprintf(text, sizeof text, "./train %s --resume -o %s", r->bit == DPO ? "dpo" : "sft",
             shell_path(r->s->output));
    return text;
}

/* From here on, what ends the run from outside (a full disk, no memory) says how it can go on. */
static void set_remedy(const run *r)
{
    static char text[8192 + 64];
    if (path_exists(r->state_path))
        snprintf(text, sizeof text, "; when that is mended, go on by %s", resume_command(r));
    else
        snprintf(text, sizeof text, "; no state was saved yet: when that is mended, %s",
                 begin_anew(r->s->output, r->bit));
    remedy = text;
}

/* state.bin takes the place of the one before at once, or not at all: whenever the run is killed,
   a whole state is there. */
static void save_state(run *r)
{
    r->at.seconds = now() - r->started;
    r->at.log_bytes = synced_bytes(r->log.file, r->log.path);
    r->at.eval_bytes = synced_bytes(r->eval_log.file, r->eval_log.path);
    r->at.samples_bytes = synced_bytes(r->samples, r->samples_path);
    size_t n = strlen(r->description);      // so that a state can say whose it is
    char *notes = allocate(sizeof r->at + n, 1);
    memcpy(notes, &r->at, sizeof r->at);
    memcpy(notes + sizeof r->at, r->description, n);
    check(r->context, dpo_state_save(&r->model, &r->optimizer, r->state_path, r->identity, notes,
                                     sizeof r->at + n));
    free(notes);
    r->saved = now();
    r->saved_step = r->at.step;
    set_remedy(r);
}

/* Of a model or adapter of the run's own, all of which is read if `verify`; 0 if there is none. */
static uint64_t file_identity(const run *r, const char *path, int verify)
{
    dpo_file file;
    if (!path_exists(path)) return 0;
    if (dpo_file_open(r->context, &file, path, r->lora.r ? DPO_FILE_ADAPTER : DPO_FILE_MODEL,
                      verify))
        fail("%s is damaged or cannot be read (%s); put back the file as the run wrote it, or move "
             "it away", path, r->context->error);
    uint64_t identity = file.identity;
    dpo_file_close(r->context, &file);
    return identity;
}

/* best.bin and what state.bin says of it change together: the new file waits under another name
   until a state that knows it is saved. Whenever the run is killed, here the two agree again. */
static void settle_best(run *r, int verify)
{
    position *at = &r->at;
    if (path_exists(r->next_best_path)) {
        const int known = file_identity(r, r->next_best_path, verify) == at->best_identity;
        if (known ? rename(r->next_best_path, r->best_path) : remove(r->next_best_path))
            fail("cannot change %s: %s", r->next_best_path, strerror(errno));
    }
    const uint64_t identity = file_identity(r, r->best_path, verify);
    if (identity == at->best_identity) return;
    if (identity)
        fail("%s is not the model that the run's state.bin knows as its best; put that one back, "
             "or move this one away", r->best_path);
    say("note    %s is not there any more: the best of the evaluations from here on will be",
        r->best_path);
    at->best = (dpo_metrics){0};
    at->best_identity = 0;
    at->evaluations = at->waited = 0;
}

/* Fails unless the state is whole and of this run, and says why. */
static void check_state(const run *r)
{
    dpo_file file;
    if (dpo_file_open(r->context, &file, r->state_path, DPO_FILE_STATE, 1))
        fail("%s; without a whole state.bin, %s", r->context->error,
             begin_anew(r->s->output, r->bit));
    const dpo_entry *notes = dpo_file_find(&file, "notes");
    const size_t n = notes && notes->bytes > sizeof r->at ? notes->bytes - sizeof r->at : 0;
    char *text = allocate(n + 1, 1);
    if (n) memcpy(text, (const char *)notes->data + sizeof r->at, n);
    const char *there = text, *here = r->description;
    difference d, next;
    int found = next_difference(&there, &here, &d);
    while (found && is_free(d.name) && next_difference(&there, &here, &next)) d = next;
    if (found)
        fail("%s belongs to another run than the config.json beside it: %s%s was %.*s there, and "
             "is %.*s here", r->state_path, d.is_option ? "--" : "", d.name, d.n_before, d.before,
             d.n_after, d.after);
    free(text);
    dpo_file_close(r->context, &file);
}

static void load_state(run *r)
{
    dpo_string notes = {0};
    if (dpo_state_load(&r->model, &r->optimizer, r->state_path, r->identity, &notes)) {
        check_state(r);
        fail("%s", r->context->error);
    }
    if (notes.n != sizeof r->at + strlen(r->description) ||
        memcmp(notes.bytes + sizeof r->at, r->description, strlen(r->description)))
        fail("%s is of another version of this program, which alone can go on with it",
             r->state_path);
    memcpy(&r->at, notes.bytes, sizeof r->at);
    dpo_string_free(r->context, &notes);
    settle_best(r, 1);
}

/* The model or adapter as it is now. */
static void save_result(run *r, const char *path)
{
    char *base = realpath(r->source.path, NULL);
    if (r->lora.r)
        check(r->context, dpo_lora_save(&r->model, path, base ? base : r->source.path));
    else
        check(r->context, dpo_model_save(&r->model, path, r->s->stochastic_rounding ? DPO_BF16
                                                                                    : DPO_F32));
    free(base);
}

/* ---- updates --------------------------------------------------------------------------------- */

/* Gathers the next update's examples; each pass over the data has its own order. The last
   batch of a pass is smaller; its mean is over what it has. */
static size_t start_batch(run *r)
{
    size_t per_epoch = (r->data.n + r->s->batch_size - 1) / r->s->batch_size;
    size_t epoch = r->at.step / per_epoch, start = r->at.step % per_epoch * r->s->batch_size, n;
    if (epoch != r->order_of)
        check(r->context, dpo_data_shuffle(r->context, r->order, &r->data,
                                           dpo_random_u64(r->s->seed, epoch, 0)));
    r->order_of = epoch;
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
    if (!r->at.step)
        fail("update 1 was not made and no model saved: %s; its examples: %zu of %s%s", what, n,
             r->s->data, lines);
    say("%s: update %zu was not made: %s; its examples: %zu of %s%s; the run ends with the "
        "model as update %zu left it", tool_name, r->at.step + 1, what, n, r->s->data, lines,
        r->at.step);
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
    r->at.step++;
    r->at.examples += n;
    for (size_t i = 0; i < n; i++) r->at.tokens += count_tokens(&r->batch[i]);
}

/* ---- the reference --------------------------------------------------------------------------- */

/* Summed log-probabilities of every branch under the model, in pieces so that progress shows. */
static void score_reference(run *r, dpo_model *model, double *logp, const dpo_data *data)
{
    enum { PIECE = SCORE_PIECE };
    dpo_score scores[2 * PIECE];
    progress bar = progress_start("reference");
    for (size_t i = 0; i < data->n && !interrupted; i += PIECE) {
        size_t n = data->n - i < PIECE ? data->n - i : PIECE;
        check(r->context, dpo_score_examples(model, scores, data->examples + i, n,
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

/* Before the first update the policy is the reference, so the first examples, computed in another
   order and grouping than the reference was, must give margins of exactly 0. */
static void self_check(run *r, int cached)
{
    const double beta = r->s->beta;
    const double expected = r->loss.kind == DPO_LOSS_SIGMOID ? log(2)
                          : r->loss.kind == DPO_LOSS_HINGE ? 1 : 1 / (4 * beta * beta);
    size_t n = start_batch(r);
    const size_t tokens = r->s->micro_tokens < 256 ? r->s->micro_tokens : 256;  // a moment's work
    dpo_batch batch = {r->batch, dpo_micro_batch(r->batch, n, tokens)};
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

/* The model that is trained, as training begins. */
static void load_policy(run *r)
{
    dpo_model_options options = model_options(r);
    check(r->context, dpo_model_load(r->context, &r->model, r->source.path, &options));
    r->model.noise_seed = r->s->seed;
    if (r->source.adapter) {
        check(r->context, dpo_lora_load(&r->model, r->source.adapter));
        r->model.lora.dropout = r->lora.dropout;
    } else if (r->lora.r) check(r->context, dpo_lora_init(&r->model, &r->lora, r->s->seed));
}

static dpo_reference_key reference_key(const run *r)
{
    const settings *s = r->s;
    const source *from = &r->reference_source;
    size_t cut[] = {r->cut.max_length, r->cut.max_prompt_length, (size_t)s->truncation};
    return (dpo_reference_key){.model = from->file.identity, .adapter = from->adapter_identity,
        .dtype = (uint64_t)dtypes[s->dtype],
        .truncation = dpo_hash(DPO_HASH_START, cut, sizeof cut),
        .data = dpo_random_u64(r->data.hash, r->eval.hash, 0)};     // of both data sets
}

/* Gets the reference's log-probabilities from a cache, if there is one. */
static void read_reference(run *r)
{
    static const char put_back[] = "put back the run's own (a --reference-cache that it was given "
                                   "is the same), or begin another run";
    const char *cache = r->s->resume ? r->reference_path : r->s->reference_cache;
    const dpo_reference_key key = reference_key(r);
    r->reference_cached = cache && path_exists(cache);
    if (!r->reference_cached && r->s->resume)
        fail("%s cannot be resumed: its reference.bin is missing; %s", r->s->output, put_back);
    if (!r->reference_cached) return;
    if (dpo_reference_load(r->context, cache, &key, r->reference, 2 * (r->data.n + r->eval.n)))
        fail("%s; %s", r->context->error, r->s->resume ? put_back
             : "another --reference-cache will do, or none");
    say("reference log-probabilities read from %s", cache);
}

/* Whether the reference is the model that training starts from. */
static int reference_is_policy(const run *r)
{
    return r->reference_source.file.identity == r->source.file.identity &&
           r->reference_source.adapter_identity == r->source.adapter_identity;
}

static void say_reference(const run *r)
{
    const source *from = &r->reference_source;
    say("reference: %s%s%s, %s", from->path, from->adapter ? " with adapter " : "",
        from->adapter ? from->adapter : "", reference_is_policy(r)
        ? "the model that training starts from" : "as --reference says");
}

/* Loads the policy; if no cache had them, computes the reference's log-probabilities: by the policy
   before its first update, or by another model, which is in memory before the policy and never
   beside it. The run directory gets its own copy: 16 bytes a pair. */
static void load_reference(run *r)
{
    const settings *s = r->s;
    const source *from = &r->reference_source;
    const int cached = r->reference_cached;
    const int same = reference_is_policy(r);
    say_reference(r);
    dpo_model other, *scorer = same ? &r->model : &other;
    if (!same && !cached) load_model(r->context, &other, from, model_options(r));
    if (same || cached) load_policy(r);
    if (!cached) {
        score_reference(r, scorer, r->reference, &r->data);
        score_reference(r, scorer, r->reference + 2 * r->data.n, &r->eval);
    }
    if (!same && !cached) {
        dpo_model_free(&other);
        load_policy(r);
    }
    if (s->resume) return;
    if (same) self_check(r, cached);
    set_remedy(r);
    const char *const paths[] = {s->reference_cache, r->reference_path};
    const dpo_reference_key key = reference_key(r);
    for (int i = 0; i < 2; i++)
        if (paths[i] && !path_exists(paths[i]))
            check(r->context, dpo_reference_save(r->context, paths[i], &key, r->reference,
                                                 2 * (r->data.n + r->eval.n)));
}

/* ---- evaluation ------------------------------------------------------------------------------ */

static void log_metrics(const run *r, csv *log, const dpo_metrics *m)
{
    double values[N_METRICS];
    metric_values(values, m);
    for (size_t i = 0; i < r->n_metrics; i++) csv_cell(log, "%.9g", values[i]);
}

/* The prompt of sample i, or NULL. Text without prompts lends its first tokens. */
static const uint32_t *sample_prompt(const run *r, size_t i, size_t *n)
{
    const dpo_data *data = r->eval.n ? &r->eval : &r->data;
    if (i >= r->s->samples || i >= data->n) return NULL;
    const dpo_example *e = &data->examples[i];
    const dpo_branch *b = &e->branches[0];
    *n = e->n_prompt ? e->n_prompt : b->n < 16 ? b->n : 16;
    return e->n_prompt ? e->prompt : b->tokens;
}

enum { SAMPLE_TOKENS = 64 };

/* Greedy answers to the first prompts, to be read beside the numbers. */
static void write_samples(run *r)
{
    static const char *const stops[] = {"\n\nHuman:"};
    const dpo_sampling sampling = {.max_new_tokens = SAMPLE_TOKENS, .top_p = 1, .stops = stops,
                                   .n_stops = 1};
    const dpo_tokenizer *tokenizer = &r->model.tokenizer;
    const uint32_t *tokens;
    size_t n;
    for (size_t i = 0; (tokens = sample_prompt(r, i, &n)); i++) {
        dpo_string prompt = {0}, answer = {0};
        check(r->context, dpo_tokenizer_decode(r->context, &prompt, tokenizer, tokens, n));
        if (dpo_generate(&r->model, &answer, tokens, n, &sampling, NULL, NULL))
            fail("sample %zu after update %zu: %s; if it diverged, a lower --learning-rate may "
                 "help", i + 1, r->at.step, r->context->error);
        check(r->context, dpo_string_make_valid(r->context, &prompt));
        check(r->context, dpo_string_make_valid(r->context, &answer));
        size_t tail = prompt.n < 60 ? prompt.n : 60;
        while (tail > 0 && prompt.bytes[prompt.n - tail] == '\n') tail--;
        say("--- sample %zu\n%s%.*s|%.*s", i + 1, tail < prompt.n ? "..." : "", (int)tail,
            prompt.bytes + prompt.n - tail, (int)answer.n, answer.n ? answer.bytes : "");
        fprintf(r->samples, "{\"step\": %zu, \"prompt\": ", r->at.step);
        write_quoted(r->context, r->samples, prompt.bytes, prompt.n);
        fputs(", \"completion\": ", r->samples);
        write_quoted(r->context, r->samples, answer.bytes, answer.n);
        fputs("}\n", r->samples);
        dpo_string_free(r->context, &prompt);
        dpo_string_free(r->context, &answer);
    }
    if (fflush(r->samples))
        fail("cannot write %s: %s%s", r->samples_path, strerror(errno), remedy);
}

/* What makes one evaluation better than another: accuracy, or for sft a lower loss. */
static double merit(const run *r, const dpo_metrics *m)
{
    return r->bit == DPO ? m->accuracy : -m->loss;
}

/* Keeps the model as it is now if no earlier evaluation was as good. The model of step 0 is never
   best: all its pairs are ties, and it is there already. */
static void keep_best(run *r)
{
    position *at = &r->at;
    const double now_merit = merit(r, &at->last_eval);
    at->waited++;
    // Fractions are not exact, and 11/20 - 10/20 is not to be more than 0.05.
    if (!at->evaluations++ || now_merit - at->to_beat > r->s->min_delta + 1e-9) {
        at->waited = 0;
        at->to_beat = now_merit;
    }
    if (at->best.n && now_merit == merit(r, &at->best)) {
        if (at->n_equal < sizeof at->equal_steps / sizeof *at->equal_steps)
            at->equal_steps[at->n_equal] = at->step;
        at->n_equal++;
    }
    if (at->best.n && !(now_merit > merit(r, &at->best))) return;
    at->n_equal = 0;
    at->best = at->last_eval;
    at->best_step = at->step;
    save_result(r, r->next_best_path);
    at->best_identity = file_identity(r, r->next_best_path, 0);
    save_state(r);
    settle_best(r, 0);
}

static int out_of_patience(const run *r)
{
    return r->s->patience && r->at.waited >= r->s->patience;
}

static void evaluate(run *r)
{
    dpo_metrics *m = &r->at.last_eval;
    if (!r->eval.n) {
        if (r->s->samples) write_samples(r);
        return;
    }
    check(r->context, dpo_score_examples(&r->model, r->scores, r->eval.examples, r->eval.n,
                                         r->s->micro_tokens));
    if (r->bit == DPO) {
        check(r->context, dpo_metrics_compute(r->context, m, NULL, r->eval.examples, r->scores,
                                              r->reference + 2 * r->data.n, r->eval.n, &r->loss));
        say("step %zu: eval loss %.4f, accuracy %.3f +- %.3f, margin %.4f, %zu ties", r->at.step,
            m->loss, m->accuracy, m->accuracy_error, m->margin, m->ties);
    } else {
        double logp = 0, scored = 0;
        for (size_t i = 0; i < r->eval.n; i++) {
            logp += r->scores[i].logp;
            scored += (double)r->scores[i].n_scored;
        }
        int sum = r->s->sft_loss;       // the loss is what training minimises
        *m = (dpo_metrics){.n = r->eval.n, .loss = -logp / (sum ? (double)r->eval.n : scored)};
        say("step %zu: eval loss %.4f nats per %s, perplexity %.2f", r->at.step, m->loss,
            sum ? "answer" : "token", exp(-logp / scored));
    }
    if (!isfinite(m->loss) && r->at.best.n)
        fail("the evaluation after update %zu gives a loss of %g, so no model was saved but that "
             "of update %zu, %s; a lower --learning-rate may help", r->at.step, m->loss,
             r->at.best_step, r->best_path);
    if (!isfinite(m->loss))
        fail("the evaluation after update %zu gives a loss of %g, so no model was saved; a lower "
             "--learning-rate may help", r->at.step, m->loss);
    if (r->s->samples) write_samples(r);
    csv_cell(&r->eval_log, "%zu,%zu,%zu", r->at.step, r->at.examples, r->at.tokens);
    log_metrics(r, &r->eval_log, m);
    if (r->bit == DPO) csv_cell(&r->eval_log, "%zu,%.9g", m->ties, m->accuracy_error);
    csv_end_row(&r->eval_log);
    r->at.last_eval_step = r->at.step;
    if (r->at.step == 0) r->at.first_eval = *m;
    else keep_best(r);
}

/* ---- the loop -------------------------------------------------------------------------------- */

/* Whether it is time to write the run's state. A new best.bin has had it written already. */
static int state_is_due(const run *r)
{
    const settings *s = r->s;
    if (r->saved_step == r->at.step) return 0;
    return (s->save_steps && r->at.step % s->save_steps == 0) ||
           (s->save_minutes > 0 && now() - r->saved >= 60 * s->save_minutes);
}

static void train(run *r)
{
    const settings *s = r->s;
    size_t eval_steps = s->eval_steps ? s->eval_steps : (r->steps + 19) / 20;
    progress bar = progress_start(r->bit == DPO ? "dpo" : "sft");
    set_remedy(r);
    bar.before = r->at.step;
    r->started = now() - r->at.seconds;
    r->saved = now();
    if (!s->resume) evaluate(r);
    while (r->at.step < r->steps && !interrupted && !out_of_patience(r)) {
        double began = now(), norm, rate = s->learning_rate *
            dpo_schedule_factor((dpo_schedule)s->schedule, r->at.step, r->steps, r->warmup);
        size_t before = r->at.tokens;
        dpo_metrics m;
        update(r, start_batch(r), rate, &m, &norm);
        if (r->failed) break;
        double speed = (double)(r->at.tokens - before) / (now() - began);
        csv_cell(&r->log, "%zu,%zu,%zu,%.6f,%.9g", r->at.step, r->at.examples, r->at.tokens,
                 (double)r->at.examples / (double)r->data.n, rate);
        log_metrics(r, &r->log, &m);
        csv_cell(&r->log, "%.9g,%.1f,%.3f", norm, speed, now() - r->started);
        csv_end_row(&r->log);
        char details[96], accuracy[32] = "";
        if (r->bit == DPO) snprintf(accuracy, sizeof accuracy, " accuracy %.3f", m.accuracy);
        snprintf(details, sizeof details, "loss %.4f%s %.0f tokens/s", m.loss, accuracy, speed);
        progress_show(&bar, r->at.step, r->steps, details);
        if (r->at.step % eval_steps == 0 || r->at.step == r->steps) evaluate(r);
        if (state_is_due(r)) save_state(r);
    }
    clear_bar();
    if (interrupted) save_state(r);
}

static void print_best(const run *r)
{
    const position *at = &r->at;
    const size_t most = sizeof at->equal_steps / sizeof *at->equal_steps;
    const char *what = r->bit == DPO ? "accuracy" : "loss";
    printf("best of %zu evaluations: step %zu, %s %.4f%s: %s; chosen by the numbers that it "
           "shows, it looks better than it is: confirm it on other data\n", at->evaluations,
           at->best_step, what, r->bit == DPO ? at->best.accuracy : at->best.loss,
           out_of_patience(r) && at->step < r->steps ? " (then out of patience)" : "",
           r->best_path);
    if (at->n_equal) printf("no better, but as good: step");
    for (size_t i = 0; i < at->n_equal && i < most; i++)
        printf("%s %zu", i ? "," : "", at->equal_steps[i]);
    if (at->n_equal > most) printf(" and %zu more", at->n_equal - most);
    if (at->n_equal) printf("\n");
    if (merit(r, &at->first_eval) >= merit(r, &at->best))
        printf("step 0, the model that training started from, was %s: %s %.4f\n",
               merit(r, &at->first_eval) > merit(r, &at->best) ? "better" : "as good", what,
               r->bit == DPO ? at->first_eval.accuracy : at->first_eval.loss);
}

static void print_results(const run *r)
{
    double first[N_METRICS], last[N_METRICS], best[N_METRICS];
    const position *at = &r->at;
    metric_values(first, &at->first_eval);
    metric_values(last, &at->last_eval);
    metric_values(best, &at->best);
    if (at->best.n) {
        printf("%-24s %12s %7s%5zu %7s%5zu\n", "step", "0", "", at->last_eval_step, "best",
               at->best_step);
        for (size_t i = 0; i < r->n_metrics; i++)
            printf("eval_%-19s %12.4f %12.4f %12.4f\n", metric_names[i], first[i], last[i],
                   best[i]);
        if (r->bit == DPO)
            printf("eval_%-19s %12.4f %12.4f %12.4f\neval_%-19s %12zu %12zu %12zu\n",
                   "rewards/accuracies_se", at->first_eval.accuracy_error,
                   at->last_eval.accuracy_error, at->best.accuracy_error, "ties",
                   at->first_eval.ties, at->last_eval.ties, at->best.ties);
    }
    if (at->best.n) print_best(r);
    printf("%zu of %zu updates, %zu examples, %zu tokens; %s saved: %s\n", at->step, r->steps,
           at->examples, at->tokens, r->lora.r ? "adapter" : "model", r->result_path);
}

static void plan_steps(run *r)
{
    const settings *s = r->s;
    double per_epoch = ceil((double)r->data.n / (double)s->batch_size);
    r->steps = s->max_steps ? s->max_steps : (size_t)ceil(s->epochs * per_epoch);
    r->warmup = (size_t)ceil(s->warmup_ratio * (double)r->steps);
    if (s->warmup_max && r->warmup > s->warmup_max) r->warmup = s->warmup_max;
    if (s->warmup_steps) r->warmup = s->warmup_steps;
    say("plan    %zu updates of %zu examples, learning rate %g, warmup %zu", r->steps,
        s->batch_size, s->learning_rate, r->warmup);
    if (r->warmup >= r->steps && s->learning_rate > 0)
        say("note    the warmup lasts as long as the run, which never reaches its learning rate "
            "(at most %g); lower --warmup-%s", s->learning_rate * (double)r->steps /
            (double)(r->warmup + 1), s->warmup_steps ? "steps" : "ratio");
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

/* What an adapter that is trained looks like; one that is trained further stays as it is. */
static void plan_adapter(run *r)
{
    const settings *s = r->s;
    if (r->source.adapter) {
        r->lora = r->source.lora;
        return;
    }
    if (!s->lora) return;
    r->lora = (dpo_lora){.r = s->lora_r, .alpha = s->lora_alpha, .rslora = s->rslora,
                         .dropout = s->lora_dropout};
    if (strlen(s->lora_targets) >= sizeof r->lora.targets)
        usage_fail("--lora-target-modules is longer than %zu bytes", sizeof r->lora.targets - 1);
    strcpy(r->lora.targets, s->lora_targets);
}

/* The order of the examples is known, so the largest micro-batch of the run is known too; of runs
   beyond all reason it is bounded. */
static void plan_updates(run *r, dpo_plan_options *plan)
{
    const size_t most = 100000;
    for (; r->at.step < r->steps && r->at.step < most; r->at.step++)
        dpo_plan_passes(plan, r->batch, start_batch(r), r->s->micro_tokens, 1);
    size_t *const bounds[] = {&plan->max_rows, &plan->max_scored, &plan->kept_rows};
    for (size_t i = 0; r->steps > most && i < 3; i++)
        if (*bounds[i] < r->s->micro_tokens) *bounds[i] = r->s->micro_tokens;
    r->at.step = 0;
}

#define RESUMING_MEMORY "a run that goes on needs what it needed, but for the scratch of " \
    "--threads; end other programs, or move its directory to a larger machine"

static size_t reference_bytes(const run *r)
{
    return r->bit == DPO ? 2 * (r->data.n + r->eval.n) * sizeof(double) : 0;
}

static size_t longest_of(const run *r)
{
    const size_t a = longest_example(&r->data), b = longest_example(&r->eval);
    return a > b ? a : b;
}

static void plan_memory(run *r)
{
    const settings *s = r->s;
    dpo_plan_options plan = {.model = model_options(r), .file = &r->source.file, .lora = r->lora,
        .train = 1, .optimizer = (dpo_optimizer_kind)s->optimizer,
        .n_threads = r->context->n_threads};
    dpo_plan_passes(&plan, r->eval.examples, r->eval.n, s->micro_tokens, 0);
    if (r->bit == DPO) plan_scoring(&plan, &r->data, s->micro_tokens);
    if (r->bit == DPO) plan_scoring(&plan, &r->eval, s->micro_tokens);
    plan_updates(r, &plan);
    size_t longest;
    for (size_t i = 0; sample_prompt(r, i, &longest); i++)
        if (longest + SAMPLE_TOKENS > plan.max_positions)
            plan.max_positions = longest + SAMPLE_TOKENS;
    r->memory = check_memory(r->context, &r->source.config, &plan, reference_bytes(r),
                             s->max_memory, 1, s->resume ? RESUMING_MEMORY
                             : less_memory(r->context, &r->source.config, &plan, longest_of(r),
                                           s->micro_tokens, "a smaller model"));
    say("trains  %.2f M of %.2f M parameters, %s", 1e-6 * (double)r->memory.trainable,
        1e-6 * (double)r->memory.params, r->lora.r ? "an adapter" : "all");
}

/* Another model than the policy scores the pairs before the policy is loaded, so the larger of the
   two is what the run takes. */
static void plan_reference_memory(run *r)
{
    const source *from = &r->reference_source;
    dpo_plan_options plan = {.model = model_options(r), .file = &from->file, .lora = from->lora,
                             .n_threads = r->context->n_threads};
    plan.model.frozen = 1;
    plan_scoring(&plan, &r->data, r->s->micro_tokens);
    plan_scoring(&plan, &r->eval, r->s->micro_tokens);
    dpo_memory m = check_memory(r->context, &from->config, &plan, reference_bytes(r),
                                r->s->max_memory, 0,
                                less_memory(r->context, &from->config, &plan, longest_of(r),
                                            r->s->micro_tokens, "a --reference-cache that a "
                                            "larger machine made (it is the model of --reference "
                                            "that needs so much)"));
    if (m.total <= r->memory.total) return;
    say("  reference model %.1f MB, before training, which takes less", 1e-6 * (double)m.total);
    r->memory.total = m.total;
    r->memory.mapped = m.mapped;
}

/* What the result takes on disk: an adapter, or the model with tokenizer and original files. */
static size_t result_bytes(const run *r)
{
    if (r->lora.r) return r->memory.trainable * sizeof(float);
    size_t bytes = r->memory.params * (r->s->stochastic_rounding ? 2 : 4);
    for (size_t i = 0; i < r->source.file.n_entries; i++)
        if (strchr(r->source.file.entries[i].name, '/')) bytes += r->source.file.entries[i].bytes;
    return bytes;
}

/* Reads all that can be wrong (files, data, memory) before anything large or lasting is made. */
static void prepare(run *r, const option *options, size_t n_options)
{
    const settings *s = r->s;
    const int exists = is_directory(s->output);
    if (exists) enter_directory(r);
    else check_no_file(s->output);
    open_found(r->context, &r->source);
    r->reference_source = r->source;
    if (s->reference_known) {       // its log-probabilities are in reference.bin
        r->reference_source = (source){.path = s->reference,
            .adapter_identity = s->reference_adapter_identity,
            .file = {.identity = s->reference_identity}};
    } else if (s->reference) {
        open_model(r->context, &r->reference_source, s->reference, NULL);
        check_same_tokenizer(&r->source, &r->reference_source);
    }
    load_examples(r, &r->data, s->data, s->limit);
    if (s->eval_data) load_examples(r, &r->eval, s->eval_data, s->eval_examples);
    else say("note    no --eval-data: nothing held out is evaluated, so there is no best.bin");
    if (s->reference && !s->reference_known) {
        check_reference_context(r, &r->data, s->data);
        check_reference_context(r, &r->eval, s->eval_data);
    }
    plan_adapter(r);
    plan_steps(r);
    allocate_buffers(r);
    plan_memory(r);
    if (s->resume) settle_config(r, options, n_options);
    if (r->bit == DPO) read_reference(r);
    if (s->reference && !r->reference_cached) plan_reference_memory(r);
    if (!exists) {
        make_directories(s->output);
        enter_directory(r);
    }
    if (!s->resume) check_can_make(r->result_path);
    if (!s->resume && s->reference_cache && !path_exists(s->reference_cache))
        check_can_make(s->reference_cache);
    check_disk(r, result_bytes(r));
}

static void check_options(const settings *s)
{
    if (s->label_smoothing > 0 && s->loss_type != DPO_LOSS_SIGMOID)
        usage_fail("--label-smoothing goes with --loss-type sigmoid only");
    if (s->stochastic_rounding && !s->dtype)
        usage_fail("--stochastic-rounding goes with --dtype bf16");
    if (s->min_delta > 0 && !s->patience) usage_fail("--min-delta goes with --patience");
    if (s->patience && !s->eval_data) usage_fail("--patience needs --eval-data");
    if (s->eval_steps && !s->eval_data && !s->samples)
        usage_fail("--eval-steps needs --eval-data or --sample");
}

/* An adapter that is trained further has its own settings, which config.json says, too. */
static void settle_adapter(run *r, settings *s)
{
    dpo_lora *lora = &r->source.lora;
    if (!r->source.adapter) return;
    if (s->lora)
        usage_fail("%s is an adapter, which is trained further without --lora; to put a new one "
                   "over it, merge it into its model first (./train merge)", r->source.adapter);
    if (r->bit == DPO && lora->dropout > 0) {
        // With dropout a policy that equals its reference would not have rewards of 0.
        say("note    dpo trains without dropout: the adapter's %g becomes 0", lora->dropout);
        lora->dropout = 0;
    }
    s->lora_r = lora->r;
    s->lora_alpha = lora->alpha;
    s->rslora = lora->rslora;
    s->lora_dropout = lora->dropout;
    s->lora_targets = lora->targets;
}

/* Returns the exit status. */
static int run_training(dpo_context *context, settings *s, unsigned bit,
                        const option *options, size_t n_options)
{
    static run r;   // lives as long as the program
    r = (run){.s = s, .bit = bit, .context = context, .order_of = SIZE_MAX,
              .cut = {.use = bit == DPO ? DPO_USE_PAIRS : DPO_USE_SFT,
                      .max_length = s->max_length, .max_prompt_length = s->max_prompt_length,
                      .keep_start = s->truncation},
              .n_branches = bit == DPO ? 2 : 1, .n_metrics = bit == DPO ? N_METRICS : 1,
              .loss = {(dpo_loss_kind)s->loss_type, s->beta, s->label_smoothing}};
    check_options(s);
    catch_signals();
    find_model(context, &r.source, s->model, s->adapter);
    settle_adapter(&r, s);
    r.result_path = path_join(s->output, s->lora || r.source.adapter ? "adapter.bin" : "model.bin");
    r.best_path = path_join(s->output, "best.bin");
    r.next_best_path = path_join(s->output, "next_best.bin");
    r.state_path = path_join(s->output, "state.bin");
    r.config_path = path_join(s->output, "config.json");
    r.reference_path = path_join(s->output, "reference.bin");
    prepare(&r, options, n_options);
    if (s->dry_run) {   // the directories that prepare made are taken away again at the end
        if (bit == DPO) say_reference(&r);
        if (s->resume) check_state(&r);
        say("dry run: nothing was made; without --dry-run this trains, if the models are whole%s",
            s->no_verify ? "" : ": their checksums are checked then");
        return 0;
    }
    if (bit == DPO) load_reference(&r);
    else load_policy(&r);
    if (!s->resume) settle_config(&r, options, n_options);
    close_model(context, &r.source);
    if (s->reference && !s->reference_known) close_model(context, &r.reference_source);
    check(context, dpo_optimizer_init(&r.model, &r.optimizer, (dpo_optimizer_kind)s->optimizer));
    r.optimizer.beta1 = s->adam_beta1;
    r.optimizer.beta2 = s->optimizer == DPO_RMSPROP ? s->rmsprop_alpha : s->adam_beta2;
    r.optimizer.epsilon = s->adam_epsilon;
    r.optimizer.weight_decay = s->weight_decay;
    if (s->resume) load_state(&r);
    create_logs(&r);
    if (s->resume) say("resumed after update %zu of %zu", r.at.step, r.steps);
    train(&r);
    const int stopped = interrupted;    // a signal from here on finds the run complete
    if (r.failed) remedy = "";  // going on would end in the same way
    save_result(&r, r.result_path);
    csv_close(&r.log);
    if (r.eval.n) csv_close(&r.eval_log);
    if (r.samples) close_file(r.samples, r.samples_path);
    if (!stopped && !r.failed) remove(r.state_path);    // nothing is left to go on with
    print_results(&r);
    finish_stdout();
    say("memory  planned %.1f MB (%.1f MB of it mapped), at most %.1f MB were resident",
        1e-6 * (double)r.memory.total, 1e-6 * (double)r.memory.mapped,
        1e-6 * (double)peak_memory());
    if (stopped)
        say("interrupted: the %s is as update %zu left it; go on by %s",
            r.lora.r ? "adapter" : "model", r.at.step, resume_command(&r));
    dpo_optimizer_free(&r.model, &r.optimizer);
    dpo_model_free(&r.model);
    dpo_data_free(context, &r.data);
    dpo_data_free(context, &r.eval);
    return r.failed ? 1 : stopped ? 128 + stopped : 0;
}

/* Whether the command line asks for an adapter: --lora, --adapter, or a model that is one. */
static int trains_adapter(int argc, char **argv)
{
    const char *model = given_value(argc, argv, "model", 'm');
    if (given_value(argc, argv, "lora", 0) || given_value(argc, argv, "adapter", 0)) return 1;
    if (!model) return 0;
    if (!is_directory(model)) return is_adapter(model);
    return !run_file(model, "model.bin") && run_file(model, "adapter.bin");
}

/* Refuses what is given without effect: options of an adapter are for one that is made here, those
   of an optimizer for that. Only the command line is asked, as config.json has all options. */
static void check_given_options(int argc, char **argv, const settings *s)
{
    const int adapts = trains_adapter(argc, argv), continues = adapts && (!s->lora || s->adapter);
    const char *lora = continues ? ": the adapter that is trained further has its own"
                     : s->lora ? NULL : " goes with --lora";
    const char *adamw = s->optimizer == DPO_ADAMW ? NULL : " goes with --optim adamw";
    const struct { const char *name, *refusal; } table[] = {
        {"lora-r", lora}, {"lora-alpha", lora}, {"use-rslora", lora}, {"lora-dropout", lora},
        {"lora-target-modules", lora}, {"adam-beta1", adamw}, {"adam-beta2", adamw},
        {"rmsprop-alpha", s->optimizer == DPO_RMSPROP ? NULL : " goes with --optim rmsprop"},
        {"eval-examples", s->eval_data ? NULL : " needs --eval-data"},
        {"stochastic-rounding",
            adapts || s->lora ? " is for training all weights, not an adapter" : NULL},
    };
    for (size_t i = 0; i < sizeof table / sizeof *table; i++)
        if (table[i].refusal && given_value(argc, argv, table[i].name, 0))
            usage_fail("--%s%s", table[i].name, table[i].refusal);
}

int main(int argc, char **argv)
{
    static const size_t n_commands = sizeof commands / sizeof *commands;
    static const char *const names[] = {"train init", "train sft", "train dpo", "train merge",
                                        "train plan"};
    unsigned bit;
    tool_name = "train";
    signal(SIGXFSZ, SIG_IGN);   // a file at ulimit -f is then an error as a full disk is
    const tool_command *c = find_command(argc, argv, commands, n_commands, &bit);
    static settings s;
    s = default_settings(bit, trains_adapter(argc, argv));
    option options[N_OPTIONS];
    size_t n_options = list_options(options, &s, bit);
    tool_name = names[c - commands];
    const char *output = given_value(argc, argv, "output", 'o');
    const int resumes = bit & TRAIN && given_value(argc, argv, "resume", 0);
    if (resumes && (!output || !*output || is_option(output, bit, options, n_options)))
        usage_fail("--resume needs -o DIR, the run to go on with");
    if (resumes) {
        read_config(output, bit, options, n_options, &s);
        s.reference_known = s.reference && !given_value(argc, argv, "reference", 0);
    }
    parse_options(argc, argv, c, bit, options, n_options);
    if (resumes) check_inputs(&s);
    if (bit & TRAIN) check_given_options(argc, argv, &s);
    if (bit & TRAIN) note_busy_machine(s.threads);

    dpo_context context;
    start_context(&context, s.threads);
    int status = 0;
    if (bit == INIT) init_model(&context, &s);
    else if (bit == MERGE) merge_model(&context, &s);
    else if (bit == PLAN) print_plans(&context, &s);
    else status = run_training(&context, &s, bit, options, n_options);
    dpo_context_free(&context);
    return status;
}
