/* The modes in which a model can be held: bf16, with masters or rounded by chance; LoRA; blocks
   computed again in backward; and what is kept of a run, adapters and training states.

   Each mode is held against fp32 training of the same weights, which the other tests hold against
   formulas, finite differences and PyTorch. The models are made here and saved in bf16, so that both
   begin from the same numbers. Where two ways must agree exactly, "the same bits" is literal.

   bf16 has 8 significant bits, so a rounding is off by 2^-9 = 2e-3 at most and by 1e-3 on average; the
   kept activations and the inputs of the products are rounded once each, which turns gradients by
   some 1e-2 radians: a cosine of 1 - 5e-5. The limits leave twenty times that. */
#define DPOI_SERIAL_WORK 0      // small loops are divided among the threads as well
#include "check.h"

enum { EXAMPLES = 6, MOST = 16 };
static const check_shape shapes[EXAMPLES] = { { 40, 3, 1, 20 }, { 0, 30 }, { 7, 9, 4 }, { 1, 2, 1 },
                                              { 0, 2, 25 }, { 20, 20 } };
static const double dlogp[MOST] = { 0.3, -0.2, 0.1, 0.05, 0.4, -0.3, 0.2, -0.1, 0.06, 0.1, 0.2 };
static const char *const architectures[] = { "GPT-NeoX", "BTLM" };

static dpo_context context;

/* Files of random models in bf16, by architecture: wide ones, and small ones for what takes many
   passes; and a wide one that holds the same numbers as fp32. */
static char wide[2][CHECK_PATH_BYTES], small[2][CHECK_PATH_BYTES], wide_f32[2][CHECK_PATH_BYTES];

typedef struct mode {
    const char *name;
    dpo_model_options options;
    dpo_lora lora;
    double turn;                // what 1 - cosine to fp32's gradients may be
} mode;
#define ALL_LINEAR .targets = "all-linear"
#define ADAPTER { .r = 4, .alpha = 8, ALL_LINEAR }
#define DROPPING { .r = 4, .alpha = 8, .dropout = 0.25, ALL_LINEAR }
enum { FULL, MASTERS, CHANCE, RECOMPUTE, MASTERS_RECOMPUTE, LORA, LORA_BF16, LORA_DROP, MODES };
static const mode modes[MODES] = {
    { "fp32", { 0 }, { 0 }, 0 },
    { "bf16", { .dtype = DPO_BF16 }, { 0 }, 1e-3 },
    { "stochastic bf16", { .dtype = DPO_BF16, .stochastic = 1 }, { 0 }, 1e-3 },
    { "recomputing fp32", { .recompute = 1 }, { 0 }, 0 },
    { "recomputing bf16", { .dtype = DPO_BF16, .recompute = 1 }, { 0 }, 1e-3 },
    { "LoRA", { .frozen = 1 }, ADAPTER, 0 },
    { "LoRA on bf16", { .dtype = DPO_BF16, .frozen = 1 }, ADAPTER, 1e-3 },
    { "LoRA with dropout on bf16", { .dtype = DPO_BF16, .frozen = 1, .recompute = 1 }, DROPPING, 0 } };

/* ---- helpers ------------------------------------------------------------------------------------- */

static void make_file(char *path, const char *name, int architecture, size_t d_model, size_t n_layers,
                      size_t n_heads, size_t d_ff)
{
    dpo_config config = { .vocab_size = DPOI_CHUNK + 30, .context_length = 140, .d_model = d_model,
                          .n_layers = n_layers, .n_heads = n_heads, .d_ff = d_ff };
    char full[64];
    dpo_model model;
    dpo_config_default(&config, (dpo_architecture)architecture);
    config.embedding_scale = 6.0;
    config.logit_scale = architecture == DPO_BTLM ? 0.8 : 1.0;
    config.mup_width_scale = architecture == DPO_BTLM ? 0.5 : 1.0;
    check_must(dpo_model_init(&context, &model, &config, NULL, 1, NULL), &context);
    for (size_t i = 0; i < model.n_tensors; i++) {
        dpo_tensor *tensor = &model.tensors[i];
        float *x = tensor->data;
        if (!tensor->trainable) continue;
        size_t in = tensor->n_dims == 1 ? 25 : tensor->layout == DPO_LINEAR ? tensor->shape[1]
                                             : tensor->layout == DPO_CONV1D ? tensor->shape[0] : 36;
        check_fill(x, tensor->n, 1 / sqrt((double)in), i);
        if (tensor->n_dims == 1 && strstr(tensor->name, "weight"))
            for (size_t j = 0; j < tensor->n; j++) x[j] += 1.0f;
    }
    snprintf(full, sizeof full, "%s_%d.bin", name, architecture);
    check_path(path, full);
    check_must(dpo_model_save(&model, path, DPO_BF16), &context);
    dpo_model_free(&model);
}

/* B as well, so that nothing that an adapter multiplies is 0. */
static void fill_adapter(dpo_model *model)
{
    for (size_t i = 0; i < model->n_tensors; i++)
        if (model->tensors[i].trainable && strstr(model->tensors[i].name, "lora_B"))
            check_fill(model->tensors[i].data, model->tensors[i].n, 0.2, 1000 + i);
}

static dpo_model open_model(dpo_context *own, const char *path, const mode *m)
{
    dpo_model model;
    check_must(dpo_model_load(own, &model, path, &m->options), own);
    model.noise_seed = 3;
    if (m->lora.r) {
        check_must(dpo_lora_init(&model, &m->lora, 5), own);
        fill_adapter(&model);
    }
    return model;
}

/* Gradients of all that trains, summed over two micro-batches, as floats, in the order of the optimizer's
   arrays; another model, if there is one, has a pass between each forward and its backward. */
static float *gradients(dpo_model *model, const check_batch *b, dpo_score *scores, dpo_model *other)
{
    float *out = malloc(model->n_trainable * sizeof *out);
    dpo_score ignored[MOST];
    check_must(dpo_model_zero_grad(model), model->context);
    for (size_t e = 0, first = 0; e < EXAMPLES; e += EXAMPLES / 2) {
        dpo_batch part = { b->examples + e, EXAMPLES / 2 };
        check_must(dpo_forward(model, scores + first, &part, 1) ||
                   (other && dpo_forward(other, ignored, &part, 0)) ||
                   dpo_backward(model, &part, dlogp + first), model->context);
        for (size_t i = 0; i < part.n; i++) first += part.examples[i].n_branches;
    }
    for (size_t i = 0; i < model->n_tensors; i++) {
        const dpo_tensor *tensor = &model->tensors[i];
        check(!tensor->grad == !tensor->trainable, "%s has a gradient: %d", tensor->name, !!tensor->grad);
        if (tensor->grad) dpoi_widen(out + tensor->offset, tensor->grad, tensor->grad_dtype, tensor->n);
    }
    return out;
}

static int same_bits(const float *a, const float *b, size_t n) { return !memcmp(a, b, n * sizeof *a); }

/* Direction and length of the gradients of each tensor. */
static void compare_gradients(const dpo_model *model, const float *a, const float *b, double turn,
                              const char *architecture, const char *what)
{
    for (size_t i = 0; i < model->n_tensors; i++) {
        const dpo_tensor *tensor = &model->tensors[i];
        double aa = 0.0, bb = 0.0, ab = 0.0;
        for (size_t j = tensor->offset; tensor->trainable && j < tensor->offset + tensor->n; j++) {
            aa += (double)a[j] * a[j];
            bb += (double)b[j] * b[j];
            ab += (double)a[j] * b[j];
        }
        if (!tensor->trainable) continue;
        check(bb > 0 && ab / sqrt(aa * bb) > 1 - turn && fabs(sqrt(aa / bb) - 1) < 0.02,
              "%s, %s: gradient of %s: 1 - cosine %.1e, length %.4f", architecture, what, tensor->name,
              1 - ab / sqrt(aa * bb), sqrt(aa / bb));
    }
}

static void compare_scores(const dpo_score *a, const dpo_score *b, size_t n, double most,
                           const char *architecture, const char *what)
{
    for (size_t i = 0; i < n; i++)
        check(fabs(a[i].logp - b[i].logp) <= most * (double)a[i].n_scored && a[i].n_scored == b[i].n_scored,
              "%s, %s: logp of branch %zu is %.10g, not %.10g", architecture, what, i, a[i].logp,
              b[i].logp);
}

/* Fails with a message that has the words in it. */
static int fails(int failed, const char *words, const char *what)
{
    return check(failed && strstr(context.error, words), "%s: expected a failure with \"%s\": %s", what,
                 words, failed ? context.error : "it succeeded");
}

/* ---- numbers ------------------------------------------------------------------------------------- */

/* A bf16's value in fp64; one above the largest is where the next would be, so that "nearest" has a
   meaning there too. */
static double bf16_value(uint32_t upper)
{
    double sign = upper & 0x8000 ? -1 : 1, fraction = upper & 0x7f;
    int exponent = upper >> 7 & 0xff;
    return sign * (exponent ? ldexp(128 + fraction, exponent - 134) : ldexp(fraction, -133));
}

