/* tokenizer.c - byte-level BPE.
 *
 * The one idea: a piece starts as its bytes' tokens in a linked list; a heap holds every
 * mergeable neighbour pair by (rank, position). Taking the best pair, merging it and
 * pushing the two new pairs costs O(log n), so a 10 MB piece is no worse per byte than a
 * word. Heap entries are not removed when a neighbour changes: an entry that no longer
 * describes its pair is skipped when it surfaces. */
#include "tokenizer.h"

#include <stdlib.h>
#include <string.h>

#include <utf8proc.h>

#include "geom.h"
#include "mem.h"
#include "pretok.h"
#include "sha256.h"

#define MAX_TEXT (1u << 30)
#define EMPTY UINT32_MAX

struct merge {
    uint32_t left, right; /* token ids; left EMPTY: free slot */
    uint32_t rank, into;
};

struct tokenizer {
    uint32_t n_vocab;
    char *bytes;        /* all pieces, back to back */
    uint64_t *start;    /* [n_vocab + 1] */
    uint8_t *special;   /* [n_vocab] */
    uint32_t *specials; /* special ids, longest literal first */
    uint32_t n_specials;
    bool special_first[256]; /* first bytes of special literals */
    uint32_t *word_slot;     /* hash of piece -> id, open addressing */
    uint32_t word_mask;
    struct merge *merge_slot;
    uint32_t merge_mask;
    uint32_t byte_token[256];
    pretok_fn *pretok;
    int64_t bos, eos;
    uint8_t fingerprint[32];
};

/* ---- look-up tables */

static uint64_t hash_bytes(const char *p, size_t n)
{
    uint64_t h = 0xcbf29ce484222325ull;

    for (size_t i = 0; i < n; i++)
        h = (h ^ (uint8_t)p[i]) * 0x100000001b3ull;
    return h ^ h >> 29;
}

static uint64_t hash_pair(uint32_t a, uint32_t b)
{
    uint64_t h = ((uint64_t)a << 32 | b) * 0x9e3779b97f4a7c15ull;

    return h ^ h >> 32;
}

/* Slots for n items at half load at most: a power of two minus one. */
static uint32_t mask_for(uint32_t n)
{
    uint32_t size = 16;

    while (size < 2 * (uint64_t)n && size < 1u << 31)
        size *= 2;
    return size - 1;
}

/* Slot of the piece p[0..n): its own, or the free one where it belongs. Special tokens
 * are not in the table, so a merge cannot make one. */
static uint32_t *find_word(const struct tokenizer *t, const char *p, size_t n)
{
    uint32_t i = (uint32_t)hash_bytes(p, n) & t->word_mask;

    for (;; i = (i + 1) & t->word_mask) {
        uint32_t id = t->word_slot[i];

        if (id == EMPTY ||
            (t->start[id + 1] - t->start[id] == n && !memcmp(t->bytes + t->start[id], p, n)))
            return &t->word_slot[i];
    }
}

static struct merge *find_merge(const struct tokenizer *t, uint32_t left, uint32_t right)
{
    uint32_t i = (uint32_t)hash_pair(left, right) & t->merge_mask;

    for (;; i = (i + 1) & t->merge_mask) {
        struct merge *m = &t->merge_slot[i];

        if (m->left == EMPTY || (m->left == left && m->right == right))
            return m;
    }
}

/* ---- construction */

/* The byte-level alphabet: printable Latin-1 bytes stand for themselves, the others for
 * code points from 256 on, in order. Byte of a code point, or -1. */
