"""claims.py - tests as claims in TAP, and the README's code blocks."""
import contextlib
import os
import re
import sys
import traceback

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
CACHE = os.path.join(os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache")), "larder")
MODEL = os.path.join(CACHE, "SmolLM2-135M-Instruct.Q4_1.gguf")
_claims = []


class Skip(Exception):
    pass


def claim(function):
    _claims.append(function)
    return function


def run_claims(around=contextlib.nullcontext):
    """Run what was claimed, in order, each within around(); the process's exit status."""
    failed = 0
    for f in _claims:
        name = f.__name__.replace("_", " ")
        try:
            with around():
                said = f()
            print("ok - %s%s" % (name, ": " + said if said else ""), flush=True)
        except Skip as why:
            print("ok - %s # SKIP %s" % (name, why), flush=True)
        except Exception:
            failed += 1
            traceback.print_exc()
            print("not ok - " + name, flush=True)
    return 1 if failed else 0


def raises(error, function, *args, **kwargs):
    """The error that a call raises, which must be one of this class."""
    try:
        function(*args, **kwargs)
    except error as why:
        assert type(why) is error, repr(why)
        return str(why)
    raise AssertionError("%s was not raised" % error.__name__)


def readme_block(first_words):
    """The Python block of README.md that starts with these words, with the model's path put in."""
    with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as f:
        blocks = re.findall(r"^```python\n(.*?)^```", f.read(), re.S | re.M)
    found = [b for b in blocks if b.startswith(first_words)]
    assert len(found) == 1, "README.md has %d such blocks" % len(found)
    return found[0].replace("/path/to/model.gguf", MODEL)


sys.dont_write_bytecode = True
