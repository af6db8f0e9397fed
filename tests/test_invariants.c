/* What must hold exactly, whatever the numbers are: bits that do not depend on neighbours, batches or
   threads, round trips, and formulas against a second way of computing them.

   "The same bits" is literal. Where two orders of summation meet (a shared prompt against texts of
   their own, micro-batches against one batch, generation's steps against the batch path) results differ
   by rounding: log-probabilities by 2e-8 of themselves, gradients by 3e-6 and logits by 2e-6 of a
   tensor's largest element. The limits are ten times that. */
#define DPOI_SERIAL_WORK 0      // small loops are divided among the threads as well
#include "check.h"

static dpo_context context;

static int same_scores(const dpo_score *a, const dpo_score *b, size_t n)
{
    int same = 1;
    for (size_t i = 0; i < n; i++)
        same &= !memcmp(&a[i].logp, &b[i].logp, sizeof a->logp) && a[i].n_scored == b[i].n_scored &&
                a[i].greedy == b[i].greedy;
    return same;
}

/* ---- numbers ------------------------------------------------------------------------------------- */

/* Sign, exponent and fraction put together by ldexp; exponents have the given bits and bias. */
static float from_fields(uint32_t bits, int exponent_bits, int fraction_bits)
{
    int bias = (1 << (exponent_bits - 1)) - 1, exponent = (int)(bits >> fraction_bits);
    double sign = exponent >> exponent_bits ? -1 : 1;
    double fraction = ldexp(bits & ((1u << fraction_bits) - 1), -fraction_bits);
    exponent &= (1 << exponent_bits) - 1;
    if (exponent == (1 << exponent_bits) - 1) return (float)(sign * (fraction > 0 ? NAN : INFINITY));
    return (float)(sign * (exponent ? ldexp(1 + fraction, exponent - bias)
                                    : ldexp(fraction, 1 - bias)));
}

static int same_float(float a, float b)
{
    return isnan(a) ? isnan(b) : a == b && !signbit(a) == !signbit(b);
}

static void test_half_precision(void)
{
    for (uint32_t bits = 0; bits < 65536; bits++) {
        float half = dpoi_half_to_float((uint16_t)bits), brain = dpoi_bf16_to_float((uint16_t)bits);
        if (!same_float(half, from_fields(bits, 5, 10))) check(0, "f16 %04x is %g", bits, half);
        if (!same_float(brain, from_fields(bits, 8, 7))) check(0, "bf16 %04x is %g", bits, brain);
    }
    check(1, "all 65536 f16 and bf16 values");
}

static void test_crc(void)
{
    static const char known[] = "123456789";
    unsigned char bytes[100];
    dpoi_crc_table table;
    dpoi_crc_fill(&table);
    check(dpoi_crc(&table, 0, known, 9) == 0xCBF43926u, "CRC-32 of %s is %08x", known,
          dpoi_crc(&table, 0, known, 9));
    for (size_t i = 0; i < sizeof bytes; i++) bytes[i] = (unsigned char)dpo_random_u64(1, 1, i);
    for (size_t from = 0; from < 9; from++)
        for (size_t n = 0; n < 40; n += 3) { // bit by bit
            uint32_t crc = 0xFFFFFFFFu;
            for (size_t i = 0; i < 8 * n; i++) {
                uint32_t bit = (crc ^ (uint32_t)(bytes[from + i / 8] >> (i % 8))) & 1;
                crc = (crc >> 1) ^ (bit ? 0xEDB88320u : 0);
            }
            check(dpoi_crc(&table, 0, bytes + from, n) == (crc ^ 0xFFFFFFFFu), "CRC-32 of %zu bytes", n);
        }
}

/* exp, tanh, sigmoid and erf of part 2 against libm's in fp64, in units of a float's last place. */
static double units_off(float ours, double truth)
{
    int exponent;
    frexp(truth, &exponent);
    return fabs(ours - truth) / ldexp(1, DPOI_MAX(exponent, -125) - 24);
}

static void test_functions(void)
{
    double worst[4] = { 0 };
    for (int i = -90000; i <= 90000; i++) {
        float x = (float)i * 1.0009e-3f;
        double e = exp(x);
        if (x < 88) check_worst(&worst[0], units_off(dpoi_exp(x), e));
        check_worst(&worst[1], units_off(dpoi_tanh(x / 8), tanh(x / 8)));
        check_worst(&worst[2], units_off(dpoi_sigmoid(x), e / (1 + e)));
        check_worst(&worst[3], units_off(dpoi_erf(x / 16), erf(x / 16)));
    }
    for (int i = -300; i <= 300; i++) { // and over all sizes, to the infinities
        float x = (i < 0 ? -1 : 1) * exp2f((float)abs(i) * 0.93f - 148);
        double e = exp(x);
        if (e < 3e38) check_worst(&worst[0], units_off(dpoi_exp(x), e));
        else check(dpoi_exp(x) == INFINITY, "exp(%g) is %g", x, dpoi_exp(x));
        check_worst(&worst[1], units_off(dpoi_tanh(x), tanh(x)));
        check_worst(&worst[2], units_off(dpoi_sigmoid(x), 1 / (1 + exp(-x))));
        check_worst(&worst[3], units_off(dpoi_erf(x), erf(x)));
    }
    check(worst[0] < 1.5 && worst[1] < 3 && worst[2] < 3 && worst[3] < 2, "exp is off by %.2f units in "
          "the last place, tanh by %.2f, sigmoid by %.2f, erf by %.2f", worst[0], worst[1], worst[2],
          worst[3]);
    check(isnan(dpoi_exp(NAN)) && isnan(dpoi_tanh(NAN)) && isnan(dpoi_sigmoid(NAN)) &&
          isnan(dpoi_erf(NAN)), "exp, tanh, sigmoid or erf loses NaN");
}

/* The sums of part 2 in fp64, of every length up to three times the longest set of lanes. */
static void test_sums(void)
{
    enum { N = 192 };
    float x[N], y[N];
    uint16_t half[N];
    double sum = 0, dot = 0, centred = 0, dot_half = 0, size = 0;
    for (size_t n = 0; n < N; n++) {
        // no worse than one rounding for each of n additions, and one for the product
        double bound = ((double)n + 1) * 0x1p-24 * size;
        check(fabs(dpoi_sum(x, n) - sum) <= bound && fabs(dpoi_dot(x, y, n) - dot) <= bound &&
              fabs(dpoi_dot_centred(x, y, 0.25f, n) - centred) <= bound &&
              fabs(dpoi_dot_bf16(x, half, n) - dot_half) <= bound, "sums of %zu: %g, %g, %g, %g "
              "instead of %g, %g, %g, %g", n, dpoi_sum(x, n), dpoi_dot(x, y, n),
              dpoi_dot_centred(x, y, 0.25f, n), dpoi_dot_bf16(x, half, n), sum, dot, centred, dot_half);
        x[n] = (float)dpo_random_uniform(4, 1, n) - 0.4f;
        y[n] = (float)dpo_random_uniform(4, 2, n) - 0.4f;
        half[n] = dpoi_bf16(y[n]);
        sum += x[n];
        dot += (double)x[n] * y[n];
        centred += (double)x[n] * (y[n] - 0.25);
        dot_half += (double)x[n] * dpoi_bf16_to_float(half[n]);
        size += 1;  // no |x|, |y| or |y - 0.25| is over 1
    }
}

static int compare_u64(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x < y ? -1 : x > y;
}

static void test_random(void)
{
    enum { SEEDS = 4, STREAMS = 5, N = 1000, ALL = SEEDS * STREAMS * N };
    static uint64_t drawn[ALL];
    double mean = 0.0, square = 0.0, product = 0.0, normal = 0.0, normal_square = 0.0, before = 0.5;
    for (size_t i = 0; i < ALL; i++) {
        uint64_t seed = i % SEEDS, stream = i / SEEDS % STREAMS, index = i / SEEDS / STREAMS;
        double u = dpo_random_uniform(seed, stream, index), z = dpoi_random_normal(seed, stream, index);
        drawn[i] = dpo_random_u64(seed, stream, index);
        if (!(u >= 0 && u < 1)) check(0, "uniform number %g", u);
        mean += u / ALL;
        square += u * u / ALL;
        product += (u - 0.5) * (before - 0.5) / ALL;    // of neighbours, which must not depend
        before = u;
        normal += z / ALL;
        normal_square += z * z / ALL;
    }
    qsort(drawn, ALL, sizeof *drawn, compare_u64);
    size_t twice = 0;
    for (size_t i = 1; i < ALL; i++) twice += drawn[i] == drawn[i - 1];
    check(!twice, "%zu random numbers come twice", twice);
    // four standard errors of a mean of 20000
    check(fabs(mean - 0.5) < 0.008 && fabs(square - 1 / 3.) < 0.008 && fabs(product) < 0.0024,
          "uniform numbers: mean %g, square %g, product of neighbours %g", mean, square, product);
    check(fabs(normal) < 0.028 && fabs(normal_square - 1) < 0.04, "normal numbers: mean %g, square %g",
          normal, normal_square);
}