static void test_rounding(void)
{
    static const uint32_t lower[] = { 0, 1, 0x7fff, 0x8000, 0x8001, 0xffff };
    size_t wrong = 0;
    for (uint32_t upper = 0; upper < 65536; upper++)
        for (size_t i = 0; i < 6; i++) {
            uint32_t bits = upper << 16 | lower[i], infinite = (upper & 0x7f80) == 0x7f80;
            float x;
            memcpy(&x, &bits, sizeof x);
            uint16_t rounded = dpoi_bf16(x), chance = dpoi_bf16_stochastic(x, 1, upper);
            double down = fabs(bf16_value(upper)), up = fabs(bf16_value(upper + 1)), size = fabs(x);
            int above = infinite ? 0 : size - down > up - size || (size - down == up - size && upper % 2);
            if (isnan(x)) { // stays one, with its sign
                wrong += !isnan(dpoi_bf16_to_float(rounded)) || (rounded ^ upper) >> 15;
                wrong += !isnan(dpoi_bf16_to_float(chance)) || (chance ^ upper) >> 15;
            } else {
                wrong += rounded != upper + (uint32_t)above;
                wrong += chance != upper && (infinite || !lower[i] || chance != upper + 1);
            }
        }
    check(!wrong, "%zu floats of 393216 become a wrong bf16", wrong);
    check(dpoi_bf16(3.4e38f) == 0x7f80 && dpoi_bf16(-3.4e38f) == 0xff80, "too large is infinite");
}

/* How often chance rounds up: a binomial share of N draws leaves p by more than 4.5 standard errors
   once in 150000 times, and the numbers drawn are always the same. */
static void test_chance(void)
{
    enum { N = 40000 };
    static const float base[] = { 1.0f, -0.3f, 1e-20f, 7e8f };
    for (size_t k = 0; k < 4; k++)
        for (uint32_t lower = 0x0fff; lower < 0x10000; lower += 0x2fff) {
            uint32_t bits, upper;
            float x;
            memcpy(&bits, &base[k], sizeof bits);
            bits = (bits & 0xffff0000u) | lower;
            memcpy(&x, &bits, sizeof x);
            upper = bits >> 16;
            double p = lower / 65536.0, ups = 0, error = sqrt(p * (1 - p) / N);
            for (uint64_t i = 0; i < N; i++) ups += dpoi_bf16_stochastic(x, k, i) != upper;
            check(fabs(ups / N - p) < 4.5 * error, "%a is rounded up in %.4f of all draws, not in %.4f", x,
                  ups / N, p);
            double mean = bf16_value(upper) + ups / N * (bf16_value(upper + 1) - bf16_value(upper));
            check(fabs(mean - x) <= 4.5 * error * fabs(bf16_value(upper + 1) - bf16_value(upper)),
                  "%.9g is %.9g on average", x, mean);
        }
    size_t both = 0;
    for (uint64_t i = 0; i < N; i++) // neighbours and keys do not depend on each other
        both += dpoi_bf16_stochastic(1.00390625f, 1, i) == dpoi_bf16_stochastic(1.00390625f, 2, i);
    check(fabs((double)both / N - 0.5) < 4.5 * sqrt(0.25 / N), "two keys agree %zu times", both);
}

/* ---- products ------------------------------------------------------------------------------------ */

/* x[rows, columns] stored one way: [0] by rows, [1] by columns, as floats or bf16. */
static dpoi_matrix store(void *out, const float *x, size_t rows, size_t columns, int across, int half)
{
    for (size_t i = 0; i < rows; i++)
        for (size_t j = 0; j < columns; j++) {
            size_t place = across ? j * rows + i : i * columns + j;
            if (half) ((uint16_t *)out)[place] = dpoi_bf16(x[i * columns + j]);
            else ((float *)out)[place] = x[i * columns + j];
        }
    return (dpoi_matrix){ out, across ? 1 : columns, across ? rows : 1, half ? DPO_BF16 : DPO_F32 };
}

/* All ways of storing the operands, rounded before or in the product, have the bits of the first one,
   which is held against the reference's fp64 sum of the rounded inputs: products of two bf16 are
   exact in fp32, so what differs is the rounding of the sums, 6e-8 times the root of their length at
   most times a few. */
static void test_product(dpo_context *many, size_t m, size_t n, size_t k)
{
    enum { BESIDE = 3 };        // columns of c that are not the product's
    size_t ldc = n + BESIDE, size = m * ldc, i = m / 2, j = n / 2;
    float *a = malloc((m * k + 1) * sizeof *a), *b = malloc((k * n + 1) * sizeof *b);
    float *stored_a = malloc((m * k + 1) * sizeof *a), *stored_b = malloc((k * n + 1) * sizeof *b);
    float *c = malloc(size * sizeof *c), *first = malloc(size * sizeof *c), *start = malloc(size * sizeof *c);
    float *row = malloc(n * sizeof *row), *column = malloc(m * sizeof *column);
    float *biases = malloc(n * sizeof *biases);
    check_fill(biases, n, 1, 4);
    check_fill(a, m * k, 1, 1);
    check_fill(b, k * n, 1, 2);
    check_fill(start, size, 1, 3);
    for (int how = 0; how < 64; how++) {
        const int add = how >> 4 & 1, fp32 = how >> 5, half_a = how & 1, half_b = how >> 1 & 1;
        const dpo_dtype as = fp32 ? DPO_F32 : DPO_BF16;
        const float *bias = (add + fp32 + (int)m) % 2 ? NULL : biases; // all four ways in some size
        if (how == 32) // fp32 products: bf16 in memory is exact, if the numbers are bf16
            for (size_t l = 0; l < m * k + k * n; l++) {
                float *x = l < m * k ? a + l : b + l - m * k;
                *x = dpoi_bf16_to_float(dpoi_bf16(*x));
            }
        dpoi_matrix A = store(stored_a, a, m, k, how >> 2 & 1, half_a);
        dpoi_matrix B = store(stored_b, b, k, n, how >> 3 & 1, half_b);
        memcpy(c, start, size * sizeof *c);
        dpoi_matmul_bias(&context, c, ldc, A, B, bias, m, n, k, add, as);
        if (how % 16 == 0) {
            double worst = 0.0;
            memcpy(first, start, size * sizeof *c);
            dpoi_matmul_reference(first, ldc, A, B, bias, m, n, k, add, as);
            for (size_t l = 0; l < size; l++) check_worst(&worst, fabs((double)c[l] - first[l]));
            worst /= sqrt((double)k + 1);
            check(worst < 2e-6, "product %zu x %zu x %zu as %d, added %d: off by %.1e of a term", m, n, k,
                  (int)as, add, worst);
            memcpy(first, c, size * sizeof *c);
        }
        check(same_bits(c, first, size), "product %zu x %zu x %zu, way %d: other bits", m, n, k, how);
        memcpy(c, start, size * sizeof *c);
        memcpy(row, start + i * ldc, n * sizeof *row);
        for (size_t l = 0; l < m; l++) column[l] = start[l * ldc + j];
        dpoi_matmul_bias(many, c, ldc, A, B, bias, m, n, k, add, as);
        dpoi_matmul_bias(&context, row, n, dpoi_submatrix(A, i, 0), B, bias, 1, n, k, add, as);
        dpoi_matmul_bias(&context, column, 1, A, dpoi_submatrix(B, 0, j), bias ? bias + j : NULL, m, 1, k,
                         add, as);
        int same = same_bits(c, first, size) && same_bits(first + i * ldc, row, n);
        for (size_t l = 0; l < m; l++) same &= same_bits(first + l * ldc + j, column + l, 1);
        check(same, "product %zu x %zu x %zu, way %d: threads, a row or a column alone have other bits",
              m, n, k, how);
    }
    float *all[] = { a, b, stored_a, stored_b, c, first, start, row, column, biases };
    for (size_t l = 0; l < sizeof all / sizeof *all; l++) free(all[l]);
}

static void test_products(void)
{
    static const size_t sizes[][3] = { { 1, 1, 1 }, { 1, 40, 7 }, { 9, 1, 300 }, { 15, 33, 257 },
        { 14, 32, 512 }, { 13, 31, 513 }, { 3, 70, 511 }, { 8, 64, 31 }, { 5, 3, 0 }, { 30, 300, 33 },
        { 1210, 5, 3 }, { 29, 35, 32 }, { 7, 40, 2100 }, { 100, 200, 1100 },
        { 30, 48, 65 } };     // whole tiles half as wide, with 16 lanes
    dpo_context many;
    check_must(dpo_context_init(&many, 3), &many);
    many.block_cols = 3 * DPOI_TILE_COLS; // a small cache's: several strips
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        test_product(&many, sizes[i][0], sizes[i][1], sizes[i][2]);
#ifdef DPOI_AMX
    int allowed = dpoi_amx;
    dpoi_amx = 0;   // and by vectors, as where the kernel does not allow AMX
    for (size_t i = 0; allowed && i < sizeof sizes / sizeof *sizes; i++)
        test_product(&many, sizes[i][0], sizes[i][1], sizes[i][2]);
    dpoi_amx = allowed;
#endif
    dpo_context_free(&many);
}

/* ---- gradients ----------------------------------------------------------------------------------- */

