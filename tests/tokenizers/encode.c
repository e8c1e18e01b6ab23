/* encode.c - token ids of many texts, for a comparison with other tokenizers.
 *
 * encode FILE < LINES: FILE is a tokenizer.json or (by its name) a GGUF file. A line is "1 HEX" or
 * "0 HEX": the text's bytes, with literals of special tokens parsed or not. Each gives one line:
 * the ids, a tab, and what the tokens spell, in hex; or "error" and the name of the code. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "gguf.h"
#include "mem.h"
#include "tokenizer_gguf.h"
#include "tokenizer_json.h"

static int open_any(struct tokenizer **ret, const char *path, struct larder_err *e)
{
    size_t n = strlen(path);
    struct gguf *g = NULL;
    int rc;

    if (n < 5 || strcmp(path + n - 5, ".gguf"))
        return tokenizer_from_json(ret, path, e);
    rc = gguf_open(&g, path, e);
    if (!rc)
        rc = tokenizer_from_gguf(ret, g, 0, e);
    gguf_close(g);
    return rc;
}

static int digit(char c)
{
    return c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

static size_t from_hex(const char *hex, char *out)
{
    size_t n = 0;

    for (; digit(hex[2 * n]) >= 0 && digit(hex[2 * n + 1]) >= 0; n++)
        out[n] = (char)(16 * digit(hex[2 * n]) + digit(hex[2 * n + 1]));
    return n;
}

static void print_ids(const struct tokenizer *t, const uint32_t *ids, size_t n)
{
    for (size_t i = 0; i < n; i++)
        printf(i ? " %u" : "%u", ids[i]);
    putchar('\t');
    for (size_t i = 0; i < n; i++) {
        size_t len = 0;
        const char *p = tokenizer_piece(t, ids[i], &len);

        for (size_t k = 0; k < len; k++)
            printf("%02x", (unsigned char)p[k]);
    }
    putchar('\n');
}

int main(int argc, char **argv)
{
    struct tokenizer *t = NULL;
    struct larder_err e;
    char *line = NULL;
    size_t cap = 0;

    if (argc != 2 || open_any(&t, argv[1], &e)) {
        fprintf(stderr, "%s\n", argc == 2 ? e.msg : "usage: encode FILE");
        return 1;
    }
    while (getline(&line, &cap, stdin) > 2) {
        char *text = malloc(cap);
        size_t len = from_hex(line + 2, text), n;
        uint32_t *ids;
        int rc = tokenizer_encode(t, text, len, line[0] == '1', &ids, &n, &e);

        if (rc) {
            printf("error %s\n", larder_status_name(rc));
        } else {
            print_ids(t, ids, n);
            mem_free(ids);
        }
        free(text);
    }
    free(line);
    tokenizer_free(t);
    return 0;
}
