#!/usr/bin/env python3
"""resave.py MADE NAME... - NAME.saved beside NAME, as this release of transformers writes a model;
and the tokens of a document and a question, as files."""
import json
import os
import shutil
import sys

import transformers

N_DOCUMENT, N_QUESTION = 290, 10


def main():
    made, names = sys.argv[1], sys.argv[2:]
    for name in names:
        folder = os.path.join(made, name)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        model.save_pretrained(folder + ".saved")
        shutil.copy(os.path.join(folder, "tokenizer.json"), folder + ".saved")
        with open(folder + ".json", encoding="utf-8") as f:
            ids = json.load(f)["ids"]
        for what, part in (("document", ids[:N_DOCUMENT]), ("question", ids[-N_QUESTION:])):
            with open("%s.%s" % (folder, what), "w", encoding="utf-8") as f:
                f.write(" ".join(map(str, part)))


if __name__ == "__main__":
    main()
