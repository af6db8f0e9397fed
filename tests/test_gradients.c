/* Every backward against finite differences of its forward: each layer alone, the losses, and whole
   models tensor by tensor.

   The number that is differentiated is L = sum of u[i] y[i] over a function's outputs y, with random
   u, in fp64. An input x moves in a direction s of random signs, and with
   d(h) = (L(x + h s) - L(x - h s)) / (2h)

       numeric  = (15 d(h) - 6 d(2h) + d(3h)) / 10,     right up to terms of h^6,
       analytic = sum of s[i] dL/dx[i],

   signs included. The error is |numeric - analytic| over the length of dL/dx, which is the size that
   `analytic` has on average: one wrong element of n shows as about 1 / sqrt(n), so one of ten
   thousand as 1e-2. Four directions each, because an error can hide from one.

   Tolerances. Rounding leaves 6e-8 / h for a layer with inputs of about 1: 2e-6 at h = 1/32, times
   the root of how many terms its outputs sum. Models are less smooth, so h is 1/80 of a tensor's
   size, and their outputs go through a hundred roundings. The largest errors seen (printed at the
   end) are 4e-5 and 1e-3; the limits are 1e-4 and 5e-3. The losses are fp64: 1e-8. */
#include "check.h"

#define DIRECTIONS 4
enum { R = 5, C = 70 };     // rows, and columns that do not fit into one block of them

static dpo_context context;
typedef struct limits { double step, tolerance, seen; } limits;
static limits layers = { 1 / 32., 1e-4, 0 }, models = { 1 / 80., 5e-3, 0 };

typedef struct function {
    const char *name;
    double (*value)(const void *arguments);     // runs the forward and returns L
    const void *arguments;
} function;

/* An input, and dL/dx as the backward has it. Of each `period` elements those in [from, to) move. */
typedef struct input {
    const char *name;
    float *x;
    const float *dx;
    size_t n, period, from, to;
} input;

static int direction(const input *in, size_t d, size_t i)
{
    size_t place = in->period ? i % in->period : 0;
    if (in->period && (place < in->from || place >= in->to)) return 0;
    return dpo_random_u64(d, 1, i) & 1 ? 1 : -1;
}

static double difference(const function *f, const input *in, size_t d, const float *x, double h)
{
    double value[2];
    for (int side = 0; side < 2; side++) {
        for (size_t i = 0; i < in->n; i++)
            in->x[i] = (float)(x[i] + (side ? h : -h) * direction(in, d, i));
        value[side] = f->value(f->arguments);
    }
    memcpy(in->x, x, in->n * sizeof *x);
    return (value[1] - value[0]) / (2 * h);
}

static void compare(const function *f, const input *in, limits *limit)
{
    float *x = malloc(in->n * sizeof *x);
    double squares = 0.0, length = 0.0;
    memcpy(x, in->x, in->n * sizeof *x);
    for (size_t i = 0; i < in->n; i++) squares += (double)x[i] * x[i];
    for (size_t i = 0; i < in->n; i++)
        if (direction(in, 0, i)) length += (double)in->dx[i] * in->dx[i];
    length = sqrt(length);
    double h = limit->step * sqrt(squares / (double)in->n);
    for (size_t d = 0; d < DIRECTIONS; d++) {
        double analytic = 0.0;
        for (size_t i = 0; i < in->n; i++) analytic += direction(in, d, i) * (double)in->dx[i];
        double numeric = (15 * difference(f, in, d, x, h) - 6 * difference(f, in, d, x, 2 * h) +
                          difference(f, in, d, x, 3 * h)) / 10;
        double error = fabs(numeric - analytic) / length; // NaN if there is no gradient at all
        check(error < limit->tolerance, "%s: gradient of %s: numeric %.7g, analytic %.7g, off by %.1e",
              f->name, in->name, numeric, analytic, error);
        check_worst(&limit->seen, error);
    }
    free(x);
}

