/* How fast the products of dpo.h are, next to what the machine can do at most.

   `make bench` measures the ceilings first: fused multiply-adds per second, from a loop that does
   nothing else, and bytes read from memory per second. Then the three products of a linear layer
   (y = x W^T, dx = dy W, dW += dy^T x) run at the shapes of Pythia models, on one thread and on
   all, taking turns with the ceiling, because the speed of a shared or warm machine drifts. Figures
   are the least, the median and the greatest of several rounds; per cent are of the greatest
   ceiling seen. Above 100 % something is wrong with the measurement, and the exit status is 1. */
#define _GNU_SOURCE
#define DPO_IMPLEMENTATION
#include "../dpo.h"

#include <time.h>

enum { ROUNDS = 9 };
static const double SECONDS = 0.01; // of each sample of a product, at least

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
        for (int c = 0; c < CHAINS; c++) sum[c] = sum[c] * factor + term;
    }
    float total = 0;
    UNROLL
    for (int c = 0; c < CHAINS; c++)
        for (int i = 0; i < DPOI_LANES; i++) total += sum[c][i];
    return total;
}

static volatile float operands[2 + CHAINS]; // 0.999, 0.001: the chains go to 1 and stay there
static volatile float result;
static double thread_peak[DPOI_MAX_THREADS];

/* GFLOP/s of all threads together, an FMA counting as two. Each thread times many short runs while
   the others do the same, and its best one counts, so that it stays the ceiling when something else
   takes a core now and then. */
static double measure_peak(int threads)
{
    const long steps = 2000000 / CHAINS;
    double total = 0;
    DPOI_PARALLEL_FOR(threads)
    for (int t = 0; t < threads; t++) {
        double best = 0;
        for (int r = 0; r < 16; r++) {
            double start = now();
            result = multiply_add(operands, steps);
            double speed = 2e-9 * CHAINS * DPOI_LANES * (double)steps / (now() - start);
            best = DPOI_MAX(best, speed);
        }
        thread_peak[t] = best;
    }
    for (int t = 0; t < threads; t++) total += thread_peak[t];
    return total;
}

/* GB/s that all threads together read from memory: the sum of an array that fits no cache. */
static double measure_bandwidth(int threads, const float *array, size_t n)
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
};

static float *random_array(dpo_context *context, size_t n)
{
    float *x;
    if (dpoi_alloc(context, &x, n, sizeof *x)) {
        fprintf(stderr, "bench: %s\n", context->error);
        exit(1);
    }
    for (size_t i = 0; i < n; i++) x[i] = (float)(dpo_random_uniform(1, 0, i) - 0.5);
    return x;
}

typedef struct { float *x, *W, *y, *out; } arrays; // [M, K], [N, K], [M, N], any of these

static void product(const dpo_context *context, int which, const shape *s, const arrays *a)
{
    size_t M = s->M, N = s->N, K = s->K;
    dpoi_matrix W = { a->W, K, 1, DPO_F32 }, Wt = { a->W, 1, K, DPO_F32 };
    dpoi_matrix y = { a->y, N, 1, DPO_F32 }, yt = { a->y, 1, N, DPO_F32 };
    dpoi_matrix x = { a->x, K, 1, DPO_F32 };
    if (which == 0) dpoi_matmul(context, a->out, N, x, Wt, M, N, K, 0);
    if (which == 1) dpoi_matmul(context, a->out, K, y, W, M, K, N, 0);
    if (which == 2) dpoi_matmul(context, a->out, K, yt, x, N, K, M, 1);
}

/* GFLOP/s of one product, repeated until it has taken long enough to be timed. */
static double measure_product(const dpo_context *context, int which, const shape *s,
                              const arrays *a)
{
    double start = now(), seconds;
    int times = 0;
    do {
        product(context, which, s, a);
        times++;
        seconds = now() - start;
    } while (seconds < SECONDS);
    return 2e-9 * (double)s->M * (double)s->N * (double)s->K * times / seconds;
}

/* The table for one number of threads; returns how many results are above the ceiling. */
static int run(int threads, const float *array, size_t array_floats)
{
    static const char *const PRODUCT[3] = { "y = x W^T", "dx = dy W", "dW += dy^T x" };
    double peak[ROUNDS], bandwidth[ROUNDS], top;
    int wrong = 0;
    dpo_context context;
    if (dpo_context_init(&context, threads)) {
        fprintf(stderr, "bench: %s\n", context.error);
        exit(1);
    }
    for (int r = 0; r < ROUNDS; r++) {
        peak[r] = measure_peak(threads);
        bandwidth[r] = measure_bandwidth(threads, array, array_floats);
    }
    double peak_median = median(peak), bandwidth_median = median(bandwidth);
    top = peak[ROUNDS - 1];
    printf("\n%d thread%s                min  median     max\n", threads, threads > 1 ? "s" : " ");
    printf("fp32 FMA peak        %7.1f %7.1f %7.1f GFLOP/s\n", peak[0], peak_median, top);
    printf("reading memory       %7.1f %7.1f %7.1f GB/s\n\n", bandwidth[0], bandwidth_median,
           bandwidth[ROUNDS - 1]);
    printf("%-9s %5s %5s %5s  %-13s %7s %7s %7s GFLOP/s   %% of peak: median, best\n", "layer",
           "M", "N", "K", "product", "min", "median", "max");
    for (size_t i = 0; i < sizeof SHAPES / sizeof *SHAPES; i++) {
        const shape *s = &SHAPES[i];
        size_t M = s->M, N = s->N, K = s->K, most = DPOI_MAX(DPOI_MAX(M * K, N * K), M * N);
        arrays a = { random_array(&context, M * K), random_array(&context, N * K),
                     random_array(&context, M * N), random_array(&context, most) };
        double speed[3][ROUNDS];
        for (int r = 0; r < ROUNDS; r++) {
            double ceiling = measure_peak(threads);
            top = DPOI_MAX(top, ceiling);
            for (int which = 0; which < 3; which++)
                speed[which][r] = measure_product(&context, which, s, &a);
        }
        for (int which = 0; which < 3; which++) {
            double middle = median(speed[which]), best = speed[which][ROUNDS - 1];
            wrong += best > top;
            printf("%-9s %5zu %5zu %5zu  %-13s %7.1f %7.1f %7.1f %25.1f %5.1f%s\n", s->name, M, N,
                   K, PRODUCT[which], speed[which][0], middle, best, 100 * middle / top,
                   100 * best / top, best > top ? "  WRONG" : "");
        }
        fflush(stdout);
        dpoi_free(&context, a.x);
        dpoi_free(&context, a.W);
        dpoi_free(&context, a.y);
        dpoi_free(&context, a.out);
    }
    dpo_context_free(&context);
    return wrong;
}

int main(void)
{
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
    float *array = random_array(&all, array_floats);
    int wrong = run(1, array, array_floats);
    if (all.n_threads > 1) wrong += run(all.n_threads, array, array_floats);
    dpoi_free(&all, array);
    dpo_context_free(&all);
    if (wrong) fprintf(stderr, "bench: %d results above 100 %%, so the peak is none\n", wrong);
    return wrong != 0;
}
