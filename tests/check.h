/* Shared by the C tests: counted checks, relative errors, batches read from expectation files.

   A check that fails prints one line; check_done prints the closing "N passed, N failed" and gives
   the exit status. */
#ifndef CHECK_HEADER
#define CHECK_HEADER "../dpo.h"     // tests/mutate.py puts a damaged one here
#endif
#define DPO_IMPLEMENTATION
#include CHECK_HEADER

static size_t check_passed, check_failed;

static int check_done(void)
{
    printf("%zu passed, %zu failed\n", check_passed, check_failed);
    return check_failed > 0 || check_passed == 0;
}

__attribute__((format(printf, 2, 3)))
static int check(int ok, const char *format, ...)
{
    va_list arguments;
    if (ok) {
        check_passed++;
        return 1;
    }
    check_failed++;
    printf("FAILED: ");
    va_start(arguments, format);
    vprintf(format, arguments);
    va_end(arguments);
    printf("\n");
#ifdef CHECK_ONE_FAILURE    // one is enough for tests/mutate.py
    exit(check_done());
#endif
    return 0;
}

/* Whether the only word on the command line is `products`: test_invariants and test_modes then test
   the arithmetic alone, which is what an emulator of another CPU has time for. */
__attribute__((unused))
static int check_products_only(int argc, char **argv)
{
    if (argc == 1) return 0;
    if (argc == 2 && !strcmp(argv[1], "products")) return 1;
    printf("FAILED: %s: the only argument is the word `products`\n", argv[0]);
    exit(2);
}

/* For what a test stands on rather than tests. */
static void check_must(int failed, const dpo_context *context)
{
    if (!failed) return;
    printf("FAILED: %s\n", context->error);
    check_failed++;
    exit(check_done());
}

/* Largest |a - b| relative to the largest |b|; infinite if anything is not finite, so that NaN can
   never pass as close. */
__attribute__((unused))
static double check_distance(const float *a, const float *b, size_t n)
{
    double difference = 0.0, size = 0.0;
    for (size_t i = 0; i < n; i++) {
        if (!isfinite(a[i]) || !isfinite(b[i])) return INFINITY;
        difference = DPOI_MAX(difference, fabs((double)a[i] - b[i]));
        size = DPOI_MAX(size, fabs((double)b[i]));
    }
    return size > 0 ? difference / size : difference > 0 ? INFINITY : 0.0;
}

/* The larger of the two; NaN counts as infinite, so that no later number takes its place. */
__attribute__((unused))
static void check_worst(double *worst, double x)
{
    if (!(x <= *worst)) *worst = isnan(x) ? INFINITY : x;
}

__attribute__((unused))
static const dpo_entry *check_entry(const dpo_file *file, const char *prefix, const char *name)
{
    char full[2 * DPO_NAME_BYTES];
    snprintf(full, sizeof full, "%s%s", prefix, name);
    const dpo_entry *entry = dpo_file_find(file, full);
    if (!entry) {
        check(0, "entry %s is missing from the expectations", full);
        exit(check_done());
    }
    return entry;
}

/* A batch with the arrays behind it. */
typedef struct check_batch {
    dpo_example *examples;
    dpo_branch *branches;
    uint32_t *tokens;           // NULL if they lie in a file
    dpo_batch batch;
    size_t n_branches;
} check_batch;

/* The batch under a prefix of an expectation file: PREFIXprompts, PREFIXexamples, PREFIXtokens
   (make_fixtures.py). */
__attribute__((unused))
static check_batch check_read_batch(const dpo_file *file, const char *prefix)
{
    const dpo_entry *prompts = check_entry(file, prefix, "prompts");
    const dpo_entry *rows = check_entry(file, prefix, "examples");
    const uint32_t *tokens = check_entry(file, prefix, "tokens")->data;
    const uint32_t *n_prompt = prompts->data, *row = rows->data;
    check_batch b = { .n_branches = rows->shape[0] };
    b.examples = calloc(prompts->shape[0], sizeof *b.examples);
    b.branches = calloc(b.n_branches, sizeof *b.branches);
    size_t next = 0;
    for (size_t e = 0; e < prompts->shape[0]; e++) {
        b.examples[e] = (dpo_example){ .prompt = tokens, .n_prompt = n_prompt[e],
                                       .branches = b.branches + next, .group = e };
        tokens += n_prompt[e];
        for (; next < b.n_branches && row[3 * next] == e; next++) {
            b.branches[next] = (dpo_branch){ tokens, row[3 * next + 2], row[3 * next + 1] };
            b.examples[e].n_branches++;
            tokens += row[3 * next + 2];
        }
    }
    b.batch = (dpo_batch){ b.examples, prompts->shape[0] };
    return b;
}

