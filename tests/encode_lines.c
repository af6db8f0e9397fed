/* Encodes strings with the tokenizer of a model file, for scripts that compare with other
   tokenizers.

       encode_lines MODEL < strings > ids

   stdin: per string a u32 length and its bytes. stdout: per string a u32 count and its ids; a count
   of 0xFFFFFFFF says that the string was refused, with the reason on stderr. Little-endian. The
   last line on stderr is "BYTES bytes, IDS ids, SECONDS s", the processor time of the encoder
   alone. */
#define DPO_IMPLEMENTATION
#include "../dpo.h"
#include <time.h>

int main(int argc, char **argv)
{
    dpo_context context;
    dpo_file file;
    dpo_tokenizer tokenizer;
    if (argc != 2) return fprintf(stderr, "usage: encode_lines MODEL < strings > ids\n"), 2;
    if (dpo_context_init(&context, 1) ||
        dpo_file_open(&context, &file, argv[1], DPO_FILE_MODEL, 1) ||
        dpo_tokenizer_load(&context, &tokenizer, &file))
        return fprintf(stderr, "%s: %s\n", argv[1], context.error), 1;

    dpo_tokens ids = { 0 };
    dpo_string text = { 0 }, decoded = { 0 };
    double seconds = 0;
    size_t n_bytes = 0, n_ids = 0;
    for (uint32_t length; fread(&length, sizeof length, 1, stdin) == 1;) {
        text.n = ids.n = decoded.n = 0;
        if (dpoi_reserve(&context, &text.bytes, &text.capacity, (size_t)length + 1, 1) ||
            fread(text.bytes, 1, length, stdin) != length)
            return fprintf(stderr, "the input ends inside a string\n"), 1;
        struct timespec start, end;
        clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &start);
        int failed = dpo_tokenizer_encode(&context, &ids, &tokenizer, text.bytes, length);
        clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &end);
        seconds += (double)(end.tv_sec - start.tv_sec) +
                   1e-9 * (double)(end.tv_nsec - start.tv_nsec);
        uint32_t count = failed ? UINT32_MAX : (uint32_t)ids.n;
        if (failed) fprintf(stderr, "%s\n", context.error);
        n_bytes += length;
        n_ids += ids.n;
        if (fwrite(&count, sizeof count, 1, stdout) != 1 ||
            fwrite(ids.ids, sizeof *ids.ids, ids.n, stdout) != ids.n)
            return fprintf(stderr, "stdout: %s\n", strerror(errno)), 1;
        // Decoding gives back the text, except where normalisation changed it.
        if (!failed && !tokenizer.nfc &&
            (dpo_tokenizer_decode(&context, &decoded, &tokenizer, ids.ids, ids.n) ||
             decoded.n != length || (length && memcmp(decoded.bytes, text.bytes, length))))
            return fprintf(stderr, "decoding does not give the text back\n"), 1;
    }
    fprintf(stderr, "%zu bytes, %zu ids, %.6f s\n", n_bytes, n_ids, seconds);
    dpo_tokens_free(&context, &ids);
    dpo_string_free(&context, &text);
    dpo_string_free(&context, &decoded);
    dpo_tokenizer_free(&context, &tokenizer);
    dpo_file_close(&context, &file);
    dpo_context_free(&context);
    return fflush(stdout) != 0;
}