static void compare_layer(const char *name, double (*value)(const void *), const void *arguments,
                          const input *inputs, size_t n)
{
    function f = { name, value, arguments };
    for (size_t i = 0; i < n; i++) compare(&f, &inputs[i], &layers);
}

static double dot(const float *u, const float *y, size_t n)
{
    double sum = 0.0;
    for (size_t i = 0; i < n; i++) sum += (double)u[i] * y[i];
    return sum;
}

/* Backwards either set a gradient, so what was there must not matter, or add to it, so it must
   stay: the former start from NaN, the latter from 1, which is taken off afterwards. */
static void set_all(float *x, size_t n, float value)
{
    for (size_t i = 0; i < n; i++) x[i] = value;
}

static void take_one_off(float *dx, size_t n)
{
    for (size_t i = 0; i < n; i++) dx[i] -= 1.0f;
}

/* ---- layers -------------------------------------------------------------------------------------- */

enum { TOKENS = 6, POSITIONS = 4 };
static const uint32_t token[R] = { 3, 1, 3, 5, 0 }, position[R] = { 0, 1, 2, 0, 1 };

typedef struct embedding { float *y; const float *u; dpo_tensor *E, *P; float scale; } embedding;
static double embedding_value(const void *arguments)
{
    const embedding *a = arguments;
    dpoi_embedding_forward(&context, a->y, token, position, a->E, a->P, a->scale, R, C);
    return dot(a->u, a->y, R * C);
}

static void test_embedding(int learned)
{
    float y[R * C], u[R * C], E[TOKENS * C], dE[TOKENS * C], P[POSITIONS * C], dP[POSITIONS * C];
    dpo_tensor tokens = { .dtype = DPO_F32, .data = E }, positions = { .dtype = DPO_F32, .data = P };
    embedding a = { y, u, &tokens, learned ? &positions : NULL, 1.7f };
    check_fill(u, R * C, 1, 1);
    check_fill(E, TOKENS * C, 1, 2);
    check_fill(P, POSITIONS * C, 1, 3);
    set_all(dE, TOKENS * C, 1);
    set_all(dP, POSITIONS * C, 1);
    dpoi_embedding_backward(&context, dE, learned ? dP : NULL, u, token, position, a.scale, R, C);
    take_one_off(dE, TOKENS * C);
    take_one_off(dP, POSITIONS * C);
    input inputs[] = { { "tokens", E, dE, TOKENS * C, 0, 0, 0 },
                       { "positions", P, dP, POSITIONS * C, 0, 0, 0 } };
    compare_layer("embedding", embedding_value, &a, inputs, learned ? 2 : 1);
}

typedef struct norm { float *y; const float *u, *x, *w, *b; float epsilon; } norm;
static double norm_value(const void *arguments)
{
    const norm *a = arguments;
    float stats[2 * R];
    dpoi_norm_forward(&context, a->y, stats, a->x, a->w, a->b, a->epsilon, R, C);
    return dot(a->u, a->y, R * C);
}

static void test_norm(float epsilon)
{
    float y[R * C], u[R * C], x[R * C], dx[R * C], w[C], dw[C], b[C], db[C], stats[2 * R], dy[R * C];
    norm a = { y, u, x, w, b, epsilon };
    check_fill(u, R * C, 1, 1);
    check_fill(x, R * C, 1, 2);
    check_fill(w, C, 1, 3);
    check_fill(b, C, 1, 4);
    for (size_t i = 0; i < R * C; i++) x[i] += 0.5f;    // a mean that matters
    dpoi_norm_forward(&context, y, stats, x, w, b, epsilon, R, C);
    set_all(dx, R * C, 1);
    set_all(dw, C, 1);
    set_all(db, C, 1);
    memcpy(dy, u, sizeof dy);   // which the backward uses up
    dpoi_norm_backward(&context, dx, dw, db, dy, stats, x, w, R, C);
    take_one_off(dx, R * C);
    take_one_off(dw, C);
    take_one_off(db, C);
    input inputs[] = { { "x", x, dx, R * C, 0, 0, 0 }, { "w", w, dw, C, 0, 0, 0 },
                       { "b", b, db, C, 0, 0, 0 } };
    compare_layer("norm", norm_value, &a, inputs, 3);
}

