/* template.h - where a document and a question sit in the model's chat form.
 *
 * Purpose    A named template in C: what stands before the document (stored with
 *            it), between document and question, and after the question. No Jinja.
 *            A retrieval prompt is: head + document | "\n\n" + question + tail, the
 *            bar being where the stored prefix ends; both sides are tokenised separately.
 * Ownership  Templates are static; rendered text is mem_free()d by the caller.
 * Threads    No state.
 */
#ifndef LARDER_TEMPLATE_H
#define LARDER_TEMPLATE_H

#include <stddef.h>
#include <stdint.h>

#include "larder_status.h"
#include "tokenizer.h"

struct template
{
    const char *name;           /* "smollm2", "chatml", "plain" */
    const char *doc_head;       /* before the document */
    const char *ask_head;       /* between document and question */
    const char *ask_tail;       /* after the question; the answer follows */
    const char *default_system; /* for chat rendering; NULL: none is inserted */
};

/* NULL when unknown. template_names() lists all, comma-separated. */
const struct template *template_find(const char *name);
const char *template_names(void);
int template_fingerprint(const struct template *t, uint8_t ret[32], struct larder_err *e);

/* Token ids of head + document (special literals inside the document are plain
 * text, so that a document cannot end its own turn) and the rendered text. */
int template_document(const struct template *t, const struct tokenizer *tok, const char *doc,
                      size_t len, uint32_t **ret_ids, size_t *ret_n, char **ret_text,
                      size_t *ret_text_len, struct larder_err *e);

/* Token ids of ask_head + question + ask_tail. */
int template_question(const struct template *t, const struct tokenizer *tok, const char *question,
                      size_t len, uint32_t **ret_ids, size_t *ret_n, struct larder_err *e);

/* Token ids of the two texts as one, special literals parsed: words of ours around the user's. */
int template_join(const struct tokenizer *tok, const char *head, const char *text,
                  uint32_t **ret_ids, size_t *ret_n, struct larder_err *e);

/* A conversation rendered as the model's own chat template does it. */
struct chat_message {
    const char *role;
    const char *content;
};
int template_chat(const struct template *t, const struct chat_message *msg, size_t n,
                  int add_generation_prompt, char **ret_text, size_t *ret_len,
                  struct larder_err *e);

#endif
