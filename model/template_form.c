/* template_form.c - the named chat forms, and how a model's own template is recognised.
 *
 * The one idea: a model file carries a program (Jinja) where a handful of texts would do. Those of
 * the families are written down here; the program is only searched for what it writes around
 * turns, never run. */
#include "template_form.h"

#include <stddef.h>
#include <string.h>

#include "template.h"

#define CHATML                                                                                     \
    .begin = "", .system = {"<|im_start|>system\n", "<|im_end|>\n"},                               \
    .user = {"<|im_start|>user\n", "<|im_end|>\n"},                                                \
    .assistant = {"<|im_start|>assistant\n", "<|im_end|>\n"},                                      \
    .generate = "<|im_start|>assistant\n"

#define LLAMA3(role)                                                                               \
    {                                                                                              \
        "<|start_header_id|>" role "<|end_header_id|>\n\n", "<|eot_id|>"                           \
    }

static const struct template_form table[] = {
    {
        .name = "smollm2",
        CHATML,
        .default_system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
    },
    {.name = "chatml", CHATML},
    {.name = "plain", .begin = "", .user = {"", ""}, .assistant = {"", ""}, .generate = ""},
    {.name = "qwen", CHATML, .default_system = "You are a helpful assistant."},
    {
        .name = "qwen2.5",
        CHATML,
        .default_system = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    },
    {
        .name = "llama2",
        .begin = "",
        .system = {"<<SYS>>\n", "\n<</SYS>>\n\n"},
        .user = {"<s>[INST] ", " [/INST]"},
        .assistant = {" ", " </s>"},
        .generate = "",
        .in_user = true,
    },
    {
        .name = "llama3",
        .begin = "<|begin_of_text|>",
        .system = LLAMA3("system"),
        .user = LLAMA3("user"),
        .assistant = LLAMA3("assistant"),
        .generate = "<|start_header_id|>assistant<|end_header_id|>\n\n",
    },
    {
        .name = "mistral",
        .begin = "<s>",
        .system = {"", "\n\n"},
        .user = {"[INST] ", " [/INST]"},
        .assistant = {"", "</s>"},
        .generate = "",
        .in_user = true,
    },
    {
        .name = "mistral-v3",
        .begin = "<s>",
        .system = {"", "\n\n"},
        .user = {"[INST] ", "[/INST]"},
        .assistant = {" ", "</s>"},
        .generate = "",
        .in_user = true,
    },
    {
        .name = "phi3",
        .begin = "",
        .system = {"<|system|>\n", "<|end|>\n"},
        .user = {"<|user|>\n", "<|end|>\n"},
        .assistant = {"<|assistant|>\n", "<|end|>\n"},
        .generate = "<|assistant|>\n",
    },
};

const struct template_form *template_form_find(const char *name, unsigned len)
{
    for (size_t i = 0; i < sizeof table / sizeof table[0]; i++)
        if (strlen(table[i].name) == len && !memcmp(table[i].name, name, len))
            return &table[i];
    return NULL;
}

const char *template_names(void)
{
    return "smollm2, chatml, plain, qwen, qwen2.5, llama2, llama3, mistral, mistral-v3, phi3";
}

/* ---- recognition */

struct mark {
    const char *name;
    const char *writes[2]; /* these are in the program; NULL: no more */
    const char *never;     /* this is not, or NULL */
};

/* The first that fits. A line end may stand as itself or as an escape of Jinja. */
static const struct mark marks[] = {
    {"smollm2", {"<|im_start|>", "named SmolLM"}, NULL},
    {"qwen2.5", {"<|im_start|>", "You are Qwen, created by Alibaba Cloud"}, NULL},
    {"qwen", {"<|im_start|>system\\nYou are a helpful assistant.<|im_end|>", NULL}, NULL},
    {"qwen", {"<|im_start|>system\nYou are a helpful assistant.<|im_end|>", NULL}, NULL},
    {"chatml", {"<|im_start|>", NULL}, "<|im_sep|>"},
    {"llama3", {"<|start_header_id|>", "<|eot_id|>"}, NULL},
    {"phi3", {"<|user|>", "<|end|>"}, NULL},
    {"llama2", {"[INST] ", "<<SYS>>"}, NULL},
    {"mistral", {"[INST] ", " [/INST]"}, "[SYSTEM_PROMPT]"},
    {"mistral-v3", {"[INST] ", "[/INST]"}, "[SYSTEM_PROMPT]"},
};

static bool has(const char *p, size_t len, const char *what)
{
    return memmem(p, len, what, strlen(what));
}

const char *template_recognise(const char *jinja, size_t len)
{
    for (size_t i = 0; i < sizeof marks / sizeof marks[0]; i++) {
        const struct mark *m = &marks[i];

        if (has(jinja, len, m->writes[0]) && (!m->writes[1] || has(jinja, len, m->writes[1])) &&
            !(m->never && has(jinja, len, m->never)))
            return m->name;
    }
    return NULL;
}