enum { IN = 300, OUT = 37, LINEAR_ROWS = 17 };  // more than one tile, and rests of tiles
typedef struct linear {
    float *y; const float *u, *x; const dpo_tensor *W, *b; int accumulate;
} linear;
static double linear_value(const void *arguments)
{
    const linear *a = arguments;
    set_all(a->y, LINEAR_ROWS * OUT, a->accumulate ? 0.5f : NAN);
    dpoi_linear_forward(&context, a->y, a->x, a->W, a->b, LINEAR_ROWS, a->accumulate);
    return dot(a->u, a->y, LINEAR_ROWS * OUT);
}

static void test_linear(dpo_layout layout, int accumulate)
{
    static float W[IN * OUT], dW[IN * OUT];
    float y[LINEAR_ROWS * OUT], u[LINEAR_ROWS * OUT], x[LINEAR_ROWS * IN], dx[LINEAR_ROWS * IN];
    float b[OUT], db[OUT];
    size_t conv1d = layout == DPO_CONV1D;
    dpo_tensor weight = { .layout = layout, .dtype = DPO_F32, .grad_dtype = DPO_F32, .n_dims = 2,
                          .n = IN * OUT, .data = W, .grad = dW,
                          .shape = { conv1d ? IN : OUT, conv1d ? OUT : IN } };
    dpo_tensor bias = { .dtype = DPO_F32, .n_dims = 1, .shape = { OUT, 1 }, .n = OUT, .data = b, .grad = db };
    linear a = { y, u, x, &weight, &bias, accumulate };
    check_fill(u, LINEAR_ROWS * OUT, 1, 1);
    check_fill(x, LINEAR_ROWS * IN, 1, 2);
    check_fill(W, IN * OUT, 0.1, 3);
    check_fill(b, OUT, 1, 4);
    set_all(dx, LINEAR_ROWS * IN, accumulate ? 1 : NAN);
    set_all(dW, IN * OUT, 1);
    set_all(db, OUT, 1);
    dpoi_linear_backward(&context, dx, u, x, &weight, &bias, LINEAR_ROWS, accumulate);
    if (accumulate) take_one_off(dx, LINEAR_ROWS * IN);
    take_one_off(dW, IN * OUT);
    take_one_off(db, OUT);
    input inputs[] = { { "x", x, dx, LINEAR_ROWS * IN, 0, 0, 0 },
                       { "W", W, dW, IN * OUT, 0, 0, 0 }, { "b", b, db, OUT, 0, 0, 0 } };
    compare_layer(conv1d ? "linear [in, out]" : "linear [out, in]", linear_value, &a, inputs, 3);
}

/* Attention: one example with a prompt and branches of 5, 67 and no rows, and one without a prompt;
   67, 70 and 130 rows do not fit into one strip of queries. */
enum { HEADS = 3, D = 6, WIDTH = HEADS * D, ROW = 3 * WIDTH, SPANS = 5, ROWS = 272, LONGEST = 137 };
static const dpoi_span spans[SPANS] = {
    { 0, 70, 0, 0 }, { 70, 5, 0, 70 }, { 75, 67, 0, 70 }, { 142, 0, 0, 70 },
    { 142, 130, 142, 0 } };
static const size_t first_span[] = { 0, 4, SPANS };
static const dpoi_heads head_orders[] = { { HEADS, D, 3 * D, D, 2 * D },           // GPT-NeoX
                                          { HEADS, D, D, WIDTH, 2 * WIDTH } };     // BTLM

/* The queries, keys and values of one head, as inputs of their own. */
static input part_of_qkv(const char *name, float *qkv, const float *dqkv, dpoi_heads heads,
                         size_t head, size_t side)
{
    size_t from = head * heads.head_stride + side;
    return (input){ name, qkv, dqkv, ROWS * ROW, ROW, from, from + D };
}

