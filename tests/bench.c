/* How fast the products of dpo.h are, next to what the machine can do at most.

   `make bench` measures the ceilings first: fused multiply-adds per second, from a loop that does
   nothing else, the same for bf16 dot products where the CPU has them, and bytes read from memory
   per second. Then the three products of a linear layer (y = x W^T, dx = dy W, dW += dy^T x) run at
   the shapes of Pythia models, and of BTLM, which keeps its W transposed, on one thread and on all,
   taking turns with the ceiling, because the speed of a shared or warm machine drifts. Figures are
   the least, the median and the greatest of several rounds; per cent are of the ceiling of the same
   round (median) and of the greatest seen (best). Above 100 % something is wrong with the
   measurement, and the exit status is 1.

   Then come whole updates of a model of Pythia-160m's size, random, on pairs as long as HH's, from
   zero_grad to the optimizer, with the reference known: SFT and DPO, full and LoRA, fp32 and bf16,
   on one thread and on all in turns, and where an update's time goes. Their operations are those
   that are needed: no recomputation, the head on scored rows only, causal attention, and no
   gradients of frozen weights. Per cent are of the fp32 peak, and bf16 may reach more than that:
   its results are counted as wrong above the greater of both peaks.

   What an update saves is measured against updates that do not: prompts computed for each answer,
   every row's logits, sequences padded to the longest, the reference computed again, gradients of
   frozen weights.

   Then training on plain text at the shape of GPT-2 124M, 4 windows of 64 and of 256 tokens, which
   is what llm.c's train_gpt2.c does. The products are the same; positions are rotary here, not
   learned, attention and MLP are side by side, not one after the other, and GELU is erf's, not
   tanh's.

   Last, generation, whose ceiling is reading all weights once a token. */
#define _GNU_SOURCE
#define DPO_IMPLEMENTATION
#include "../dpo.h"

#include <time.h>

enum { ROUNDS = 9 };
static const double SECONDS = 0.01; // of each sample of a product, at least
static int quick;                   // a few shapes and one kind of update

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int by_size(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *samples /* [ROUNDS], sorted here */)
{
    qsort(samples, ROUNDS, sizeof *samples, by_size);
    return samples[ROUNDS / 2];
}

/* ---- ceilings -------------------------------------------------------------------------------- */

typedef float vec __attribute__((vector_size(4 * DPOI_LANES)));

/* An FMA takes four cycles or five, and a core starts up to two a cycle (four narrow ones on some):
   the chains must be independent, and more than latency times starts, and fit into the registers
   with the two factors. */
#if defined(__AVX512F__) || defined(__aarch64__)
#define CHAINS 24
#else
#define CHAINS 12
#endif
#ifdef __clang__
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 32")
#endif

/* A function for its arguments alone: clang splits vectors of 512 bits for most Intel CPUs, except
   where they are an argument or a result of what it compiles or inlines. dpo.h's tile has such an
   argument in dpoi_dot_pairs; without it here, the peak would be half of what the CPU can do. */
static inline __attribute__((always_inline)) vec one_step(vec sum, vec factor, vec term)
{
    return sum * factor + term;
}

/* `steps` times CHAINS fused multiply-adds of DPOI_LANES lanes. All operands come from memory that
   the compiler knows nothing about, and every chain starts elsewhere: equal chains would be merged
   and known ones computed beforehand, which looks like 30 times the truth. */
__attribute__((noinline)) static float multiply_add(const volatile float *in, long steps)
{
    vec sum[CHAINS], factor, term;
    for (int i = 0; i < DPOI_LANES; i++) {
        factor[i] = in[0];
        term[i] = in[1];
    }
    UNROLL
    for (int c = 0; c < CHAINS; c++) sum[c] = factor * in[2 + c];
    for (long s = 0; s < steps; s++) {
        UNROLL
        for (int c = 0; c < CHAINS; c++) sum[c] = one_step(sum[c], factor, term);
    }
    float total = 0;
    UNROLL
    for (int c = 0; c < CHAINS; c++)
        for (int i = 0; i < DPOI_LANES; i++) total += sum[c][i];
    return total;
}

#ifdef DPOI_AMX
/* As many operations as `steps` of dot_pairs, by products of whole tiles: four are under way. */
static void multiply_tiles(long steps)
{
    dpoi_amx_begin();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_zero(4);
    _tile_zero(6);
    for (long s = 0; s < steps * CHAINS / (4 * DPOI_TILE_ROWS * DPOI_LINE); s++) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 6);
        _tile_dpbf16ps(2, 4, 6);
        _tile_dpbf16ps(3, 4, 6);
    }
    _tile_release();
}
#endif

/* The same with dot products of two bf16, two of them to a float's place; the chains' values do not
   matter, as long as they are finite. */
#if DPOI_UNIT_BF16 == 2
__attribute__((noinline)) static float dot_pairs(const volatile float *in, long steps)
{
    dpoi_vec sum[CHAINS], factor;
    for (int i = 0; i < DPOI_LANES; i++) factor[i] = in[0];
    UNROLL
    for (int c = 0; c < CHAINS; c++) sum[c] = factor * in[2 + c];
    const float one = in[1];
#ifdef DPOI_AMX
    if (dpoi_amx) {
        multiply_tiles(steps);
        return one;
    }
#endif
    for (long s = 0; s < steps; s++) {
        UNROLL
        for (int c = 0; c < CHAINS; c++) sum[c] = dpoi_dot_pairs(sum[c], one, factor);
    }
    float total = 0;
    UNROLL
    for (int c = 0; c < CHAINS; c++)
        for (int i = 0; i < DPOI_LANES; i++) total += sum[c][i];
    return total;
}
#else
#define dot_pairs multiply_add  // products of bf16 are FMAs of floats here
#endif