/* Each mode's gradients and scores against those of fp32 without recomputation. */
static void test_gradients(int architecture)
{
    const char *name = architectures[architecture];
    check_batch b = check_make_batch(shapes, EXAMPLES, DPOI_CHUNK + 30, 1);
    float *full = NULL, *lora = NULL, *bf16 = NULL;
    dpo_score full_scores[MOST], lora_scores[MOST], scores[MOST];
    for (int i = 0; i < LORA_DROP; i++) {
        const mode *m = &modes[i];
        dpo_model model = open_model(&context, wide[architecture], m);
        float *grad = gradients(&model, &b, scores, NULL), **against = m->lora.r ? &lora : &full;
        dpo_score *against_scores = m->lora.r ? lora_scores : full_scores;
        if (i == FULL || i == LORA) memcpy(against_scores, scores, sizeof scores);
        else if (!m->turn)
            check(same_bits(grad, *against, model.n_trainable), "%s: %s gradients differ from fp32's", name,
                  m->name);
        else compare_gradients(&model, grad, *against, m->turn, name, m->name);
        // logits are off by 1e-2, and the sum over an answer's tokens grows with their number at most
        compare_scores(scores, against_scores, b.n_branches, m->turn ? 0.02 : 0, name, m->name);
        if (i == MASTERS_RECOMPUTE) compare_gradients(&model, grad, bf16, m->turn, name, "against bf16");
        if (i == FULL || i == LORA) *against = grad;
        else if (i == MASTERS) bf16 = grad;
        else free(grad);
        dpo_model_free(&model);
    }
    free(full);
    free(lora);
    free(bf16);
    check_free_batch(&b);
}

/* Gradients that are rounded by chance, in pieces: the same bits for pieces of any size, other ones for
   the next pass. */
static void test_pieces(int architecture)
{
    check_batch b = check_make_batch(shapes, EXAMPLES, DPOI_CHUNK + 30, 1);
    dpo_score scores[MOST];
    dpo_model model = open_model(&context, wide[architecture], &modes[CHANCE]);
    float *grad[3];
    size_t n = model.n_trainable, floats = 0, differ = 0;
    for (int i = 0; i < 3; i++) {
        grad[i] = malloc(n * sizeof **grad);
        if (i < 2) model.passes = 0;
        check_must(dpo_model_zero_grad(&model) || dpo_forward(&model, scores, &b.batch, 1), &context);
        if (i == 0) floats = context.piece_floats;
        context.piece_floats = i == 1 ? 4000 : floats;  // ten rows or less; the buffer stays
        check_must(dpo_backward(&model, &b.batch, dlogp), &context);
        context.piece_floats = floats;
        for (size_t k = 0; k < model.n_tensors; k++)
            if (model.tensors[k].grad)
                dpoi_widen(grad[i] + model.tensors[k].offset, model.tensors[k].grad,
                           model.tensors[k].grad_dtype, model.tensors[k].n);
    }
    check(same_bits(grad[0], grad[1], n), "%s: smaller pieces have other bits", architectures[architecture]);
    for (size_t i = 0; i < n; i++) differ += grad[0][i] != grad[2][i];
    check(differ > n / 10, "%s: another pass rounds only %zu of %zu otherwise", architectures[architecture],
          differ, n);
    for (int i = 0; i < 3; i++) free(grad[i]);
    dpo_model_free(&model);
    check_free_batch(&b);
}

/* Dropout is drawn again, not stored: recomputed blocks must draw the same, whatever the context did
   between forward and backward. */
static void test_dropout_gradients(int architecture)
{
    const char *name = architectures[architecture];
    check_batch b = check_make_batch(shapes, EXAMPLES, DPOI_CHUNK + 30, 1);
    mode m = { "", { .frozen = 1 }, DROPPING, 0 };
    dpo_score scores[2][MOST];
    dpo_model model = open_model(&context, wide[architecture], &m);
    float *plain = gradients(&model, &b, scores[0], NULL);
    m.options.recompute = 1;
    dpo_model again = open_model(&context, wide[architecture], &m);
    float *grad = gradients(&again, &b, scores[1], NULL);
    check(same_bits(plain, grad, model.n_trainable), "%s: recomputed blocks drop other numbers", name);
    compare_scores(scores[1], scores[0], b.n_branches, 0, name, "recomputing with dropout");
    free(grad);

    again.passes = 0;
    model.noise_seed = 4;
    grad = gradients(&again, &b, scores[1], &model);
    check(same_bits(grad, plain, model.n_trainable), "%s: a pass of another model changes what is dropped",
          name);
    free(grad);
    free(plain);
    check_free_batch(&b);
    dpo_model_free(&model);
    dpo_model_free(&again);
}

/* A frozen file of the right type is used where it lies, and gives the bits of a copy in memory. */
static void test_mapped(int architecture)
{
    const char *name = architectures[architecture];
    const dpo_model_options frozen = { .dtype = DPO_BF16, .frozen = 1 };
    check_batch b = check_make_batch(shapes, EXAMPLES, DPOI_CHUNK + 30, 1);
    dpo_score scores[3][MOST];
    dpo_model models[3];
    check_must(dpo_model_load(&context, &models[0], wide[architecture], &frozen) ||
               dpo_model_load(&context, &models[1], wide_f32[architecture], &frozen) ||
               dpo_model_load(&context, &models[2], wide[architecture], NULL), &context);
    for (size_t i = 0; i < models->n_tensors; i++)
        for (int k = 0; k < 3; k++) {
            const char *data = models[k].tensors[i].data, *map = models[k].file.map;
            int inside = data >= map && data < map + models[k].file.bytes;
            int should = k == 0 || (k == 1 && models[k].tensors[i].shape[1] == 1);
            check(inside == should, "%s: %s of model %d is mapped: %d", name, models->tensors[i].name, k,
                  inside);
        }
    dpo_memory plan;
    dpo_plan_options options = { .model = frozen, .file = &models->file, .n_threads = 1 };
    check_must(dpo_memory_plan(&context, &plan, &models->config, &options), &context);
    check(plan.weights == 0 && plan.mapped == models->file.bytes, "%s: mapped weights are planned to take "
          "%zu bytes", name, plan.weights);
    for (int k = 0; k < 2; k++) {
        check_must(dpo_forward(&models[k], scores[k], &b.batch, 0), &context);
        fails(dpo_model_zero_grad(&models[k]), "frozen", name);
        dpo_optimizer optimizer;    // an adapter comes first
        fails(dpo_optimizer_init(&models[k], &optimizer, DPO_ADAMW), "frozen", name);
    }
    compare_scores(scores[1], scores[0], b.n_branches, 0, name, "a copy in memory");
    for (int k = 0; k < 3; k++) dpo_model_free(&models[k]);
    check_free_batch(&b);
}

/* ---- LoRA ---------------------------------------------------------------------------------------- */

/* Each number is dropped with the probability asked for, and kept enlarged; a binomial share, as in
   test_chance. The same place draws the same again, another pass, layer or place something else. */
static void test_drop(void)
{
    enum { N = 40000 };
    static float x[N], y[N], again[N];
    const dpo_tensor A = { .offset = 0 }, other = { .offset = 1 };
    for (size_t i = 0; i < N; i++) x[i] = 1.0f + (float)i;
    for (double dropout = 0.1; dropout < 1; dropout += 0.4) {
        const float scale = (float)(1 / (1 - dropout));
        double zeros = 0, runs = 0, wrong = 0, error = sqrt(dropout * (1 - dropout) / N);
        context.noise = 1;
        dpoi_drop(&context, y, x, &A, dropout, N, 0);
        for (size_t i = 0; i < N; i++) {
            zeros += y[i] == 0;
            wrong += y[i] != 0 && y[i] != scale * x[i];
            runs += i > 0 && y[i] == 0 && y[i - 1] == 0;
            again[i] = 2.0f;
        }
        check(!wrong && fabs(zeros / N - dropout) < 4.5 * error, "dropout %g: zeroes %.4f, and %g are wrong",
              dropout, zeros / N, wrong);
        check(fabs(runs / N - dropout * dropout) < 4.5 * sqrt(3) * error, "dropout %g: %.4f of pairs",
              dropout, runs / N);
        dpoi_drop(&context, again, x, &A, dropout, N, 1);
        for (size_t i = 0; i < N; i++) wrong += fabsf(again[i] - 2.0f - y[i]) > 1e-6f * y[i] + 1e-6f;
        check(!wrong, "dropout %g: adding gives %g other numbers", dropout, wrong);
        for (int k = 0; k < 2; k++) { // both zero: as often as if independent
            double both = 0;
            context.noise = k ? 1 : 2;
            dpoi_drop(&context, again, x, k ? &other : &A, dropout, N, 0);
            for (size_t i = 0; i < N; i++) both += y[i] == 0 && again[i] == 0;
            check(fabs(both / N - dropout * dropout) < 4.5 * error, "dropout %g: another %s zeroes %.4f of "
                  "the same", dropout, k ? "layer" : "pass", both / N);
        }
    }
}

/* L = sum of dlogp * logp at the passes after `passes`, so that the same numbers are dropped. */
static double value(dpo_model *model, const check_batch *b, uint64_t passes)
{
    dpo_score scores[MOST];
    double sum = 0.0;
    model->passes = passes;
    for (size_t e = 0, first = 0; e < EXAMPLES; e += EXAMPLES / 2) { // as in gradients()
        dpo_batch part = { b->examples + e, EXAMPLES / 2 };
        check_must(dpo_forward(model, scores + first, &part, 1), &context);
        for (size_t i = 0; i < part.n; i++) first += part.examples[i].n_branches;
    }
    for (size_t i = 0; i < b->n_branches; i++) sum += dlogp[i] * scores[i].logp;
    return sum;
}