typedef struct rotary {
    float *y; const float *u, *qkv, *table; const uint32_t *position; size_t dims; dpoi_heads heads;
} rotary;
static double rotary_value(const void *arguments)
{
    const rotary *a = arguments;
    memcpy(a->y, a->qkv, ROWS * ROW * sizeof *a->y);
    dpoi_rotary(&context, a->y, a->position, a->table, a->dims, a->heads, 1.0f, ROWS);
    return dot(a->u, a->y, ROWS * ROW);
}

static void test_rotary(dpoi_heads heads, size_t dims)
{
    static float y[ROWS * ROW], u[ROWS * ROW], qkv[ROWS * ROW], dqkv[ROWS * ROW], table[LONGEST * D];
    uint32_t positions[ROWS];
    rotary a = { y, u, qkv, table, positions, dims, heads };
    for (uint32_t r = 0; r < ROWS; r++) positions[r] = r % LONGEST;
    dpoi_rotary_table(table, LONGEST, dims, 100.0f);
    check_fill(u, ROWS * ROW, 1, 1);
    check_fill(qkv, ROWS * ROW, 1, 2);
    memcpy(dqkv, u, sizeof dqkv);
    dpoi_rotary(&context, dqkv, positions, table, dims, heads, -1.0f, ROWS);
    input inputs[] = { part_of_qkv("q", qkv, dqkv, heads, 0, 0),
                       part_of_qkv("k", qkv, dqkv, heads, 1, heads.key),
                       part_of_qkv("v", qkv, dqkv, heads, 2, heads.value) };
    compare_layer("rotary", rotary_value, &a, inputs, 3);
}

typedef struct attention { float *y, *lse; const float *u, *qkv; dpoi_attention of; } attention;
static double attention_value(const void *arguments)
{
    const attention *a = arguments;
    dpoi_attention_forward(&context, a->y, a->lse, a->qkv, &a->of);
    return dot(a->u, a->y, ROWS * WIDTH);
}

static void test_attention(dpoi_heads heads, const float *slopes, const char *name)
{
    static float y[ROWS * WIDTH], u[ROWS * WIDTH], lse[ROWS * HEADS], qkv[ROWS * ROW],
                 dqkv[ROWS * ROW];
    attention a = { y, lse, u, qkv, { .heads = heads, .scale = 0.7f, .slopes = slopes, .spans = spans,
                                      .as = DPO_F32, .first_span = first_span, .n_examples = 2 } };
    check_must(dpoi_context_reserve(&context, dpoi_strip_size(LONGEST), 0), &context);
    check_fill(u, ROWS * WIDTH, 1, 1);
    check_fill(qkv, ROWS * ROW, 1, 2);
    attention_value(&a);
    set_all(dqkv, ROWS * ROW, NAN);
    dpoi_attention_backward(&context, dqkv, u, y, lse, qkv, &a.of);
    input inputs[3 * HEADS];
    for (size_t h = 0; h < HEADS; h++) {
        inputs[3 * h] = part_of_qkv("q", qkv, dqkv, heads, h, 0);
        inputs[3 * h + 1] = part_of_qkv("k", qkv, dqkv, heads, h, heads.key);
        inputs[3 * h + 2] = part_of_qkv("v", qkv, dqkv, heads, h, heads.value);
    }
    compare_layer(name, attention_value, &a, inputs, 3 * HEADS);
}

typedef struct activation { float *y; const float *u, *x, *gate; dpo_activation kind; } activation;
static double activation_value(const void *arguments)
{
    const activation *a = arguments;
    dpoi_activation_forward(&context, a->y, a->x, a->gate, a->kind, R, C);
    return dot(a->u, a->y, R * C);
}