static volatile float operands[2 + CHAINS]; // 0.999, 0.001: the chains go to 1 and stay there
static volatile float result;
static double thread_peak[DPOI_MAX_THREADS];

/* GFLOP/s of all threads together, an FMA counting as two. Each thread times many short runs while
   the others do the same, and its best one counts, so that it stays the ceiling when something else
   takes a core now and then. */
static double measure_peak(int threads, dpo_dtype as)
{
    const long steps = 2000000 / CHAINS;
    double total = 0;
    DPOI_PARALLEL_FOR(threads)
    for (int t = 0; t < threads; t++) {
        double best = 0;
        for (int r = 0; r < 16; r++) {
            double start = now();
            result = as == DPO_BF16 ? dot_pairs(operands, steps) : multiply_add(operands, steps);
            double speed = 2e-9 * CHAINS * DPOI_LANES * (double)steps / (now() - start);
            if (as == DPO_BF16) speed *= DPOI_UNIT_BF16;
            best = DPOI_MAX(best, speed);
        }
        thread_peak[t] = best;
    }
    for (int t = 0; t < threads; t++) total += thread_peak[t];
    return total;
}

/* GB/s that all threads together read from memory: the sum of an array that fits no cache. */
static double measure_reading(int threads, const float *array, size_t n)
{
    const size_t part = n / 64;
    double start = now();
    DPOI_PARALLEL_FOR(threads)
    for (int p = 0; p < 64; p++) {
        const vec *from = (const vec *)(const void *)(array + (size_t)p * part);
        vec sum[8] = { { 0 } };
        for (size_t i = 0; i < part / DPOI_LANES; i += 8) {
            UNROLL
            for (int j = 0; j < 8; j++) sum[j] += from[i + (size_t)j];
        }
        for (int j = 1; j < 8; j++) sum[0] += sum[j];
        result = sum[0][0];
    }
    return 64 * (double)part * sizeof(float) * 1e-9 / (now() - start);
}

/* ---- products -------------------------------------------------------------------------------- */

typedef struct { const char *name; size_t M, N, K; } shape; // y[M, N] = x[M, K] W[N, K]^T

static const shape SHAPES[] = {
    { "contract", 1152, 2048, 512 },
    { "70m qkv", 1152, 1536, 512 }, { "70m out", 1152, 512, 512 },
    { "70m up", 1152, 2048, 512 }, { "70m down", 1152, 512, 2048 },
    { "160m qkv", 1152, 2304, 768 }, { "160m out", 1152, 768, 768 },
    { "160m up", 1152, 3072, 768 }, { "160m down", 1152, 768, 3072 },
    { "410m qkv", 1152, 3072, 1024 }, { "410m out", 1152, 1024, 1024 },
    { "410m up", 1152, 4096, 1024 }, { "410m down", 1152, 1024, 4096 },
    { "160m up", 2048, 3072, 768 }, { "160m up", 512, 3072, 768 },
    { "160m up", 256, 3072, 768 }, { "160m up", 64, 3072, 768 },
    { "1.4b qkv", 1152, 6144, 2048 }, { "1.4b out", 1152, 2048, 2048 },
    { "1.4b up", 1152, 8192, 2048 }, { "1.4b down", 1152, 2048, 8192 },
    { "2.8b qkv", 1152, 7680, 2560 }, { "2.8b out", 1152, 2560, 2560 },
    { "2.8b up", 1152, 10240, 2560 }, { "2.8b down", 1152, 2560, 10240 },
    { "2.8b up", 256, 10240, 2560 }, { "2.8b up", 64, 10240, 2560 },
    { "btlm qkv", 1152, 7680, 2560 }, { "btlm out", 1152, 2560, 2560 },
    { "btlm up", 1152, 6826, 2560 }, { "btlm down", 1152, 2560, 6826 },
};

/* BTLM's layers are Conv1D: y = x W with W[K, N]. */
static int is_conv1d(const shape *s) { return !strncmp(s->name, "btlm", 4); }

static void fill_randomly(float *x, size_t n)
{
    for (size_t i = 0; i < n; i++) x[i] = (float)(dpo_random_uniform(1, 0, i) - 0.5);
}

/* [M, K], [N, K] fp32 and bf16, [M, N], and room for any of these. In bf16 the weights are bf16 and
   the activations fp32, so a product converts them, as a layer's does. All lie in one block, as a
   model's do: small ones by themselves would get no pages of 2 MB. */
typedef struct { float *x, *W, *y, *out; uint16_t *half; } arrays;

static size_t largest_floats(const shape *s)
{
    return DPOI_MAX(DPOI_MAX(s->M * s->K, s->N * s->K), s->M * s->N);
}

static void product(const dpo_context *context, int which, const shape *s, const arrays *a,
                    dpo_dtype as)
{
    size_t M = s->M, N = s->N, K = s->K;
    const int conv1d = is_conv1d(s);
    const void *weights = as == DPO_BF16 ? (const void *)a->half : a->W;
    dpoi_matrix W = { weights, conv1d ? 1 : K, conv1d ? N : 1, as }; // [N, K]
    dpoi_matrix y = { a->y, N, 1, DPO_F32 }, x = { a->x, K, 1, DPO_F32 };
    if (which == 0) dpoi_matmul(context, a->out, N, x, dpoi_transposed(W), M, N, K, 0, as);
    if (which == 1) dpoi_matmul(context, a->out, K, y, W, M, K, N, 0, as);
    if (which == 2 && conv1d)
        dpoi_matmul(context, a->out, N, dpoi_transposed(x), y, K, N, M, 1, as);
    else if (which == 2)
        dpoi_matmul(context, a->out, K, dpoi_transposed(y), x, N, K, M, 1, as);
}