/* The analytic slope of every trained tensor along random signs against differences, as in
   tests/test_gradients.c, which explains both formula and limit. */
static void check_differences(dpo_model *model, const check_batch *b, const char *name)
{
    dpo_score scores[MOST];
    const uint64_t passes = model->passes;
    float *grad = gradients(model, b, scores, NULL);
    size_t n_tensors = 0, n_directions = strcmp(name, "all-linear") ? 1 : 2;
    for (size_t t = 0; t < model->n_tensors; t++) {
        const dpo_tensor *tensor = &model->tensors[t];
        float *x = tensor->data, *dx = grad + tensor->offset, *before = malloc(tensor->n * sizeof *x);
        double squares = 0.0, length = 0.0;
        n_tensors += tensor->trainable != 0;
        for (size_t i = 0; tensor->trainable && i < tensor->n; i++) {
            before[i] = x[i];
            squares += (double)x[i] * x[i];
            length += (double)dx[i] * dx[i];
        }
        const double h = sqrt(squares / (double)tensor->n) / 80, weights[] = { 1.5, -0.6, 0.1 };
        for (uint64_t d = 0; d < n_directions && tensor->trainable; d++) {
            double analytic = 0.0, numeric = 0.0;
            for (size_t i = 0; i < tensor->n; i++)
                analytic += (dpo_random_u64(d, 1, i) & 1 ? 1 : -1) * (double)dx[i];
            for (int step = -3; step <= 3; step++) {
                if (!step) continue;
                for (size_t i = 0; i < tensor->n; i++)
                    x[i] = (float)(before[i] + step * h * (dpo_random_u64(d, 1, i) & 1 ? 1 : -1));
                numeric += weights[abs(step) - 1] * value(model, b, passes) / (2 * h * step);
            }
            double error = fabs(numeric - analytic) / sqrt(length);
            check(error < 5e-3, "%s: gradient of %s: numeric %.7g, analytic %.7g, off by %.1e", name,
                  tensor->name, numeric, analytic, error);
            memcpy(x, before, tensor->n * sizeof *x);
        }
        free(before);
    }
    check(n_tensors > 0, "%s: nothing trains", name);
    free(grad);
}

/* Which layers a list of targets means, and their gradients. */
static void test_targets(int architecture, const check_batch *b)
{
    static const struct { const char *targets; size_t layers; } cases[2][6] = {
        { { "all-linear", 8 }, { "dense_4h_to_h", 2 }, { "attention.dense,query_key_value", 4 },
          { "gpt_neox.layers.1.mlp.dense_h_to_4h", 1 }, { "dense", 2 }, { "dense_h_to_4h,dense", 4 } },
        { { "all-linear", 10 }, { "c_proj", 4 }, { "mlp.c_proj", 2 }, { "c_fc2", 2 },
          { "transformer.h.0.attn.c_attn", 1 }, { "c_fc,attn.c_proj", 4 } } };
    for (size_t i = 0; i < 6; i++) {
        const size_t r = i == 3 ? 40 : 3; // more than the width, too
        mode m = { "", { .frozen = 1, .recompute = i == 5 }, { .r = r, .alpha = 5, .rslora = i == 1,
                   .dropout = i % 2 ? 0.0 : 0.3 }, 0 };
        snprintf(m.lora.targets, sizeof m.lora.targets, "%s", cases[architecture][i].targets);
        dpo_model model = open_model(&context, small[architecture], &m);
        size_t adapted = 0;
        for (size_t t = 0; t < model.n_tensors; t++) {
            dpo_tensor *W = &model.tensors[t];
            if (!W->lora_a) continue;
            adapted++;
            check(W->lora_a->shape[0] == r && W->lora_b->shape[1] == r &&
                  W->lora_a->shape[1] == dpoi_linear_in(W) && W->lora_b->shape[0] == dpoi_linear_out(W),
                  "shapes over %s", W->name);
        }
        check(adapted == cases[architecture][i].layers, "\"%s\" adapts %zu layers", m.lora.targets, adapted);
        check_differences(&model, b, m.lora.targets);
        dpo_model_free(&model);
    }
}

/* The products of a backward under an adapter of one layer alone: what lies above it passes its gradient
   on, frozen weights get none of their own, and nothing below gets anything. */
static void test_backward_products(int architecture, const check_batch *b)
{
    static const char *const targets[2][2] = {
        { "gpt_neox.layers.0.mlp.dense_h_to_4h", "gpt_neox.layers.1.mlp.dense_h_to_4h" },
        { "transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn" } };
    for (int layer = 0; layer < 2; layer++)
        for (int recompute = 0; recompute < 2; recompute++) {
            mode m = { "", { .frozen = 1, .recompute = recompute }, { .r = 2, .alpha = 4 }, 0 };
            snprintf(m.lora.targets, sizeof m.lora.targets, "%s", targets[architecture][layer]);
            dpo_model model = open_model(&context, small[architecture], &m);
            dpo_score scores[MOST];
            dpo_profile profile = { 0 };
            check_must(dpo_model_zero_grad(&model) || dpo_forward(&model, scores, &b->batch, 1), &context);
            context.profile = &profile;
            check_must(dpo_backward(&model, &b->batch, dlogp), &context);
            context.profile = NULL;
            double rows = 0.0, weights = 0.0, has = profile.flops[DPO_TIME_LINEAR_BACK];
            for (size_t e = 0; e < b->batch.n; e++) rows += (double)dpo_example_rows(&b->examples[e]);
            for (int l = layer; l < 2; l++) {
                const dpoi_block_weights *block = &model.weights->blocks[l];
                weights += (double)block->down_w->n;
                // The MLP comes last in NeoX's parallel block, and after attention in BTLM's.
                if (l > layer || architecture == DPO_BTLM)
                    weights += (double)(block->up_w->n + block->out_w->n);
                if (block->gate_w) weights += (double)block->gate_w->n;
                if (l > layer) weights += (double)block->qkv_w->n;
            }
            check(has == 2 * rows * weights, "%s: a backward of %.0f FLOPs in linear layers, not %.0f",
                  m.lora.targets, has, 2 * rows * weights);
            check((profile.flops[DPO_TIME_ATTENTION_BACK] > 0) == (architecture == DPO_BTLM || !layer),
                  "%s: attention's backward", m.lora.targets);
            dpo_model_free(&model);
        }
}

/* A new adapter changes nothing: B is 0. A lies in +-1/sqrt(in), uniformly: four standard errors. */
static void test_start(int architecture, const check_batch *b)
{
    const char *name = architectures[architecture];
    const mode off = { "", { .frozen = 1 }, { 0 }, 0 }, m = modes[LORA];
    dpo_score scores[2][MOST];
    dpo_model plain = open_model(&context, wide[architecture], &off), model;
    check_must(dpo_model_load(&context, &model, wide[architecture], &m.options) ||
               dpo_lora_init(&model, &m.lora, 1) || dpo_forward(&plain, scores[0], &b->batch, 0) ||
               dpo_forward(&model, scores[1], &b->batch, 1), &context);
    compare_scores(scores[1], scores[0], b->n_branches, 0, name, "a new adapter");
    for (size_t i = plain.n_tensors; i < model.n_tensors; i++) {
        const dpo_tensor *tensor = &model.tensors[i];
        const float *x = tensor->data;
        double limit = 1 / sqrt((double)tensor->shape[1]), mean = 0.0, square = 0.0, n = (double)tensor->n;
        int inside = 1, is_a = strstr(tensor->name, "lora_A") != NULL;
        for (size_t j = 0; j < tensor->n; j++) {
            double u = x[j] / limit;
            inside &= is_a ? fabs(u) <= 1 : x[j] == 0;
            mean += u / n;
            square += u * u / n;
        }
        check(inside && (!is_a || (fabs(mean) < 4 / sqrt(3 * n) &&
                                   fabs(square - 1 / 3.) < 4 * 0.3 / sqrt(n))),
              "%s starts with mean %g, square %g", tensor->name, mean, square);
    }
    dpo_model_free(&plain);
    dpo_model_free(&model);
}

/* The saved model has W + alpha / r B A (or alpha / sqrt(r)), and its scores are the adapter's. Scoring
   without `keep` drops nothing. */