static void test_activation(dpo_activation kind)
{
    float y[R * C], u[R * C], x[R * C], dx[R * C], gate[R * C], dgate[R * C];
    int gated = kind == DPO_SWIGLU;
    activation a = { y, u, x, gated ? gate : NULL, kind };
    check_fill(u, R * C, 1, 1);
    check_fill(x, R * C, 1.5, 2);
    check_fill(gate, R * C, 1.5, 3);
    for (size_t i = 0; i < R * C; i++) // stay off relu's corner
        if (fabsf(x[i]) < 0.2f) x[i] += x[i] > 0 ? 0.2f : -0.2f;
    memcpy(dx, u, sizeof dx);   // in place, as the MLP has it
    dpoi_activation_backward(&context, dx, gated ? dgate : NULL, dx, x, gated ? gate : NULL, kind, R, C);
    input inputs[] = { { "x", x, dx, R * C, 0, 0, 0 }, { "gate", gate, dgate, R * C, 0, 0, 0 } };
    compare_layer(dpoi_activation_names[kind], activation_value, &a, inputs, gated ? 2 : 1);
}

/* The head: several targets a row, and a vocabulary of more than two chunks. */
enum { VOCABULARY = 2 * DPOI_CHUNK + 37, NARROW = 8, SCORED = 5, TARGETS = 9, BRANCHES = 3 };
static const dpoi_target targets[TARGETS] = {
    { 5, 0, 0 }, { DPOI_CHUNK + 3, 1, 0 }, { VOCABULARY - 1, 2, 0 }, { DPOI_CHUNK - 1, 0, 1 },
    { DPOI_CHUNK, 1, 2 }, { 2 * DPOI_CHUNK, 1, 3 }, { 7, 2, 4 }, { 7, 1, 4 }, { 8, 0, 4 } };
static const size_t first_target[SCORED + 1] = { 0, 3, 4, 5, 6, TARGETS };
static const double dlogp[BRANCHES] = { 0.7, -1.3, 0.4 };

typedef struct head {
    const float *h; const dpo_tensor *W; double *log_sum; uint32_t *argmax; float *logits, *mean;
} head;
static double head_value(const void *arguments)
{
    const head *a = arguments;
    float most[SCORED], target_logit[TARGETS];
    dpoi_head_forward(&context, a->log_sum, a->argmax, target_logit, a->mean, a->logits, a->h, a->W,
                      1.6f, targets, first_target, most, SCORED);
    double value = 0.0;
    for (size_t t = 0; t < TARGETS; t++)
        value += dlogp[targets[t].branch] * (target_logit[t] - a->log_sum[targets[t].scored]);
    return value;
}

/* log_sum and argmax against fp64, where exp would overflow too. */
static void check_head(const head *a, double size)
{
    for (size_t s = 0; s < SCORED; s++) {
        double logit[VOCABULARY], most = -INFINITY, sum = 0.0;
        for (size_t v = 0; v < VOCABULARY; v++) {
            logit[v] = 1.6 * dot(a->h + s * NARROW, (const float *)a->W->data + v * NARROW, NARROW);
            most = DPOI_MAX(most, logit[v]);
        }
        for (size_t v = 0; v < VOCABULARY; v++) sum += exp(logit[v] - most);
        check(fabs(a->log_sum[s] - most - log(sum)) < 1e-6 * size && logit[a->argmax[s]] == most,
              "head: row %zu: log-sum %.7g, not %.7g; argmax %u", s, a->log_sum[s], most + log(sum),
              a->argmax[s]);
    }
}