/* GFLOP/s of one product, repeated until it has taken long enough to be timed. */
static double measure_product(const dpo_context *context, int which, const shape *s,
                              const arrays *a, dpo_dtype as)
{
    double start = now(), seconds;
    int times = 0;
    do {
        product(context, which, s, a, as);
        times++;
        seconds = now() - start;
    } while (seconds < SECONDS);
    return 2e-9 * (double)s->M * (double)s->N * (double)s->K * times / seconds;
}

static void check(const dpo_context *context, int failed)
{
    if (!failed) return;
    fprintf(stderr, "bench: %s\n", context->error);
    exit(1);
}

/* The products of one precision; returns how many results are above the ceiling, *top. */
static int run_products(dpo_context *context, dpo_dtype as, double *top)
{
    static const char *const PRODUCT[2][3] = { { "y = x W^T", "dx = dy W", "dW += dy^T x" },
                                               { "y = x W", "dx = dy W^T", "dW += x^T dy" } };
    const size_t n_shapes = quick ? 5 : sizeof SHAPES / sizeof *SHAPES;
    size_t most = 0;
    float *block;
    int wrong = 0;
    for (size_t i = 0; i < n_shapes; i++) most = DPOI_MAX(most, 5 * largest_floats(&SHAPES[i]));
    check(context, dpoi_alloc(context, &block, most, sizeof *block));
    printf("\n%-9s %5s %5s %5s  %-13s %7s %7s %7s GFLOP/s   %% of peak: median, best (%s)\n",
           "layer", "M", "N", "K", "product", "min", "median", "max",
           as == DPO_BF16 ? "bf16" : "fp32");
    for (size_t i = 0; i < n_shapes; i++) {
        const shape *s = &SHAPES[i];
        const size_t part = largest_floats(s);
        const arrays a = { block, block + part, block + 2 * part, block + 3 * part,
                           (uint16_t *)(block + 4 * part) };
        fill_randomly(block, 4 * part);
        dpoi_narrow(a.half, DPO_BF16, a.W, s->N * s->K);
        double speed[3][ROUNDS], share[3][ROUNDS];
        for (int r = 0; r < ROUNDS; r++) {
            double peak = measure_peak(context->n_threads, as);
            *top = DPOI_MAX(*top, peak);
            for (int which = 0; which < 3; which++) {
                speed[which][r] = measure_product(context, which, s, &a, as);
                share[which][r] = 100 * speed[which][r] / peak;
            }
        }
        for (int which = 0; which < 3; which++) {
            double middle = median(speed[which]), best = speed[which][ROUNDS - 1];
            wrong += best > *top;
            printf("%-9s %5zu %5zu %5zu  %-13s %7.1f %7.1f %7.1f %25.1f %5.1f%s\n", s->name, s->M,
                   s->N, s->K, PRODUCT[is_conv1d(s)][which], speed[which][0], middle, best,
                   median(share[which]), 100 * best / *top, best > *top ? "  WRONG" : "");
        }
        fflush(stdout);
    }
    dpoi_free(context, block);
    return wrong;
}

/* The same for updating: x = (x + y) / 2, which reads two streams and writes one. */
static double measure_updating(int threads, float *array, size_t n)
{
    const size_t part = n / 128;
    double start = now();
    DPOI_PARALLEL_FOR(threads)
    for (int p = 0; p < 64; p++) {
        vec *x = (vec *)(void *)(array + (size_t)p * part);
        const vec *y = (const vec *)(const void *)(array + n / 2 + (size_t)p * part);
        for (size_t i = 0; i < part / DPOI_LANES; i++) x[i] = (x[i] + y[i]) * 0.5f;
    }
    return 3 * 64 * (double)part * sizeof(float) * 1e-9 / (now() - start);
}

/* Ceilings and products with one number of threads; returns how many results are above. */
static int run(int threads, float *array, size_t array_floats)
{
    double peak[ROUNDS], half[ROUNDS], reading[ROUNDS], updating[ROUNDS];
    int wrong = 0;
    dpo_context context;
    check(&context, dpo_context_init(&context, threads));
    for (int r = 0; r < ROUNDS; r++) {
        peak[r] = measure_peak(threads, DPO_F32);
        half[r] = measure_peak(threads, DPO_BF16);
        reading[r] = measure_reading(threads, array, array_floats);
        updating[r] = measure_updating(threads, array, array_floats);
    }
    printf("\n%d thread%s                min  median     max\n", threads, threads > 1 ? "s" : " ");
    const struct { const char *name; double *samples; const char *unit; } rows[] = {
        { "fp32 FMA peak", peak, "GFLOP/s" },
        { dpoi_amx ? "bf16 tiles (AMX)"
                   : DPOI_UNIT_BF16 == 2 ? "bf16 dot products" : "bf16 by fp32 FMAs", half, "GFLOP/s" },
        { "reading memory", reading, "GB/s" }, { "updating memory", updating, "GB/s" } };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        double middle = median(rows[i].samples);
        printf("%-20s %7.1f %7.1f %7.1f %s\n", rows[i].name, rows[i].samples[0], middle,
               rows[i].samples[ROUNDS - 1], rows[i].unit);
    }
    wrong += run_products(&context, DPO_F32, &peak[ROUNDS - 1]);
    wrong += run_products(&context, DPO_BF16, &half[ROUNDS - 1]);
    dpo_context_free(&context);
    return wrong;
}

