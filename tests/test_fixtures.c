/* The library against PyTorch: logits, log-probabilities, every gradient, ten steps of training, and
   the losses, for ten tiny models that between them use every switch (tests/make_fixtures.py).

   Tolerances. The truth is fp64. PyTorch's own fp32 stays within 8.5e-7 (logits) and 4.3e-6
   (gradients) of it, relative to the largest element, and a float sum in another order moves as
   much; the smallest misreading of an architecture moves logits by 7e-5. So 1e-5 and 5e-5 accept
   any honest fp32 and no mistake. Log-probabilities are sums of about ten such; AdamW's division by
   the gradient's size amplifies rounding over ten steps (six fp64 runs with weights jittered by half
   an ulp differ by 2e-6 in rewards, 3e-6 in norms, 7e-6 in the final log-probabilities). */
#include "check.h"

typedef struct worst { double logits, logp, gradient, loss, reward, norm, final; } worst;
static worst seen;

static void test_logits(dpo_model *model, const dpo_file *expect, const char *name)
{
    const dpo_entry *tokens = check_entry(expect, "", "tokens");
    const dpo_entry *logits = check_entry(expect, "", "logits");
    size_t n = tokens->shape[0], V = model->config.vocab_size;
    float *ours = malloc(n * V * sizeof *ours);
    check_must(dpo_logits(model, ours, tokens->data, n), model->context);
    double distance = check_distance(ours, logits->data, n * V);
    check_worst(&seen.logits, distance);
    check(distance < 1e-5, "%s: logits differ by %.2e of the largest", name, distance);
    free(ours);
}

static void test_gradients(dpo_model *model, const dpo_file *expect, const char *name)
{
    check_batch b = check_read_batch(expect, "batch/");
    const double *logp = check_entry(expect, "batch/", "logp")->data;
    const uint32_t *n_scored = check_entry(expect, "batch/", "n_scored")->data;
    const uint32_t *greedy = check_entry(expect, "batch/", "greedy")->data;
    const float *coef = check_entry(expect, "batch/", "coef")->data;
    dpo_score scores[16];
    double dlogp[16];
    check_must(dpo_model_zero_grad(model) || dpo_forward(model, scores, &b.batch, 1), model->context);
    for (size_t i = 0; i < b.n_branches; i++) {
        double distance = fabs(scores[i].logp - logp[i]);
        check_worst(&seen.logp, distance);
        check(distance < 2e-5, "%s: logp of branch %zu is %.7f, not %.7f", name, i, scores[i].logp,
              logp[i]);
        check(scores[i].n_scored == n_scored[i] && scores[i].greedy == (int)greedy[i],
              "%s: branch %zu: scored %zu greedy %d, not %u and %u", name, i, scores[i].n_scored,
              scores[i].greedy, n_scored[i], greedy[i]);
        dlogp[i] = coef[i];
    }
    check_must(dpo_backward(model, &b.batch, dlogp), model->context);
    for (size_t i = 0; i < model->n_tensors; i++) {
        const dpo_tensor *tensor = &model->tensors[i];
        if (!tensor->trainable) continue;
        const dpo_entry *truth = check_entry(expect, "grad/", tensor->name);
        double distance = check_distance(tensor->grad, truth->data, tensor->n);
        check_worst(&seen.gradient, distance);
        check(distance < 5e-5, "%s: gradient of %s differs by %.2e of its largest element", name,
              tensor->name, distance);
    }
    check_free_batch(&b);
}

