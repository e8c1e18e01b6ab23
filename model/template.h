/* template.h - where a document and a question sit in the model's chat form.
 *
 * Purpose    A named template in C: what stands before the document (stored with
 *            it), between document and question, and after the question. No Jinja.
 *            A retrieval prompt is: head + document | between + question + tail, the
 *            bar being where the stored prefix ends; both sides are tokenised separately.
 * Ownership  template_free() ends a template; rendered text is mem_free()d by the caller.
 * Threads    Read-only after construction.
 */
#ifndef LARDER_TEMPLATE_H
#define LARDER_TEMPLATE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "larder_status.h"
#include "tokenizer.h"

struct template_form; /* the texts around turns: one for each name */

struct template
{
    char *name; /* what template_open() was given */
    const struct template_form *form;
    char *doc_head; /* before the document */
    char *ask_head; /* between document and question */
    char *ask_tail; /* after the question; the answer follows */
    bool in_system; /* the document's turn ends before the question */
};

/* From "NAME[,turn=user|system][,prefix=TEXT][,suffix=TEXT]", less than KV_MAX_TEMPLATE bytes: the
 * form, the turn in which a document stands (user), what stands before it in that turn (nothing)
 * and behind it ("\n\n" in a user turn, where the question follows; nothing in a system turn). In
 * a TEXT, \n \t \s \, and \\ are a line end, a tab, a space, a comma and a backslash.
 * LARDER_EINVAL says what is wrong; what plain and turn=system would mean is refused. */
int template_open(struct template **ret, const char *text, struct larder_err *e);
void template_free(struct template *t); /* accepts NULL */

/* Names, comma-separated. */
const char *template_names(void);

/* The name of the form that a model's own chat template (a Jinja program) amounts to, by what it
 * writes around turns; NULL: none of ours. */
const char *template_recognise(const char *jinja, size_t len);

/* Of everything that is rendered: the form's name, doc_head, ask_head, ask_tail. */
int template_fingerprint(const struct template *t, uint8_t ret[32], struct larder_err *e);

/* Token ids of head + document (special literals inside the document are plain text, so that a
 * document cannot end its own turn), behind BOS where the tokenizer begins texts with one and the
 * head does not; and the rendered text, without that BOS. Spaces at the end of the head are
 * tokenised with the document, since many vocabularies have a token for a space and a word. */
int template_document(const struct template *t, const struct tokenizer *tok, const char *doc,
                      size_t len, uint32_t **ret_ids, size_t *ret_n, char **ret_text,
                      size_t *ret_text_len, struct larder_err *e);

/* The ids with which the ids of every document begin. */
int template_head(const struct template *t, const struct tokenizer *tok, uint32_t **ret_ids,
                  size_t *ret_n, struct larder_err *e);

/* Token ids of ask_head + question + ask_tail. */
int template_question(const struct template *t, const struct tokenizer *tok, const char *question,
                      size_t len, uint32_t **ret_ids, size_t *ret_n, struct larder_err *e);

/* Token ids of the two texts as one that goes on from a document, special literals parsed: words
 * of ours around the user's. */
int template_join(const struct tokenizer *tok, const char *head, const char *text,
                  uint32_t **ret_ids, size_t *ret_n, struct larder_err *e);

/* A conversation rendered as the model's own chat template does it; contents stand as they are.
 * LARDER_EUNSUPPORTED for a role that the form has no turn for. */
struct chat_message {
    const char *role;
    const char *content;
};
int template_chat(const struct template *t, const struct chat_message *msg, size_t n,
                  bool add_generation_prompt, char **ret_text, size_t *ret_len,
                  struct larder_err *e);

#endif