/* ---- whole updates --------------------------------------------------------------------------- */

enum { PAIRS = 8, MOST_ROWS = 2048, STEP_ROUNDS = 3 };
/* Tokens of prompt, chosen and rejected answer: about HH's middle half. */
static const size_t LENGTHS[PAIRS][3] = {
    { 35, 60, 40 }, { 120, 35, 70 }, { 60, 110, 90 }, { 210, 80, 50 },
    { 18, 20, 65 }, { 90, 140, 100 }, { 150, 55, 25 }, { 45, 30, 85 } };

typedef struct { const char *name; dpo_model_options options; int lora; size_t branches; } setting;
static const setting SETTINGS[] = {
    { "SFT fp32", { 0 }, 0, 1 }, { "DPO fp32", { 0 }, 0, 2 },
    { "DPO bf16", { .dtype = DPO_BF16 }, 0, 2 },
    { "DPO bf16 stochastic", { .dtype = DPO_BF16, .stochastic = 1 }, 0, 2 },
    { "DPO LoRA fp32", { .frozen = 1 }, 1, 2 },
    { "DPO LoRA bf16", { .dtype = DPO_BF16, .frozen = 1 }, 1, 2 } };

/* The batch of pairs, or of their chosen answers, as random tokens. */
static void make_batch(dpo_example *examples, dpo_branch *branches, uint32_t *tokens, size_t V,
                       size_t n_branches)
{
    for (size_t e = 0; e < PAIRS; e++) {
        examples[e] = (dpo_example){ .prompt = tokens, .n_prompt = LENGTHS[e][0], .group = e,
                                     .branches = branches + 2 * e, .n_branches = n_branches };
        for (size_t k = 0; k < 3; k++) {
            for (size_t i = 0; i < LENGTHS[e][k]; i++)
                tokens[i] = (uint32_t)(dpo_random_u64(3, e, 1000 * k + i) % V);
            if (k) branches[2 * e + k - 1] = (dpo_branch){ tokens, LENGTHS[e][k], 0 };
            tokens += LENGTHS[e][k];
        }
    }
}

/* Floating-point operations that an update of a GPT-NeoX needs in its matrix products, an FMA being
   two: forward, gradients of what goes in and of what is trained, all or adapters on all layers. */
static double needed(const dpo_model *model, const dpo_example *examples, size_t n_examples)
{
    const dpo_config *c = &model->config;
    const int full = !model->options.frozen;
    double rows = 0, scored = 0, pairs = 0; // pairs: of a query and a key
    for (size_t e = 0; e < n_examples; e++) {
        const double prompt = (double)examples[e].n_prompt;
        size_t at_prompt = 0;
        rows += (double)dpo_example_rows(&examples[e]);
        pairs += prompt * (prompt + 1) / 2;
        for (size_t b = 0; b < examples[e].n_branches; b++) {
            const dpo_branch *branch = &examples[e].branches[b];
            const double n = (double)branch->n;
            pairs += (n - 1) * prompt + n * (n - 1) / 2;
            scored += n - (double)branch->first_scored;
            at_prompt += !branch->first_scored;
        }
        if (at_prompt) scored -= (double)at_prompt - 1; // the prompt's last row, once for all
    }
    double numbers = 0; // of weights, once for each product that takes them
    for (size_t l = 0; l < c->n_layers; l++) {
        const dpoi_block_weights *b = &model->weights->blocks[l];
        const dpo_tensor *const linear[] = { b->qkv_w, b->up_w, b->out_w, b->down_w };
        for (size_t k = 0; k < 4; k++) {
            const dpo_tensor *W = linear[k];
            // frozen embeddings: what goes into layer 0's qkv and up needs no gradient
            const size_t down = full || l > 0 || k > 1;
            numbers += (double)(W->n * (1 + down + (size_t)full));
            if (W->lora_a) numbers += (double)(W->lora_a->n * (2 + down) + W->lora_b->n * 3);
        }
    }
    const double head = (double)(c->vocab_size * c->d_model * (full ? 3 : 2));
    return 2 * (numbers * rows + head * scored) + 12 * (double)(c->d_model * c->n_layers) * pairs;
}

typedef struct { dpo_model model; dpo_optimizer optimizer; dpo_context context; } trainer;

/* Where one update's time goes, next to the machine's ceilings in GFLOP/s and GB/s. */
static void print_profile(const dpo_profile *p, double flops_peak, double bytes_peak)
{
    static const char *const NAMES[DPO_N_OPERATIONS] = { "embedding", "layer norm",
        "layer norm, backward", "linear", "linear, backward", "adapter, both ways", "rotary",
        "attention", "attention, backward", "activation", "activation, backward", "residual",
        "keep as bf16", "head", "head, backward", "zero gradients", "gradient norm", "optimizer",
        "other" };
    double total = 0;
    for (int i = 0; i < DPO_N_OPERATIONS; i++) total += p->seconds[i];
    printf("    its time goes to                (peaks: %.0f GFLOP/s, updating memory %.1f GB/s)\n",
           flops_peak, bytes_peak);
    for (int i = 0; i < DPO_N_OPERATIONS; i++) {
        double work = 1e-9 * (p->flops[i] + p->bytes[i]) / p->seconds[i];
        double peak = p->flops[i] > 0 ? flops_peak : bytes_peak;
        if (p->seconds[i] <= 0) continue;
        printf("    %-22s %8.4f s %5.1f %%", NAMES[i], p->seconds[i], 100 * p->seconds[i] / total);
        if (work > 0)
            printf("  %7.1f %-7s %5.1f %% of peak", work, p->flops[i] > 0 ? "GFLOP/s" : "GB/s",
                   100 * work / peak);
        printf("\n");
    }
}

