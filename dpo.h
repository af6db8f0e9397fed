/* ================================================================================================
   dpo.h - Direct Preference Optimization of language models on the CPU, in one C header

   0. MANUAL

   What it is. A library that takes a GPT-NeoX (Pythia) or BTLM model, fine-tunes it on good answers
   (supervised fine-tuning, SFT) and then on pairs of a better and a worse answer (DPO: Rafailov et
   al. 2023, https://arxiv.org/abs/2305.18290), evaluates it and generates text. All of it is here:
   tokenizer, data, forward and backward of the transformer, losses, optimizers, files. It needs
   libc, libm, POSIX and, to use more than one core, OpenMP. It is written to be read from the first
   line to the last, once, by somebody who wants to know how this really works.

   What it is not. Not an inference engine (no quantised weights, no GPU), not a zoo of models (two
   architectures, exactly as Hugging Face computes them), not a pretraining framework. It wants a
   POSIX system and a little-endian 64-bit machine.

   A program. Twelve updates on the first 8 pairs of a file, and the model is saved:

       #define DPO_IMPLEMENTATION
       #include "dpo.h"

       int main(void)
       {
           enum { N = 8 };                                     // pairs per update
           dpo_context context;
           dpo_model policy = { 0 };
           dpo_data data = { 0 };
           dpo_optimizer adam = { 0 };
           dpo_data_options rules = { DPO_USE_PAIRS, .max_length = 512, .max_prompt_length = 256,
                                      .limit = N };
           dpo_loss_options loss = { DPO_LOSS_SIGMOID, .beta = 0.1 };
           dpo_score score[2 * N];
           double reference[2 * N], dlogp[2 * N], norm;
           int failed = dpo_context_init(&context, 0) ||
                        dpo_model_load(&context, &policy, "model.bin", NULL) ||
                        dpo_data_load(&context, &data, "pairs.jsonl", &policy.tokenizer,
                                      (uint32_t)policy.config.eos_id, &rules) ||
                        dpo_optimizer_init(&policy, &adam, DPO_ADAMW);
           dpo_batch batch = { data.examples, data.n };
           failed = failed || dpo_forward(&policy, score, &batch, 0);
           for (size_t i = 0; i < 2 * batch.n; i++)
               reference[i] = score[i].logp;                   // before training starts
           for (int step = 0; step < 12 && !failed; step++) {
               failed = dpo_model_zero_grad(&policy) || dpo_forward(&policy, score, &batch, 1);
               for (size_t i = 0; i < batch.n; i++) {
                   dpo_pair pair = dpo_pair_loss(score + 2 * i, reference + 2 * i, &loss);
                   for (int k = 0; k < 2; k++) dlogp[2 * i + k] = pair.dlogp[k] / (double)batch.n;
               }
               failed = failed || dpo_backward(&policy, &batch, dlogp) ||
                        dpo_grad_norm(&policy, &norm) ||
                        dpo_optimizer_step(&policy, &adam, 1e-6, dpo_clip_scale(norm, 1.0));
           }
           failed = failed || dpo_model_save(&policy, "policy.bin", DPO_F32);
           if (failed) fprintf(stderr, "%s\n", context.error);
           dpo_optimizer_free(&policy, &adam);
           dpo_data_free(&context, &data);
           dpo_model_free(&policy);
           dpo_context_free(&context);
           return failed;
       }

   Compile with   cc -std=gnu11 -O3 -march=native -ffp-contract=fast -fno-math-errno \
                     -fno-trapping-math -fopenmp program.c -o program -lm
   The interface (part 1) is also strict C11 and C++; the implementation wants gnu11 and belongs in
   one C file. Never use -ffast-math with it: it would reorder sums and lose NaNs.

   The one idea. Everything here asks one question: what is the log-probability of each continuation
   ("branch") of a prompt? SFT has one branch, the good answer. DPO has two, chosen and rejected. A
   multiple-choice question has as many as options. Running text is one branch of an empty prompt.
   So there is one forward, which reports log p of every branch; one backward, which takes one
   number per branch, d loss / d log p; and in between a loss of a few lines that knows no model.
   The prompt is computed once and shared by its branches, forwards and backwards.

   Contents
       1  interface     types and functions, with shapes, units and errors
       2  ground        errors, memory, random numbers, the parallel loop, sums in a fixed order
       3  matmul        the product that takes nearly all the time
       4  layers        embedding, layer norm, linear, rotary, attention, activations
       5  head          log-softmax over the vocabulary at scored positions; losses; metrics
       6  model         config, table of tensors, LoRA, buffers, batches as rows, the block
       7  optimizer     AdamW, RMSprop, clipping, schedules
       8  files         the container; models, adapters, reference caches, training states
       9  text          tokenizer, JSON lines, examples
       10 generation    key/value cache, sampling

   Options, to be defined before the header is included
       DPO_IMPLEMENTATION      in one file: the code itself
       DPO_STATIC              functions are local to that file
       DPO_MALLOC, DPO_FREE    instead of libc's
       DPO_PLAIN_C             products without the compiler's vector extension

   Shape letters. B examples of a batch, R rows (tokens of a micro-batch, laid end to end, never
   padded), S scored rows (those that predict a token somebody asks for), T positions, C width of
   the model, H heads, D = C / H head size, F width inside the MLP, V vocabulary, L layers. `dx` is
   the gradient of the loss with respect to x, and has x's shape.

   Choices, where the sources differ
       Prompt and answers are tokenised separately, and the end token is appended to every answer.
       If prompt and longest answer exceed max_length, the prompt keeps its last max_prompt_length
       tokens (or first, with keep_start); then each answer is cut to what is left, and a cut answer
       has no end token. Both answers always share one prompt.
       A pair with equal answers is kept, and counted as a tie; it has no gradient.
       rewards/accuracies counts strictly larger rewards: a policy that still equals its reference
       scores 0, and its ties are reported beside it.
       IPO averages log-probabilities per token, as its authors do; ipo-sum does not. Rewards are
       beta times the summed log-ratio whatever the loss.
       Weight decay (0 unless asked for) applies to matrices and embeddings only.
       muP models train each block's matrices at mup_width_scale times the learning rate.
       Dropout that a config asks for is ignored. train dpo runs adapters without theirs, so that a
       policy that still equals its reference has rewards of 0.
       eval generate and chat read a prompt's last tokens, so that the answer has the room that it
       may take, or half of the context.
       LoRA adapts the linear layers of the blocks, not the head, which only full fine-tuning
       trains; muP's multiplier of the learning rate is 1 for its factors.
       Biases, norms and ALiBi's slopes stay fp32 in bf16 mode: a thousandth of the parameters.

   Numerics contract (the tests check it)
       fp32: parameters, activations and gradients are fp32; log-probabilities of answers, losses
       and norms add up in fp64; log-softmax from the true maximum, never through a probability.
       bf16: matrices, and the activations kept for the backward, are bf16; products take bf16 and
       add up in fp32; the residual stream, norms, softmax, losses, adapters and the optimizer stay
       fp32. Full fine-tuning keeps fp32 masters of its weights and fp32 gradients, or rounds both
       stochastically to bf16 (`stochastic`). CPUs with a dot product of bf16, with products of bf16
       tiles (AMX), and with neither, sum in different orders, and may take subnormal numbers (below
       1.2e-38) for 0; apart from that they agree.
       The same inputs, seed, micro-batches and build give the same bits for any number of threads:
       every sum has one order. An example's score does not depend on its neighbours in a batch.
       NaN and infinity are carried, not hidden: training stops before the weights are touched.

   Limits. Sequences up to the model's context (scoring by ALiBi may go beyond). Dynamic position
   interpolation of BTLM and RoPE scaling are refused on import. A context and what belongs to it
   may be used by one thread at a time (the library makes its own threads).

   Licence: MIT, see the end of the file.
   ============================================================================================= */

/* ================================================================================================
   1. INTERFACE

   Conventions. Functions return 0 on success and nonzero on failure, with the reason in
   `context->error`: what was wrong, where (file, line, tensor), and what to do about it. Nothing
   here prints or exits. After an init or load function, even one that failed, its free function
   may be called. Sizes count elements unless the name says bytes. Arrays are row-major, and their
   shapes stand beside them in the letters of the manual.
   ============================================================================================= */
#ifndef DPO_H
#define DPO_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Compile-time option: with DPO_STATIC every function is local to the including file. */
#ifdef DPO_STATIC
#define DPO_API static __attribute__((unused))
#else
#define DPO_API extern
#endif

/* ---- 1.1 context: threads, scratch memory, the last error, where time goes ------------------- */

/* What passes and updates spend their time on. The head is its products and its softmax; "other"
   lies between passes, the caller's own work included. */
typedef enum dpo_operation {
    DPO_TIME_EMBEDDING, DPO_TIME_NORM, DPO_TIME_NORM_BACK, DPO_TIME_LINEAR, DPO_TIME_LINEAR_BACK,
    DPO_TIME_ADAPTER, DPO_TIME_ROTARY, DPO_TIME_ATTENTION, DPO_TIME_ATTENTION_BACK,
    DPO_TIME_ACTIVATION, DPO_TIME_ACTIVATION_BACK, DPO_TIME_RESIDUAL, DPO_TIME_KEEP, DPO_TIME_HEAD,
    DPO_TIME_HEAD_BACK, DPO_TIME_ZERO_GRAD, DPO_TIME_GRAD_NORM, DPO_TIME_UPDATE, DPO_TIME_OTHER,
    DPO_N_OPERATIONS
} dpo_operation;

typedef struct dpo_profile {
    double seconds[DPO_N_OPERATIONS];   // wall-clock time
    double flops[DPO_N_OPERATIONS];     // of products: an FMA is two, what is masked counts nothing
    double bytes[DPO_N_OPERATIONS];     // read and written by operations without products
    double last;                        // seconds on the monotonic clock up to which time is booked
} dpo_profile;

typedef struct dpo_context {
    int n_threads;          // threads of every parallel loop; results do not depend on it
    char error[1024];       // why the last call failed, for people
    size_t heap_bytes;      // bytes allocated through this context now ...
    size_t heap_peak;       // ... and at most so far
    float *pack;            // [n_threads, DPOI_PACK_FLOATS] scratch for the panels of products
    size_t block_cols;      // columns of b packed at once; results do not depend on it
    float **strip;          // [n_threads][strip_floats] scratch for attention
    size_t strip_floats;
    float *piece;           // [piece_floats] scratch for weight gradients that are rounded to bf16
    size_t piece_floats;
    uint64_t noise;         // key of the random numbers of the current pass
    dpo_profile *profile;   // the caller's, zeros at first: where to add up times; NULL: nowhere
} dpo_context;

/* n_threads: 1 to 1024, or 0 for as many as OpenMP offers; without OpenMP there is always one. */
DPO_API int dpo_context_init(dpo_context *context, int n_threads);
DPO_API void dpo_context_free(dpo_context *context);

/* ---- 1.2 files: one container for models, adapters, training states, reference caches -------- */

typedef enum { DPO_F32 = 1, DPO_F16, DPO_BF16, DPO_U8, DPO_U32, DPO_F64, DPO_U64 } dpo_dtype;
/* Weights of linear layers are [out, in] or, as in Hugging Face's Conv1D, [in, out]. */
typedef enum { DPO_PLAIN /* no linear layer's weight */, DPO_LINEAR, DPO_CONV1D } dpo_layout;
typedef enum {
    DPO_FILE_MODEL = 1, DPO_FILE_ADAPTER, DPO_FILE_STATE, DPO_FILE_REFERENCE,
    DPO_FILE_TEST   // of the container's own tests
} dpo_file_kind;

#define DPO_NAME_BYTES 96   // room for an entry's name with its terminating 0

typedef struct dpo_entry {
    char name[DPO_NAME_BYTES];
    dpo_dtype dtype;
    dpo_layout layout;
    size_t n_dims, shape[2];    // 1 or 2 dimensions; an unused one is 1
    const void *data;           // in the mapped file, or the caller's when writing
    size_t bytes;
} dpo_entry;

typedef struct dpo_file {
    void *map;                  // the whole file, read-only
    size_t bytes;
    dpo_entry *entries;         // [n_entries], in file order
    size_t n_entries;
    uint64_t identity;          // hash over header and table, the data's checksums included
    char path[512];             // for messages; a longer one is cut
} dpo_file;

/* Maps a container and checks all of it against the file's size; `verify` also checks the CRC-32
   of the data, which reads every byte once. */
DPO_API int dpo_file_open(dpo_context *context, dpo_file *file, const char *path,
                          dpo_file_kind kind, int verify);
DPO_API void dpo_file_close(dpo_context *context, dpo_file *file);
/* The entry of that name, or NULL. */
DPO_API const dpo_entry *dpo_file_find(const dpo_file *file, const char *name);
/* Writes a container under a temporary name, syncs it and renames it: at `path` there is never a
   half-written file. */
DPO_API int dpo_file_write(dpo_context *context, const char *path, dpo_file_kind kind,
                           const dpo_entry *entries, size_t n_entries);

/* ---- 1.3 text: tokenizer, JSON lines --------------------------------------------------------- */

typedef struct dpo_tokens { uint32_t *ids; size_t n, capacity; } dpo_tokens; // grows; zero to start
typedef struct dpo_string { char *bytes; size_t n, capacity; } dpo_string;   // no NUL at its end
DPO_API void dpo_tokens_free(dpo_context *context, dpo_tokens *tokens);
DPO_API void dpo_string_free(dpo_context *context, dpo_string *string);

typedef struct dpo_table { const uint32_t *rows; size_t n, width; } dpo_table;      // [n, width]

/* Byte-level byte-pair encoding, as Hugging Face's `tokenizers` computes it for GPT-2 and GPT-NeoX.
   The tables point into the model file they were loaded from, which must stay open. */
typedef struct dpo_tokenizer {
    size_t n_tokens;            // ids are below this; 0: the file has no tokenizer
    const char *token_bytes;
    dpo_table token_ends;       // [n_tokens] where each token's bytes end
    dpo_table byte_ids;         // [256]
    dpo_table merges;           // [n, 3] left, right, merged, by rank
    dpo_table added;            // [n, 2] id, flags
    dpo_table letters, numbers; // [n, 2] ranges of code points
    dpo_table decompositions, compositions, classes;    // [n, 3], [n, 3], [n, 2] for NFC
    int nfc;                    // normalise to NFC first (GPT-NeoX)
    uint32_t *merge_slots; size_t n_merge_slots;    // hash table: (left, right) -> rank
    char starts_added[2][256];  // first bytes of added tokens, by stage: 0 raw, 1 normalised text
} dpo_tokenizer;

/* Reads the tokenizer/... entries of a model file, checking every table. `file` NULL: the smallest
   tokenizer, one token per byte, and <|endoftext|> as id 256. */
DPO_API int dpo_tokenizer_load(dpo_context *context, dpo_tokenizer *tokenizer,
                               const dpo_file *file);
DPO_API void dpo_tokenizer_free(dpo_context *context, dpo_tokenizer *tokenizer);
/* Appends the ids of n_bytes of UTF-8 text; invalid UTF-8 is an error that names the byte. */
DPO_API int dpo_tokenizer_encode(dpo_context *context, dpo_tokens *out,
                                 const dpo_tokenizer *tokenizer, const char *text, size_t n_bytes);
/* Appends the bytes of n ids. A cut through a multi-byte character stays visible as such: the
   caller decides how to show it (dpo_string_make_valid puts U+FFFD). */
DPO_API int dpo_tokenizer_decode(dpo_context *context, dpo_string *out,
                                 const dpo_tokenizer *tokenizer, const uint32_t *ids, size_t n);
DPO_API int dpo_string_make_valid(dpo_context *context, dpo_string *string);

/* A parsed JSON value. Objects and arrays list their children by index into one array of values. */
typedef enum {
    DPO_JSON_NULL, DPO_JSON_BOOL, DPO_JSON_NUMBER, DPO_JSON_STRING, DPO_JSON_ARRAY, DPO_JSON_OBJECT
} dpo_json_kind;
typedef struct dpo_json_value {
    dpo_json_kind kind;
    double number;              // of a number, or 0 and 1 of a bool
    size_t key;                 // a member's key: offset in dpo_json.text, where a 0 ends it
    size_t string, n_string;    // a string's bytes: offset and length, likewise
    size_t first_child, next;   // indices into values; 0 is "none" (value 0 is the root)
} dpo_json_value;
typedef struct dpo_json {
    dpo_json_value *values; size_t n_values, capacity;
    dpo_string text;            // unescaped keys and strings
} dpo_json;

/* Parses one JSON text (UTF-8). Lone surrogates become U+FFFD; `where` starts error messages. */
DPO_API int dpo_json_parse(dpo_context *context, dpo_json *json, const char *text, size_t n_bytes,
                           const char *where);
/* The member of an object by key, or NULL. `object` is json->values for the root. */
DPO_API const dpo_json_value *dpo_json_member(const dpo_json *json, const dpo_json_value *object,
                                              const char *key);
DPO_API void dpo_json_free(dpo_context *context, dpo_json *json);
/* Appends s as a JSON string with its quotes. */
DPO_API int dpo_json_quote(dpo_context *context, dpo_string *out, const char *s, size_t n_bytes);

/* A JSON lines file, read record by record. */
typedef struct dpo_jsonl {
    void *stream;               // FILE *
    const char *path;
    size_t line;                // number of the record's line, from 1
    char where[512];            // "path:line", for messages about the record
    dpo_string buffer;
    dpo_json json;              // the current record, always an object
} dpo_jsonl;
DPO_API int dpo_jsonl_open(dpo_context *context, dpo_jsonl *reader, const char *path);
/* Sets *found to 0 at the end of the file. Blank lines are skipped. */
DPO_API int dpo_jsonl_next(dpo_context *context, dpo_jsonl *reader, int *found);
DPO_API void dpo_jsonl_close(dpo_context *context, dpo_jsonl *reader);

/* ---- 1.4 examples: a prompt and its branches ------------------------------------------------- */

typedef struct dpo_branch {
    const uint32_t *tokens;     // [n]
    size_t n;
    size_t first_scored;        // the first token whose log-probability counts, normally 0
} dpo_branch;

typedef struct dpo_example {
    const uint32_t *prompt;     // [n_prompt]; empty for language modelling, where a branch's
    size_t n_prompt;            // first token is context only and never scored
    const dpo_branch *branches; // [n_branches], at least one, each continuing the same prompt
    size_t n_branches;
    size_t group;               // examples of one distinct prompt share this number
    size_t line;                // where it begins in its file, for messages; 0: nowhere
} dpo_example;

typedef struct dpo_batch {
    const dpo_example *examples; // [n]
    size_t n;
} dpo_batch;

/* What a file of records is used for. */
typedef enum {
    DPO_USE_PAIRS,  // preference records: branch 0 is the chosen answer, branch 1 the rejected one
    DPO_USE_SFT,    // one branch: the chosen answer (once per distinct prompt), completion, or text
    DPO_USE_TEXT    // windows of running text: {"text"} records or a plain text file
} dpo_data_use;

typedef struct dpo_data_options {
    dpo_data_use use;
    size_t max_length;          // most tokens of prompt and answer; most scored of a text window
    size_t max_prompt_length;   // what a prompt is cut to when it must be cut
    int keep_start;             // cut prompts keep their start instead of their end
    size_t limit;               // read at most this many examples; 0: all
} dpo_data_options;

/* Why records were dropped or changed; every count is reported, none is silent. */
typedef struct dpo_data_counts {
    size_t records;             // read from the file
    size_t prompts_differ;      // dropped: rejected does not begin with the chosen one's prompt
    size_t no_prompt;           // dropped: a transcript without "\n\nAssistant:"
    size_t empty_answers;       // dropped: an answer or a document without a token of its own
    size_t end_token_inside;    // dropped: text that spells the end token
    size_t repeated_prompts;    // SFT on pairs: prompts that came again (the last answer stays)
    size_t ties;                // kept: chosen equals rejected, token for token
    size_t cut_prompts;         // kept: prompts cut to max_prompt_length
    size_t cut_answers;         // kept: answers cut to fit, which lose their end token
    size_t bytes;               // UTF-8 bytes of the text behind text windows, without end tokens
} dpo_data_counts;

typedef struct dpo_data {
    dpo_example *examples;      // [n]
    size_t n;
    size_t n_groups;            // distinct prompts
    dpo_data_counts counts;
    uint64_t hash;              // of all tokens and their arrangement
    dpo_branch *branches;       // storage behind examples
    dpo_tokens tokens;
} dpo_data;

/* Reads a .jsonl, .ndjson or .json file (or, for text, any other as one document) by the rules of
   part 9; `end_token` ends answers and documents. */
DPO_API int dpo_data_load(dpo_context *context, dpo_data *data, const char *path,
                          const dpo_tokenizer *tokenizer, uint32_t end_token,
                          const dpo_data_options *options);
DPO_API void dpo_data_free(dpo_context *context, dpo_data *data);
/* Puts 0 .. data->n - 1 into order[data->n], shuffled by `seed`; groups stay together. */
DPO_API int dpo_data_shuffle(dpo_context *context, size_t *order, const dpo_data *data,
                             uint64_t seed);
/* The rows that an example takes in a forward pass: every token but each branch's last. */
DPO_API size_t dpo_example_rows(const dpo_example *example);
/* How many of the leading examples make the next micro-batch: as many as fit into max_rows, and at
   least 1. */
DPO_API size_t dpo_micro_batch(const dpo_example *examples, size_t n, size_t max_rows);

/* ---- 1.5 the model --------------------------------------------------------------------------- */

typedef enum { DPO_GPT_NEOX, DPO_BTLM } dpo_architecture;
typedef enum { DPO_ROTARY, DPO_ALIBI, DPO_LEARNED } dpo_position;
typedef enum {
    DPO_GELU, DPO_GELU_NEW, DPO_GELU_FAST, DPO_QUICK_GELU, DPO_SILU, DPO_RELU, DPO_SWIGLU
} dpo_activation;

typedef struct dpo_config {
    dpo_architecture architecture;  // decides tensor names, weight layout and the order inside qkv
    size_t vocab_size;              // V, rows of the embedding, padding rows included
    size_t context_length;          // most positions the model was made for
    size_t d_model, n_layers, n_heads, d_ff;    // C, L, H, F
    dpo_position position;
    size_t rotary_dims;             // leading dimensions of each head that rotate, even
    double rotary_base;
    dpo_activation activation;
    int parallel_residual;          // x + attention(norm1 x) + mlp(norm2 x), GPT-NeoX's usual form
    int attention_bias;             // biases on qkv and on the attention's output
    int tied_head;                  // the head is the embedding
    double norm_epsilon;
    double embedding_scale;         // multiplies embeddings (muP; 1 otherwise)
    double logit_scale;             // multiplies logits (muP)
    double attention_scale;         // multiplies q.k
    int attention_scale_by_layer;   // q.k is divided by layer index + 1 too
    double alibi_factor;            // position interpolation: slopes are divided by it
    double mup_width_scale;         // learning-rate multiplier of the blocks' matrices
    int64_t bos_id, eos_id;         // -1: none
} dpo_config;

typedef struct dpo_tensor {
    char name[DPO_NAME_BYTES];  // Hugging Face's name; an adapter's is PEFT's
    dpo_layout layout;
    size_t n_dims, shape[2], n; // n elements
    dpo_dtype dtype;            // DPO_F32, or DPO_BF16: matrices in bf16 mode
    void *data;                 // [shape] in the mapped file or in memory
    float *master;              // [shape] fp32 master copy of bf16 weights; NULL: none
    int trainable;
    int decays;                 // weight decay applies to matrices, not to biases and norms
    double lr_scale;            // muP learning-rate multiplier
    dpo_dtype grad_dtype;       // DPO_F32, or DPO_BF16: see dpo_model_options.stochastic
    void *grad;                 // [shape] NULL until dpo_model_zero_grad, and always if frozen
    size_t offset;              // of its first element in the optimizer's arrays
    struct dpo_tensor *lora_a, *lora_b; // a linear layer's adapter, [r, in] and [out, r], or NULL
} dpo_tensor;

/* How a model is held. All zero is right for full fine-tuning in fp32. */
typedef struct dpo_model_options {
    int no_verify;              // do not check the file's checksums
    dpo_dtype dtype;            // DPO_F32 (as 0) or DPO_BF16: of matrices and kept activations
    int frozen;                 // weights are not trained: no gradients, and those that have the
                                // right type already stay in the mapped file
    int stored;                 // frozen, and every weight as the file has it, f16 included: for
                                // dpo_model_save, which then needs no memory for the model
    int stochastic;             // bf16: no fp32 masters; weights and the gradients of linear layers
                                // are rounded stochastically to bf16
    int recompute;              // keep only each block's input, and compute the block again in
                                // backward: least memory, a third more work
} dpo_model_options;

/* LoRA (Hu et al. 2021) as PEFT computes it: y = x W^T + b + scale * dropout(x) A^T B^T. */
typedef struct dpo_lora {
    size_t r;                   // rank; 0: no adapter
    double alpha;
    int rslora;                 // scale is alpha / sqrt(r) (Kalajdzievski 2023), not alpha / r
    double dropout;             // of the adapter's input, in passes that keep activations
    char targets[8192];         // "all-linear" (all but the head), or names with commas between:
                                // those of modules, or the ends of their paths, as in PEFT
    char base[1024];            // the base model's path when the adapter was saved, and ...
    uint64_t base_identity;     // ... its identity
} dpo_lora;

typedef struct dpo_model {
    dpo_context *context;
    dpo_config config;
    dpo_model_options options;
    dpo_tensor *tensors; size_t n_tensors;  // the one table that drives everything
    size_t n_params;            // elements without adapters
    size_t n_trainable;
    void *params;               // weights that are not mapped
    float *masters;             // fp32 masters of bf16 weights, or NULL
    void *grads;                // gradients of all trainable tensors in the table's order, NULL
    size_t grad_bytes;          // before dpo_model_zero_grad; n_trainable floats if none is bf16
    dpo_lora lora;              // lora.r is 0 without an adapter
    float *adapter;             // the adapter's weights
    dpo_string adapter_config;  // adapter_config.json of one imported from PEFT, for the export
    dpo_tokenizer tokenizer;
    dpo_file file;              // the file it came from (weights, tokenizer tables, originals)
    uint64_t identity;          // of that file; 0 for a model made by dpo_model_init
    uint64_t adapter_identity;  // of the adapter's file; 0: none or a new one
    uint64_t noise_seed;        // of dropout and stochastic rounding
    uint64_t passes;            // forwards with `keep` so far: each draws other random numbers
    struct dpoi_weights *weights;       // the table's tensors by role
    struct dpoi_workspace *workspace;   // buffers for the largest pass so far
} dpo_model;

/* `options` NULL: fp32, trainable, checksums verified. */
DPO_API int dpo_model_load(dpo_context *context, dpo_model *model, const char *path,
                           const dpo_model_options *options);
/* A model with random weights: normal matrices (standard deviation 0.02; BTLM's 0.073, scaled by
   muP inside the blocks), residual outputs divided by sqrt(2 L), zero biases, unit norms.
   `tokenizer_path` names a model file whose tokenizer to take; NULL gives the byte tokenizer. */
DPO_API int dpo_model_init(dpo_context *context, dpo_model *model, const dpo_config *config,
                           const char *tokenizer_path, uint64_t seed,
                           const dpo_model_options *options);
/* Saves the weights with the adapter, if there is one, folded in, W + scale * B A, tensor by
   tensor: vectors as fp32, matrices as fp32 or bf16. Replaces a file of that name. */
DPO_API int dpo_model_save(dpo_model *model, const char *path, dpo_dtype matrices);
DPO_API void dpo_model_free(dpo_model *model);
/* A parameter by its Hugging Face name, an adapter's by PEFT's; NULL if there is none. */
DPO_API const dpo_tensor *dpo_model_tensor(const dpo_model *model, const char *name);
/* Puts a new adapter over a frozen model: A uniform in +-1/sqrt(in), B zero, as PEFT's default. */
DPO_API int dpo_lora_init(dpo_model *model, const dpo_lora *lora, uint64_t seed);
/* Puts a saved adapter over the frozen model that it was made for. */
DPO_API int dpo_lora_load(dpo_model *model, const char *path);
/* Reads r, alpha, targets and the base of an open adapter file. */
DPO_API int dpo_lora_read(dpo_context *context, dpo_lora *lora, const dpo_file *file);
/* Fails unless the adapter at `path` was made over the model of that identity. */
DPO_API int dpo_lora_check_base(dpo_context *context, const dpo_lora *lora, const char *path,
                                uint64_t identity);
/* Saves the adapter. `base_path` says where its model is, for whoever opens it; NULL, one of 1024
   bytes or more, or one that is not UTF-8 is left out, and the model must be named beside the
   adapter. */
DPO_API int dpo_lora_save(dpo_model *model, const char *path, const char *base_path);
/* The config of an open model file alone, to plan memory before the weights are loaded. */
DPO_API int dpo_config_load(dpo_context *context, dpo_config *config, const dpo_file *file);
/* Given vocab_size, context_length, d_model, n_layers, n_heads and d_ff (0: 4 d_model), sets all
   the rest as Pythia has it (GPT-NeoX) or BTLM-3B (ALiBi, SwiGLU, muP's scales for this width). */
DPO_API void dpo_config_default(dpo_config *config, dpo_architecture architecture);
/* Fails, and says why, unless a model can have this config. */
DPO_API int dpo_config_check(dpo_context *context, const dpo_config *config);

typedef struct dpo_score {
    double logp;        // sum over scored tokens of log p(token | prompt, branch so far), in nats
    size_t n_scored;
    int greedy;         // every scored token was the most probable one
} dpo_score;

/* Scores every branch of a batch; `scores` has one element per branch, in order. With `keep` the
   activations stay for dpo_backward. The whole batch is one pass: cut it by dpo_micro_batch. */
DPO_API int dpo_forward(dpo_model *model, dpo_score *scores, const dpo_batch *batch, int keep);
/* Adds d(sum over branches of dlogp[b] * logp[b]) / d(parameter) to the gradients, for the batch
   that dpo_forward kept last; once, since it uses up what was kept. */
DPO_API int dpo_backward(dpo_model *model, const dpo_batch *batch, const double *dlogp);
/* Sets all gradients to 0; allocates them at the first call. Fails if nothing is trained. */
DPO_API int dpo_model_zero_grad(dpo_model *model);
/* Scores any number of examples in micro-batches of max_rows. */
DPO_API int dpo_score_examples(dpo_model *model, dpo_score *scores, const dpo_example *examples,
                               size_t n, size_t max_rows);
/* Logits at every position of one sequence, by the code of dpo_forward. */
DPO_API int dpo_logits(dpo_model *model, float *logits /* [n, V] */, const uint32_t *tokens,
                       size_t n);

/* ---- 1.6 losses and metrics ------------------------------------------------------------------ */

typedef enum { DPO_LOSS_SIGMOID, DPO_LOSS_IPO, DPO_LOSS_IPO_SUM, DPO_LOSS_HINGE } dpo_loss_kind;
typedef struct dpo_loss_options {
    dpo_loss_kind kind;
    double beta;
    double label_smoothing;     // conservative DPO's epsilon, 0 <= eps < 0.5; sigmoid only
} dpo_loss_options;

typedef struct dpo_pair {
    double loss;
    double dlogp[2];            // d loss / d logp of the chosen and of the rejected answer
    double reward[2];           // beta * (policy - reference), summed log-ratios whatever the loss
} dpo_pair;

/* scores[2]: chosen and rejected under the policy; reference[2]: their logp under the reference. */
DPO_API dpo_pair dpo_pair_loss(const dpo_score *scores, const double *reference,
                               const dpo_loss_options *options);

/* Means over pairs; the standard error of the accuracy is clustered by prompt. */
typedef struct dpo_metrics {
    size_t n, ties;
    double loss, reward[2], accuracy, margin, logp[2];
    double accuracy_error;      // standard error; 0 for fewer than two prompts
} dpo_metrics;
/* The mean of values[n], one per example, and its standard error, clustered by prompt; 0 for fewer
   than two prompts. To compare two models on the same pairs, pass the differences of values. */
DPO_API int dpo_mean_error(dpo_context *context, double *mean, double *error, const double *values,
                           const dpo_example *examples, size_t n);
/* Over n examples of two branches: scores[2 n], reference[2 n]; margins[n] may be NULL. */
DPO_API int dpo_metrics_compute(dpo_context *context, dpo_metrics *metrics, double *margins,
                                const dpo_example *examples, const dpo_score *scores,
                                const double *reference, size_t n, const dpo_loss_options *options);

/* ---- 1.7 optimizer --------------------------------------------------------------------------- */

typedef enum { DPO_ADAMW, DPO_RMSPROP } dpo_optimizer_kind;
typedef enum { DPO_CONSTANT, DPO_LINEAR_DECAY, DPO_COSINE } dpo_schedule;
typedef struct dpo_optimizer {
    double beta1, beta2;        // AdamW's; RMSprop's alpha is beta2
    double epsilon, weight_decay;
    float *m, *v;               // [n_trainable], at each tensor's offset; m is NULL for RMSprop
    uint64_t step;              // updates done
} dpo_optimizer;

/* Defaults of the kind (AdamW 0.9, 0.999, 1e-8; RMSprop alpha 0.99, 1e-8; decay 0), zero state.
   Fails if nothing is trained: a frozen model's adapter comes first. */
DPO_API int dpo_optimizer_init(dpo_model *model, dpo_optimizer *optimizer, dpo_optimizer_kind kind);
DPO_API void dpo_optimizer_free(dpo_model *model, dpo_optimizer *optimizer);
/* The global L2 norm of the gradients; a tensor that is not finite is an error that names it. */
DPO_API int dpo_grad_norm(dpo_model *model, double *norm);
/* One update with gradients multiplied by `scale` (see dpo_clip_scale). */
DPO_API int dpo_optimizer_step(dpo_model *model, dpo_optimizer *optimizer, double learning_rate,
                               double scale);
/* torch's clip_grad_norm_: min(1, max_norm / (norm + 1e-6)); max_norm 0 is off. */
DPO_API double dpo_clip_scale(double norm, double max_norm);
/* Multiplier of the learning rate for update `step` (from 0) of `steps`. */
DPO_API double dpo_schedule_factor(dpo_schedule schedule, size_t step, size_t steps, size_t warmup);

/* ---- 1.8 reference cache and training state -------------------------------------------------- */

/* What a reference cache was made of; another of any of these has other log-probabilities. */
typedef struct dpo_reference_key {
    uint64_t model, adapter;    // identities; adapter 0: none
    uint64_t dtype;             // precision of the forward pass
    uint64_t data, truncation;  // hash of the examples; the lengths and the end they were cut to
} dpo_reference_key;

/* Log-probabilities of a data set's n branches under the reference model. */
DPO_API int dpo_reference_save(dpo_context *context, const char *path, const dpo_reference_key *key,
                               const double *logp, size_t n);
/* Fails, saying which part of the key differs, if the file was made of something else. */
DPO_API int dpo_reference_load(dpo_context *context, const char *path, const dpo_reference_key *key,
                               double *logp, size_t n);

/* Everything that training changes (weights or adapter, optimizer, counters), so that a run which
   loads it goes on bit for bit; `notes` are the caller's own bytes. `run` is a hash that tells runs
   apart: dpo_state_load refuses a state of another. Both need dpo_optimizer_init. */
DPO_API int dpo_state_save(dpo_model *model, const dpo_optimizer *optimizer, const char *path,
                           uint64_t run, const void *notes, size_t n_notes);
DPO_API int dpo_state_load(dpo_model *model, dpo_optimizer *optimizer, const char *path,
                           uint64_t run, dpo_string *notes);

/* ---- 1.9 memory plan ------------------------------------------------------------------------- */

typedef struct dpo_plan_options {
    dpo_model_options model;
    const dpo_file *file;           // the model's open file; NULL: the model is made anew
    dpo_lora lora;                  // r 0: none
    int train;                      // gradients and optimizer state too
    dpo_optimizer_kind optimizer;
    size_t max_rows, max_scored;    // of the largest micro-batch
    size_t kept_rows;               // of the largest that is trained on; 0: none is
    size_t max_span;                // rows of the longest prompt with one branch
    size_t max_positions;           // of dpo_generate, prompt and answer; 0: it is not called
    int n_threads;
} dpo_plan_options;
typedef struct dpo_memory {         // bytes
    size_t weights, gradients, optimizer, activations, head, cache, scratch;
    size_t heap;                    // the sum of these
    size_t mapped;                  // at most this much of the model's file besides
    size_t total;
    size_t params, trainable;       // numbers of elements: without adapters, and of what is trained
    size_t state_file;              // of dpo_state_save
} dpo_memory;
/* Enlarges max_rows, max_scored, max_span and, with `keep`, kept_rows to what n examples need in
   micro-batches of micro_rows. */
DPO_API void dpo_plan_passes(dpo_plan_options *options, const dpo_example *examples, size_t n,
                             size_t micro_rows, int keep);
/* What loading, dpo_forward, dpo_backward and the optimizer will take; computed, not measured. */
DPO_API int dpo_memory_plan(dpo_context *context, dpo_memory *memory, const dpo_config *config,
                            const dpo_plan_options *options);

/* ---- 1.10 generation ------------------------------------------------------------------------- */

typedef struct dpo_sampling {
    size_t max_new_tokens;
    double temperature;             // 0: greedy
    size_t top_k;                   // 0: off
    double top_p;                   // 1: off
    uint64_t seed;
    const char *const *stops; size_t n_stops;   // generation ends where one of these appears
} dpo_sampling;
/* Continues `prompt`; appends text (without the stop string or end token) to `out`. `on_text`, if
   not NULL, gets each piece as it becomes final. The answer ends where the context does; of a
   prompt that fills it, the last context_length - 1 tokens are read. */
DPO_API int dpo_generate(dpo_model *model, dpo_string *out, const uint32_t *prompt, size_t n_prompt,
                         const dpo_sampling *sampling,
                         void (*on_text)(void *user, const char *bytes, size_t n), void *user);

/* ---- 1.11 random numbers, fingerprints ------------------------------------------------------- */

/* Counter-based: the number depends on (seed, stream, index) only, so any part of a sequence can be
   had without the rest and threads need no state. */
DPO_API uint64_t dpo_random_u64(uint64_t seed, uint64_t stream, uint64_t index);
DPO_API double dpo_random_uniform(uint64_t seed, uint64_t stream, uint64_t index);  // [0, 1)
/* A fingerprint of bytes (64-bit FNV-1a), starting from DPO_HASH_START or from another's. */
#define DPO_HASH_START 0xcbf29ce484222325u
DPO_API uint64_t dpo_hash(uint64_t hash, const void *data, size_t n_bytes);

#ifdef __cplusplus
}
#endif
#endif /* DPO_H */
/* ================================================================================================
   2. GROUND

   What everything else stands on: error messages, checked sizes and memory, random numbers, the
   parallel loop, and sums in a fixed order.
   ============================================================================================= */
#if defined(DPO_IMPLEMENTATION) && !defined(DPOI_IMPLEMENTED)
#define DPOI_IMPLEMENTED    // including the header again changes nothing

#ifdef __cplusplus
#error "dpo.h: DPO_IMPLEMENTATION belongs in a C file of its own, compiled with -std=gnu11"
#elif defined(__STRICT_ANSI__)
#error "dpo.h: the implementation needs POSIX and GNU C; compile this file with -std=gnu11"
#endif
#ifdef __FAST_MATH__
#error "dpo.h: -ffast-math (or -Ofast) reorders sums and loses NaNs; compile with -O3 without it"
#endif

#include <errno.h>
#include <fcntl.h>
#include <float.h>
#include <locale.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__SSE2__) && !defined(DPO_PLAIN_C)
#include <emmintrin.h>
#define DPOI_STORES_PAST_CACHES
#endif
#ifdef __AVX512BF16__
#include <immintrin.h>
// Clang before 16 defines the second. Plain loops have no units of two bf16, and so no AMX.
#if defined(__linux__) && (defined(__AMX_BF16__) || defined(__AMXBF16__)) && !defined(DPO_PLAIN_C)
#include <sys/syscall.h>
#define DPOI_AMX
#endif
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#include <arm_neon.h>
#endif

/* gcc prefers vectors of 256 bits on Intel's CPUs that have 512, because the first of them slowed
   down for those. With 512 an update takes 4 per cent less time in fp32, and 10 in bf16. */
#if defined(__AVX512F__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC target("prefer-vector-width=512")
#endif

#if !defined(__BYTE_ORDER__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "dpo.h: model files are little-endian and are mapped as they are; so must the machine be"
#endif
_Static_assert(sizeof(size_t) == 8 && sizeof(off_t) == 8, "dpo.h: files are larger than 4 GB");
/* FLT_EVAL_METHOD is 16 where the CPU computes with _Float16 too: float stays float. */
_Static_assert(sizeof(float) == 4 && sizeof(double) == 8 && FLT_MANT_DIG == 24 &&
               DBL_MANT_DIG == 53 && (FLT_EVAL_METHOD == 0 || FLT_EVAL_METHOD == 16),
               "dpo.h: IEEE arithmetic, done as it is written");

/* Compile-time option: DPO_MALLOC and DPO_FREE replace libc's, both or none. */
#if !defined(DPO_MALLOC) && !defined(DPO_FREE)
#define DPO_MALLOC(bytes) malloc(bytes)
#define DPO_FREE(pointer) free(pointer)
#elif !defined(DPO_MALLOC) || !defined(DPO_FREE)
#error "dpo.h: define both DPO_MALLOC and DPO_FREE, or neither"
#endif

#define DPOI_MIN(a, b) ((a) < (b) ? (a) : (b))
#define DPOI_MAX(a, b) ((a) > (b) ? (a) : (b))

/* ---- 2.1 errors ------------------------------------------------------------------------------ */

/* Records the reason and returns nonzero, so that a check is one line:
   `if (bad) return dpoi_fail(context, "%s: ...", path);` */
__attribute__((format(printf, 2, 3)))
static int dpoi_fail(dpo_context *context, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(context->error, sizeof context->error, format, arguments);
    va_end(arguments);
    return 1;
}

/* Puts "where: " in front of the message of a failure further down. */
static int dpoi_fail_at(dpo_context *context, const char *where)
{
    char reason[sizeof context->error];
    memcpy(reason, context->error, sizeof reason);
    return dpoi_fail(context, "%s: %s", where, reason);
}

/* ---- 2.2 memory ------------------------------------------------------------------------------ */

/* A block remembers its size in front of itself, so that the context can account for what is
   freed, and so that a resize knows how much to keep. 64 bytes keep the data aligned to a cache
   line, which is also the widest vector. */
#define DPOI_ALIGN 64
typedef struct dpoi_block { void *base; size_t bytes; } dpoi_block;

static int dpoi_multiply(size_t *product, size_t a, size_t b)
{
    return __builtin_mul_overflow(a, b, product);
}

static void dpoi_free(dpo_context *context, void *pointer)
{
    if (!pointer) return;
    dpoi_block block;
    memcpy(&block, (char *)pointer - DPOI_ALIGN, sizeof block);
    context->heap_bytes -= block.bytes;
    DPO_FREE(block.base);
}

/* Gives the kernel `advice` (madvise) on the pages, of `page` bytes, that lie wholly in here. */
static void dpoi_advise(void *start, size_t n_bytes, size_t page, int advice)
{
    const uintptr_t from = ((uintptr_t)start + page - 1) / page * page;
    const uintptr_t to = ((uintptr_t)start + n_bytes) / page * page;
    if (to > from) madvise((void *)from, to - from, advice);
}

/* Allocates count * size bytes, not cleared. `pointer` is the address of a pointer of any type. */
static int dpoi_alloc(dpo_context *context, void *pointer, size_t count, size_t size)
{
    size_t bytes, total;
    void *result = NULL;
    memcpy(pointer, &result, sizeof result);
    if (dpoi_multiply(&bytes, count, size) ||
        __builtin_add_overflow(bytes, (size_t)(2 * DPOI_ALIGN), &total))
        return dpoi_fail(context, "out of memory: %zu elements of %zu bytes overflow a size", count,
                         size);
    dpoi_block block = { DPO_MALLOC(total), bytes };
    if (!block.base)
        return dpoi_fail(context, "out of memory: could not allocate %.1f MB on top of %.1f MB; "
                         "use a smaller model, --max-length or --micro-tokens", (double)bytes / 1e6,
                         (double)context->heap_bytes / 1e6);
    char *start = (char *)block.base + DPOI_ALIGN;
    start += (DPOI_ALIGN - (uintptr_t)start % DPOI_ALIGN) % DPOI_ALIGN;
    memcpy(start - DPOI_ALIGN, &block, sizeof block);
#ifdef MADV_HUGEPAGE // pages of 2 MB instead of 4 KB where they are filled: fewer TLB misses
    dpoi_advise(start, bytes, 1 << 21, MADV_HUGEPAGE);
#endif
    context->heap_bytes += bytes;
    context->heap_peak = DPOI_MAX(context->heap_peak, context->heap_bytes);
    result = start;
    memcpy(pointer, &result, sizeof result);
    return 0;
}

static int dpoi_alloc_zeroed(dpo_context *context, void *pointer, size_t count, size_t size)
{
    if (dpoi_alloc(context, pointer, count, size)) return 1;
    void *result;
    memcpy(&result, pointer, sizeof result);
    memset(result, 0, count * size);
    return 0;
}

/* Makes room in an array for n elements in all, growing by half so that appends stay cheap. */
static int dpoi_reserve(dpo_context *context, void *pointer, size_t *capacity, size_t n,
                        size_t size)
{
    if (n <= *capacity) return 0;
    size_t wanted = DPOI_MAX(n, DPOI_MAX(*capacity + *capacity / 2, (size_t)16));
    void *old, *grown;
    memcpy(&old, pointer, sizeof old);
    if (dpoi_alloc(context, &grown, wanted, size)) return 1;
    if (old) memcpy(grown, old, *capacity * size);
    dpoi_free(context, old);
    memcpy(pointer, &grown, sizeof grown);
    *capacity = wanted;
    return 0;
}

static int dpoi_string_append(dpo_context *context, dpo_string *string, const char *bytes, size_t n)
{
    if (dpoi_reserve(context, &string->bytes, &string->capacity, string->n + n, 1)) return 1;
    if (n) memcpy(string->bytes + string->n, bytes, n);
    string->n += n;
    return 0;
}

static int dpoi_tokens_append(dpo_context *context, dpo_tokens *tokens, uint32_t id)
{
    if (dpoi_reserve(context, &tokens->ids, &tokens->capacity, tokens->n + 1, sizeof id)) return 1;
    tokens->ids[tokens->n++] = id;
    return 0;
}

DPO_API void dpo_tokens_free(dpo_context *context, dpo_tokens *tokens)
{
    dpoi_free(context, tokens->ids);
    *tokens = (dpo_tokens){ 0 };
}

DPO_API void dpo_string_free(dpo_context *context, dpo_string *string)
{
    dpoi_free(context, string->bytes);
    *string = (dpo_string){ 0 };
}

DPO_API uint64_t dpo_hash(uint64_t hash, const void *data, size_t n_bytes)
{
    const unsigned char *bytes = data;
    for (size_t i = 0; i < n_bytes; i++) hash = (hash ^ bytes[i]) * 0x100000001b3u;
    return hash;
}

/* ---- 2.3 random numbers ---------------------------------------------------------------------- */

/* SplitMix64's finaliser (Steele, Lea, Flood, OOPSLA 2014): a bijection that scatters every bit. */
static uint64_t dpoi_scatter(uint64_t x)
{
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

DPO_API uint64_t dpo_random_u64(uint64_t seed, uint64_t stream, uint64_t index)
{
    uint64_t key = dpoi_scatter(dpoi_scatter(seed + 0x9e3779b97f4a7c15u) ^ stream);
    return dpoi_scatter(key + (index + 1) * 0x9e3779b97f4a7c15u);
}

DPO_API double dpo_random_uniform(uint64_t seed, uint64_t stream, uint64_t index)
{
    return (double)(dpo_random_u64(seed, stream, index) >> 11) * 0x1p-53;
}

/* Streams under one seed that must not repeat each other's numbers; the weights of tensor k of a
   new model are stream k. */
enum {
    DPOI_STREAM_SHUFFLE = 1 << 20, DPOI_STREAM_SAMPLING, DPOI_STREAM_PASS, DPOI_STREAM_UPDATE
};

/* A standard normal number by Box and Muller's transform. */
static double dpoi_random_normal(uint64_t seed, uint64_t stream, uint64_t index)
{
    double radius = sqrt(-2.0 * log(1.0 - dpo_random_uniform(seed, stream, 2 * index)));
    return radius * cos(6.283185307179586 * dpo_random_uniform(seed, stream, 2 * index + 1));
}

/* ---- 2.4 the parallel loop ------------------------------------------------------------------- */

/* `DPOI_PARALLEL_FOR(threads) for (...)` shares the iterations out among the threads, each
   iteration whole: for few and heavy ones. DPOI_PARALLEL_ROWS is for many light ones.
   DPOI_PARALLEL_PIECES is for the pieces of an array: a thread takes many in a row, which the CPU
   prefetches, and towards the end one by one. Results cannot depend on which thread runs what: an
   iteration writes only what is its own, and no sum is ever split between threads. */
#ifdef _OPENMP
#define DPOI_PRAGMA(text) _Pragma(#text)
#define DPOI_PARALLEL_FOR(threads) \
    DPOI_PRAGMA(omp parallel for schedule(dynamic, 1) num_threads(threads))
#define DPOI_PARALLEL_ROWS(threads) \
    DPOI_PRAGMA(omp parallel for schedule(dynamic, 16) num_threads(threads))
#define DPOI_PARALLEL_PIECES(threads) \
    DPOI_PRAGMA(omp parallel for schedule(guided) num_threads(threads))
static int dpoi_thread_index(void) { return omp_get_thread_num(); }
#else
#define DPOI_PARALLEL_FOR(threads) (void)(threads);
#define DPOI_PARALLEL_ROWS(threads) (void)(threads);
#define DPOI_PARALLEL_PIECES(threads) (void)(threads);
static int dpoi_thread_index(void) { return 0; }
#endif

/* Elements of such a piece. Two buffers of as many floats must fit the stack of a thread, which is
   128 KB with musl. */
#define DPOI_PIECE 8192

/* How many threads `work` elementary operations are worth: starting and joining threads takes
   microseconds, and far longer when something else wants the cores. */
#ifndef DPOI_SERIAL_WORK
#define DPOI_SERIAL_WORK 32768
#endif
static int dpoi_threads(const dpo_context *context, size_t work)
{
    return work > DPOI_SERIAL_WORK ? context->n_threads : 1;
}

/* Adds the time since the last call to that of `operation`: one call after each operation measures
   them all, and leaves nothing out. */
static void dpoi_lap(const dpo_context *context, dpo_operation operation, double flops,
                     double bytes)
{
    dpo_profile *profile = context->profile;
    struct timespec t;
    if (!profile || clock_gettime(CLOCK_MONOTONIC, &t)) return;
    const double now = (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
    if (profile->last > 0) profile->seconds[operation] += now - profile->last;
    profile->last = now;
    profile->flops[operation] += flops;
    profile->bytes[operation] += bytes;
}

/* ---- 2.5 exp, erf, tanh, sigmoid ------------------------------------------------------------- */

/* Softmax and activations call these for every element, so loops over them must become vector code
   with gcc and with clang: no branches, no tables, no calls, and nothing that needs -ffast-math.
   The C library's are calls, many times slower, and their last bits depend on its version. NaN
   gives NaN. The errors stated are the largest over all floats, with and without FMAs, in ulps
   (distances between neighbouring floats), against libm's double functions. The polynomials are
   minimax fits by Remez's exchange, weighted by the error of the result; each coefficient in turn,
   lowest first, is rounded to float, and the rest are fitted again. */

/* exp(x) = 2^n exp(r) with n the integer nearest x / log 2, so |r| <= log(2) / 2 = 0.3466. Returns
   exp(r) - 1 = r + r^2 P(r), P off by 3e-9 of exp(r), and n + 256 in *n, for |x| < 150. Adding
   1.5 * 2^23 (0x4B400000 as bits) rounds to an integer, which then is in the sum's low bits. log 2
   is subtracted in two parts, the first of which has so few bits that n times it is exact. */
static inline float dpoi_exp_parts(float x, uint32_t *n)
{
    float shifted = x * 1.44269504f + 12582912.0f, whole = shifted - 12582912.0f;
    float r = x - whole * 0.693359375f;
    r = r + whole * 2.12194440e-4f;
    float p = 1.38379959e-3f;
    p = p * r + 8.36916547e-3f;
    p = p * r + 4.16681021e-2f;
    p = p * r + 0.166665167f;
    p = p * r + 0.49999994f;
    memcpy(n, &shifted, sizeof *n);
    *n = *n - 0x4B400000u + 256;
    return r + r * r * p;
}

/* 2^(n - 256) for n - 256 in [-126, 127] */
static inline float dpoi_power_of_two(uint32_t n)
{
    uint32_t bits = (n - 256 + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return power;
}

/* At most 1.02 ulp, results below 2^-126 included; exactly 0 below -104, infinity above 88.7229.
   The power is applied in two halves: 2^-150 and 2^128 are not floats, and the one rounding that a
   subnormal result needs happens in the last product. */
static inline float dpoi_exp(float x)
{
    x = x < -104.0f ? -104.0f : x;
    x = x > 89.0f ? 89.0f : x;
    uint32_t n;
    float p = 1.0f + dpoi_exp_parts(x, &n), half = dpoi_power_of_two(n / 2 + 128);
    return p * half * dpoi_power_of_two(n - n / 2 + 128);
}

/* tanh(x) = (e - 1) / (e + 1) with e = exp(2x). e - 1 = 2^n (exp(r) - 1) + (2^n - 1) loses nothing
   to cancellation: near 0, n is 0. At most 2.7 ulp. */
static inline float dpoi_tanh(float x)
{
    x = x < -10.0f ? -10.0f : x;
    x = x > 10.0f ? 10.0f : x;
    uint32_t n;
    float p = dpoi_exp_parts(2.0f * x, &n), scale = dpoi_power_of_two(n);
    float e_minus_1 = scale * p + (scale - 1.0f);
    return e_minus_1 / (e_minus_1 + 2.0f);
}

/* 1 / (1 + exp(-x)), as exp(x) / (1 + exp(x)) for negative x, so that the small values on that side
   keep their digits. At most 2.5 ulp. */
static inline float dpoi_sigmoid(float x)
{
    float e = dpoi_exp(x < 0.0f ? x : -x);
    return (x < 0.0f ? e : 1.0f) / (1.0f + e);
}

/* Error function: x + x Q(x^2) for |x| < 1, Q off by 2e-9; 1 - exp(-R(|x|)) with the sign of x
   from there to 3.95, where the result is 1, R off by 1e-9 of it. At most 1.4 ulp. */
static inline float dpoi_erf(float x)
{
    float a = x < 0.0f ? -x : x, z = x * x;
    a = a > 3.95f ? 3.95f : a;
    float q = 7.80690316e-5f;
    q = q * z - 7.9978531e-4f;
    q = q * z + 5.1871622e-3f;
    q = q * z - 2.68533472e-2f;
    q = q * z + 0.112835787f;
    q = q * z - 0.37612626f;
    q = q * z + 0.128379166f;
    float r = -1.86372563e-4f;
    r = r * a + 2.9475959e-3f;
    r = r * a - 2.1837838e-2f;
    r = r * a + 0.10310635f;
    r = r * a + 0.638145208f;
    r = r * a + 1.12708902f;
    r = r * a + 3.41548526e-4f;
    float far = 1.0f - dpoi_exp(-r);
    far = x < 0.0f ? -far : far;
    return a < 1.0f ? x + x * q : far;
}

/* ---- 2.6 bf16 and f16 ------------------------------------------------------------------------ */

/* A bf16 is the upper half of a float: its sign, its exponent, and 7 bits of its fraction. */
static inline float dpoi_bf16_to_float(uint16_t half)
{
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* The nearest bf16, of two that are as near the even one; a NaN stays one. */
static inline uint16_t dpoi_bf16(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    uint32_t rounded = bits + 0x7fff + (bits >> 16 & 1);
    return (uint16_t)(((bits & 0x7fffffff) > 0x7f800000 ? bits | 0x400000 : rounded) >> 16);
}

/* Stochastic rounding: one of the two bf16 around x by chance, the nearer one with the higher
   probability, so that the mean is x. Many small changes add up, where rounding to nearest would
   lose every one of them. */
static inline uint16_t dpoi_bf16_stochastic(float x, uint64_t key, uint64_t index)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    uint32_t chance = (uint32_t)(dpoi_scatter(key + index * 0x9e3779b97f4a7c15u) >> 48);
    uint32_t special = (bits & 0x7fffffff) > 0x7f800000 ? bits | 0x400000 : bits; // a NaN stays one
    uint32_t rounded = (bits & 0x7f800000) == 0x7f800000 ? special : bits + chance;
    return (uint16_t)(rounded >> 16);
}

static size_t dpoi_dtype_bytes(dpo_dtype dtype)
{
    switch (dtype) {
    case DPO_F32: case DPO_U32: return 4;
    case DPO_F16: case DPO_BF16: return 2;
    case DPO_U8: return 1;
    case DPO_F64: case DPO_U64: return 8;
    }
    return 0;
}

/* IEEE half to float. The exponents' biases differ by 112, and multiplying by 2^112 also turns
   half's subnormals into normal floats; infinities and NaN get float's largest exponent. */
static float dpoi_half_to_float(uint16_t half)
{
    uint32_t bits = (uint32_t)(half & 0x7fff) << 13;
    float value;
    memcpy(&value, &bits, sizeof value);
    value *= 0x1p112f;
    memcpy(&bits, &value, sizeof bits);
    bits |= (half & 0x7c00) == 0x7c00 ? 0x7f800000u : 0;
    bits |= (uint32_t)(half & 0x8000) << 16;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* x[n] as floats, from fp32, bf16 or f16; and back to fp32 or the nearest bf16. */
static void dpoi_widen(float *out, const void *x, dpo_dtype dtype, size_t n)
{
    const uint16_t *half = x;
    if (dtype == DPO_F32) memcpy(out, x, n * sizeof *out);
    else if (dtype == DPO_F16)
        for (size_t i = 0; i < n; i++) out[i] = dpoi_half_to_float(half[i]);
    else
        for (size_t i = 0; i < n; i++) out[i] = dpoi_bf16_to_float(half[i]);
}

static void dpoi_narrow(void *out, dpo_dtype dtype, const float *x, size_t n)
{
    uint16_t *half = out;
    if (dtype == DPO_F32) memcpy(out, x, n * sizeof *x);
    else for (size_t i = 0; i < n; i++) half[i] = dpoi_bf16(x[i]);
}

/* ---- 2.7 sums in a fixed order --------------------------------------------------------------- */

/* A float sum depends on its order. Sixteen running sums, element i in lane i % 16, then a tree
   over the lanes: the same order on every machine, and one that vector units like. */
#define DPOI_SUM_LANES 16

static float dpoi_lanes_sum(float *lane /* [n], destroyed */, size_t n)
{
    for (size_t half = n / 2; half > 0; half /= 2)
        for (size_t i = 0; i < half; i++) lane[i] += lane[i + half];
    return lane[0];
}

static float dpoi_sum(const float *x, size_t n)
{
    float lane[DPOI_SUM_LANES] = { 0 };
    size_t whole = n - n % DPOI_SUM_LANES;
    for (size_t i = 0; i < whole; i += DPOI_SUM_LANES)
        for (size_t j = 0; j < DPOI_SUM_LANES; j++) lane[j] += x[i + j];
    for (size_t i = whole; i < n; i++) lane[i - whole] += x[i];
    return dpoi_lanes_sum(lane, DPOI_SUM_LANES);
}

/* Sum of x[i] * (y[i] - mean): subtracting first keeps what a difference of sums would cancel. */
static float dpoi_dot_centred(const float *x, const float *y, float mean, size_t n)
{
    float lane[DPOI_SUM_LANES] = { 0 };
    size_t whole = n - n % DPOI_SUM_LANES;
    for (size_t i = 0; i < whole; i += DPOI_SUM_LANES)
        for (size_t j = 0; j < DPOI_SUM_LANES; j++) lane[j] += x[i + j] * (y[i + j] - mean);
    for (size_t i = whole; i < n; i++) lane[i - whole] += x[i] * (y[i] - mean);
    return dpoi_lanes_sum(lane, DPOI_SUM_LANES);
}

static float dpoi_dot(const float *x, const float *y, size_t n)
{
    return dpoi_dot_centred(x, y, 0.0f, n);
}

/* For generation only, which reads each weight once: four times the lanes, because memory delivers
   bf16 faster than additions that wait for each other take them. */
static float dpoi_dot_bf16(const float *x, const uint16_t *y, size_t n)
{
    enum { LANES = 4 * DPOI_SUM_LANES };
    float lane[LANES] = { 0 };
    size_t whole = n - n % LANES;
    for (size_t i = 0; i < whole; i += LANES)
        for (size_t j = 0; j < LANES; j++) lane[j] += x[i + j] * dpoi_bf16_to_float(y[i + j]);
    for (size_t i = whole; i < n; i++) lane[i - whole] += x[i] * dpoi_bf16_to_float(y[i]);
    return dpoi_lanes_sum(lane, LANES);
}

static float dpoi_max(const float *x, size_t n)
{
    float lane[DPOI_SUM_LANES];
    for (size_t j = 0; j < DPOI_SUM_LANES; j++) lane[j] = -INFINITY;
    size_t whole = n - n % DPOI_SUM_LANES;
    for (size_t i = 0; i < whole; i += DPOI_SUM_LANES)
        for (size_t j = 0; j < DPOI_SUM_LANES; j++) lane[j] = DPOI_MAX(lane[j], x[i + j]);
    for (size_t i = whole; i < n; i++) lane[i - whole] = DPOI_MAX(lane[i - whole], x[i]);
    for (size_t j = 1; j < DPOI_SUM_LANES; j++) lane[0] = DPOI_MAX(lane[0], lane[j]);
    return lane[0];
}

/* ================================================================================================
   3. MATMUL

   Nearly all the time of training goes into c[m, n] = a[m, k] b[k, n], in the three forms that a
   linear layer with W[out, in] needs:

       y[R, out]   =  x  W^T + b  forward; both operands lie along k
       dx[R, in]   =  dy W        a lies along k, b across it
       dW[out, in] += dy^T x      both lie across k

   An operand carries its strides, so one function does them all, and Conv1D's W[in, out] too. The
   reference below is the definition, at one per cent of the speed of the machine: for each
   multiplication it loads two numbers, and each addition waits for the one before. Four ideas make
   it 70 to 90 per cent, with 512 rows or more.

   The tile. A core starts one or two vector fused multiply-adds (FMA) in a cycle, and each takes
   four or five: some ten sums must be under way at once. So a tile of c, TILE_ROWS rows of
   TILE_VECS vectors, stays in registers while k runs. A step along k loads TILE_VECS vectors of b
   and TILE_ROWS numbers of a, one at a time, for TILE_ROWS x TILE_VECS FMAs: a small or narrow
   tile would wait for its loads. Hence the largest that the registers hold beside the vectors of b
   and the number of a, and no wider than needed to make loads fewer than FMAs:

                 registers        tile         sums + b + a    loads and FMAs in a step
       AVX-512   32 of 16 floats  14 x 2 vec   28 + 2 + 1      16   28
       AVX2      16 of 8 floats    6 x 2 vec   12 + 2 + 1       8   12
       NEON      32 of 4 floats    8 x 3 vec   24 + 3 + 2       5   24

   (NEON multiplies by one lane of a vector: a's eight numbers are two loads.)

   Packing. The tile wants what it loads in one step side by side. So the operands are copied into
   panels first, a's [k, TILE_ROWS] and b's [k, TILE_COLS], filled up with zeros at the edges.
   Packing is the only place that knows how the operands are stored.

   Blocking. k is cut into blocks of BLOCK_K, n into strips. A strip's panels of b for one block of
   k, 1 KB per column, take half of the L2 cache (of 512 KB if that is unknown or smaller), at most
   BLOCK_COLS columns, and stay there while the rows of a pass by: a panel of a is packed (6 KB, 8
   with NEON, 14 with AVX-512), stays in the L1 cache while it meets the strip's panels of b, and is
   done with. Meanwhile the rows of a that come next are prefetched into L2, so that packing them
   does not wait for memory; b's are prefetched while those before them are packed, since beside the
   tiles, which read L2, that would cost as much as it saves. (Where a lies across k, some of its
   panels are packed at once, since a cache line has numbers for several. AMX's tiles take two
   panels of a, and are too fast to prefetch beside them.)

   Threads share out c, strips of columns and pieces of rows, never the sum along k, and each packs
   for itself: a again for each strip, b again for each piece. That is 1 / (columns of a strip) +
   1 / (rows of a piece) copies for each FMA, 4 to 10 per cent of the time. But no thread waits for
   another before the end, and no panel travels from one core's cache to another's.

   The order of sums, in fp32: for each block of k in ascending order, a sum of a[i][l] b[l][j] for
   ascending l starts from zero, by FMAs if the CPU has them, and is added to c[i][j]; the first one
   takes bias[j], if there is a bias, and replaces c[i][j] unless `accumulate`. So the bits of
   c[i][j] depend only on row i of a, column j of b, k, and what is added, in bf16 too: not on m, n,
   place, edges, storage order or threads.

   bf16. A product `as` DPO_BF16 takes its inputs rounded to bf16 and sums in fp32. CPUs that have a
   dot product for bf16 multiply two of them, neighbours along k, where an FMA multiplies one float:
   their panels hold units of two bf16, which are as large as a float, so that tile, panels and
   blocking stay as they are and only the innermost line differs. With AMX, one instruction does
   half a tile of c for 16 such units of k. For other CPUs the panels hold the rounded numbers as
   floats. The products of normal numbers are the same everywhere; they are added in another order.
   ============================================================================================= */

/* ---- 3.1 the reference ----------------------------------------------------------------------- */

typedef struct {
    const void *data;
    size_t row_stride, col_stride;  // element (i, j) is data[i * row_stride + j * col_stride];
    dpo_dtype dtype;                // one stride is 1. DPO_F32 or DPO_BF16
} dpoi_matrix;

/* Rows of floats that lie one after the other. */
static inline dpoi_matrix dpoi_rows(const float *x, size_t columns)
{
    return (dpoi_matrix){ x, columns, 1, DPO_F32 };
}

static inline dpoi_matrix dpoi_transposed(dpoi_matrix x)
{
    return (dpoi_matrix){ x.data, x.col_stride, x.row_stride, x.dtype };
}

/* x from row i and column j on. */
static inline dpoi_matrix dpoi_submatrix(dpoi_matrix x, size_t i, size_t j)
{
    size_t place = i * x.row_stride + j * x.col_stride;
    x.data = (const char *)x.data + place * (x.dtype == DPO_BF16 ? 2 : 4);
    return x;
}

/* Element (i, j), as a product `as` that type takes it. */
static inline float dpoi_element(dpoi_matrix x, size_t i, size_t j, dpo_dtype as)
{
    float value;
    dpoi_widen(&value, dpoi_submatrix(x, i, j).data, x.dtype, 1);
    return as == DPO_BF16 ? dpoi_bf16_to_float(dpoi_bf16(value)) : value;
}

/* c[m, n] = (accumulate ? c : 0) + a[m, k] b[k, n] + bias[n] in every row, or no bias if it is
   NULL; row i of c starts at c + i * ldc. The tests compare dpoi_matmul_bias with it. */
static inline void dpoi_matmul_reference(float *c, size_t ldc, dpoi_matrix a, dpoi_matrix b,
                                         const float *bias, size_t m, size_t n, size_t k,
                                         int accumulate, dpo_dtype as)
{
    for (size_t i = 0; i < m; i++)
        for (size_t j = 0; j < n; j++) {
            double sum = (accumulate ? c[i * ldc + j] : 0.0) + (bias ? (double)bias[j] : 0.0);
            for (size_t l = 0; l < k; l++)
                sum += (double)dpoi_element(a, i, l, as) * dpoi_element(b, l, j, as);
            c[i * ldc + j] = (float)sum;
        }
}

/* ---- 3.2 the tile ---------------------------------------------------------------------------- */

/* SHORT_ROWS: a second, lower tile for the last rows, so that 64 rows do not cost as many as
   70 with AVX-512, or 66 with AVX2. */
#if defined(__AVX512F__)
enum { DPOI_LANES = 16, DPOI_TILE_VECS = 2, DPOI_TILE_ROWS = 14, DPOI_SHORT_ROWS = 8 };
#elif defined(__AVX__)
enum { DPOI_LANES = 8, DPOI_TILE_VECS = 2, DPOI_TILE_ROWS = 6, DPOI_SHORT_ROWS = 4 };
#elif defined(__aarch64__)
enum { DPOI_LANES = 4, DPOI_TILE_VECS = 3, DPOI_TILE_ROWS = 8, DPOI_SHORT_ROWS = 4 };
#else
enum { DPOI_LANES = 4, DPOI_TILE_VECS = 2, DPOI_TILE_ROWS = 6, DPOI_SHORT_ROWS = 4 };
#endif
enum {
    DPOI_TILE_COLS = DPOI_TILE_VECS * DPOI_LANES,
    DPOI_BLOCK_K = 256,
    DPOI_BLOCK_COLS = 1024 / DPOI_TILE_COLS * DPOI_TILE_COLS, // at most
    DPOI_BLOCK_ROWS = 96 / DPOI_TILE_ROWS * DPOI_TILE_ROWS,   // packed at once if they lie across k
    DPOI_LINE = 16,                 // floats in a cache line
    DPOI_A_PANEL = DPOI_TILE_ROWS * DPOI_BLOCK_K + DPOI_LINE,
    DPOI_B_PANEL = DPOI_TILE_COLS * DPOI_BLOCK_K + DPOI_LINE,
    DPOI_B_FLOATS = DPOI_BLOCK_COLS / DPOI_TILE_COLS * DPOI_B_PANEL,
    DPOI_PACK_FLOATS = DPOI_B_FLOATS + DPOI_BLOCK_ROWS / DPOI_TILE_ROWS * DPOI_A_PANEL
};

#ifdef DPOI_AMX
static int dpoi_amx;    // whether the kernel gives AMX to this process; dpo_context_init asks
#else
enum { dpoi_amx = 0 };
#endif

/* From one panel to the next: a cache line more than its size, which is often a multiple of 2 KB,
   and then the same line of many panels would fall into the same set of the L1 cache. */
static inline size_t dpoi_panel_floats(size_t width, size_t units)
{
    return width * units + DPOI_LINE;
}

/* The compiler's vector extension says "these lanes together" without naming an instruction set.
   Option DPO_PLAIN_C: plain loops instead. */
#ifndef DPO_PLAIN_C
#define DPOI_INLINE static inline __attribute__((always_inline))
#define DPOI_NOINLINE static __attribute__((noinline))
typedef float dpoi_vec __attribute__((vector_size(DPOI_LANES * sizeof(float))));
typedef dpoi_vec dpoi_vec_at __attribute__((aligned(4), may_alias)); // at any float's address
typedef float dpoi_four __attribute__((vector_size(16)));
typedef dpoi_four dpoi_four_at __attribute__((aligned(4), may_alias));
#ifdef __clang__
#define DPOI_UNROLL _Pragma("unroll")
#define DPOI_FEW_STEPS _Pragma("nounroll") // two at a time would run out of registers
#define DPOI_SHUFFLE(x, y, i, j, k, l) __builtin_shufflevector(x, y, i, j, k, l)
#else
#define DPOI_UNROLL _Pragma("GCC unroll 16")
#define DPOI_FEW_STEPS _Pragma("GCC unroll 4") // less counting
typedef int dpoi_four_ints __attribute__((vector_size(16)));
#define DPOI_SHUFFLE(x, y, i, j, k, l) __builtin_shuffle(x, y, (dpoi_four_ints){ i, j, k, l })
/* a * b + c must become one FMA. gcc does that by default but not under -ffp-contract=off, and
   ignores the standard's pragma; clang obeys that one, below. */
#pragma GCC push_options
#pragma GCC optimize("fp-contract=fast")
#endif

#ifdef __AVX512BF16__
#define DPOI_UNIT_BF16 2     // bf16 in a unit of a panel
/* sum + a * b with the unit a in every lane of b's units. */
DPOI_INLINE dpoi_vec dpoi_dot_pairs(dpoi_vec sum, float a, dpoi_vec b)
{
    return (dpoi_vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_ps(a), (__m512bh)b);
}
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define DPOI_UNIT_BF16 2
DPOI_INLINE dpoi_vec dpoi_dot_pairs(dpoi_vec sum, float a, dpoi_vec b)
{
    return (dpoi_vec)vbfdotq_f32((float32x4_t)sum, (bfloat16x8_t)vdupq_n_f32(a), (bfloat16x8_t)b);
}
#else
#define DPOI_UNIT_BF16 1
DPOI_INLINE dpoi_vec dpoi_dot_pairs(dpoi_vec sum, float a, dpoi_vec b) { return sum + a * b; }
#endif

/* AMX, of Intel's servers, multiplies up to 16 rows of 16 units by 16 units of 16 columns in one
   instruction: some ten times as fast as FMAs of fp32, while the bf16 dot product of the same CPUs
   is half as fast as those. Its panel of a has the units of a row side by side, a line at a time:
   [k / 16, TILE_ROWS, 16]. The panel of b is as ever. */
#ifdef DPOI_AMX
/* Eight registers of rows of 64 bytes: 0 to 3 have sums, 4 and 5 units of a, 6 and 7 units of b. */
static inline void dpoi_amx_begin(void)
{
    enum { M = DPOI_TILE_ROWS };
    static const struct {
        uint8_t palette, unused[15];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } registers = { 1, { 0 }, { 64, 64, 64, 64, 64, 64, 64, 64 }, { M, M, M, M, M, M, 16, 16 } };
    _tile_loadconfig(&registers);
}

/* sum[TILE_ROWS, TILE_COLS] = a panel times b panel, each of k units, and with `two` the next
   TILE_ROWS rows from the panel of a that begins a_stride floats further. One product takes 52
   cycles, but one begins every 14: four sums keep the unit busy, and two panels of a share what is
   loaded of b, which comes from L2. */
static inline void dpoi_amx_tile(float *sum, const float *a, size_t a_stride, const float *b,
                                 size_t k, int two)
{
    enum { ROW = DPOI_TILE_COLS * sizeof(float), A = DPOI_TILE_ROWS * DPOI_LINE,
           B = DPOI_TILE_COLS * DPOI_LINE, BELOW = DPOI_TILE_ROWS * DPOI_TILE_COLS };
    __atomic_signal_fence(__ATOMIC_SEQ_CST); // gcc does not know that _tile_loadd reads memory
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (size_t l = 0; l < k; l += DPOI_LINE, a += A, b += B) {
        _tile_loadd(4, a, 64);
        _tile_loadd(6, b, ROW);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, b + DPOI_LINE, ROW);
        _tile_dpbf16ps(1, 4, 7);
        if (!two) continue;
        _tile_loadd(5, a + a_stride, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sum, ROW);
    _tile_stored(1, sum + DPOI_LINE, ROW);
    if (!two) return;
    _tile_stored(2, sum + BELOW, ROW);
    _tile_stored(3, sum + BELOW + DPOI_LINE, ROW);
}

/* What dpoi_tile_copy of 3.4 does, for whole tiles, which are most, by whole vectors. With gcc's
   code for that loop, even when its ends are constant, products take up to a fifth longer. */
static inline void dpoi_amx_copy(float *c, size_t ldc, const float *sum /* [rows, TILE_COLS] */,
                                 const float *bias /* [TILE_COLS] or NULL */, int add, size_t rows)
{
    for (size_t i = 0; i < rows; i++)
        for (int j = 0; j < DPOI_TILE_VECS; j++) {
            dpoi_vec x = ((const dpoi_vec_at *)(sum + i * DPOI_TILE_COLS))[j];
            dpoi_vec_at *c_vec = (dpoi_vec_at *)(c + i * ldc) + j;
            if (bias) x += ((const dpoi_vec_at *)bias)[j];
            if (add) x += *c_vec;
            *c_vec = x;
        }
}
#endif

/* c[rows, vecs x LANES] = (add ? c : 0) + a panel times b panel, each of k units, + bias in every
   row, unless that is NULL. `rows`, `vecs` and `pairs` are constants once this is inlined, so the
   tests in the loops cost nothing. The loops run to the tile's ends all the same: only if these are
   literal constants do both compilers unroll early enough to put sum[][] into registers. */
DPOI_INLINE void dpoi_tile_part(float *c, size_t ldc, const float *a, const float *b,
                                const float *bias, size_t k, int add, int rows, int vecs, int pairs)
{
#ifdef __clang__
#pragma STDC FP_CONTRACT ON
#endif
    dpoi_vec sum[DPOI_TILE_ROWS][DPOI_TILE_VECS] = { { { 0 } } };
    for (int i = 0; i < rows; i++) // c arrives while k runs
        for (int j = 0; j < vecs * DPOI_LANES; j += DPOI_LINE)
            __builtin_prefetch(c + (size_t)i * ldc + j, 1);
    DPOI_FEW_STEPS
    for (size_t l = 0; l < k; l++, a += DPOI_TILE_ROWS, b += DPOI_TILE_COLS) {
        const dpoi_vec_at *b_vec = (const dpoi_vec_at *)b;
        DPOI_UNROLL
        for (int i = 0; i < DPOI_TILE_ROWS; i++)
            DPOI_UNROLL
            for (int j = 0; j < DPOI_TILE_VECS; j++)
                if (i < rows && j < vecs)
                    sum[i][j] = pairs ? dpoi_dot_pairs(sum[i][j], a[i], b_vec[j])
                                      : sum[i][j] + a[i] * b_vec[j];
    }
    DPOI_UNROLL
    for (int i = 0; i < DPOI_TILE_ROWS; i++, c += ldc)
        DPOI_UNROLL
        for (int j = 0; j < DPOI_TILE_VECS; j++)
            if (i < rows && j < vecs) {
                dpoi_vec_at *c_vec = (dpoi_vec_at *)c + j;
                if (bias) sum[i][j] += ((const dpoi_vec_at *)bias)[j];
                if (add) sum[i][j] += *c_vec;
                *c_vec = sum[i][j];
            }
}

/* out[j][i] = in[i][j] for i, j < 4; rows are ldo and ldi floats apart. */
DPOI_INLINE void dpoi_transpose_4x4(float *out, size_t ldo, const float *in, size_t ldi)
{
    dpoi_four a = *(const dpoi_four_at *)in, b = *(const dpoi_four_at *)(in + ldi);
    dpoi_four c = *(const dpoi_four_at *)(in + 2 * ldi), d = *(const dpoi_four_at *)(in + 3 * ldi);
    dpoi_four ab = DPOI_SHUFFLE(a, b, 0, 4, 1, 5), cd = DPOI_SHUFFLE(c, d, 0, 4, 1, 5);
    *(dpoi_four_at *)out = DPOI_SHUFFLE(ab, cd, 0, 1, 4, 5);
    *(dpoi_four_at *)(out + ldo) = DPOI_SHUFFLE(ab, cd, 2, 3, 6, 7);
    ab = DPOI_SHUFFLE(a, b, 2, 6, 3, 7), cd = DPOI_SHUFFLE(c, d, 2, 6, 3, 7);
    *(dpoi_four_at *)(out + 2 * ldo) = DPOI_SHUFFLE(ab, cd, 0, 1, 4, 5);
    *(dpoi_four_at *)(out + 3 * ldo) = DPOI_SHUFFLE(ab, cd, 2, 3, 6, 7);
}

#else // plain loops
#define DPOI_INLINE static inline
#define DPOI_NOINLINE static
#define DPOI_UNIT_BF16 1
// By name: a compiler left to itself makes FMAs of some loops only, and bits would depend on rows.
#if defined(FP_FAST_FMAF) || defined(__FP_FAST_FMAF)
#define DPOI_FMA(a, b, c) fmaf(a, b, c)
#else
#define DPOI_FMA(a, b, c) ((a) * (b) + (c))
#endif
DPOI_INLINE void dpoi_tile_part(float *c, size_t ldc, const float *a, const float *b,
                                const float *bias, size_t k, int add, int rows, int vecs, int pairs)
{
    (void)pairs; // there are none
    const int cols = vecs * DPOI_LANES;
    float sum[DPOI_TILE_ROWS][DPOI_TILE_COLS] = { { 0 } };
    for (size_t l = 0; l < k; l++, a += DPOI_TILE_ROWS, b += DPOI_TILE_COLS)
        for (int i = 0; i < rows; i++)
            for (int j = 0; j < cols; j++) sum[i][j] = DPOI_FMA(a[i], b[j], sum[i][j]);
    for (int i = 0; i < rows; i++, c += ldc)
        for (int j = 0; j < cols; j++) {
            if (bias) sum[i][j] += bias[j];
            c[j] = add ? c[j] + sum[i][j] : sum[i][j];
        }
}

DPOI_INLINE void dpoi_transpose_4x4(float *out, size_t ldo, const float *in, size_t ldi)
{
    for (size_t i = 0; i < 4; i++)
        for (size_t j = 0; j < 4; j++) out[j * ldo + i] = in[i * ldi + j];
}
#endif

/* The whole tile, or the least part that has the rows and columns which c has. A low part has all
   columns: few tiles are both. Not inlined: within the loops over tiles, clang runs out of
   registers. */
DPOI_NOINLINE void dpoi_tile(float *c, size_t ldc, const float *a, const float *b,
                             const float *bias, size_t k, int add, size_t rows, size_t cols,
                             int pairs)
{
    enum { ALL = DPOI_TILE_ROWS, LOW = DPOI_SHORT_ROWS, WIDE = DPOI_TILE_VECS };
    const int low = rows <= LOW, narrow = cols <= DPOI_LANES;
    if (low && pairs) dpoi_tile_part(c, ldc, a, b, bias, k, add, LOW, WIDE, 1);
    else if (low) dpoi_tile_part(c, ldc, a, b, bias, k, add, LOW, WIDE, 0);
    else if (narrow && pairs) dpoi_tile_part(c, ldc, a, b, bias, k, add, ALL, 1, 1);
    else if (narrow) dpoi_tile_part(c, ldc, a, b, bias, k, add, ALL, 1, 0);
    else if (pairs) dpoi_tile_part(c, ldc, a, b, bias, k, add, ALL, WIDE, 1);
    else dpoi_tile_part(c, ldc, a, b, bias, k, add, ALL, WIDE, 0);
}
#if defined(__GNUC__) && !defined(__clang__) && !defined(DPO_PLAIN_C)
#pragma GCC pop_options
#endif

/* ---- 3.3 packing ----------------------------------------------------------------------------- */

/* Whether a product `as` that type has units of two bf16. */
static inline int dpoi_paired(dpo_dtype as) { return DPOI_UNIT_BF16 == 2 && as == DPO_BF16; }

static inline size_t dpoi_divide_up(size_t a, size_t b) { return (a + b - 1) / b; }

/* Units that k numbers take in a panel; AMX wants whole lines of them. */
static inline size_t dpoi_count_units(size_t k, dpo_dtype as)
{
    if (!dpoi_paired(as)) return k;
    return dpoi_amx ? dpoi_divide_up(k, 2 * DPOI_LINE) * DPOI_LINE : dpoi_divide_up(k, 2);
}

/* Bits of element i as a float, rounded to bf16 if the product asks for it. */
DPOI_INLINE uint32_t dpoi_float_bits(const void *x, size_t i, dpo_dtype dtype, dpo_dtype as)
{
    uint32_t bits = 0;
    if (dtype == DPO_BF16) {
        uint16_t half;
        memcpy(&half, (const uint16_t *)x + i, sizeof half);
        return (uint32_t)half << 16;
    }
    float value = ((const float *)x)[i];
    if (as == DPO_BF16) return (uint32_t)dpoi_bf16(value) << 16;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* out[n] = units of x[n], each paired, if units are pairs, with the same element of y[n], or with 0
   if y is NULL. Inlined with constant types, for loops without branches. */
DPOI_INLINE void dpoi_units_run(float *out, const void *x, const void *y, size_t n, dpo_dtype dtype,
                                dpo_dtype as)
{
    for (size_t i = 0; i < n; i++) {
        uint32_t bits = dpoi_float_bits(x, i, dtype, as);
        if (dpoi_paired(as)) bits = bits >> 16 | (y ? dpoi_float_bits(y, i, dtype, as) : 0);
        memcpy(out + i, &bits, sizeof bits);
    }
}

#if defined(__AVX512BF16__) && !defined(DPO_PLAIN_C)
#define DPOI_ROUND_PAIRS
/* dpoi_units from floats by the CPU's own rounding, 32 at a time: shifts and comparisons take
   longer than reading memory. Subnormal numbers (below 1.2e-38) become zeros, which dot products of
   bf16 take them for anyway, but for the few that rounding would have made normal. */
DPOI_INLINE void dpoi_round_pairs(float *out /* [n] */, const float *x /* [step * n] */,
                                  const float *y /* [n] or NULL */, size_t step, size_t n)
{
    static const uint16_t by_turns[32] = { 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
                                           8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15,
                                           31 };
    for (size_t i = 0; i < n; i += 16) {
        const size_t left = DPOI_MIN(n - i, (size_t)16);
        const __mmask16 units = (__mmask16)((1u << left) - 1);
        const uint32_t floats = (uint32_t)(((uint64_t)1 << 2 * left) - 1); // of step 2
        __m512 first, second = _mm512_setzero_ps();
        if (step == 2) {
            first = _mm512_maskz_loadu_ps((__mmask16)floats, x + 2 * i);
            if (left > 8) second = _mm512_maskz_loadu_ps((__mmask16)(floats >> 16), x + 2 * i + 16);
        } else {
            first = _mm512_maskz_loadu_ps(units, x + i);
            if (y) second = _mm512_maskz_loadu_ps(units, y + i);
        }
        __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh(second, first); // all of first, then second
        if (step == 1)
            rounded = _mm512_permutexvar_epi16(_mm512_loadu_si512(by_turns), rounded);
        _mm512_mask_storeu_epi32(out + i, units, rounded);
    }
}
#endif

/* out[n] = units of x[n] and y[n], as in dpoi_units_run, if `step` is 1; pairs of neighbours in
   x[2 n] if it is 2. */
DPOI_INLINE void dpoi_units(float *out, const void *x, const void *y, size_t step, size_t n,
                            dpo_dtype dtype, dpo_dtype as)
{
    if (dtype == as && (as == DPO_F32 || step == 2)) memcpy(out, x, n * sizeof *out);
#ifdef DPOI_ROUND_PAIRS
    else if (dtype == DPO_F32) dpoi_round_pairs(out, x, y, step, n);
#else
    else if (step == 2) dpoi_narrow(out, DPO_BF16, x, 2 * n);
    else if (dtype == DPO_F32) dpoi_units_run(out, x, y, n, DPO_F32, DPO_BF16);
#endif
    else if (as == DPO_F32) dpoi_units_run(out, x, y, n, DPO_BF16, DPO_F32);
    else dpoi_units_run(out, x, y, n, DPO_BF16, DPO_BF16);
}

/* Transposes [16 units, TILE_ROWS] to [TILE_ROWS, 16 units], for AMX. */
static inline void dpoi_turn_units(float *units /* 16 x TILE_ROWS */)
{
    float copy[DPOI_LINE * DPOI_TILE_ROWS];
    memcpy(copy, units, sizeof copy);
    for (size_t r = 0; r < DPOI_TILE_ROWS; r += 4) {
        const size_t i = DPOI_MIN(r, DPOI_TILE_ROWS - 4); // the last four may overlap others
        for (size_t u = 0; u < DPOI_LINE; u += 4)
            dpoi_transpose_4x4(units + i * DPOI_LINE + u, DPOI_LINE, copy + u * DPOI_TILE_ROWS + i,
                               DPOI_TILE_ROWS);
    }
}

/* Rows of an operand, as it is stored, that are still to be prefetched into L2. The next begins at
   data[place]; a pointer to it would be undefined past the last. */
typedef struct {
    const char *data;
    size_t place, row_bytes, stride;    // bytes
    size_t rows;
} dpoi_fetch;

static inline dpoi_fetch dpoi_fetch_begin(dpoi_matrix x, size_t count, size_t k)
{
    const size_t item = x.dtype == DPO_BF16 ? 2 : 4;
    if (x.row_stride == 1) return (dpoi_fetch){ x.data, 0, count * item, x.col_stride * item, k };
    return (dpoi_fetch){ x.data, 0, k * item, x.row_stride * item, count };
}

static inline void dpoi_fetch_rows(dpoi_fetch *fetch, size_t rows)
{
    for (; rows > 0 && fetch->rows > 0; rows--, fetch->rows--, fetch->place += fetch->stride)
        for (size_t byte = 0; byte < fetch->row_bytes; byte += DPOI_LINE * sizeof(float))
            __builtin_prefetch(fetch->data + fetch->place + byte, 0, 2);
}

/* Copies x[count, k] into panels of `width` rows, each [units of k, width], or as AMX wants a's;
   zeros fill up the last panel and the last units. */
DPOI_INLINE void dpoi_pack(float *panels, size_t width, dpoi_matrix x, size_t count, size_t k,
                           dpo_dtype as)
{
    const size_t per_unit = dpoi_paired(as) ? 2 : 1, units = dpoi_divide_up(k, per_unit);
    const size_t whole = count - count % width, room = dpoi_count_units(k, as);
    const size_t panel = dpoi_panel_floats(width, room);
    const size_t item = x.dtype == DPO_BF16 ? 2 : 4; // bytes
    const int turned = dpoi_amx && per_unit == 2 && width == DPOI_TILE_ROWS;
    if (!k) return;
    // The CPU does not prefetch rows that lie far apart, so this does: those across k AHEAD steps
    // before they are packed; those along k two panels before, a share of them with each line.
    // (Of a, there are never more than two panels along k at once.)
    enum { AHEAD = 8 };
    const size_t share = dpoi_divide_up(width * DPOI_LINE, units);
    dpoi_fetch fetch = { 0 };
    if (whole < count) memset(panels + whole / width * panel, 0, width * room * sizeof *panels);
    for (size_t i = 0; i < whole && units < room; i += width)
        memset(panels + i / width * panel + units / DPOI_LINE * DPOI_LINE * width, 0,
               DPOI_LINE * width * sizeof *panels);
    if (x.row_stride == 1) {
        if (k > AHEAD) fetch = dpoi_fetch_begin(dpoi_submatrix(x, 0, AHEAD), count, k - AHEAD);
        for (size_t u = 0; u < units; u++) {
            const size_t l = u * per_unit;
            dpoi_fetch_rows(&fetch, per_unit);
            const char *in = dpoi_submatrix(x, 0, l).data, *next = NULL;
            if (per_unit == 2 && l + 1 < k) next = dpoi_submatrix(x, 0, l + 1).data;
            float *out = panels + u * width;
            for (size_t i = 0; i < whole; i += width, out += panel) // constant: memcpy is inlined
                dpoi_units(out, in + i * item, next ? next + i * item : NULL, 1, width, x.dtype,
                           as);
            dpoi_units(out, in + whole * item, next ? next + whole * item : NULL, 1, count - whole,
                       x.dtype, as);
            if (turned && (u % DPOI_LINE == DPOI_LINE - 1 || u == units - 1))
                for (size_t i = 0; i < count; i += width)
                    dpoi_turn_units(panels + i / width * panel + u / DPOI_LINE * DPOI_LINE * width);
        }
        return;
    }
    float converted[(DPOI_TILE_ROWS + DPOI_TILE_COLS) * DPOI_LINE]; // enough for either width
    const int direct = x.dtype == DPO_F32 && as == DPO_F32;
    for (size_t p = 0; p < count; p += width, panels += panel) {
        const size_t rows = DPOI_MIN(count - p, width), later = p + 2 * width;
        if (later < count)
            fetch = dpoi_fetch_begin(dpoi_submatrix(x, later, 0),
                                     DPOI_MIN(count - later, width), k);
        for (size_t u = 0; u < units; u += DPOI_LINE) {
            dpoi_fetch_rows(&fetch, share);
            const size_t n = DPOI_MIN(units - u, (size_t)DPOI_LINE), l = u * per_unit;
            const size_t n_whole = DPOI_MIN(n, (k - l) / per_unit); // the last may be half a unit
            const float *in = dpoi_submatrix(x, p, l).data;
            for (size_t r = 0; r < rows && !direct; r++) {
                const char *row = dpoi_submatrix(x, p + r, l).data;
                float *line = turned ? panels + u * width + r * DPOI_LINE
                                     : converted + r * DPOI_LINE;
                if (n_whole == DPOI_LINE) // constant: memcpy is inlined
                    dpoi_units(line, row, NULL, per_unit, DPOI_LINE, x.dtype, as);
                else dpoi_units(line, row, NULL, per_unit, n_whole, x.dtype, as);
                if (n_whole < n)
                    dpoi_units(line + n_whole, row + 2 * n_whole * item, NULL, 1, 1, x.dtype, as);
            }
            if (turned) continue;
            const size_t ld = direct ? x.row_stride : DPOI_LINE;
            if (!direct) in = converted;
            for (size_t r = 0; rows >= 4 && n == DPOI_LINE && r < rows; r += 4) {
                size_t i = DPOI_MIN(r, rows - 4); // the last four may overlap the four before
                for (size_t step = 0; step < DPOI_LINE; step += 4)
                    dpoi_transpose_4x4(panels + (u + step) * width + i, width, in + i * ld + step,
                                       ld);
            }
            for (size_t step = 0; (rows < 4 || n < DPOI_LINE) && step < n; step++)
                for (size_t i = 0; i < rows; i++)
                    memcpy(panels + (u + step) * width + i, in + i * ld + step, sizeof *in);
        }
    }
}

/* ---- 3.4 on one thread ----------------------------------------------------------------------- */

/* c[rows, cols] = (add ? c : 0) + sum[rows, TILE_COLS] + bias. */
DPOI_INLINE void dpoi_tile_copy(float *c, size_t ldc, const float *sum,
                                const float *bias /* [cols] or NULL */, int add, size_t rows,
                                size_t cols)
{
    for (size_t i = 0; i < rows; i++)
        for (size_t j = 0; j < cols; j++) {
            float x = sum[i * DPOI_TILE_COLS + j];
            if (bias) x += bias[j];
            c[i * ldc + j] = add ? c[i * ldc + j] + x : x;
        }
}

/* c[rows, cols] = (add ? c : 0) + a panel times b panel + bias. A tile over the edge of c is made
   aside, and what belongs to c is copied; but LANES columns, often an adapter's, are made in place.
   AMX makes all its tiles aside, and takes up to two panels of a, a_stride floats apart. */
DPOI_INLINE void dpoi_tile_clipped(float *c, size_t ldc, const float *a, size_t a_stride,
                                   const float *b, const float *bias /* [cols] or NULL */, size_t k,
                                   int add, size_t rows, size_t cols, int pairs)
{
#ifdef DPOI_AMX
    if (pairs && dpoi_amx) {
        float sum[2 * DPOI_TILE_ROWS * DPOI_TILE_COLS];
        dpoi_amx_tile(sum, a, a_stride, b, k, rows > DPOI_TILE_ROWS);
        if (cols == DPOI_TILE_COLS) dpoi_amx_copy(c, ldc, sum, bias, add, rows);
        else dpoi_tile_copy(c, ldc, sum, bias, add, rows, cols);
        return;
    }
#else
    (void)a_stride;
#endif
    if ((rows == DPOI_TILE_ROWS && (cols == DPOI_TILE_COLS || cols == DPOI_LANES)) ||
        (rows == DPOI_SHORT_ROWS && cols == DPOI_TILE_COLS)) {
        dpoi_tile(c, ldc, a, b, bias, k, add, rows, cols, pairs);
        return;
    }
    float whole[DPOI_TILE_ROWS * DPOI_TILE_COLS];
    dpoi_tile(whole, DPOI_TILE_COLS, a, b, NULL, k, 0, rows, cols, pairs);
    dpoi_tile_copy(c, ldc, whole, bias, add, rows, cols);
}

/* c[m, n] = (accumulate ? c : 0) + a[m, k] b[k, n] + bias, on the calling thread, with scratch
   pack[DPOI_PACK_FLOATS], for n from 1 to BLOCK_COLS. */
static void dpoi_multiply_strip(float *pack, float *c, size_t ldc, dpoi_matrix a,
                                dpoi_matrix b_columns /* [n, k] */,
                                const float *bias /* [n] or NULL */,
                                size_t m, size_t n, size_t k, int accumulate, dpo_dtype as)
{
    const int pairs = dpoi_paired(as), by_amx = pairs && dpoi_amx;
    const size_t block_k = DPOI_BLOCK_K * (pairs ? 2 : 1);
    const size_t tile_rows = by_amx ? 2 * DPOI_TILE_ROWS : DPOI_TILE_ROWS;
    const size_t block_rows = a.row_stride == 1 ? DPOI_BLOCK_ROWS : tile_rows;
    float *b_panels = pack, *a_panels = pack + DPOI_B_FLOATS;
#ifdef DPOI_AMX
    if (by_amx) dpoi_amx_begin();
#endif
    for (size_t l = 0; l == 0 || l < k; l += block_k) { // once if k is 0, for the zeros
        const size_t depth = DPOI_MIN(k - l, block_k), units = dpoi_count_units(depth, as);
        dpoi_pack(b_panels, DPOI_TILE_COLS, dpoi_submatrix(b_columns, 0, l), n, depth, as);
        for (size_t i = 0; i < m; i += block_rows) {
            const size_t rows = DPOI_MIN(m - i, block_rows);
            dpoi_pack(a_panels, DPOI_TILE_ROWS, dpoi_submatrix(a, i, l), rows, depth, as);
            const size_t below = i + block_rows, after = l + block_k; // where a is packed next
            dpoi_fetch next = { 0 };
            if (below < m && !by_amx)
                next = dpoi_fetch_begin(dpoi_submatrix(a, below, l),
                                        DPOI_MIN(m - below, block_rows), depth);
            else if (after < k && !by_amx)
                next = dpoi_fetch_begin(dpoi_submatrix(a, 0, after), DPOI_MIN(m, block_rows),
                                        DPOI_MIN(k - after, block_k));
            const size_t tiles = dpoi_divide_up(rows, tile_rows) *
                                 dpoi_divide_up(n, DPOI_TILE_COLS);
            const size_t share = next.rows / tiles + 1;
            const size_t a_stride = dpoi_panel_floats(DPOI_TILE_ROWS, units);
            for (size_t r = 0; r < rows; r += tile_rows) {
                const float *b_panel = b_panels;
                for (size_t j = 0; j < n; j += DPOI_TILE_COLS) {
                    dpoi_fetch_rows(&next, share);
                    dpoi_tile_clipped(c + (i + r) * ldc + j, ldc,
                                      a_panels + r / DPOI_TILE_ROWS * a_stride, a_stride, b_panel,
                                      bias && l == 0 ? bias + j : NULL, units, accumulate || l > 0,
                                      DPOI_MIN(rows - r, tile_rows),
                                      DPOI_MIN(n - j, DPOI_TILE_COLS), pairs);
                    b_panel += dpoi_panel_floats(DPOI_TILE_COLS, units);
                }
            }
        }
    }
#ifdef DPOI_AMX
    if (by_amx) _tile_release();
#endif
}

/* The same for any n, without a bias: for attention, whose products are many and small. Where n is
   a number of keys, k is a head's size, and BLOCK_COLS columns of so few numbers fit into L2 as a
   rule; where k is a number of keys, n is a head's size. */
static void dpoi_matmul_serial(float *pack, float *c, size_t ldc, dpoi_matrix a, dpoi_matrix b,
                               size_t m, size_t n, size_t k, int accumulate, dpo_dtype as)
{
    const dpoi_matrix b_columns = dpoi_transposed(b);
    if (m == 0) return; // as the gradient of a prefix of no keys: b need not be packed
    for (size_t j = 0; j < n; j += DPOI_BLOCK_COLS)
        dpoi_multiply_strip(pack, c + j, ldc, a, dpoi_submatrix(b_columns, j, 0), NULL, m,
                            DPOI_MIN(n - j, DPOI_BLOCK_COLS), k, accumulate, as);
}

/* ---- 3.5 on all threads ---------------------------------------------------------------------- */

/* How many strips of columns, at least *strips, and pieces of rows c is cut into. Threads take the
   tasks in rounds, one task each: of the cuts tried, the one is chosen whose number of rounds times
   the cost of its largest task is least. Each number of strips is tried with the fewest rounds that
   hold it, and with one more, for smaller pieces. A tile counts 2; packing takes about half as long
   for a panel of a, and one and a half times as long for one of b, which comes from memory. */
static void dpoi_cut(size_t *strips, size_t *pieces, size_t row_tiles, size_t col_tiles,
                     size_t threads)
{
    size_t least = SIZE_MAX;
    const size_t first = *strips;
    for (size_t s = first; s <= DPOI_MIN(col_tiles, first + threads - 1); s++)
        for (size_t rounds = dpoi_divide_up(s, threads), more = 0; more < 2; rounds++, more++) {
            const size_t p = DPOI_MIN(rounds * threads / s, row_tiles);
            const size_t rows = dpoi_divide_up(row_tiles, p), cols = dpoi_divide_up(col_tiles, s);
            const size_t cost = rounds * (2 * rows * cols + rows + 3 * cols);
            if (cost >= least) continue;
            least = cost;
            *strips = s;
            *pieces = p;
        }
}

/* The calling thread's scratch[DPOI_PACK_FLOATS]. */
static float *dpoi_pack_scratch(const dpo_context *context)
{
    return context->pack + (size_t)dpoi_thread_index() * DPOI_PACK_FLOATS;
}

/* c[m, n] = (accumulate ? c : 0) + a[m, k] b[k, n] + bias[n] in every row, or no bias if it is
   NULL. Added here, a bias costs nothing; by itself it would read and write all of c. */
static void dpoi_matmul_bias(const dpo_context *context, float *c, size_t ldc, dpoi_matrix a,
                             dpoi_matrix b, const float *bias, size_t m, size_t n, size_t k,
                             int accumulate, dpo_dtype as)
{
    if (m == 0 || n == 0) return;
    const dpoi_matrix b_columns = dpoi_transposed(b);
    const size_t threads = (size_t)dpoi_threads(context, m * n * k / 16); // FMAs per vector FMA
    const size_t row_tiles = dpoi_divide_up(m, DPOI_TILE_ROWS);
    const size_t col_tiles = dpoi_divide_up(n, DPOI_TILE_COLS);
    size_t strips = dpoi_divide_up(n, context->block_cols), pieces = 1;
    dpoi_cut(&strips, &pieces, row_tiles, col_tiles, threads);
    DPOI_PARALLEL_FOR((int)threads)
    for (size_t task = 0; task < strips * pieces; task++) {
        size_t strip = task / pieces, piece = task % pieces;
        size_t i = row_tiles * piece / pieces * DPOI_TILE_ROWS;
        size_t i_end = DPOI_MIN(m, row_tiles * (piece + 1) / pieces * DPOI_TILE_ROWS);
        size_t j = col_tiles * strip / strips * DPOI_TILE_COLS;
        size_t j_end = DPOI_MIN(n, col_tiles * (strip + 1) / strips * DPOI_TILE_COLS);
        dpoi_multiply_strip(dpoi_pack_scratch(context), c + i * ldc + j, ldc,
                            dpoi_submatrix(a, i, 0), dpoi_submatrix(b_columns, j, 0),
                            bias ? bias + j : NULL, i_end - i, j_end - j, k, accumulate, as);
    }
}

/* c[m, n] = (accumulate ? c : 0) + a[m, k] b[k, n]. */
static void dpoi_matmul(const dpo_context *context, float *c, size_t ldc, dpoi_matrix a,
                        dpoi_matrix b, size_t m, size_t n, size_t k, int accumulate, dpo_dtype as)
{
    dpoi_matmul_bias(context, c, ldc, a, b, NULL, m, n, k, accumulate, as);
}

/* ---- 3.6 the context ------------------------------------------------------------------------- */

#define DPOI_MAX_THREADS 1024

DPO_API int dpo_context_init(dpo_context *context, int n_threads)
{
    *context = (dpo_context){ 0 };
    if (n_threads < 0 || n_threads > DPOI_MAX_THREADS)
        return dpoi_fail(context, "%d threads: give 1 to %d, or 0 for as many as the machine has",
                         n_threads, DPOI_MAX_THREADS);
#ifdef _OPENMP
    context->n_threads = n_threads ? n_threads : omp_get_max_threads();
#else
    context->n_threads = 1;
#endif
#ifdef DPOI_AMX
    enum { REQUEST = 0x1023, TILES = 18 }; // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA: 8 KB a thread
    dpoi_amx = syscall(SYS_arch_prctl, REQUEST, TILES) == 0;
#endif
    long second_cache = 0;
#ifdef _SC_LEVEL2_CACHE_SIZE
    second_cache = sysconf(_SC_LEVEL2_CACHE_SIZE); // 0 or -1 if it is unknown
#endif
    second_cache = DPOI_MAX(second_cache, 1L << 19);
    const size_t cols = (size_t)second_cache / 2 / (DPOI_BLOCK_K * sizeof(float));
    context->block_cols = DPOI_MIN(cols / DPOI_TILE_COLS * DPOI_TILE_COLS, DPOI_BLOCK_COLS);
    size_t n = (size_t)context->n_threads;
    return dpoi_alloc_zeroed(context, &context->strip, n, sizeof *context->strip) ||
           dpoi_alloc(context, &context->pack, n * DPOI_PACK_FLOATS, sizeof(float));
}

/* Attention's strips grow with the longest example, the scratch for a piece of a weight gradient
   with the widest layer; dpoi_model_reserve calls this. */
static int dpoi_context_reserve(dpo_context *context, size_t strip_floats, size_t piece_floats)
{
    if (piece_floats > context->piece_floats) {
        dpoi_free(context, context->piece);
        context->piece_floats = 0;
        if (dpoi_alloc(context, &context->piece, piece_floats, sizeof(float))) return 1;
        context->piece_floats = piece_floats;
    }
    if (strip_floats <= context->strip_floats) return 0;
    for (size_t t = 0; t < (size_t)context->n_threads; t++) {
        dpoi_free(context, context->strip[t]);
        if (dpoi_alloc(context, &context->strip[t], strip_floats, sizeof(float))) {
            context->strip_floats = 0;
            return 1;
        }
    }
    context->strip_floats = strip_floats;
    return 0;
}

DPO_API void dpo_context_free(dpo_context *context)
{
    for (size_t t = 0; t < (size_t)context->n_threads; t++)
        if (context->strip) dpoi_free(context, context->strip[t]);
    dpoi_free(context, context->pack);
    dpoi_free(context, context->strip);
    dpoi_free(context, context->piece);
    context->strip = NULL;
    context->pack = context->piece = NULL;
    context->n_threads = 0;
}

/* ================================================================================================
   4. LAYERS

   Each layer's forward stands next to its backward. A backward receives dy, the gradient of the
   loss with respect to the layer's output y, and produces by the chain rule the gradients with
   respect to the layer's inputs: `dx` for data, and what it *adds* to `dw` for weights, since a
   weight is used by every row of every micro-batch. A gradient whose pointer is NULL is not wanted.

   Rows are independent of each other everywhere except in attention, so most layers run in
   parallel over rows. Gradients of weights are sums over all rows: there the threads divide the
   columns, and each column is summed from the first row to the last.
   ============================================================================================= */

#define DPOI_COLUMNS 64     // columns that one iteration of a parallel column loop sums

/* Forward: y[r, c] = ... + b[c] in every row, so db[c] += sum over r of dy[r, c]. */
static void dpoi_add_column_sums(const dpo_context *context, float *db, const float *dy, // [R, C]
                                 size_t R, size_t C)
{
    DPOI_PARALLEL_FOR(dpoi_threads(context, R * C))
    for (size_t first = 0; first < C; first += DPOI_COLUMNS) {
        size_t end = DPOI_MIN(first + DPOI_COLUMNS, C);
        for (size_t r = 0; r < R; r++)
            for (size_t c = first; c < end; c++) db[c] += dy[r * C + c];
    }
}

/* y = a + b, for residual connections; y may be a. */
static void dpoi_add(const dpo_context *context, float *y, const float *a, const float *b, size_t n)
{
    DPOI_PARALLEL_PIECES(dpoi_threads(context, n))
    for (size_t first = 0; first < n; first += DPOI_PIECE)
        for (size_t i = first; i < DPOI_MIN(first + DPOI_PIECE, n); i++) y[i] = a[i] + b[i];
    dpoi_lap(context, DPO_TIME_RESIDUAL, 0, 12.0 * (double)n);
}

/* One element of a weight. */
static inline float dpoi_weight_at(const dpo_tensor *W, size_t i)
{
    return W->dtype == DPO_BF16 ? dpoi_bf16_to_float(((const uint16_t *)W->data)[i])
                                : ((const float *)W->data)[i];
}

/* ---- 4.1 embedding --------------------------------------------------------------------------- */

/* y[r] = scale * (E[token[r]] + P[position[r]]); P is NULL unless positions are learned. The scale,
   one of muP's, is tuned once and the same for every width: BTLM's 14.6, times its embeddings'
   standard deviation of 0.073, makes entries of size 1. */
static void dpoi_embedding_forward(const dpo_context *context, float *y, // [R, C]
                                   const uint32_t *token, const uint32_t *position, // [R]
                                   const dpo_tensor *E, // [V, C]
                                   const dpo_tensor *P, // [T, C] or NULL
                                   float scale, size_t R, size_t C)
{
    DPOI_PARALLEL_ROWS(dpoi_threads(context, R * C))
    for (size_t r = 0; r < R; r++) {
        float *yr = y + r * C;
        for (size_t c = 0; c < C; c++) yr[c] = dpoi_weight_at(E, token[r] * C + c);
        for (size_t c = 0; c < C && P; c++) yr[c] += dpoi_weight_at(P, position[r] * C + c);
        for (size_t c = 0; c < C; c++) yr[c] *= scale;
    }
    dpoi_lap(context, DPO_TIME_EMBEDDING, 0, 8.0 * (double)(R * C));
}

/* Forward: y[r] = scale * (E[token[r]] + P[position[r]]). A token that occurs twice collects twice,
   so threads must not divide the rows: they divide the columns. */
static void dpoi_embedding_backward(const dpo_context *context, float *dE, float *dP,
                                    const float *dy /* [R, C] */, const uint32_t *token,
                                    const uint32_t *position, float scale, size_t R, size_t C)
{
    DPOI_PARALLEL_FOR(dpoi_threads(context, R * C))
    for (size_t first = 0; first < C; first += DPOI_COLUMNS) {
        size_t end = DPOI_MIN(first + DPOI_COLUMNS, C);
        for (size_t r = 0; r < R; r++)
            for (size_t c = first; c < end; c++) {
                if (dE) dE[token[r] * C + c] += scale * dy[r * C + c];
                if (dP) dP[position[r] * C + c] += scale * dy[r * C + c];
            }
    }
    dpoi_lap(context, DPO_TIME_EMBEDDING, 0, 12.0 * (double)(R * C));
}

/* ---- 4.2 layer norm -------------------------------------------------------------------------- */

/* xhat = (x - mean) * rstd with rstd = 1 / sqrt(variance + epsilon), y = xhat * w + b, for each row
   (Ba, Kiros, Hinton 2016; the variance is the biased one). `stats` keeps mean and rstd of each row
   for the backward. The variance is summed from differences: E[x^2] - mean^2 would cancel. */
static void dpoi_norm_forward(const dpo_context *context, float *y /* [R, C] */,
                              float *stats /* [R, 2] */, const float *x /* [R, C] */,
                              const float *w, const float *b /* [C] */, float epsilon,
                              size_t R, size_t C)
{
    DPOI_PARALLEL_ROWS(dpoi_threads(context, 4 * R * C))
    for (size_t r = 0; r < R; r++) {
        const float *xr = x + r * C;
        float *yr = y + r * C;
        float mean = dpoi_sum(xr, C) / (float)C;
        for (size_t c = 0; c < C; c++) yr[c] = xr[c] - mean;
        float rstd = 1.0f / sqrtf(dpoi_dot(yr, yr, C) / (float)C + epsilon);
        for (size_t c = 0; c < C; c++) yr[c] = yr[c] * rstd * w[c] + b[c];
        stats[2 * r] = mean;
        stats[2 * r + 1] = rstd;
    }
    dpoi_lap(context, DPO_TIME_NORM, 0, 8.0 * (double)(R * C));
}

/* Forward: xhat = (x - mean) * rstd, y = xhat * w + b. With dxhat = dy * w, and since mean and rstd
   depend on every x of the row,
       dx = rstd * (dxhat - mean(dxhat) - xhat * mean(dxhat * xhat)),
   which is *added* to dx: the norm's input also goes on along the residual stream. Uses up dy. */
static void dpoi_norm_backward(const dpo_context *context, float *dx /* [R, C] */, float *dw,
                               float *db /* [C] */, float *dy /* [R, C] */, const float *stats,
                               const float *x /* [R, C] */, const float *w, size_t R, size_t C)
{
    DPOI_PARALLEL_FOR(dpoi_threads(context, 4 * R * C))
    for (size_t first = 0; first < C; first += DPOI_COLUMNS) {
        size_t end = DPOI_MIN(first + DPOI_COLUMNS, C);
        for (size_t r = 0; r < R; r++)
            for (size_t c = first; c < end; c++) {
                float xhat = (x[r * C + c] - stats[2 * r]) * stats[2 * r + 1];
                if (dw) dw[c] += dy[r * C + c] * xhat;
                if (db) db[c] += dy[r * C + c];
            }
    }
    DPOI_PARALLEL_ROWS(dpoi_threads(context, 4 * R * C))
    for (size_t r = 0; r < R; r++) {
        float mean = stats[2 * r], rstd = stats[2 * r + 1];
        const float *xr = x + r * C;
        float *dyr = dy + r * C, *dxr = dx + r * C;
        for (size_t c = 0; c < C; c++) dyr[c] *= w[c]; // now dxhat
        float mean_dxhat = dpoi_sum(dyr, C) / (float)C;
        float mean_product = rstd * dpoi_dot_centred(dyr, xr, mean, C) / (float)C;
        for (size_t c = 0; c < C; c++) {
            float xhat = (xr[c] - mean) * rstd;
            dxr[c] += rstd * (dyr[c] - mean_dxhat - xhat * mean_product);
        }
    }
    dpoi_lap(context, DPO_TIME_NORM_BACK, 0, 24.0 * (double)(R * C));
}

/* ---- 4.3 linear ------------------------------------------------------------------------------ */

/* y = x W^T + b. Hugging Face keeps W as [out, in] for nn.Linear (GPT-NeoX) and as [in, out] for
   Conv1D (BTLM); the data stays as it is, and the product reads it by strides. An embedding [V, C]
   that is also the head counts as [out, in]. */
static size_t dpoi_linear_in(const dpo_tensor *W) { return W->shape[W->layout != DPO_CONV1D]; }
static size_t dpoi_linear_out(const dpo_tensor *W) { return W->shape[W->layout == DPO_CONV1D]; }

/* The weight as the [in, out] matrix that multiplies rows from the right. */
static dpoi_matrix dpoi_weight(const dpo_tensor *W)
{
    dpoi_matrix stored = { W->data, W->shape[1], 1, W->dtype };
    return W->layout == DPO_CONV1D ? stored : dpoi_transposed(stored);
}

/* With `accumulate`, y += x W^T + b. b is NULL for layers without bias. bf16 weights make bf16
   products. */
static void dpoi_linear_forward(const dpo_context *context, float *y /* [R, out] */,
                                const float *x /* [R, in] */, const dpo_tensor *W,
                                const dpo_tensor *b, size_t R, int accumulate)
{
    size_t in = dpoi_linear_in(W), out = dpoi_linear_out(W);
    dpoi_matmul_bias(context, y, out, dpoi_rows(x, in), dpoi_weight(W), b ? b->data : NULL, R, out,
                     in, accumulate, W->dtype);
}

typedef void dpoi_linear(const dpo_context *, float *y, const float *x, const dpo_tensor *W,
                         const dpo_tensor *b, size_t R, int accumulate);

/* The same for a single row, for generation: no packing, since each weight is used just once.
   Weights [out, in] are read as dot products, [in, out] as a sum of rows, as they lie in memory. */
static void dpoi_linear_row(const dpo_context *context, float *y /* [out] */,
                            const float *x /* [in] */, const dpo_tensor *W, const dpo_tensor *b,
                            size_t R, int accumulate)
{
    size_t in = dpoi_linear_in(W), out = dpoi_linear_out(W);
    (void)R; // 1
    DPOI_PARALLEL_FOR(dpoi_threads(context, in * out))
    for (size_t first = 0; first < out; first += DPOI_COLUMNS) {
        size_t end = DPOI_MIN(first + DPOI_COLUMNS, out);
        for (size_t o = first; o < end; o++) {
            if (!accumulate) y[o] = 0.0f;
            if (b) y[o] += dpoi_weight_at(b, o);
            if (W->layout == DPO_CONV1D) continue;
            y[o] += W->dtype == DPO_BF16 ? dpoi_dot_bf16(x, (const uint16_t *)W->data + o * in, in)
                                         : dpoi_dot(x, (const float *)W->data + o * in, in);
        }
        for (size_t i = 0; W->layout == DPO_CONV1D && i < in; i++)
            for (size_t o = first; o < end; o++) y[o] += x[i] * dpoi_weight_at(W, i * out + o);
    }
}

/* Adds a[rows, k] b[k, columns] to the rows of W's gradient from row `first` on, as W is stored:
   fp32 directly; bf16 by pieces that are made in fp32, added, and rounded stochastically. */
static void dpoi_add_product(const dpo_context *context, const dpo_tensor *W, size_t first,
                             dpoi_matrix a, dpoi_matrix b, size_t rows, size_t k)
{
    const size_t columns = W->shape[1];
    if (W->grad_dtype == DPO_F32) {
        dpoi_matmul(context, (float *)W->grad + first * columns, columns, a, b, rows, columns, k, 1,
                    W->dtype);
        return;
    }
    const size_t most = context->piece_floats / columns;
    const uint64_t key = dpo_random_u64(context->noise, W->offset, 0);
    for (size_t start = 0; start < rows; start += most) {
        const size_t n = DPOI_MIN(rows - start, most), place = (first + start) * columns;
        dpoi_matmul(context, context->piece, columns, dpoi_submatrix(a, start, 0), b, n, columns, k,
                    0, W->dtype);
        uint16_t *grad = (uint16_t *)W->grad + place;
        DPOI_PARALLEL_ROWS(dpoi_threads(context, 4 * n * columns))
        for (size_t r = 0; r < n; r++)
            for (size_t i = r * columns; i < (r + 1) * columns; i++)
                grad[i] = dpoi_bf16_stochastic(dpoi_bf16_to_float(grad[i]) + context->piece[i], key,
                                               place + i);
    }
}

/* Forward: y = x W^T + b, that is y[r, o] = sum over i of x[r, i] W[o, i] + b[o]. Each factor of a
   product x[r, i] W[o, i] gets dy[r, o] times the other one:
       dx = dy W,   dW += dy^T x  ([out, in]; x^T dy for [in, out]),   db += column sums of dy. */
static void dpoi_linear_backward(const dpo_context *context, float *dx /* [R, in] or NULL */,
                                 const float *dy /* [R, out] */, const float *x /* [R, in] */,
                                 const dpo_tensor *W, const dpo_tensor *b, size_t R, int accumulate)
{
    size_t in = dpoi_linear_in(W), out = dpoi_linear_out(W);
    if (dx)
        dpoi_matmul(context, dx, in, dpoi_rows(dy, out), dpoi_transposed(dpoi_weight(W)), R, in,
                    out, accumulate, W->dtype);
    if (W->grad && W->layout == DPO_CONV1D)
        dpoi_add_product(context, W, 0, dpoi_transposed(dpoi_rows(x, in)), dpoi_rows(dy, out), in,
                         R);
    else if (W->grad)
        dpoi_add_product(context, W, 0, dpoi_transposed(dpoi_rows(dy, out)), dpoi_rows(x, in), out,
                         R);
    if (b && b->grad) dpoi_add_column_sums(context, b->grad, dy, R, out);
}

/* ---- 4.4 rotary positions -------------------------------------------------------------------- */

/* Where queries, keys and values lie in a row of qkv [R, 3C]. GPT-NeoX stores them head by head,
   [H][q k v][D]; BTLM stores all queries, then all keys, then all values, [q k v][H][D]. */
typedef struct dpoi_heads {
    size_t H, D, head_stride, key, value; // q of head h starts at h * head_stride, k at + key, ...
} dpoi_heads;

/* RoPE (Su et al. 2021) turns the pair (q[i], q[i + n/2]) of the first n dimensions of each head by
   the angle position * base^(-2i/n), and the key's likewise: q.k then depends on the distance of
   the positions only. (GPT-NeoX pairs halves; GPT-J pairs neighbours.) The table holds
   [position][cos, sin][n/2], from fp32 angles as Hugging Face computes them. */
static void dpoi_rotary_table(float *table, size_t n_positions, size_t n, float base)
{
    for (size_t i = 0; i < n / 2; i++) {
        float frequency = 1.0f / powf(base, (float)(2 * i) / (float)n);
        for (size_t p = 0; p < n_positions; p++) {
            float angle = (float)p * frequency;
            table[p * n + i] = (float)cos((double)angle);
            table[p * n + n / 2 + i] = (float)sin((double)angle);
        }
    }
}

/* In place on queries and keys. The backward multiplies by the rotation's transpose, which turns
   back by the same angle, so it is this function with `direction` -1 instead of +1. */
static void dpoi_rotary(const dpo_context *context, float *qkv /* [R, 3C] */,
                        const uint32_t *position /* [R] */, const float *table, size_t n,
                        dpoi_heads heads, float direction, size_t R)
{
    DPOI_PARALLEL_ROWS(dpoi_threads(context, 2 * R * heads.H * n))
    for (size_t r = 0; r < R; r++) {
        const float *cosine = table + position[r] * n, *sine = cosine + n / 2;
        for (size_t h = 0; h < 2 * heads.H; h++) { // queries of all heads, then keys
            float *x = qkv + r * 3 * heads.H * heads.D + (h % heads.H) * heads.head_stride +
                       (h < heads.H ? 0 : heads.key);
            for (size_t i = 0; i < n / 2; i++) {
                float a = x[i], b = x[i + n / 2], turn = direction * sine[i];
                x[i] = a * cosine[i] - b * turn;
                x[i + n / 2] = b * cosine[i] + a * turn;
            }
        }
    }
    dpoi_lap(context, DPO_TIME_ROTARY, 0, 16.0 * (double)(R * heads.H * n));
}

/* ---- 4.5 attention --------------------------------------------------------------------------- */

/* A span is a run of rows that see the same beginning: the prompt sees itself; a branch sees all of
   its prompt's rows (the prefix), then itself. Row i of a span stands at position n_prefix + i and
   sees the keys 0 .. n_prefix + i of "prefix, then span". No branch sees another. */
typedef struct dpoi_span { size_t first, n, prefix, n_prefix; } dpoi_span;

typedef struct dpoi_attention {
    dpoi_heads heads;
    float scale;            // of q.k
    const float *slopes;    // [H] ALiBi slopes, or NULL
    const dpoi_span *spans;
    const size_t *first_span; // [n_examples + 1] the spans of each example
    size_t n_examples;
    double pairs;           // of a query and a key that it sees, in all spans
    dpo_dtype as;           // what its products take
} dpoi_attention;

/* Queries go through in strips of 64: large enough that the products run at speed, small enough
   that a strip of scores [64, keys] stays in the cache. T x T scores never exist. A strip has all
   its keys, so the softmax is the plain one, not FlashAttention's with a running maximum: simpler,
   and no slower. */
#define DPOI_STRIP 64

/* Some queries of a span, and the keys that they see: the prefix, then the span's own up to the
   last query. Below, a strip's keys or values are one matrix X[keys, D], which lies in two places
   of qkv [R, 3C], at the offset of its head and kind. */
typedef struct dpoi_strip {
    const dpoi_span *span;
    size_t first, n;        // row of the first query; queries
    size_t own, keys;       // keys in the span; keys in all
    size_t D, row;          // floats of a head, and of a row of qkv
    float *pack;            // scratch of products
    dpo_dtype as;
} dpoi_strip;

/* The span's queries from q0 on, for the calling thread. */
static dpoi_strip dpoi_strip_of(const dpo_context *context, const dpoi_attention *attention,
                                const dpoi_span *span, size_t q0)
{
    size_t n = DPOI_MIN(span->n - q0, (size_t)DPOI_STRIP), D = attention->heads.D;
    return (dpoi_strip){ span, span->first + q0, n, q0 + n, span->n_prefix + q0 + n, D,
                         3 * attention->heads.H * D, dpoi_pack_scratch(context), attention->as };
}

/* Rows of x [R, row] from r on. */
static dpoi_matrix dpoi_strip_rows(const dpoi_strip *strip, const float *x, size_t r)
{
    return dpoi_submatrix(dpoi_rows(x, strip->row), r, 0);
}

/* s[n, keys] = q X^T: raw scores if X holds keys; dP = dy V^T in the backward, where X holds values
   and dy takes q's place. */
static void dpoi_strip_product(const dpoi_strip *strip, float *s, const float *q /* [n, D] */,
                               size_t q_row, const float *x)
{
    const dpoi_span *span = strip->span;
    dpoi_matrix before = dpoi_transposed(dpoi_strip_rows(strip, x, span->prefix));
    dpoi_matrix inside = dpoi_transposed(dpoi_strip_rows(strip, x, span->first));
    dpoi_matmul_serial(strip->pack, s, strip->keys, dpoi_rows(q, q_row), before, strip->n,
                       span->n_prefix, strip->D, 0, strip->as);
    dpoi_matmul_serial(strip->pack, s + span->n_prefix, strip->keys, dpoi_rows(q, q_row), inside,
                       strip->n, strip->own, strip->D, 0, strip->as);
}

/* y[n, D] = s[n, keys] X: P V, or dQ = ds K in the backward. */
static void dpoi_strip_gather(const dpoi_strip *strip, float *y, size_t y_row, const float *s,
                              const float *x)
{
    const dpoi_span *span = strip->span;
    dpoi_matrix scores = dpoi_rows(s, strip->keys);
    dpoi_matmul_serial(strip->pack, y, y_row, scores, dpoi_strip_rows(strip, x, span->prefix),
                       strip->n, strip->D, span->n_prefix, 0, strip->as);
    dpoi_matmul_serial(strip->pack, y, y_row, dpoi_submatrix(scores, 0, span->n_prefix),
                       dpoi_strip_rows(strip, x, span->first), strip->n, strip->D, strip->own, 1,
                       strip->as);
}

/* Forward: y = s X, so dX += s^T[keys, n] dy[n, D]: dV from P and dy, dK from ds and q. */
static void dpoi_strip_scatter(const dpoi_strip *strip, float *dx, const float *s, const float *dy,
                               size_t dy_row)
{
    const dpoi_span *span = strip->span;
    dpoi_matrix scores = dpoi_transposed(dpoi_rows(s, strip->keys)), rows = dpoi_rows(dy, dy_row);
    dpoi_matmul_serial(strip->pack, dx + span->prefix * strip->row, strip->row, scores, rows,
                       span->n_prefix, strip->D, strip->n, 1, strip->as);
    dpoi_matmul_serial(strip->pack, dx + span->first * strip->row, strip->row,
                       dpoi_submatrix(scores, span->n_prefix, 0), rows, strip->own, strip->D,
                       strip->n, 1, strip->as);
}

/* Turns a row's raw scores into scale * q_i . k_j - slope * (position i - position j): ALiBi (Press
   et al. 2021) has a penalty that grows with distance, added after the scaling, instead of position
   embeddings. */
static void dpoi_strip_scale(float *s /* [visible] */, size_t visible, float scale, float slope)
{
    const int32_t last = (int32_t)visible - 1; // vector units convert 32 bits to float faster
    for (int32_t j = 0; j <= last; j++) s[j] = s[j] * scale - slope * (float)(last - j);
}

/* s[n] = softmax(s), in place. Returns log(sum of exp(s)), from the true maximum. */
static float dpoi_softmax(float *s, size_t n)
{
    float most = dpoi_max(s, n);
    for (size_t j = 0; j < n; j++) s[j] = dpoi_exp(s[j] - most);
    float sum = dpoi_sum(s, n);
    for (size_t j = 0; j < n; j++) s[j] /= sum;
    return most + logf(sum);
}

/* y = softmax(scores) V for every head (Vaswani et al. 2017, equation 1), heads side by side in y.
   lse[r, h], the log of the sum of exp(score), lets the backward recompute each probability from
   its score alone, as exp(score - lse). */
static void dpoi_attention_forward(const dpo_context *context, float *y /* [R, C] */,
                                   float *lse /* [R, H] */, const float *qkv /* [R, 3C] */,
                                   const dpoi_attention *attention)
{
    dpoi_heads heads = attention->heads;
    size_t H = heads.H, D = heads.D, C = H * D, row = 3 * C;
    DPOI_PARALLEL_FOR(dpoi_threads(context, (size_t)attention->pairs * C))
    for (size_t task = 0; task < attention->n_examples * H; task++) {
        size_t example = task / H, h = task % H;
        const float *head = qkv + h * heads.head_stride;
        float *s = context->strip[dpoi_thread_index()];
        float slope = attention->slopes ? attention->slopes[h] : 0.0f;
        size_t end = attention->first_span[example + 1];
        for (size_t k = attention->first_span[example]; k < end; k++) {
            const dpoi_span *span = &attention->spans[k];
            for (size_t q0 = 0; q0 < span->n; q0 += DPOI_STRIP) {
                dpoi_strip strip = dpoi_strip_of(context, attention, span, q0);
                dpoi_strip_product(&strip, s, head + strip.first * row, row, head + heads.key);
                for (size_t i = 0; i < strip.n; i++) {
                    float *p = s + i * strip.keys;
                    size_t visible = span->n_prefix + q0 + i + 1;
                    dpoi_strip_scale(p, visible, attention->scale, slope);
                    lse[(strip.first + i) * H + h] = dpoi_softmax(p, visible);
                    for (size_t j = visible; j < strip.keys; j++) p[j] = 0.0f; // the future
                }
                dpoi_strip_gather(&strip, y + strip.first * C + h * D, C, s, head + heads.value);
            }
        }
    }
    dpoi_lap(context, DPO_TIME_ATTENTION, 4 * attention->pairs * (double)C, 0);
}

/* Forward: s = scale * Q K^T + bias, P = softmax(s), y = P V. Backwards through it:
       dV += P^T dy,   dP = dy V^T,
       ds = P * (dP - sum over j of P dP), by the softmax's Jacobian; the sum is just dy . y,
       dQ = scale * ds K,   dK += scale * ds^T Q     (below, ds has the scale in it).
   A prompt's keys and values collect from the prompt's own rows and from every branch; all of that
   happens inside one task, in the order of the spans. */
static void dpoi_attention_backward(const dpo_context *context, float *dqkv /* [R, 3C] */,
                                    const float *dy /* [R, C] */, const float *y /* [R, C] */,
                                    const float *lse /* [R, H] */, const float *qkv /* [R, 3C] */,
                                    const dpoi_attention *attention)
{
    dpoi_heads heads = attention->heads;
    size_t H = heads.H, D = heads.D, C = H * D, row = 3 * C;
    DPOI_PARALLEL_FOR(dpoi_threads(context, (size_t)attention->pairs * C))
    for (size_t task = 0; task < attention->n_examples * H; task++) {
        size_t example = task / H, h = task % H;
        const float *head = qkv + h * heads.head_stride;
        float *dhead = dqkv + h * heads.head_stride;
        float *p = context->strip[dpoi_thread_index()];
        float *ds = p + context->strip_floats / 2;
        float slope = attention->slopes ? attention->slopes[h] : 0.0f;
        size_t first = attention->first_span[example], end = attention->first_span[example + 1];
        for (size_t k = first; k < end; k++)
            for (size_t r = 0; r < attention->spans[k].n; r++) {
                float *drow = dhead + (attention->spans[k].first + r) * row;
                memset(drow + heads.key, 0, D * sizeof *drow);
                memset(drow + heads.value, 0, D * sizeof *drow);
            }
        for (size_t k = first; k < end; k++) {
            const dpoi_span *span = &attention->spans[k];
            for (size_t q0 = 0; q0 < span->n; q0 += DPOI_STRIP) {
                dpoi_strip strip = dpoi_strip_of(context, attention, span, q0);
                const float *q = head + strip.first * row, *dys = dy + strip.first * C + h * D;
                dpoi_strip_product(&strip, p, q, row, head + heads.key);
                dpoi_strip_product(&strip, ds, dys, C, head + heads.value);
                float inner[DPOI_STRIP]; // dy . y, all at once: their loads of y overlap
                for (size_t i = 0; i < strip.n; i++)
                    inner[i] = dpoi_dot(dys + i * C, y + (strip.first + i) * C + h * D, D);
                for (size_t i = 0; i < strip.n; i++) {
                    float *pi = p + i * strip.keys, *dsi = ds + i * strip.keys;
                    size_t visible = span->n_prefix + q0 + i + 1;
                    float log_sum = lse[(strip.first + i) * H + h];
                    dpoi_strip_scale(pi, visible, attention->scale, slope);
                    for (size_t j = 0; j < visible; j++) {
                        pi[j] = dpoi_exp(pi[j] - log_sum);
                        dsi[j] = attention->scale * pi[j] * (dsi[j] - inner[i]);
                    }
                    for (size_t j = visible; j < strip.keys; j++) pi[j] = dsi[j] = 0.0f;
                }
                dpoi_strip_gather(&strip, dhead + strip.first * row, row, ds, head + heads.key);
                dpoi_strip_scatter(&strip, dhead + heads.key, ds, q, row);
                dpoi_strip_scatter(&strip, dhead + heads.value, p, dys, C);
            }
        }
    }
    dpoi_lap(context, DPO_TIME_ATTENTION_BACK, 10 * attention->pairs * (double)C, 0);
}

/* For generation: the keys and values of all positions so far, by layer and head. */
typedef struct dpoi_cache {
    float *kv;          // [L, capacity, H, 2, D] key, then value
    size_t n, capacity; // positions
    float *scores;      // [H, capacity]
    float *logits;      // [V] for the token after the last position
} dpoi_cache;

/* Copies the keys and values in a row of qkv to position p of a layer. */
static void dpoi_cache_store(dpoi_cache *cache, const float *qkv /* [3C] */, dpoi_heads heads,
                             size_t layer, size_t p)
{
    float *kv = cache->kv + (layer * cache->capacity + p) * 2 * heads.H * heads.D;
    for (size_t h = 0; h < heads.H; h++, kv += 2 * heads.D) {
        memcpy(kv, qkv + h * heads.head_stride + heads.key, heads.D * sizeof *kv);
        memcpy(kv + heads.D, qkv + h * heads.head_stride + heads.value, heads.D * sizeof *kv);
    }
}

/* Attention of one more row, at position cache->n, where its own key and value are already. */
static void dpoi_attention_row(const dpo_context *context, float *y /* [C] */,
                               const dpoi_cache *cache, const float *qkv /* [3C] */, size_t layer,
                               const dpoi_attention *attention)
{
    dpoi_heads heads = attention->heads;
    size_t D = heads.D, row = 2 * heads.H * D, n = cache->n + 1;
    DPOI_PARALLEL_FOR(dpoi_threads(context, 2 * n * heads.H * D))
    for (size_t h = 0; h < heads.H; h++) {
        const float *q = qkv + h * heads.head_stride;
        const float *kv = cache->kv + layer * cache->capacity * row + 2 * h * D;
        float *p = cache->scores + h * cache->capacity, *yh = y + h * D;
        for (size_t j = 0; j < n; j++) p[j] = dpoi_dot(q, kv + j * row, D);
        dpoi_strip_scale(p, n, attention->scale, attention->slopes ? attention->slopes[h] : 0.0f);
        dpoi_softmax(p, n);
        for (size_t d = 0; d < D; d++) yh[d] = 0.0f;
        for (size_t j = 0; j < n; j++)
            for (size_t d = 0; d < D; d++) yh[d] += p[j] * kv[j * row + D + d];
    }
}

/* ---- 4.6 activations ------------------------------------------------------------------------- */

/* The activation's value, and its derivative in *slope. Inlined with a constant `kind`, so that the
   loops below have no branches.
       gelu        x Phi(x), Phi the normal distribution function       (Hendrycks, Gimpel 2016);
                   slope Phi(x) + x phi(x), phi the normal density
       gelu_new    x (1 + tanh(u)) / 2, u = sqrt(2/pi) (x + 0.044715 x^3); d tanh(u) is
                   (1 - tanh(u)^2) du. gelu_fast has the root rounded to ten digits, which fp32
                   cannot tell apart
       quick_gelu  x sigma(1.702 x); d sigma(u) is sigma(u) (1 - sigma(u)) du
       silu        x sigma(x) */
__attribute__((always_inline))
static inline float dpoi_activation(float x, float *slope, dpo_activation kind)
{
    switch (kind) {
    case DPO_GELU: {
        float phi = 0.5f * (1.0f + dpoi_erf(x * 0.70710678f));
        *slope = phi + x * 0.39894228f * dpoi_exp(-0.5f * x * x);
        return x * phi;
    }
    case DPO_GELU_NEW: case DPO_GELU_FAST: {
        float t = dpoi_tanh(0.7978845608f * (x + 0.044715f * x * x * x));
        *slope = 0.5f * (1.0f + t) +
                 0.5f * x * (1.0f - t * t) * 0.7978845608f * (1.0f + 3.0f * 0.044715f * x * x);
        return 0.5f * x * (1.0f + t);
    }
    case DPO_QUICK_GELU: case DPO_SILU: case DPO_SWIGLU: {
        float a = kind == DPO_QUICK_GELU ? 1.702f : 1.0f, s = dpoi_sigmoid(a * x);
        *slope = s + a * x * s * (1.0f - s);
        return x * s;
    }
    case DPO_RELU: break;
    }
    *slope = x > 0.0f ? 1.0f : 0.0f;
    return x > 0.0f ? x : 0.0f;
}

/* y = act(x); for SwiGLU (Shazeer 2020) y = x * silu(gate): BTLM's second matrix makes the gate. */
__attribute__((always_inline))
static inline void dpoi_activation_run(float *y, const float *x, const float *gate, size_t n,
                                       dpo_activation kind)
{
    float slope;
    if (kind == DPO_SWIGLU)
        for (size_t i = 0; i < n; i++) y[i] = x[i] * dpoi_activation(gate[i], &slope, DPO_SILU);
    else
        for (size_t i = 0; i < n; i++) y[i] = dpoi_activation(x[i], &slope, kind);
}

/* Forward: y = act(x), so dx = dy * act'(x). SwiGLU: y = x * silu(gate), so dx = dy * silu(gate)
   and dgate = dy * x * silu'(gate). dx may be dy itself. */
__attribute__((always_inline))
static inline void dpoi_activation_run_back(float *dx, float *dgate, const float *dy,
                                            const float *x, const float *gate, size_t n,
                                            dpo_activation kind)
{
    for (size_t i = 0; i < n; i++) {
        float slope, value = dpoi_activation(kind == DPO_SWIGLU ? gate[i] : x[i], &slope, kind);
        if (kind == DPO_SWIGLU) dgate[i] = dy[i] * x[i] * slope;
        dx[i] = dy[i] * (kind == DPO_SWIGLU ? value : slope);
    }
}

#define DPOI_FOR_EACH_ACTIVATION(call) \
    case DPO_GELU: call(DPO_GELU); break; \
    case DPO_GELU_NEW: case DPO_GELU_FAST: call(DPO_GELU_NEW); break; \
    case DPO_QUICK_GELU: call(DPO_QUICK_GELU); break; \
    case DPO_SILU: call(DPO_SILU); break; \
    case DPO_RELU: call(DPO_RELU); break; \
    case DPO_SWIGLU: call(DPO_SWIGLU); break;

/* Forward and backward go through the arrays in runs, and prefetch the next run meanwhile. The CPU
   prefetches by itself in simple loops, but not far enough ahead where each element takes this
   long: GELU waited more than it computed. */
#define DPOI_RUN 128

/* Prefetches the run of x[n] that follows the one at i. */
static inline void dpoi_fetch_next(const float *x, size_t i, size_t n)
{
    for (size_t j = i + DPOI_RUN; j < DPOI_MIN(i + 2 * DPOI_RUN, n); j += DPOI_LINE)
        __builtin_prefetch(x + j);
}

static void dpoi_activation_forward(const dpo_context *context, float *y /* [R, F] */,
                                    const float *x /* [R, F] */,
                                    const float *gate /* [R, F], NULL but for SwiGLU */,
                                    dpo_activation kind, size_t R, size_t F)
{
    const size_t n = R * F;
    DPOI_PARALLEL_PIECES(dpoi_threads(context, 16 * n))
    for (size_t piece = 0; piece < n; piece += DPOI_PIECE)
        for (size_t i = piece; i < DPOI_MIN(piece + DPOI_PIECE, n); i += DPOI_RUN) {
            const size_t count = DPOI_MIN(n - i, (size_t)DPOI_RUN);
            const float *g = gate ? gate + i : NULL;
            dpoi_fetch_next(x, i, n);
            if (gate) dpoi_fetch_next(gate, i, n);
#define DPOI_CALL(constant) dpoi_activation_run(y + i, x + i, g, count, constant)
            switch (kind) { DPOI_FOR_EACH_ACTIVATION(DPOI_CALL) }
#undef DPOI_CALL
        }
    dpoi_lap(context, DPO_TIME_ACTIVATION, 0, (gate ? 12.0 : 8.0) * (double)n);
}

static void dpoi_activation_backward(const dpo_context *context, float *dx, float *dgate,
                                     const float *dy, const float *x, const float *gate, // [R, F]
                                     dpo_activation kind, size_t R, size_t F)
{
    const size_t n = R * F;
    DPOI_PARALLEL_PIECES(dpoi_threads(context, 16 * n))
    for (size_t piece = 0; piece < n; piece += DPOI_PIECE)
        for (size_t i = piece; i < DPOI_MIN(piece + DPOI_PIECE, n); i += DPOI_RUN) {
            const size_t count = DPOI_MIN(n - i, (size_t)DPOI_RUN);
            const float *g = gate ? gate + i : NULL;
            float *dg = dgate ? dgate + i : NULL;
            dpoi_fetch_next(dy, i, n);
            dpoi_fetch_next(x, i, n);
            if (gate) dpoi_fetch_next(gate, i, n);
#define DPOI_CALL(constant) \
    dpoi_activation_run_back(dx + i, dg, dy + i, x + i, g, count, constant)
            switch (kind) { DPOI_FOR_EACH_ACTIVATION(DPOI_CALL) }
#undef DPOI_CALL
        }
    dpoi_lap(context, DPO_TIME_ACTIVATION_BACK, 0, (gate ? 20.0 : 12.0) * (double)n);
}

/* ================================================================================================
   5. HEAD AND LOSSES

   The head turns a hidden row h [C] into logits [V], logits = scale * h W^T with W [V, C], and from
   them comes log p(token) = logit[token] - log(sum over v of exp(logit[v])). V is fifty thousand:
   the head costs as much as several blocks, and its logits would be the largest array of all. So it
   runs on the S scored rows only (a prompt's rows before its last predict nothing anybody asks
   for), and it goes through the vocabulary in chunks, keeping of each row just the largest logit so
   far and the sum of exponentials relative to it.

   One row can have several targets: the prompt's last row predicts the first token of every branch.
   ============================================================================================= */

/* ---- 5.1 the head ---------------------------------------------------------------------------- */

typedef struct dpoi_target {
    uint32_t token;
    uint32_t branch;
    size_t scored;      // index of the scored row that predicts it
} dpoi_target;

#define DPOI_CHUNK 1024     // tokens of the vocabulary at a time: 4 MB of logits for 1024 rows

/* For every scored row: log_sum[s] = log of the sum of exp(logit), from the true maximum, and
   argmax[s]; for every target: target_logit. Nothing of size [S, V] is kept.

   A frozen head's backward needs of the logits only mean[s] = sum over v of p[v] W[v]. It is summed
   here, where the logits are, unnormalised as log_sum is; so the backward need not compute them
   again, which saves a third of all the head's work. */
static void dpoi_head_forward(const dpo_context *context, double *log_sum /* [S] */,
                              uint32_t *argmax /* [S] */, float *target_logit /* [n_targets] */,
                              float *mean /* [S, C], NULL if it is not wanted */,
                              float *logits /* [S, DPOI_CHUNK] scratch */,
                              const float *h /* [S, C] */, const dpo_tensor *W /* [V, C] */,
                              float scale,
                              const dpoi_target *targets, const size_t *first_target /* [S + 1] */,
                              float *most /* [S] scratch */, size_t S)
{
    size_t V = W->shape[0], C = W->shape[1];
    for (size_t v0 = 0; v0 < V; v0 += DPOI_CHUNK) {
        size_t n = DPOI_MIN(V - v0, (size_t)DPOI_CHUNK);
        dpoi_matrix chunk = dpoi_submatrix(dpoi_weight(W), 0, v0); // [C, n]
        dpoi_matmul(context, logits, n, dpoi_rows(h, C), chunk, S, n, C, 0, W->dtype);
        DPOI_PARALLEL_ROWS(dpoi_threads(context, 8 * S * n))
        for (size_t s = 0; s < S; s++) {
            float *l = logits + s * n;
            for (size_t t = first_target[s]; t < first_target[s + 1]; t++)
                if (targets[t].token >= v0 && targets[t].token < v0 + n)
                    target_logit[t] = scale * l[targets[t].token - v0];
            const float largest = dpoi_max(l, n), chunk_most = scale * largest;
            if (v0 == 0 || chunk_most > most[s]) {
                size_t v = 0;
                while (v < n - 1 && l[v] != largest) v++;
                const double smaller = v0 == 0 ? 0.0 : exp((double)most[s] - chunk_most);
                log_sum[s] = v0 == 0 ? 0.0 : log_sum[s] * smaller;
                for (size_t c = 0; c < C && mean && v0 > 0; c++) mean[s * C + c] *= (float)smaller;
                most[s] = chunk_most;
                argmax[s] = (uint32_t)(v0 + v);
            }
            const float shift = most[s];
            for (size_t v = 0; v < n; v++) l[v] = dpoi_exp(scale * l[v] - shift);
            log_sum[s] += dpoi_sum(l, n);
        }
        if (mean)
            dpoi_matmul(context, mean, C, dpoi_rows(logits, n), dpoi_transposed(chunk), S, C, n,
                        v0 > 0, W->dtype);
    }
    DPOI_PARALLEL_ROWS(dpoi_threads(context, mean ? S * C : S))
    for (size_t s = 0; s < S; s++) {
        const float sum = (float)log_sum[s];
        for (size_t c = 0; c < C && mean; c++) mean[s * C + c] /= sum;
        log_sum[s] = most[s] + log(log_sum[s]);
    }
    dpoi_lap(context, DPO_TIME_HEAD, (mean ? 4.0 : 2.0) * (double)S * (double)(V * C), 0);
}

/* Forward: logits = scale * h W^T, logp[b] = sum over b's targets of logit[token] - log_sum. With
   coefficients c = d loss / d logp[b] summed over the targets t of a row,
       dlogit[v] = sum over t of c_t [token_t = v] - (sum over t of c_t) exp(logit[v] - log_sum):
   the softmax's "onehot - p", times one scalar per branch. The logits are computed again, chunk by
   chunk, which costs a product and saves S x V floats.
       dh = scale * dlogit W,   dW += scale * dlogit^T h. */
static void dpoi_head_backward(const dpo_context *context, float *dh /* [S, C] */,
                               float *logits /* [S, DPOI_CHUNK] scratch */, const double *dlogp,
                               const double *log_sum /* [S] */, const float *h /* [S, C] */,
                               const dpo_tensor *W /* [V, C] */, float scale,
                               const dpoi_target *targets, const size_t *first_target, size_t S)
{
    size_t V = W->shape[0], C = W->shape[1];
    for (size_t v0 = 0; v0 < V; v0 += DPOI_CHUNK) {
        size_t n = DPOI_MIN(V - v0, (size_t)DPOI_CHUNK);
        dpoi_matrix chunk = dpoi_submatrix(dpoi_weight(W), 0, v0); // [C, n]
        dpoi_matmul(context, logits, n, dpoi_rows(h, C), chunk, S, n, C, 0, W->dtype);
        DPOI_PARALLEL_ROWS(dpoi_threads(context, 8 * S * n))
        for (size_t s = 0; s < S; s++) {
            float *l = logits + s * n;
            double total = 0.0;
            for (size_t t = first_target[s]; t < first_target[s + 1]; t++)
                total += dlogp[targets[t].branch];
            float factor = -(float)(scale * total), shift = (float)log_sum[s];
            for (size_t v = 0; v < n; v++) l[v] = factor * dpoi_exp(scale * l[v] - shift);
            for (size_t t = first_target[s]; t < first_target[s + 1]; t++)
                if (targets[t].token >= v0 && targets[t].token < v0 + n)
                    l[targets[t].token - v0] += (float)(scale * dlogp[targets[t].branch]);
        }
        dpoi_matmul(context, dh, C, dpoi_rows(logits, n), dpoi_transposed(chunk), S, C, n, v0 > 0,
                    W->dtype);
        dpoi_add_product(context, W, v0, dpoi_transposed(dpoi_rows(logits, n)), dpoi_rows(h, C), n,
                         S);
    }
    dpoi_lap(context, DPO_TIME_HEAD_BACK, 6.0 * (double)S * (double)(V * C), 0);
}

/* The same for a frozen head, with the mean of the forward, whose place dh takes:
       dh = scale * (sum over t of c_t W[token_t] - (sum over t of c_t) mean). */
static void dpoi_head_backward_frozen(const dpo_context *context, float *dh /* [S, C] */,
                                      const double *dlogp, const dpo_tensor *W /* [V, C] */,
                                      float scale, const dpoi_target *targets,
                                      const size_t *first_target, size_t S)
{
    const size_t C = W->shape[1];
    DPOI_PARALLEL_ROWS(dpoi_threads(context, 2 * S * C))
    for (size_t s = 0; s < S; s++) {
        float *row = dh + s * C;
        double total = 0.0;
        for (size_t t = first_target[s]; t < first_target[s + 1]; t++)
            total += dlogp[targets[t].branch];
        const float factor = -(float)(scale * total);
        for (size_t c = 0; c < C; c++) row[c] *= factor;
        for (size_t t = first_target[s]; t < first_target[s + 1]; t++) {
            const float share = (float)(scale * dlogp[targets[t].branch]);
            for (size_t c = 0; c < C; c++)
                row[c] += share * dpoi_weight_at(W, targets[t].token * C + c);
        }
    }
    dpoi_lap(context, DPO_TIME_HEAD_BACK, 0, 12.0 * (double)(S * C));
}

/* ---- 5.2 preference losses ------------------------------------------------------------------- */

/* log(1 + exp(x)) without overflow; -log sigma(z) = softplus(-z). */
static double dpoi_softplus(double x) { return x > 0 ? x + log1p(exp(-x)) : log1p(exp(x)); }
static double dpoi_logistic(double x) { return x >= 0 ? 1 / (1 + exp(-x)) : exp(x) / (1 + exp(x)); }

/* With log-ratios r = logp(policy) - logp(reference) of chosen (w) and rejected (l), h = r_w - r_l:
       sigmoid   -log sigma(beta h)                              Rafailov et al. 2023, equation 7
         with eps: -(1 - eps) log sigma(beta h) - eps log sigma(-beta h)         Mitchell 2023, cDPO
       ipo       (r_w / n_w - r_l / n_l - 1 / (2 beta))^2        Azar et al. 2023, equation 17,
                 averaged over tokens as its authors do; ipo-sum is the same on h itself
       hinge     max(0, 1 - beta h)                Liu et al. 2023, RSO: the hinge of SLiC
                 (Zhao et al. 2023) on log-ratios to a reference
   Each reaches the model through two numbers, d loss / d logp of the two answers: backwards, DPO is
   SFT with one scalar per answer. */
DPO_API dpo_pair dpo_pair_loss(const dpo_score *scores, const double *reference,
                               const dpo_loss_options *options)
{
    dpo_pair pair = { 0 };
    double beta = options->beta, eps = options->label_smoothing;
    double ratio[2] = { scores[0].logp - reference[0], scores[1].logp - reference[1] };
    double weight[2] = { 1.0, -1.0 }; // dh / dlogp
    if (options->kind == DPO_LOSS_IPO) // per token
        for (int k = 0; k < 2; k++) weight[k] /= (double)scores[k].n_scored;
    double h = ratio[0] * weight[0] + ratio[1] * weight[1], z = beta * h;
    double error = h - 1 / (2 * beta), dh = 0.0; // error is IPO's
    switch (options->kind) {
    case DPO_LOSS_SIGMOID: // d/dz -log sigma(z) = -sigma(-z)
        pair.loss = (1 - eps) * dpoi_softplus(-z) + eps * dpoi_softplus(z);
        dh = beta * (eps - dpoi_logistic(-z));
        break;
    case DPO_LOSS_IPO:
    case DPO_LOSS_IPO_SUM:
        pair.loss = error * error;
        dh = 2 * error;
        break;
    case DPO_LOSS_HINGE:
        pair.loss = z < 1 ? 1 - z : 0.0;
        dh = z < 1 ? -beta : 0.0;
        break;
    }
    if (isnan(z)) pair.loss = z; // a comparison would have hidden it
    for (int k = 0; k < 2; k++) {
        pair.dlogp[k] = dh * weight[k];
        pair.reward[k] = beta * ratio[k];
    }
    return pair;
}

/* ---- 5.3 metrics ----------------------------------------------------------------------------- */

typedef struct dpoi_clustered { size_t group; double value; } dpoi_clustered;

static int dpoi_by_group(const void *a, const void *b)
{
    size_t x = ((const dpoi_clustered *)a)->group, y = ((const dpoi_clustered *)b)->group;
    return x < y ? -1 : x > y;
}

/* Pairs of one prompt are not independent draws, so the standard error of a mean a is clustered:
   se^2 = G / (G - 1) sum over prompts g of (sum over its members of (value - a))^2 / n^2. */
DPO_API int dpo_mean_error(dpo_context *context, double *mean, double *error, const double *values,
                           const dpo_example *examples, size_t n)
{
    dpoi_clustered *members; // [n], to be sorted so that each prompt's stand together
    *mean = *error = 0.0;
    if (dpoi_alloc(context, &members, n, sizeof *members)) return 1;
    for (size_t i = 0; i < n; i++) {
        members[i] = (dpoi_clustered){ examples[i].group, values[i] };
        *mean += values[i];
    }
    if (n) *mean /= (double)n;
    qsort(members, n, sizeof *members, dpoi_by_group);
    double squares = 0.0;
    size_t n_groups = 0;
    for (size_t i = 0; i < n; n_groups++) {
        double difference = 0.0;
        size_t group = members[i].group;
        for (; i < n && members[i].group == group; i++) difference += members[i].value - *mean;
        squares += difference * difference;
    }
    if (n_groups > 1)
        *error = sqrt(squares * (double)n_groups / (double)(n_groups - 1)) / (double)n;
    dpoi_free(context, members);
    return 0;
}

/* Accuracy is TRL's rewards/accuracies: the share of pairs whose chosen answer has the strictly
   larger reward. */
DPO_API int dpo_metrics_compute(dpo_context *context, dpo_metrics *metrics, double *margins,
                                const dpo_example *examples, const dpo_score *scores,
                                const double *reference, size_t n, const dpo_loss_options *options)
{
    *metrics = (dpo_metrics){ .n = n };
    for (size_t i = 0; i < n; i++)
        if (examples[i].n_branches != 2)
            return dpoi_fail(context, "example %zu has %zu branches; a preference pair has 2", i,
                             examples[i].n_branches);
    double *hits; // [n]
    if (dpoi_alloc(context, &hits, n, sizeof *hits)) return 1;
    for (size_t i = 0; i < n; i++) {
        dpo_pair pair = dpo_pair_loss(scores + 2 * i, reference + 2 * i, options);
        double margin = pair.reward[0] - pair.reward[1];
        metrics->loss += pair.loss / (double)n;
        metrics->margin += margin / (double)n;
        metrics->ties += margin == 0;
        for (int k = 0; k < 2; k++) {
            metrics->reward[k] += pair.reward[k] / (double)n;
            metrics->logp[k] += scores[2 * i + k].logp / (double)n;
        }
        if (margins) margins[i] = margin;
        hits[i] = margin > 0;
    }
    int failed = dpo_mean_error(context, &metrics->accuracy, &metrics->accuracy_error, hits,
                                examples, n);
    dpoi_free(context, hits);
    return failed;
}

/* ================================================================================================
   6. MODEL

   A decoder-only transformer: embed the tokens, pass the residual stream x [R, C] through L blocks,
   normalise, and ask the head. One block function serves both architectures:

       parallel (GPT-NeoX):      out = x + attention(norm1(x)) + mlp(norm2(x))
       sequential (BTLM, GPT-2): out = middle + mlp(norm2(middle)), middle = x + attention(norm1(x))

       attention(z) = heads(z W_qkv^T + b_qkv) W_out^T + b_out      (the heads are part 4.5)
       mlp(z)       = act(up) W_down^T + b_down,                    up = z W_up^T + b_up,
                      with up * silu(gate) for act(up) in SwiGLU,   gate = z W_gate^T + b_gate

   A forward that keeps its activations stores for each layer what the backward cannot cheaply
   recompute: the block's input, q k v, the output of the heads and their log-sum-exp, the middle of
   a sequential block, up and gate. The outputs of norms and of act are computed again. A forward
   that does not keep runs every layer in the same buffers.
   ============================================================================================= */

/* ---- 6.1 config ------------------------------------------------------------------------------ */

/* A struct's fields by their JSON names: one list checks, reads and writes them. */
typedef enum { DPOI_SIZE, DPOI_REAL, DPOI_FLAG, DPOI_ID, DPOI_CHOICE, DPOI_CHARS } dpoi_field_kind;
typedef struct dpoi_field {
    const char *name;
    dpoi_field_kind kind;
    size_t offset;              // in the struct
    size_t most;                // the largest value of a size, 0: any; the bytes of a char array
    const char *const *choices; // an enum's names, NULL at the end
} dpoi_field;

static const char *const dpoi_architecture_names[] = { "gpt_neox", "btlm", NULL };
static const char *const dpoi_position_names[] = { "rotary", "alibi", "learned", NULL };
static const char *const dpoi_activation_names[] = { "gelu", "gelu_new", "gelu_fast", "quick_gelu",
                                                     "silu", "relu", "swiglu", NULL };

// Within these limits no product of sizes below can overflow.
#define DPOI_FIELD(kind, member, most) { #member, kind, offsetof(dpo_config, member), most, NULL }
static const dpoi_field dpoi_config_fields[] = {
    { "arch", DPOI_CHOICE, offsetof(dpo_config, architecture), 0, dpoi_architecture_names },
    DPOI_FIELD(DPOI_SIZE, vocab_size, 1 << 24), DPOI_FIELD(DPOI_SIZE, context_length, 1 << 24),
    DPOI_FIELD(DPOI_SIZE, d_model, 1 << 20), DPOI_FIELD(DPOI_SIZE, n_layers, 1 << 10),
    DPOI_FIELD(DPOI_SIZE, n_heads, 1 << 20), DPOI_FIELD(DPOI_SIZE, d_ff, 1 << 20),
    { "position", DPOI_CHOICE, offsetof(dpo_config, position), 0, dpoi_position_names },
    DPOI_FIELD(DPOI_SIZE, rotary_dims, 0), DPOI_FIELD(DPOI_REAL, rotary_base, 0),
    { "activation", DPOI_CHOICE, offsetof(dpo_config, activation), 0, dpoi_activation_names },
    DPOI_FIELD(DPOI_FLAG, parallel_residual, 0), DPOI_FIELD(DPOI_FLAG, attention_bias, 0),
    DPOI_FIELD(DPOI_FLAG, tied_head, 0), DPOI_FIELD(DPOI_REAL, norm_epsilon, 0),
    DPOI_FIELD(DPOI_REAL, embedding_scale, 0), DPOI_FIELD(DPOI_REAL, logit_scale, 0),
    DPOI_FIELD(DPOI_REAL, attention_scale, 0), DPOI_FIELD(DPOI_FLAG, attention_scale_by_layer, 0),
    DPOI_FIELD(DPOI_REAL, alibi_factor, 0), DPOI_FIELD(DPOI_REAL, mup_width_scale, 0),
    DPOI_FIELD(DPOI_ID, bos_id, 0), DPOI_FIELD(DPOI_ID, eos_id, 0), { 0 } };
_Static_assert(sizeof(dpo_activation) == sizeof(int), "the config's enums are read as ints");

DPO_API void dpo_config_default(dpo_config *config, dpo_architecture architecture)
{
    int btlm = architecture == DPO_BTLM;
    size_t D = config->n_heads ? config->d_model / config->n_heads : 0;
    config->architecture = architecture;
    if (!config->d_ff) config->d_ff = 4 * config->d_model;
    config->position = btlm ? DPO_ALIBI : DPO_ROTARY;
    config->rotary_dims = btlm ? 0 : D / 8 * 2; // a quarter of each head
    config->rotary_base = 10000.0;
    config->activation = btlm ? DPO_SWIGLU : DPO_GELU;
    config->parallel_residual = !btlm;
    config->attention_bias = 1;
    config->tied_head = btlm;
    config->norm_epsilon = 1e-5;
    // muP (Yang et al. 2022) as BTLM uses it, relative to a base model of width 256.
    config->mup_width_scale = btlm && config->d_model ? 256.0 / (double)config->d_model : 1.0;
    config->embedding_scale = btlm ? 14.6 : 1.0;
    config->logit_scale = btlm ? 2.22 * config->mup_width_scale : 1.0;
    config->attention_scale = !D ? 1.0 : btlm ? 1.0 / (double)D : 1.0 / sqrt((double)D);
    config->attention_scale_by_layer = 0;
    config->alibi_factor = 1.0;
    config->bos_id = config->eos_id = -1;
}

DPO_API int dpo_config_check(dpo_context *context, const dpo_config *config)
{
    for (const dpoi_field *field = dpoi_config_fields; field->name; field++) {
        const void *at = (const char *)config + field->offset;
        const size_t size = field->most ? *(const size_t *)at : 1;
        const double real = field->kind == DPOI_REAL ? *(const double *)at : 1.0;
        if (field->most && (size < 1 || size > field->most))
            return dpoi_fail(context, "config: %s is %zu; it must be 1 to %zu", field->name, size,
                             field->most);
        if (!(real > 0 && real < 1e9))
            return dpoi_fail(context, "config: %s is %g; it must be a positive number", field->name,
                             real);
        int n_choices = 0;
        while (field->choices && field->choices[n_choices]) n_choices++;
        if (n_choices && (*(const int *)at < 0 || *(const int *)at >= n_choices))
            return dpoi_fail(context, "config: %s is %d; it must be 0 to %d", field->name,
                             *(const int *)at, n_choices - 1);
    }
    if (config->d_model % config->n_heads)
        return dpoi_fail(context, "config: d_model %zu is not a multiple of n_heads %zu",
                         config->d_model, config->n_heads);
    size_t D = config->d_model / config->n_heads;
    if (config->position == DPO_ROTARY && (config->rotary_dims % 2 || config->rotary_dims > D))
        return dpoi_fail(context, "config: rotary_dims is %zu; it must be even and at most the "
                         "head size, %zu", config->rotary_dims, D);
    int btlm = config->architecture == DPO_BTLM;
    if (btlm ? config->position == DPO_ROTARY || config->parallel_residual ||
                   !config->attention_bias
             : config->position != DPO_ROTARY || config->activation == DPO_SWIGLU)
        return dpoi_fail(context, "config: %s; no Hugging Face model of this architecture has that",
                         btlm ? "BTLM with rotary positions, a parallel residual or without biases"
                              : "GPT-NeoX with other positions than rotary, or with SwiGLU");
    int64_t V = (int64_t)config->vocab_size;
    if (config->bos_id < -1 || config->bos_id >= V || config->eos_id < -1 || config->eos_id >= V)
        return dpoi_fail(context, "config: bos_id %lld or eos_id %lld is not in the vocabulary of "
                         "%zu", (long long)config->bos_id, (long long)config->eos_id,
                         config->vocab_size);
    return 0;
}

/* ---- 6.2 the table of tensors ---------------------------------------------------------------- */

typedef struct dpoi_block_weights {
    dpo_tensor *norm1_w, *norm1_b, *qkv_w, *qkv_b, *out_w, *out_b;  // biases of linears may be NULL
    dpo_tensor *norm2_w, *norm2_b, *up_w, *up_b, *down_w, *down_b;
    dpo_tensor *gate_w, *gate_b;                                    // SwiGLU's, otherwise NULL
} dpoi_block_weights;

typedef struct dpoi_weights {
    dpo_tensor *embedding, *positions;  // positions NULL unless learned
    dpo_tensor *norm_w, *norm_b, *head; // head == embedding when tied
    dpo_tensor *slopes;                 // ALiBi
    dpoi_block_weights *blocks;         // [L]
} dpoi_weights;

/* Adds a tensor to the table; without `columns`, a vector. */
static dpo_tensor *dpoi_add_tensor(dpo_model *model, dpo_layout layout, size_t rows, size_t columns,
                                   double lr_scale, const char *name)
{
    dpo_tensor *tensor = &model->tensors[model->n_tensors++];
    *tensor = (dpo_tensor){ .layout = layout, .n_dims = columns ? 2 : 1, .trainable = 1,
                            .dtype = DPO_F32, .grad_dtype = DPO_F32,
                            .decays = columns > 0, .lr_scale = lr_scale,
                            .shape = { rows, columns ? columns : 1 } };
    tensor->n = tensor->shape[0] * tensor->shape[1];
    snprintf(tensor->name, sizeof tensor->name, "%s", name);
    return tensor;
}

/* Gives each trainable tensor its offset in the optimizer's arrays. */
static void dpoi_number_trainable(dpo_model *model)
{
    model->n_trainable = 0;
    for (size_t i = 0; i < model->n_tensors; i++) {
        model->tensors[i].offset = model->n_trainable;
        if (model->tensors[i].trainable) model->n_trainable += model->tensors[i].n;
    }
}

/* Adds weight and bias of a linear layer or, if `in` is 0, of a norm. A linear layer's weight is
   [out, in] in GPT-NeoX and [in, out] in BTLM. */
static void dpoi_add_pair(dpo_model *model, dpo_tensor **w, dpo_tensor **b, const char *path,
                          size_t in, size_t out, int bias)
{
    const int btlm = model->config.architecture == DPO_BTLM;
    const double lr_scale = in ? model->config.mup_width_scale : 1.0;
    char name[DPO_NAME_BYTES];
    snprintf(name, sizeof name, "%s.weight", path);
    *w = dpoi_add_tensor(model, !in ? DPO_PLAIN : btlm ? DPO_CONV1D : DPO_LINEAR,
                         in && btlm ? in : out, in && btlm ? out : in, lr_scale, name);
    snprintf(name, sizeof name, "%s.bias", path);
    *b = bias ? dpoi_add_tensor(model, DPO_PLAIN, out, 0, 1.0, name) : NULL;
}

/* norm1 comes first and down last, on which dpoi_lowest_trained relies. */
static void dpoi_add_block(dpo_model *model, size_t layer)
{
    const dpo_config *config = &model->config;
    const int btlm = config->architecture == DPO_BTLM, bias = config->attention_bias;
    const size_t C = config->d_model, F = config->d_ff;
    dpoi_block_weights *block = &model->weights->blocks[layer];
    const struct {
        dpo_tensor **w, **b;
        const char *names[2];   // in GPT-NeoX and in BTLM
        size_t in, out;
        int bias;
    } pairs[] = {
        { &block->norm1_w, &block->norm1_b, { "input_layernorm", "ln_1" }, 0, C, 1 },
        { &block->norm2_w, &block->norm2_b, { "post_attention_layernorm", "ln_2" }, 0, C, 1 },
        { &block->qkv_w, &block->qkv_b, { "attention.query_key_value", "attn.c_attn" }, C, 3 * C,
          bias },
        { &block->out_w, &block->out_b, { "attention.dense", "attn.c_proj" }, C, C, bias },
        { &block->up_w, &block->up_b, { "mlp.dense_h_to_4h", "mlp.c_fc" }, C, F, 1 },
        { &block->gate_w, &block->gate_b, { "", "mlp.c_fc2" }, C, F, 1 },
        { &block->down_w, &block->down_b, { "mlp.dense_4h_to_h", "mlp.c_proj" }, F, C, 1 } };
    for (size_t i = 0; i < sizeof pairs / sizeof *pairs; i++) {
        char path[DPO_NAME_BYTES - sizeof ".weight"];
        if (pairs[i].w == &block->gate_w && config->activation != DPO_SWIGLU) continue;
        snprintf(path, sizeof path, "%s.%zu.%s", btlm ? "transformer.h" : "gpt_neox.layers", layer,
                 pairs[i].names[btlm]);
        dpoi_add_pair(model, pairs[i].w, pairs[i].b, path, pairs[i].in, pairs[i].out,
                      pairs[i].bias);
    }
}

/* Builds the table from the config; options.dtype 0 becomes DPO_F32. */
static int dpoi_build_table(dpo_model *model)
{
    dpo_context *context = model->context;
    const dpo_config *config = &model->config;
    size_t C = config->d_model, L = config->n_layers;
    int btlm = config->architecture == DPO_BTLM;
    if (!model->options.dtype) model->options.dtype = DPO_F32;
    if (model->options.dtype != DPO_F32 && model->options.dtype != DPO_BF16)
        return dpoi_fail(context, "a model's dtype must be DPO_F32 or DPO_BF16");
    if (dpo_config_check(context, config) ||
        // a block's tensors, and A and B of its linear layers
        dpoi_alloc_zeroed(context, &model->tensors, (14 + 10) * L + 6, sizeof *model->tensors) ||
        dpoi_alloc_zeroed(context, &model->weights, 1, sizeof *model->weights) ||
        dpoi_alloc_zeroed(context, &model->weights->blocks, L, sizeof *model->weights->blocks))
        return 1;
    dpoi_weights *weights = model->weights;
    weights->embedding = dpoi_add_tensor(model, DPO_PLAIN, config->vocab_size, C, 1.0, btlm ?
                                         "transformer.wte.weight" : "gpt_neox.embed_in.weight");
    if (config->position == DPO_LEARNED)
        weights->positions = dpoi_add_tensor(model, DPO_PLAIN, config->context_length, C, 1.0,
                                             "transformer.wpe.weight");
    for (size_t l = 0; l < L; l++) dpoi_add_block(model, l);
    dpoi_add_pair(model, &weights->norm_w, &weights->norm_b,
                  btlm ? "transformer.ln_f" : "gpt_neox.final_layer_norm", 0, C, 1);
    weights->head = config->tied_head ? weights->embedding
                  : dpoi_add_tensor(model, DPO_LINEAR, config->vocab_size, C, 1.0,
                                    btlm ? "lm_head.weight" : "embed_out.weight");
    if (config->position == DPO_ALIBI) {
        weights->slopes = dpoi_add_tensor(model, DPO_PLAIN, config->n_heads, 1, 1.0,
                                          "transformer.relative_pe.slopes");
        weights->slopes->trainable = weights->slopes->decays = 0;
    }
    for (size_t i = 0; i < model->n_tensors; i++) {
        dpo_tensor *tensor = &model->tensors[i];
        model->n_params += tensor->n;
        if (model->options.frozen) tensor->trainable = 0;
        if (model->options.dtype != DPO_BF16 || tensor->shape[1] == 1) continue;
        tensor->dtype = DPO_BF16;
        // The embedding's gradient stays fp32: adding rows one by one would round too often.
        if (model->options.stochastic && tensor->layout != DPO_PLAIN) tensor->grad_dtype = DPO_BF16;
    }
    dpoi_number_trainable(model);
    return 0;
}

/* ---- 6.3 where the weights live -------------------------------------------------------------- */

/* Matrices are fp32 or bf16; vectors (biases, norms, slopes) are a thousandth of the parameters and
   always fp32. Weights that nothing will change and that have the right type already are used where
   they lie, in the mapped file: they take page cache, which the system can drop, instead of memory,
   and are read only when used. All others are in model->params. */

static size_t dpoi_aligned(size_t bytes)
{
    return dpoi_divide_up(bytes, DPOI_ALIGN) * DPOI_ALIGN;
}

/* Bytes of n elements, rounded up to whole floats, so that floats may follow them. */
static size_t dpoi_whole_floats(size_t n, dpo_dtype dtype)
{
    return (n * dpoi_dtype_bytes(dtype) + 3) / 4 * 4;
}

typedef struct dpoi_storage {   // bytes
    size_t params, masters;     // weights outside the file; fp32 masters
    size_t largest;             // the file's largest tensor
    size_t state;               // trainable weights in a training state
} dpoi_storage;

/* Called a first time to add up the storage, and again once params and masters are allocated, to
   point each tensor into them (tensors used in the mapped file point there at once). */
static dpoi_storage dpoi_place_weights(dpo_model *model, const dpo_file *file)
{
    dpoi_storage storage = { 0 };
    const int frozen = model->options.frozen;
    const int masters = model->options.dtype == DPO_BF16 && !model->options.stochastic && !frozen;
    for (size_t i = 0; i < model->n_tensors; i++) {
        dpo_tensor *tensor = &model->tensors[i];
        const dpo_entry *entry = file ? dpo_file_find(file, tensor->name) : NULL;
        size_t bytes = tensor->n * dpoi_dtype_bytes(tensor->dtype);
        if (entry) storage.largest = DPOI_MAX(storage.largest, entry->bytes);
        if (frozen && entry && entry->dtype == tensor->dtype)
            tensor->data = (void *)(uintptr_t)entry->data;
        else {
            if (model->params) tensor->data = (char *)model->params + storage.params;
            storage.params += dpoi_whole_floats(tensor->n, tensor->dtype);
        }
        if (masters && tensor->dtype == DPO_BF16) {
            if (model->masters) tensor->master = model->masters + storage.masters / sizeof(float);
            bytes = tensor->n * sizeof(float);
            storage.masters += bytes;
        }
        if (tensor->trainable) storage.state += dpoi_aligned(bytes);
    }
    return storage;
}

/* Allocates the weights that are not mapped, all without a file, and points the table at them. */
static int dpoi_allocate_weights(dpo_model *model, const dpo_file *file)
{
    dpoi_storage storage = dpoi_place_weights(model, file);
    if (dpoi_alloc(model->context, &model->params, storage.params, 1)) return 1;
    if (storage.masters && dpoi_alloc(model->context, &model->masters, storage.masters, 1))
        return 1;
    dpoi_place_weights(model, file);
    return 0;
}

/* Sets elements [first, first + n) of a tensor. Of a tensor with a master, the master takes the
   floats and the bf16 data their rounding. */
static void dpoi_tensor_set(dpo_tensor *tensor, size_t first, const float *x, size_t n)
{
    char *data = tensor->data;
    if (tensor->master) memcpy(tensor->master + first, x, n * sizeof *x);
    dpoi_narrow(data + first * dpoi_dtype_bytes(tensor->dtype), tensor->dtype, x, n);
}

/* Gets elements [first, first + n) as floats, from the master if there is one. */
static void dpoi_tensor_get(const dpo_tensor *tensor, size_t first, float *x, size_t n)
{
    const char *data = tensor->data;
    if (tensor->master) memcpy(x, tensor->master + first, n * sizeof *x);
    else dpoi_widen(x, data + first * dpoi_dtype_bytes(tensor->dtype), tensor->dtype, n);
}

/* ---- 6.4 LoRA -------------------------------------------------------------------------------- */

/* What fine-tuning adds to a matrix is close to a matrix of low rank (Hu et al. 2021, equation 3).
   So W itself stays frozen, and A and B are learned in
       y = x W^T + b + scale * (x A^T) B^T,   A[r, in], B[out, r], scale = alpha / r:
   r (in + out) parameters instead of in x out. B starts as zero, so training starts at the model
   itself. A and B stay fp32, and so do their products, whatever W is. */
enum { DPOI_MAX_RANK = 1 << 20 };

static float dpoi_lora_scale(const dpo_lora *lora)
{
    return (float)(lora->alpha / (lora->rslora ? sqrt((double)lora->r) : (double)lora->r));
}

/* Whether a tensor is the weight of a linear layer that PEFT would adapt: a target is a module's
   path, or what follows a dot in it up to its end. The head takes no adapter. */
static int dpoi_is_target(const dpo_model *model, const char *targets, const dpo_tensor *tensor)
{
    const char *weight = tensor->name;
    if (tensor->layout == DPO_PLAIN || tensor == model->weights->head) return 0;
    size_t path = strlen(weight) - strlen(".weight");
    if (!strcmp(targets, "all-linear")) return 1;
    for (const char *name = targets; *name;) {
        size_t n = strcspn(name, ",");
        if (n && n <= path && !memcmp(weight + path - n, name, n) &&
            (n == path || weight[path - n - 1] == '.'))
            return 1;
        name += n + (name[n] == ',');
    }
    return 0;
}

/* Every target must name a linear layer of this model. */
static int dpoi_check_targets(dpo_model *model, const char *targets)
{
    if (!*targets) return dpoi_fail(model->context, "LoRA: no target modules are named");
    if (!strcmp(targets, "all-linear")) return 0;
    for (const char *name = targets;; name++) {
        char one[sizeof model->lora.targets], known[400] = "";
        size_t n = strcspn(name, ","), found = 0, used = 0;
        snprintf(one, sizeof one, "%.*s", (int)n, name);
        for (size_t i = 0; i < model->n_tensors; i++) {
            const dpo_tensor *tensor = &model->tensors[i];
            const char *path = strstr(tensor->name, ".0."); // the names of the first layer will do
            found += strcmp(one, "all-linear") && dpoi_is_target(model, one, tensor);
            if (!path || !dpoi_is_target(model, "all-linear", tensor)) continue;
            used += (size_t)snprintf(known + used, sizeof known - used, "%s%.*s", used ? ", " : "",
                                     (int)(strlen(path) - strlen(".0..weight")), path + 3);
        }
        if (!n || !found)
            return dpoi_fail(model->context, "LoRA: \"%s\" is no linear layer of this model; it "
                             "has %s; \"all-linear\" means all of them; the head takes no adapter "
                             "here, though PEFT gives it one when it is named", one, known);
        name += n;
        if (!*name) return 0;
    }
}

/* Adds A and B of every target to the table; a `file`, if there is one, must hold them. As in PEFT,
   r may exceed a layer's sizes, though that buys nothing. */
static int dpoi_add_adapters(dpo_model *model, const dpo_lora *lora, const dpo_file *file)
{
    const size_t n_tensors = model->n_tensors;
    if (lora->r < 1 || lora->r > DPOI_MAX_RANK || !(lora->alpha > 0 && lora->alpha < 1e9) ||
        !(lora->dropout >= 0 && lora->dropout < 1))
        return dpoi_fail(model->context, "LoRA: r is %zu, alpha %g, dropout %g; r must be 1 to %d, "
                         "alpha positive, dropout from 0 to below 1", lora->r, lora->alpha,
                         lora->dropout, DPOI_MAX_RANK);
    if (dpoi_check_targets(model, lora->targets)) return 1;
    model->lora = *lora;    // if what follows fails, dpoi_remove_adapter takes it back
    for (size_t i = 0; i < n_tensors; i++) {
        dpo_tensor *W = &model->tensors[i];
        char name[DPO_NAME_BYTES]; // the module's path with another end
        int path = (int)(strlen(W->name) - strlen("weight"));
        if (!dpoi_is_target(model, lora->targets, W)) continue;
        snprintf(name, sizeof name, "base_model.model.%.*slora_A.weight", path, W->name);
        if (file && !dpo_file_find(file, name))
            return dpoi_fail(model->context, "tensor %s is missing, though the adapter's target "
                             "modules name its layer: make the file again", name);
        W->lora_a = dpoi_add_tensor(model, DPO_LINEAR, lora->r, dpoi_linear_in(W), 1.0, name);
        snprintf(name, sizeof name, "base_model.model.%.*slora_B.weight", path, W->name);
        W->lora_b = dpoi_add_tensor(model, DPO_LINEAR, dpoi_linear_out(W), lora->r, 1.0, name);
    }
    dpoi_number_trainable(model);
    return 0;
}

/* Removes an adapter that could not be made whole; `first` is the index of its first tensor. */
static void dpoi_remove_adapter(dpo_model *model, size_t first)
{
    for (size_t i = 0; i < first; i++) model->tensors[i].lora_a = model->tensors[i].lora_b = NULL;
    dpoi_free(model->context, model->adapter);
    dpo_string_free(model->context, &model->adapter_config);
    model->adapter = NULL;
    model->n_tensors = first;
    model->lora = (dpo_lora){ 0 };
    dpoi_number_trainable(model);
}

/* ---- 6.5 buffers ----------------------------------------------------------------------------- */

typedef struct dpoi_workspace {
    size_t max_rows, max_scored;            // what the buffers can hold in any pass ...
    size_t kept_rows;                       // ... and in one that keeps activations
    int keeps;                              // whether the pass laid out last keeps them

    // The batch as rows. R rows, S of them scored, n_targets tokens to score.
    size_t R, S, n_targets, n_spans, n_branches, n_examples;
    double pairs;                           // of a query and a key it attends to
    uint32_t *token, *position;             // [R]
    dpoi_span *spans;                       // [n_spans] prompt and branches of each example in turn
    size_t *first_span;                     // [n_examples + 1]
    size_t *scored_row;                     // [S] row of each scored row among the R
    size_t *first_target;                   // [S + 1] where its targets begin
    dpoi_target *targets;                   // [n_targets]

    // What a block computes and its backward needs: one set per layer, or one that all layers
    // share (see dpoi_activations). x has one more: the last block's output.
    float *x, *attended, *middle;           // [R, C]
    float *qkv;                             // [R, 3C]
    float *lse;                             // [R, H]
    float *up, *gate;                       // [R, F]
    char *slab;                             // [L] what is kept of layers that share a set
    float *normed, *branch;                 // [R, C] output of a norm; of a branch
    float *activated;                       // [R, F]
    float *stats;                           // [R, 2] mean and 1 / deviation, of the norm
    float *dx, *dattended, *dnormed, *dqkv, *dactivated, *dgate;    // gradients of the same
    float *u, *du;                          // [R, r] scale * drop(x) A^T of an adapter
    float *dropped;                         // [R, C or F] drop(x)
    float *logits;                          // [S, DPOI_CHUNK]
    float *head_in, *head_normed, *dhead;   // [S, C] dhead: first a frozen head's mean
    float *head_stats;                      // [S, 2]
    float *most;                            // [S] the largest logit so far
    float *target_logit;                    // [n_targets]
    double *log_sum;                        // [S] log of the softmax's denominator
    uint32_t *argmax;                       // [S]
    float *rotary;                          // [T, rotary_dims] cosines and sines
    float *slopes;                          // [H], divided by the interpolation factor
} dpoi_workspace;

/* In fp32 every layer has its own set of activations, where the backward finds them. In bf16, and
   when blocks are recomputed, all layers share one fp32 set, and a slab of memory holds what is
   kept of each: all of it as bf16, half the size, or with recomputation the block's input alone. */
static int dpoi_shares_set(const dpo_model *model, int keep)
{
    return !keep || model->options.dtype == DPO_BF16 || model->options.recompute;
}

/* Floats of a row that the slab keeps of a layer; see dpoi_slab_move. */
static size_t dpoi_slab_width(const dpo_model *model)
{
    const dpo_config *config = &model->config;
    size_t C = config->d_model, gated = config->activation == DPO_SWIGLU;
    if (model->options.recompute) return C;
    return C * (config->parallel_residual ? 5 : 6) + config->d_ff * (1 + gated);
}

/* One list says how large each buffer is, for dpoi_model_reserve, which allocates them, and for
   dpo_memory_plan, which only adds them up. Passes have up to `rows` rows and `scored` scored ones;
   those that keep, up to `kept` rows. Every branch has a scored token, every example a branch. */
typedef struct dpoi_buffer { void *at; size_t count, size; int of_head; } dpoi_buffer;
#define DPOI_MAX_BUFFERS 40

static size_t dpoi_list_buffers(dpoi_buffer *list, dpoi_workspace *w, const dpo_model *model,
                                size_t rows, size_t scored, size_t kept)
{
    const dpo_config *config = &model->config;
    const int shares = dpoi_shares_set(model, 1);
    const size_t C = config->d_model, F = config->d_ff, L = config->n_layers;
    const size_t gated = config->activation == DPO_SWIGLU;
    const size_t sets = DPOI_MAX(rows, shares ? 0 : kept * L);
    const size_t inputs = DPOI_MAX(rows, shares ? 0 : kept * (L + 1));
    const size_t middles = config->parallel_residual ? 0 : kept * (shares ? 1 : L);
    const size_t sums = DPOI_MAX(rows, model->options.recompute ? 0 : kept * L);
    const size_t slab = shares ? kept * L * dpoi_slab_width(model) : 0;
    const size_t rank = rows * model->lora.r, dropped = model->lora.dropout > 0 ? kept : 0;
    const size_t turning = config->position == DPO_ROTARY ? config->rotary_dims : 0;
    const dpoi_buffer all[] = {
        { &w->token, rows, 4, 0 }, { &w->position, rows, 4, 0 },
        { &w->spans, 2 * scored, sizeof *w->spans, 0 }, { &w->first_span, scored + 1, 8, 0 },
        { &w->scored_row, scored, 8, 0 }, { &w->first_target, scored + 1, 8, 0 },
        { &w->targets, scored, sizeof *w->targets, 0 },
        { &w->rotary, config->context_length * turning, 4, 0 },
        { &w->slopes, config->position == DPO_ALIBI ? config->n_heads : 0, 4, 0 },
        { &w->x, inputs * C, 4, 0 }, { &w->qkv, sets * 3 * C, 4, 0 },
        { &w->attended, sets * C, 4, 0 }, { &w->lse, sums * config->n_heads, 4, 0 },
        { &w->middle, middles * C, 4, 0 }, { &w->up, sets * F, 4, 0 },
        { &w->gate, gated * sets * F, 4, 0 },
        { &w->slab, slab, dpoi_dtype_bytes(model->options.dtype), 0 },
        { &w->normed, rows * C, 4, 0 }, { &w->branch, rows * C, 4, 0 },
        { &w->activated, rows * F, 4, 0 }, { &w->stats, rows * 2, 4, 0 },
        { &w->dx, kept * C, 4, 0 }, { &w->dqkv, kept * 3 * C, 4, 0 },
        { &w->dattended, kept * C, 4, 0 }, { &w->dnormed, kept * C, 4, 0 },
        { &w->dactivated, kept * F, 4, 0 }, { &w->dgate, gated * kept * F, 4, 0 },
        { &w->u, rank, 4, 0 }, { &w->du, kept * model->lora.r, 4, 0 },
        { &w->dropped, dropped * DPOI_MAX(C, F), 4, 0 },
        { &w->logits, scored * DPOI_MIN(config->vocab_size, (size_t)DPOI_CHUNK), 4, 1 },
        { &w->head_in, scored * C, 4, 1 }, { &w->head_normed, scored * C, 4, 1 },
        { &w->dhead, kept ? scored * C : 0, 4, 1 }, { &w->head_stats, scored * 2, 4, 1 },
        { &w->most, scored, 4, 1 }, { &w->target_logit, scored, 4, 1 },
        { &w->log_sum, scored, 8, 1 }, { &w->argmax, scored, 4, 1 } };
    _Static_assert(sizeof all / sizeof *all <= DPOI_MAX_BUFFERS, "the lists are long enough");
    memcpy(list, all, sizeof all);
    return sizeof all / sizeof *all;
}

/* Floats of scratch for a weight gradient that is rounded to bf16: 512 rows of the widest. */
static size_t dpoi_piece_size(const dpo_model *model)
{
    const dpo_config *config = &model->config;
    if (!model->options.stochastic || model->options.dtype != DPO_BF16) return 0;
    return 512 * DPOI_MAX(3 * config->d_model, config->d_ff);
}

/* Attention's two strips of scores, queries x keys (part 4.5). */
static size_t dpoi_strip_size(size_t max_span) { return 2 * DPOI_STRIP * max_span; }

static void dpoi_workspace_free(dpo_model *model)
{
    dpoi_workspace *w = model->workspace;
    if (!w) return;
    dpoi_buffer list[DPOI_MAX_BUFFERS];
    size_t n = dpoi_list_buffers(list, w, model, 0, 0, 0);
    for (size_t i = 0; i < n; i++) {
        void *buffer;
        memcpy(&buffer, list[i].at, sizeof buffer);
        dpoi_free(model->context, buffer);
    }
    dpoi_free(model->context, w);
    model->workspace = NULL;
}

/* Makes room for a pass of that size, if none so far was as large. */
static int dpoi_model_reserve(dpo_model *model, const dpo_plan_options *size)
{
    dpo_context *context = model->context;
    const dpo_config *config = &model->config;
    dpoi_workspace *w = model->workspace;
    size_t rows = size->max_rows, scored = size->max_scored, kept = size->kept_rows;
    if (dpoi_context_reserve(context, dpoi_strip_size(size->max_span), dpoi_piece_size(model)))
        return 1;
    if (w) {
        if (rows <= w->max_rows && scored <= w->max_scored && kept <= w->kept_rows) return 0;
        rows = DPOI_MAX(rows, w->max_rows);
        scored = DPOI_MAX(scored, w->max_scored);
        kept = DPOI_MAX(kept, w->kept_rows);
    }
    dpoi_workspace_free(model);
    if (dpoi_alloc_zeroed(context, &w, 1, sizeof *w)) return 1;
    model->workspace = w;
    dpoi_buffer list[DPOI_MAX_BUFFERS];
    size_t n = dpoi_list_buffers(list, w, model, rows, scored, kept);
    for (size_t i = 0; i < n; i++)
        if (list[i].count && dpoi_alloc(context, list[i].at, list[i].count, list[i].size)) return 1;
    if (w->rotary)
        dpoi_rotary_table(w->rotary, config->context_length, config->rotary_dims,
                          (float)config->rotary_base);
    for (size_t h = 0; w->slopes && h < config->n_heads; h++)
        w->slopes[h] = dpoi_weight_at(model->weights->slopes, h) / (float)config->alibi_factor;
    w->max_rows = rows;
    w->max_scored = scored;
    w->kept_rows = kept;
    return 0;
}

/* Bytes of all gradients; when called again with model->grads allocated, each gets its place. */
static size_t dpoi_place_gradients(dpo_model *model)
{
    size_t bytes = 0;
    for (size_t i = 0; i < model->n_tensors; i++) {
        dpo_tensor *tensor = &model->tensors[i];
        if (!tensor->trainable) continue;
        if (model->grads) tensor->grad = (char *)model->grads + bytes;
        bytes += dpoi_whole_floats(tensor->n, tensor->grad_dtype);
    }
    return bytes;
}

DPO_API void dpo_plan_passes(dpo_plan_options *options, const dpo_example *examples, size_t n,
                             size_t micro_rows, int keep)
{
    while (n > 0) {
        size_t taken = dpo_micro_batch(examples, n, micro_rows), rows = 0, scored = 0;
        for (const dpo_example *e = examples; e < examples + taken; e++) {
            rows += dpo_example_rows(e);
            for (size_t b = 0; b < e->n_branches; b++) {
                size_t span = e->n_prompt + e->branches[b].n - 1;
                scored += e->branches[b].n - e->branches[b].first_scored;
                options->max_span = DPOI_MAX(options->max_span, span);
            }
        }
        options->max_rows = DPOI_MAX(options->max_rows, rows);
        options->max_scored = DPOI_MAX(options->max_scored, scored);
        if (keep) options->kept_rows = DPOI_MAX(options->kept_rows, rows);
        examples += taken;
        n -= taken;
    }
}

DPO_API int dpo_memory_plan(dpo_context *context, dpo_memory *memory, const dpo_config *config,
                            const dpo_plan_options *options)
{
    dpo_model model = { .context = context, .config = *config, .options = options->model };
    *memory = (dpo_memory){ 0 };
    if (dpoi_build_table(&model) ||
        (options->lora.r && dpoi_add_adapters(&model, &options->lora, NULL))) {
        dpo_model_free(&model);
        return 1;
    }
    dpoi_workspace w;
    dpoi_buffer list[DPOI_MAX_BUFFERS];
    size_t n = dpoi_list_buffers(list, &w, &model, DPOI_MAX(options->max_rows, options->kept_rows),
                                 options->max_scored, options->kept_rows);
    dpoi_storage storage = dpoi_place_weights(&model, options->file);
    memory->weights = storage.params + storage.masters;
    memory->params = model.n_params;
    if (options->train) {
        memory->trainable = model.n_trainable;
        memory->gradients = dpoi_place_gradients(&model);
        memory->optimizer = (options->optimizer == DPO_ADAMW ? 2 : 1) * model.n_trainable *
                            sizeof(float);
        memory->state_file = storage.state + memory->optimizer;
    }
    for (size_t i = 0; i < n; i++)
        *(list[i].of_head ? &memory->head : &memory->activations) += list[i].count * list[i].size;
    memory->scratch = sizeof(float) * (dpoi_piece_size(&model) +
                      (size_t)options->n_threads *
                      (DPOI_PACK_FLOATS + dpoi_strip_size(options->max_span)));
    // Keys, values and a score per head of every position; a logit and a dpoi_choice per token.
    if (options->max_positions)
        memory->cache = options->max_positions * sizeof(float) *
                        (2 * config->n_layers * config->d_model + config->n_heads) +
                        12 * config->vocab_size;
    memory->heap = memory->weights + memory->gradients + memory->optimizer + memory->activations +
                   memory->head + memory->cache + memory->scratch;
    // A frozen model's file stays in use; any other is read tensor by tensor.
    if (options->file)
        memory->mapped = options->model.frozen ? options->file->bytes : storage.largest;
    memory->total = memory->heap + memory->mapped;
    dpo_model_free(&model);
    return 0;
}

/* ---- 6.6 a batch as rows --------------------------------------------------------------------- */

static int dpoi_check_tokens(dpo_context *context, const dpo_config *config, size_t example,
                             const char *where, const uint32_t *tokens, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (tokens[i] >= config->vocab_size)
            return dpoi_fail(context, "example %zu, %s token %u is outside the model's vocabulary "
                             "of %zu; was it made with another tokenizer?", example, where,
                             tokens[i], config->vocab_size);
    return 0;
}

static int dpoi_check_example(dpo_context *context, const dpo_config *config,
                              const dpo_example *example, size_t index)
{
    if (!example->n_branches) return dpoi_fail(context, "example %zu has no branches", index);
    for (size_t b = 0; b < example->n_branches; b++) {
        const dpo_branch *branch = &example->branches[b];
        size_t first = branch->first_scored, length = example->n_prompt + branch->n;
        if (branch->n <= first || (!example->n_prompt && !first))
            return dpoi_fail(context, "example %zu, branch %zu: no token to score: %zu tokens, "
                             "scored from %zu (a first token without a prompt cannot be scored)",
                             index, b, branch->n, first);
        if (config->position != DPO_ALIBI && length - 1 > config->context_length)
            return dpoi_fail(context, "example %zu: %zu tokens are longer than the model's "
                             "context of %zu; use a smaller --max-length", index, length,
                             config->context_length);
        char where[40];
        snprintf(where, sizeof where, "branch %zu:", b);
        if (dpoi_check_tokens(context, config, index, where, branch->tokens, branch->n)) return 1;
    }
    return dpoi_check_tokens(context, config, index, "prompt", example->prompt, example->n_prompt);
}

/* Appends a span of n rows, the first at position n_prefix, behind the n_prefix rows from `prefix`
   on: the prompt's, which it attends to as well. */
static void dpoi_add_rows(dpoi_workspace *w, const uint32_t *tokens, size_t n, size_t prefix,
                          size_t n_prefix)
{
    w->spans[w->n_spans++] = (dpoi_span){ w->R, n, prefix, n_prefix };
    w->pairs += (double)n * ((double)n_prefix + (double)(n + 1) / 2);
    for (size_t i = 0; i < n; i++) {
        w->token[w->R] = tokens[i];
        w->position[w->R++] = (uint32_t)(n_prefix + i);
    }
}

/* Notes that `row` is to predict `token`. Calls come in ascending order of rows. */
static void dpoi_add_target(dpoi_workspace *w, size_t row, uint32_t token, size_t branch)
{
    if (w->S == 0 || w->scored_row[w->S - 1] != row) {
        w->scored_row[w->S] = row;
        w->first_target[w->S++] = w->n_targets;
    }
    w->targets[w->n_targets++] = (dpoi_target){ token, (uint32_t)branch, w->S - 1 };
}

/* Lays the batch's examples end to end: prompt, then each branch without its last token, which
   predicts nothing. */
static int dpoi_lay_out(dpo_model *model, const dpo_batch *batch, int keep)
{
    dpo_context *context = model->context;
    dpo_plan_options size = { 0 };
    if (!batch->n) return dpoi_fail(context, "the batch has no examples");
    if (model->options.stored)
        return dpoi_fail(context, "the model was loaded as `stored`, which is for saving it only");
    for (size_t e = 0; e < batch->n; e++)
        if (dpoi_check_example(context, &model->config, &batch->examples[e], e)) return 1;
    dpo_plan_passes(&size, batch->examples, batch->n, SIZE_MAX, keep);
    if (size.max_rows > (size_t)1 << 28)
        return dpoi_fail(context, "%zu tokens in one pass; use a smaller --micro-tokens or "
                         "--max-length", size.max_rows);
    if (dpoi_model_reserve(model, &size)) return 1;
    dpoi_workspace *w = model->workspace;
    w->R = w->S = w->n_targets = w->n_spans = w->n_branches = 0;
    w->pairs = 0;
    w->n_examples = batch->n;
    w->keeps = keep;
    for (size_t e = 0; e < batch->n; e++) {
        const dpo_example *example = &batch->examples[e];
        size_t prompt = w->R;
        w->first_span[e] = w->n_spans;
        if (example->n_prompt) dpoi_add_rows(w, example->prompt, example->n_prompt, prompt, 0);
        // The prompt's last row predicts the first token of every branch.
        for (size_t b = 0; b < example->n_branches && example->n_prompt; b++)
            if (example->branches[b].first_scored == 0)
                dpoi_add_target(w, w->R - 1, example->branches[b].tokens[0], w->n_branches + b);
        for (size_t b = 0; b < example->n_branches; b++) {
            const dpo_branch *branch = &example->branches[b];
            size_t first = w->R, from = DPOI_MAX(branch->first_scored, (size_t)1);
            dpoi_add_rows(w, branch->tokens, branch->n - 1, prompt, example->n_prompt);
            for (size_t i = from; i < branch->n; i++)
                dpoi_add_target(w, first + i - 1, branch->tokens[i], w->n_branches + b);
        }
        w->n_branches += example->n_branches;
    }
    w->first_span[batch->n] = w->n_spans;
    w->first_target[w->S] = w->n_targets;
    return 0;
}

/* ---- 6.7 the block --------------------------------------------------------------------------- */

/* One layer's. Layers that share a set write the residual stream in place, so `out` is x; `middle`
   is x too in a parallel block, where norm2 takes x, and in a pass that does not keep. */
typedef struct dpoi_activations {
    float *x, *attended, *middle, *out;     // [R, C] out: the next block's x
    float *qkv;                             // [R, 3C]
    float *lse;                             // [R, H]
    float *up, *gate;                       // [R, F] gate NULL but for SwiGLU
} dpoi_activations;

static dpoi_activations dpoi_activations_of(const dpo_model *model, size_t layer, int keep)
{
    const dpo_config *config = &model->config;
    const dpoi_workspace *w = model->workspace;
    const int shares = dpoi_shares_set(model, keep);
    const size_t C = config->d_model, F = config->d_ff, R = w->R, set = shares ? 0 : layer * R;
    const size_t sums = keep && !model->options.recompute ? layer * R : 0;
    float *x = w->x + set * C;
    return (dpoi_activations){ .x = x, .out = shares ? x : x + R * C, .qkv = w->qkv + set * 3 * C,
        .attended = w->attended + set * C, .lse = w->lse + sums * config->n_heads,
        .middle = config->parallel_residual || !keep ? x : w->middle + set * C,
        .up = w->up + set * F, .gate = w->gate ? w->gate + set * F : NULL };
}

/* Copies parts `first` .. `end` - 1 of a layer's activations into the slab, or back with `load`.
   Part 0, the block's input, has to be copied before the block overwrites it. */
static void dpoi_slab_move(dpo_model *model, size_t layer, const dpoi_activations *a, size_t first,
                           size_t end, int load)
{
    const size_t C = model->config.d_model, F = model->config.d_ff, R = model->workspace->R;
    const dpo_dtype dtype = model->options.dtype;
    const struct { float *at; size_t width; } parts[] = {
        { a->x, C }, { a->qkv, 3 * C }, { a->attended, C }, { a->up, F },
        { a->middle, a->middle == a->x ? 0 : C }, { a->gate, a->gate ? F : 0 } };
    size_t width = dpoi_slab_width(model), before = 0;
    if (model->options.recompute) end = DPOI_MIN(end, (size_t)1);
    for (size_t p = 0; p < end; before += parts[p++].width) {
        const size_t n = R * parts[p].width;
        if (p < first) continue;
        char *slab = model->workspace->slab +
                     R * (layer * width + before) * dpoi_dtype_bytes(dtype);
        DPOI_PARALLEL_PIECES(dpoi_threads(model->context, n))
        for (size_t i = 0; i < n; i += DPOI_PIECE) {
            size_t count = DPOI_MIN(n - i, (size_t)DPOI_PIECE);
            char *kept = slab + i * dpoi_dtype_bytes(dtype);
            if (load) dpoi_widen(parts[p].at + i, kept, dtype, count);
            else dpoi_narrow(kept, dtype, parts[p].at + i, count);
        }
        dpoi_lap(model->context, DPO_TIME_KEEP, 0,
                 (double)(n * (sizeof(float) + dpoi_dtype_bytes(dtype))));
    }
}

static dpoi_heads dpoi_heads_of(const dpo_config *config)
{
    size_t H = config->n_heads, C = config->d_model, D = C / H;
    if (config->architecture == DPO_BTLM) return (dpoi_heads){ H, D, D, C, 2 * C };
    return (dpoi_heads){ H, D, 3 * D, D, 2 * D };
}

static dpoi_attention dpoi_attention_of(const dpo_model *model, size_t layer)
{
    const dpo_config *config = &model->config;
    const dpoi_workspace *w = model->workspace;
    double scale = config->attention_scale;
    if (config->attention_scale_by_layer) scale /= (double)(layer + 1);
    return (dpoi_attention){ dpoi_heads_of(config), (float)scale, w->slopes, w->spans,
                             w->first_span, w->n_examples, w->pairs, model->options.dtype };
}

/* y[n] = drop(x), or with `accumulate` y += drop(x): each element is 0 with probability `dropout`,
   else x / (1 - dropout), so its expectation is x. The mask depends on pass, adapter and element
   only: the backward and a recomputed block draw the same one. */
static void dpoi_drop(const dpo_context *context, float *y, const float *x, const dpo_tensor *A,
                      double dropout, size_t n, int accumulate)
{
    const uint64_t key = dpo_random_u64(context->noise, A->offset, 0);
    const uint64_t least = (uint64_t)(dropout * 0x1p32);
    const float scale = (float)(1 / (1 - dropout));
    DPOI_PARALLEL_PIECES(dpoi_threads(context, 4 * n))
    for (size_t first = 0; first < n; first += DPOI_PIECE)
        for (size_t i = first; i < DPOI_MIN(first + DPOI_PIECE, n); i++) {
            uint64_t chance = dpoi_scatter(key + i * 0x9e3779b97f4a7c15u) >> 32;
            float kept = chance >= least ? scale * x[i] : 0.0f;
            y[i] = accumulate ? y[i] + kept : kept;
        }
}

/* u[R, r] = scale * drop(x) A^T; returns drop(x), which is x itself when nothing is dropped. */
static const float *dpoi_lora_down(dpo_model *model, dpoi_linear *linear,
                                   const float *x /* [R, in] */, const dpo_tensor *A /* [r, in] */,
                                   size_t R)
{
    dpoi_workspace *w = model->workspace;
    const float scale = dpoi_lora_scale(&model->lora);
    if (w->dropped && w->keeps) {
        dpoi_drop(model->context, w->dropped, x, A, model->lora.dropout, R * A->shape[1], 0);
        x = w->dropped;
    }
    linear(model->context, w->u, x, A, NULL, R, 0);
    for (size_t i = 0; i < R * A->shape[0]; i++) w->u[i] *= scale;
    return x;
}

/* y = x W^T + b, and + u B^T if W has an adapter; with `accumulate`, added to what y holds. */
static void dpoi_project(dpo_model *model, dpoi_linear *linear, float *y /* [R, out] */,
                         const float *x /* [R, in] */, const dpo_tensor *W, const dpo_tensor *b,
                         size_t R, int accumulate)
{
    linear(model->context, y, x, W, b, R, accumulate);
    dpoi_lap(model->context, DPO_TIME_LINEAR, 2.0 * (double)(R * W->n), 0);
    if (!W->lora_a) return;
    dpoi_lora_down(model, linear, x, W->lora_a, R);
    linear(model->context, y, model->workspace->u, W->lora_b, NULL, R, 1);
    dpoi_lap(model->context, DPO_TIME_ADAPTER,
             2.0 * (double)(R * (W->lora_a->n + W->lora_b->n)), 0);
}

/* Forward: y += u B^T with u = scale * drop(x) A^T. So
       dB += dy^T u,   du = scale * dy B,   dA += du^T drop(x),   dx += drop(du A),
   as drop is linear once its mask is drawn. */
static void dpoi_adapter_backward(dpo_model *model, float *dx /* [R, in] or NULL */,
                                  const float *dy /* [R, out] */, const float *x /* [R, in] */,
                                  const dpo_tensor *W, size_t R)
{
    const dpo_context *context = model->context;
    dpoi_workspace *w = model->workspace;
    const dpo_tensor *A = W->lora_a;
    const float scale = dpoi_lora_scale(&model->lora);
    const float *in = dpoi_lora_down(model, dpoi_linear_forward, x, A, R);
    dpoi_linear_backward(context, w->du, dy, w->u, W->lora_b, NULL, R, 0);
    for (size_t i = 0; i < R * A->shape[0]; i++) w->du[i] *= scale;
    dpoi_linear_backward(context, in == x ? dx : NULL, w->du, in, A, NULL, R, 1);
    if (in == x || !dx) return;
    dpoi_matmul(context, w->dropped, A->shape[1], dpoi_rows(w->du, A->shape[0]),
                dpoi_transposed(dpoi_weight(A)), R, A->shape[1], A->shape[0], 0, DPO_F32);
    dpoi_drop(context, dx, w->dropped, A, model->lora.dropout, R * A->shape[1], 1);
}

/* Forward: y = x W^T + b, and + u B^T if W has an adapter. dx NULL: nothing below needs it. */
static void dpoi_project_backward(dpo_model *model, float *dx /* [R, in] */,
                                  const float *dy /* [R, out] */, const float *x /* [R, in] */,
                                  const dpo_tensor *W, const dpo_tensor *b, size_t R,
                                  int accumulate)
{
    dpoi_linear_backward(model->context, dx, dy, x, W, b, R, accumulate);
    dpoi_lap(model->context, DPO_TIME_LINEAR_BACK,
             2.0 * (double)((dx != NULL) + (W->grad != NULL)) * (double)(R * W->n), 0);
    if (!W->lora_a) return;
    dpoi_adapter_backward(model, dx, dy, x, W, R);
    dpoi_lap(model->context, DPO_TIME_ADAPTER,
             2.0 * (double)(R * (W->lora_a->n * (dx ? 3 : 2) + W->lora_b->n * 2)), 0);
}

/* The two branches of the block, as at the head of this part. A cache (part 10), if not NULL, takes
   the keys and values; if it held some before, there is one row, which attends to all of them. */
static void dpoi_block_forward(dpo_model *model, size_t layer, const dpoi_activations *a,
                               dpoi_cache *cache)
{
    const dpo_context *context = model->context;
    const dpo_config *config = &model->config;
    const dpoi_block_weights *block = &model->weights->blocks[layer];
    dpoi_workspace *w = model->workspace;
    dpoi_attention attention = dpoi_attention_of(model, layer);
    size_t R = w->R, C = config->d_model, F = config->d_ff;
    float epsilon = (float)config->norm_epsilon;
    const int step = cache && cache->n > 0; // R is 1
    dpoi_linear *linear = step ? dpoi_linear_row : dpoi_linear_forward;

    // attention(norm1(x))
    dpoi_norm_forward(context, w->normed, w->stats, a->x, block->norm1_w->data,
                      block->norm1_b->data, epsilon, R, C);
    dpoi_project(model, linear, a->qkv, w->normed, block->qkv_w, block->qkv_b, R, 0);
    if (w->rotary)
        dpoi_rotary(context, a->qkv, w->position, w->rotary, config->rotary_dims, attention.heads,
                    1.0f, R);
    for (size_t r = 0; cache && r < R; r++)
        dpoi_cache_store(cache, a->qkv + r * 3 * C, attention.heads, layer, cache->n + r);
    if (step)
        dpoi_attention_row(context, a->attended, cache, a->qkv, layer, &attention);
    else
        dpoi_attention_forward(context, a->attended, a->lse, a->qkv, &attention);
    dpoi_project(model, linear, w->branch, a->attended, block->out_w, block->out_b, R, 0);
    if (!config->parallel_residual) dpoi_add(context, a->middle, a->x, w->branch, R * C);

    // mlp(norm2(middle)), where a parallel block's middle is x
    dpoi_norm_forward(context, w->normed, w->stats, a->middle, block->norm2_w->data,
                      block->norm2_b->data, epsilon, R, C);
    dpoi_project(model, linear, a->up, w->normed, block->up_w, block->up_b, R, 0);
    if (a->gate)
        dpoi_project(model, linear, a->gate, w->normed, block->gate_w, block->gate_b, R, 0);
    dpoi_activation_forward(context, w->activated, a->up, a->gate, config->activation, R, F);
    dpoi_project(model, linear, w->branch, w->activated, block->down_w, block->down_b, R,
                 config->parallel_residual); // then added to attention's output
    dpoi_add(context, a->out, a->middle, w->branch, R * C);
}

/* Whether a linear layer or a norm with this weight and bias trains anything. */
static int dpoi_trains(const dpo_tensor *w, const dpo_tensor *b)
{
    return (w && (w->grad || w->lora_a)) || (b && b->grad);
}

/* Forward: out = middle + mlp(norm2(middle)), where a parallel block's middle is x. w->dx holds the
   gradient of out, which the residual stream hands on to middle as it is; the branch's share is
   added to it, unless nothing `below` this branch trains. */
static void dpoi_mlp_backward(dpo_model *model, const dpoi_block_weights *block,
                              const dpoi_activations *a, int below)
{
    const dpo_context *context = model->context;
    const dpo_config *config = &model->config;
    dpoi_workspace *w = model->workspace;
    size_t R = w->R, C = config->d_model, F = config->d_ff;
    const int norm = below || dpoi_trains(block->norm2_w, block->norm2_b);
    const int up = norm || dpoi_trains(block->up_w, block->up_b) ||
                   dpoi_trains(block->gate_w, block->gate_b);
    if (!up && !dpoi_trains(block->down_w, block->down_b)) return;
    // out = middle + activated W_down^T + b
    dpoi_activation_forward(context, w->activated, a->up, a->gate, config->activation, R, F);
    dpoi_project_backward(model, up ? w->dactivated : NULL, w->dx, w->activated, block->down_w,
                          block->down_b, R, 0);
    if (!up) return;
    // activated = act(up), or up * silu(gate); w->dactivated becomes the gradient of up
    dpoi_activation_backward(context, w->dactivated, w->dgate, w->dactivated, a->up, a->gate,
                             config->activation, R, F);
    // up = norm2(middle) W_up^T + b, gate likewise
    dpoi_norm_forward(context, w->normed, w->stats, a->middle, block->norm2_w->data,
                      block->norm2_b->data, (float)config->norm_epsilon, R, C);
    float *dnormed = norm ? w->dnormed : NULL;
    dpoi_project_backward(model, dnormed, w->dactivated, w->normed, block->up_w, block->up_b, R, 0);
    if (a->gate)
        dpoi_project_backward(model, dnormed, w->dgate, w->normed, block->gate_w, block->gate_b, R,
                              1);
    if (!norm) return;
    dpoi_norm_backward(context, w->dx, block->norm2_w->grad, block->norm2_b->grad, w->dnormed,
                       w->stats, a->middle, block->norm2_w->data, R, C);
}

/* Forward: attended = heads(norm1(x) W_qkv^T + b). w->dattended holds the gradient of attended; the
   branch's share of that of x is added to w->dx, unless nothing `below` trains. */
static void dpoi_heads_backward(dpo_model *model, size_t layer, const dpoi_activations *a,
                                int below)
{
    const dpo_context *context = model->context;
    const dpo_config *config = &model->config;
    const dpoi_block_weights *block = &model->weights->blocks[layer];
    dpoi_workspace *w = model->workspace;
    dpoi_attention attention = dpoi_attention_of(model, layer);
    size_t R = w->R, C = config->d_model;
    dpoi_attention_backward(context, w->dqkv, w->dattended, a->attended, a->lse, a->qkv,
                            &attention);
    if (w->rotary)
        dpoi_rotary(context, w->dqkv, w->position, w->rotary, config->rotary_dims, attention.heads,
                    -1.0f, R);
    // qkv = norm1(x) W_qkv^T + b
    dpoi_norm_forward(context, w->normed, w->stats, a->x, block->norm1_w->data,
                      block->norm1_b->data, (float)config->norm_epsilon, R, C);
    dpoi_project_backward(model, below ? w->dnormed : NULL, w->dqkv, w->normed, block->qkv_w,
                          block->qkv_b, R, 0);
    if (!below) return;
    dpoi_norm_backward(context, w->dx, block->norm1_w->grad, block->norm1_b->grad, w->dnormed,
                       w->stats, a->x, block->norm1_w->data, R, C);
}

/* Turns w->dx from the gradient of the block's output into that of its input. The residual stream
   passes dx on unchanged, and each branch adds its share; a sequential block's MLP comes first, as
   it was last forward. In a parallel block both branches start from the gradient of the output, so
   attention's output layer reads it before the MLP adds to it. Without `below` nothing under this
   block trains, and the backward stops at the lowest layer here that does. */
static void dpoi_block_backward(dpo_model *model, size_t layer, int below)
{
    const dpoi_block_weights *block = &model->weights->blocks[layer];
    const int parallel = model->config.parallel_residual;
    dpoi_workspace *w = model->workspace;
    dpoi_activations a = dpoi_activations_of(model, layer, 1);
    if (dpoi_shares_set(model, 1)) dpoi_slab_move(model, layer, &a, 0, 6, 1);
    if (model->options.recompute) {
        a.out = w->branch; // not x, which the backward reads
        dpoi_block_forward(model, layer, &a, NULL);
    }
    const int norm = below || dpoi_trains(block->norm1_w, block->norm1_b);
    const int heads = norm || dpoi_trains(block->qkv_w, block->qkv_b);
    const int attention = heads || dpoi_trains(block->out_w, block->out_b);
    if (!parallel) dpoi_mlp_backward(model, block, &a, attention);
    // middle = x + attended W_out^T + b
    if (attention)
        dpoi_project_backward(model, heads ? w->dattended : NULL, w->dx, a.attended, block->out_w,
                              block->out_b, w->R, 0);
    if (parallel) dpoi_mlp_backward(model, block, &a, below);
    if (heads) dpoi_heads_backward(model, layer, &a, norm);
}

/* ---- 6.8 forward and backward of the model --------------------------------------------------- */

/* Embedding and blocks; returns the last block's output. The cache may be NULL. */
static const float *dpoi_blocks_forward(dpo_model *model, int keep, dpoi_cache *cache)
{
    const dpo_config *config = &model->config;
    const dpoi_weights *weights = model->weights;
    const dpoi_workspace *w = model->workspace;
    const int slab = keep && dpoi_shares_set(model, keep);
    dpoi_activations a = { 0 };
    dpoi_embedding_forward(model->context, w->x, w->token, w->position, weights->embedding,
                           weights->positions, (float)config->embedding_scale, w->R,
                           config->d_model);
    for (size_t l = 0; l < config->n_layers; l++) {
        a = dpoi_activations_of(model, l, keep);
        if (slab) dpoi_slab_move(model, l, &a, 0, 1, 0);
        dpoi_block_forward(model, l, &a, cache);
        if (slab) dpoi_slab_move(model, l, &a, 1, 6, 0);
    }
    return a.out;
}

DPO_API int dpo_forward(dpo_model *model, dpo_score *scores, const dpo_batch *batch, int keep)
{
    dpoi_lap(model->context, DPO_TIME_OTHER, 0, 0);
    if (dpoi_lay_out(model, batch, keep)) return 1;
    if (keep) model->passes++;
    model->context->noise = dpo_random_u64(model->noise_seed, DPOI_STREAM_PASS, model->passes);
    const dpo_context *context = model->context;
    const dpo_config *config = &model->config;
    const dpoi_weights *weights = model->weights;
    dpoi_workspace *w = model->workspace;
    size_t C = config->d_model;
    const float *x = dpoi_blocks_forward(model, keep, NULL);
    // Only scored rows go through the final norm and the head.
    for (size_t s = 0; s < w->S; s++)
        memcpy(w->head_in + s * C, x + w->scored_row[s] * C, C * sizeof *x);
    dpoi_norm_forward(context, w->head_normed, w->head_stats, w->head_in, weights->norm_w->data,
                      weights->norm_b->data, (float)config->norm_epsilon, w->S, C);
    dpoi_head_forward(context, w->log_sum, w->argmax, w->target_logit,
                      keep && !weights->head->trainable ? w->dhead : NULL, w->logits,
                      w->head_normed, weights->head, (float)config->logit_scale, w->targets,
                      w->first_target, w->most, w->S);
    for (size_t b = 0; b < w->n_branches; b++) scores[b] = (dpo_score){ .greedy = 1 };
    for (size_t t = 0; t < w->n_targets; t++) {
        const dpoi_target *target = &w->targets[t];
        dpo_score *score = &scores[target->branch];
        score->logp += w->target_logit[t] - w->log_sum[target->scored];
        score->n_scored++;
        score->greedy &= w->argmax[target->scored] == target->token;
    }
    return 0;
}

/* The first layer that trains anything; the number of layers if none does. */
static size_t dpoi_lowest_trained(const dpo_model *model)
{
    for (size_t l = 0; l < model->config.n_layers; l++) {
        // its parts stand together in the table, from norm1's weight to down's bias
        const dpoi_block_weights *block = &model->weights->blocks[l];
        for (const dpo_tensor *part = block->norm1_w; part <= block->down_b; part++)
            if (dpoi_trains(part, NULL)) return l;
    }
    return model->config.n_layers;
}

DPO_API int dpo_backward(dpo_model *model, const dpo_batch *batch, const double *dlogp)
{
    const dpo_context *context = model->context;
    const dpo_config *config = &model->config;
    const dpoi_weights *weights = model->weights;
    dpoi_workspace *w = model->workspace;
    size_t C = config->d_model;
    // Passes of other models of this context may have come between.
    model->context->noise = dpo_random_u64(model->noise_seed, DPOI_STREAM_PASS, model->passes);
    if (!w || !w->keeps || !model->grads || w->n_examples != batch->n)
        return dpoi_fail(model->context, "dpo_backward needs a dpo_forward of the same batch with "
                         "`keep` as the last pass, and dpo_model_zero_grad before it");
    dpoi_lap(context, DPO_TIME_OTHER, 0, 0);
    if (weights->head->trainable)
        dpoi_head_backward(context, w->dhead, w->logits, dlogp, w->log_sum, w->head_normed,
                           weights->head, (float)config->logit_scale, w->targets, w->first_target,
                           w->S);
    else
        dpoi_head_backward_frozen(context, w->dhead, dlogp, weights->head,
                                  (float)config->logit_scale, w->targets, w->first_target, w->S);
    // head_normed = norm(head_in), and head_in was gathered from the scored rows of x
    memset(w->dx, 0, w->R * C * sizeof *w->dx);
    memset(w->dnormed, 0, w->S * C * sizeof *w->dnormed);
    dpoi_norm_backward(context, w->dnormed, weights->norm_w->grad, weights->norm_b->grad, w->dhead,
                       w->head_stats, w->head_in, weights->norm_w->data, w->S, C);
    for (size_t s = 0; s < w->S; s++)
        memcpy(w->dx + w->scored_row[s] * C, w->dnormed + s * C, C * sizeof *w->dx);
    const int embeds = weights->embedding->grad || (weights->positions && weights->positions->grad);
    const size_t lowest = embeds ? 0 : dpoi_lowest_trained(model);
    for (size_t l = config->n_layers; l-- > lowest;)
        dpoi_block_backward(model, l, embeds || l > lowest);
    w->keeps = 0;   // what was kept is used up
    if (!embeds) return 0;
    dpoi_embedding_backward(context, weights->embedding->grad,
                            weights->positions ? weights->positions->grad : NULL, w->dx, w->token,
                            w->position, (float)config->embedding_scale, w->R, C);
    return 0;
}

/* An ordinary store first reads the cache line it is about to change. Streaming stores write past
   the caches without reading, half the traffic for gradients, which rarely fit a cache anyway. */
static void dpoi_zero(const dpo_context *context, void *bytes /* [n], aligned to 16 */, size_t n)
{
    DPOI_PARALLEL_PIECES(dpoi_threads(context, n))
    for (size_t first = 0; first < n; first += 4 * DPOI_PIECE) {
        char *piece = (char *)bytes + first;
        size_t count = DPOI_MIN(n - first, (size_t)4 * DPOI_PIECE), streamed = 0;
#ifdef DPOI_STORES_PAST_CACHES
        for (; streamed + 16 <= count; streamed += 16)
            _mm_stream_si128((__m128i *)(piece + streamed), _mm_setzero_si128());
        _mm_sfence();
#endif
        memset(piece + streamed, 0, count - streamed);
    }
}

DPO_API int dpo_model_zero_grad(dpo_model *model)
{
    if (!model->n_trainable)
        return dpoi_fail(model->context, "there is nothing to train: the model was loaded as "
                         "frozen and has no adapter");
    if (!model->grads) {
        model->grad_bytes = dpoi_place_gradients(model);
        if (dpoi_alloc(model->context, &model->grads, model->grad_bytes, 1)) return 1;
        dpoi_place_gradients(model);
    }
    dpoi_lap(model->context, DPO_TIME_OTHER, 0, 0);
    dpoi_zero(model->context, model->grads, model->grad_bytes);
    dpoi_lap(model->context, DPO_TIME_ZERO_GRAD, 0, (double)model->grad_bytes);
    return 0;
}

DPO_API int dpo_score_examples(dpo_model *model, dpo_score *scores, const dpo_example *examples,
                               size_t n, size_t max_rows)
{
    while (n > 0) {
        dpo_batch batch = { examples, dpo_micro_batch(examples, n, max_rows) };
        if (dpo_forward(model, scores, &batch, 0)) return 1;
        for (size_t e = 0; e < batch.n; e++) scores += examples[e].n_branches;
        examples += batch.n;
        n -= batch.n;
    }
    return 0;
}

/* Lays out one text so that every token has a row: as a prompt that one more token follows, since
   that token has none. */
static int dpoi_lay_out_text(dpo_model *model, const uint32_t *tokens, size_t n)
{
    const uint32_t last = 0;
    const dpo_branch branch = { &last, 1, 0 };
    const dpo_example example = { tokens, n, &branch, 1, 0, 0 };
    if (!n) return dpoi_fail(model->context, "there are no tokens to begin from");
    return dpoi_lay_out(model, &(dpo_batch){ &example, 1 }, 0);
}

DPO_API int dpo_logits(dpo_model *model, float *logits, const uint32_t *tokens, size_t n)
{
    if (dpoi_lay_out_text(model, tokens, n)) return 1;
    const dpo_context *context = model->context;
    const dpo_config *config = &model->config;
    const dpoi_weights *weights = model->weights;
    dpoi_workspace *w = model->workspace;
    const float *x = dpoi_blocks_forward(model, 0, NULL);
    dpoi_norm_forward(context, w->normed, w->stats, x, weights->norm_w->data, weights->norm_b->data,
                      (float)config->norm_epsilon, n, config->d_model);
    dpoi_linear_forward(context, logits, w->normed, weights->head, NULL, n, 0);
    for (size_t i = 0; i < n * config->vocab_size; i++) logits[i] *= (float)config->logit_scale;
    return 0;
}

/* ================================================================================================
   7. OPTIMIZER

   Gradients and the optimizer's running averages lie in flat arrays, in the table's order. So to
   train on several machines, sum model->grads over them before dpo_grad_norm: n_trainable floats,
   unless `stochastic` makes those of linear layers bf16 (then tensor by tensor, by grad_dtype).
   ============================================================================================= */

DPO_API int dpo_optimizer_init(dpo_model *model, dpo_optimizer *optimizer, dpo_optimizer_kind kind)
{
    *optimizer = (dpo_optimizer){ .beta1 = 0.9, .beta2 = kind == DPO_ADAMW ? 0.999 : 0.99,
                                  .epsilon = 1e-8 };
    const size_t n = model->n_trainable;
    if (!n)
        return dpoi_fail(model->context, "there is nothing to train: the model was loaded as "
                         "frozen and has no adapter yet");
    return (kind == DPO_ADAMW &&
            dpoi_alloc_zeroed(model->context, &optimizer->m, n, sizeof *optimizer->m)) ||
           dpoi_alloc_zeroed(model->context, &optimizer->v, n, sizeof *optimizer->v);
}

DPO_API void dpo_optimizer_free(dpo_model *model, dpo_optimizer *optimizer)
{
    dpoi_free(model->context, optimizer->m);
    dpoi_free(model->context, optimizer->v);
    optimizer->m = optimizer->v = NULL;
}

/* Elements of a gradient as floats: where they are, or in `buffer` if they are bf16. */
static const float *dpoi_grad_floats(const dpo_tensor *tensor, size_t first, float *buffer,
                                     size_t n)
{
    if (tensor->grad_dtype == DPO_F32) return (const float *)tensor->grad + first;
    dpoi_widen(buffer, (const uint16_t *)tensor->grad + first, DPO_BF16, n);
    return buffer;
}

DPO_API int dpo_grad_norm(dpo_model *model, double *norm)
{
    dpo_context *context = model->context;
    size_t most = model->n_trainable / DPOI_PIECE + 1;
    double *squares, total = 0.0; // sums of each piece, so that the order of the sum is fixed
    if (!model->grads) return dpoi_fail(context, "dpo_grad_norm: there are no gradients yet");
    if (dpoi_alloc(context, &squares, most, sizeof *squares)) return 1;
    for (size_t t = 0; t < model->n_tensors; t++) {
        const dpo_tensor *tensor = &model->tensors[t];
        const size_t n = tensor->grad ? tensor->n : 0;
        DPOI_PARALLEL_PIECES(dpoi_threads(context, n))
        for (size_t first = 0; first < n; first += DPOI_PIECE) {
            float buffer[DPOI_PIECE];
            double lane[DPOI_SUM_LANES] = { 0 }, sum = 0.0;
            size_t count = DPOI_MIN(n - first, (size_t)DPOI_PIECE);
            const float *g = dpoi_grad_floats(tensor, first, buffer, count);
            size_t whole = count - count % DPOI_SUM_LANES;
            for (size_t i = 0; i < whole; i += DPOI_SUM_LANES)
                for (size_t j = 0; j < DPOI_SUM_LANES; j++)
                    lane[j] += (double)g[i + j] * g[i + j];
            for (size_t i = whole; i < count; i++) lane[i - whole] += (double)g[i] * g[i];
            for (size_t j = 0; j < DPOI_SUM_LANES; j++) sum += lane[j];
            squares[first / DPOI_PIECE] = sum;
        }
        for (size_t p = 0; p * DPOI_PIECE < n; p++) total += squares[p];
    }
    dpoi_free(context, squares);
    dpoi_lap(context, DPO_TIME_GRAD_NORM, 0, (double)model->grad_bytes);
    *norm = sqrt(total);
    if (isfinite(*norm)) return 0;
    for (size_t t = 0; t < model->n_tensors; t++)
        for (size_t i = 0; model->tensors[t].grad && i < model->tensors[t].n; i++) {
            float buffer;
            if (!isfinite(*dpoi_grad_floats(&model->tensors[t], i, &buffer, 1)))
                return dpoi_fail(context, "the gradient of %s is not finite (element %zu); the "
                                 "weights are as they were before this step. A smaller "
                                 "--learning-rate usually helps", model->tensors[t].name, i);
        }
    // Not reached: squares of finite floats do not overflow fp64.
    return dpoi_fail(context, "the norm of the gradients is not finite");
}

DPO_API double dpo_clip_scale(double norm, double max_norm)
{
    double scale = max_norm / (norm + 1e-6);
    return max_norm > 0 && scale < 1 ? scale : 1.0;
}

/* The constants of one tensor's update, with the names of the formulas below. */
typedef struct dpoi_rule {
    float b1, b2, rest1, rest2;     // b2 is RMSprop's alpha; rest1 = 1 - b1, rest2 = 1 - b2
    float epsilon, root2, scale;    // root2 = sqrt(1 - b2^t)
    float keep, rate;               // keep = 1 - lr decay; rate = lr / (1 - b1^t), RMSprop's lr
} dpoi_rule;

/* With g = scale * gradient (the scale clips), AdamW (Loshchilov, Hutter 2019), as torch computes
   it; t counts updates from 1:
       p -= lr decay p,   m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g^2,
       p -= lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + epsilon).
   RMSprop (Hinton 2012), which the DPO paper used, as torch computes it, but with AdamW's weight
   decay:
       p -= lr decay p,   v = alpha v + (1 - alpha) g^2,   p -= lr g / (sqrt(v) + epsilon). */
static void dpoi_update(float *p, const float *grad, float *m /* RMSprop: NULL */,
                        float *v /* [n] */, size_t n, dpoi_rule rule)
{
    if (m)
        for (size_t i = 0; i < n; i++) {
            float g = rule.scale * grad[i];
            m[i] = rule.b1 * m[i] + rule.rest1 * g;
            v[i] = rule.b2 * v[i] + rule.rest2 * g * g;
            p[i] = rule.keep * p[i] - rule.rate * m[i] / (sqrtf(v[i]) / rule.root2 + rule.epsilon);
        }
    else
        for (size_t i = 0; i < n; i++) {
            float g = rule.scale * grad[i];
            v[i] = rule.b2 * v[i] + rule.rest2 * g * g;
            p[i] = rule.keep * p[i] - rule.rate * g / (sqrtf(v[i]) + rule.epsilon);
        }
}

/* Weights are updated in fp32: fp32 weights in place; bf16 weights through their master, which is
   then rounded, or without a master through a copy, which is rounded stochastically. */
static void dpoi_update_tensor(const dpo_model *model, const dpo_optimizer *optimizer,
                               const dpo_tensor *tensor, dpoi_rule rule)
{
    uint64_t key = dpo_random_u64(model->noise_seed, DPOI_STREAM_UPDATE, optimizer->step);
    key = dpo_random_u64(key, tensor->offset, 0);
    DPOI_PARALLEL_PIECES(dpoi_threads(model->context, tensor->n))
    for (size_t first = 0; first < tensor->n; first += DPOI_PIECE) {
        float copy[DPOI_PIECE], buffer[DPOI_PIECE];
        const size_t n = DPOI_MIN(tensor->n - first, (size_t)DPOI_PIECE);
        const size_t at = tensor->offset + first;
        float *p = tensor->dtype == DPO_F32 ? (float *)tensor->data + first
                 : tensor->master ? tensor->master + first : copy;
        uint16_t *half = (uint16_t *)tensor->data + first;
        if (p == copy) dpoi_widen(copy, half, DPO_BF16, n);
        dpoi_update(p, dpoi_grad_floats(tensor, first, buffer, n),
                    optimizer->m ? optimizer->m + at : NULL, optimizer->v + at, n, rule);
        if (p == copy)
            for (size_t i = 0; i < n; i++) half[i] = dpoi_bf16_stochastic(p[i], key, first + i);
        else if (tensor->master) dpoi_narrow(half, DPO_BF16, p, n);
    }
}

DPO_API int dpo_optimizer_step(dpo_model *model, dpo_optimizer *optimizer, double learning_rate,
                               double scale)
{
    if (!model->grads || !optimizer->v)
        return dpoi_fail(model->context, "dpo_optimizer_step needs gradients and "
                         "dpo_optimizer_init");
    double t = (double)++optimizer->step;
    double correction1 = 1 - pow(optimizer->beta1, t), correction2 = 1 - pow(optimizer->beta2, t);
    dpoi_rule rule = { .b1 = (float)optimizer->beta1, .rest1 = (float)(1 - optimizer->beta1),
                       .b2 = (float)optimizer->beta2, .rest2 = (float)(1 - optimizer->beta2),
                       .epsilon = (float)optimizer->epsilon, .root2 = (float)sqrt(correction2),
                       .scale = (float)scale };
    double bytes = (double)model->grad_bytes; // read and written
    for (size_t k = 0; k < model->n_tensors; k++) {
        const dpo_tensor *tensor = &model->tensors[k];
        if (!tensor->grad) continue;
        double lr = learning_rate * tensor->lr_scale;
        rule.keep = (float)(1 - (tensor->decays ? lr * optimizer->weight_decay : 0.0));
        rule.rate = (float)(optimizer->m ? lr / correction1 : lr);
        dpoi_update_tensor(model, optimizer, tensor, rule);
        const double weight_bytes = tensor->dtype == DPO_F32 ? 8 : tensor->master ? 10 : 4;
        bytes += (double)tensor->n * (weight_bytes + (optimizer->m ? 16 : 8));
    }
    dpoi_lap(model->context, DPO_TIME_UPDATE, 0, bytes);
    return 0;
}

/* Warmup rises as (step + 1) / (warmup + 1), as in the DPO paper's code: the first update is not
   wasted on a rate of zero. Then constant, or a decay to zero, linear or by half a cosine. */
DPO_API double dpo_schedule_factor(dpo_schedule schedule, size_t step, size_t steps, size_t warmup)
{
    if (step < warmup) return ((double)step + 1) / ((double)warmup + 1);
    if (schedule == DPO_CONSTANT || steps <= warmup) return 1.0;
    double progress = DPOI_MIN(1.0, (double)(step - warmup) / (double)(steps - warmup));
    if (schedule == DPO_LINEAR_DECAY) return 1.0 - progress;
    return 0.5 * (1.0 + cos(3.141592653589793 * progress));
}

/* ================================================================================================
   8. FILES

   Everything that is kept lies in one kind of file, a container of named arrays, little-endian:

       byte 0    header, 64 bytes: magic, version, kind, the file's length, the table's end,
                 number of entries, CRC-32 of the table
       byte 64   table, 144 bytes an entry: name, type, shape, layout, place, CRC-32 of the data
       ...       the entries' data in table order, each aligned to 64 bytes

   A model file holds "config" (JSON), the tensors under their Hugging Face names in the
   checkpoint's own type and row order, "tokenizer/..." tables (part 9) and "file/..." with the
   original files, so that exporting gives back what was imported. It is laid out for mmap: without
   `verify`, opening one and reading its config or tokenizer costs only the pages that are touched.

   A reader trusts nothing: every number is checked before it is used, places and lengths against
   the file's true size, and the first thing wrong is named. A writer makes a temporary file beside
   the target, syncs it and renames it, so a file with the right name is always complete.
   ============================================================================================= */

/* ---- 8.1 CRC-32 ------------------------------------------------------------------------------ */

/* The checksum of zip and PNG (polynomial 0xEDB88320), eight bytes per step: at[j][b] is the
   remainder of byte b followed by j zero bytes. */
typedef struct dpoi_crc_table { uint32_t at[8][256]; } dpoi_crc_table;

static void dpoi_crc_fill(dpoi_crc_table *table)
{
    for (uint32_t b = 0; b < 256; b++) {
        uint32_t remainder = b;
        for (size_t j = 0; j < 8; j++) {
            for (int bit = 0; bit < 8; bit++)
                remainder = (remainder >> 1) ^ (remainder & 1 ? 0xEDB88320u : 0);
            table->at[j][b] = remainder;
        }
    }
}

/* Extends `before`, the CRC of all bytes so far (0 at the start), by n more. */
static uint32_t dpoi_crc(const dpoi_crc_table *table, uint32_t before, const void *data,
                         size_t n_bytes)
{
    const unsigned char *bytes = data;
    uint32_t crc = before ^ 0xFFFFFFFFu;
    for (; n_bytes >= 8; n_bytes -= 8, bytes += 8) {
        uint64_t word;
        memcpy(&word, bytes, 8);
        word ^= crc;
        crc = 0;
        for (size_t j = 0; j < 8; j++) crc ^= table->at[7 - j][(word >> (8 * j)) & 255];
    }
    for (; n_bytes > 0; n_bytes--, bytes++) crc = (crc >> 8) ^ table->at[0][(crc ^ *bytes) & 255];
    return crc ^ 0xFFFFFFFFu;
}

/* ---- 8.2 reading ----------------------------------------------------------------------------- */

#define DPOI_MAGIC "dpo.h\r\n\x1a"  // the line end shows a transfer in text mode, as in PNG
#define DPOI_VERSION 1
#define DPOI_MAX_ENTRIES 16384      // far more than any model has tensors

typedef struct dpoi_file_record {
    char name[DPO_NAME_BYTES];
    uint32_t dtype, n_dims, layout, crc;
    uint64_t shape[2], offset, bytes;
} dpoi_file_record;

typedef struct dpoi_file_header {
    char magic[8];
    uint32_t version, kind;
    uint64_t file_bytes, table_end;
    uint32_t n_entries, table_crc;
    char zeros[24];
    dpoi_file_record table[];
} dpoi_file_header;

_Static_assert(sizeof(dpoi_file_header) == 64 && sizeof(dpoi_file_record) == 144,
               "the file format has no padding");

#define DPOI_BROKEN ": the file is damaged or cut short; put a whole copy in its place"

static const char *dpoi_kind_name(uint32_t kind)
{
    static const char *const names[] = { "unknown file", "model", "adapter", "training state",
                                         "reference cache", "test file" };
    return names[kind <= DPO_FILE_TEST ? kind : 0];
}

DPO_API const dpo_entry *dpo_file_find(const dpo_file *file, const char *name)
{
    for (size_t i = 0; i < file->n_entries; i++)
        if (!strcmp(file->entries[i].name, name)) return &file->entries[i];
    return NULL;
}

static int dpoi_is_named(const char *name /* [DPO_NAME_BYTES] */)
{
    return *name && memchr(name, 0, DPO_NAME_BYTES);
}

/* Whether an entry's type, layout, dimensions, shape and length fit each other. */
static int dpoi_entry_fits(const dpo_entry *entry)
{
    const size_t size = dpoi_dtype_bytes(entry->dtype);
    size_t elements, bytes;
    return size && (unsigned)entry->layout <= DPO_CONV1D &&
           (entry->n_dims == 2 || (entry->n_dims == 1 && entry->shape[1] == 1)) &&
           !dpoi_multiply(&elements, entry->shape[0], entry->shape[1]) &&
           !dpoi_multiply(&bytes, elements, size) && bytes == entry->bytes;
}

/* Reads the n records of the table into file->entries. The data of the first follows `place`, that
   of each other one the data of the one before. Here and below, dpo_file_open puts the path in
   front of messages. */
static int dpoi_file_read_table(dpo_context *context, dpo_file *file, size_t n, size_t place)
{
    const dpoi_file_header *header = file->map;
    while (file->n_entries < n) {
        const dpoi_file_record *record = &header->table[file->n_entries];
        dpo_entry entry = { .dtype = (dpo_dtype)record->dtype, .n_dims = record->n_dims,
                            .layout = (dpo_layout)record->layout, .bytes = record->bytes,
                            .shape = { record->shape[0], record->shape[1] } };
        if (!dpoi_is_named(record->name))
            return dpoi_fail(context, "entry %zu has no valid name" DPOI_BROKEN, file->n_entries);
        if (!dpoi_entry_fits(&entry))
            return dpoi_fail(context, "entry %s: type, shape and length do not fit each other"
                             DPOI_BROKEN, record->name);
        if (record->offset != dpoi_aligned(place) || record->offset > file->bytes ||
            record->bytes > file->bytes - record->offset)
            return dpoi_fail(context, "entry %s lies outside the file or over another entry"
                             DPOI_BROKEN, record->name);
        if (dpo_file_find(file, record->name))
            return dpoi_fail(context, "entry %s appears twice" DPOI_BROKEN, record->name);
        place = record->offset + record->bytes;
        entry.data = (const char *)file->map + record->offset;
        memcpy(entry.name, record->name, sizeof entry.name);
        file->entries[file->n_entries++] = entry;
    }
    return place == file->bytes ? 0
         : dpoi_fail(context, "%zu bytes follow the last entry" DPOI_BROKEN, file->bytes - place);
}

/* Lets the system drop the pages of part of an entry, so that what is read only once does not count
   as the program's memory. Reading them again brings them back. */
static void dpoi_file_release(const dpo_entry *entry, size_t first, size_t n_bytes)
{
    char *start = (char *)(uintptr_t)entry->data + first;
    dpoi_advise(start, n_bytes, (size_t)sysconf(_SC_PAGESIZE), MADV_DONTNEED);
}

#define DPOI_READ ((size_t)4 << 20)     // bytes

/* An entry may be as large as all that is trained, so it is read by pieces. */
static uint32_t dpoi_entry_crc(const dpoi_crc_table *table, const dpo_entry *entry)
{
    uint32_t crc = 0;
    for (size_t at = 0; at < entry->bytes; at += DPOI_READ) {
        const size_t n = DPOI_MIN(entry->bytes - at, DPOI_READ);
        crc = dpoi_crc(table, crc, (const char *)entry->data + at, n);
        dpoi_file_release(entry, at, n);
    }
    return crc;
}

static void dpoi_entry_copy(void *to, const dpo_entry *entry)
{
    for (size_t at = 0; at < entry->bytes; at += DPOI_READ) {
        const size_t n = DPOI_MIN(entry->bytes - at, DPOI_READ);
        memcpy((char *)to + at, (const char *)entry->data + at, n);
        dpoi_file_release(entry, at, n);
    }
}

/* Checks every entry's CRC, entries in parallel, and names the first that is wrong. */
static int dpoi_file_verify(dpo_context *context, dpo_file *file, const dpoi_crc_table *crc)
{
    const dpoi_file_header *header = file->map;
    DPOI_PARALLEL_FOR(dpoi_threads(context, file->bytes))
    for (size_t i = 0; i < file->n_entries; i++)
        if (dpoi_entry_crc(crc, &file->entries[i]) != header->table[i].crc)
            file->entries[i].data = NULL; // marks it for the loop below
    for (size_t i = 0; i < file->n_entries; i++)
        if (!file->entries[i].data)
            return dpoi_fail(context, "the checksum of %s is wrong" DPOI_BROKEN,
                             file->entries[i].name);
    return 0;
}

static int dpoi_file_check(dpo_context *context, dpo_file *file, dpo_file_kind kind, int verify)
{
    const dpoi_file_header *header = file->map;
    static const char zeros[sizeof header->zeros];
    if (file->bytes < sizeof *header || memcmp(header->magic, DPOI_MAGIC, sizeof header->magic))
        return dpoi_fail(context, "not a dpo.h file%s", kind == DPO_FILE_MODEL ? "; convert "
                         "checkpoints with `python3 convert.py import HF_DIR model.bin`"
                         : ", or cut short; put a whole copy in its place");
    if (header->version != DPOI_VERSION)
        return dpoi_fail(context, "file version %u, this program reads version %d; convert the "
                         "checkpoint again", header->version, DPOI_VERSION);
    if (header->kind != (uint32_t)kind)
        return dpoi_fail(context, "the file is of the kind \"%s\"; \"%s\" is expected",
                         dpoi_kind_name(header->kind), dpoi_kind_name(kind));
    if (header->file_bytes != file->bytes)
        return dpoi_fail(context, "%zu bytes long, but its header says %llu: the file was cut "
                         "short or added to; put a whole copy in its place", file->bytes,
                         (unsigned long long)header->file_bytes);
    const size_t n = header->n_entries, table_bytes = n * sizeof(dpoi_file_record);
    const size_t table_end = sizeof *header + table_bytes;
    dpoi_crc_table crc;
    dpoi_crc_fill(&crc);
    if (memcmp(header->zeros, zeros, sizeof zeros) || n > DPOI_MAX_ENTRIES ||
        header->table_end != table_end || table_end > file->bytes ||
        dpoi_crc(&crc, 0, header->table, table_bytes) != header->table_crc)
        return dpoi_fail(context, "its table does not fit the header, the file or its checksum"
                         DPOI_BROKEN);
    file->identity = dpo_hash(DPO_HASH_START, file->map, table_end);
    return dpoi_alloc(context, &file->entries, n, sizeof *file->entries) ||
           dpoi_file_read_table(context, file, n, table_end) ||
           (verify && dpoi_file_verify(context, file, &crc));
}

DPO_API int dpo_file_open(dpo_context *context, dpo_file *file, const char *path,
                          dpo_file_kind kind, int verify)
{
    *file = (dpo_file){ 0 };
    snprintf(file->path, sizeof file->path, "%s", path);
    struct stat status;
    void *map;
    int failed = 1;
    const int descriptor = open(path, O_RDONLY | O_NONBLOCK);   // a pipe would keep us waiting
    if (descriptor < 0 || fstat(descriptor, &status))
        dpoi_fail(context, "cannot be opened: %s", strerror(errno));
    else if (!S_ISREG(status.st_mode) || status.st_size == 0)
        dpoi_fail(context, "%s; a file of the kind \"%s\" is expected",
                  S_ISREG(status.st_mode) ? "is empty" : "is not a file", dpoi_kind_name(kind));
    else if ((map = mmap(NULL, (size_t)status.st_size, PROT_READ, MAP_PRIVATE, descriptor, 0)) ==
             MAP_FAILED)
        dpoi_fail(context, "cannot be mapped: %s", strerror(errno));
    else {
        file->map = map;
        file->bytes = (size_t)status.st_size;
        failed = dpoi_file_check(context, file, kind, verify);
    }
    if (descriptor >= 0) close(descriptor);
    if (!failed) return 0;
    dpo_file_close(context, file);
    return dpoi_fail_at(context, path);
}

DPO_API void dpo_file_close(dpo_context *context, dpo_file *file)
{
    if (file->map) munmap(file->map, file->bytes);
    dpoi_free(context, file->entries);
    *file = (dpo_file){ 0 };
}

/* ---- 8.3 writing ----------------------------------------------------------------------------- */

/* Makes rows [first, first + n) of an entry whose data is NULL, valid until the next call; NULL
   with a message if it fails. Files are written piece by piece this way, so that saving needs no
   second copy of the weights. */
typedef const void *dpoi_fill(void *user, const dpo_entry *entry, size_t first, size_t n);
#define DPOI_FILL 65536     // elements of a piece, or one row if that is longer

/* A rename is safe once the directory is synced. Some file systems cannot, which is no failure. */
static void dpoi_sync_directory(char *path /* of a file in it; cut behind its last slash */)
{
    char *slash = strrchr(path, '/');
    if (slash) slash[1] = 0;
    const int descriptor = open(slash ? path : ".", O_RDONLY);
    if (descriptor < 0) return;
    fsync(descriptor);
    close(descriptor);
}

static int dpoi_write_at(FILE *stream, size_t place, const void *data, size_t n_bytes)
{
    return fseeko(stream, (off_t)place, SEEK_SET) || fwrite(data, 1, n_bytes, stream) != n_bytes;
}

/* Writes each entry's data, then its record into the table, and the header last; gaps that are not
   written read as zeros. Returns 0 on success, 1 with errno, or -1 if `fill` failed. */
static int dpoi_file_write_stream(FILE *stream, dpo_file_kind kind, const dpo_entry *entries,
                                  size_t n_entries, dpoi_fill *fill, void *user)
{
    dpoi_file_header header = { .version = DPOI_VERSION, .kind = (uint32_t)kind,
                                .n_entries = (uint32_t)n_entries };
    dpoi_crc_table crc;
    dpoi_crc_fill(&crc);
    memcpy(header.magic, DPOI_MAGIC, sizeof header.magic);
    header.file_bytes = header.table_end = sizeof header + n_entries * sizeof(dpoi_file_record);
    for (size_t i = 0; i < n_entries; i++) {
        const dpo_entry *entry = &entries[i];
        const size_t rows = entry->bytes ? entry->shape[0] : 0;
        const size_t row_bytes = entry->bytes / DPOI_MAX(rows, (size_t)1);
        // Data that is there already needs no pieces.
        const size_t step = entry->data || !rows ? rows
                          : DPOI_MAX(DPOI_FILL / entry->shape[1], (size_t)1);
        dpoi_file_record record = { .dtype = entry->dtype, .n_dims = (uint32_t)entry->n_dims,
            .layout = entry->layout, .shape = { entry->shape[0], entry->shape[1] },
            .offset = dpoi_aligned(header.file_bytes), .bytes = entry->bytes };
        memcpy(record.name, entry->name, sizeof record.name);
        for (size_t first = 0; first < rows; first += step) {
            const size_t n = DPOI_MIN(rows - first, step), n_bytes = n * row_bytes;
            const void *data = entry->data ? entry->data : fill(user, entry, first, n);
            if (!data) return -1;
            record.crc = dpoi_crc(&crc, record.crc, data, n_bytes);
            if (dpoi_write_at(stream, record.offset + first * row_bytes, data, n_bytes)) return 1;
        }
        header.file_bytes = record.offset + record.bytes;
        header.table_crc = dpoi_crc(&crc, header.table_crc, &record, sizeof record);
        if (dpoi_write_at(stream, sizeof header + i * sizeof record, &record, sizeof record))
            return 1;
    }
    return dpoi_write_at(stream, 0, &header, sizeof header) || fflush(stream) ||
           ftruncate(fileno(stream), (off_t)header.file_bytes) || fsync(fileno(stream));
}

static int dpoi_file_write(dpo_context *context, const char *path, dpo_file_kind kind,
                           const dpo_entry *entries, size_t n_entries, dpoi_fill *fill, void *user)
{
    char temporary[4096];
    int length = snprintf(temporary, sizeof temporary, "%s.tmp-%ld", path, (long)getpid());
    if ((size_t)length >= sizeof temporary)
        return dpoi_fail(context, "%s: the path is too long; give a shorter one", path);
    struct stat status;
    if (!stat(path, &status) && !S_ISREG(status.st_mode))
        return dpoi_fail(context, "%s: is there and is not a file; choose another name", path);
    if (n_entries > DPOI_MAX_ENTRIES)
        return dpoi_fail(context, "%s: a file holds at most %d entries, not %zu", path,
                         DPOI_MAX_ENTRIES, n_entries);
    unlink(temporary);      // what a killed process left, or a link to somebody else's file
    FILE *stream = fopen(temporary, "wbx");
    int failed = stream ? dpoi_file_write_stream(stream, kind, entries, n_entries, fill, user) : 1;
    int reason = errno;
    if (failed && stream) fclose(stream);
    if (!failed && (fclose(stream) || rename(temporary, path))) {
        failed = 1;
        reason = errno;
    }
    if (!failed) dpoi_sync_directory(temporary); // which cuts it
    else if (stream) unlink(temporary);
    if (failed > 0)
        dpoi_fail(context, "cannot be written: %s; nothing was changed", strerror(reason));
    return failed && dpoi_fail_at(context, path);
}

DPO_API int dpo_file_write(dpo_context *context, const char *path, dpo_file_kind kind,
                           const dpo_entry *entries, size_t n_entries)
{
    for (size_t i = 0; i < n_entries; i++) {
        const dpo_entry *entry = &entries[i];
        if (!dpoi_is_named(entry->name) || !dpoi_entry_fits(entry) ||
            (entry->bytes && !entry->data))
            return dpoi_fail(context, "%s: entry %zu: name, type, shape, length and data do not "
                             "fit each other; nothing was changed", path, i);
        for (size_t j = 0; j < i; j++)
            if (!strcmp(entries[j].name, entry->name))
                return dpoi_fail(context, "%s: entries %zu and %zu are both called %s; nothing was "
                                 "changed", path, j, i, entry->name);
    }
    return dpoi_file_write(context, path, kind, entries, n_entries, NULL, NULL);
}

static dpo_entry dpoi_vector(const char *name, dpo_dtype dtype, const void *data, size_t n)
{
    dpo_entry entry = { .dtype = dtype, .n_dims = 1, .shape = { n, 1 }, .data = data,
                        .bytes = n * dpoi_dtype_bytes(dtype) };
    snprintf(entry.name, sizeof entry.name, "%s", name);
    return entry;
}

/* The entry of a tensor; with `data` NULL, dpoi_fill_tensor makes it. */
static dpo_entry dpoi_tensor_entry(const dpo_tensor *tensor, dpo_dtype dtype, const void *data)
{
    dpo_entry entry = dpoi_vector(tensor->name, dtype, data, tensor->n);
    entry.layout = tensor->layout;
    entry.n_dims = tensor->n_dims;
    memcpy(entry.shape, tensor->shape, sizeof entry.shape);
    return entry;
}

/* ---- 8.4 models ------------------------------------------------------------------------------ */

/* Stores a JSON value of the field's kind at `at`; returns 0 if it does not fit. */
static int dpoi_field_read(const dpoi_field *field, void *at, const dpo_json_value *value,
                           const char *text)
{
    const double number = value->number;
    const int whole = number == floor(number) && fabs(number) < 0x1p53;
    int fits = 1, choice = 0;
    switch (field->kind) {
    case DPOI_SIZE: if ((fits = whole && number >= 0)) *(size_t *)at = (size_t)number; break;
    case DPOI_REAL: *(double *)at = number; break;
    case DPOI_FLAG: *(int *)at = number != 0; break;
    case DPOI_ID: if ((fits = whole)) *(int64_t *)at = (int64_t)number; break;
    case DPOI_CHOICE:
        while (field->choices[choice] && strcmp(field->choices[choice], text)) choice++;
        fits = field->choices[choice] != NULL;
        *(int *)at = choice; // enums are ints in every supported ABI
        break;
    case DPOI_CHARS: fits = snprintf(at, field->most, "%s", text) < (int)field->most; break;
    }
    return fits;
}

/* Fills a struct from the JSON text in a file's entry "config". Here and below, whoever opened the
   file puts its path in front of messages. */
static int dpoi_fields_read(dpo_context *context, void *object, const dpoi_field *fields,
                            const dpo_file *file)
{
    static const dpo_json_kind kinds[] = { DPO_JSON_NUMBER, DPO_JSON_NUMBER, DPO_JSON_BOOL,
                                           DPO_JSON_NUMBER, DPO_JSON_STRING, DPO_JSON_STRING };
    const dpo_entry *entry = dpo_file_find(file, "config");
    dpo_json json = { 0 };
    if (!entry || entry->dtype != DPO_U8)
        return dpoi_fail(context, "has no config: import or make the file again");
    int failed = dpo_json_parse(context, &json, entry->data, entry->bytes, "config");
    for (const dpoi_field *field = fields; field->name && !failed; field++) {
        const dpo_json_value *value = dpo_json_member(&json, json.values, field->name);
        const char *text = value ? json.text.bytes + value->string : "";
        if (!value || value->kind != kinds[field->kind])
            failed = dpoi_fail(context, "config: %s is missing or not of its type: import or make "
                               "the file again", field->name);
        else if (!dpoi_field_read(field, (char *)object + field->offset, value, text))
            failed = value->kind == DPO_JSON_STRING
                   ? dpoi_fail(context, "config: %s is \"%.40s\" (%zu bytes), which this program "
                               "does not know or has no room for", field->name, text,
                               value->n_string)
                   : dpoi_fail(context, "config: %s is %g; it must be a whole number, a size 0 or "
                               "more", field->name, value->number);
    }
    dpo_json_free(context, &json);
    return failed;
}

/* Appends a struct as JSON text that dpoi_fields_read can read. */
static int dpoi_fields_write(dpo_context *context, dpo_string *out, const void *object,
                             const dpoi_field *fields)
{
    for (const dpoi_field *field = fields; field->name; field++) {
        const void *at = (const char *)object + field->offset;
        const char *string = NULL;
        char name[80], text[80] = "", *point; // text: of what is no string
        snprintf(name, sizeof name, "%s\"%s\": ", field == fields ? "{" : ", ", field->name);
        switch (field->kind) {
        case DPOI_SIZE: snprintf(text, sizeof text, "%zu", *(const size_t *)at); break;
        case DPOI_REAL:
            snprintf(text, sizeof text, "%.17g", *(const double *)at);
            point = strchr(text, *localeconv()->decimal_point);
            if (point) *point = '.'; // whatever the host's locale
            break;
        case DPOI_FLAG: snprintf(text, sizeof text, *(const int *)at ? "true" : "false"); break;
        case DPOI_ID: snprintf(text, sizeof text, "%lld", (long long)*(const int64_t *)at); break;
        case DPOI_CHOICE: string = field->choices[*(const int *)at]; break;
        case DPOI_CHARS: string = at; break;
        }
        if (dpoi_string_append(context, out, name, strlen(name)) ||
            (string ? dpo_json_quote(context, out, string, strlen(string))
                    : dpoi_string_append(context, out, text, strlen(text))))
            return 1;
    }
    return dpoi_string_append(context, out, "}", 1);
}

DPO_API int dpo_config_load(dpo_context *context, dpo_config *config, const dpo_file *file)
{
    *config = (dpo_config){ 0 };
    const int failed = dpoi_fields_read(context, config, dpoi_config_fields, file) ||
                       dpo_config_check(context, config);
    return failed && dpoi_fail_at(context, file->path);
}

static size_t dpoi_count_nonfinite(const float *x, size_t n)
{
    size_t count = 0;
    for (size_t i = 0; i < n; i++) count += !isfinite(x[i]);
    return count;
}

/* Checks that all of an entry's elements are finite, and copies them into the tensor unless it uses
   them in the mapped file. */
static int dpoi_tensor_read(dpo_context *context, dpo_tensor *tensor, const dpo_entry *entry)
{
    const size_t n_pieces = tensor->n / DPOI_PIECE + 1;
    size_t *bad, total = 0; // bad[n_pieces]: elements that are not finite
    if (dpoi_alloc(context, &bad, n_pieces, sizeof *bad)) return 1;
    DPOI_PARALLEL_PIECES(dpoi_threads(context, tensor->n))
    for (size_t p = 0; p < n_pieces; p++) {
        float x[DPOI_PIECE];
        const size_t first = p * DPOI_PIECE, n = DPOI_MIN(tensor->n - first, (size_t)DPOI_PIECE);
        dpoi_widen(x, (const char *)entry->data + first * dpoi_dtype_bytes(entry->dtype),
                   entry->dtype, n);
        bad[p] = dpoi_count_nonfinite(x, n);
        if (tensor->data != entry->data) dpoi_tensor_set(tensor, first, x, n);
    }
    for (size_t p = 0; p < n_pieces; p++) total += bad[p];
    dpoi_free(context, bad);
    if (tensor->data != entry->data) dpoi_file_release(entry, 0, entry->bytes);
    return !total ? 0
         : dpoi_fail(context, "%s has %zu elements that are not finite numbers; the file is "
                     "damaged or its training diverged", entry->name, total);
}

/* ALiBi's slopes for H heads, when the checkpoint has none: 2^(-8 h / n), h = 1 .. n, if H = n is a
   power of two; otherwise those of the next smaller power n, then every other slope of 2n, from the
   first on (Press et al. 2021, and the code that all of its users share). */
static void dpoi_alibi_slopes(float *slopes, size_t H)
{
    size_t n = 1;
    while (2 * n <= H) n *= 2;
    for (size_t h = 0; h < n; h++) slopes[h] = (float)pow(2.0, -8.0 * (double)(h + 1) / (double)n);
    for (size_t h = n; h < H; h++)
        slopes[h] = (float)pow(2.0, -4.0 * (double)(2 * (h - n) + 1) / (double)n);
}

/* What a model file holds besides its config and tensors. */
static int dpoi_is_extra(const char *name)
{
    return !strncmp(name, "tokenizer/", 10) || !strncmp(name, "file/", 5);
}

/* Checks that the file has an entry of the right shape for each tensor from `first` on, and no
   tensor besides. This comes before anything of that shape is allocated. */
static int dpoi_match_entries(const dpo_model *model, const dpo_file *file, size_t first)
{
    dpo_context *context = model->context;
    for (size_t i = first; i < model->n_tensors; i++) {
        const dpo_tensor *tensor = &model->tensors[i];
        const dpo_entry *entry = dpo_file_find(file, tensor->name);
        if (!entry && tensor == model->weights->slopes) continue;   // computed instead
        if (!entry)
            return dpoi_fail(context, "tensor %s is missing: import or make the file again",
                             tensor->name);
        if (entry->dtype != DPO_F32 && entry->dtype != DPO_F16 && entry->dtype != DPO_BF16)
            return dpoi_fail(context, "tensor %s is not of type f32, f16 or bf16", tensor->name);
        if (entry->n_dims != tensor->n_dims || entry->shape[0] != tensor->shape[0] ||
            entry->shape[1] != tensor->shape[1] || entry->layout != tensor->layout)
            return dpoi_fail(context, "tensor %s is [%zu, %zu] in layout %d, where [%zu, %zu] in "
                             "layout %d is expected", tensor->name, entry->shape[0],
                             entry->shape[1], (int)entry->layout, tensor->shape[0],
                             tensor->shape[1], (int)tensor->layout);
    }
    for (size_t i = 0; i < file->n_entries; i++) {
        const char *name = file->entries[i].name;
        if (!strcmp(name, "config") || (first && !strcmp(name, "base")) || dpoi_is_extra(name) ||
            dpo_model_tensor(model, name))
            continue;
        return first ? dpoi_fail(context, "tensor %s is none of the adapter's target modules (%s), "
                                 "or half of its pair A and B is missing", name,
                                 model->lora.targets)
                     : dpoi_fail(context, "tensor %s does not belong to this architecture", name);
    }
    return 0;
}

/* Reads the tensors from `first` on. */
static int dpoi_read_tensors(dpo_model *model, const dpo_file *file, size_t first)
{
    for (size_t i = first; i < model->n_tensors; i++) {
        dpo_tensor *tensor = &model->tensors[i];
        const dpo_entry *entry = dpo_file_find(file, tensor->name);
        // Looking for what is not finite reads everything, which no_verify is there to avoid.
        if (!entry || (tensor->data == entry->data && model->options.no_verify)) continue;
        if (dpoi_tensor_read(model->context, tensor, entry)) return 1;
    }
    return 0;
}

/* Reads the weights and the tokenizer of a model whose config is known. */
static int dpoi_model_read(dpo_model *model)
{
    const dpo_file *file = &model->file;
    if (dpoi_build_table(model) || dpoi_match_entries(model, file, 0)) return 1;
    for (size_t i = 0; i < model->n_tensors && model->options.stored; i++) {
        const dpo_entry *entry = dpo_file_find(file, model->tensors[i].name);
        if (entry) model->tensors[i].dtype = entry->dtype;
    }
    if (dpoi_allocate_weights(model, file)) return 1;
    dpo_tensor *slopes = model->weights->slopes;
    if (slopes && !dpo_file_find(file, slopes->name))
        dpoi_alibi_slopes(slopes->data, model->config.n_heads);
    if (dpoi_read_tensors(model, file, 0) ||
        dpo_tokenizer_load(model->context, &model->tokenizer, file))
        return 1;
    return model->tokenizer.n_tokens <= model->config.vocab_size ? 0
         : dpoi_fail(model->context, "the tokenizer has %zu tokens, but the model's vocabulary "
                     "only %zu rows", model->tokenizer.n_tokens, model->config.vocab_size);
}

DPO_API int dpo_model_load(dpo_context *context, dpo_model *model, const char *path,
                           const dpo_model_options *options)
{
    *model = (dpo_model){ .context = context };
    if (options) model->options = *options;
    model->options.frozen |= model->options.stored;
    int failed = dpo_file_open(context, &model->file, path, DPO_FILE_MODEL,
                               !model->options.no_verify) ||
                 dpo_config_load(context, &model->config, &model->file) ||
                 (dpoi_model_read(model) && dpoi_fail_at(context, path));
    if (failed) dpo_model_free(model);
    else model->identity = model->file.identity;
    return failed;
}

/* Standard deviations: 0.02, Hugging Face's default (Pythia's own first weights had others,
   small_init and wang_init), or BTLM's 0.073, with muP's factor sqrt(mup_width_scale) inside the
   blocks; the two matrices of a block that write to the residual stream have theirs divided by
   sqrt(2 L), so that the stream does not grow with depth (Radford et al. 2019). */
static void dpoi_init_weights(dpo_model *model, uint64_t seed)
{
    const dpo_config *config = &model->config;
    const dpoi_weights *weights = model->weights;
    double outer = config->architecture == DPO_BTLM ? 0.073 : 0.02;
    double inner = outer * sqrt(config->mup_width_scale);
    double last = inner / sqrt(2.0 * (double)config->n_layers);
    for (size_t k = 0; k < model->n_tensors; k++) {
        dpo_tensor *tensor = &model->tensors[k];
        // matrices that are PLAIN are the embedding and the positions
        double deviation = tensor->layout == DPO_PLAIN || tensor == weights->head ? outer : inner;
        for (size_t l = 0; l < config->n_layers; l++)
            if (tensor == weights->blocks[l].out_w || tensor == weights->blocks[l].down_w)
                deviation = last;
        float constant = strstr(tensor->name, ".weight") ? 1.0f : 0.0f; // of a vector
        DPOI_PARALLEL_PIECES(dpoi_threads(model->context, tensor->n))
        for (size_t first = 0; first < tensor->n; first += DPOI_PIECE) {
            float x[DPOI_PIECE];
            const size_t n = DPOI_MIN(tensor->n - first, (size_t)DPOI_PIECE);
            for (size_t i = 0; i < n; i++)
                x[i] = tensor->n_dims == 1 ? constant
                     : (float)(deviation * dpoi_random_normal(seed, k, first + i));
            dpoi_tensor_set(tensor, first, x, n);
        }
    }
    if (weights->slopes) dpoi_alibi_slopes(weights->slopes->data, config->n_heads);
}

/* The tokenizer for a new model, and the ids of the special tokens that go with it. */
static int dpoi_init_tokenizer(dpo_model *model, const char *path)
{
    dpo_context *context = model->context;
    dpo_config *config = &model->config, source = { .bos_id = -1, .eos_id = 256 };
    if (path && (dpo_file_open(context, &model->file, path, DPO_FILE_MODEL, 1) ||
                 dpo_config_load(context, &source, &model->file)))
        return 1;
    int failed = dpo_tokenizer_load(context, &model->tokenizer, path ? &model->file : NULL);
    if (!failed && !model->tokenizer.n_tokens)
        failed = dpoi_fail(context, "has no tokenizer; import it from a checkpoint that has one");
    if (failed) return path ? dpoi_fail_at(context, path) : 1;
    if (config->bos_id == -1) config->bos_id = source.bos_id;
    if (config->eos_id == -1) config->eos_id = source.eos_id;
    if (!config->vocab_size) config->vocab_size = (model->tokenizer.n_tokens + 63) / 64 * 64;
    if (config->vocab_size < model->tokenizer.n_tokens)
        return dpoi_fail(context, "config: vocab_size %zu is smaller than the tokenizer's %zu "
                         "tokens", config->vocab_size, model->tokenizer.n_tokens);
    return 0;
}

DPO_API int dpo_model_init(dpo_context *context, dpo_model *model, const dpo_config *config,
                           const char *tokenizer_path, uint64_t seed,
                           const dpo_model_options *options)
{
    *model = (dpo_model){ .context = context, .config = *config };
    if (options) model->options = *options;
    if (dpoi_init_tokenizer(model, tokenizer_path) || dpoi_build_table(model) ||
        dpoi_allocate_weights(model, NULL)) {
        dpo_model_free(model);
        return 1;
    }
    dpoi_init_weights(model, seed);
    return 0;
}

/* The byte tokenizer as a model file would hold it: token i is byte i, token 256 <|endoftext|>. */
#define DPOI_4(i) i, i + 1, i + 2, i + 3
#define DPOI_16(i) DPOI_4(i), DPOI_4(i + 4), DPOI_4(i + 8), DPOI_4(i + 12)
#define DPOI_64(i) DPOI_16(i), DPOI_16(i + 16), DPOI_16(i + 32), DPOI_16(i + 48)
#define DPOI_0_TO_255 DPOI_64(0), DPOI_64(64), DPOI_64(128), DPOI_64(192)
static const char dpoi_byte_info[] = "{\"n_tokens\": 257, \"nfc\": false, \"unicode\": \"\"}";
static const uint8_t dpoi_byte_text[] = { DPOI_0_TO_255, '<', '|', 'e', 'n', 'd', 'o', 'f', 't',
                                          'e', 'x', 't', '|', '>' };
static const uint32_t dpoi_byte_ids[] = { DPOI_0_TO_255, 256, sizeof dpoi_byte_text };
static const uint32_t dpoi_byte_added[] = { 256, 1 };   // special
static const dpo_entry dpoi_byte_entries[] = {
    { "tokenizer/info", DPO_U8, DPO_PLAIN, 1, { sizeof dpoi_byte_info - 1, 1 }, dpoi_byte_info,
      sizeof dpoi_byte_info - 1 },
    { "tokenizer/token_ends", DPO_U32, DPO_PLAIN, 1, { 257, 1 }, dpoi_byte_ids + 1, 257 * 4 },
    { "tokenizer/token_bytes", DPO_U8, DPO_PLAIN, 1, { sizeof dpoi_byte_text, 1 }, dpoi_byte_text,
      sizeof dpoi_byte_text },
    { "tokenizer/byte_ids", DPO_U32, DPO_PLAIN, 1, { 256, 1 }, dpoi_byte_ids, 256 * 4 },
    { "tokenizer/added", DPO_U32, DPO_PLAIN, 2, { 1, 2 }, dpoi_byte_added, 2 * 4 } };
static const dpo_file dpoi_byte_file = {
    .entries = (dpo_entry *)dpoi_byte_entries,
    .n_entries = sizeof dpoi_byte_entries / sizeof *dpoi_byte_entries };

typedef struct dpoi_saving {
    dpo_model *model;
    float *rows; size_t capacity;   // three times [n, columns]: weights, B A, and what is written
} dpoi_saving;

/* The dpoi_fill of tensors: rows of W, or of W + scale * B A if it has an adapter. */
static const void *dpoi_fill_tensor(void *user, const dpo_entry *entry, size_t first, size_t n)
{
    dpoi_saving *saving = user;
    dpo_model *model = saving->model;
    const dpo_tensor *W = dpo_model_tensor(model, entry->name), *A = W->lora_a, *B = W->lora_b;
    const size_t columns = W->shape[1], size = n * columns;
    if (dpoi_reserve(model->context, &saving->rows, &saving->capacity, 3 * size, sizeof(float)))
        return NULL;
    float *x = saving->rows, *product = x + size;
    void *out = product + size; // in the entry's dtype
    dpoi_tensor_get(W, first * columns, x, size);
    if (A) { // B A is [out, in]; Conv1D wants its transpose A^T B^T, as dpoi_weight gives them
        const float scale = dpoi_lora_scale(&model->lora);
        const int turned = W->layout == DPO_CONV1D;
        dpoi_matrix left = turned ? dpoi_weight(A) : dpoi_rows(B->data, B->shape[1]);
        dpoi_matrix right = turned ? dpoi_weight(B) : dpoi_rows(A->data, A->shape[1]);
        dpoi_matmul(model->context, product, columns, dpoi_submatrix(left, first, 0), right, n,
                    columns, model->lora.r, 0, DPO_F32);
        for (size_t i = 0; i < size; i++) x[i] += scale * product[i];
    }
    dpoi_narrow(out, entry->dtype, x, size);
    if (!dpoi_count_nonfinite(x, size)) return out;
    dpoi_fail(model->context, "%s is not finite, so nothing was saved; a lower --learning-rate may "
              "help", W->name);
    return NULL;
}

#define DPOI_PEFT_CONFIG "file/adapter_config.json"

/* Lists the entries of a model file or an adapter file, but for the config, and returns their
   number. Those of tensors have no data. */
static size_t dpoi_list_entries(const dpo_model *model, dpo_entry *entries, dpo_file_kind kind,
                                dpo_dtype matrices)
{
    const dpo_file *file = model->file.map ? &model->file : &dpoi_byte_file;
    const dpo_string *peft = &model->adapter_config;
    const int adapter = kind == DPO_FILE_ADAPTER;
    size_t n = 0;
    if (adapter) entries[n++] = dpoi_vector("base", DPO_U64, &model->identity, 1);
    for (size_t i = 0; i < model->n_tensors; i++) {
        const dpo_tensor *tensor = &model->tensors[i];
        const dpo_dtype dtype = tensor->shape[1] > 1 ? matrices : DPO_F32;
        const int of_adapter = !strncmp(tensor->name, "base_model.", 11);
        if (of_adapter == adapter) entries[n++] = dpoi_tensor_entry(tensor, dtype, NULL);
    }
    if (adapter) {
        if (peft->n) entries[n++] = dpoi_vector(DPOI_PEFT_CONFIG, DPO_U8, peft->bytes, peft->n);
        return n;
    }
    for (size_t i = 0; i < file->n_entries; i++) {
        const char *name = file->entries[i].name;
        // A new model on another's tokenizer does not inherit the files that describe the other.
        int describes_other = !model->identity && (!strcmp(name, "file/config.json") ||
                                                   !strcmp(name, "file/generation_config.json"));
        if (dpoi_is_extra(name) && !describes_other) entries[n++] = file->entries[i];
    }
    return n;
}

/* Writes a model or its adapter, with `settings` as the config. */
static int dpoi_save(dpo_model *model, const char *path, dpo_file_kind kind, const void *settings,
                     const dpoi_field *fields, dpo_dtype matrices)
{
    dpo_context *context = model->context;
    dpo_string config = { 0 };
    dpo_entry *entries = NULL;
    dpoi_saving saving = { .model = model };
    int failed = dpoi_fields_write(context, &config, settings, fields) ||
                 dpoi_alloc(context, &entries, 3 + model->n_tensors + model->file.n_entries +
                            dpoi_byte_file.n_entries, sizeof *entries);
    if (!failed) {
        entries[0] = dpoi_vector("config", DPO_U8, config.bytes, config.n);
        size_t n = 1 + dpoi_list_entries(model, entries + 1, kind, matrices);
        failed = dpoi_file_write(context, path, kind, entries, n, dpoi_fill_tensor, &saving);
    }
    dpoi_free(context, entries);
    dpoi_free(context, saving.rows);
    dpo_string_free(context, &config);
    return failed;
}

DPO_API int dpo_model_save(dpo_model *model, const char *path, dpo_dtype matrices)
{
    if (matrices != DPO_F32 && matrices != DPO_BF16)
        return dpoi_fail(model->context, "%s: matrices are saved as DPO_F32 or DPO_BF16, not as "
                         "type %d", path, (int)matrices);
    return dpoi_save(model, path, DPO_FILE_MODEL, &model->config, dpoi_config_fields, matrices);
}

DPO_API void dpo_model_free(dpo_model *model)
{
    dpo_context *context = model->context;
    dpoi_workspace_free(model);
    dpo_tokenizer_free(context, &model->tokenizer);
    dpo_file_close(context, &model->file);
    if (model->weights) dpoi_free(context, model->weights->blocks);
    dpoi_free(context, model->weights);
    dpoi_free(context, model->tensors);
    dpoi_free(context, model->params);
    dpoi_free(context, model->masters);
    dpoi_free(context, model->adapter);
    dpo_string_free(context, &model->adapter_config);
    dpoi_free(context, model->grads);
    *model = (dpo_model){ .context = context };
}

DPO_API const dpo_tensor *dpo_model_tensor(const dpo_model *model, const char *name)
{
    for (size_t i = 0; i < model->n_tensors; i++)
        if (!strcmp(model->tensors[i].name, name)) return &model->tensors[i];
    return NULL;
}

/* ---- 8.5 adapters ---------------------------------------------------------------------------- */

/* An adapter file holds "config" (JSON), "base" (the identity of the model it belongs to), A and B
   of every adapted layer under PEFT's names, and, if the adapter was imported, PEFT's own config.
   Further training keeps that, and the export checks whether it still holds. */

static const dpoi_field dpoi_lora_fields[] = {
    { "r", DPOI_SIZE, offsetof(dpo_lora, r), 0, NULL },
    { "alpha", DPOI_REAL, offsetof(dpo_lora, alpha), 0, NULL },
    { "dropout", DPOI_REAL, offsetof(dpo_lora, dropout), 0, NULL },
    { "rslora", DPOI_FLAG, offsetof(dpo_lora, rslora), 0, NULL },
    { "target_modules", DPOI_CHARS, offsetof(dpo_lora, targets), sizeof((dpo_lora){ 0 }.targets),
      NULL },
    { "base", DPOI_CHARS, offsetof(dpo_lora, base), sizeof((dpo_lora){ 0 }.base), NULL }, { 0 } };

DPO_API int dpo_lora_read(dpo_context *context, dpo_lora *lora, const dpo_file *file)
{
    const dpo_entry *base = dpo_file_find(file, "base");
    *lora = (dpo_lora){ 0 };
    if (!base || base->dtype != DPO_U64 || base->bytes != 8)
        return dpoi_fail(context, "%s: has no base: make the adapter again", file->path);
    memcpy(&lora->base_identity, base->data, sizeof lora->base_identity);
    return dpoi_fields_read(context, lora, dpoi_lora_fields, file) &&
           dpoi_fail_at(context, file->path);
}

/* Adds the adapter's tensors to the table, allocates them, and reads them if there is a file. On
   failure the model is left without an adapter. */
static int dpoi_lora_add(dpo_model *model, const dpo_lora *lora, const dpo_file *file)
{
    dpo_context *context = model->context;
    const size_t first = model->n_tensors;
    if (!model->options.frozen || model->lora.r || model->grads || model->workspace)
        return dpoi_fail(context, "an adapter goes over a model that was loaded as frozen, has "
                         "none yet, and has not been used");
    const dpo_entry *original = file ? dpo_file_find(file, DPOI_PEFT_CONFIG) : NULL;
    int failed = dpoi_add_adapters(model, lora, file) ||
                 dpoi_alloc(context, &model->adapter, model->n_trainable, sizeof *model->adapter);
    for (size_t i = first; i < model->n_tensors && !failed; i++)
        model->tensors[i].data = model->adapter + model->tensors[i].offset;
    failed = failed || (file && (dpoi_match_entries(model, file, first) ||
                                 dpoi_read_tensors(model, file, first))) ||
             (original && dpoi_string_append(context, &model->adapter_config, original->data,
                                             original->bytes));
    if (failed) dpoi_remove_adapter(model, first);
    return failed;
}

DPO_API int dpo_lora_init(dpo_model *model, const dpo_lora *lora, uint64_t seed)
{
    const size_t first = model->n_tensors;
    if (dpoi_lora_add(model, lora, NULL)) return 1;
    for (size_t k = first; k < model->n_tensors; k++) {
        const dpo_tensor *tensor = &model->tensors[k];
        float *x = tensor->data;
        const double limit = k % 2 == first % 2 ? 1 / sqrt((double)tensor->shape[1]) : 0.0; // A, B
        for (size_t i = 0; i < tensor->n; i++)
            x[i] = (float)(limit * (2 * dpo_random_uniform(seed, k, i) - 1));
    }
    return 0;
}

DPO_API int dpo_lora_check_base(dpo_context *context, const dpo_lora *lora, const char *path,
                                uint64_t identity)
{
    if (lora->base_identity == identity) return 0;
    return dpoi_fail(context, "%s: the adapter was made for another model, %016llx (then at %s), "
                     "not for this one, %016llx; give that one, or import the adapter again for "
                     "this one", path, (unsigned long long)lora->base_identity, lora->base,
                     (unsigned long long)identity);
}

DPO_API int dpo_lora_load(dpo_model *model, const char *path)
{
    dpo_context *context = model->context;
    dpo_file file;
    dpo_lora lora;
    if (dpo_file_open(context, &file, path, DPO_FILE_ADAPTER, 1)) return 1;
    int failed = dpo_lora_read(context, &lora, &file) ||
                 dpo_lora_check_base(context, &lora, path, model->identity) ||
                 (dpoi_lora_add(model, &lora, &file) && dpoi_fail_at(context, path));
    if (!failed) model->adapter_identity = file.identity;
    dpo_file_close(context, &file);
    return failed;
}

static size_t dpoi_utf8_check(const char *text, size_t n); // part 9.1

DPO_API int dpo_lora_save(dpo_model *model, const char *path, const char *base_path)
{
    dpo_lora lora = model->lora;
    const size_t n_base = base_path ? strlen(base_path) : 0;
    if (!lora.r) return dpoi_fail(model->context, "%s: the model has no adapter to save", path);
    const int keep = n_base && n_base < sizeof lora.base &&
                     dpoi_utf8_check(base_path, n_base) == n_base;
    snprintf(lora.base, sizeof lora.base, "%s", keep ? base_path : "");
    return dpoi_save(model, path, DPO_FILE_ADAPTER, &lora, dpoi_lora_fields, DPO_F32);
}

/* ---- 8.6 the reference cache ----------------------------------------------------------------- */

/* The reference model never changes, so its log-probabilities of a data set are computed once and
   kept: "key" says what they were computed from, "logp" [branches] what they are. */

DPO_API int dpo_reference_save(dpo_context *context, const char *path, const dpo_reference_key *key,
                               const double *logp, size_t n)
{
    dpo_entry entries[] = { dpoi_vector("key", DPO_U64, key, sizeof *key / 8),
                            dpoi_vector("logp", DPO_F64, logp, n) };
    return dpo_file_write(context, path, DPO_FILE_REFERENCE, entries, 2);
}

DPO_API int dpo_reference_load(dpo_context *context, const char *path, const dpo_reference_key *key,
                               double *logp, size_t n)
{
    dpo_file file;
    if (dpo_file_open(context, &file, path, DPO_FILE_REFERENCE, 1)) return 1;
    const dpo_entry *entry = dpo_file_find(&file, "key"), *values = dpo_file_find(&file, "logp");
    const dpo_reference_key *made = entry && entry->dtype == DPO_U64 &&
                                    entry->bytes == sizeof *made ? entry->data : NULL;
    const char *wrong = !made || !values || values->dtype != DPO_F64 || values->n_dims != 1
                      ? "another version of this program"
                      : made->model != key->model ? "another reference model"
                      : made->adapter != key->adapter ? "another adapter of that model"
                      : made->dtype != key->dtype ? "another precision (--dtype)"
                      : made->truncation != key->truncation ? "another truncation "
                        "(--max-length, --max-prompt-length, --truncation)"
                      : made->data != key->data ? "other data (--data, --limit, --eval-data, "
                        "--eval-examples)"
                      : values->shape[0] != n ? "another number of answers" : NULL;
    if (wrong)
        dpoi_fail(context, "%s: was made for %s", path, wrong);
    else
        memcpy(logp, values->data, values->bytes);
    dpo_file_close(context, &file);
    return wrong != NULL;
}

/* ---- 8.7 the state of a training run --------------------------------------------------------- */

/* A state file holds every trainable tensor (its master if it has one), the optimizer's averages,
   "run" (which run it belongs to), "counters" (updates, passes) and "notes" (the program's own).
   Random numbers need no state: they depend on seed, counters and position alone. */

/* The entries of a state, whose data is written from, or read into, where it lies. The array has
   room for the last one, the notes. NULL, with a message, if there is no memory. */
static dpo_entry *dpoi_state_entries(const dpo_model *model, const dpo_optimizer *optimizer,
                                     const uint64_t numbers[3] /* run, counters */,
                                     size_t *n_entries)
{
    const size_t most = model->n_tensors + 5; // averages, run, counters, notes
    dpo_entry *entries;
    size_t n = 0;
    if (dpoi_alloc(model->context, &entries, most, sizeof *entries)) return NULL;
    for (size_t i = 0; i < model->n_tensors; i++) {
        const dpo_tensor *tensor = &model->tensors[i];
        if (!tensor->trainable) continue;
        entries[n++] = tensor->master ? dpoi_tensor_entry(tensor, DPO_F32, tensor->master)
                                      : dpoi_tensor_entry(tensor, tensor->dtype, tensor->data);
    }
    entries[n++] = dpoi_vector("optimizer/v", DPO_F32, optimizer->v, model->n_trainable);
    if (optimizer->m)
        entries[n++] = dpoi_vector("optimizer/m", DPO_F32, optimizer->m, model->n_trainable);
    entries[n++] = dpoi_vector("run", DPO_U64, numbers, 1);
    entries[n++] = dpoi_vector("counters", DPO_U64, numbers + 1, 2);
    *n_entries = n;
    return entries;
}

DPO_API int dpo_state_save(dpo_model *model, const dpo_optimizer *optimizer, const char *path,
                           uint64_t run, const void *notes, size_t n_notes)
{
    const uint64_t numbers[] = { run, optimizer->step, model->passes };
    size_t n;
    if (!optimizer->v)
        return dpoi_fail(model->context, "%s: dpo_state_save needs dpo_optimizer_init", path);
    dpo_entry *entries = dpoi_state_entries(model, optimizer, numbers, &n);
    if (!entries) return 1;
    entries[n++] = dpoi_vector("notes", DPO_U8, notes, n_notes);
    int failed = dpo_file_write(model->context, path, DPO_FILE_STATE, entries, n);
    dpoi_free(model->context, entries);
    return failed;
}

/* A state must have the entries that would be written now, all of them and in that order. */
static int dpoi_state_check(dpo_context *context, const dpo_file *file, const dpo_entry *entries,
                            size_t n, uint64_t run)
{
    for (size_t i = 0; i <= n + 1; i++) {
        const char *name = i < n ? entries[i].name : i == n ? "notes" : "the end";
        const char *found = i < file->n_entries ? file->entries[i].name : "the end";
        if (strcmp(found, name) || (i < n && (file->entries[i].dtype != entries[i].dtype ||
                                              file->entries[i].bytes != entries[i].bytes)))
            return dpoi_fail(context, "%s stands where %s is expected, or has another size or "
                             "type: the state belongs to a run with other options", found, name);
    }
    return !memcmp(file->entries[n - 2].data, &run, sizeof run) ? 0
         : dpoi_fail(context, "belongs to another run than the config.json beside it");
}

DPO_API int dpo_state_load(dpo_model *model, dpo_optimizer *optimizer, const char *path,
                           uint64_t run, dpo_string *notes)
{
    dpo_context *context = model->context;
    dpo_file file;
    uint64_t numbers[3];
    size_t n = 0;
    if (!optimizer->v)
        return dpoi_fail(context, "%s: dpo_state_load needs dpo_optimizer_init", path);
    if (dpo_file_open(context, &file, path, DPO_FILE_STATE, 1)) return 1;
    dpo_entry *entries = dpoi_state_entries(model, optimizer, numbers, &n);
    // Everything is checked before anything is changed.
    int failed = !entries ||
                 (dpoi_state_check(context, &file, entries, n, run) &&
                  dpoi_fail_at(context, path)) ||
                 dpoi_string_append(context, notes, file.entries[n].data, file.entries[n].bytes);
    for (size_t i = 0; i < n && !failed; i++)
        dpoi_entry_copy((void *)(uintptr_t)entries[i].data, &file.entries[i]);
    for (size_t i = 0; i < model->n_tensors && !failed; i++)
        if (model->tensors[i].master)
            dpoi_narrow(model->tensors[i].data, DPO_BF16, model->tensors[i].master,
                        model->tensors[i].n);
    if (!failed) {
        optimizer->step = numbers[1];
        model->passes = numbers[2];
    }
    dpoi_free(context, entries);
    dpo_file_close(context, &file);
    return failed;
}

/* ================================================================================================
   9. TEXT

   From files of text to examples of tokens: UTF-8 (9.1); the tokenizer, from text to ids and back
   (9.2 to 9.4); JSON and JSON lines (9.5, 9.6); and the rules that make prompts and branches of
   records (9.7). Text is bytes with a length: it may hold NUL. Every message names the byte, line
   or file.
   ============================================================================================= */

/* ---- 9.1 UTF-8 ------------------------------------------------------------------------------- */

#define DPOI_NONE UINT32_MAX    // no code point, no token, no merge, no neighbour

/* Reads the character that text[0 .. n), n > 0, starts with: returns its code point, and sets
   *length to its number of bytes. Without a valid one, returns DPOI_NONE and the length of the
   longest prefix of a valid one (at least 1), which Unicode advises to show as one U+FFFD. */
static uint32_t dpoi_utf8_read(const char *text, size_t n, size_t *length)
{
    const unsigned char *bytes = (const unsigned char *)text;
    uint32_t lead = bytes[0];
    *length = 1;
    if (lead < 0x80) return lead;
    if (lead < 0xC2 || lead > 0xF4) return DPOI_NONE;
    size_t wanted = lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
    uint32_t code = lead & (0x7Fu >> wanted);
    // The second byte's limits exclude overlong forms, surrogates, and what is above U+10FFFF.
    uint32_t low = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
    uint32_t high = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
    while (*length < wanted) {
        if (*length == n || bytes[*length] < low || bytes[*length] > high) return DPOI_NONE;
        code = code << 6 | (bytes[(*length)++] & 0x3Fu);
        low = 0x80;
        high = 0xBF;
    }
    return code;
}

/* Writes a character, and returns how many of the 4 bytes it takes. */
static size_t dpoi_utf8_write(char *bytes, uint32_t code)
{
    size_t n = code < 0x80 ? 1 : code < 0x800 ? 2 : code < 0x10000 ? 3 : 4;
    for (size_t i = n - 1; i > 0; i--, code >>= 6) bytes[i] = (char)(0x80 | (code & 0x3F));
    bytes[0] = (char)(n == 1 ? code : (0xF00u >> n & 0xFF) | code);
    return n;
}

static int dpoi_utf8_append(dpo_context *context, dpo_string *out, uint32_t code)
{
    char bytes[4];
    return dpoi_string_append(context, out, bytes, dpoi_utf8_write(bytes, code));
}

/* The index of the first byte that is not valid UTF-8; n if there is none. */
static size_t dpoi_utf8_check(const char *text, size_t n)
{
    size_t length;
    for (size_t i = 0; i < n; i += length)
        if (dpoi_utf8_read(text + i, n - i, &length) == DPOI_NONE) return i;
    return n;
}

DPO_API int dpo_string_make_valid(dpo_context *context, dpo_string *string)
{
    dpo_string valid = { 0 };
    size_t length;
    int failed = 0;
    for (size_t i = 0; i < string->n && !failed; i += length) {
        uint32_t code = dpoi_utf8_read(string->bytes + i, string->n - i, &length);
        failed = dpoi_utf8_append(context, &valid, code == DPOI_NONE ? 0xFFFD : code);
    }
    dpo_string_free(context, failed ? &valid : string);
    if (!failed) *string = valid;
    return failed;
}

/* ---- 9.2 tokenizer: tables ------------------------------------------------------------------- */

/* Byte-pair encoding (Sennrich et al. 2016) over bytes has a token for every byte, and a list of
   merges: pairs of tokens that may become one, the most frequent in training first. Encoding starts
   from the text's bytes and, as long as any merge applies, carries out the one that stands first in
   the list. Three rules of GPT-2 and GPT-NeoX surround this core and must be met exactly, or a
   model sees tokens it never saw in training: text is normalised (9.3), added tokens such as
   <|endoftext|> are cut out, and what is left is cut into words that merges do not cross (9.4).

   All tables come with the model file, Unicode's too, so results do not depend on the machine. A
   row of a table is found by binary search, a merge through a hash table built here. */

enum { DPOI_ADDED_SPECIAL = 1, DPOI_ADDED_NORMALIZED = 2 };    // flags in tokenizer->added
#define DPOI_DAMAGED "%s is missing or damaged: import the model again"

/* The last row whose first two numbers are at most (a, b), compared in this order, or NULL. Rows
   ascend. */
static const uint32_t *dpoi_row(const dpo_table *table, uint32_t a, uint32_t b)
{
    size_t low = 0, n = table->n;   // rows before low are at most (a, b), those from n on greater
    while (low < n) {
        size_t middle = low + (n - low) / 2;
        const uint32_t *row = table->rows + middle * table->width;
        if (row[0] < a || (row[0] == a && row[1] <= b)) low = middle + 1;
        else n = middle;
    }
    return low ? table->rows + (low - 1) * table->width : NULL;
}

/* The slot of a pair of tokens in the hash table: merge_slots holds the rank of their merge, which
   is its row in merges, or DPOI_NONE if they do not merge. */
static size_t dpoi_merge_slot(const dpo_tokenizer *t, uint32_t left, uint32_t right)
{
    size_t mask = t->n_merge_slots - 1;
    size_t slot = dpoi_scatter((uint64_t)left << 32 | right) & mask;
    for (;; slot = (slot + 1) & mask) {
        uint32_t rank = t->merge_slots[slot];
        if (rank == DPOI_NONE) return slot;
        const uint32_t *merge = t->merges.rows + 3 * (size_t)rank;
        if (merge[0] == left && merge[1] == right) return slot;
    }
}

/* A view of bytes that are owned elsewhere. */
typedef struct dpoi_text { const char *bytes; size_t n; } dpoi_text;

/* A token's bytes. Embeddings are padded to round sizes, so a model can produce ids that its
   tokenizer does not have; they have no text. */
static dpoi_text dpoi_token_text(const dpo_tokenizer *t, uint32_t id)
{
    if (id >= t->n_tokens) return (dpoi_text){ "", 0 };
    const uint32_t *ends = t->token_ends.rows;
    size_t start = id ? ends[id - 1] : 0;
    return (dpoi_text){ t->token_bytes + start, ends[id] - start };
}

/* Whether a merged token's bytes are those of its two parts. */
static int dpoi_merge_fits(const dpo_tokenizer *t, const uint32_t *merge)
{
    dpoi_text left = dpoi_token_text(t, merge[0]), right = dpoi_token_text(t, merge[1]);
    dpoi_text merged = dpoi_token_text(t, merge[2]);
    return left.n && right.n && merged.n == left.n + right.n &&
           !memcmp(merged.bytes, left.bytes, left.n) &&
           !memcmp(merged.bytes + left.n, right.bytes, right.n);
}

/* Checks everything that encoding and decoding rely on, so that they need no checks. A merge that
   is listed twice has its last rank, as in `tokenizers`. */
static int dpoi_tokenizer_read(dpo_context *context, dpo_tokenizer *t, const dpo_file *file,
                               const dpo_json *info)
{
    const dpo_json_value *flag = dpo_json_member(info, info->values, "nfc");
    if (!flag || flag->kind != DPO_JSON_BOOL)
        return dpoi_fail(context, DPOI_DAMAGED, "tokenizer/info");
    t->nfc = flag->number != 0;
    const size_t merges = dpo_file_find(file, "tokenizer/merges") != NULL, nfc = (size_t)t->nfc;
    const struct {
        const char *name;
        dpo_table *table;
        size_t width, least;        // columns; fewest rows allowed
        int ascending;
    } tables[] = {
        { "tokenizer/token_ends", &t->token_ends, 1, 1, 1 },
        { "tokenizer/byte_ids", &t->byte_ids, 1, 256, 0 },
        { "tokenizer/merges", &t->merges, 3, 0, 0 },
        { "tokenizer/added", &t->added, 2, 0, 0 },
        { "tokenizer/letters", &t->letters, 2, merges, 1 },
        { "tokenizer/numbers", &t->numbers, 2, merges, 1 },
        { "tokenizer/decompositions", &t->decompositions, 3, nfc, 1 },
        { "tokenizer/compositions", &t->compositions, 3, nfc, 1 },
        { "tokenizer/classes", &t->classes, 2, nfc, 1 } };
    for (size_t i = 0; i < sizeof tables / sizeof *tables; i++) {
        const dpo_entry *entry = dpo_file_find(file, tables[i].name);
        const size_t w = tables[i].width, n = entry ? entry->shape[0] : 0;
        const uint32_t *row = entry ? entry->data : NULL;
        *tables[i].table = (dpo_table){ row, n, w };
        int bad = n < tables[i].least || n >= DPOI_NONE ||
                  (entry && (entry->dtype != DPO_U32 || entry->shape[1] != w));
        for (size_t j = 1; tables[i].ascending && !bad && j < n; j++, row += w)
            bad = row[0] > row[w] || (w > 1 && row[0] == row[w] && row[1] > row[w + 1]);
        if (bad) return dpoi_fail(context, DPOI_DAMAGED, tables[i].name);
    }
    const dpo_entry *bytes = dpo_file_find(file, "tokenizer/token_bytes");
    t->n_tokens = t->token_ends.n;
    if (!bytes || t->token_ends.rows[t->n_tokens - 1] != bytes->bytes)
        return dpoi_fail(context, DPOI_DAMAGED, "tokenizer/token_ends or token_bytes");
    t->token_bytes = bytes->data;
    const char *wrong = NULL;
    for (uint32_t i = 0; i < 256; i++) {
        dpoi_text byte = dpoi_token_text(t, t->byte_ids.rows[i]);
        if (t->byte_ids.rows[i] != DPOI_NONE && (byte.n != 1 || (unsigned char)*byte.bytes != i))
            wrong = "tokenizer/byte_ids";
    }
    for (size_t i = 0; i < t->added.n; i++) {
        const uint32_t *added = t->added.rows + 2 * i;
        const int stage = (added[1] & DPOI_ADDED_NORMALIZED) != 0;
        dpoi_text token = dpoi_token_text(t, added[0]);
        if (token.n) t->starts_added[stage][(unsigned char)*token.bytes] = 1;
        else wrong = "tokenizer/added";
    }
    for (size_t i = 0; i < t->merges.n; i++)
        if (!dpoi_merge_fits(t, t->merges.rows + 3 * i)) wrong = "tokenizer/merges";
    if (wrong) return dpoi_fail(context, DPOI_DAMAGED, wrong);

    for (t->n_merge_slots = 1; t->n_merge_slots / 2 < t->merges.n;) t->n_merge_slots *= 2;
    if (dpoi_alloc(context, &t->merge_slots, t->n_merge_slots, sizeof *t->merge_slots)) return 1;
    memset(t->merge_slots, 0xFF, t->n_merge_slots * sizeof *t->merge_slots);
    const uint32_t *merge = t->merges.rows;
    for (uint32_t rank = 0; rank < t->merges.n; rank++, merge += 3)
        t->merge_slots[dpoi_merge_slot(t, merge[0], merge[1])] = rank;
    return 0;
}

DPO_API int dpo_tokenizer_load(dpo_context *context, dpo_tokenizer *tokenizer, const dpo_file *file)
{
    *tokenizer = (dpo_tokenizer){ 0 };
    if (!file) file = &dpoi_byte_file;
    const dpo_entry *info = dpo_file_find(file, "tokenizer/info");
    if (!info) return 0;
    dpo_json json = { 0 };
    int failed = dpo_json_parse(context, &json, info->data, info->bytes, info->name) ||
                 dpoi_tokenizer_read(context, tokenizer, file, &json);
    dpo_json_free(context, &json);
    if (failed) dpo_tokenizer_free(context, tokenizer);
    return failed;
}

DPO_API void dpo_tokenizer_free(dpo_context *context, dpo_tokenizer *tokenizer)
{
    dpoi_free(context, tokenizer->merge_slots);
    *tokenizer = (dpo_tokenizer){ 0 };
}

/* ---- 9.3 tokenizer: normalisation ------------------------------------------------------------ */

/* Many characters can be written in two ways: an accented e as U+00E9, or as e and U+0301, an
   accent that joins the letter before it. Normalisation form C (NFC) prefers the single character
   (Unicode Standard Annex 15):

       decompose   each character into letter and marks, again and again
       reorder     the marks of a letter by combining class, those of one class staying in order
       compose     letter and mark into one character where one exists, unless a mark of the same
                   or a higher class stands between them

   Letters and other starters have class 0. Hangul syllables compose by arithmetic, and need not be
   decomposed first: whole or in pieces, they compose to the same. Nothing below U+0300 joins what
   stands before it, so text is handled in runs that begin at such a character, and text that has
   no others is in NFC already. */

#define DPOI_FIRST_MARK 0x300

/* A pair of numbers, sorted by the first, then by the second. */
typedef struct dpoi_key { uint64_t first, second; } dpoi_key;

static int dpoi_compare_keys(const void *a, const void *b)
{
    const dpoi_key *x = a, *y = b;
    if (x->first != y->first) return x->first < y->first ? -1 : 1;
    return (x->second > y->second) - (x->second < y->second);
}

typedef struct dpoi_encoder {
    dpo_context *context;
    const dpo_tokenizer *tokenizer;
    dpo_tokens *out;
    dpo_string normal;                                          // normalised text
    dpoi_key *run; size_t n_run, run_capacity;  // starter << 32 | class, place << 32 | code point
    struct dpoi_symbol *symbols; size_t symbol_capacity;        // of a word, see dpoi_encode_word
    uint64_t *tree; size_t tree_capacity;
} dpoi_encoder;

/* Appends a character's full decomposition to the run. Real tables are 3 steps deep; the limit of 8
   is for damaged ones, which could go in circles. */
static int dpoi_decompose(dpoi_encoder *e, uint32_t code, int depth)
{
    const dpo_tokenizer *t = e->tokenizer;
    const uint32_t *row = code < 0xC0 || depth == 8 ? NULL
                        : dpoi_row(&t->decompositions, code, UINT32_MAX);
    if (row && row[0] == code)
        return dpoi_decompose(e, row[1], depth + 1) ||
               (row[2] && dpoi_decompose(e, row[2], depth + 1));
    row = code < DPOI_FIRST_MARK ? NULL : dpoi_row(&t->classes, code, UINT32_MAX);
    const uint64_t class = row && row[0] == code ? row[1] : 0, place = e->n_run;
    if (dpoi_reserve(e->context, &e->run, &e->run_capacity, e->n_run + 1, sizeof *e->run)) return 1;
    uint64_t starter = class && place ? e->run[place - 1].first >> 32 : place;
    e->run[e->n_run++] = (dpoi_key){ starter << 32 | class, place << 32 | code };
    return 0;
}

/* The character that two compose to, or DPOI_NONE. */
static uint32_t dpoi_compose(const dpo_tokenizer *t, uint32_t first, uint32_t second)
{
    if (first - 0x1100 < 19 && second - 0x1161 < 21)
        return 0xAC00 + ((first - 0x1100) * 21 + second - 0x1161) * 28;
    if (first - 0xAC00 < 11172 && (first - 0xAC00) % 28 == 0 && second - 0x11A8 < 27)
        return first + second - 0x11A7;
    const uint32_t *row = dpoi_row(&t->compositions, first, second);
    return row && row[0] == first && row[1] == second ? row[2] : DPOI_NONE;
}

/* Reorders and composes the run, and appends it to the normalised text. */
static int dpoi_flush_run(dpoi_encoder *e)
{
    dpoi_key *run = e->run, *starter = NULL;
    size_t n_kept = 0;
    int unsorted = 0;
    for (size_t i = 1; i < e->n_run; i++) unsorted |= run[i].first < run[i - 1].first;
    if (unsorted) qsort(run, e->n_run, sizeof *run, dpoi_compare_keys);
    int64_t last_class = -1;    // of what was kept after the starter; -1: nothing
    for (size_t i = 0; i < e->n_run; i++) {
        int64_t class = (uint32_t)run[i].first;
        uint32_t code = (uint32_t)run[i].second, composed = DPOI_NONE;
        if (starter && last_class < class)
            composed = dpoi_compose(e->tokenizer, (uint32_t)starter->second, code);
        if (composed != DPOI_NONE) {
            starter->second = composed;
            continue;
        }
        if (!class) starter = &run[n_kept];
        last_class = class ? class : -1;
        run[n_kept++].second = code;
    }
    e->n_run = 0;
    for (size_t i = 0; i < n_kept; i++)
        if (dpoi_utf8_append(e->context, &e->normal, (uint32_t)run[i].second)) return 1;
    return 0;
}

/* Replaces text by its NFC, which lies in e->normal, unless it certainly is in NFC already. */
static int dpoi_normalise(dpoi_encoder *e, dpoi_text *text)
{
    int above = 0;
    size_t length;
    for (size_t i = 0; i < text->n; i++) above |= (unsigned char)text->bytes[i] >= 0xCC;  // U+0300
    if (!above) return 0;
    e->normal.n = 0;
    for (size_t i = 0; i < text->n; i += length) {
        uint32_t code = dpoi_utf8_read(text->bytes + i, text->n - i, &length);
        if ((code < DPOI_FIRST_MARK && dpoi_flush_run(e)) || dpoi_decompose(e, code, 0)) return 1;
    }
    if (dpoi_flush_run(e)) return 1;
    *text = (dpoi_text){ e->normal.bytes, e->normal.n };
    return 0;
}

/* ---- 9.4 tokenizer: encode and decode -------------------------------------------------------- */

/* Encoding one text, outside in:

       added tokens not marked "normalized" are cut out of the raw text
       each gap between them is normalised
       added tokens marked "normalized" (GPT-NeoX's runs of spaces) are cut out of that
       each gap is cut into words: contractions, letters, digits, others, each with the one space
           before it, and white space
       each word's bytes become tokens and are merged

   Where added tokens overlap, the leftmost match wins, then the longest. No step sees across a
   cut: in GPT-NeoX's "a  b" the two spaces are one token and b has no space before it. */

/* The length of the longest added token of a stage that text begins with, or 0. */
static size_t dpoi_match_added(const dpo_tokenizer *t, uint32_t *id, dpoi_text text, int stage)
{
    size_t longest = 0;
    if (!text.n || !t->starts_added[stage][(unsigned char)*text.bytes]) return 0;
    for (size_t i = 0; i < t->added.n; i++) {
        const uint32_t *added = t->added.rows + 2 * i;
        dpoi_text token = dpoi_token_text(t, added[0]);
        if (!(added[1] & DPOI_ADDED_NORMALIZED) == !stage && token.n > longest &&
            token.n <= text.n && !memcmp(token.bytes, text.bytes, token.n)) {
            longest = token.n;
            *id = added[0];
        }
    }
    return longest;
}

typedef enum { DPOI_OTHER, DPOI_LETTER, DPOI_NUMBER, DPOI_SPACE } dpoi_class;

/* The class of the character that text begins with, and its length in bytes. Spaces are Unicode's
   White_Space, letters the general categories L*, numbers N*; everything else, marks included, is
   DPOI_OTHER. */
static dpoi_class dpoi_classify(const dpo_tokenizer *t, const char *text, size_t n, size_t *length)
{
    uint32_t code = dpoi_utf8_read(text, n, length);
    if (code < 128) {
        if ((code | 32) - 'a' < 26) return DPOI_LETTER;
        if (code - '0' < 10) return DPOI_NUMBER;
        return code == ' ' || code - '\t' < 5 ? DPOI_SPACE : DPOI_OTHER;
    }
    if (code == 0x85 || code == 0xA0 || code == 0x1680 || code - 0x2000 < 11 || code == 0x2028 ||
        code == 0x2029 || code == 0x202F || code == 0x205F || code == 0x3000)
        return DPOI_SPACE;
    const uint32_t *row = dpoi_row(&t->letters, code, UINT32_MAX);
    if (row && code <= row[1]) return DPOI_LETTER;
    row = dpoi_row(&t->numbers, code, UINT32_MAX);
    return row && code <= row[1] ? DPOI_NUMBER : DPOI_OTHER;
}

/* The length of the word that text begins with, as GPT-2's pattern cuts it:
       's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
   White space of two characters or more, if something follows, does not take its last one: if that
   is a space, it begins the next word, otherwise it is a word of its own. Without merges every byte
   becomes a token, wherever the text is cut. */
static size_t dpoi_word(const dpo_tokenizer *t, const char *text, size_t n)
{
    static const char endings[][3] = { "s", "t", "re", "ve", "m", "ll", "d" };
    if (!t->merges.n) return 1;
    for (size_t i = 0; text[0] == '\'' && i < sizeof endings / sizeof endings[0]; i++) {
        size_t n_ending = strlen(endings[i]);
        if (n_ending < n && !memcmp(text + 1, endings[i], n_ending)) return 1 + n_ending;
    }
    size_t length, last = 0, i = text[0] == ' ' && n > 1;
    dpoi_class class = dpoi_classify(t, text + i, n - i, &length);
    if (class == DPOI_SPACE) i = 0;
    for (; i < n && dpoi_classify(t, text + i, n - i, &length) == class; i += length) last = i;
    return class == DPOI_SPACE && i < n && last > 0 ? last : i;
}

/* The tokens of a word are a linked list over the places of its bytes; a merged token takes the
   left one's place. A tournament tree finds the next merge: leaf n + i holds the rank of the merge
   of the token at place i with the one after it, and the place; every node k above holds the lower
   of its children, 2k and 2k + 1. So node 1 is the merge with the lowest rank, the leftmost of
   several. A change updates only the path up from its leaf: n bytes cost O(n log n). */
typedef struct dpoi_symbol { uint32_t id, before, after; } dpoi_symbol;

/* Updates the tree after a change at place i of n; the sibling of node k is k ^ 1. */
static void dpoi_enter_merge(dpoi_encoder *e, uint32_t i, size_t n)
{
    const dpo_tokenizer *t = e->tokenizer;
    const dpoi_symbol *left = &e->symbols[i];
    uint32_t rank = DPOI_NONE;
    if (left->after != DPOI_NONE)
        rank = t->merge_slots[dpoi_merge_slot(t, left->id, e->symbols[left->after].id)];
    uint64_t winner = rank == DPOI_NONE ? UINT64_MAX : (uint64_t)rank << 32 | i;
    for (size_t node = n + i; node > 0 && e->tree[node] != winner; node /= 2) {
        e->tree[node] = winner;
        winner = DPOI_MIN(winner, e->tree[node ^ 1]);
    }
}

static int dpoi_encode_word(dpoi_encoder *e, const char *text, size_t n)
{
    const dpo_tokenizer *t = e->tokenizer;
    if (n >= DPOI_NONE)
        return dpoi_fail(e->context, "a word of %zu bytes is too long to encode", n);
    if (dpoi_reserve(e->context, &e->symbols, &e->symbol_capacity, n, sizeof *e->symbols) ||
        dpoi_reserve(e->context, &e->tree, &e->tree_capacity, 2 * n, sizeof *e->tree))
        return 1;
    dpoi_symbol *symbols = e->symbols;
    for (uint32_t i = 0; i < n; i++) {
        uint32_t byte = (unsigned char)text[i];
        symbols[i] = (dpoi_symbol){ t->byte_ids.rows[byte], i - 1, i + 1 < n ? i + 1 : DPOI_NONE };
        if (symbols[i].id == DPOI_NONE)
            return dpoi_fail(e->context, "the tokenizer has no token for byte 0x%02X", byte);
    }
    memset(e->tree, 0xFF, 2 * n * sizeof *e->tree);
    for (uint32_t i = 0; i < n; i++) dpoi_enter_merge(e, i, n);
    for (uint64_t best; (best = e->tree[1]) != UINT64_MAX;) {
        uint32_t place = (uint32_t)best, gone = symbols[place].after;
        dpoi_symbol *left = &symbols[place];
        left->id = t->merges.rows[3 * (best >> 32) + 2];
        left->after = symbols[gone].after;
        symbols[gone].after = DPOI_NONE;
        if (left->after != DPOI_NONE) symbols[left->after].before = place;
        if (left->before != DPOI_NONE) dpoi_enter_merge(e, left->before, n);
        dpoi_enter_merge(e, place, n);
        dpoi_enter_merge(e, gone, n);
    }
    for (uint32_t i = 0; i != DPOI_NONE; i = symbols[i].after)
        if (dpoi_tokens_append(e->context, e->out, symbols[i].id)) return 1;
    return 0;
}

/* Cuts the added tokens of a stage (0: raw text, 1: normalised text) out of text; the gaps between
   them go on to the next stage, or are cut into words. */
static int dpoi_encode_stage(dpoi_encoder *e, dpoi_text text, int stage)
{
    const dpo_tokenizer *t = e->tokenizer;
    size_t gap = 0, matched, n_word;    // a gap is text[gap .. i)
    for (size_t i = 0; i <= text.n; i += DPOI_MAX(matched, (size_t)1)) {
        uint32_t id;
        dpoi_text rest = { text.bytes + i, text.n - i }, inner = { text.bytes + gap, i - gap };
        matched = dpoi_match_added(t, &id, rest, stage);
        if (!matched && rest.n) continue;
        if (stage == 0 && ((t->nfc && dpoi_normalise(e, &inner)) || dpoi_encode_stage(e, inner, 1)))
            return 1;
        for (size_t j = 0; stage == 1 && j < inner.n; j += n_word) {
            n_word = dpoi_word(t, inner.bytes + j, inner.n - j);
            if (dpoi_encode_word(e, inner.bytes + j, n_word)) return 1;
        }
        if (matched && dpoi_tokens_append(e->context, e->out, id)) return 1;
        gap = i + matched;
    }
    return 0;
}

DPO_API int dpo_tokenizer_encode(dpo_context *context, dpo_tokens *out,
                                 const dpo_tokenizer *tokenizer, const char *text, size_t n_bytes)
{
    if (!tokenizer->n_tokens)
        return dpoi_fail(context, "the model has no tokenizer: import it from a folder that holds "
                         "tokenizer.json, or vocab.json and merges.txt");
    size_t bad = dpoi_utf8_check(text, n_bytes), n_before = out->n;
    if (bad < n_bytes)
        return dpoi_fail(context, "byte %zu of the text is not UTF-8: save it as UTF-8", bad + 1);
    dpoi_encoder e = { .context = context, .tokenizer = tokenizer, .out = out };
    int failed = n_bytes && dpoi_encode_stage(&e, (dpoi_text){ text, n_bytes }, 0);
    if (failed) out->n = n_before;
    dpo_string_free(context, &e.normal);
    dpoi_free(context, e.run);
    dpoi_free(context, e.symbols);
    dpoi_free(context, e.tree);
    return failed;
}

DPO_API int dpo_tokenizer_decode(dpo_context *context, dpo_string *out,
                                 const dpo_tokenizer *tokenizer, const uint32_t *ids, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        dpoi_text token = dpoi_token_text(tokenizer, ids[i]);
        if (dpoi_string_append(context, out, token.bytes, token.n)) return 1;
    }
    return 0;
}

/* ---- 9.5 JSON -------------------------------------------------------------------------------- */

/* A strict parser of RFC 8259, by recursive descent over checked UTF-8: no comments, no trailing
   commas, no second value, no key twice in one object. Values lie in one array and refer to each
   other by index, because the array moves as it grows. The text is copied once, with a 0 behind it
   that no rule accepts, so nothing can run over the end; strings are unescaped in place, as no
   escape is shorter than what it stands for. */

#define DPOI_JSON_DEPTH 64
#define DPOI_JSON_KEYS 1000     // in one object: bounds the linear search for duplicates

typedef struct dpoi_parser {
    dpo_context *context;
    dpo_json *json;
    const char *where;
    char *at;                   // in json->text
} dpoi_parser;

static int dpoi_json_fail(const dpoi_parser *p, const char *what)
{
    return dpoi_fail(p->context, "%s: byte %zu: %s", p->where,
                     (size_t)(p->at - p->json->text.bytes) + 1, what);
}

/* Skips white space, then the character c if it follows; returns whether it did. */
static int dpoi_json_take(dpoi_parser *p, char c)
{
    p->at += strspn(p->at, " \t\r\n");
    if (*p->at != c) return 0;
    p->at++;
    return 1;
}

static int dpoi_json_number(dpoi_parser *p, double *number)
{
    static const char digits[] = "0123456789";
    char *start = p->at, *end = start + (*start == '-'), *read;
    size_t n = *end == '0' ? 1 : strspn(end, digits);       // digits where at least one must be
    end += n;
    if (n && *end == '.') end += 1 + (n = strspn(end + 1, digits));
    if (n && (*end == 'e' || *end == 'E')) {
        end += end[1] == '+' || end[1] == '-' ? 2 : 1;
        end += n = strspn(end, digits);
    }
    p->at = end;
    if (!n) return dpoi_json_fail(p, "a digit is expected here");
    // strtod expects the locale's decimal point, and must not see what follows the number.
    char after = *end, *point = memchr(start, '.', (size_t)(end - start));
    if (point) *point = *localeconv()->decimal_point;
    *end = 0;
    *number = strtod(start, &read);
    *end = after;
    return read == end && isfinite(*number) ? 0 :
           dpoi_json_fail(p, "the number before here cannot be represented");
}

/* The value of the four hexadecimal digits at `at`, or DPOI_NONE. */
static uint32_t dpoi_json_hex(const char *at)
{
    char digits[5] = { 0 };
    if (strspn(at, "0123456789abcdefABCDEF") < 4) return DPOI_NONE;
    memcpy(digits, at, 4);
    return (uint32_t)strtoul(digits, NULL, 16);
}

/* Appends what the escape at p->at, behind its backslash, stands for. A surrogate without its other
   half becomes U+FFFD. */
static int dpoi_json_escape(dpoi_parser *p, char **out)
{
    static const char names[] = "\"\\/bfnrt", meanings[] = "\"\\/\b\f\n\r\t";
    const char *name = memchr(names, *p->at, sizeof names - 1);
    if (name) {
        *(*out)++ = meanings[name - names];
        p->at++;
        return 0;
    }
    if (*p->at != 'u') return dpoi_json_fail(p, "no such escape; write a backslash as \\\\");
    uint32_t code = dpoi_json_hex(p->at + 1), low;
    if (code == DPOI_NONE) return dpoi_json_fail(p, "\\u wants four hexadecimal digits");
    p->at += 5;
    if (code - 0xD800 < 0x400 && p->at[0] == '\\' && p->at[1] == 'u' &&
        (low = dpoi_json_hex(p->at + 2) - 0xDC00) < 0x400) {
        code = 0x10000 + ((code - 0xD800) << 10) + low;
        p->at += 6;
    }
    *out += dpoi_utf8_write(*out, code - 0xD800 < 0x800 ? 0xFFFD : code);
    return 0;
}

/* Unescapes a string and puts a 0 behind it (a key therefore counts only up to its first 0). */
static int dpoi_json_string(dpoi_parser *p, size_t *start, size_t *n)
{
    const dpo_string *text = &p->json->text;
    if (!dpoi_json_take(p, '"')) return dpoi_json_fail(p, "a string in double quotes is expected");
    char *first = p->at, *out = first;
    while (*p->at != '"') {
        if ((unsigned char)*p->at < 0x20)
            return dpoi_json_fail(p, p->at == text->bytes + text->n ?
                "the text ends inside a string" : "a raw control character; write it as \\u00XX");
        char c = *p->at++;
        if (c != '\\') *out++ = c;
        else if (dpoi_json_escape(p, &out)) return 1;
    }
    p->at++;
    *out = 0;
    *start = (size_t)(first - text->bytes);
    *n = (size_t)(out - first);
    return 0;
}

static int dpoi_json_scalar(dpoi_parser *p, dpo_json_value *value)
{
    const char c = *p->at, *word = c == 't' ? "true" : c == 'f' ? "false" : "null";
    value->kind = c == '"' ? DPO_JSON_STRING : DPO_JSON_NUMBER;
    if (c == '"') return dpoi_json_string(p, &value->string, &value->n_string);
    if (c == '-' || (c >= '0' && c <= '9')) return dpoi_json_number(p, &value->number);
    if (strncmp(p->at, word, strlen(word)))
        return dpoi_json_fail(p, c ? "a value is expected here" : "the text ends too early");
    p->at += strlen(word);
    value->kind = c == 'n' ? DPO_JSON_NULL : DPO_JSON_BOOL;
    value->number = c == 't';
    return 0;
}

static int dpoi_json_value(dpoi_parser *p, int depth)
{
    dpo_json *json = p->json;
    const size_t self = json->n_values++;
    if (dpoi_reserve(p->context, &json->values, &json->capacity, self + 1, sizeof *json->values))
        return 1;
    json->values[self] = (dpo_json_value){ .kind = DPO_JSON_ARRAY };
    char close = dpoi_json_take(p, '{') ? '}' : dpoi_json_take(p, '[') ? ']' : 0;
    if (!close) return dpoi_json_scalar(p, &json->values[self]);
    if (close == '}') json->values[self].kind = DPO_JSON_OBJECT;
    if (depth == DPOI_JSON_DEPTH) return dpoi_json_fail(p, "nested more than 64 levels deep");
    if (dpoi_json_take(p, close)) return 0;
    size_t child, last = 0, n_keys = 0;
    do {
        size_t key = 0, n_key;
        if (close == '}') {
            if (dpoi_json_string(p, &key, &n_key)) return 1;
            if (dpo_json_member(json, &json->values[self], json->text.bytes + key))
                return dpoi_json_fail(p, "the key before here comes twice in its object");
            if (n_keys++ == DPOI_JSON_KEYS)
                return dpoi_json_fail(p, "more than 1000 keys in one object");
            if (!dpoi_json_take(p, ':')) return dpoi_json_fail(p, "a ':' is expected here");
        }
        child = json->n_values;
        if (dpoi_json_value(p, depth + 1)) return 1;
        json->values[child].key = key;
        *(last ? &json->values[last].next : &json->values[self].first_child) = child;
        last = child;
    } while (dpoi_json_take(p, ','));
    if (dpoi_json_take(p, close)) return 0;
    return dpoi_json_fail(p, "a ',' or the end of the object or array is expected here");
}

DPO_API int dpo_json_parse(dpo_context *context, dpo_json *json, const char *text, size_t n_bytes,
                           const char *where)
{
    json->n_values = json->text.n = 0;
    if (dpoi_string_append(context, &json->text, text, n_bytes) ||
        dpoi_string_append(context, &json->text, "", 1))
        return 1;
    json->text.n = n_bytes;
    dpoi_parser p = { context, json, where, json->text.bytes + dpoi_utf8_check(text, n_bytes) };
    char *end = json->text.bytes + n_bytes;
    if (p.at < end) return dpoi_json_fail(&p, "not UTF-8; save the file as UTF-8");
    p.at = json->text.bytes;
    if (dpoi_json_value(&p, 0)) return 1;
    dpoi_json_take(&p, 0);      // the one behind the text
    return p.at > end ? 0 : dpoi_json_fail(&p, "something follows the value");
}

DPO_API const dpo_json_value *dpo_json_member(const dpo_json *json, const dpo_json_value *object,
                                              const char *key)
{
    if (object->kind != DPO_JSON_OBJECT) return NULL;
    for (size_t i = object->first_child; i; i = json->values[i].next)
        if (!strcmp(json->text.bytes + json->values[i].key, key)) return &json->values[i];
    return NULL;
}

DPO_API void dpo_json_free(dpo_context *context, dpo_json *json)
{
    dpoi_free(context, json->values);
    dpo_string_free(context, &json->text);
    *json = (dpo_json){ 0 };
}

DPO_API int dpo_json_quote(dpo_context *context, dpo_string *out, const char *s, size_t n_bytes)
{
    if (dpoi_string_append(context, out, "\"", 1)) return 1;
    for (size_t i = 0; i < n_bytes; i++) {
        char escape[8] = { s[i] };
        int n = 1;
        if (s[i] == '"' || s[i] == '\\') n = snprintf(escape, sizeof escape, "\\%c", s[i]);
        else if ((unsigned char)s[i] < 0x20) n = snprintf(escape, sizeof escape, "\\u%04x", s[i]);
        if (dpoi_string_append(context, out, escape, (size_t)n)) return 1;
    }
    return dpoi_string_append(context, out, "\"", 1);
}

/* ---- 9.6 JSON lines -------------------------------------------------------------------------- */

/* One JSON object per line, of any length. Blank lines are skipped, and so is the byte order mark
   that some editors put at the start of a file. */

DPO_API int dpo_jsonl_open(dpo_context *context, dpo_jsonl *reader, const char *path)
{
    *reader = (dpo_jsonl){ .path = path, .stream = fopen(path, "rb") };
    if (reader->stream) return 0;
    return dpoi_fail(context, "%s: cannot be opened: %s", path, strerror(errno));
}

/* Reads up to the character `stop`, or with EOF to the end of the file, into the buffer. */
static int dpoi_jsonl_read(dpo_context *context, dpo_jsonl *reader, int stop, int *found)
{
    dpo_string *text = &reader->buffer;
    FILE *stream = reader->stream;
    int c;
    text->n = 0;
    while ((c = getc_unlocked(stream)) != EOF && c != stop) {
        const char byte = (char)c;
        if (dpoi_string_append(context, text, &byte, 1)) return 1;
    }
    if (ferror(stream))
        return dpoi_fail(context, "%s: cannot be read: %s", reader->path, strerror(errno));
    *found = text->n > 0 || c != EOF;
    if (reader->line == 0 && text->n >= 2 && !memcmp(text->bytes, "\x1F\x8B", 2))
        return dpoi_fail(context, "%s: is compressed; unpack it first, as by `gunzip -k %s`",
                         reader->path, reader->path);
    if (reader->line++ == 0 && text->n >= 3 && !memcmp(text->bytes, "\xEF\xBB\xBF", 3))
        memmove(text->bytes, text->bytes + 3, text->n -= 3);
    return 0;
}

/* The first character that is not white space, or EOF. */
static int dpoi_first_character(const dpo_string *text)
{
    for (size_t i = 0; i < text->n; i++)
        if (!memchr(" \t\r\n", text->bytes[i], 4)) return (unsigned char)text->bytes[i];
    return EOF;
}

DPO_API int dpo_jsonl_next(dpo_context *context, dpo_jsonl *reader, int *found)
{
    const dpo_string *line = &reader->buffer;
    do {
        if (dpoi_jsonl_read(context, reader, '\n', found)) return 1;
    } while (*found && dpoi_first_character(line) == EOF);
    if (!*found) return 0;
    snprintf(reader->where, sizeof reader->where, "%.480s:%zu", reader->path, reader->line);
    if (dpoi_first_character(line) == '{')
        return dpo_json_parse(context, &reader->json, line->bytes, line->n, reader->where);
    const unsigned char *start = (const unsigned char *)line->bytes;
    const int utf16 = line->n > 1 && start[0] + start[1] == 0xfe + 0xff;    // its byte order mark
    return dpoi_fail(context, "%s: %s", reader->where, utf16 ? "UTF-16; save the file as UTF-8"
                     : "an object {...} is expected on each line; convert other files with "
                       "`python3 convert.py data`");
}

DPO_API void dpo_jsonl_close(dpo_context *context, dpo_jsonl *reader)
{
    if (reader->stream) fclose(reader->stream);
    dpo_string_free(context, &reader->buffer);
    dpo_json_free(context, &reader->json);
    *reader = (dpo_jsonl){ 0 };
}

/* ---- 9.7 examples ---------------------------------------------------------------------------- */

/* From records to examples:

       split       transcripts at the last "\n\nAssistant:" of the chosen one: everything up to and
                   including it is the prompt of both
       tokenise    prompt and answers separately, and an end token after each answer
       group       examples whose whole prompts are equal: they are shuffled together, their
                   errors are not independent, and SFT takes the last chosen answer only
       cut         if prompt + longest answer > max_length, first the prompt to max_prompt_length,
                   keeping its end (or start), then each answer to what is left

   Text is the concatenation of documents, an end token after each, cut into windows of max_length
   scored tokens; neighbouring windows share one token, so that each token but the very first is
   predicted once. An example with an empty prompt is scored from its second token on.

   All tokens lie in one array, each example's together: the whole prompt, then the whole answers.
   While that array grows, and therefore moves, examples are drafts, which refer to it by index. */

typedef struct dpoi_draft {
    size_t start, n[3];         // index of its first token; numbers of tokens of prompt and answers
    size_t group, line;
} dpoi_draft;

/* The kinds of records, by the names of their fields: prompt, then answers or text. */
enum { DPOI_PAIR, DPOI_TRANSCRIPTS, DPOI_COMPLETION, DPOI_TEXT };
static const char *const dpoi_record_fields[][3] = { { "prompt", "chosen", "rejected" },
    { NULL, "chosen", "rejected" }, { "prompt", "completion", NULL }, { NULL, "text", NULL } };

typedef struct dpoi_loader {
    dpo_context *context;
    dpo_data *data;
    const dpo_tokenizer *tokenizer;
    const dpo_data_options *options;
    uint32_t end_token;
    size_t n_branches;          // of every example
    int kind;                   // of every record
    dpoi_draft *drafts; size_t draft_capacity;  // [data->n]
} dpoi_loader;

/* Sets *kind to the first kind, from *kind to last, all of whose fields the record has. */
static int dpoi_read_record(dpo_context *context, dpoi_text *fields, int *kind, int last,
                            const dpo_jsonl *reader)
{
    const dpo_json *json = &reader->json;
    for (; *kind <= last; ++*kind) {
        const char *const *names = dpoi_record_fields[*kind], *odd = NULL;
        size_t i;
        for (i = 0; i < 3; i++) {
            fields[i] = (dpoi_text){ NULL, 0 };
            if (!names[i]) continue;
            const dpo_json_value *value = dpo_json_member(json, json->values, names[i]);
            if (!value) break;
            if (value->kind != DPO_JSON_STRING) odd = names[i];
            fields[i] = (dpoi_text){ json->text.bytes + value->string, value->n_string };
        }
        if (i < 3) continue;
        if (!odd) return 0;
        return dpoi_fail(context, "%s: \"%s\" is not a string; convert lists of messages and "
                         "other forms with `python3 convert.py data`", reader->where, odd);
    }
    return dpoi_fail(context, "%s: a record of an unknown kind: preferences are read from "
                     "{\"prompt\",\"chosen\",\"rejected\"} or {\"chosen\",\"rejected\"}, SFT from "
                     "these, {\"prompt\",\"completion\"} or {\"text\"}, text is read from "
                     "{\"text\"}; convert other forms with `python3 convert.py data`",
                     reader->where);
}

/* Splits HH's transcripts into prompt and answers. Returns 1, or counts why not and returns 0. */
static int dpoi_split_transcripts(dpo_data_counts *counts, dpoi_text *fields)
{
    static const char turn[] = "\n\nAssistant:";
    size_t n_turn = sizeof turn - 1, n = fields[1].n;
    while (n >= n_turn && memcmp(fields[1].bytes + n - n_turn, turn, n_turn)) n--;
    if (n < n_turn) return ++counts->no_prompt, 0;
    if (fields[2].n < n || memcmp(fields[1].bytes, fields[2].bytes, n))
        return ++counts->prompts_differ, 0;
    fields[0] = (dpoi_text){ fields[1].bytes, n };
    for (size_t i = 1; i < 3; i++)
        fields[i] = (dpoi_text){ fields[i].bytes + n, fields[i].n - n };
    return 1;
}

/* Adds a record's tokens and its draft, or drops and counts it. A text gets no draft here (its
   windows will), and may spell the end token. */
static int dpoi_add_record(dpoi_loader *l, const dpoi_text *fields, size_t line)
{
    dpo_data_counts *counts = &l->data->counts;
    dpo_tokens *tokens = &l->data->tokens;
    dpoi_draft draft = { .start = tokens->n, .line = line };
    size_t n_ends = 0, empty = 0, text = l->kind == DPOI_TEXT;
    for (size_t i = 0; i <= l->n_branches; i++) {
        size_t before = tokens->n;
        if (dpo_tokenizer_encode(l->context, tokens, l->tokenizer, fields[i].bytes, fields[i].n) ||
            (i > 0 && dpoi_tokens_append(l->context, tokens, l->end_token)))
            return 1;
        draft.n[i] = tokens->n - before;
        empty += i > 0 && draft.n[i] == 1;
    }
    for (size_t i = draft.start; i < tokens->n; i++) n_ends += tokens->ids[i] == l->end_token;
    if (empty || (n_ends > l->n_branches && !text)) {
        ++*(empty ? &counts->empty_answers : &counts->end_token_inside);
        tokens->n = draft.start;
        return 0;
    }
    if (text) {
        const size_t spelled = (n_ends - 1) * dpoi_token_text(l->tokenizer, l->end_token).n;
        counts->bytes += fields[1].n - DPOI_MIN(spelled, fields[1].n);
        return 0;
    }
    if (dpoi_reserve(l->context, &l->drafts, &l->draft_capacity, l->data->n + 1, sizeof draft))
        return 1;
    l->drafts[l->data->n++] = draft;
    return 0;
}

/* Reads all records, or a file of plain text as one document. */
static int dpoi_load_records(dpoi_loader *l, dpo_jsonl *reader, int plain)
{
    dpo_data *data = l->data;
    const dpo_data_use use = l->options->use;
    const int first = plain || use == DPO_USE_TEXT ? DPOI_TEXT : DPOI_PAIR;
    const int last = use == DPO_USE_PAIRS ? DPOI_TRANSCRIPTS : DPOI_TEXT;
    const size_t limit = l->options->limit, length = l->options->max_length;
    l->kind = first;
    while (!limit || (l->kind == DPOI_TEXT ? data->tokens.n / length <= limit : data->n < limit)) {
        dpoi_text fields[3] = { { 0 } };
        int kind = first, found;
        if (plain ? dpoi_jsonl_read(l->context, reader, EOF, &found)
                  : dpo_jsonl_next(l->context, reader, &found)) return 1;
        if (!found) break;
        if (!plain && dpoi_read_record(l->context, fields, &kind, last, reader)) return 1;
        // Taken as plain text, JSON lines would be trained on as they are, brackets and all.
        if (plain && dpoi_first_character(&reader->buffer) == '{')
            return dpoi_fail(l->context, "%s: looks like JSON lines; give it a name that ends in "
                             ".jsonl (plain text that begins with { can be the {\"text\"} of one)",
                             reader->path);
        if (plain) fields[1] = (dpoi_text){ reader->buffer.bytes, reader->buffer.n };
        if (data->counts.records++ && kind != l->kind)
            return dpoi_fail(l->context, "%s: a record of another kind than those before: split "
                             "the file by kind", reader->where);
        l->kind = kind;
        if ((kind != DPOI_TRANSCRIPTS || dpoi_split_transcripts(&data->counts, fields)) &&
            dpoi_add_record(l, fields, reader->line))
            return dpoi_fail_at(l->context, plain ? reader->path : reader->where);
    }
    return 0;
}

/* Makes the drafts of text. If `limit` leaves tokens out, the bytes are counted anew, from the
   tokens that are read; they are then bytes of normalised text. */
static int dpoi_add_windows(dpoi_loader *l)
{
    dpo_data *data = l->data;
    const uint32_t *ids = data->tokens.ids;
    const size_t length = l->options->max_length, n_tokens = data->tokens.n;
    data->n = (n_tokens + length - 2) / length;     // the first token is not scored: round up n - 1
    if (l->options->limit) data->n = DPOI_MIN(data->n, l->options->limit);
    if (dpoi_alloc(l->context, &l->drafts, data->n, sizeof *l->drafts)) return 1;
    for (size_t i = 0; i < data->n; i++)
        l->drafts[i] = (dpoi_draft){ .start = i * length,
                                     .n = { 0, DPOI_MIN(length + 1, n_tokens - i * length) } };
    const size_t n_read = data->n * length + 1;     // a window's last token begins the next
    if (n_read >= n_tokens) return 0;
    data->counts.bytes = 0;
    for (size_t i = 0; i < n_read; i++)
        if (ids[i] != l->end_token)
            data->counts.bytes += dpoi_token_text(l->tokenizer, ids[i]).n;
    return 0;
}

/* Numbers the distinct prompts in the order of the file, by a hash table from 64-bit hashes to
   numbers; prompts of equal hash count as equal. SFT on pairs keeps one draft per prompt, in the
   place of its first, with the answer of its last. Drafts without a prompt are all distinct. */
static int dpoi_group_drafts(dpoi_loader *l)
{
    dpo_data *data = l->data;
    const uint32_t *ids = data->tokens.ids;
    const int once = l->options->use == DPO_USE_SFT && l->kind <= DPOI_TRANSCRIPTS;
    size_t n_slots = 1;
    dpoi_key *slots;            // hash, group + 1; or 0, 0
    while (n_slots < 2 * data->n) n_slots *= 2;
    if (dpoi_alloc_zeroed(l->context, &slots, n_slots, sizeof *slots)) return 1;
    for (size_t i = 0; i < data->n; i++) {
        dpoi_draft draft = l->drafts[i];
        uint64_t hash = draft.n[0] == 0 ? dpoi_scatter(i) :
            dpo_hash(DPO_HASH_START, ids + draft.start, draft.n[0] * sizeof *ids);
        size_t slot = hash & (n_slots - 1);
        while (slots[slot].second && slots[slot].first != hash) slot = (slot + 1) & (n_slots - 1);
        if (!slots[slot].second) slots[slot] = (dpoi_key){ hash, ++data->n_groups };
        draft.group = slots[slot].second - 1;
        l->drafts[once ? draft.group : i] = draft;
    }
    dpoi_free(l->context, slots);
    if (!once) return 0;
    data->counts.repeated_prompts = data->n - data->n_groups;
    data->n = data->n_groups;
    return 0;
}

/* Makes the examples from the drafts: cuts them, counts what was cut, and hashes the result. */
static int dpoi_finish_data(dpoi_loader *l, const char *path)
{
    dpo_data *data = l->data;
    dpo_data_counts *counts = &data->counts;
    const dpo_data_options *options = l->options;
    const size_t nb = l->n_branches, room = options->max_length + (l->kind == DPOI_TEXT);
    if (counts->records == 0) return dpoi_fail(l->context, "%s: no records in it", path);
    if (data->n == 0)
        return dpoi_fail(l->context, "%s: none of %zu records can be used: in %zu the prompts "
                         "differ, %zu have no \"\\n\\nAssistant:\", %zu an empty answer, %zu the "
                         "end token inside", path, counts->records, counts->prompts_differ,
                         counts->no_prompt, counts->empty_answers, counts->end_token_inside);
    if (dpoi_group_drafts(l) ||
        dpoi_alloc(l->context, &data->examples, data->n, sizeof *data->examples) ||
        dpoi_alloc(l->context, &data->branches, data->n * nb, sizeof *data->branches))
        return 1;
    uint64_t hash = dpo_hash(DPO_HASH_START, &data->n, sizeof data->n);
    for (size_t i = 0; i < data->n; i++) {
        const dpoi_draft *draft = &l->drafts[i];
        const uint32_t *tokens = data->tokens.ids + draft->start;
        dpo_branch *branches = data->branches + i * nb;
        size_t n = draft->n[0];
        if (n + DPOI_MAX(draft->n[1], draft->n[2]) > room)
            n = DPOI_MIN(n, options->max_prompt_length);
        data->examples[i] = (dpo_example){ .n_prompt = n, .branches = branches, .n_branches = nb,
            .prompt = tokens + (options->keep_start ? 0 : draft->n[0] - n),
            .group = draft->group, .line = draft->line };
        counts->cut_prompts += n < draft->n[0];
        size_t shape[] = { n, draft->group, nb };
        hash = dpo_hash(hash, shape, sizeof shape);
        hash = dpo_hash(hash, data->examples[i].prompt, n * sizeof *tokens);
        for (size_t b = 0; b < nb; b++) {
            size_t kept = DPOI_MIN(draft->n[b + 1], room - n);
            tokens += draft->n[b];
            branches[b] = (dpo_branch){ .tokens = tokens, .n = kept, .first_scored = n == 0 };
            counts->cut_answers += kept < draft->n[b + 1];
            hash = dpo_hash(hash, &kept, sizeof kept);
            hash = dpo_hash(hash, tokens, kept * sizeof *tokens);
        }
        counts->ties += nb == 2 && branches[0].n == branches[1].n &&
                        !memcmp(branches[0].tokens, branches[1].tokens,
                                branches[0].n * sizeof *tokens);
    }
    data->hash = hash;
    return 0;
}

DPO_API int dpo_data_load(dpo_context *context, dpo_data *data, const char *path,
                          const dpo_tokenizer *tokenizer, uint32_t end_token,
                          const dpo_data_options *options)
{
    const size_t length = options->max_length, prompt_length = options->max_prompt_length;
    *data = (dpo_data){ 0 };
    if (length < 2 || length > UINT32_MAX)
        return dpoi_fail(context, "max-length %zu: it must be 2 to %u", length, UINT32_MAX);
    if (options->use != DPO_USE_TEXT && prompt_length >= length)
        return dpoi_fail(context, "max-prompt-length %zu must be less than max-length %zu, or no "
                         "room is left for answers", prompt_length, length);
    if (end_token >= tokenizer->n_tokens)
        return dpoi_fail(context, "the end token %u is not among the tokenizer's %zu tokens: the "
                         "model needs a tokenizer, and eos_token_id in config.json", end_token,
                         tokenizer->n_tokens);
    dpoi_loader l = { .context = context, .data = data, .tokenizer = tokenizer, .options = options,
        .end_token = end_token, .n_branches = options->use == DPO_USE_PAIRS ? 2 : 1 };
    const char *dot = strrchr(path, '.');
    int is_jsonl = dot && (!strcasecmp(dot, ".jsonl") || !strcasecmp(dot, ".ndjson") ||
                           !strcasecmp(dot, ".json"));    // as many name JSON lines
    int plain = options->use != DPO_USE_PAIRS && !is_jsonl;
    dpo_jsonl reader;
    int failed = dpo_jsonl_open(context, &reader, path) ||
                 dpoi_load_records(&l, &reader, plain) ||
                 (l.kind == DPOI_TEXT && dpoi_add_windows(&l)) || dpoi_finish_data(&l, path);
    dpo_jsonl_close(context, &reader);
    dpoi_free(context, l.drafts);
    if (failed) dpo_data_free(context, data);
    return failed;
}

DPO_API void dpo_data_free(dpo_context *context, dpo_data *data)
{
    dpoi_free(context, data->examples);
    dpoi_free(context, data->branches);
    dpo_tokens_free(context, &data->tokens);
    *data = (dpo_data){ 0 };
}

/* Sorts the examples by a random number per group, those of a group in file order. */
DPO_API int dpo_data_shuffle(dpo_context *context, size_t *order, const dpo_data *data,
                             uint64_t seed)
{
    dpoi_key *keys;     // [n]
    if (dpoi_alloc(context, &keys, data->n, sizeof *keys)) return 1;
    for (size_t i = 0; i < data->n; i++)
        keys[i] = (dpoi_key){
            dpo_random_u64(seed, DPOI_STREAM_SHUFFLE, data->examples[i].group), i };
    qsort(keys, data->n, sizeof *keys, dpoi_compare_keys);
    for (size_t i = 0; i < data->n; i++) order[i] = (size_t)keys[i].second;
    dpoi_free(context, keys);
    return 0;
}

DPO_API size_t dpo_example_rows(const dpo_example *example)
{
    size_t rows = example->n_prompt;
    for (size_t b = 0; b < example->n_branches; b++) rows += example->branches[b].n - 1;
    return rows;
}

DPO_API size_t dpo_micro_batch(const dpo_example *examples, size_t n, size_t max_rows)
{
    size_t rows = 0, taken = 0;
    while (taken < n && (rows += dpo_example_rows(&examples[taken])) <= max_rows) taken++;
    return DPOI_MAX(taken, DPOI_MIN(n, (size_t)1));
}

/* ================================================================================================
   10. GENERATION

   A transformer writes one token at a time, and all that a new row needs of earlier ones is their
   keys and values. So these are kept, and a step costs one row: every weight is read and used once,
   so memory bandwidth limits generation, not arithmetic. The prompt goes through the batch path of
   part 6 in one pass; the steps have their own product, a row times a matrix, and may therefore
   differ from the batch path by rounding.
   ============================================================================================= */

/* ---- 10.1 the next token's logits ------------------------------------------------------------ */

static void dpoi_cache_free(dpo_context *context, dpoi_cache *cache)
{
    dpoi_free(context, cache->kv);
    dpoi_free(context, cache->scores);
    dpoi_free(context, cache->logits);
}

static int dpoi_cache_init(dpoi_cache *cache, const dpo_model *model, size_t capacity)
{
    dpo_context *context = model->context;
    const dpo_config *config = &model->config;
    *cache = (dpoi_cache){ .capacity = capacity };
    return dpoi_alloc(context, &cache->kv, config->n_layers * capacity,
                      2 * config->d_model * sizeof(float)) ||
           dpoi_alloc(context, &cache->scores, config->n_heads * capacity, sizeof(float)) ||
           dpoi_alloc(context, &cache->logits, config->vocab_size, sizeof(float));
}

/* Final norm and head of one row of the last block's output. */
static void dpoi_next_logits(dpo_model *model, dpoi_cache *cache, const float *x /* [C] */)
{
    const dpo_config *config = &model->config;
    const dpoi_weights *weights = model->weights;
    dpoi_workspace *w = model->workspace;
    dpoi_norm_forward(model->context, w->normed, w->stats, x, weights->norm_w->data,
                      weights->norm_b->data, (float)config->norm_epsilon, 1, config->d_model);
    dpoi_linear_row(model->context, cache->logits, w->normed, weights->head, NULL, 1, 0);
    for (size_t v = 0; v < config->vocab_size; v++) cache->logits[v] *= (float)config->logit_scale;
}

/* Takes all of the prompt in one pass; the cache is empty before. */
static int dpoi_prefill(dpo_model *model, dpoi_cache *cache, const uint32_t *tokens, size_t n)
{
    if (dpoi_lay_out_text(model, tokens, n)) return 1;
    const float *x = dpoi_blocks_forward(model, 0, cache);
    cache->n = n;
    dpoi_next_logits(model, cache, x + (n - 1) * model->config.d_model);
    return 0;
}

/* Takes one more token, as the only row of the workspace. */
static void dpoi_step(dpo_model *model, dpoi_cache *cache, uint32_t token)
{
    dpoi_workspace *w = model->workspace;
    w->R = 1;
    w->token[0] = token;
    w->position[0] = (uint32_t)cache->n;
    const float *x = dpoi_blocks_forward(model, 0, cache);
    cache->n++;
    dpoi_next_logits(model, cache, x);
}

/* ---- 10.2 choosing a token ------------------------------------------------------------------- */

typedef struct dpoi_choice { float p; uint32_t token; } dpoi_choice;

static int dpoi_by_probability(const void *a, const void *b)
{
    const dpoi_choice *x = a, *y = b;
    if (x->p != y->p) return x->p < y->p ? 1 : -1;
    return x->token < y->token ? -1 : x->token > y->token; // qsort is not stable
}

/* Greedy at temperature 0. Otherwise a sample from softmax(logits / temperature), restricted by
   top_k to the k most probable tokens, and by top_p (nucleus sampling, Holtzman et al. 2020) to the
   fewest of these that hold a share p of their probability. */
static uint32_t dpoi_choose(dpoi_choice *choices /* [V] scratch */, const float *logits, size_t V,
                            const dpo_sampling *sampling, uint64_t index)
{
    size_t best = 0;
    for (size_t v = 1; v < V; v++)
        if (logits[v] > logits[best]) best = v;
    if (sampling->temperature <= 0) return (uint32_t)best;
    double total = 0.0;
    for (size_t v = 0; v < V; v++) {
        float p = (float)exp((logits[v] - logits[best]) / sampling->temperature);
        choices[v] = (dpoi_choice){ p, (uint32_t)v };
        total += p;
    }
    size_t n = sampling->top_k ? DPOI_MIN(sampling->top_k, V) : V;
    if (n < V || sampling->top_p < 1) {
        qsort(choices, V, sizeof *choices, dpoi_by_probability);
        double mass = total = 0.0;
        for (size_t i = 0; i < n; i++) mass += choices[i].p;
        for (size_t i = 0; i < n; i++) {
            total += choices[i].p;
            if (total >= sampling->top_p * mass) n = i + 1;
        }
    }
    double point = dpo_random_uniform(sampling->seed, DPOI_STREAM_SAMPLING, index) * total;
    for (size_t i = 0; i < n; i++) {
        point -= choices[i].p;
        if (point < 0) return choices[i].token;
    }
    return choices[n - 1].token;
}

/* ---- 10.3 generating text -------------------------------------------------------------------- */

/* The index of the first stop string in text[from .. n), or n. What comes before *final cannot be
   part of one, whatever follows, and may be shown. */
static size_t dpoi_find_stop(const dpo_sampling *sampling, const char *text, size_t from, size_t n,
                             size_t *final)
{
    *final = n;
    for (size_t i = from; i < n; i++)
        for (size_t k = 0; k < sampling->n_stops; k++) {
            size_t length = strlen(sampling->stops[k]), rest = n - i;
            if (!length || memcmp(text + i, sampling->stops[k], DPOI_MIN(length, rest))) continue;
            if (length <= rest) return *final = i;
            *final = DPOI_MIN(*final, i);
        }
    return n;
}

DPO_API int dpo_generate(dpo_model *model, dpo_string *out, const uint32_t *prompt, size_t n_prompt,
                         const dpo_sampling *sampling,
                         void (*on_text)(void *user, const char *bytes, size_t n), void *user)
{
    dpo_context *context = model->context;
    const dpo_config *config = &model->config;
    if (!n_prompt || !sampling->max_new_tokens || !(sampling->top_p > 0) ||
        isnan(sampling->temperature))
        return dpoi_fail(context, "generation needs a prompt of at least one token, at least one "
                         "new token, a temperature, and top_p above 0");
    // A long prompt keeps its end, where the question is, and leaves a position to write to.
    const size_t kept = DPOI_MIN(n_prompt, DPOI_MAX(config->context_length - 1, (size_t)1));
    const size_t room = config->context_length - kept;
    const size_t capacity = kept + DPOI_MIN(sampling->max_new_tokens, room);
    size_t start = out->n, shown = out->n;
    dpoi_cache cache;
    dpoi_choice *choices = NULL;
    int failed = dpoi_cache_init(&cache, model, capacity) ||
                 dpoi_alloc(context, &choices, config->vocab_size, sizeof *choices) ||
                 dpoi_prefill(model, &cache, prompt + (n_prompt - kept), kept);
    for (size_t i = 0; !failed && i < sampling->max_new_tokens; i++) {
        if (dpoi_count_nonfinite(cache.logits, config->vocab_size)) {
            failed = dpoi_fail(context, "the model's logits are not finite: it is damaged, or its "
                               "training diverged");
            break;
        }
        uint32_t token = dpoi_choose(choices, cache.logits, config->vocab_size, sampling, i);
        if ((int64_t)token == config->eos_id) break;
        failed = dpo_tokenizer_decode(context, out, &model->tokenizer, &token, 1);
        size_t final, stop = dpoi_find_stop(sampling, out->bytes, start, out->n, &final);
        int stopped = stop < out->n;
        out->n = stop;
        if (on_text && final > shown) {
            on_text(user, out->bytes + shown, final - shown);
            shown = final;
        }
        if (stopped || cache.n == cache.capacity) break;
        if (i + 1 < sampling->max_new_tokens) dpoi_step(model, &cache, token);
    }
    if (!failed && on_text && out->n > shown) on_text(user, out->bytes + shown, out->n - shown);
    dpoi_free(context, choices);
    dpoi_cache_free(context, &cache);
    return failed;
}

#if defined(__AVX512F__) && !defined(__clang__)
#pragma GCC pop_options
#endif
#endif /* DPO_IMPLEMENTATION */