static void test_merge(int architecture, const check_batch *b)
{
    const char *name = architectures[architecture];
    char path[CHECK_PATH_BYTES];
    check_path(path, "merged.bin");
    for (int rslora = 0; rslora < 2; rslora++) {
        mode m = { "", { .frozen = 1 }, DROPPING, 0 };
        dpo_score scores[4][MOST];
        dpo_model model, merged;
        m.lora.rslora = rslora;
        model = open_model(&context, wide[architecture], &m);
        check_must(dpo_forward(&model, scores[0], &b->batch, 0) || dpo_model_save(&model, path, DPO_F32) ||
                   dpo_model_load(&context, &merged, path, NULL) ||
                   dpo_forward(&merged, scores[1], &b->batch, 0) ||
                   dpo_forward(&model, scores[2], &b->batch, 1) ||
                   dpo_forward(&model, scores[3], &b->batch, 0), &context);
        compare_scores(scores[3], scores[0], b->n_branches, 0, name, "scoring after a pass with dropout");
        double drops = 0, scale = 8.0 / (rslora ? 2 : 4);
        for (size_t i = 0; i < b->n_branches; i++) {
            check(fabs(scores[1][i].logp / scores[0][i].logp - 1) < 1e-5, "%s: logp of branch %zu is %.9g, "
                  "merged %.9g", name, i, scores[0][i].logp, scores[1][i].logp);
            drops += fabs(scores[2][i].logp / scores[0][i].logp - 1) > 1e-3;
        }
        check(drops > 5, "%s: dropout changes only %g scores", name, drops);
        for (size_t t = 0; t < merged.n_tensors; t++) {
            const dpo_tensor *W = &model.tensors[t], *tensor = &merged.tensors[t];
            const float *A = W->lora_a ? W->lora_a->data : NULL, *B = A ? W->lora_b->data : NULL;
            double worst = 0.0;
            for (size_t i = 0; i < W->n; i++) {
                double expected = dpoi_weight_at(W, i);
                size_t row = i / W->shape[1], column = i % W->shape[1];
                size_t in = W->layout == DPO_LINEAR ? column : row, out = row + column - in;
                for (size_t r = 0; r < 4 && A; r++)
                    expected += scale * B[out * 4 + r] * A[r * W->lora_a->shape[1] + in];
                check_worst(&worst, fabs(dpoi_weight_at(tensor, i) - expected));
            }
            check(!strcmp(W->name, tensor->name) && worst < (A ? 2e-6 : 1e-30),
                  "%s: merged %s is off by %.1e", name, W->name, worst);
        }
        dpo_model_free(&model);
        dpo_model_free(&merged);
    }
    unlink(path);
}

/* ---- adapter files ------------------------------------------------------------------------------- */

enum { MOST_ENTRIES = 32 };

/* Writes some of an adapter's entries, of which a test may have changed one. */
static void write_adapter(const char *path, const dpo_entry *entries, size_t n)
{
    check_must(dpo_file_write(&context, path, DPO_FILE_ADAPTER, entries, n), &context);
}

static void set_config(dpo_entry *entry, const char *text)
{
    entry->data = text;
    entry->bytes = entry->shape[0] = strlen(text);
}

static void test_adapter_files(int architecture, const check_batch *b)
{
    char saved[CHECK_PATH_BYTES], again[CHECK_PATH_BYTES];
    check_path(saved, "adapter.bin");
    check_path(again, "again.bin");
    mode m = modes[LORA];
    m.lora.rslora = architecture;
    m.lora.dropout = 0.125;
    dpo_model model = open_model(&context, small[architecture], &m), loaded;
    dpo_file first, second;
    dpo_score scores[2][MOST];
    check_must(dpo_lora_save(&model, saved, "base.bin") ||
               dpo_model_load(&context, &loaded, small[architecture], &m.options) ||
               dpo_lora_load(&loaded, saved) || dpo_lora_save(&loaded, again, loaded.lora.base) ||
               dpo_file_open(&context, &first, saved, DPO_FILE_ADAPTER, 1) ||
               dpo_file_open(&context, &second, again, DPO_FILE_ADAPTER, 1), &context);
    check(first.bytes == second.bytes && !memcmp(first.map, second.map, first.bytes),
          "an adapter saved again is another file");
    check(loaded.adapter_identity == first.identity && loaded.lora.r == 4 && loaded.lora.alpha == 8 &&
          loaded.lora.dropout == 0.125 && loaded.lora.rslora == architecture &&
          !strcmp(loaded.lora.base, "base.bin") && loaded.lora.base_identity == loaded.identity,
          "the adapter's numbers do not come back");
    check_must(dpo_forward(&model, scores[0], &b->batch, 0) ||
               dpo_forward(&loaded, scores[1], &b->batch, 0), &context);
    compare_scores(scores[1], scores[0], b->n_branches, 0, architectures[architecture], "a loaded adapter");
    dpo_model_free(&loaded);
    dpo_file_close(&context, &second);

    // Of the last layer alone: nothing below it needs a backward, and gets none.
    dpo_entry entries[MOST_ENTRIES];
    char config[1200];
    size_t n = 0;
    int used = snprintf(config, sizeof config, "{\"r\": 4, \"alpha\": 8, \"dropout\": 0, \"rslora\": false, "
                        "\"base\": \"b\", \"target_modules\": \"");
    for (size_t i = 0; i < first.n_entries; i++) {
        const char *name = first.entries[i].name;
        if (strncmp(name, "base_model.", 11) || strstr(name, ".1.")) entries[n++] = first.entries[i];
        if (strstr(name, ".1.") && strstr(name, "lora_A"))
            used += snprintf(config + used, sizeof config - (size_t)used, "%.*s,",
                             (int)(strstr(name, ".lora_A") - name) - 17, name + 17);
    }
    snprintf(config + used - 1, sizeof config - (size_t)used, "\"}");
    set_config(&entries[0], config);
    write_adapter(again, entries, n);
    check_must(dpo_model_load(&context, &loaded, small[architecture], &m.options) ||
               dpo_lora_load(&loaded, again), &context);
    check_differences(&loaded, b, "the last layer's adapter");
    check(dpoi_lowest_trained(&loaded) == 1, "the lowest trained layer is %zu",
          dpoi_lowest_trained(&loaded));
    dpo_model_free(&loaded);
    dpo_model_free(&model);
    dpo_file_close(&context, &first);
    unlink(saved);
    unlink(again);
}

/* A model that is loaded, gets an adapter that must not fit, and is freed. */
static void refuse(const char *path, const char *file, const char *words)
{
    size_t heap = context.heap_bytes;
    dpo_model model;
    check_must(dpo_model_load(&context, &model, file, &modes[LORA].options), &context);
    if (fails(dpo_lora_load(&model, path), words, "a bad adapter"))
        check(strstr(context.error, path) != NULL, "no path in: %s", context.error);
    size_t parts = model.lora.r + model.n_trainable; // what is left of the bad adapter: nothing
    for (size_t i = 0; i < model.n_tensors; i++)
        parts += model.tensors[i].lora_a || model.tensors[i].lora_b;
    check(parts == 0, "\"%s\" leaves a part of an adapter", words);
    check_must(dpo_lora_init(&model, &(dpo_lora){ .r = 4, .alpha = 8, .targets = "all-linear" }, 1),
               &context);
    dpo_model_free(&model);
    check(context.heap_bytes == heap, "\"%s\" leaks %zu bytes", words, context.heap_bytes - heap);
}