static const dpo_lora LORA = { .r = 16, .alpha = 32, .targets = "all-linear" };

/* A trainer of its own for each number of threads, from the file at `path`. */
static void make_trainer(trainer *t, const char *path, const setting *s, int threads)
{
    check(&t->context, dpo_context_init(&t->context, threads));
    check(&t->context, dpo_model_load(&t->context, &t->model, path, &s->options));
    if (s->lora) check(&t->context, dpo_lora_init(&t->model, &LORA, 1));
    check(&t->context, dpo_optimizer_init(&t->model, &t->optimizer, DPO_ADAMW));
}

/* Forward and backward of a batch. */
static void passes(trainer *t, const dpo_example *examples, size_t n, size_t n_branches,
                   size_t most_rows)
{
    dpo_score scores[2 * PAIRS];
    double dlogp[2 * PAIRS];
    for (size_t i = 0; i < n;) {
        dpo_batch micro = { examples + i, dpo_micro_batch(examples + i, n - i, most_rows) };
        check(&t->context, dpo_forward(&t->model, scores, &micro, 1));
        for (size_t b = 0; b < n_branches * micro.n; b++) dlogp[b] = b % 2 ? 0.01 : -0.01;
        check(&t->context, dpo_backward(&t->model, &micro, dlogp));
        i += micro.n;
    }
}

static double update(trainer *t, const dpo_example *examples, size_t n, size_t n_branches,
                     size_t most_rows)
{
    double norm, start = now();
    check(&t->context, dpo_model_zero_grad(&t->model));
    passes(t, examples, n, n_branches, most_rows);
    check(&t->context, dpo_grad_norm(&t->model, &norm));
    check(&t->context, dpo_optimizer_step(&t->model, &t->optimizer, 1e-6, dpo_clip_scale(norm, 1)));
    return now() - start;
}

/* The CPU's peaks, fp32's and bf16's, with all threads [0] and with one [1]: now, and the greatest
   so far. */
typedef struct { double now[2][2], best[2][2]; } peaks;

static void measure_peaks(peaks *p, int threads)
{
    for (int one = 0; one < 2; one++)
        for (int half = 0; half < 2; half++) {
            p->now[one][half] = measure_peak(one ? 1 : threads, half ? DPO_BF16 : DPO_F32);
            p->best[one][half] = DPOI_MAX(p->best[one][half], p->now[one][half]);
        }
}

/* More than any update can reach: one in bf16 has products of both kinds. */
static double ceiling(const peaks *p, int one, dpo_dtype dtype)
{
    return dtype == DPO_BF16 ? DPOI_MAX(p->best[one][0], p->best[one][1]) : p->best[one][0];
}

/* Returns how many results are above the ceiling. */
static int run_updates(int threads, double bandwidth)
{
    static dpo_example examples[PAIRS];
    static dpo_branch branches[2 * PAIRS];
    static uint32_t tokens[PAIRS * 600];
    char path[] = "/tmp/dpo-bench-XXXXXX";
    dpo_context context;
    dpo_model made;
    dpo_config config = { .vocab_size = 50304, .context_length = 2048, .d_model = 768,
                          .n_layers = 12, .n_heads = 12 };
    dpo_config_default(&config, DPO_GPT_NEOX);
    int descriptor = mkstemp(path);
    if (descriptor < 0 || close(descriptor)) {
        perror(path);
        exit(1);
    }
    check(&context, dpo_context_init(&context, threads));
    check(&context, dpo_model_init(&context, &made, &config, NULL, 1, NULL));
    check(&context, dpo_model_save(&made, path, DPO_F32));
    dpo_model_free(&made);
    dpo_context_free(&context);
    peaks peak = { 0 };
    int wrong = 0;
    printf("\nan update of Pythia-160m's size, %d pairs; %d threads, and 1 thread in turns\n"
           "%-20s %7s %7s %7s s  needed GFLOP/s  %% of fp32 peak  with 1 thread  x 1 thread\n",
           PAIRS, threads, "setting", "min", "median", "max");
    for (size_t i = 0; i < sizeof SETTINGS / sizeof *SETTINGS; i++) {
        const setting *s = &SETTINGS[i];
        if (quick && strcmp(s->name, "DPO fp32")) continue;
        trainer all, single;
        double seconds[ROUNDS], alone[ROUNDS], ratio[ROUNDS], share[ROUNDS], alone_share[ROUNDS];
        make_batch(examples, branches, tokens, config.vocab_size, s->branches);
        make_trainer(&all, path, s, threads);
        make_trainer(&single, path, s, 1);
        // buffers are allocated, pages touched
        update(&all, examples, PAIRS, s->branches, MOST_ROWS);
        update(&single, examples, PAIRS, s->branches, MOST_ROWS);
        const double flops = 1e-9 * needed(&all.model, examples, PAIRS);
        for (int r = 0; r < STEP_ROUNDS; r++) {
            measure_peaks(&peak, threads);
            seconds[r] = update(&all, examples, PAIRS, s->branches, MOST_ROWS);
            alone[r] = update(&single, examples, PAIRS, s->branches, MOST_ROWS);
            ratio[r] = alone[r] / seconds[r];
            share[r] = 100 * flops / seconds[r] / peak.now[0][0];
            alone_share[r] = 100 * flops / alone[r] / peak.now[1][0];
        }
        double *const sorted[] = { seconds, alone, ratio, share, alone_share };
        for (int j = 0; j < 5; j++) qsort(sorted[j], STEP_ROUNDS, sizeof(double), by_size);
        const int middle = STEP_ROUNDS / 2;
        const int above = (flops / seconds[0] > ceiling(&peak, 0, s->options.dtype)) +
                          (flops / alone[0] > ceiling(&peak, 1, s->options.dtype));
        wrong += above;
        printf("%-20s %7.3f %7.3f %7.3f   %14.1f  %14.1f  %13.1f  %10.2f%s\n",
               s->name, seconds[0], seconds[middle], seconds[STEP_ROUNDS - 1],
               flops / seconds[middle], share[middle], alone_share[middle], ratio[middle],
               above ? "  WRONG" : "");
        dpo_profile profile = { 0 };
        all.context.profile = &profile;
        update(&all, examples, PAIRS, s->branches, MOST_ROWS);
        print_profile(&profile, peak.best[0][s->options.dtype == DPO_BF16], bandwidth);
        fflush(stdout);
        trainer *const both[] = { &all, &single };
        for (int j = 0; j < 2; j++) {
            dpo_optimizer_free(&both[j]->model, &both[j]->optimizer);
            dpo_model_free(&both[j]->model);
            dpo_context_free(&both[j]->context);
        }
    }
    unlink(path);
    return wrong;
}

