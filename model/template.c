/* template.c - how a document and a question sit in a chat form.
 *
 * The one idea: a prompt is two texts, and the document ends the first. Which turn it stands in
 * and what stands around it there are options of the template's string, and all of it is in the
 * texts that the fingerprint is taken of. */
#include "template.h"

#include <string.h>

#include "geom.h"
#include "mem.h"
#include "sha256.h"
#include "template_form.h"

/* ---- growing texts */

struct text {
    char *p; /* with its end */
    size_t n, cap;
    bool failed;
};

static void add_n(struct text *t, const char *s, size_t len)
{
    if (!t->failed && t->n + len + 1 > t->cap) {
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
    t->p[t->n] = '\0';
}

/* The text, moved to the caller; NULL: there was no memory. */
static char *take(struct text *t)
{
    if (!t->failed)
        return t->p;
    mem_free(t->p);
    return NULL;
}

static void add(struct text *t, const char *s)
{
    add_n(t, s, strlen(s));
}

static int no_memory(struct larder_err *e)
{
    return larder_fail(e, LARDER_ENOMEM, "no memory for a prompt");
}

/* ---- a template's string */

struct asked {
    const struct template_form *form;
    struct text prefix, suffix;
    bool in_system, has_suffix;
};

/* The text that p[0..len) spells. */
static int unescape(const char *p, size_t len, struct text *ret, struct larder_err *e)
{
    static const char names[] = "nts,\\", stand_for[] = "\n\t ,\\";

    add(ret, "");
    for (size_t i = 0; i < len; i++) {
        const char *at;

        if ((unsigned char)p[i] < 0x20 || p[i] == 0x7f)
            return larder_fail(e, LARDER_EINVAL,
                               "a template has a control character; write \\n or \\t");
        if (p[i] != '\\') {
            add_n(ret, p + i, 1);
            continue;
        }
        at = i + 1 < len ? strchr(names, p[i + 1]) : NULL;
        if (!at || !*at)
            return larder_fail(e, LARDER_EINVAL,
                               "a template's text has a backslash before something other than n, "
                               "t, s, a comma or a backslash");
        add_n(ret, stand_for + (at - names), 1);
        i++;
    }
    return ret->failed ? no_memory(e) : 0;
}

/* Bytes up to the next comma that no backslash precedes. */
static size_t option_len(const char *p)
{
    size_t n = 0;

    while (p[n] && p[n] != ',')
        n += p[n] == '\\' && p[n + 1] ? 2 : 1;
    return n;
}

static bool is_key(const char *p, size_t len, const char *key)
{
    return len >= strlen(key) && !memcmp(p, key, strlen(key));
}

static int read_option(struct asked *a, const char *p, size_t len, struct larder_err *e)
{
    if (is_key(p, len, "turn=")) {
        a->in_system = len == 11 && !memcmp(p + 5, "system", 6);
        if (a->in_system || (len == 9 && !memcmp(p + 5, "user", 4)))
            return 0;
    } else if (is_key(p, len, "prefix=") && !a->prefix.p) {
        return unescape(p + 7, len - 7, &a->prefix, e);
    } else if (is_key(p, len, "suffix=") && !a->has_suffix) {
        a->has_suffix = true;
        return unescape(p + 7, len - 7, &a->suffix, e);
    }
    return larder_fail(e, LARDER_EINVAL,
                       "a template takes turn=user, turn=system, prefix=TEXT and suffix=TEXT, not "
                       "'%.*s'",
                       (int)(len < 60 ? len : 60), p);
}

static int read_string(struct asked *a, const char *text, struct larder_err *e)
{
    size_t n = option_len(text);
    int rc = 0;

    if (strlen(text) >= KV_MAX_TEMPLATE)
        return larder_fail(e, LARDER_EINVAL, "a template of %zu bytes; at most %u", strlen(text),
                           KV_MAX_TEMPLATE - 1);
    a->form = template_form_find(text, (unsigned)n);
    if (!a->form)
        return larder_fail(e, LARDER_EINVAL, "no template is named '%.*s'; there are %s",
                           (int)(n < 40 ? n : 40), text, template_names());
    while (!rc && *(text += n)) {
        n = option_len(++text);
        rc = read_option(a, text, n, e);
    }
    if (!rc && a->in_system && !a->form->system[OPENS])
        rc = larder_fail(e, LARDER_EINVAL, "template %s has no system turn", a->form->name);
    return rc;
}

/* ---- life */

static char *make_doc_head(const struct asked *a)
{
    const struct template_form *f = a->form;
    struct text t = {0};

    add(&t, f->begin);
    if (a->in_system && f->in_user)
        add(&t, f->user[OPENS]);
    if (a->in_system) {
        add(&t, f->system[OPENS]);
    } else {
        if (f->default_system) {
            add(&t, f->system[OPENS]);
            add(&t, f->default_system);
            add(&t, f->system[CLOSES]);
        }
        add(&t, f->user[OPENS]);
    }
    add(&t, a->prefix.p ? a->prefix.p : "");
    return take(&t);
}

static char *make_ask_head(const struct asked *a)
{
    struct text t = {0};

    add(&t, a->has_suffix ? a->suffix.p : a->in_system ? "" : "\n\n");
    if (a->in_system) {
        add(&t, a->form->system[CLOSES]);
        add(&t, a->form->in_user ? "" : a->form->user[OPENS]);
    }
    return take(&t);
}

static char *make_ask_tail(const struct asked *a)
{
    struct text t = {0};

    add(&t, a->form->user[CLOSES]);
    add(&t, a->form->generate);
    return take(&t);
}

int template_open(struct template **ret, const char *text, struct larder_err *e)
{
    struct asked a = {0};
    struct template *t = NULL;
    int rc = read_string(&a, text, e);

    if (!rc && !(t = mem_zalloc(1, sizeof *t)))
        rc = no_memory(e);
    if (!rc) {
        *t = (struct template){mem_strdup(text),  a.form,     make_doc_head(&a), make_ask_head(&a),
                               make_ask_tail(&a), a.in_system};
        if (!t->name || !t->doc_head || !t->ask_head || !t->ask_tail)
            rc = no_memory(e);
    }
    mem_free(a.prefix.p);
    mem_free(a.suffix.p);
    if (rc) {
        template_free(t);
        return rc;
    }
    *ret = t;
    return 0;
}

void template_free(struct template *t)
{
    if (!t)
        return;
    mem_free(t->name);
    mem_free(t->doc_head);
    mem_free(t->ask_head);
    mem_free(t->ask_tail);
    mem_free(t);
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
    add_field(h, t->form->name);
    add_field(h, t->doc_head);
    add_field(h, t->ask_head);
    add_field(h, t->ask_tail);
    sha256_get(h, ret);
    sha256_free(h);
    return 0;
}

/* ---- token ids */

struct made {
    uint32_t *id; /* owned */
    size_t n;
};

static int append(struct made *m, const uint32_t *id, size_t n, struct larder_err *e)
{
    uint32_t *grown = mem_grow(m->id, m->n + n, sizeof *grown);

    if (!grown)
        return larder_fail(e, LARDER_ENOMEM, "no memory for %zu tokens", m->n + n);
    m->id = grown;
    if (n)
        memcpy(grown + m->n, id, n * sizeof *id);
    m->n += n;
    return 0;
}

/* Goes on from what is there; `first` stands before the first text. */
static int encode(struct made *m, const struct tokenizer *tok, enum tokenizer_before first,
                  const char *text, size_t len, bool special, struct larder_err *e)
{
    enum tokenizer_before before = m->n ? tokenizer_before(tok, m->id, m->n) : first;
    uint32_t *ids;
    size_t n;
    int rc = tokenizer_encode_after(tok, before, text, len, special, &ids, &n, e);

    if (rc)
        return rc;
    rc = append(m, ids, n, e);
    mem_free(ids);
    return rc;
}

/* Where spaces at the end of text[0..n) begin. */
static size_t without_spaces(const char *text, size_t n)
{
    while (n && text[n - 1] == ' ')
        n--;
    return n;
}

/* BOS, unless the head of n bytes writes it or the tokenizer wants none; and the head. */
static int encode_head(struct made *m, const struct tokenizer *tok, const char *text, size_t n,
                       struct larder_err *e)
{
    uint32_t bos = (uint32_t)tokenizer_bos(tok);
    struct made head = {0};
    int rc = encode(&head, tok, BEFORE_NOTHING, text, n, true, e);

    if (!rc && tokenizer_adds_bos(tok) && !(head.n && head.id[0] == bos))
        rc = append(m, &bos, 1, e);
    if (!rc)
        rc = append(m, head.id, head.n, e);
    mem_free(head.id);
    return rc;
}

static int finish(struct made *m, int rc, uint32_t **ret_ids, size_t *ret_n)
{
    if (rc) {
        mem_free(m->id);
        return rc;
    }
    *ret_ids = m->id;
    *ret_n = m->n;
    return 0;
}

static char *join(const char *head, size_t head_len, const char *text, size_t len)
{
    char *both = mem_alloc(head_len + len, 1);

    if (!both)
        return NULL;
    memcpy(both, head, head_len);
    if (len)
        memcpy(both + head_len, text, len);
    return both;
}

int template_document(const struct template *t, const struct tokenizer *tok, const char *doc,
                      size_t len, uint32_t **ret_ids, size_t *ret_n, char **ret_text,
                      size_t *ret_text_len, struct larder_err *e)
{
    size_t all = strlen(t->doc_head) + len, head = without_spaces(t->doc_head, all - len);
    struct made m = {0};
    char *text;
    int rc;

    if (!len)
        return larder_fail(e, LARDER_EEMPTY, "the document is empty");
    text = join(t->doc_head, all - len, doc, len);
    if (!text)
        return larder_fail(e, LARDER_ENOMEM, "no memory for a text of %zu bytes", all);
    rc = encode_head(&m, tok, text, head, e);
    if (!rc)
        rc = encode(&m, tok, BEFORE_NOTHING, text + head, all - head, false, e);
    rc = finish(&m, rc, ret_ids, ret_n);
    if (rc) {
        mem_free(text);
        return rc;
    }
    *ret_text = text;
    *ret_text_len = all;
    return 0;
}

int template_head(const struct template *t, const struct tokenizer *tok, uint32_t **ret_ids,
                  size_t *ret_n, struct larder_err *e)
{
    size_t head = without_spaces(t->doc_head, strlen(t->doc_head));
    struct made m = {0};

    return finish(&m, encode_head(&m, tok, t->doc_head, head, e), ret_ids, ret_n);
}

int template_join(const struct tokenizer *tok, const char *head, const char *text,
                  uint32_t **ret_ids, size_t *ret_n, struct larder_err *e)
{
    size_t a = strlen(head), n = strlen(text);
    char *both = join(head, a, text, n);
    struct made m = {0};
    int rc;

    if (!both)
        return no_memory(e);
    rc = encode(&m, tok, BEFORE_TEXT, both, a + n, true, e);
    mem_free(both);
    return finish(&m, rc, ret_ids, ret_n);
}

/* In the document's turn what stands before the question and the question are one text: the
 * tokenizer may merge across their seam. Where a turn ends between them they are two. */
int template_question(const struct template *t, const struct tokenizer *tok, const char *question,
                      size_t len, uint32_t **ret_ids, size_t *ret_n, struct larder_err *e)
{
    size_t all = strlen(t->ask_head) + len;
    size_t head = t->in_system ? without_spaces(t->ask_head, all - len) : 0;
    char *text = join(t->ask_head, all - len, question, len);
    struct made m = {0};
    int rc;

    if (!text)
        return larder_fail(e, LARDER_ENOMEM, "no memory for the question");
    rc = encode(&m, tok, BEFORE_TEXT, text, head, true, e);
    if (!rc)
        rc = encode(&m, tok, BEFORE_TEXT, text + head, all - head, false, e);
    if (!rc)
        rc = encode(&m, tok, BEFORE_TEXT, t->ask_tail, strlen(t->ask_tail), true, e);
    mem_free(text);
    return finish(&m, rc, ret_ids, ret_n);
}

/* ---- conversations */

static void add_turn(struct text *t, const char *const around[2], const char *content)
{
    add(t, around[OPENS]);
    add(t, content);
    add(t, around[CLOSES]);
}

static int add_message(struct text *t, const struct template_form *f, const struct chat_message *m,
                       struct larder_err *e)
{
    if (!strcmp(m->role, "user"))
        add_turn(t, f->user, m->content);
    else if (!strcmp(m->role, "assistant"))
        add_turn(t, f->assistant, m->content);
    else if (!strcmp(m->role, "system") && !f->in_user)
        add_turn(t, f->system, m->content);
    else
        return larder_fail(e, LARDER_EUNSUPPORTED, "template %s has no turn of a %.40s here",
                           f->name, m->role);
    return 0;
}

/* A system text inside the first user turn; the two messages are used up. */
static void add_system_in_user(struct text *t, const struct template_form *f,
                               const struct chat_message *msg)
{
    add(t, f->user[OPENS]);
    add_turn(t, f->system, msg[0].content);
    add(t, msg[1].content);
    add(t, f->user[CLOSES]);
}

int template_chat(const struct template *t, const struct chat_message *msg, size_t n,
                  bool add_generation_prompt, char **ret_text, size_t *ret_len,
                  struct larder_err *e)
{
    const struct template_form *f = t->form;
    bool has_system = n && !strcmp(msg[0].role, "system");
    struct text out = {0};
    size_t i = 0;
    int rc = 0;

    if (!f->system[OPENS])
        return larder_fail(e, LARDER_EUNSUPPORTED, "template %s has no conversations", f->name);
    add(&out, f->begin);
    if (f->default_system && !has_system)
        add_turn(&out, f->system, f->default_system);
    if (f->in_user && has_system && n > 1 && !strcmp(msg[1].role, "user")) {
        add_system_in_user(&out, f, msg);
        i = 2;
    }
    for (; !rc && i < n; i++)
        rc = add_message(&out, f, &msg[i], e);
    if (add_generation_prompt)
        add(&out, f->generate);
    if (!rc && out.failed)
        rc = larder_fail(e, LARDER_ENOMEM, "no memory for a conversation");
    if (rc) {
        mem_free(out.p);
        return rc;
    }
    *ret_text = out.p;
    *ret_len = out.n;
    return 0;
}