static void test_adapter_errors(void)
{
#define CONFIG(r, alpha, dropout, targets) "{\"r\": " r ", \"alpha\": " alpha ", \"dropout\": " dropout \
        ", \"rslora\": false, \"target_modules\": \"" targets "\", \"base\": \"b\"}"
    static const struct { const char *config, *words; } configs[] = {
        { CONFIG("5", "8", "0", "all-linear"), "lora_A.weight is [4, 32]" },
        { CONFIG("4", "8", "0", "no_such"), "\"no_such\" is no linear layer of this model; it has "
          "attention.query_key_value, attention.dense, mlp.dense_h_to_4h, mlp.dense_4h_to_h" },
        { CONFIG("4", "8", "0", "dense,,dense_4h_to_h"), "\"\" is no linear layer" },
        { CONFIG("4", "8", "0", "dense,4h_to_h"), "\"4h_to_h\" is no linear layer" },
        { CONFIG("4", "8", "0", "dense,all-linear"), "\"all-linear\" is no linear layer" },
        { CONFIG("4", "8", "0", ""), "no target modules" },
        { CONFIG("4", "8", "0", "dense_4h_to_h"), "none of the adapter's target modules" },
        { CONFIG("4", "8", "0", "dense,dense_4h_to_h,"), "\"\" is no linear layer" },
        { CONFIG("0", "8", "0", "all-linear"), "r is 0" },
        { CONFIG("1048577", "8", "0", "all-linear"), "r is 1048577" },
        { CONFIG("2.5", "8", "0", "all-linear"), "r is 2.5" },
        { CONFIG("4", "0", "0", "all-linear"), "alpha 0" },
        { CONFIG("4", "-1", "0", "all-linear"), "alpha -1" },
        { CONFIG("4", "8", "1", "all-linear"), "dropout 1" },
        { CONFIG("4", "8", "-0.5", "all-linear"), "dropout -0.5" },
        { CONFIG("4", "\"8\"", "0", "all-linear"), "alpha is missing or not of its type" },
        { "{\"r\": 4, \"alpha\": 8}", "dropout is missing" }, { "{\"r\": 4", "byte 8" },
        { "[]", "missing" } };
#undef CONFIG
    char saved[CHECK_PATH_BYTES], bad[CHECK_PATH_BYTES];
    check_path(saved, "adapter.bin");
    check_path(bad, "bad.bin");
    dpo_model model = open_model(&context, small[0], &modes[LORA]);
    dpo_file file;
    dpo_lora read;
    check_must(dpo_lora_save(&model, saved, NULL) ||
               dpo_file_open(&context, &file, saved, DPO_FILE_ADAPTER, 1) ||
               dpo_lora_read(&context, &read, &file), &context);
    check(!*read.base, "a base without a path: %s", read.base);
    dpo_file_close(&context, &file);
    check_must(dpo_lora_save(&model, saved, "base.bin") ||
               dpo_file_open(&context, &file, saved, DPO_FILE_ADAPTER, 1), &context);
    size_t n = file.n_entries, bytes = n * sizeof(dpo_entry);
    dpo_entry entries[MOST_ENTRIES];
    memcpy(entries, file.entries, bytes);
    for (size_t i = 0; i < sizeof configs / sizeof *configs; i++) {
        set_config(&entries[0], configs[i].config);
        write_adapter(bad, entries, n);
        refuse(bad, small[0], configs[i].words);
    }
    refuse(saved, small[1], "made for another model");
    refuse(small[0], small[0], "adapter");
    for (int i = 0; i < 8; i++) { // entry 2 is the first A, 3 its B
        float numbers[4 * 96 + 1] = { 0 };
        const char *name = file.entries[2 + i % 2].name, *words[] = { name, name, name, name, name,
            "0.attention.query_key_value.lora_A.weight is missing", "has no config",
            "0.attention.query_key_value.lora_A.weight is missing" };
        size_t from = 0, count = n;
        memcpy(entries, file.entries, bytes);
        if (i == 0) entries[2].layout = DPO_CONV1D;
        if (i == 1) entries[3].shape[0] = 4, entries[3].shape[1] = 96;
        if (i == 2) numbers[7] = NAN, entries[2].data = numbers;
        if (i == 3) numbers[0] = INFINITY, entries[3].data = numbers;
        if (i == 4) entries[2].dtype = DPO_U32;
        if (i == 5) snprintf(entries[2].name, sizeof entries[2].name,
                             "base_model.model.gpt_neox.layers.3.mlp.dense_h_to_4h.lora_A.weight");
        if (i == 6) from = 1;
        if (i == 7) count = 2;
        write_adapter(bad, entries + from, count - from);
        refuse(bad, small[0], words[i]);
    }
    for (size_t k = 2; k < n; k++) { // without one A or B, or without one pair
        const size_t lost = k % 2 || k % 4 ? 1 : 2;
        memcpy(entries, file.entries, bytes);
        memmove(entries + k, entries + k + lost, (n - k - lost) * sizeof *entries);
        write_adapter(bad, entries, n - lost);
        refuse(bad, small[0], file.entries[k].name);
    }

    // What is wrong with the model instead
    dpo_lora lora = modes[LORA].lora;
    dpo_score score[MOST];
    check_batch b = check_make_batch(shapes + 3, 1, 20, 1);
    fails(dpo_lora_load(&model, saved), "has none yet", "loaded twice");
    fails(dpo_lora_init(&model, &lora, 1), "has none yet", "made twice");
    dpo_model_free(&model);
    for (int i = 0; i < 6; i++) {
        const dpo_model_options trained = { 0 };
        size_t heap = context.heap_bytes;
        const char *words[] = { "loaded as frozen", "has not been used", "r is 0", "r is 1048577", "alpha",
                                "dropout" };
        check_must(dpo_model_load(&context, &model, small[0], i ? &modes[LORA].options : &trained),
                   &context);
        check(dpo_lora_save(&model, bad, "") && strstr(context.error, bad), "saved no adapter");
        if (i == 1) check_must(dpo_forward(&model, score, &(dpo_batch){ b.examples, 1 }, 0), &context);
        lora = modes[LORA].lora;
        lora.r = i == 2 ? 0 : i == 3 ? (1 << 20) + 1 : 4;
        if (i == 4) lora.alpha = NAN;
        if (i == 5) lora.dropout = NAN;
        fails(dpo_lora_init(&model, &lora, 1), words[i], "init");
        dpo_model_free(&model);
        check(context.heap_bytes == heap, "\"%s\" leaks", words[i]);
    }
    check_free_batch(&b);
    dpo_file_close(&context, &file);
    unlink(saved);
    unlink(bad);
}

/* ---- updates ------------------------------------------------------------------------------------- */

static void train(dpo_model *model, dpo_optimizer *optimizer, const check_batch *b, int updates)
{
    dpo_score scores[MOST];
    double norm;
    for (int i = 0; i < updates; i++) // in two passes, so that these are counted
        check_must(dpo_model_zero_grad(model) || dpo_forward(model, scores, &b->batch, 1) ||
                   dpo_backward(model, &b->batch, dlogp) || dpo_forward(model, scores, &b->batch, 1) ||
                   dpo_backward(model, &b->batch, dlogp) || dpo_grad_norm(model, &norm) ||
                   dpo_optimizer_step(model, optimizer, 1e-3, dpo_clip_scale(norm, 1.0)),
                   model->context);
}

/* All that training changes, with or without the gradients, one array after another. */
static unsigned char *snapshot(const dpo_model *model, const dpo_optimizer *optimizer, int with_grads,
                               size_t *n_bytes)
{
    const uint64_t counters[] = { optimizer->step, model->passes };
    size_t floats = model->n_trainable * sizeof(float), n = 0;
    unsigned char *out = malloc(6 * floats + sizeof counters);
#define ADD(from, bytes) (memcpy(out + n, from, bytes), n += (bytes))
    for (size_t i = 0; i < model->n_tensors; i++) {
        const dpo_tensor *tensor = &model->tensors[i];
        if (!tensor->trainable) continue;
        ADD(tensor->data, tensor->n * dpoi_dtype_bytes(tensor->dtype));
        if (tensor->master) ADD(tensor->master, tensor->n * sizeof(float));
    }
    ADD(optimizer->v, floats);
    if (optimizer->m) ADD(optimizer->m, floats);
    if (with_grads) ADD(model->grads, model->grad_bytes);
    ADD(counters, sizeof counters);
#undef ADD
    *n_bytes = n;
    return out;
}

/* bf16 gradients of an odd number stand before fp32 ones, which have to lie where floats may. */
static void test_odd_sizes(int architecture)
{
    char path[CHECK_PATH_BYTES];
    make_file(path, "odd", architecture, 33, 2, 3, 101);
    dpo_model model = open_model(&context, path, &modes[CHANCE]);
    dpo_optimizer optimizer;
    check_batch b = check_make_batch(shapes, EXAMPLES, model.config.vocab_size, 3);
    check_must(dpo_optimizer_init(&model, &optimizer, DPO_ADAMW), &context);
    train(&model, &optimizer, &b, 1);
    size_t odd = 0;
    for (size_t i = 0; i < model.n_tensors; i++) {
        const dpo_tensor *tensor = &model.tensors[i];
        odd += tensor->grad_dtype == DPO_BF16 && tensor->n % 2;
        check(tensor->grad_dtype == DPO_BF16 || (uintptr_t)tensor->grad % sizeof(float) == 0,
              "%s, %s: its gradient lies at %p", architectures[architecture], tensor->name, tensor->grad);
    }
    check(odd > 0, "no tensor has an odd number of elements");
    dpo_optimizer_free(&model, &optimizer);
    check_free_batch(&b);
    dpo_model_free(&model);
    unlink(path);
}

static void test_threads(int architecture)
{
#ifdef _OPENMP
    const int most = 3;
#else
    const int most = 1;
#endif
    static const int tried[] = { MASTERS, CHANCE, LORA_DROP };
    check_batch b = check_make_batch(shapes, EXAMPLES, DPOI_CHUNK + 30, 1);
    for (size_t i = 0; i < 3; i++) {
        unsigned char *one = NULL;
        for (int threads = 1; threads <= most; threads++) {
            dpo_context own;
            dpo_optimizer adam;
            size_t n;
            check_must(dpo_context_init(&own, threads), &own);
            dpo_model model = open_model(&own, small[architecture], &modes[tried[i]]);
            check_must(dpo_optimizer_init(&model, &adam, DPO_ADAMW), &own);
            train(&model, &adam, &b, 2);
            unsigned char *out = snapshot(&model, &adam, 1, &n);
            if (one)
                check(!memcmp(out, one, n), "%s, %s: %d threads give other bits", architectures[architecture],
                      modes[tried[i]].name, threads);
            if (one) free(out);
            else one = out;
            dpo_optimizer_free(&model, &adam);
            dpo_model_free(&model);
            dpo_context_free(&own);
            check(own.heap_bytes == 0, "%zu bytes were not freed", own.heap_bytes);
        }
        free(one);
    }
    check_free_batch(&b);
}

/* bf16 weights near 0.1 lie 2^-11 = 5e-4 apart. 200 updates by 1e-5 in one direction, which rounding to
   nearest would each undo, move them by 2e-3 on average if chance rounds: each update's rounding has a
   deviation of at most half that distance, so the mean over n weights one of sqrt(200 / n) / 2 of it. */