/* A row of the savings: mean seconds, and how many times as long as `base` in the same rounds. */
static void print_times(const char *name, const double *seconds, const double *base)
{
    double ratio[ROUNDS], mean = 0;
    for (int r = 0; r < STEP_ROUNDS; r++) {
        ratio[r] = seconds[r] / base[r];
        mean += seconds[r] / STEP_ROUNDS;
    }
    qsort(ratio, STEP_ROUNDS, sizeof *ratio, by_size);
    printf("%-30s %7.3f   %.2f / %.2f / %.2f\n", name, mean, ratio[0], ratio[STEP_ROUNDS / 2],
           ratio[STEP_ROUNDS - 1]);
}

/* LoRA's forward and backward, and the same where the frozen weights get their gradients as well:
   to that end they are marked as trained, behind the interface's back, once the adapter is there.
   What follows a backward is left out: the optimizer would change them too. */
static void run_frozen(int threads, const dpo_config *config, const dpo_example *examples)
{
    static trainer both[2];
    double seconds[2][ROUNDS];
    for (int all = 0; all < 2; all++) {
        trainer *t = &both[all];
        check(&t->context, dpo_context_init(&t->context, threads));
        check(&t->context, dpo_model_init(&t->context, &t->model, config, NULL, 1,
                                          &(dpo_model_options){ .frozen = 1 }));
        check(&t->context, dpo_lora_init(&t->model, &LORA, 1));
        for (size_t i = 0; all && i < t->model.n_tensors; i++) t->model.tensors[i].trainable = 1;
        dpoi_number_trainable(&t->model);
        check(&t->context, dpo_model_zero_grad(&t->model));
        passes(t, examples, PAIRS, 2, MOST_ROWS); // buffers are allocated, pages touched
    }
    for (int r = 0; r < STEP_ROUNDS; r++)
        for (int all = 0; all < 2; all++) {
            double start = now();
            passes(&both[all], examples, PAIRS, 2, MOST_ROWS);
            seconds[all][r] = now() - start;
        }
    print_times("LoRA, forward and backward", seconds[0], seconds[0]);
    print_times("and gradients of the frozen", seconds[1], seconds[0]);
    for (int all = 0; all < 2; all++) {
        dpo_model_free(&both[all].model);
        dpo_context_free(&both[all].context);
    }
}

/* What the same pairs cost without each of the savings, fp32. A reference computed again is beside
   the update as it is; of the three after that, each adds to the one before. */
