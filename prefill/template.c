/* template.c - the named templates and how a document and a question sit in them. */
#include "template.h"

#include <stdbool.h>
#include <string.h>

#include "mem.h"
#include "sha256.h"

#define SMOLLM_SYSTEM "You are a helpful AI assistant named SmolLM, trained by Hugging Face"

static const struct template table[] = {
    {
        .name = "smollm2",
        .doc_head = "<|im_start|>system\n" SMOLLM_SYSTEM "<|im_end|>\n<|im_start|>user\n",
        .ask_head = "\n\n",
        .ask_tail = "<|im_end|>\n<|im_start|>assistant\n",
        .default_system = SMOLLM_SYSTEM,
    },
    {
        .name = "chatml",
        .doc_head = "<|im_start|>user\n",
        .ask_head = "\n\n",
        .ask_tail = "<|im_end|>\n<|im_start|>assistant\n",
    },
    {.name = "plain", .doc_head = "", .ask_head = "\n\n", .ask_tail = ""},
};

const struct template *template_find(const char *name)
{
    for (size_t i = 0; i < sizeof table / sizeof table[0]; i++)
        if (!strcmp(table[i].name, name))
            return &table[i];
    return NULL;
}

const char *template_names(void)
{
    return "smollm2, chatml, plain";
}

static void add_field(struct sha256 *h, const char *s)
{
    uint32_t n = (uint32_t)strlen(s);
    uint8_t len[4] = {(uint8_t)n, (uint8_t)(n >> 8), (uint8_t)(n >> 16), (uint8_t)(n >> 24)};

    sha256_add(h, len, 4);
    sha256_add(h, s, n);
}

int template_fingerprint(const struct template *t, uint8_t ret[32], struct larder_err *e)
{
    struct sha256 *h = sha256_new();

    if (!h)
        return larder_fail(e, LARDER_ENOMEM, "no memory");
    add_field(h, t->name);
    add_field(h, t->doc_head);
    add_field(h, t->ask_head);
    add_field(h, t->ask_tail);
    sha256_get(h, ret);
    sha256_free(h);
    return 0;
}

/* Three parts, tokenised one by one: ours with special literals, the user's without. */
static int encode_parts(const struct tokenizer *tok, const char *head, const char *text, size_t len,
                        const char *tail, uint32_t **ret_ids, size_t *ret_n, struct larder_err *e)
{
    const char *part[3] = {head, text, tail};
    size_t part_len[3] = {strlen(head), len, strlen(tail)};
    uint32_t *ids = NULL, *one, *grown;
    size_t n = 0, n_one;
    int rc;

    for (int i = 0; i < 3; i++) {
        rc = tokenizer_encode(tok, part[i], part_len[i], i != 1, &one, &n_one, e);
        if (rc)
            goto fail;
        grown = mem_grow(ids, n + n_one, sizeof *ids);
        if (grown) {
            ids = grown;
            if (n_one)
                memcpy(ids + n, one, n_one * sizeof *ids);
            n += n_one;
        }
        mem_free(one);
        if (!grown) {
            rc = larder_fail(e, LARDER_ENOMEM, "no memory for %zu tokens", n + n_one);
            goto fail;
        }
    }
    *ret_ids = ids;
    *ret_n = n;
    return 0;
fail:
    mem_free(ids);
    return rc;
}

int template_document(const struct template *t, const struct tokenizer *tok, const char *doc,
                      size_t len, uint32_t **ret_ids, size_t *ret_n, char **ret_text,
                      size_t *ret_text_len, struct larder_err *e)
{
    size_t head = strlen(t->doc_head);
    char *text;
    int rc;

    if (!len)
        return larder_fail(e, LARDER_EEMPTY, "the document is empty");
    text = mem_alloc(head + len, 1);
    if (!text)
        return larder_fail(e, LARDER_ENOMEM, "no memory for a text of %zu bytes", head + len);
    memcpy(text, t->doc_head, head);
    memcpy(text + head, doc, len);
    rc = encode_parts(tok, t->doc_head, doc, len, "", ret_ids, ret_n, e);
    if (rc) {
        mem_free(text);
        return rc;
    }
    *ret_text = text;
    *ret_text_len = head + len;
    return 0;
}

int template_join(const struct tokenizer *tok, const char *head, const char *text,
                  uint32_t **ret_ids, size_t *ret_n, struct larder_err *e)
{
    size_t a = strlen(head), n = strlen(text);
    char *both = mem_alloc(a + n, 1);
    int rc;

    if (!both)
        return larder_fail(e, LARDER_ENOMEM, "no memory for a prompt");
    memcpy(both, head, a);
    memcpy(both + a, text, n);
    rc = tokenizer_encode(tok, both, a + n, true, ret_ids, ret_n, e);
    mem_free(both);
    return rc;
}

int template_question(const struct template *t, const struct tokenizer *tok, const char *question,
                      size_t len, uint32_t **ret_ids, size_t *ret_n, struct larder_err *e)
{
    size_t head = strlen(t->ask_head);
    char *text = mem_alloc(head + len, 1);
    int rc;

    if (!text)
        return larder_fail(e, LARDER_ENOMEM, "no memory for the question");
    /* head and question are one text: the tokenizer may merge across their seam */
    memcpy(text, t->ask_head, head);
    memcpy(text + head, question, len);
    rc = encode_parts(tok, "", text, head + len, t->ask_tail, ret_ids, ret_n, e);
    mem_free(text);
    return rc;
}

/* ---- conversations */

struct text {
    char *p;
    size_t n, cap;
    bool failed;
};

static void add(struct text *t, const char *s)
{
    size_t len = strlen(s);

    if (!t->failed && t->n + len > t->cap) {
        size_t cap = 2 * t->cap + len + 256;
        char *grown = mem_grow(t->p, cap, 1);

        if (grown) {
            t->p = grown;
            t->cap = cap;
        }
        t->failed = !grown;
    }
    if (t->failed)
        return;
    memcpy(t->p + t->n, s, len);
    t->n += len;
}

static void add_turn(struct text *t, const char *role, const char *content)
{
    add(t, "<|im_start|>");
    add(t, role);
    add(t, "\n");
    add(t, content);
    add(t, "<|im_end|>\n");
}

int template_chat(const struct template *t, const struct chat_message *msg, size_t n,
                  int add_generation_prompt, char **ret_text, size_t *ret_len, struct larder_err *e)
{
    struct text out = {0};

    if (!strcmp(t->name, "plain"))
        return larder_fail(e, LARDER_EUNSUPPORTED, "template plain has no conversations");
    if (t->default_system && (!n || strcmp(msg[0].role, "system")))
        add_turn(&out, "system", t->default_system);
    for (size_t i = 0; i < n; i++)
        add_turn(&out, msg[i].role, msg[i].content);
    if (add_generation_prompt)
        add(&out, "<|im_start|>assistant\n");
    if (out.failed || !out.p) {
        mem_free(out.p);
        return larder_fail(e, LARDER_ENOMEM, "no memory for a conversation");
    }
    *ret_text = out.p;
    *ret_len = out.n;
    return 0;
}