static void test_head(void)
{
    static float W[VOCABULARY * NARROW], dW[VOCABULARY * NARROW], logits[SCORED * DPOI_CHUNK];
    float h[SCORED * NARROW], dh[SCORED * NARROW], frozen[SCORED * NARROW];
    double log_sum[SCORED];
    uint32_t argmax[SCORED];
    dpo_tensor weight = { .layout = DPO_LINEAR, .n_dims = 2, .shape = { VOCABULARY, NARROW },
                          .dtype = DPO_F32, .grad_dtype = DPO_F32, .n = VOCABULARY * NARROW, .data = W,
                          .grad = dW };
    head a = { h, &weight, log_sum, argmax, logits, NULL };
    check_fill(h, SCORED * NARROW, 1, 1);
    check_fill(W, VOCABULARY * NARROW, 1, 2);
    head_value(&a);
    check_head(&a, 10);
    set_all(dh, SCORED * NARROW, NAN);
    set_all(dW, VOCABULARY * NARROW, 1);
    dpoi_head_backward(&context, dh, logits, dlogp, log_sum, h, &weight, 1.6f, targets, first_target,
                       SCORED);
    take_one_off(dW, VOCABULARY * NARROW);
    input inputs[] = { { "h", h, dh, SCORED * NARROW, 0, 0, 0 },
                       { "W", W, dW, VOCABULARY * NARROW, 0, 0, 0 } };
    compare_layer("head", head_value, &a, inputs, 2);
    set_all(frozen, SCORED * NARROW, NAN);
    a.mean = frozen;
    head_value(&a);
    check_head(&a, 10);
    dpoi_head_backward_frozen(&context, frozen, dlogp, &weight, 1.6f, targets, first_target, SCORED);
    a.mean = NULL;
    inputs[0].dx = frozen;
    compare_layer("frozen head", head_value, &a, inputs, 1);
    for (size_t i = 0; i < SCORED * NARROW; i++) h[i] *= 100;
    head_value(&a);
    check_head(&a, 1000);
}

/* ---- losses ------------------------------------------------------------------------------------- */

static void test_losses(void)
{
    static const dpo_loss_options losses[] = {
        { DPO_LOSS_SIGMOID, 0.1, 0.0 }, { DPO_LOSS_SIGMOID, 0.5, 0.2 }, { DPO_LOSS_IPO, 0.3, 0.0 },
        { DPO_LOSS_IPO_SUM, 0.2, 0.0 }, { DPO_LOSS_HINGE, 0.2, 0.0 } };
    const double h = 1e-4;
    for (size_t k = 0; k < sizeof losses / sizeof *losses; k++)
        for (uint64_t i = 0; i < 200; i++) {
            dpo_score scores[2] = { { -40 + 10 * dpoi_random_normal(i, k, 0), 3 + i % 5, 0 },
                                    { -40 + 10 * dpoi_random_normal(i, k, 1), 2 + i % 7, 0 } };
            double reference[2] = { -40 + 10 * dpoi_random_normal(i, k, 2),
                                    -40 + 10 * dpoi_random_normal(i, k, 3) };
            dpo_pair pair = dpo_pair_loss(scores, reference, &losses[k]);
            double z = pair.reward[0] - pair.reward[1];
            check(fabs(pair.reward[0] - losses[k].beta * (scores[0].logp - reference[0])) < 1e-12 &&
                  fabs(pair.reward[1] - losses[k].beta * (scores[1].logp - reference[1])) < 1e-12,
                  "loss %zu, pair %zu: rewards %g and %g", k, (size_t)i, pair.reward[0],
                  pair.reward[1]);
            if (losses[k].kind == DPO_LOSS_HINGE && fabs(z - 1) < 0.01) continue; // its corner
            for (int side = 0; side < 2; side++) {
                dpo_score moved[2][2] = { { scores[0], scores[1] }, { scores[0], scores[1] } };
                moved[0][side].logp -= h;
                moved[1][side].logp += h;
                double numeric = (dpo_pair_loss(moved[1], reference, &losses[k]).loss -
                                  dpo_pair_loss(moved[0], reference, &losses[k]).loss) / (2 * h);
                check(fabs(numeric - pair.dlogp[side]) <= 1e-8 * (1 + fabs(numeric)),
                      "loss %zu, pair %zu: dlogp[%d] is %.10g, numerically %.10g", k, (size_t)i, side,
                      pair.dlogp[side], numeric);
            }
        }
}

/* ---- whole models -------------------------------------------------------------------------------- */

typedef struct pass { dpo_model *model; const check_batch *b; const double *dlogp; } pass;
static double pass_value(const void *arguments)
{
    const pass *a = arguments;
    dpo_score scores[16];
    check_must(dpo_forward(a->model, scores, &a->b->batch, 0), &context);
    double value = 0.0;
    for (size_t i = 0; i < a->b->n_branches; i++) value += a->dlogp[i] * scores[i].logp;
    return value;
}

