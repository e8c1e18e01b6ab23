/* calibration.c - the built-in texts, as bytes of the program: a service that calibrates a model
 * on its own must not depend on files that an installation could lack. sqlite.txt is the beginning
 * of a page of the documentation of SQLite (public domain); pantry.txt, prose, and register.txt,
 * single facts and numbers between lines that say nothing, were written for larder. */
#include "calibrate.h"

#define EMBED(symbol, path)                                                                        \
    __asm__(".pushsection .rodata\n"                                                               \
            ".hidden " #symbol ", " #symbol "_end\n"                                               \
            ".global " #symbol ", " #symbol "_end\n" #symbol ":\n"                                 \
            ".incbin \"" path "\"\n" #symbol "_end:\n"                                             \
            ".byte 0\n"                                                                            \
            ".popsection\n");                                                                      \
    extern const char symbol[], symbol##_end[]

EMBED(calibration_sqlite, "prefill/calibration/sqlite.txt");
EMBED(calibration_pantry, "prefill/calibration/pantry.txt");
EMBED(calibration_register, "prefill/calibration/register.txt");

struct calibration_text calibration_text(uint32_t i)
{
    static const struct {
        const char *name, *from, *to;
    } texts[CALIBRATION_TEXTS] = {
        {"built-in: sqlite", calibration_sqlite, calibration_sqlite_end},
        {"built-in: pantry", calibration_pantry, calibration_pantry_end},
        {"built-in: register", calibration_register, calibration_register_end},
    };

    return (struct calibration_text){texts[i].name, texts[i].from,
                                     (size_t)(texts[i].to - texts[i].from)};
}