static int alphabet_byte(utf8proc_int32_t c)
{
    int n = 0;

    if ((c >= 33 && c <= 126) || (c >= 161 && c <= 172) || (c >= 174 && c <= 255))
        return (int)c;
    if (c < 256)
        return -1;
    for (int b = 0; b < 256; b++) {
        if ((b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174)
            continue;
        if (c == 256 + n++)
            return b;
    }
    return -1;
}

/* Bytes that a token spells; *ret_n at most len. */
static int decode_token(const char *token, uint32_t len, char *out, size_t *ret_n, uint32_t id,
                        struct larder_err *e)
{
    size_t n = 0;

    for (uint32_t at = 0; at < len;) {
        utf8proc_int32_t c;
        utf8proc_ssize_t got = utf8proc_iterate((const utf8proc_uint8_t *)token + at, len - at, &c);
        int b = got > 0 ? alphabet_byte(c) : -1;

        if (b < 0)
            return larder_fail(e, LARDER_EMODEL,
                               "token %u is not spelled in the byte-level alphabet", id);
        out[n++] = (char)b;
        at += (uint32_t)got;
    }
    *ret_n = n;
    return 0;
}

static int load_tokens(struct tokenizer *t, const struct tokenizer_spec *s, struct larder_err *e)
{
    uint64_t total = 0, at = 0;
    int rc;

    for (uint32_t i = 0; i < s->n_vocab; i++)
        total += s->token_len[i];
    t->bytes = mem_alloc(total, 1);
    t->start = mem_alloc((uint64_t)s->n_vocab + 1, sizeof *t->start);
    t->special = mem_dup(s->is_special, s->n_vocab);
    if (!t->bytes || !t->start || !t->special)
        return larder_fail(e, LARDER_ENOMEM, "no memory for the vocabulary");
    for (uint32_t i = 0; i < s->n_vocab; i++) {
        size_t n = s->token_len[i];

        t->start[i] = at;
        if (t->special[i]) {
            memcpy(t->bytes + at, s->token[i], n);
        } else {
            rc = decode_token(s->token[i], s->token_len[i], t->bytes + at, &n, i, e);
            if (rc)
                return rc;
        }
        at += n;
    }
    t->start[s->n_vocab] = at;
    return 0;
}

static size_t token_len(const struct tokenizer *t, uint32_t id)
{
    return (size_t)(t->start[id + 1] - t->start[id]);
}

/* Special literals, longest first, so that the first match is the longest. */
static int index_specials(struct tokenizer *t, struct larder_err *e)
{
    uint32_t n = 0;

    for (uint32_t i = 0; i < t->n_vocab; i++)
        n += t->special[i] != 0;
    t->specials = mem_alloc(n, sizeof *t->specials);
    if (!t->specials)
        return larder_fail(e, LARDER_ENOMEM, "no memory for special tokens");
    for (uint32_t i = 0; i < t->n_vocab; i++) {
        uint32_t at = t->n_specials;

        if (!t->special[i] || !token_len(t, i))
            continue;
        t->special_first[(uint8_t)t->bytes[t->start[i]]] = true;
        for (; at > 0 && token_len(t, t->specials[at - 1]) < token_len(t, i); at--)
            t->specials[at] = t->specials[at - 1];
        t->specials[at] = i;
        t->n_specials++;
    }
    return 0;
}

static int index_words(struct tokenizer *t, struct larder_err *e)
{
    t->word_mask = mask_for(t->n_vocab);
    t->word_slot = mem_alloc((uint64_t)t->word_mask + 1, sizeof *t->word_slot);
    if (!t->word_slot)
        return larder_fail(e, LARDER_ENOMEM, "no memory for the vocabulary");
    memset(t->word_slot, 0xff, ((size_t)t->word_mask + 1) * sizeof *t->word_slot);
    for (uint32_t i = 0; i < t->n_vocab; i++) {
        uint32_t *slot;

        if (t->special[i])
            continue;
        slot = find_word(t, t->bytes + t->start[i], token_len(t, i));
        if (*slot == EMPTY)
            *slot = i;
    }
    for (unsigned b = 0; b < 256; b++) {
        char c = (char)b;

        t->byte_token[b] = *find_word(t, &c, 1);
    }
    return 0;
}

/* One "left right" line: both sides and what they make must be tokens. */
static int add_merge(struct tokenizer *t, const char *m, uint32_t len, uint32_t rank, char *buf,
                     struct larder_err *e)
{
    const char *space = memchr(m, ' ', len);
    size_t left, right;
    uint32_t l, r, into;
    struct merge *slot;
    int rc;

    if (!space)
        return larder_fail(e, LARDER_EMODEL, "merge %u has no space", rank);
    rc = decode_token(m, (uint32_t)(space - m), buf, &left, rank, e);
    if (!rc)
        rc = decode_token(space + 1, len - (uint32_t)(space - m) - 1, buf + left, &right, rank, e);
    if (rc)
        return larder_fail(e, LARDER_EMODEL, "merge %u is not spelled in the byte-level alphabet",
                           rank);
    l = *find_word(t, buf, left);
    r = *find_word(t, buf + left, right);
    into = *find_word(t, buf, left + right);
    if (l == EMPTY || r == EMPTY || into == EMPTY)
        return larder_fail(e, LARDER_EMODEL, "merge %u names a token that the vocabulary lacks",
                           rank);
    slot = find_merge(t, l, r);
    if (slot->left == EMPTY)
        *slot = (struct merge){l, r, rank, into};
    return 0;
}

static int index_merges(struct tokenizer *t, const struct tokenizer_spec *s, struct larder_err *e)
{
    uint32_t longest = 0;
    char *buf;
    int rc = 0;

    for (uint32_t i = 0; i < s->n_merges; i++)
        if (s->merge_len[i] > longest)
            longest = s->merge_len[i];
    buf = mem_alloc(longest, 1);
    t->merge_mask = mask_for(s->n_merges);
    t->merge_slot = mem_alloc((uint64_t)t->merge_mask + 1, sizeof *t->merge_slot);
    if (!buf || !t->merge_slot) {
        mem_free(buf);
        return larder_fail(e, LARDER_ENOMEM, "no memory for merges");
    }
    memset(t->merge_slot, 0xff, ((size_t)t->merge_mask + 1) * sizeof *t->merge_slot);
    for (uint32_t i = 0; !rc && i < s->n_merges; i++)
        rc = add_merge(t, s->merge[i], s->merge_len[i], i, buf, e);
    mem_free(buf);
    return rc;
}

static void add_field(struct sha256 *h, const void *p, uint32_t n)
{
    uint8_t len[4] = {(uint8_t)n, (uint8_t)(n >> 8), (uint8_t)(n >> 16), (uint8_t)(n >> 24)};

    sha256_add(h, len, 4);
    sha256_add(h, p, n);
}

/* Everything that decides how text becomes tokens (PROTOCOL.md section 2). */
static int take_fingerprint(struct tokenizer *t, const struct tokenizer_spec *s,
                            struct larder_err *e)
{
    struct sha256 *h = sha256_new();

    if (!h)
        return larder_fail(e, LARDER_ENOMEM, "no memory");
    add_field(h, "larder-tokenizer-1", 18);
    add_field(h, s->model, (uint32_t)strlen(s->model));
    add_field(h, s->pretok, (uint32_t)strlen(s->pretok));
    for (uint32_t i = 0; i < s->n_vocab; i++)
        add_field(h, s->token[i], s->token_len[i]);
    add_field(h, s->is_special, s->n_vocab);
    for (uint32_t i = 0; i < s->n_merges; i++)
        add_field(h, s->merge[i], s->merge_len[i]);
    sha256_get(h, t->fingerprint);
    sha256_free(h);
    return 0;
}

int tokenizer_new(struct tokenizer **ret, const struct tokenizer_spec *spec, struct larder_err *e)
{
    struct tokenizer *t;
    int rc;

    if (strcmp(spec->model, "gpt2"))
        return larder_fail(e, LARDER_EUNSUPPORTED, "tokenizer model '%s' is not supported; gpt2 is",
                           spec->model);
    if (!pretok_find(spec->pretok))
        return larder_fail(e, LARDER_EUNSUPPORTED, "pre-tokenizer '%s' is not supported; %s are",
                           spec->pretok, pretok_names());
    if (!spec->n_vocab || spec->n_vocab > KV_MAX_VOCAB)
        return larder_fail(e, LARDER_EMODEL, "a vocabulary of %u tokens", spec->n_vocab);
    if (spec->add_bos)
        return larder_fail(e, LARDER_EUNSUPPORTED,
                           "tokenizers that add a BOS token are not supported");
    t = mem_zalloc(1, sizeof *t);
    if (!t)
        return larder_fail(e, LARDER_ENOMEM, "no memory");
    t->n_vocab = spec->n_vocab;
    t->pretok = pretok_find(spec->pretok);
    t->bos = spec->bos;
    t->eos = spec->eos;
    rc = load_tokens(t, spec, e);
    if (!rc)
        rc = index_specials(t, e);
    if (!rc)
        rc = index_words(t, e);
    if (!rc)
        rc = index_merges(t, spec, e);
    if (!rc)
        rc = take_fingerprint(t, spec, e);
    if (rc) {
        tokenizer_free(t);
        return rc;
    }
    *ret = t;
    return 0;
}

void tokenizer_free(struct tokenizer *t)
{
    if (!t)
        return;
    mem_free(t->bytes);
    mem_free(t->start);
    mem_free(t->special);
    mem_free(t->specials);
    mem_free(t->word_slot);
    mem_free(t->merge_slot);
    mem_free(t);
}

/* ---- encoding */

struct ids {
    uint32_t *id;
    size_t n, cap;
};

static int push_id(struct ids *out, uint32_t id, struct larder_err *e)
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

struct node {
    uint32_t id; /* EMPTY: merged away */
    uint32_t prev, next;
};

struct pair {
    uint32_t rank, at;    /* position of the left node */
    uint32_t left, right; /* ids when it was pushed */
    uint32_t into;
};

/* Working memory of one encode call, grown as pieces need it. */
struct bpe {
    struct node *node;
    struct pair *heap;
    uint32_t cap, n_heap;
};

static bool before(const struct pair *a, const struct pair *b)
{
    return a->rank != b->rank ? a->rank < b->rank : a->at < b->at;
}

static void heap_push(struct bpe *w, struct pair p)
{
    uint32_t i = w->n_heap++;

    for (; i && before(&p, &w->heap[(i - 1) / 2]); i = (i - 1) / 2)
        w->heap[i] = w->heap[(i - 1) / 2];
    w->heap[i] = p;
}

static struct pair heap_pop(struct bpe *w)
{
    struct pair top = w->heap[0], last = w->heap[--w->n_heap];
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

static void push_pair(const struct tokenizer *t, struct bpe *w, uint32_t at)
{
    const struct merge *m;
    uint32_t next;

    if (at == EMPTY || (next = w->node[at].next) == EMPTY)
        return;
    m = find_merge(t, w->node[at].id, w->node[next].id);
    if (m->left != EMPTY)
        heap_push(w, (struct pair){m->rank, at, m->left, m->right, m->into});
}

static void merge_all(const struct tokenizer *t, struct bpe *w)
{
    while (w->n_heap) {
        struct pair p = heap_pop(w);
        struct node *left = &w->node[p.at], *right;

        if (left->id != p.left || left->next == EMPTY || w->node[left->next].id != p.right)
            continue;
        right = &w->node[left->next];
        left->id = p.into;
        right->id = EMPTY;
        left->next = right->next;
        if (left->next != EMPTY)
            w->node[left->next].prev = p.at;
        push_pair(t, w, left->prev);
        push_pair(t, w, p.at);
    }
}

/* Each byte pushes at most one pair, each merge two: the heap holds at most 3 n. */
static int reserve(struct bpe *w, uint32_t n, struct larder_err *e)
{
    uint32_t cap = w->cap ? w->cap : 64;
    struct node *node;
    struct pair *heap;

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

static int encode_piece(const struct tokenizer *t, struct bpe *w, const char *p, size_t len,
                        struct ids *out, struct larder_err *e)
{
    uint32_t n = 0;
    int rc = reserve(w, (uint32_t)len, e);

    if (rc)
        return rc;
    /* Vocabularies lack tokens for some control bytes; as in the Hugging Face
     * implementation such a byte gives no token and its neighbours may merge. */
    for (size_t i = 0; i < len; i++) {
        uint32_t id = t->byte_token[(uint8_t)p[i]];

        if (id == EMPTY)
            continue;
        w->node[n] = (struct node){id, n ? n - 1 : EMPTY, n + 1};
        n++;
    }
    if (!n)
        return 0;
    w->node[n - 1].next = EMPTY;
    w->n_heap = 0;
    for (uint32_t i = 0; i + 1 < n; i++)
        push_pair(t, w, i);
    merge_all(t, w);
    for (uint32_t i = 0; !rc && i != EMPTY; i = w->node[i].next)
        rc = push_id(out, w->node[i].id, e);
    return rc;
}

static int encode_plain(const struct tokenizer *t, struct bpe *w, const char *p, size_t len,
                        struct ids *out, struct larder_err *e)
{
    int rc = 0;

    while (!rc && len) {
        size_t n = t->pretok(p, len);

        rc = encode_piece(t, w, p, n, out, e);
        p += n;
        len -= n;
    }
    return rc;
}

/* The special literal at p, or EMPTY. */
static uint32_t special_at(const struct tokenizer *t, const char *p, size_t len)
{
    if (!t->special_first[(uint8_t)*p])
        return EMPTY;
    for (uint32_t i = 0; i < t->n_specials; i++) {
        uint32_t id = t->specials[i];
        size_t n = token_len(t, id);

        if (n <= len && !memcmp(p, t->bytes + t->start[id], n))
            return id;
    }
    return EMPTY;
}

static int encode_specials(const struct tokenizer *t, struct bpe *w, const char *p, size_t len,
                           struct ids *out, struct larder_err *e)
{
    size_t plain = 0;
    int rc = 0;

    while (!rc && plain < len) {
        uint32_t id = special_at(t, p + plain, len - plain);

        if (id == EMPTY) {
            plain++;
            continue;
        }
        rc = encode_plain(t, w, p, plain, out, e);
        if (!rc)
            rc = push_id(out, id, e);
        p += plain + token_len(t, id);
        len -= plain + token_len(t, id);
        plain = 0;
    }
    return rc ? rc : encode_plain(t, w, p, len, out, e);
}

static int check_utf8(const char *p, size_t len, struct larder_err *e)
{
    size_t at = 0;

    while (at < len) {
        utf8proc_int32_t c;
        utf8proc_ssize_t n = 1;

        if ((uint8_t)p[at] >= 0x80)
            n = utf8proc_iterate((const utf8proc_uint8_t *)p + at,
                                 (utf8proc_ssize_t)(len - at < 4 ? len - at : 4), &c);
        if (n < 1)
            return larder_fail(e, LARDER_ETEXT,
                               "the text is not valid UTF-8: byte 0x%02x at offset %zu; convert it "
                               "first (iconv -t UTF-8)",
                               (uint8_t)p[at], at);
        at += (size_t)n;
    }
    return 0;
}

int tokenizer_encode(const struct tokenizer *t, const char *text, size_t len, bool parse_special,
                     uint32_t **ret_ids, size_t *ret_n, struct larder_err *e)
{
    struct ids out = {0};
    struct bpe work = {0};
    int rc;

    if (len > MAX_TEXT)
        return larder_fail(e, LARDER_ETOOBIG, "a text of %zu bytes; at most %u", len, MAX_TEXT);
    rc = check_utf8(text, len, e);
    if (!rc)
        rc = (parse_special ? encode_specials : encode_plain)(t, &work, text, len, &out, e);
    mem_free(work.node);
    mem_free(work.heap);
    if (rc) {
        mem_free(out.id);
        return rc;
    }
    *ret_ids = out.id;
    *ret_n = out.n;
    return 0;
}

/* ---- questions */

const char *tokenizer_piece(const struct tokenizer *t, uint32_t id, size_t *ret_len)
{
    if (id >= t->n_vocab)
        return NULL;
    *ret_len = token_len(t, id);
    return t->bytes + t->start[id];
}

uint32_t tokenizer_n_vocab(const struct tokenizer *t)
{
    return t->n_vocab;
}

bool tokenizer_is_special(const struct tokenizer *t, uint32_t id)
{
    return id < t->n_vocab && t->special[id];
}

int64_t tokenizer_eos(const struct tokenizer *t)
{
    return t->eos;
}

void tokenizer_fingerprint(const struct tokenizer *t, uint8_t ret[32])
{
    memcpy(ret, t->fingerprint, 32);
}