__attribute__((unused))
static void check_free_batch(check_batch *b)
{
    free(b->examples);
    free(b->branches);
    free(b->tokens);
}

/* A batch of random tokens. Each row of `shapes` is an example: tokens of the prompt, then of each
   branch, 0 after the last; a branch without a prompt is scored from its second token. */
#define CHECK_BRANCHES 4
typedef size_t check_shape[1 + CHECK_BRANCHES];
__attribute__((unused))
static check_batch check_make_batch(const check_shape *shapes, size_t n, size_t V, uint64_t seed)
{
    check_batch b = { .examples = calloc(n, sizeof *b.examples),
                      .branches = calloc(CHECK_BRANCHES * n, sizeof *b.branches) };
    size_t n_tokens = 0;
    for (size_t i = 0; i < n; i++)
        for (size_t k = 0; k <= CHECK_BRANCHES; k++) n_tokens += shapes[i][k];
    b.tokens = calloc(n_tokens, sizeof *b.tokens);
    for (size_t i = 0; i < n_tokens; i++) b.tokens[i] = dpo_random_u64(seed, 0, i) % V;
    const uint32_t *next = b.tokens;
    for (size_t i = 0; i < n; i++) {
        dpo_example *example = &b.examples[i];
        *example = (dpo_example){ .prompt = next, .n_prompt = shapes[i][0],
                                  .branches = b.branches + b.n_branches, .group = i };
        next += example->n_prompt;
        for (size_t k = 0; k < CHECK_BRANCHES && shapes[i][1 + k]; k++) {
            b.branches[b.n_branches++] = (dpo_branch){ next, shapes[i][1 + k], !example->n_prompt };
            example->n_branches++;
            next += shapes[i][1 + k];
        }
    }
    b.batch = (dpo_batch){ b.examples, n };
    return b;
}

/* The ten models that tests/make_fixtures.py makes: between them they use every switch. */
#define CHECK_MODELS 10
__attribute__((unused))
static const char *const check_models[CHECK_MODELS] = {
    "neox_parallel", "neox_sequential", "neox_tied", "neox_f16", "neox_bf16", "btlm_alibi_swiglu",
    "btlm_stored_slopes", "btlm_learned_gelu", "btlm_alibi_scaled", "btlm_untied" };

__attribute__((unused))
static dpo_model check_load(dpo_context *context, const char *name)
{
    char path[256];
    dpo_model model;
    snprintf(path, sizeof path, "tests/fixtures/%s.model.bin", name);
    check_must(dpo_model_load(context, &model, path, NULL), context);
    return model;
}

/* Normal random numbers of standard deviation `size`; each call of a test takes another stream. */
__attribute__((unused))
static void check_fill(float *x, size_t n, double size, uint64_t stream)
{
    for (size_t i = 0; i < n; i++) x[i] = (float)(size * dpoi_random_normal(7, stream, i));
}

/* A random model of another size, with more than one chunk of vocabulary. */
__attribute__((unused))
static dpo_model check_make_model(dpo_context *context, dpo_architecture architecture,
                                  size_t d_model, size_t n_layers)
{
    dpo_config config = { .vocab_size = DPOI_CHUNK + 30, .context_length = 140, .d_model = d_model,
                          .n_layers = n_layers, .n_heads = d_model / 8 };
    dpo_model model;
    dpo_config_default(&config, architecture);
    config.embedding_scale = 2.0;
    check_must(dpo_model_init(context, &model, &config, NULL, 1, NULL), context);
    for (size_t i = 0; i < model.n_tensors; i++)
        if (model.tensors[i].trainable)
            check_fill(model.tensors[i].data, model.tensors[i].n, 2 / sqrt((double)d_model), i);
    return model;
}

/* A path in a directory of this process's own, which a test has to leave empty: in $CHECK_TMPDIR,
   or else in memory, where there is such a place, because the library waits for the disk after each
   file. */
#define CHECK_PATH_BYTES 256
static char check_directory[128];
__attribute__((unused))
static void check_path(char *path /* [CHECK_PATH_BYTES] */, const char *name)
{
    static int made;
    if (!made) {
        const char *place = getenv("CHECK_TMPDIR");
        snprintf(check_directory, sizeof check_directory, "%s/dpo-test-XXXXXX",
                 place ? place : access("/dev/shm", W_OK) ? "/tmp" : "/dev/shm");
        if (!mkdtemp(check_directory)) {
            perror(check_directory);
            exit(1);
        }
    }
    made = 1;
    snprintf(path, CHECK_PATH_BYTES, "%s/%s", check_directory, name);
}