static void run_savings(int threads)
{
    enum { APART = 2 * PAIRS, LONGEST = 400 };
    static dpo_example examples[PAIRS], apart[APART];
    static dpo_branch branches[APART], longer[APART];
    static uint32_t tokens[PAIRS * 600], padded[APART][LONGEST];
    dpo_config config = { .vocab_size = 50304, .context_length = 2048, .d_model = 768,
                          .n_layers = 12, .n_heads = 12 };
    trainer t;
    dpo_config_default(&config, DPO_GPT_NEOX);
    check(&t.context, dpo_context_init(&t.context, threads));
    check(&t.context, dpo_model_init(&t.context, &t.model, &config, NULL, 1, NULL));
    check(&t.context, dpo_optimizer_init(&t.model, &t.optimizer, DPO_ADAMW));
    make_batch(examples, branches, tokens, config.vocab_size, 2);
    size_t longest = 0;
    for (size_t s = 0; s < APART; s++) {    // prompt and answer as one text of its own
        const dpo_example *pair = &examples[s / 2];
        memcpy(padded[s], pair->prompt, pair->n_prompt * sizeof **padded);
        memcpy(padded[s] + pair->n_prompt, branches[s].tokens, branches[s].n * sizeof **padded);
        longer[s] = (dpo_branch){ padded[s], pair->n_prompt + branches[s].n, pair->n_prompt };
        apart[s] = (dpo_example){ .branches = &longer[s], .n_branches = 1, .group = s };
        longest = DPOI_MAX(longest, longer[s].n);
    }
    double seconds[5][ROUNDS];
    dpo_score scores[APART];
    update(&t, examples, PAIRS, 2, MOST_ROWS);
    for (int r = 0; r < STEP_ROUNDS; r++) {
        seconds[0][r] = update(&t, examples, PAIRS, 2, MOST_ROWS);
        double start = now();
        check(&t.context, dpo_score_examples(&t.model, scores, examples, PAIRS, MOST_ROWS));
        seconds[1][r] = seconds[0][r] + now() - start;
        seconds[2][r] = update(&t, apart, APART, 1, MOST_ROWS);
        for (size_t s = 0; s < APART; s++) longer[s].first_scored = 1;
        seconds[3][r] = update(&t, apart, APART, 1, MOST_ROWS);
        size_t lengths[APART];
        for (size_t s = 0; s < APART; s++) {
            lengths[s] = longer[s].n;
            longer[s].n = longest;
        }
        seconds[4][r] = update(&t, apart, APART, 1, MOST_ROWS);
        for (size_t s = 0; s < APART; s++)
            longer[s] = (dpo_branch){ padded[s], lengths[s], examples[s / 2].n_prompt };
    }
    static const char *const NAMES[] = { "as it is", "reference computed again", "prompts apart",
                                         "and logits of all rows", "and all padded" };
    printf("\nwhat is saved: DPO fp32, %d pairs; %d threads\n%-30s %7s   times as long as it is\n",
           PAIRS, threads, "", "seconds");
    for (int i = 0; i < 5; i++) print_times(NAMES[i], seconds[i], seconds[0]);
    dpo_optimizer_free(&t.model, &t.optimizer);
    dpo_model_free(&t.model);
    dpo_context_free(&t.context);
    run_frozen(threads, &config, examples);
}

/* Returns how many results are above the ceiling. */
static int run_plain_text(int threads, double bandwidth)
{
    enum { WINDOWS = 4, LONGEST = 256 };
    const size_t lengths[] = { 64, LONGEST };
    static uint32_t tokens[WINDOWS * (LONGEST + 1)];
    dpo_config config = { .vocab_size = 50304, .context_length = 1024, .d_model = 768,
                          .n_layers = 12, .n_heads = 12 };
    dpo_config_default(&config, DPO_GPT_NEOX);
    config.tied_head = 1;
    for (size_t i = 0; i < sizeof tokens / sizeof *tokens; i++)
        tokens[i] = (uint32_t)(dpo_random_u64(3, 0, i) % config.vocab_size);
    printf("\nplain text at the shape of GPT-2 124M, fp32, %d windows; %d threads\n"
           "%-10s %7s %7s %7s tokens/s  peak heap  %% of fp32 peak\n", WINDOWS, threads, "tokens",
           "min", "median", "max");
    double top = 0;
    int wrong = 0;
    for (size_t k = 0; k < sizeof lengths / sizeof *lengths; k++) {
        dpo_branch branches[WINDOWS];
        dpo_example examples[WINDOWS];
        double speed[ROUNDS], share[ROUNDS];
        trainer t;
        check(&t.context, dpo_context_init(&t.context, threads));
        check(&t.context, dpo_model_init(&t.context, &t.model, &config, NULL, 1, NULL));
        check(&t.context, dpo_optimizer_init(&t.model, &t.optimizer, DPO_ADAMW));
        for (size_t i = 0; i < WINDOWS; i++) {
            branches[i] = (dpo_branch){ tokens + i * (LONGEST + 1), lengths[k] + 1, 1 };
            examples[i] = (dpo_example){ .branches = &branches[i], .n_branches = 1, .group = i };
        }
        update(&t, examples, WINDOWS, 1, 2 * LONGEST);
        const double n_tokens = WINDOWS * (double)lengths[k];
        const double flops = 1e-9 * needed(&t.model, examples, WINDOWS) / n_tokens; // a token
        for (int r = 0; r < ROUNDS; r++) {
            double peak = measure_peak(threads, DPO_F32);
            top = DPOI_MAX(top, peak);
            speed[r] = n_tokens / update(&t, examples, WINDOWS, 1, 2 * LONGEST);
            share[r] = 100 * flops * speed[r] / peak;
        }
        double middle = median(speed);
        const int above = flops * speed[ROUNDS - 1] > top;
        wrong += above;
        printf("%d x %-6zu %7.0f %7.0f %7.0f           %.2f GB %15.1f%s\n", WINDOWS, lengths[k],
               speed[0], middle, speed[ROUNDS - 1], 1e-9 * (double)t.context.heap_peak,
               median(share), above ? "  WRONG" : "");
        dpo_profile profile = { 0 };
        t.context.profile = &profile;
        update(&t, examples, WINDOWS, 1, 2 * LONGEST);
        print_profile(&profile, top, bandwidth);
        dpo_optimizer_free(&t.model, &t.optimizer);
        dpo_model_free(&t.model);
        dpo_context_free(&t.context);
    }
    return wrong;
}

/* A token's time against that of reading every weight once: nothing else is as large. Returns how
   many results are above the fastest reading. */