static void test_tiny_updates(void)
{
    enum { UPDATES = 200 };
    const double lr = 1e-5;
    dpo_model model = open_model(&context, small[0], &modes[CHANCE]);
    dpo_optimizer adam;
    check_must(dpo_optimizer_init(&model, &adam, DPO_ADAMW) || dpo_model_zero_grad(&model), &context);
    for (size_t i = 0; i < model.n_tensors; i++) {
        dpo_tensor *tensor = &model.tensors[i];
        if (tensor->dtype != DPO_BF16) continue;
        for (size_t j = 0; j < tensor->n; j++) {
            ((uint16_t *)tensor->data)[j] = dpoi_bf16(0.1f);
            if (tensor->grad_dtype == DPO_BF16) ((uint16_t *)tensor->grad)[j] = dpoi_bf16(1.0f);
            else ((float *)tensor->grad)[j] = 1.0f;
        }
    }
    const float start = dpoi_bf16_to_float(dpoi_bf16(0.1f));
    check(dpoi_bf16((float)(start - lr)) == dpoi_bf16(0.1f), "nearest would move");
    for (int i = 0; i < UPDATES; i++) check_must(dpo_optimizer_step(&model, &adam, lr, 1), &context);
    for (size_t i = 0; i < model.n_tensors; i++) {
        const dpo_tensor *tensor = &model.tensors[i];
        double moved = 0.0, squares = 0.0, n = (double)tensor->n;
        if (tensor->dtype != DPO_BF16) continue;
        for (size_t j = 0; j < tensor->n; j++) {
            double by = start - dpoi_weight_at(tensor, j);
            moved += by / n;
            squares += by * by / n;
        }
        check(fabs(moved - UPDATES * lr) < 4.5 * sqrt(UPDATES / n) / 2 * 0x1p-11,
              "%s moved by %.3e on average", tensor->name, moved);
        check(squares - moved * moved > 1e-8, "%s moved all as one", tensor->name);
    }
    dpo_optimizer_free(&model, &adam);
    dpo_model_free(&model);
}

/* ---- states -------------------------------------------------------------------------------------- */

/* Six updates, and three, a file, a new model, and three: the same bits. */
static void test_state(int architecture, int which)
{
    const mode *m = &modes[which];
    char path[CHECK_PATH_BYTES];
    check_path(path, "state.bin");
    check_batch b = check_make_batch(shapes, EXAMPLES, DPOI_CHUNK + 30, 1);
    dpo_model straight = open_model(&context, small[architecture], m), resumed;
    dpo_optimizer adam, other;
    dpo_string notes = { 0 };
    size_t n;
    check_must(dpo_optimizer_init(&straight, &adam, DPO_ADAMW), &context);
    for (int trained = 0; trained < 2; trained++) { // a bf16 weight is its master's rounding
        size_t differ = 0;
        if (trained) train(&straight, &adam, &b, 3);
        for (size_t i = 0; i < straight.n_tensors; i++) {
            const dpo_tensor *tensor = &straight.tensors[i];
            for (size_t j = 0; tensor->master && j < tensor->n; j++)
                differ += ((uint16_t *)tensor->data)[j] != dpoi_bf16(tensor->master[j]);
        }
        check(!differ, "%s, trained %d: %zu weights are not their masters", m->name, trained, differ);
    }
    check_must(dpo_state_save(&straight, &adam, path, 77, "noted", 5), &context);
    train(&straight, &adam, &b, 3);

    resumed = open_model(&context, small[architecture], m);
    check_must(dpo_optimizer_init(&resumed, &other, DPO_ADAMW), &context);
    unsigned char *before = snapshot(&resumed, &other, 0, &n), *unchanged;
    fails(dpo_state_load(&resumed, &other, path, 78, &notes), "another run", m->name);
    unchanged = snapshot(&resumed, &other, 0, &n);
    check(!memcmp(before, unchanged, n) && !notes.n, "%s: another run's state changed something", m->name);
    free(before);
    free(unchanged);
    check_must(dpo_state_load(&resumed, &other, path, 77, &notes), &context);
    check(notes.n == 5 && !memcmp(notes.bytes, "noted", 5), "%s: other notes", m->name);
    train(&resumed, &other, &b, 3);
    unsigned char *a = snapshot(&straight, &adam, 1, &n), *c = snapshot(&resumed, &other, 1, &n);
    check(!memcmp(a, c, n), "%s, %s: a resumed run has other bits", architectures[architecture], m->name);
    free(a);
    free(c);
    dpo_string_free(&context, &notes);
    dpo_optimizer_free(&straight, &adam);
    dpo_optimizer_free(&resumed, &other);
    dpo_model_free(&straight);
    dpo_model_free(&resumed);
    check_free_batch(&b);
    unlink(path);
}

/* A state whose entry has another type of the same size, and one with an entry too many. */
static void test_state_entries(const char *path)
{
    dpo_model model = open_model(&context, small[0], &modes[FULL]);
    dpo_optimizer optimizer;
    dpo_string notes = { 0 };
    dpo_file file;
    check_must(dpo_optimizer_init(&model, &optimizer, DPO_ADAMW) ||
               dpo_state_save(&model, &optimizer, path, 1, "", 0) ||
               dpo_file_open(&context, &file, path, DPO_FILE_STATE, 1), &context);
    for (size_t i = 0; i < file.n_entries; i++)
        if (!strcmp(file.entries[i].name, "optimizer/v")) file.entries[i].dtype = DPO_U32;
    check_must(dpo_file_write(&context, path, DPO_FILE_STATE, file.entries, file.n_entries), &context);
    fails(dpo_state_load(&model, &optimizer, path, 1, &notes), "optimizer/v", "a state of whole numbers");
    dpo_file_close(&context, &file);
    check_must(dpo_state_save(&model, &optimizer, path, 1, "", 0) ||
               dpo_file_open(&context, &file, path, DPO_FILE_STATE, 1), &context);
    dpo_entry *entries = malloc((file.n_entries + 1) * sizeof *entries);
    memcpy(entries, file.entries, file.n_entries * sizeof *entries);
    entries[file.n_entries] = dpoi_vector("surplus", DPO_U8, "", 1);
    check_must(dpo_file_write(&context, path, DPO_FILE_STATE, entries, file.n_entries + 1), &context);
    fails(dpo_state_load(&model, &optimizer, path, 1, &notes), "surplus stands where the end",
          "a state with an entry too many");
    free(entries);
    dpo_string_free(&context, &notes);
    dpo_file_close(&context, &file);
    dpo_optimizer_free(&model, &optimizer);
    dpo_model_free(&model);
}

/* A state of a run with other options, under the same number: refused by the name of the entry. */
static void test_state_errors(void)
{
    mode wider = modes[LORA], fewer = modes[LORA];
    wider.lora.r = 5;
    snprintf(fewer.lora.targets, sizeof fewer.lora.targets, "dense");
    const struct { const mode *from, *to; dpo_optimizer_kind kind, to_kind; const char *words; } cases[] = {
        { &modes[FULL], &modes[FULL], DPO_RMSPROP, DPO_ADAMW, "optimizer/m" },
        { &modes[FULL], &modes[FULL], DPO_ADAMW, DPO_RMSPROP, "optimizer/m" },
        { &modes[FULL], &modes[CHANCE], DPO_ADAMW, DPO_ADAMW, "gpt_neox.embed_in.weight" },
        { &modes[CHANCE], &modes[MASTERS], DPO_ADAMW, DPO_ADAMW, "gpt_neox.embed_in.weight" },
        { &modes[LORA], &wider, DPO_ADAMW, DPO_ADAMW, "0.attention.query_key_value.lora_A.weight" },
        { &modes[LORA], &fewer, DPO_ADAMW, DPO_ADAMW, "0.attention.query_key_value.lora_A.weight" },
        { &fewer, &modes[LORA], DPO_ADAMW, DPO_ADAMW, "0.attention.query_key_value.lora_A.weight" },
        { &modes[LORA], &modes[FULL], DPO_ADAMW, DPO_ADAMW, "gpt_neox.embed_in.weight" } };
    char path[CHECK_PATH_BYTES];
    check_path(path, "state.bin");
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        dpo_model from = open_model(&context, small[0], cases[i].from);
        dpo_model to = open_model(&context, small[0], cases[i].to);
        dpo_optimizer optimizer, to_optimizer;
        dpo_string notes = { 0 };
        size_t n;
        check_must(dpo_optimizer_init(&from, &optimizer, cases[i].kind) ||
                   dpo_optimizer_init(&to, &to_optimizer, cases[i].to_kind), &context);
        optimizer.step = from.passes = 9;
        check_fill(optimizer.v, from.n_trainable, 1, 1);
        check_must(dpo_state_save(&from, &optimizer, path, 1, "", 0), &context);
        unsigned char *before = snapshot(&to, &to_optimizer, 0, &n);
        if (fails(dpo_state_load(&to, &to_optimizer, path, 1, &notes), cases[i].words, cases[i].to->name))
            check(strstr(context.error, path) != NULL, "no path in: %s", context.error);
        unsigned char *after = snapshot(&to, &to_optimizer, 0, &n);
        check(!memcmp(before, after, n), "case %zu: a refused state changed something", i);
        free(before);
        free(after);
        dpo_optimizer_free(&from, &optimizer);
        dpo_optimizer_free(&to, &to_optimizer);
        dpo_model_free(&from);
        dpo_model_free(&to);
    }
    test_state_entries(path);
    unlink(path);
}

/* ---- memory -------------------------------------------------------------------------------------- */