/* ---- products --------------------------------------------------------------------------------------- */

/* dpoi_matmul_bias against the reference, which sums in fp64, with operands stored either way; on
   several threads, as attention does it, and a row or a column by itself: these to the bit. */
static void test_product(dpo_context *many, size_t m, size_t n, size_t k, int a_across, int b_across)
{
    enum { BESIDE = 3 };        // columns of c that are not the product's
    size_t ldc = n + BESIDE, i = m / 2, j = n / 2;
    float *a = malloc((m * k + 1) * sizeof *a), *b = malloc((k * n + 1) * sizeof *b);
    float *c = malloc(m * ldc * sizeof *c), *truth = malloc(m * ldc * sizeof *c);
    float *again = malloc(m * ldc * sizeof *c), row[4096], column[4096], biases[4096];
    dpoi_matrix A = { a, a_across ? 1 : k, a_across ? m : 1, DPO_F32 };
    dpoi_matrix B = { b, b_across ? 1 : n, b_across ? k : 1, DPO_F32 };
    const float largest = k == 1 ? 1e-30f : 1; // or so small that products are 0, half of them -0
    check_fill(a, m * k, largest, 1);
    check_fill(b, k * n, largest, 2);
    check_fill(biases, n, 1, 4);
    for (int how = 0; how < 4; how++) {
        const int accumulate = how & 1;
        const float *bias = how & 2 ? biases : NULL;
        check_fill(c, m * ldc, 1, 3);
        memcpy(truth, c, m * ldc * sizeof *c);
        memcpy(again, c, m * ldc * sizeof *c);
        for (size_t l = 0; l < n; l++) row[l] = c[i * ldc + l];
        for (size_t l = 0; l < m; l++) column[l] = c[l * ldc + j];
        dpoi_matmul_bias(&context, c, ldc, A, B, bias, m, n, k, accumulate, DPO_F32);
        dpoi_matmul_reference(truth, ldc, A, B, bias, m, n, k, accumulate, DPO_F32);
        double worst = 0.0, size = sqrt((double)k + 1);
        for (size_t l = 0; l < m * ldc; l++) check_worst(&worst, fabs((double)c[l] - truth[l]) / size);
        check(worst < 1e-5, "product %zu x %zu x %zu, stored %d %d, way %d: off by %.1e of a term", m, n, k,
              a_across, b_across, how, worst);
        dpoi_matmul_bias(many, again, ldc, A, B, bias, m, n, k, accumulate, DPO_F32);
        dpoi_matmul_bias(&context, row, n, dpoi_submatrix(A, i, 0), B, bias, 1, n, k, accumulate, DPO_F32);
        dpoi_matmul_bias(&context, column, 1, A, dpoi_submatrix(B, 0, j), bias ? bias + j : NULL, m, 1, k,
                         accumulate, DPO_F32);
        int same = !memcmp(c, again, m * ldc * sizeof *c) && !memcmp(c + i * ldc, row, n * sizeof *c);
        for (size_t l = 0; l < m; l++) same &= !memcmp(c + l * ldc + j, column + l, sizeof *c);
        check_fill(again, m * ldc, 1, 3);
        dpoi_matmul_serial(context.pack, again, ldc, A, B, m, n, k, accumulate, DPO_F32);
        same &= bias || !memcmp(c, again, m * ldc * sizeof *c); // which has none
        check(same, "product %zu x %zu x %zu, stored %d %d, way %d: threads, attention's form, a row or a "
              "column alone have other bits", m, n, k, a_across, b_across, how);
    }
    float *all[] = { a, b, c, truth, again };
    for (size_t l = 0; l < 5; l++) free(all[l]);
}

static void test_products(void)
{
    static const size_t sizes[][3] = { { 1, 1, 1 }, { 15, 33, 1 }, { 1, 40, 7 }, { 9, 1, 300 },
        { 14, 32, 256 }, { 15, 33, 257 }, { 8, 64, 31 }, { 30, 70, 0 }, { 129, 100, 530 }, { 3, 600, 65 },
        { 1210, 20, 9 }, { 300, 700, 3 }, { 2500, 20, 3 }, { 10, 40, 2100 },
        { 30, 48, 65 }, // whole tiles half as wide, with 16 lanes
        { 2200, 17, 800 }, { 20, DPOI_BLOCK_COLS + 70, 300 } };  // several blocks
    dpo_context many;
    check_must(dpo_context_init(&many, 3), &many);
    const int threads = many.n_threads;
    many.n_threads = 3;                   // products are cut for three, without OpenMP too
    many.block_cols = 3 * DPOI_TILE_COLS; // and for a small cache
    float c = 7;
    const dpoi_matrix one = { &c, 1, 1, DPO_F32 };
    dpoi_matmul(&many, &c, 1, one, one, 0, 1, 1, 0, DPO_F32);
    dpoi_matmul(&many, &c, 1, one, one, 1, 0, 1, 0, DPO_F32);
    check(c == 7, "a product of no rows or of no columns writes %g", c);
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        for (int stored = 0; stored < 4; stored += sizes[i][0] > 2000 ? 3 : 1) // both ways are enough
            test_product(&many, sizes[i][0], sizes[i][1], sizes[i][2], stored / 2, stored % 2);
    many.n_threads = threads;
    dpo_context_free(&many);
}

/* Bits of bf16 in a panel are those of dpoi_bf16, however the CPU rounds: every sign, exponent and kept
   digit, with what is cut off below, at and above the half. AVX-512 takes numbers below the least normal
   one as zeros of their sign. */
static int same_bf16(uint16_t got, float x)
{
    if (isnan(x)) return isnan(dpoi_bf16_to_float(got));
#ifdef DPOI_ROUND_PAIRS
    if (fabsf(x) < 0x1p-126f) return got == (signbit(x) ? 0x8000 : 0);
#endif
    return got == dpoi_bf16(x);
}

static void test_rounded_units(void)
{
    static const uint32_t below[] = { 0, 1, 0x7fff, 0x8000, 0x8001, 0xffff };
    enum { CUTS = sizeof below / sizeof *below, N = 6 * CUTS }; // units, at most; N / 16 is no whole number
    int wrong = 0, beyond = 0;
    const int paired = dpoi_paired(DPO_BF16);
    for (uint32_t high = 0; high < 0x10000; high++) {
        const size_t n = high % (N + 1);
        float x[2 * N], units[N + 16];
        uint16_t half[2 * N];
        for (uint32_t i = 0; i < 2 * N; i++) {
            uint32_t bits = ((high + i / CUTS) & 0xffff) << 16 | below[i % CUTS];
            memcpy(x + i, &bits, sizeof bits);
        }
        for (int way = 0; way < (paired ? 3 : 1); way++) { // x[i] and x[N + i]; x[i] and 0; neighbours
            for (size_t i = n; i < N + 16; i++) units[i] = 7;
            dpoi_units(units, x, way == 0 ? x + N : NULL, way == 2 ? 2 : 1, n, DPO_F32, DPO_BF16);
            for (size_t i = n; i < N + 16; i++) beyond += units[i] != 7;
            memcpy(half, units, n * sizeof *units);
            for (size_t i = 0; i < n; i++)
                if (!paired) wrong += !same_bf16(half[2 * i + 1], x[i]) + (half[2 * i] != 0);
                else if (way == 2)
                    wrong += !same_bf16(half[2 * i], x[2 * i]) + !same_bf16(half[2 * i + 1], x[2 * i + 1]);
                else
                    wrong += !same_bf16(half[2 * i], x[i]) +
                             !same_bf16(half[2 * i + 1], way ? 0.0f : x[N + i]);
        }
    }
    check(!wrong && !beyond, "%d numbers in panels are not rounded to bf16 as elsewhere, %d lie beyond",
          wrong, beyond);
}

/* ---- neighbours, batches, branches ------------------------------------------------------------------ */

enum { EXAMPLES = 6, MOST = 16 };
static const check_shape shapes[EXAMPLES] = { { 5, 3, 1, 6 }, { 0, 9 }, { 7, 4, 4 }, { 1, 2, 1 },
                                              { 0, 2, 5 }, { 13, 8 } };
static const check_shape long_shapes[EXAMPLES] = { { 70, 3, 1, 66 }, { 0, 100 }, { 7, 65, 4 },
                                                   { 1, 2, 1 }, { 0, 2, 130 }, { 64, 64 } };