static int run_generation(int threads, const float *array, size_t array_floats)
{
    enum { PROMPT = 16, TOKENS = 6 };
    static const dpo_dtype DTYPES[] = { DPO_F32, DPO_BF16 };
    const dpo_config size = { .vocab_size = 50304, .context_length = 2048, .d_model = 2048,
                              .n_layers = 24, .n_heads = 16 };
    uint32_t prompt[PROMPT];
    double top = 0;
    int wrong = 0;
    for (uint32_t i = 0; i < PROMPT; i++) prompt[i] = 11 * i;
    printf("\ngeneration at Pythia-1.4b's size, one stream, %d threads\n%-6s %8s   GB/s %20s\n",
           threads, "", "tokens/s", "% of reading memory");
    for (int k = 0; k < 2; k++) {
        dpo_config config = size;
        dpo_context context;
        dpo_model model;
        dpoi_cache cache;
        double speed[ROUNDS], share[ROUNDS], bytes = 0;
        dpo_config_default(&config, DPO_GPT_NEOX);
        check(&context, dpo_context_init(&context, threads));
        check(&context, dpo_model_init(&context, &model, &config, NULL, 1,
              &(dpo_model_options){ .dtype = DTYPES[k], .frozen = 1 }));
        for (size_t i = 0; i < model.n_tensors; i++) // of the embedding, a token reads one row
            if (&model.tensors[i] != model.weights->embedding)
                bytes += (double)(model.tensors[i].n * dpoi_dtype_bytes(model.tensors[i].dtype));
        check(&context, dpoi_cache_init(&cache, &model, PROMPT + ROUNDS * TOKENS) ||
                        dpoi_prefill(&model, &cache, prompt, PROMPT));
        for (int r = 0; r < ROUNDS; r++) {
            double reading = measure_reading(threads, array, array_floats), start = now();
            top = DPOI_MAX(top, reading);
            for (uint32_t i = 0; i < TOKENS; i++) dpoi_step(&model, &cache, i);
            speed[r] = TOKENS / (now() - start);
            share[r] = 1e-9 * bytes * speed[r] / reading * 100;
        }
        double middle = median(speed);
        printf("%-6s %8.2f %6.1f   ", k ? "bf16" : "fp32", middle, 1e-9 * bytes * middle);
        const int above = 1e-9 * bytes * speed[ROUNDS - 1] > top;
        wrong += above;
        middle = median(share);
        printf("%.0f / %.0f / %.0f%s\n", share[0], middle, share[ROUNDS - 1],
               above ? "  WRONG" : "");
        fflush(stdout);
        dpoi_cache_free(&context, &cache);
        dpo_model_free(&model);
        dpo_context_free(&context);
    }
    return wrong;
}

/* Words on the command line choose parts; without any, all are done. `quick` shortens products and
   updates, and alone it is these two. */
static const char *const PARTS[] = { "products", "updates", "savings", "text", "generation" };
enum { PRODUCTS, UPDATES, SAVINGS, TEXT, GENERATION, N_PARTS };

static void choose_parts(int *chosen /* [N_PARTS] */, int argc, char **argv)
{
    int any = 0;
    for (int i = 1; i < argc; i++) {
        int part = 0;
        while (part < N_PARTS && strcmp(argv[i], PARTS[part])) part++;
        if (part < N_PARTS) any = chosen[part] = 1;
        else if (!strcmp(argv[i], "quick")) quick = 1;
        else {
            fprintf(stderr, "bench: no part is called \"%s\"; there are", argv[i]);
            for (part = 0; part < N_PARTS; part++) fprintf(stderr, " %s,", PARTS[part]);
            fprintf(stderr, " and quick\n");
            exit(2);
        }
    }
    for (int part = 0; part < N_PARTS && !any; part++) chosen[part] = !quick || part <= UPDATES;
}

int main(int argc, char **argv)
{
    int chosen[N_PARTS] = { 0 };
    choose_parts(chosen, argc, argv);
    const size_t array_floats = (size_t)1 << 26;
    double load;
    dpo_context all;
    if (dpo_context_init(&all, 0)) {
        fprintf(stderr, "bench: %s\n", all.error);
        return 1;
    }
    if (getloadavg(&load, 1) == 1 && load > 0.5)
        printf("The machine is busy (load %.1f): expect too low figures.\n", load);
    operands[0] = 0.999f;
    operands[1] = 0.001f;
    for (int c = 0; c < CHAINS; c++) operands[2 + c] = 1.0f + 0.01f * (float)c;
    float *array;
    check(&all, dpoi_alloc(&all, &array, array_floats, sizeof *array));
    fill_randomly(array, array_floats);
    int wrong = chosen[PRODUCTS] ? run(1, array, array_floats) : 0;
    if (chosen[PRODUCTS] && all.n_threads > 1) wrong += run(all.n_threads, array, array_floats);
    double bandwidth = 0;
    for (int r = 0; r < ROUNDS; r++)
        bandwidth = DPOI_MAX(bandwidth, measure_updating(all.n_threads, array, array_floats));
    if (chosen[UPDATES]) wrong += run_updates(all.n_threads, bandwidth);
    if (chosen[SAVINGS]) run_savings(all.n_threads);
    if (chosen[TEXT]) wrong += run_plain_text(all.n_threads, bandwidth);
    if (chosen[GENERATION]) wrong += run_generation(all.n_threads, array, array_floats);
    dpoi_free(&all, array);
    dpo_context_free(&all);
    if (wrong) fprintf(stderr, "bench: %d results above 100 %%, so the peak is none\n", wrong);
    return wrong != 0;
}