static void test_model(dpo_model *model, const check_shape *shapes, size_t n, const char *name)
{
    check_batch b = check_make_batch(shapes, n, model->config.vocab_size, 1);
    dpo_score scores[16];
    double coefficients[16];
    for (size_t i = 0; i < b.n_branches; i++) coefficients[i] = dpoi_random_normal(3, 0, i);
    check_must(dpo_model_zero_grad(model) || dpo_forward(model, scores, &b.batch, 1) ||
               dpo_backward(model, &b.batch, coefficients), &context);
    pass a = { model, &b, coefficients };
    function f = { name, pass_value, &a };
    for (size_t i = 0; i < model->n_tensors; i++) {
        const dpo_tensor *tensor = &model->tensors[i];
        input in = { tensor->name, tensor->data, tensor->grad, tensor->n, 0, 0, 0 };
        if (tensor->trainable) compare(&f, &in, &models);
    }
    check_free_batch(&b);
}

/* Makes a fixture smooth enough for finite differences: attention further from a hard choice, and
   units of relu that stay on one side of its corner. */
static void smoothen(dpo_model *model)
{
    for (size_t l = 0; l < model->config.n_layers; l++) {
        const dpoi_block_weights *block = &model->weights->blocks[l];
        float *qkv_w = block->qkv_w->data, *up_w = block->up_w->data, *up_b = block->up_b->data;
        for (size_t i = 0; i < block->qkv_w->n; i++) qkv_w[i] *= 0.5f;
        if (model->config.activation != DPO_RELU) continue;
        for (size_t i = 0; i < block->up_w->n; i++) up_w[i] *= 0.5f;
        for (size_t i = 0; i < block->up_b->n; i++) up_b[i] = i % 2 ? 3.0f : -3.0f;
    }
}

int main(void)
{
    static const float slopes[HEADS] = { 0.5f, 0.03f, 0.2f };
    check_must(dpo_context_init(&context, 1), &context);
    for (int learned = 0; learned < 2; learned++) test_embedding(learned);
    test_norm(1e-5f);
    test_norm(0.5f);
    for (int accumulate = 0; accumulate < 2; accumulate++) {
        test_linear(DPO_LINEAR, accumulate);
        test_linear(DPO_CONV1D, accumulate);
    }
    for (size_t i = 0; i < 2; i++) {
        test_rotary(head_orders[i], 4);
        test_attention(head_orders[i], i ? slopes : NULL, i ? "attention with ALiBi" : "attention");
    }
    for (int kind = DPO_GELU; kind <= DPO_SWIGLU; kind++) test_activation((dpo_activation)kind);
    test_head();
    test_losses();
    for (size_t i = 0; i < CHECK_MODELS; i++) {
        static const check_shape shapes[] = { { 5, 3, 1, 6 }, { 0, 9 }, { 7, 4, 4 } };
        dpo_model model = check_load(&context, check_models[i]);
        smoothen(&model);
        test_model(&model, shapes, 3, check_models[i]);
        dpo_model_free(&model);
    }
    for (int architecture = DPO_GPT_NEOX; architecture <= DPO_BTLM; architecture++) {
        // a prompt, spans and a vocabulary too long for one strip and one chunk
        static const check_shape shapes[] = { { 70, 3, 66, 1 }, { 0, 68 } };
        dpo_model model = check_make_model(&context, (dpo_architecture)architecture, 24, 1);
        test_model(&model, shapes, 2, architecture == DPO_BTLM ? "long BTLM" : "long GPT-NeoX");
        dpo_model_free(&model);
    }
    printf("largest errors: layers %.1e, models %.1e\n", layers.seen, models.seen);
    dpo_context_free(&context);
    check(context.heap_bytes == 0, "%zu bytes were not freed", context.heap_bytes);
    return check_done();
}