static void test_neighbours(dpo_model *model, const check_batch *b, const char *name)
{
    dpo_score whole[MOST], again[MOST];
    size_t first = 0, place = b->n_branches, budgets[] = { 1, 8, 13, 29, 100, 1000000 };
    check_must(dpo_forward(model, whole, &b->batch, 0) || dpo_forward(model, again, &b->batch, 1),
               &context);
    check(same_scores(whole, again, b->n_branches), "%s: keeping changes scores", name);
    dpo_example reversed[EXAMPLES];
    for (size_t e = 0; e < EXAMPLES; e++) {
        dpo_batch alone = { b->examples + e, 1 };
        check_must(dpo_forward(model, again, &alone, 0), &context);
        check(same_scores(whole + first, again, b->examples[e].n_branches),
              "%s: example %zu has other scores alone", name, e);
        first += b->examples[e].n_branches;
        reversed[EXAMPLES - 1 - e] = b->examples[e];
    }
    check_must(dpo_forward(model, again, &(dpo_batch){ reversed, EXAMPLES }, 0), &context);
    first = 0;
    for (size_t e = 0; e < EXAMPLES; e++) {
        size_t n = b->examples[e].n_branches;
        place -= n;
        check(same_scores(whole + first, again + place, n), "%s: example %zu has other scores in "
              "reverse order", name, e);
        first += n;
    }
    for (size_t i = 0; i < sizeof budgets / sizeof *budgets; i++) {
        check_must(dpo_score_examples(model, again, b->examples, EXAMPLES, budgets[i]), &context);
        check(same_scores(whole, again, b->n_branches), "%s: other scores in micro-batches of %zu rows",
              name, budgets[i]);
    }
}

/* Adds the gradient of a batch, and copies all gradients to `out`. */
static void gradients(float *out, dpo_model *model, const dpo_example *examples, size_t n,
                      const double *dlogp, size_t max_rows)
{
    dpo_score scores[MOST];
    check_must(dpo_model_zero_grad(model), &context);
    while (n > 0) {
        dpo_batch part = { examples, dpo_micro_batch(examples, n, max_rows) };
        check_must(dpo_forward(model, scores, &part, 1) || dpo_backward(model, &part, dlogp), &context);
        for (size_t e = 0; e < part.n; e++) dlogp += examples[e].n_branches;
        examples += part.n;
        n -= part.n;
    }
    memcpy(out, model->grads, model->n_trainable * sizeof *out);
}

static void compare_gradients(const dpo_model *model, const float *a, const float *b, const char *what,
                              const char *name)
{
    for (size_t i = 0; i < model->n_tensors; i++) {
        const dpo_tensor *tensor = &model->tensors[i];
        size_t at = tensor->offset;
        if (!tensor->trainable) continue;
        double distance = check_distance(a + at, b + at, tensor->n);
        check(distance < 2e-5, "%s: gradient of %s %s differs by %.1e", name, tensor->name, what,
              distance);
    }
}

/* Branches of a shared prompt against passes that have never heard of prompts: each is one text from
   its first token on, scored from where the branch is. */
static void test_sharing(dpo_model *model, const check_batch *b, const char *name)
{
    float *together = malloc(model->n_trainable * sizeof *together);
    float *apart = malloc(model->n_trainable * sizeof *apart);
    dpo_example singles[MOST];
    dpo_branch texts[MOST];
    dpo_score shared[MOST], separate[MOST];
    double dlogp[MOST];
    size_t n = 0;
    for (size_t e = 0; e < EXAMPLES; e++)
        for (size_t k = 0; k < b->examples[e].n_branches; k++, n++) {
            const dpo_example *example = &b->examples[e];
            const dpo_branch *branch = &example->branches[k];
            size_t n_prompt = example->n_prompt;
            uint32_t *text = malloc((n_prompt + branch->n) * sizeof *text);
            memcpy(text, example->prompt, n_prompt * sizeof *text);
            memcpy(text + n_prompt, branch->tokens, branch->n * sizeof *text);
            texts[n] = (dpo_branch){ text, n_prompt + branch->n, n_prompt + branch->first_scored };
            singles[n] = (dpo_example){ .branches = &texts[n], .n_branches = 1 };
            dlogp[n] = dpoi_random_normal(5, 0, n);
        }
    check_must(dpo_forward(model, shared, &b->batch, 0) ||
               dpo_forward(model, separate, &(dpo_batch){ singles, n }, 0), &context);
    for (size_t i = 0; i < n; i++)
        check(fabs(shared[i].logp - separate[i].logp) < 2e-7 * fmax(100, fabs(shared[i].logp)) &&
              shared[i].n_scored == separate[i].n_scored,
              "%s: logp of branch %zu is %.8g, as a text of its own %.8g", name, i, shared[i].logp,
              separate[i].logp);
    gradients(together, model, b->examples, EXAMPLES, dlogp, 1000000);
    gradients(apart, model, singles, n, dlogp, 1000000);
    compare_gradients(model, together, apart, "with each branch as a text of its own", name);
    gradients(apart, model, b->examples, EXAMPLES, dlogp, 30);
    compare_gradients(model, together, apart, "in micro-batches", name);
    for (size_t i = 0; i < n; i++) free((void *)(uintptr_t)texts[i].tokens);
    free(together);
    free(apart);
}

static void test_micro_batch(const check_batch *b)
{
    for (size_t max_rows = 1; max_rows < 60; max_rows++)
        for (size_t e = 0; e < EXAMPLES; ) {
            size_t n = dpo_micro_batch(b->examples + e, EXAMPLES - e, max_rows), rows[2] = { 0, 0 };
            for (size_t i = 0; i <= n && e + i < EXAMPLES; i++) {
                size_t own = b->examples[e + i].n_prompt;
                for (size_t k = 0; k < b->examples[e + i].n_branches; k++)
                    own += b->examples[e + i].branches[k].n - 1;
                check(own == dpo_example_rows(&b->examples[e + i]), "rows of an example");
                rows[i == n] += own;
            }
            check(n > 0 && (n == 1 || rows[0] <= max_rows), "%zu examples of %zu rows in %zu", n,
                  rows[0], max_rows);
            check(e + n == EXAMPLES || rows[0] + rows[1] > max_rows, "%zu rows could take another "
                  "example in %zu", rows[0], max_rows);
            if (!n) return;
            e += n;
        }
}

/* dpo_logits against the scores, which come from another part of the code. */
static void test_logits(dpo_model *model, const check_batch *b, const char *name)
{
    size_t V = model->config.vocab_size, n = b->branches->n;
    const dpo_branch *branch = &b->examples[1].branches[0]; // no prompt
    n = branch->n;
    float *logits = malloc(n * V * sizeof *logits);
    dpo_score score;
    double logp = 0.0;
    check_must(dpo_logits(model, logits, branch->tokens, n) ||
               dpo_forward(model, &score, &(dpo_batch){ b->examples + 1, 1 }, 0), &context);
    for (size_t i = 1; i < n; i++) {
        const float *row = logits + (i - 1) * V;
        double sum = 0.0;
        for (size_t v = 0; v < V; v++) sum += exp((double)row[v] - row[branch->tokens[i]]);
        logp -= log(sum);
    }
    check(fabs(logp - score.logp) < 5e-6, "%s: logp is %.8g, by logits %.8g",
          name, score.logp, logp);
    free(logits);
}

/* At the start the policy is its own reference, which was scored in other batches. */
static void test_start(dpo_model *model, const check_batch *b, const char *name)
{
    static const dpo_loss_options losses[] = {
        { DPO_LOSS_SIGMOID, 0.1, 0.0 }, { DPO_LOSS_SIGMOID, 0.3, 0.2 }, { DPO_LOSS_IPO, 0.2, 0.0 },
        { DPO_LOSS_IPO_SUM, 0.5, 0.0 }, { DPO_LOSS_HINGE, 0.1, 0.0 } };
    static const double start[] = { 0.69314718055994531, 0.69314718055994531, 1 / 0.16, 1.0, 1.0 };
    dpo_score policy[MOST], scores[MOST];
    double reference[MOST];
    check_must(dpo_score_examples(model, scores, b->examples, EXAMPLES, 20) ||
               dpo_forward(model, policy, &b->batch, 1), &context);
    for (size_t i = 0; i < b->n_branches; i++) reference[i] = scores[i].logp;
    for (size_t k = 0; k < sizeof losses / sizeof *losses; k++)
        for (size_t i = 0; i + 1 < b->n_branches; i++) {
            dpo_pair pair = dpo_pair_loss(policy + i, reference + i, &losses[k]);
            check(pair.reward[0] == 0 && pair.reward[1] == 0 && fabs(pair.loss / start[k] - 1) < 1e-14,
                  "%s: loss %zu starts at %.17g with rewards %g and %g", name, k, pair.loss,
                  pair.reward[0], pair.reward[1]);
        }
    // equal answers tie, whatever the policy and the reference are
    dpo_branch twins[] = { b->examples[0].branches[2], b->examples[0].branches[2] };
    dpo_example tie = b->examples[0];
    tie.branches = twins;
    tie.n_branches = 2;
    check_must(dpo_forward(model, policy, &(dpo_batch){ &tie, 1 }, 0), &context);
    double other[] = { -12.345, -12.345 };
    dpo_pair pair = dpo_pair_loss(policy, other, &losses[0]);
    check(pair.reward[0] == pair.reward[1] && pair.reward[0] != 0, "%s: equal answers have rewards "
          "%.17g and %.17g", name, pair.reward[0], pair.reward[1]);
}

