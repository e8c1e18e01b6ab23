"""llama_ids.py GGUF < LINES: token ids by llama.cpp, lines as encode.c reads them.

Runs in the environment of the benchmark's peers (tests/bench/setup-peers.sh)."""
import sys

from llama_cpp import Llama

model = Llama(sys.argv[1], vocab_only=True, verbose=False)
for line in sys.stdin:
    special, _, text = line.partition(" ")
    ids = model.tokenize(bytes.fromhex(text), add_bos=False, special=special == "1") if text.strip() else []
    print(*ids)
