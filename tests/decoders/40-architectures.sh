#!/bin/bash
# Small random models of every architecture: transformers, and llama.cpp where it can, go on from
# their stored caches as larder's own decoder does.
. "$(dirname "$0")/../e2e/lib.sh"
. tests/decoders/peers.sh
need torch transformers gguf llama_cpp numpy
names="llama3 mistral qwen2 qwen2-sliding qwen3 phi3 phi3-longrope"
made=$dir/made

claim "the models are made" "$python" tests/models/make_models.py "$made" $names
# as transformers itself writes them today, and as they are
claim "and saved by transformers" "$python" tests/decoders/resave.py "$made" $names
models=()
for m in $names; do models+=(--model "$m=$made/$m" --model "$m.saved=$made/$m.saved"); done
for m in qwen2 qwen3 mistral; do models+=(--model "$m.file=$made/$m.gguf"); done
claim "the daemon starts" start_daemon "${models[@]}"

# The first 290 tokens as a document, and 32 greedy ones behind the next ten.
stored() { # MODEL NAME POLICY
    larder put --tokens "$made/${1%.*}.document" --model "$1" --name "$2" --policy "$3" --wait &&
        larder ask "$2" --tokens "$made/${1%.*}.question" --max-new 32 --ignore-eos --json \
            >"$dir/answers/$2"
}
same_answer() { # MODEL: what was saved is the same model
    stored "$1.saved" "$1.saved.full" full &&
        same answer "$(field generated_ids <"$dir/answers/$1.saved.full")" \
            "$(field generated_ids <"$dir/answers/$1.full")"
}
for m in $names; do
    claim "$m: a document is stored whole" stored "$m" "$m.full" full
    claim "$m: what transformers saved answers the same" same_answer "$m"
    claim "$m: and pruned, heads ragged" stored "$m" "$m.ragged" adakv,rows=50%
done
for m in llama3 qwen2 qwen3 phi3-longrope; do # these have no window, so they can be repeated
    claim "$m: and with biases" stored "$m" "$m.biased" matching,rows=50%,shape=uniform
done
for m in qwen2 qwen3 mistral; do
    claim "$m: as GGUF" stored "$m.file" "$m.file" full
done
export LARDER_MADE=$made
"$python" tests/decoders/architecture_claims.py $names || rc=1
exit $rc