/* ---- threads --------------------------------------------------------------------------------------- */

/* Ten steps of DPO; everything that came out, one array after another. */
static float *train(int n_threads, dpo_architecture architecture, size_t *n)
{
    dpo_context own;
    check_must(dpo_context_init(&own, n_threads), &own);
    dpo_model model = check_make_model(&own, architecture, 40, 2);
    check_batch b = check_make_batch(long_shapes, EXAMPLES, model.config.vocab_size, 2);
    dpo_optimizer adam;
    dpo_score scores[MOST];
    double dlogp[MOST], norm;
    check_must(dpo_optimizer_init(&model, &adam, DPO_ADAMW), &own);
    size_t size = model.n_trainable;
    float *out = malloc((3 * size + 4 * MOST) * sizeof *out), *rest = out + 3 * size;
    memset(rest, 0, 4 * MOST * sizeof *rest);
    for (int step = 0; step < 10; step++) {
        check_must(dpo_model_zero_grad(&model) || dpo_forward(&model, scores, &b.batch, 1), &own);
        for (size_t i = 0; i < b.n_branches; i++) dlogp[i] = i % 2 ? 0.1 : -0.2;
        check_must(dpo_backward(&model, &b.batch, dlogp) || dpo_grad_norm(&model, &norm), &own);
        if (step == 0) memcpy(out, model.grads, size * sizeof *out);
        check_must(dpo_optimizer_step(&model, &adam, 1e-3, dpo_clip_scale(norm, 1.0)), &own);
    }
    memcpy(out + size, model.params, size * sizeof *out);
    memcpy(out + 2 * size, adam.v, size * sizeof *out);
    memcpy(rest, &norm, sizeof norm);
    for (size_t i = 0; i < b.n_branches; i++) memcpy(rest + 2 + 2 * i, &scores[i].logp, sizeof norm);
    *n = 3 * size + 4 * MOST;
    dpo_optimizer_free(&model, &adam);
    check_free_batch(&b);
    dpo_model_free(&model);
    dpo_context_free(&own);
    check(own.heap_bytes == 0, "%zu bytes were not freed", own.heap_bytes);
    return out;
}

static void test_threads(dpo_architecture architecture)
{
    size_t n;
    float *one = train(1, architecture, &n);
    int most = 4;
#ifndef _OPENMP
    most = 1;
#endif
    for (int threads = 2; threads <= most; threads++) {
        float *more = train(threads, architecture, &n);
        size_t differ = 0;
        for (size_t i = 0; i < n; i++) differ += memcmp(one + i, more + i, sizeof *one) != 0;
        check(!differ, "architecture %d, %d threads: %zu of %zu gradients, weights or scores have other "
              "bits", (int)architecture, threads, differ, n);
        free(more);
    }
    free(one);
}

/* ---- profile --------------------------------------------------------------------------------------- */

/* Of one update: operations counted from the weights' shapes and the batch, and times that are never
   more than the clock's and, as every moment of a pass is somebody's, little less. */
static void test_profile(dpo_architecture architecture)
{
    dpo_model model = check_make_model(&context, architecture, 40, 2);
    check_batch b = check_make_batch(long_shapes, EXAMPLES, model.config.vocab_size, 2);
    dpo_optimizer adam;
    dpo_score scores[MOST];
    dpo_profile profile = { 0 };
    double dlogp[MOST] = { 0.1 }, norm, rows = 0, matrices = 0, seconds = 0;
    struct timespec start, end;
    check_must(dpo_optimizer_init(&model, &adam, DPO_ADAMW), &context);
    context.profile = &profile;
    clock_gettime(CLOCK_MONOTONIC, &start);
    check_must(dpo_model_zero_grad(&model) || dpo_forward(&model, scores, &b.batch, 1) ||
               dpo_backward(&model, &b.batch, dlogp) || dpo_grad_norm(&model, &norm) ||
               dpo_optimizer_step(&model, &adam, 1e-3, 1), &context);
    clock_gettime(CLOCK_MONOTONIC, &end);
    context.profile = NULL;
    for (size_t e = 0; e < b.batch.n; e++) rows += (double)dpo_example_rows(&b.examples[e]);
    for (size_t i = 0; i < model.n_tensors; i++)
        if (model.tensors[i].layout != DPO_PLAIN && &model.tensors[i] != model.weights->head)
            matrices += (double)model.tensors[i].n;
    matrices -= (double)model.weights->embedding->n *
                (model.weights->embedding != model.weights->head &&
                 model.weights->embedding->layout != DPO_PLAIN);
    double linear = 2 * rows * matrices, head = profile.flops[DPO_TIME_HEAD];
    check(profile.flops[DPO_TIME_LINEAR] == linear && profile.flops[DPO_TIME_LINEAR_BACK] == 2 * linear,
          "%g and %g operations of linear layers, not %g and twice that", profile.flops[DPO_TIME_LINEAR],
          profile.flops[DPO_TIME_LINEAR_BACK], linear);
    check(head > 0 && profile.flops[DPO_TIME_HEAD_BACK] == 3 * head, "the head's operations");
    for (int i = 0; i < DPO_N_OPERATIONS; i++) {
        seconds += profile.seconds[i];
        check(profile.seconds[i] >= 0 && (profile.flops[i] == 0 || profile.bytes[i] == 0),
              "operation %d: time or work", i);
    }
    double wall = (double)(end.tv_sec - start.tv_sec) + 1e-9 * (double)(end.tv_nsec - start.tv_nsec);
    check(seconds <= wall && seconds > 0.5 * wall, "%g s of %g s are accounted for", seconds, wall);
    dpo_optimizer_free(&model, &adam);
    check_free_batch(&b);
    dpo_model_free(&model);
}

/* ---- optimizer, schedule, metrics --------------------------------------------------------------------- */

/* Three updates against the formulas in fp64, with constants that leave no term unseen. */
static void test_optimizer(dpo_optimizer_kind kind)
{
    const double b1 = 0.8, b2 = kind == DPO_ADAMW ? 0.95 : 0.9, epsilon = 0.03, decay = 0.7, lr = 0.02,
                 scale = 0.6;
    dpo_model model = check_load(&context, "btlm_alibi_swiglu");
    dpo_optimizer optimizer;
    check_must(dpo_optimizer_init(&model, &optimizer, kind) || dpo_model_zero_grad(&model), &context);
    check(optimizer.beta1 == 0.9 && optimizer.beta2 == (kind == DPO_ADAMW ? 0.999 : 0.99) &&
          optimizer.epsilon == 1e-8 && optimizer.weight_decay == 0, "the optimizer's defaults");
    optimizer.beta1 = b1;
    optimizer.beta2 = b2;
    optimizer.epsilon = epsilon;
    optimizer.weight_decay = decay;
    size_t n = model.n_trainable;
    double *p = malloc(n * sizeof *p), *m = calloc(n, sizeof *m), *v = calloc(n, sizeof *v);
    float slope = dpoi_weight_at(model.weights->slopes, 0);
    float *params = model.params, *grads = model.grads;
    for (size_t i = 0; i < n; i++) p[i] = params[i];
    for (int step = 1; step <= 3; step++) {
        check_fill(grads, n, 0.1, (uint64_t)step);
        grads[0] = 0.0f;
        for (size_t k = 0; k < model.n_tensors; k++) {
            const dpo_tensor *tensor = &model.tensors[k];
            if (!tensor->trainable) continue;
            int matrix = tensor->n_dims == 2;
            double rate = lr * (tensor->layout == DPO_CONV1D ? model.config.mup_width_scale : 1.0);
            check(tensor->decays == matrix, "%s decays: %d", tensor->name, tensor->decays);
            for (size_t i = tensor->offset, j = 0; j < tensor->n; i++, j++) {
                double g = scale * grads[i];
                m[i] = b1 * m[i] + (1 - b1) * g;
                v[i] = b2 * v[i] + (1 - b2) * g * g;
                if (matrix) p[i] -= rate * decay * p[i];
                if (kind == DPO_ADAMW)
                    p[i] -= rate * m[i] / (1 - pow(b1, step)) /
                            (sqrt(v[i] / (1 - pow(b2, step))) + epsilon);
                else
                    p[i] -= rate * g / (sqrt(v[i]) + epsilon);
            }
        }
        check_must(dpo_optimizer_step(&model, &optimizer, lr, scale), &context);
        double worst = 0.0;
        for (size_t i = 0; i < n; i++) check_worst(&worst, fabs(p[i] - params[i]));
        check(worst < 1e-6, "optimizer %d, step %d: a weight is off by %.1e", (int)kind, step, worst);
    }
    check(optimizer.step == 3 && dpoi_weight_at(model.weights->slopes, 0) == slope, "slopes do not learn");
    free(p);
    free(m);
    free(v);
    dpo_optimizer_free(&model, &optimizer);
    dpo_model_free(&model);
}