static void test_dpo(dpo_model *model, const dpo_file *expect, const char *name)
{
    check_batch b = check_read_batch(expect, "dpo/");
    const double *settings = check_entry(expect, "dpo/", "settings")->data;
    const double *loss = check_entry(expect, "dpo/", "loss")->data;
    const double *rewards = check_entry(expect, "dpo/", "rewards")->data;
    const double *norms = check_entry(expect, "dpo/", "grad_norm")->data;
    const double *final = check_entry(expect, "dpo/", "logp")->data;
    size_t n = b.n_branches, pairs = n / 2;
    dpo_loss_options options = { DPO_LOSS_SIGMOID, settings[0], 0.0 };
    dpo_optimizer adam;
    dpo_score scores[16];
    double reference[16], dlogp[16], norm;
    check_must(dpo_optimizer_init(model, &adam, DPO_ADAMW) ||
               dpo_forward(model, scores, &b.batch, 0), model->context);
    adam.weight_decay = settings[3];
    for (size_t i = 0; i < n; i++) reference[i] = scores[i].logp;
    for (size_t step = 0; step < 10; step++) {
        check_must(dpo_model_zero_grad(model) || dpo_forward(model, scores, &b.batch, 1),
                   model->context);
        double total = 0.0;
        for (size_t i = 0; i < pairs; i++) {
            dpo_pair pair = dpo_pair_loss(scores + 2 * i, reference + 2 * i, &options);
            total += pair.loss / (double)pairs;
            for (size_t k = 0; k < 2; k++) {
                double distance = fabs(pair.reward[k] - rewards[step * n + 2 * i + k]);
                check_worst(&seen.reward, distance);
                check(distance < 2e-5, "%s: step %zu: reward %zu differs by %.2e", name, step,
                      2 * i + k, distance);
                dlogp[2 * i + k] = pair.dlogp[k] / (double)pairs;
            }
        }
        check_worst(&seen.loss, fabs(total - loss[step]));
        check(fabs(total - loss[step]) < 1e-5, "%s: step %zu: loss %.7f, not %.7f", name, step, total,
              loss[step]);
        check_must(dpo_backward(model, &b.batch, dlogp) || dpo_grad_norm(model, &norm),
                   model->context);
        check_worst(&seen.norm, fabs(norm / norms[step] - 1));
        check(fabs(norm / norms[step] - 1) < 1e-4, "%s: step %zu: gradient norm %.6f, not %.6f", name,
              step, norm, norms[step]);
        check_must(dpo_optimizer_step(model, &adam, settings[1], dpo_clip_scale(norm, settings[2])),
                   model->context);
    }
    check_must(dpo_forward(model, scores, &b.batch, 0), model->context);
    for (size_t i = 0; i < n; i++) {
        check_worst(&seen.final, fabs(scores[i].logp - final[i]));
        check(fabs(scores[i].logp - final[i]) < 5e-5, "%s: logp %zu after ten steps differs by %.2e",
              name, i, fabs(scores[i].logp - final[i]));
    }
    dpo_optimizer_free(model, &adam);
    check_free_batch(&b);
}

static void test_sft(dpo_model *model, const dpo_file *expect, const char *name)
{
    check_batch b = check_read_batch(expect, "sft/");
    const double *settings = check_entry(expect, "sft/", "settings")->data;
    const double *loss = check_entry(expect, "sft/", "loss")->data;
    const double *norms = check_entry(expect, "sft/", "grad_norm")->data;
    dpo_optimizer rmsprop;
    dpo_score scores[16];
    double dlogp[16], norm;
    check_must(dpo_optimizer_init(model, &rmsprop, DPO_RMSPROP), model->context);
    rmsprop.beta2 = settings[2];
    rmsprop.epsilon = settings[3];
    for (size_t step = 0; step < 10; step++) {
        check_must(dpo_model_zero_grad(model) || dpo_forward(model, scores, &b.batch, 1),
                   model->context);
        double total = 0.0, tokens = 0.0;
        for (size_t i = 0; i < b.n_branches; i++) {
            total -= scores[i].logp;
            tokens += (double)scores[i].n_scored;
        }
        for (size_t i = 0; i < b.n_branches; i++) dlogp[i] = -1 / tokens;
        check(fabs(total / tokens - loss[step]) < 1e-5, "%s: SFT step %zu: loss %.7f, not %.7f", name,
              step, total / tokens, loss[step]);
        check_must(dpo_backward(model, &b.batch, dlogp) || dpo_grad_norm(model, &norm),
                   model->context);
        check(fabs(norm / norms[step] - 1) < 1e-4, "%s: SFT step %zu: gradient norm %.6f, not %.6f",
              name, step, norm, norms[step]);
        check_must(dpo_optimizer_step(model, &rmsprop, settings[0], dpo_clip_scale(norm, settings[1])),
                   model->context);
    }
    dpo_optimizer_free(model, &rmsprop);
    check_free_batch(&b);
}

