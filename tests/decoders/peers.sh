# peers.sh - sourced after lib.sh: the Python that has a decoder's library, or a loud skip, and
# what larder's own decoder answers.
python=${LARDER_PEERS_PYTHON:-${XDG_CACHE_HOME:-$HOME/.cache}/larder/decoders/bin/python}
question="What is the name of the programming language?"

need() { # MODULE...
    for m in "$@"; do
        "$python" -c "import importlib.util as u, sys; sys.exit(u.find_spec('$m') is None)" 2>/dev/null && continue
        echo "no $m for $python; run: sh tests/bench/setup-peers.sh decoders" >&2
        exit 77
    done
    case $build in /*) LARDER_LIBRARY=$build/liblarder.so ;; *) LARDER_LIBRARY=$PWD/$build/liblarder.so ;; esac
    # Threads that spin for their fellows collapse when another process takes a core.
    export LARDER_LIBRARY PYTHONDONTWRITEBYTECODE=1 HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=passive
    export PYTHONPATH="$PWD/client/python${PYTHONPATH:+:$PYTHONPATH}" LARDER_ANSWERS="$dir/answers"
    mkdir -p "$dir/answers"
}

# Store the document, and keep 64 greedy tokens of larder's answer, end tokens and all.
stored() { # NAME POLICY
    larder put "$docs/doc_a700.txt" --name "$1" --policy "$2" --wait &&
        larder ask "$1" "$question" --max-new 64 --ignore-eos --json >"$dir/answers/$1"
}