static void test_grad_norm(void)
{
    dpo_model model = check_make_model(&context, DPO_GPT_NEOX, 64, 2); // more than two DPOI_PIECEs
    double squares = 0.0, norm;
    check_must(dpo_model_zero_grad(&model), &context);
    float *grads = model.grads;
    check_fill(grads, model.n_trainable, 1, 1);
    for (size_t i = 0; i < model.n_trainable; i++) squares += (double)grads[i] * grads[i];
    check_must(dpo_grad_norm(&model, &norm), &context);
    check(model.n_trainable > 2 * DPOI_PIECE && fabs(norm / sqrt(squares) - 1) < 1e-12,
          "gradient norm %.15g, not %.15g", norm, sqrt(squares));
    const dpo_tensor *tensor = &model.tensors[7];
    grads[tensor->offset + 3] = NAN;
    check(dpo_grad_norm(&model, &norm) && strstr(context.error, tensor->name),
          "a gradient that is not a number: %s", context.error);
    dpo_model_free(&model);
}

static void test_schedule(void)
{
    static const struct { dpo_schedule kind; size_t step, steps, warmup; double factor; } known[] = {
        { DPO_CONSTANT, 0, 10, 0, 1.0 }, { DPO_CONSTANT, 9, 10, 0, 1.0 },
        { DPO_CONSTANT, 0, 10, 4, 0.2 }, { DPO_CONSTANT, 3, 10, 4, 0.8 },
        { DPO_CONSTANT, 4, 10, 4, 1.0 }, { DPO_LINEAR_DECAY, 2, 10, 3, 0.75 },
        { DPO_LINEAR_DECAY, 3, 13, 3, 1.0 }, { DPO_LINEAR_DECAY, 5, 13, 3, 0.8 },
        { DPO_LINEAR_DECAY, 13, 13, 3, 0.0 }, { DPO_LINEAR_DECAY, 20, 13, 3, 0.0 },
        { DPO_COSINE, 0, 12, 0, 1.0 }, { DPO_COSINE, 4, 12, 0, 0.75 }, { DPO_COSINE, 6, 12, 0, 0.5 },
        { DPO_COSINE, 9, 13, 1, 0.25 }, { DPO_COSINE, 12, 12, 0, 0.0 }, { DPO_COSINE, 5, 5, 5, 1.0 } };
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        double factor = dpo_schedule_factor(known[i].kind, known[i].step, known[i].steps,
                                            known[i].warmup);
        check(fabs(factor - known[i].factor) < 1e-12, "schedule %zu: %.15g, not %g", i, factor,
              known[i].factor);
    }
    check(dpo_clip_scale(0.5, 1) == 1 && dpo_clip_scale(50, 0) == 1 && dpo_clip_scale(0, 1) == 1 &&
          fabs(dpo_clip_scale(4, 1) - 1 / 4.000001) < 1e-15 &&
          fabs(dpo_clip_scale(1, 1) - 1 / 1.000001) < 1e-15, "clipping");
}

static void test_metrics(void)
{
    enum { N = 14, GROUPS = 6 }; // group 3 has no pair
    static const size_t group[N] = { 0, 0, 1, 2, 2, 2, 4, 4, 5, 5, 5, 5, 1, 0 };
    const dpo_loss_options options = { DPO_LOSS_SIGMOID, 0.3, 0.1 };
    dpo_example examples[N];
    dpo_score scores[2 * N];
    double reference[2 * N], margins[N], accuracy = 0.0, loss = 0.0, logp[2] = { 0 }, reward[2] = { 0 };
    dpo_metrics metrics;
    for (size_t i = 0; i < 2 * N; i++) {
        scores[i] = (dpo_score){ -20 + dpoi_random_normal(1, 1, i), 4, 0 };
        reference[i] = -20 + dpoi_random_normal(1, 2, i);
        if (i / 2 == 4) scores[i].logp = reference[i] + 1; // a tie
    }
    for (size_t i = 0; i < N; i++) {
        examples[i] = (dpo_example){ .n_branches = 2, .group = group[i] };
        double ratio[2];
        for (size_t k = 0; k < 2; k++) {
            ratio[k] = scores[2 * i + k].logp - reference[2 * i + k];
            reward[k] += 0.3 * ratio[k] / N;
            logp[k] += scores[2 * i + k].logp / N;
        }
        double chosen = 1 / (1 + exp(0.3 * (ratio[1] - ratio[0])));
        accuracy += i != 4 && ratio[0] > ratio[1] ? 1. / N : 0;
        loss -= (0.9 * log(chosen) + 0.1 * log(1 - chosen)) / N;
    }
    check_must(dpo_metrics_compute(&context, &metrics, margins, examples, scores, reference, N,
                                   &options), &context);
    // variance of the mean: sum over pairs of pairs in one group of the products of their deviations
    double sum = 0.0;
    for (size_t i = 0; i < N; i++)
        for (size_t j = 0; j < N; j++)
            if (group[i] == group[j]) sum += ((margins[i] > 0) - accuracy) * ((margins[j] > 0) - accuracy);
    double error = sqrt(sum * (GROUPS - 1) / (GROUPS - 2)) / N;
    check(metrics.n == N && metrics.ties == 1 && fabs(metrics.accuracy - accuracy) < 1e-14 &&
          fabs(metrics.accuracy_error - error) < 1e-14, "accuracy %.15g +- %.15g, not %.15g +- %.15g",
          metrics.accuracy, metrics.accuracy_error, accuracy, error);
    check(fabs(metrics.loss - loss) < 1e-13, "mean loss %.15g, not %.15g", metrics.loss, loss);
    check(fabs(metrics.margin - (reward[0] - reward[1])) < 1e-13, "mean margin %.15g", metrics.margin);
    for (size_t k = 0; k < 2; k++)
        check(fabs(metrics.reward[k] - reward[k]) < 1e-13 && fabs(metrics.logp[k] - logp[k]) < 1e-12,
              "mean reward %.15g and logp %.15g", metrics.reward[k], metrics.logp[k]);
    check_must(dpo_metrics_compute(&context, &metrics, NULL, examples, scores, reference, 2, &options),
               &context);
    check(metrics.accuracy_error == 0, "one prompt has no standard error");
    examples[5].n_branches = 3;
    check(dpo_metrics_compute(&context, &metrics, margins, examples, scores, reference, N, &options) &&
          strstr(context.error, "example 5"), "three branches: %s", context.error);
}

/* ---- files and memory ---------------------------------------------------------------------------------- */

static void compare_models(dpo_model *a, dpo_model *b, const char *name)
{
    dpo_string text[2] = { { 0 } };
    check_must(dpoi_fields_write(&context, &text[0], &a->config, dpoi_config_fields) ||
               dpoi_fields_write(&context, &text[1], &b->config, dpoi_config_fields), &context);
    check(text[0].n == text[1].n && !memcmp(text[0].bytes, text[1].bytes, text[0].n),
          "%s: another config", name);
    check(a->n_params == b->n_params && !memcmp(a->params, b->params, a->n_params * sizeof(float)),
          "%s: other weights", name);
    for (size_t i = 0; i < a->file.n_entries; i++) { // tokenizer and original files
        const dpo_entry *old = &a->file.entries[i], *new = dpo_file_find(&b->file, old->name);
        if (dpo_model_tensor(a, old->name) || !strcmp(old->name, "config")) continue;
        check(new && new->dtype == old->dtype && new->n_dims == old->n_dims &&
              new->shape[0] == old->shape[0] && new->bytes == old->bytes &&
              !memcmp(new->data, old->data, old->bytes), "%s: another %s", name, old->name);
    }
    static const char words[] = "A <|endoftext|> and #12.\n";
    dpo_tokens ids[2] = { { 0 } };
    check_must(dpo_tokenizer_encode(&context, &ids[0], &a->tokenizer, words, sizeof words - 1) !=
               dpo_tokenizer_encode(&context, &ids[1], &b->tokenizer, words, sizeof words - 1),
               &context);
    check(ids[0].n == ids[1].n && (!ids[0].n || !memcmp(ids[0].ids, ids[1].ids, ids[0].n * 4)),
          "%s: another tokenizer", name);
    for (int i = 0; i < 2; i++) {
        dpo_tokens_free(&context, &ids[i]);
        dpo_string_free(&context, &text[i]);
    }
}

