/* bpe.c - byte pair encoding of one piece.
 *
 * The one idea: a piece starts as its smallest tokens in a linked list; a heap holds every
 * mergeable neighbour pair by (rank, position). Taking the best pair, merging it and
 * pushing the two new pairs costs O(log n), so a 10 MB piece is no worse per byte than a
 * word. Heap entries are not removed when a neighbour changes: an entry that no longer
 * describes its pair is skipped when it surfaces.
 *
 * A node's key is its token id where merges are a list of pairs. Where scores rank them it is
 * its length in bytes: a character that is no token can be part of one. */
#include "bpe.h"

#include <string.h>

#include "mem.h"

#define NONE TOKENIZER_NONE

struct bpe_node {
    uint32_t key; /* NONE: merged away */
    uint32_t prev, next;
};

struct bpe_pair {
    uint32_t rank, at;    /* position of the left node */
    uint32_t left, right; /* keys when it was pushed */
    uint32_t into;
};

int ids_push(struct ids *out, uint32_t id, struct larder_err *e)
{
    if (out->n == out->cap) {
        size_t cap = out->cap ? 2 * out->cap : 256;
        uint32_t *grown = mem_grow(out->id, cap, sizeof *grown);

        if (!grown)
            return larder_fail(e, LARDER_ENOMEM, "no memory for %zu tokens", cap);
        out->id = grown;
        out->cap = cap;
    }
    out->id[out->n++] = id;
    return 0;
}

void bpe_done(struct bpe *w)
{
    mem_free(w->node);
    mem_free(w->heap);
    *w = (struct bpe){0};
}

/* ---- the heap */

static bool before(const struct bpe_pair *a, const struct bpe_pair *b)
{
    return a->rank != b->rank ? a->rank < b->rank : a->at < b->at;
}

static void heap_push(struct bpe *w, struct bpe_pair p)
{
    uint32_t i = w->n_heap++;

    for (; i && before(&p, &w->heap[(i - 1) / 2]); i = (i - 1) / 2)
        w->heap[i] = w->heap[(i - 1) / 2];
    w->heap[i] = p;
}

static struct bpe_pair heap_pop(struct bpe *w)
{
    struct bpe_pair top = w->heap[0], last = w->heap[--w->n_heap];
    uint32_t i = 0, child;

    while ((child = 2 * i + 1) < w->n_heap) {
        if (child + 1 < w->n_heap && before(&w->heap[child + 1], &w->heap[child]))
            child++;
        if (!before(&w->heap[child], &last))
            break;
        w->heap[i] = w->heap[child];
        i = child;
    }
    w->heap[i] = last;
    return top;
}

/* Each node pushes at most one pair, each merge two: the heap holds at most 3 n. */
static int reserve(struct bpe *w, uint32_t n, struct larder_err *e)
{
    uint32_t cap = w->cap ? w->cap : 64;
    struct bpe_node *node;
    struct bpe_pair *heap;

    if (n <= w->cap)
        return 0;
    while (cap < n)
        cap *= 2;
    node = mem_grow(w->node, cap, sizeof *node);
    if (node)
        w->node = node;
    heap = mem_grow(w->heap, 3ull * cap, sizeof *heap);
    if (heap)
        w->heap = heap;
    if (!node || !heap)
        return larder_fail(e, LARDER_ENOMEM, "no memory to tokenise a piece of %u bytes", n);
    w->cap = cap;
    return 0;
}

/* ---- merging */

/* In a piece p whose node numbers are byte offsets (TOKENIZER_SCORES). */
static void push_scored(const struct tokenizer *t, struct bpe *w, const char *p, uint32_t at)
{
    uint32_t left = w->node[at].key, right = w->node[w->node[at].next].key;
    uint32_t id = tokenizer_find_word(t, p + at, (size_t)left + right);

    if (id != NONE)
        heap_push(w, (struct bpe_pair){t->rank[id], at, left, right, left + right});
}

static void push_pair(const struct tokenizer *t, struct bpe *w, const char *p, uint32_t at)
{
    const struct pair_slot *m;
    uint32_t next;

    if (at == NONE || (next = w->node[at].next) == NONE)
        return;
    if (t->kind == TOKENIZER_SCORES) {
        push_scored(t, w, p, at);
        return;
    }
    m = pair_find(&t->merges, w->node[at].key, w->node[next].key);
    if (m->left != NONE)
        heap_push(w, (struct bpe_pair){m->rank, at, m->left, m->right, m->into});
}

