#!/bin/bash
# What stands around a document: set in larder.conf or asked for, stored, shown, and used again for
# its questions. Prompts are written out here as the model's own chat template would render them.
. "$(dirname "$0")/lib.sh"
mkdir -p "$dir/d/store"
# spaces at its ends, and what would end its turn if it were more than text
printf '  The code of the red door is 4711.<|im_end|>\nThe blue one has none. \n' >"$dir/doc"
question="Which door has a code?"

config() { # TEMPLATE
    cat >"$dir/conf" <<CONF
store = $dir/d/store
socket = $dir/d/larder.sock
worker_socket = $dir/d/worker.sock
model smollm2 {
    path = $model
    policy = full
    template = $1
}
CONF
}

starts() { launch_daemon --config "$dir/conf"; }

refused() { # TEMPLATE TEXT: the daemon does not start and says so
    config "$1"
    if timeout 60 "$build/larderd" --config "$dir/conf" >"$dir/o" 2>"$dir/e"; then return 1; fi
    grep -q -- "$2" "$dir/e" || { cat "$dir/e"; return 1; }
}
claim "a template that nobody knows is an error at start" refused vicuna "no template is named 'vicuna'"
claim "so is an option that it does not take" refused chatml,turn=tool "not 'turn=tool'"
claim "and a turn that it does not have" refused plain,turn=system "no system turn"
long=$(printf '%0300d' 0)
claim "and a text that is too long" refused "chatml,prefix=$long" "at most 255"

cat >"$dir/ids.py" <<'PY'
# The ids of a text with turns: special tokens, and what stands between them by itself.
# ids.py PREFILL MODEL OUT: text on standard input; special literals in {braces}, {} where it is cut
import json, re, subprocess, sys
special = {"{<|im_start|>}": [1], "{<|im_end|>}": [2], "{}": []}
parts = re.split(r"(\{<\|im_(?:start|end)\|>\}|\{\})", sys.stdin.read())
with open(sys.argv[3] + ".texts", "w") as f:
    f.writelines(json.dumps({"text": p}) + "\n" for p in parts if p and p not in special)
lines = iter(subprocess.run([sys.argv[1], "tokenize", "--model", sys.argv[2], "--strings", f.name], check=True,
                            stdout=subprocess.PIPE, text=True).stdout.splitlines())
ids = [special[p] if p in special else [int(i) for i in next(lines).split()] for p in parts if p]
with open(sys.argv[3], "w") as f:
    print(*sum(ids, []), file=f)
PY
ids() { python3 "$dir/ids.py" "$build/larder-prefill" "$model" "$1"; }

# NAME BEFORE BETWEEN AFTER: an entry's text, its tokens and those of a question. What stands before
# a document is tokenised by itself.
prompt() {
    { printf '%b' "$2" | sed 's/[{}]//g'; cat "$dir/doc"; } >"$dir/text"
    { printf '%b{}' "$2"; cat "$dir/doc"; } | ids "$dir/tokens" && printf '%b%s%b' "$3" "$question" "$4" | ids "$dir/question" || return
    larder show "$1" --text >"$dir/shown" && cmp "$dir/shown" "$dir/text" || return
    same tokens "$(larder show "$1" --tokens | tr '\n' ' ' | sed 's/ *$//')" "$(cat "$dir/tokens")" || return
    larder ask "$1" "$question" --max-new 4 --json >"$dir/a" || return
    same question "$(field question_ids <"$dir/a" | tr -d '[],')" "$(cat "$dir/question")"
}
# NAME TEMPLATE: as after a prefill of the document with it
as_prefilled() {
    larder ask "$1" "$question" --max-new 4 --json >"$dir/a" &&
        larder ask --file "$dir/doc" --template "$2" "$question" --max-new 4 --json >"$dir/b" &&
        same question "$(field question_ids <"$dir/a")" "$(field question_ids <"$dir/b")" &&
        same answer "$(field generated_ids <"$dir/a")" "$(field generated_ids <"$dir/b")"
}
S='{<|im_start|>}' E='{<|im_end|>}'

system='chatml,turn=system,prefix=Answer from this text\, and nothing else:\n,suffix=\n\sBe brief.'
config "$system"
claim "a daemon starts whose model has a template of its own" starts
told() { same template "$(larder status --json | field models.0.template)" "$system"; }
claim "and tells it" told
put() { larder put "$dir/doc" --name "$1" --wait ${2:+--template "$2"}; }
claim "a document is stored in the system turn" put configured
before="${S}system\nAnswer from this text, and nothing else:\n"
after="$E\n${S}assistant\n"
claim "with the configured words around it, and its questions in a turn of their own" \
    prompt configured "$before" "\n Be brief.$E\n${S}user\n" "$after"
claim "a question finds it as after a prefill" as_prefilled configured "$system"
says() { same template "$(larder show "$1" --json | field template)" "$2" && larder show "$1" | grep -qF "$2"; }
claim "the entry says how" says configured "$system"

own="You are a helpful AI assistant named SmolLM, trained by Hugging Face"
claim "another template can be asked for" put asked smollm2
claim "the document stands in the user's turn, before the question" \
    prompt asked "${S}system\n$own$E\n${S}user\n" "\n\n" "$after"
claim "and the entry says so" says asked smollm2
user='chatml,prefix=The\ttext:\n,suffix=\nQuestion:\s'
claim "words may stand around it there, too" put around "$user"
claim "before it, and between it and the question" prompt around "${S}user\nThe\ttext:\n" "\nQuestion: " "$after"
claim "a question finds it as after a prefill" as_prefilled around "$user"
claim "or nothing stands around it" put plain plain
claim "nothing at all" prompt plain "" "\n\n" ""
apart() { same keys "$(larder ls | cut -f1-99 | grep -oE '[0-9a-f]{64}' | sort -u | wc -l)" 4; }
claim "each of these is an entry of its own" apart
again() { same result "$(larder put "$dir/doc" --name more --wait --template "$user" --json | field result)" already_stored; }
claim "the same words are the same entry" again
other() { same reason "$(larder explain-miss --file "$dir/doc" --template llama3 --json | field reason)" other_template; }
claim "a miss says that the template is another" other
bad() { fails_with "$1" put bad "$2"; }
claim "a put with a template that nobody knows is refused" bad LARDER_E vicuna
claim "and one with an option that it does not take" bad LARDER_E 'chatml,middle=x'
claim "the daemon still answers" larder status
exit $rc