static void test_save(dpo_model *model, const char *name)
{
    char first[CHECK_PATH_BYTES], second[CHECK_PATH_BYTES];
    check_path(first, "first.bin");
    check_path(second, "second.bin");
    dpo_model loaded, again;
    check_must(dpo_model_save(model, first, DPO_F32) ||
               dpo_model_load(&context, &loaded, first, NULL) ||
               dpo_model_save(&loaded, second, DPO_F32) ||
               dpo_model_load(&context, &again, second, NULL), &context);
    compare_models(model, &loaded, name);
    check(loaded.file.bytes == again.file.bytes && loaded.identity == again.identity &&
          !memcmp(loaded.file.map, again.file.map, loaded.file.bytes), "%s: saving again gives another "
          "file", name);
    dpo_model_free(&again);
    float *params = loaded.params;
    params[3] = nextafterf(params[3], 9);
    check_must(dpo_model_save(&loaded, second, DPO_F32) ||
               dpo_model_load(&context, &again, second, NULL), &context);
    check(loaded.identity != again.identity, "%s: other weights have the same identity", name);
    dpo_model_free(&loaded);
    dpo_model_free(&again);
    unlink(first);
    unlink(second);
}

/* A tensor of more than one piece of a file. */
static void test_save_pieces(void)
{
    dpo_model model = check_make_model(&context, DPO_GPT_NEOX, 64, 2);
    check(model.tensors[0].n > DPOI_FILL, "the embedding has only %zu elements", model.tensors[0].n);
    test_save(&model, "two pieces");
    dpo_model_free(&model);
}

static void test_reference_cache(void)
{
    char path[CHECK_PATH_BYTES];
    double logp[] = { -1.5, -2.25, -1e-300 }, read[3];
    check_path(path, "reference.bin");
    const dpo_reference_key key = { 11, 0, DPO_F32, 22, 33 };
    check_must(dpo_reference_save(&context, path, &key, logp, 3) ||
               dpo_reference_load(&context, path, &key, read, 3), &context);
    check(!memcmp(logp, read, sizeof logp), "the reference cache gives other numbers");
    unlink(path);
}

/* Everything that a training step allocates, against the plan. */
static void test_plan(dpo_architecture architecture, dpo_optimizer_kind kind, int trains)
{
    dpo_context own;
    check_must(dpo_context_init(&own, 2), &own);
    dpo_model model = check_make_model(&own, architecture, 64, 3);
    check_batch b = check_make_batch(long_shapes, EXAMPLES, model.config.vocab_size, 3);
    dpo_plan_options options = { .train = trains, .optimizer = kind, .n_threads = own.n_threads };
    dpo_plan_passes(&options, b.examples, EXAMPLES, SIZE_MAX, trains);
    dpo_memory plan;
    dpo_optimizer optimizer = { 0 };
    dpo_score scores[MOST];
    double dlogp[MOST] = { 1 }, norm;
    check_must(dpo_memory_plan(&own, &plan, &model.config, &options) ||
               dpo_forward(&model, scores, &b.batch, trains), &own);
    if (trains)
        check_must(dpo_model_zero_grad(&model) || dpo_optimizer_init(&model, &optimizer, kind) ||
                   dpo_backward(&model, &b.batch, dlogp) || dpo_grad_norm(&model, &norm) ||
                   dpo_optimizer_step(&model, &optimizer, 1e-3, 1), &own);
    double ratio = (double)own.heap_peak / (double)plan.total;
    check(fabs(ratio - 1) < 0.02, "architecture %d, optimizer %d, training %d: planned %zu bytes, took "
          "%zu", (int)architecture, (int)kind, trains, plan.total, own.heap_peak);
    check(plan.total == plan.weights + plan.gradients + plan.optimizer + plan.activations + plan.head +
          plan.scratch, "the plan's total is not its sum");
    if (trains) dpo_optimizer_free(&model, &optimizer);
    check_free_batch(&b);
    dpo_model_free(&model);
    dpo_context_free(&own);
    check(own.heap_bytes == 0, "%zu bytes were not freed", own.heap_bytes);
}

/* ---- generation ---------------------------------------------------------------------------------------- */

static void append(void *user, const char *bytes, size_t n)
{
    dpo_string *pieces = user;
    check_must(dpoi_string_append(&context, pieces, bytes, n), &context);
}

/* Generates, and checks that the pieces shown on the way make up the whole. */
static dpo_string generate(dpo_model *model, const uint32_t *prompt, size_t n, dpo_sampling sampling)
{
    dpo_string out = { 0 }, pieces = { 0 };
    check_must(dpo_generate(model, &out, prompt, n, &sampling, append, &pieces), &context);
    check(out.n == pieces.n && (!out.n || !memcmp(out.bytes, pieces.bytes, out.n)),
          "the pieces \"%.*s\" are not \"%.*s\"", (int)pieces.n, pieces.bytes, (int)out.n, out.bytes);
    dpo_string_free(&context, &pieces);
    return out;
}

static int same_text(const dpo_string *a, const dpo_string *b)
{
    return a->n == b->n && (!a->n || !memcmp(a->bytes, b->bytes, a->n));
}

/* The argmax of dpo_logits again and again. *n_new, at most max_new, becomes how many tokens that gave,
   up to the end token or to two logits that rounding could swap. */
static dpo_string argmax_text(dpo_model *model, const uint32_t *prompt, size_t n, size_t *n_new)
{
    size_t V = model->config.vocab_size, most = *n_new;
    float *logits = malloc((n + most) * V * sizeof *logits);
    uint32_t *tokens = malloc((n + most) * sizeof *tokens);
    dpo_string out = { 0 };
    memcpy(tokens, prompt, n * sizeof *tokens);
    for (*n_new = 0; *n_new < most; ++*n_new) {
        check_must(dpo_logits(model, logits, tokens, n), &context);
        const float *row = logits + (n - 1) * V;
        size_t best = 0;
        float second = -INFINITY;
        for (size_t v = 1; v < V; v++) {
            second = DPOI_MAX(second, row[v] > row[best] ? row[best] : row[v]);
            if (row[v] > row[best]) best = v;
        }
        if ((int64_t)best == model->config.eos_id || row[best] - second < 1e-4) break;
        tokens[n++] = (uint32_t)best;
        check_must(dpo_tokenizer_decode(&context, &out, &model->tokenizer, tokens + n - 1, 1), &context);
    }
    free(tokens);
    free(logits);
    return out;
}

/* The logits of every step of generation against the batch path's. */
static void test_steps(dpo_model *model, const char *name)
{
    enum { T = 30, PROMPT = 9 };
    size_t V = model->config.vocab_size;
    uint32_t tokens[T];
    float *logits = malloc(T * V * sizeof *logits);
    dpoi_cache cache;
    double worst = 0.0;
    for (size_t i = 0; i < T; i++) tokens[i] = (uint32_t)(dpo_random_u64(1, 9, i) % V);
    check_must(dpo_logits(model, logits, tokens, T) || dpoi_cache_init(&cache, model, T) ||
               dpoi_prefill(model, &cache, tokens, PROMPT), &context);
    for (size_t i = PROMPT; i <= T; i++) {
        check_worst(&worst, check_distance(cache.logits, logits + (i - 1) * V, V));
        if (i < T) dpoi_step(model, &cache, tokens[i]);
    }
    check(worst < 2e-5, "%s: a step's logits differ by %.1e of the largest", name, worst);
    dpoi_cache_free(&context, &cache);
    free(logits);
}

