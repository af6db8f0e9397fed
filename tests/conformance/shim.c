/* dpo.h for Python's ctypes (library.py): a handle with one model, one batch and one data set, and
   flat arrays. The functions that return int return dpo.h's codes; shim_error has the reason. */
#define DPO_IMPLEMENTATION
#include "../../dpo.h"

typedef struct shim {
    dpo_context context;
    dpo_model model;
    dpo_optimizer optimizer;
    dpo_data data;
    dpo_tokens encoded;
    dpo_example *examples;
    dpo_branch *branches;
    uint32_t *tokens;
    dpo_score *scores;          // [n_branches] of the last forward
    dpo_batch batch;
    size_t n_branches;
} shim;

shim *shim_new(int n_threads)
{
    shim *s = calloc(1, sizeof *s);
    if (s && dpo_context_init(&s->context, n_threads)) {
        free(s);
        return NULL;
    }
    return s;
}

const char *shim_error(const shim *s) { return s->context.error; }

static void drop_batch(shim *s)
{
    free(s->examples);
    free(s->branches);
    free(s->tokens);
    free(s->scores);
}

void shim_free(shim *s)
{
    drop_batch(s);
    dpo_tokens_free(&s->context, &s->encoded);
    dpo_data_free(&s->context, &s->data);
    if (s->model.context) {
        dpo_optimizer_free(&s->model, &s->optimizer);
        dpo_model_free(&s->model);
    }
    dpo_context_free(&s->context);
    free(s);
}

/* ---- the model ------------------------------------------------------------------------------- */

/* With an adapter (NULL: none) the model is frozen. */
int shim_load(shim *s, const char *path, const char *adapter, size_t dtype)
{
    dpo_model_options options = { .dtype = (dpo_dtype)dtype, .frozen = adapter != NULL };
    return dpo_model_load(&s->context, &s->model, path, &options) ||
           (adapter && dpo_lora_load(&s->model, adapter));
}

int shim_save(shim *s, const char *path) { return dpo_model_save(&s->model, path, DPO_F32); }
size_t shim_vocab_size(const shim *s) { return s->model.config.vocab_size; }
size_t shim_n_tensors(const shim *s) { return s->model.n_tensors; }

/* Returns the number of dimensions. *place is the tensor or, with `grad`, its gradient: NULL where
   there is none (yet). */
size_t shim_tensor(const shim *s, size_t i, int grad, const char **name, size_t *shape /* [2] */,
                   void **place, dpo_dtype *dtype)
{
    const dpo_tensor *tensor = &s->model.tensors[i];
    *name = tensor->name;
    shape[0] = tensor->shape[0];
    shape[1] = tensor->shape[1];
    *place = grad ? tensor->grad : tensor->data;
    *dtype = grad ? tensor->grad_dtype : tensor->dtype;
    return tensor->n_dims;
}

int shim_logits(shim *s, float *logits /* [n, V] */, const uint32_t *tokens, size_t n)
{
    return dpo_logits(&s->model, logits, tokens, n);
}

/* ---- a batch, kept until the next ------------------------------------------------------------ */

/* Per branch a row of `rows`: its example, its first scored token, its number of tokens. `tokens`
   has, example by example, the prompt and then each branch. */
int shim_set_batch(shim *s, const uint32_t *n_prompt, size_t n_examples,
                   const uint32_t *rows /* [n_branches, 3] */, size_t n_branches,
                   const uint32_t *tokens, size_t n_tokens)
{
    drop_batch(s);
    s->examples = calloc(n_examples, sizeof *s->examples);
    s->branches = calloc(n_branches, sizeof *s->branches);
    s->scores = calloc(n_branches, sizeof *s->scores);
    s->tokens = malloc((n_tokens + 1) * sizeof *s->tokens);
    if (!s->examples || !s->branches || !s->scores || !s->tokens) return 1;
    memcpy(s->tokens, tokens, n_tokens * sizeof *tokens);
    s->batch = (dpo_batch){ s->examples, n_examples };
    s->n_branches = n_branches;
    const uint32_t *at = s->tokens;
    for (size_t e = 0, b = 0; e < n_examples; e++) {
        s->examples[e] = (dpo_example){ .prompt = at, .n_prompt = n_prompt[e], .group = e,
                                        .branches = s->branches + b };
        for (at += n_prompt[e]; b < n_branches && rows[3 * b] == e; at += rows[3 * b++ + 2]) {
            s->branches[b] = (dpo_branch){ at, rows[3 * b + 2], rows[3 * b + 1] };
            s->examples[e].n_branches++;
        }
    }
    return 0;
}