static void test_losses(dpo_context *context)
{
    static const struct { const char *name; dpo_loss_kind kind; double smoothing; } kinds[] = {
        { "sigmoid", DPO_LOSS_SIGMOID, 0.0 }, { "sigmoid_smooth", DPO_LOSS_SIGMOID, 0.1 },
        { "ipo", DPO_LOSS_IPO, 0.0 }, { "ipo_sum", DPO_LOSS_IPO_SUM, 0.0 },
        { "hinge", DPO_LOSS_HINGE, 0.0 } };
    dpo_file file;
    check_must(dpo_file_open(context, &file, "tests/fixtures/losses.expect.bin", DPO_FILE_TEST, 1),
               context);
    const dpo_entry *rows = check_entry(&file, "losses/", "rows");
    for (size_t k = 0; k < sizeof kinds / sizeof *kinds; k++) {
        const double *truth = check_entry(&file, "losses/", kinds[k].name)->data;
        for (size_t i = 0; i < rows->shape[0]; i++) {
            const double *row = (const double *)rows->data + 7 * i, *t = truth + 3 * i;
            dpo_score scores[2] = { { row[0], (size_t)row[4], 0 }, { row[1], (size_t)row[5], 0 } };
            dpo_loss_options options = { kinds[k].kind, row[6], kinds[k].smoothing };
            dpo_pair pair = dpo_pair_loss(scores, row + 2, &options);
            double ours[3] = { pair.loss, pair.dlogp[0], pair.dlogp[1] };
            for (size_t j = 0; j < 3; j++) // both are fp64, so only rounding may differ
                check(fabs(ours[j] - t[j]) <= 1e-12 * fabs(t[j]) + 1e-14,
                      "%s, row %zu: value %zu is %.17g, not %.17g", kinds[k].name, i, j, ours[j], t[j]);
        }
    }
    dpo_file_close(context, &file);
}

int main(void)
{
    dpo_context context;
    check_must(dpo_context_init(&context, 2), &context);
    for (size_t i = 0; i < CHECK_MODELS; i++) {
        char path[256];
        dpo_model model;
        dpo_file expect;
        snprintf(path, sizeof path, "tests/fixtures/%s.expect.bin", check_models[i]);
        check_must(dpo_file_open(&context, &expect, path, DPO_FILE_TEST, 1), &context);
        snprintf(path, sizeof path, "tests/fixtures/%s.model.bin", check_models[i]);
        check_must(dpo_model_load(&context, &model, path, NULL), &context);
        test_logits(&model, &expect, check_models[i]);
        test_gradients(&model, &expect, check_models[i]);
        test_dpo(&model, &expect, check_models[i]);
        dpo_model_free(&model);
        if (dpo_file_find(&expect, "sft/settings")) {
            check_must(dpo_model_load(&context, &model, path, NULL), &context);
            test_sft(&model, &expect, check_models[i]);
            dpo_model_free(&model);
        }
        dpo_file_close(&context, &expect);
    }
    test_losses(&context);
    printf("largest distances: logits %.1e, logp %.1e, gradients %.1e, loss %.1e, rewards %.1e, "
           "gradient norm %.1e, logp after ten steps %.1e\n", seen.logits, seen.logp, seen.gradient,
           seen.loss, seen.reward, seen.norm, seen.final);
    check(context.heap_bytes > 0, "the context's own scratch is gone");
    dpo_context_free(&context);
    check(context.heap_bytes == 0, "%zu bytes were not freed", context.heap_bytes);
    return check_done();
}