static void test_greedy(dpo_model *model, const char *name)
{
    uint32_t prompt[40];
    size_t context_length = model->config.context_length, total = 0;
    for (uint64_t trial = 0; trial < 6; trial++) {
        // one token to start, a prompt, and one that fills the context but for five tokens
        size_t n = trial % 3 == 0 ? 1 : trial % 3 == 1 ? 6 : context_length - 5;
        size_t n_new = context_length - n + 1;  // the last position predicts one more
        model->config.eos_id = trial < 3 ? 0 : -1;
        for (size_t i = 0; i < n; i++)
            prompt[i] = (uint32_t)(dpo_random_u64(trial, 7, i) % model->config.vocab_size);
        dpo_string truth = argmax_text(model, prompt, n, &n_new);
        total += n_new;
        int full = n + n_new == context_length + 1;     // then the context ends it
        dpo_sampling sampling = { .max_new_tokens = full ? 1000 : n_new, .top_p = 1 };
        if (n_new) {
            dpo_string out = generate(model, prompt, n, sampling);
            check(same_text(&out, &truth), "%s, trial %d: \"%.*s\", not \"%.*s\"", name, (int)trial,
                  (int)out.n, out.bytes, (int)truth.n, truth.bytes);
            dpo_string_free(&context, &out);
        }
        dpo_string_free(&context, &truth);
    }
    check(total > 40, "%s: only %zu tokens to compare", name, total);
    for (size_t i = 0; i < 40; i++) prompt[i] = (uint32_t)(1 + i % 7); // longer than the context
    dpo_sampling sampling = { .max_new_tokens = 5, .top_p = 1 };
    dpo_string cut = generate(model, prompt, 40, sampling);
    dpo_string tail = generate(model, prompt + 9, 31, sampling);
    check(same_text(&cut, &tail), "%s: a prompt that is too long does not keep its end", name);
    dpo_string_free(&context, &cut);
    dpo_string_free(&context, &tail);
}

/* How often each token is chosen, against its probability: chi-square over at most five degrees of
   freedom exceeds 20.5 once in a thousand times, and the numbers drawn are always the same. */
static void test_choice(double temperature, size_t top_k, double top_p, const double *share)
{
    enum { V = 6, DRAWS = 20000 };
    static const float logits[V] = { 0.3f, 1.1f, -0.4f, 1.9f, 0.0f, -2.0f };
    dpo_sampling sampling = { .temperature = temperature, .top_k = top_k, .top_p = top_p, .seed = 5 };
    dpoi_choice scratch[V];
    double count[V] = { 0 }, chi_square = 0.0;
    for (uint64_t i = 0; i < DRAWS; i++) count[dpoi_choose(scratch, logits, V, &sampling, i)]++;
    for (size_t v = 0; v < V; v++) {
        double expected = DRAWS * share[v];
        check(share[v] > 0 || count[v] == 0, "token %zu must not be chosen", v);
        if (share[v] > 0) chi_square += (count[v] - expected) * (count[v] - expected) / expected;
    }
    check(chi_square < 20.5, "temperature %g, top-k %zu, top-p %g: chi-square %g", temperature, top_k,
          top_p, chi_square);
}

static void test_choices(void)
{
    static const double weight[] = { 0.3, 1.1, -0.4, 1.9, 0.0, -2.0 };
    // exp(logit / 0.8) makes shares .082 .224 .034 .609 .056 .005: two tokens reach 0.8, three 0.9
    static const struct { size_t top_k; double top_p; int keeps[6]; } filters[] = {
        { 0, 1.0, { 1, 1, 1, 1, 1, 1 } }, { 3, 1.0, { 1, 1, 0, 1, 0, 0 } },
        { 0, 0.8, { 0, 1, 0, 1, 0, 0 } }, { 0, 0.9, { 1, 1, 0, 1, 0, 0 } },
        { 0, 0.01, { 0, 0, 0, 1, 0, 0 } }, { 9, 0.5, { 0, 0, 0, 1, 0, 0 } },
        { 2, 0.9, { 0, 1, 0, 1, 0, 0 } },   // 0.9 of the two that top-k leaves
        { 2, 0.7, { 0, 0, 0, 1, 0, 0 } }, { 1, 1.0, { 0, 0, 0, 1, 0, 0 } } };
    for (size_t i = 0; i < sizeof filters / sizeof *filters; i++) {
        double share[6], sum = 0.0;
        for (size_t v = 0; v < 6; v++) sum += share[v] = filters[i].keeps[v] * exp(weight[v] / 0.8);
        for (size_t v = 0; v < 6; v++) share[v] /= sum;
        test_choice(0.8, filters[i].top_k, filters[i].top_p, share);
    }
}

static void test_sampling(dpo_model *model)
{
    const uint32_t prompt[] = { 3, 9, 4 };
    size_t n_new = 25;
    model->config.eos_id = -1;
    dpo_string greedy = argmax_text(model, prompt, 3, &n_new);
    dpo_sampling sampling = { .max_new_tokens = n_new, .temperature = 1.5, .top_k = 1, .top_p = 1 };
    dpo_string one = generate(model, prompt, 3, sampling);
    check(same_text(&one, &greedy), "top-k 1 is not greedy");
    sampling.top_k = 0;
    sampling.max_new_tokens = 25;
    dpo_string first = generate(model, prompt, 3, sampling), second = generate(model, prompt, 3, sampling);
    sampling.seed++;
    dpo_string other = generate(model, prompt, 3, sampling);
    check(same_text(&first, &second) && !same_text(&first, &other), "a seed gives \"%.*s\", then "
          "\"%.*s\"; the next one \"%.*s\"", (int)first.n, first.bytes, (int)second.n, second.bytes,
          (int)other.n, other.bytes);

    // Stop strings out of the text itself: its tokens are single characters.
    sampling.seed--;
    for (size_t from = 0; from + 3 <= first.n; from++)
        for (size_t length = 1; length <= 3; length++) {
            char stop[8], never[8];
            snprintf(stop, sizeof stop, "%.*s", (int)length, first.bytes + from);
            snprintf(never, sizeof never, "%.*s\x01", (int)length, first.bytes + from);
            const char *stops[] = { never, stop };
            sampling.stops = stops;
            sampling.n_stops = 2;
            size_t place = 0;
            while (memcmp(first.bytes + place, stop, length)) place++;
            dpo_string cut = generate(model, prompt, 3, sampling);
            check(cut.n == place && !memcmp(cut.bytes ? cut.bytes : "", first.bytes, place),
                  "stopped at \"%s\": \"%.*s\"", stop, (int)cut.n, cut.bytes);
            dpo_string_free(&context, &cut);
            sampling.n_stops = 1;
            dpo_string uncut = generate(model, prompt, 3, sampling);
            check(same_text(&uncut, &first), "stopped at the beginning of a stop string: \"%.*s\"",
                  (int)uncut.n, uncut.bytes);
            dpo_string_free(&context, &uncut);
        }
    dpo_string *all[] = { &greedy, &one, &first, &second, &other };
    for (size_t i = 0; i < 5; i++) dpo_string_free(&context, all[i]);
}

/* ---- errors -------------------------------------------------------------------------------------------- */

/* Fails with a message that has the words in it, and leaves the model usable. */
static void fails(int failed, const char *words)
{
    check(failed && strstr(context.error, words), "expected a failure with \"%s\": %s", words,
          failed ? context.error : "it succeeded");
}