int shim_forward(shim *s, double *logp, uint32_t *n_scored, uint32_t *greedy, int keep)
{
    if (dpo_forward(&s->model, s->scores, &s->batch, keep)) return 1;
    for (size_t b = 0; b < s->n_branches; b++) {
        logp[b] = s->scores[b].logp;
        n_scored[b] = (uint32_t)s->scores[b].n_scored;
        greedy[b] = (uint32_t)s->scores[b].greedy;
    }
    return 0;
}

int shim_zero_grad(shim *s) { return dpo_model_zero_grad(&s->model); }

int shim_backward(shim *s, const double *dlogp)
{
    return dpo_backward(&s->model, &s->batch, dlogp);
}

/* ---- training -------------------------------------------------------------------------------- */

/* The loss of a batch of pairs, scored by shim_forward: the log's columns (loss, rewards/chosen,
   rewards/rejected, rewards/accuracies, rewards/margins, logps/chosen, logps/rejected) and the
   derivatives of the mean loss. */
int shim_pair_losses(shim *s, double *columns /* [7] */, double *dlogp, const double *reference,
                     int kind, double beta, double label_smoothing)
{
    dpo_loss_options options = { (dpo_loss_kind)kind, beta, label_smoothing };
    dpo_metrics m;
    size_t n = s->batch.n;
    for (size_t i = 0; i < n; i++) {
        dpo_pair pair = dpo_pair_loss(s->scores + 2 * i, reference + 2 * i, &options);
        for (size_t b = 0; b < 2; b++) dlogp[2 * i + b] = pair.dlogp[b] / (double)n;
    }
    if (dpo_metrics_compute(&s->context, &m, NULL, s->examples, s->scores, reference, n, &options))
        return 1;
    const double all[7] = { m.loss, m.reward[0], m.reward[1], m.accuracy, m.margin, m.logp[0],
                            m.logp[1] };
    memcpy(columns, all, sizeof all);
    return 0;
}

int shim_optimizer(shim *s, int kind, double weight_decay)
{
    dpo_optimizer_free(&s->model, &s->optimizer);
    if (dpo_optimizer_init(&s->model, &s->optimizer, (dpo_optimizer_kind)kind)) return 1;
    s->optimizer.weight_decay = weight_decay;
    return 0;
}

/* Clips, updates, and tells the norm before clipping. */
int shim_step(shim *s, double *norm, double learning_rate, double max_norm)
{
    return dpo_grad_norm(&s->model, norm) ||
           dpo_optimizer_step(&s->model, &s->optimizer, learning_rate,
                              dpo_clip_scale(*norm, max_norm));
}

/* ---- text ------------------------------------------------------------------------------------ */

/* *ids stay until the next call. */
int shim_encode(shim *s, const uint32_t **ids, size_t *n, const char *text, size_t n_bytes)
{
    s->encoded.n = 0;
    int failed = dpo_tokenizer_encode(&s->context, &s->encoded, &s->model.tokenizer, text, n_bytes);
    *ids = s->encoded.ids;
    *n = s->encoded.n;
    return failed;
}

int shim_load_pairs(shim *s, size_t *n, const char *path, size_t max_length,
                    size_t max_prompt_length)
{
    dpo_data_options options = { .use = DPO_USE_PAIRS, .max_length = max_length,
                                 .max_prompt_length = max_prompt_length };
    dpo_data_free(&s->context, &s->data);
    if (dpo_data_load(&s->context, &s->data, path, &s->model.tokenizer,
                      (uint32_t)s->model.config.eos_id, &options))
        return 1;
    *n = s->data.n;
    return 0;
}

/* Tokens of pair i: its prompt (part 0), chosen (1) or rejected (2) answer. */
const uint32_t *shim_pair_tokens(const shim *s, size_t *n, size_t i, size_t part)
{
    const dpo_example *e = &s->data.examples[i];
    *n = part ? e->branches[part - 1].n : e->n_prompt;
    return part ? e->branches[part - 1].tokens : e->prompt;
}