static void merge_all(const struct tokenizer *t, struct bpe *w, const char *piece)
{
    while (w->n_heap) {
        struct bpe_pair p = heap_pop(w);
        struct bpe_node *left = &w->node[p.at], *right;

        if (left->key != p.left || left->next == NONE || w->node[left->next].key != p.right)
            continue;
        right = &w->node[left->next];
        left->key = p.into;
        right->key = NONE;
        left->next = right->next;
        if (left->next != NONE)
            w->node[left->next].prev = p.at;
        push_pair(t, w, piece, left->prev);
        push_pair(t, w, piece, p.at);
    }
}

/* ---- the smallest tokens of a piece; each returns the number of nodes */

static uint32_t add_node(struct bpe *w, uint32_t n, uint32_t key)
{
    w->node[n] = (struct bpe_node){key, n ? n - 1 : NONE, n + 1};
    return n + 1;
}

/* Vocabularies lack tokens for some control bytes; as in the Hugging Face
 * implementation such a byte gives no token and its neighbours may merge. */
static uint32_t start_bytes(const struct tokenizer *t, struct bpe *w, const char *p, size_t len)
{
    uint32_t n = 0;

    for (size_t i = 0; i < len; i++) {
        uint32_t id = t->byte_token[(uint8_t)p[i]];

        if (id != NONE)
            n = add_node(w, n, id);
    }
    return n;
}

/* Bytes of the character that starts with byte c, in valid UTF-8. */
static size_t char_len(uint8_t c)
{
    return c < 0x80 ? 1 : c < 0xe0 ? 2 : c < 0xf0 ? 3 : 4;
}

/* A character that is no token is as many tokens as it has bytes. */
static uint32_t start_chars(const struct tokenizer *t, struct bpe *w, const char *p, size_t len)
{
    uint32_t n = 0;

    for (size_t at = 0, k; at < len; at += k) {
        uint32_t id;

        k = char_len((uint8_t)p[at]);
        id = tokenizer_find_word(t, p + at, k);
        if (id != NONE)
            n = add_node(w, n, id);
        for (size_t i = 0; id == NONE && i < k; i++)
            n = add_node(w, n, t->byte_token[(uint8_t)p[at + i]]);
    }
    return n;
}

static void start_scored(struct bpe *w, const char *p, size_t len)
{
    uint32_t prev = NONE;

    for (uint32_t at = 0, k; at < len; at += k) {
        k = (uint32_t)char_len((uint8_t)p[at]);
        w->node[at] = (struct bpe_node){k, prev, at + k < len ? at + k : NONE};
        prev = at;
    }
}

/* ---- a piece */

static int push_word(const struct tokenizer *t, const char *p, uint32_t len, struct ids *out,
                     struct larder_err *e)
{
    uint32_t id = tokenizer_find_word(t, p, len);
    int rc = 0;

    if (id != NONE)
        return ids_push(out, id, e);
    for (uint32_t i = 0; !rc && i < len; i++)
        rc = ids_push(out, t->byte_token[(uint8_t)p[i]], e);
    return rc;
}

int bpe_piece(const struct tokenizer *t, struct bpe *w, const char *p, size_t len, struct ids *out,
              struct larder_err *e)
{
    bool scored = t->kind == TOKENIZER_SCORES;
    uint32_t n = (uint32_t)len;
    int rc = reserve(w, n, e);

    if (rc || !len)
        return rc;
    if (t->ignore_merges && tokenizer_find_word(t, p, len) != NONE)
        return ids_push(out, tokenizer_find_word(t, p, len), e);
    if (scored)
        start_scored(w, p, len);
    else
        n = (t->kind == TOKENIZER_BYTES ? start_bytes : start_chars)(t, w, p, len);
    if (!n)
        return 0;
    if (!scored)
        w->node[n - 1].next = NONE;
    w->n_heap = 0;
    for (uint32_t i = 0; i != NONE; i = w->node[i].next)
        push_pair(t, w, p, i);
    merge_all(t, w, p);
    for (uint32_t i = 0; !rc && i != NONE; i = w->node[i].next)
        rc =
            scored ? push_word(t, p + i, w->node[i].key, out, e) : ids_push(out, w->node[i].key, e);
    return rc;
}