static void test_plan(int architecture, const mode *m, dpo_optimizer_kind kind)
{
    char path[CHECK_PATH_BYTES];
    check_path(path, "state.bin");
    dpo_context own;
    check_must(dpo_context_init(&own, 1), &own);
    dpo_model model = open_model(&own, wide[architecture], m);
    check_batch b = check_make_batch(shapes, EXAMPLES, model.config.vocab_size, 3);
    dpo_plan_options options = { .model = m->options, .file = &model.file, .lora = m->lora, .train = 1,
                                 .optimizer = kind, .n_threads = own.n_threads };
    dpo_plan_passes(&options, b.examples, EXAMPLES, SIZE_MAX, 1);
    dpo_memory plan;
    dpo_optimizer optimizer;
    struct stat info;
    size_t trainable = model.n_trainable, n_params = model.n_params;
    check_must(dpo_optimizer_init(&model, &optimizer, kind), &own);
    train(&model, &optimizer, &b, 1);
    size_t peak = own.heap_peak;
    check_must(dpo_memory_plan(&own, &plan, &model.config, &options) ||
               dpo_state_save(&model, &optimizer, path, 1, "", 0) || stat(path, &info), &own);
    check(fabs((double)peak / (double)plan.heap - 1) < 0.02, "%s, %s: planned %zu bytes, took %zu",
          architectures[architecture], m->name, plan.heap, peak);
    double table = (double)info.st_size - (double)plan.state_file; // what says what is where
    check(table >= 0 && table < 300 * (double)model.n_tensors + 1000, "%s, %s: planned a state of %zu "
          "bytes, not %zu", architectures[architecture], m->name, plan.state_file, (size_t)info.st_size);
    check(plan.total == plan.heap + plan.mapped && plan.trainable == trainable && plan.params == n_params &&
          plan.gradients == model.grad_bytes && plan.mapped <= model.file.bytes &&
          (plan.mapped == model.file.bytes) == m->options.frozen, "%s, %s: the plan's numbers",
          architectures[architecture], m->name);
    dpo_optimizer_free(&model, &optimizer);
    check_free_batch(&b);
    dpo_model_free(&model);
    dpo_context_free(&own);
    unlink(path);
}

/* What one more layer keeps for the backward, by the list in the design: input, q, k, v, attention's
   output and its log-sums, pre-activation; BTLM also the middle of its block and the gate. Half of it
   in bf16, but for the log-sums; with recomputation the input alone. */
static void test_kept(dpo_architecture architecture)
{
    enum { ROWS = 100, C = 64, H = 4, F = 256 };
    const size_t width = architecture == DPO_BTLM ? 6 * C + 2 * F : 5 * C + F;
    for (int m = 0; m < 4; m++) {
        const int half = m & 1, recompute = m >> 1;
        dpo_memory plans[2];
        for (size_t layers = 0; layers < 2; layers++) {
            dpo_config config = { .vocab_size = 300, .context_length = 128, .d_model = C,
                                  .n_layers = 4 + layers, .n_heads = H, .d_ff = F };
            dpo_plan_options options = { .train = 1, .max_rows = ROWS, .kept_rows = ROWS,
                .max_scored = ROWS, .max_span = ROWS, .n_threads = 1,
                .model = { .dtype = half ? DPO_BF16 : DPO_F32, .recompute = recompute } };
            dpo_config_default(&config, architecture);
            check_must(dpo_memory_plan(&context, &plans[layers], &config, &options), &context);
        }
        size_t more = plans[1].activations - plans[0].activations;
        size_t expected = ROWS * (recompute ? C * (half ? 2 : 4) : width * (half ? 2 : 4) + 4 * H);
        check(more == expected, "%s, %s%s: a layer keeps %zu bytes, not %zu", architectures[architecture],
              half ? "bf16" : "fp32", recompute ? ", recomputing" : "", more, expected);
    }
}

/* ---- generation ---------------------------------------------------------------------------------- */

/* Greedy text is the argmax of dpo_logits, up to where two logits are so close that the steps' other
   rounding could swap them: in fp32 a millionth of the largest; in bf16 steps do not round their inputs
   as the batch path does, so logits differ by a hundredth. */
static void test_generation(const char *fixture, const mode *m)
{
    enum { NEW = 12 };
    char path[256];
    snprintf(path, sizeof path, "tests/fixtures/%s.model.bin", fixture);
    dpo_model model = open_model(&context, path, m);
    size_t V = model.config.vocab_size, compared = 0;
    float *logits = malloc(32 * V * sizeof *logits);
    const double clear = m->options.dtype == DPO_BF16 ? 0.02 : 1e-4;
    model.config.eos_id = -1;
    for (uint64_t trial = 0; trial < 12; trial++) {
        uint32_t tokens[32];
        size_t n_prompt = 1 + trial, n = n_prompt, n_new = 0;
        dpo_string expected = { 0 }, text = { 0 };
        for (size_t i = 0; i < n; i++) tokens[i] = (uint32_t)(dpo_random_u64(trial, 3, i) % V);
        for (; n_new < NEW; n_new++) {
            check_must(dpo_logits(&model, logits, tokens, n), &context);
            const float *row = logits + (n - 1) * V;
            size_t best = row[0] < row[1], second = !best;
            double size = 0.0;
            for (size_t v = 0; v < V; v++) {
                check_worst(&size, fabs(row[v]));
                if (v < 2) continue;
                if (row[v] > row[best]) second = best, best = v;
                else if (row[v] > row[second]) second = v;
            }
            if (row[best] - row[second] < clear * size) break;
            tokens[n++] = (uint32_t)best;
        }
        compared += n_new;
        if (!n_new) continue;
        const dpo_sampling sampling = { .max_new_tokens = n_new, .top_p = 1 };
        check_must(dpo_generate(&model, &text, tokens, n_prompt, &sampling, NULL, NULL) ||
                   dpo_tokenizer_decode(&context, &expected, &model.tokenizer, tokens + n_prompt, n_new),
                   &context);
        check(text.n == expected.n && !memcmp(text.bytes, expected.bytes, text.n), "%s, %s: \"%.*s\", not "
              "\"%.*s\"", fixture, m->name, (int)text.n, text.bytes, (int)expected.n, expected.bytes);
        dpo_string_free(&context, &text);
        dpo_string_free(&context, &expected);
    }
    check(compared > 60, "%s, %s: only %zu tokens to compare", fixture, m->name, compared);
    free(logits);
    dpo_model_free(&model);
}

int main(int argc, char **argv)
{
    const int products_only = check_products_only(argc, argv);
    check_must(dpo_context_init(&context, 1), &context);
    test_rounding();
    test_chance();
    test_products();
    if (products_only) {
        dpo_context_free(&context);
        return check_done();
    }
    test_drop();
    for (int a = DPO_GPT_NEOX; a <= DPO_BTLM; a++) {
        dpo_model model;
        check_batch b = check_make_batch(shapes, EXAMPLES, DPOI_CHUNK + 30, 1);
        make_file(wide[a], "wide", a, 128, 3, 4, 0);
        make_file(small[a], "small", a, 32, 2, 2, 0);
        snprintf(wide_f32[a], sizeof wide_f32[a], "%.200s.f32", wide[a]);
        check_must(dpo_model_load(&context, &model, wide[a], NULL) ||
                   dpo_model_save(&model, wide_f32[a], DPO_F32), &context);
        dpo_model_free(&model);
        test_gradients(a);
        test_pieces(a);
        test_dropout_gradients(a);
        test_mapped(a);
        test_start(a, &b);
        test_merge(a, &b);
        test_backward_products(a, &b);
        test_adapter_files(a, &b);
        test_odd_sizes(a);
        test_threads(a);
        test_kept(a);
        static const int resumed[] = { FULL, MASTERS, CHANCE, LORA_DROP };
        for (int i = 0; i < 4; i++) test_state(a, resumed[i]);
        check_free_batch(&b);
    }
    test_adapter_errors();
    test_state_errors();
    test_tiny_updates();
    static const char *const fixtures[] = { "neox_parallel", "btlm_alibi_swiglu", "btlm_learned_gelu" };
    for (size_t i = 0; i < 3; i++) {
        test_generation(fixtures[i], &modes[MASTERS]);
        test_generation(fixtures[i], &modes[LORA]);
        test_generation(fixtures[i], &modes[LORA_DROP]);
    }
    for (int a = DPO_GPT_NEOX; a <= DPO_BTLM; a++) { // what takes longest last, for tests/mutate.py
        check_batch b = check_make_batch(shapes, EXAMPLES, DPOI_CHUNK + 30, 1);
        test_targets(a, &b);
        check_free_batch(&b);
        for (int i = 0; i < MODES; i++) test_plan(a, &modes[i], i % 3 ? DPO_ADAMW : DPO_RMSPROP);
        mode high = modes[LORA]; // a rank beyond the widths
        high.lora.r = 150;
        test_plan(a, &high, DPO_ADAMW);
        unlink(wide[a]);
        unlink(small[a]);
        unlink(wide_f32[a]);
    }
    check(!rmdir(check_directory), "files are left in %s", check_directory);
    dpo_context_free(&context);
    check(context.heap_bytes == 0, "%zu bytes were not freed", context.heap_bytes);
    return check_done();
}