static void test_errors(dpo_model *model, const check_batch *b)
{
    enum { T = 40 };
    uint32_t tokens[T] = { 1, 2, 3 }, wrong[] = { 1, 2, 47, 3 };
    float logits[3 * 47];
    dpo_score before[MOST], score[MOST];
    double dlogp[MOST] = { 1 }, norm;
    dpo_branch branch = { tokens, 3, 0 };
    dpo_example example = { .prompt = tokens, .n_prompt = 2, .branches = &branch, .n_branches = 1 };
    dpo_batch batch = { &example, 1 };
    dpo_optimizer optimizer;
    check_must(dpo_optimizer_init(model, &optimizer, DPO_ADAMW), &context);
    fails(dpo_grad_norm(model, &norm), "no gradients");
    fails(dpo_optimizer_step(model, &optimizer, 1, 1), "needs gradients");
    fails(dpo_backward(model, &batch, dlogp), "keep");
    check_must(dpo_forward(model, before, &b->batch, 1), &context);
    fails(dpo_backward(model, &b->batch, dlogp), "dpo_model_zero_grad");
    check_must(dpo_model_zero_grad(model), &context);
    fails(dpo_forward(model, score, &(dpo_batch){ &example, 0 }, 0), "no examples");

    branch.tokens = wrong;
    branch.n = 4;
    fails(dpo_forward(model, score, &batch, 0), "example 0, branch 0: token 47");
    branch.tokens = tokens;
    example.prompt = wrong;
    example.n_prompt = 4;
    fails(dpo_forward(model, score, &batch, 0), "prompt token 47");
    fails(dpo_logits(model, logits, wrong, 3), "token 47");
    fails(dpo_logits(model, logits, wrong, 0), "no tokens to begin from");
    example.prompt = tokens;
    branch.n = 0;
    fails(dpo_forward(model, score, &batch, 0), "no token to score");
    branch.n = branch.first_scored = 3;
    fails(dpo_forward(model, score, &batch, 0), "no token to score");
    branch.first_scored = 0;
    example.n_prompt = 0;
    fails(dpo_forward(model, score, &batch, 0), "without a prompt");
    example.n_prompt = 20;
    branch.n = 13;  // 32 rows
    check(!dpo_forward(model, score, &batch, 0), "a context that is just full: %s", context.error);
    branch.n = 14;
    fails(dpo_forward(model, score, &batch, 0), "longer than the model's context");
    dpo_model alibi = check_load(&context, "btlm_alibi_swiglu");
    check(!dpo_forward(&alibi, score, &batch, 0), "ALiBi goes on: %s", context.error);
    dpo_model_free(&alibi);

    dpo_string out = { 0 };
    dpo_sampling sampling = { .max_new_tokens = 3, .top_p = 1 };
    fails(dpo_generate(model, &out, tokens, 0, &sampling, NULL, NULL), "prompt");
    fails(dpo_generate(model, &out, wrong, 3, &sampling, NULL, NULL), "token 47");
    sampling.top_p = 0;
    fails(dpo_generate(model, &out, tokens, 3, &sampling, NULL, NULL), "top_p");
    sampling = (dpo_sampling){ .top_p = 1 };
    fails(dpo_generate(model, &out, tokens, 3, &sampling, NULL, NULL), "new");
    sampling = (dpo_sampling){ .max_new_tokens = 3, .top_p = 1, .temperature = NAN };
    fails(dpo_generate(model, &out, tokens, 3, &sampling, NULL, NULL), "temperature");
    sampling.temperature = 0;
    float *last = model->weights->norm_b->data, kept = *last;
    *last = INFINITY;
    fails(dpo_generate(model, &out, tokens, 3, &sampling, NULL, NULL), "not finite");
    *last = kept;
    fails(dpo_model_save(model, "/nowhere/x.bin", DPO_F16), "DPO_F32 or DPO_BF16");
    dpo_optimizer none_yet = { 0 };
    fails(dpo_state_save(model, &none_yet, "/nowhere/x.bin", 1, "", 0), "dpo_optimizer_init");
    fails(dpo_state_load(model, &none_yet, "/nowhere/x.bin", 1, &out), "dpo_optimizer_init");

    check_must(dpo_forward(model, score, &b->batch, 1), &context);
    check(same_scores(before, score, b->n_branches), "errors changed the scores");
    check_must(dpo_backward(model, &b->batch, dlogp), &context);
    fails(dpo_backward(model, &b->batch, dlogp), "keep"); // it used up what was kept
    check_must(dpo_forward(model, score, &b->batch, 0), &context);
    fails(dpo_backward(model, &b->batch, dlogp), "keep"); // the pass before did, this one did not
    check_must(dpo_forward(model, score, &b->batch, 1) || dpo_logits(model, logits, tokens, 3), &context);
    fails(dpo_backward(model, &b->batch, dlogp), "keep");
    dpo_optimizer_free(model, &optimizer);

    dpo_context none;
    check(dpo_context_init(&none, -1) && strstr(none.error, "-1 threads"), "negative threads");
}

static void test_configs(void)
{
    static const dpo_config good = { .vocab_size = 300, .context_length = 8, .d_model = 16,
                                     .n_layers = 1, .n_heads = 2 };
#define TRY(architecture, change, words) do { \
        dpo_config config = good; \
        dpo_model model; \
        dpo_config_default(&config, architecture); \
        config.change; \
        size_t heap = context.heap_bytes; \
        fails(dpo_model_init(&context, &model, &config, NULL, 1, NULL), words); \
        check(context.heap_bytes == heap, "a failed init leaks"); \
    } while (0)
    TRY(DPO_GPT_NEOX, d_model = 0, "d_model");
    TRY(DPO_GPT_NEOX, d_model = 15, "multiple of n_heads");
    TRY(DPO_GPT_NEOX, n_layers = 0, "n_layers");
    TRY(DPO_GPT_NEOX, n_heads = 0, "n_heads");
    TRY(DPO_GPT_NEOX, d_ff = (size_t)1 << 40, "d_ff");
    TRY(DPO_GPT_NEOX, context_length = 0, "context_length");
    TRY(DPO_GPT_NEOX, vocab_size = 100, "vocab_size");
    TRY(DPO_GPT_NEOX, rotary_dims = 3, "rotary_dims");
    TRY(DPO_GPT_NEOX, rotary_dims = 10, "rotary_dims");
    TRY(DPO_GPT_NEOX, rotary_base = -1, "rotary_base");
    TRY(DPO_GPT_NEOX, position = DPO_ALIBI, "positions");
    TRY(DPO_GPT_NEOX, activation = DPO_SWIGLU, "SwiGLU");
    TRY(DPO_GPT_NEOX, activation = (dpo_activation)7, "activation is 7");
    TRY(DPO_GPT_NEOX, position = (dpo_position)-1, "position is -1");
    TRY(DPO_GPT_NEOX, norm_epsilon = 0, "norm_epsilon");
    TRY(DPO_GPT_NEOX, eos_id = 300, "eos_id");
    TRY(DPO_BTLM, parallel_residual = 1, "parallel");
    TRY(DPO_BTLM, position = DPO_ROTARY, "rotary");
    TRY(DPO_BTLM, embedding_scale = NAN, "embedding_scale");
    TRY(DPO_BTLM, logit_scale = INFINITY, "logit_scale");
    TRY(DPO_BTLM, attention_scale = 0, "attention_scale");
    TRY(DPO_BTLM, alibi_factor = -2, "alibi_factor");
    TRY(DPO_BTLM, mup_width_scale = 0, "mup_width_scale");
#undef TRY
    dpo_config config = good;
    dpo_model model;
    dpo_config_default(&config, DPO_GPT_NEOX);
    fails(dpo_model_init(&context, &model, &config, NULL, 1, &(dpo_model_options){ .dtype = DPO_F16 }),
          "DPO_F32 or DPO_BF16");
}

int main(int argc, char **argv)
{
    const int products_only = check_products_only(argc, argv);
    check_must(dpo_context_init(&context, 1), &context);
    test_half_precision();
    test_crc();
    test_functions();
    test_sums();
    test_random();
    test_products();
    test_rounded_units();
    if (products_only) {
        dpo_context_free(&context);
        return check_done();
    }
    test_optimizer(DPO_ADAMW);
    test_optimizer(DPO_RMSPROP);
    test_grad_norm();
    test_schedule();
    test_metrics();
    test_choices();
    test_configs();
    for (size_t i = 0; i < CHECK_MODELS; i++) {
        const char *name = check_models[i];
        dpo_model model = check_load(&context, name);
        check_batch b = check_make_batch(shapes, EXAMPLES, model.config.vocab_size, 1);
        if (i == 0) {
            test_errors(&model, &b);
            test_micro_batch(&b);
        }
        test_neighbours(&model, &b, name);
        test_sharing(&model, &b, name);
        test_logits(&model, &b, name);
        test_start(&model, &b, name);
        test_save(&model, name);
        test_steps(&model, name);
        test_greedy(&model, name);
        if (i == 0) test_sampling(&model);
        check_free_batch(&b);
        dpo_model_free(&model);
    }
    for (int architecture = DPO_GPT_NEOX; architecture <= DPO_BTLM; architecture++) {
        const char *name = architecture == DPO_BTLM ? "long BTLM" : "long GPT-NeoX";
        dpo_model model = check_make_model(&context, (dpo_architecture)architecture, 40, 2);
        check_batch b = check_make_batch(long_shapes, EXAMPLES, model.config.vocab_size, 1);
        test_neighbours(&model, &b, name);
        test_sharing(&model, &b, name);
        test_save(&model, name);
        check_free_batch(&b);
        dpo_model_free(&model);
        test_threads((dpo_architecture)architecture);
        test_profile((dpo_architecture)architecture);
        for (int trains = 0; trains < 2; trains++)
            test_plan((dpo_architecture)architecture, architecture == DPO_BTLM ? DPO_RMSPROP : DPO_ADAMW,
                      trains);
    }
    dpo_model tokenizer = check_load(&context, "tokenizer");
    test_save(&tokenizer, "tokenizer");
    dpo_model_free(&tokenizer);
    test_save_pieces();
    test_reference_cache();
    check(!rmdir(check_directory), "files are left in %s", check_directory);
    dpo_context_free(&context);
    check(context.heap_bytes == 0, "%zu bytes were not freed", context.heap_bytes);
    return check_done();
}
