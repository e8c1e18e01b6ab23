#!/usr/bin/env python3
"""The Python package on a real daemon with the entries `manual` (bf16) and `small` (int4)."""
import contextlib
import io
import subprocess
import sys
import time

import numpy as np

import larder
from claims import claim, raises, readme_block, run_claims
from larder import errors


@claim
def the_readme_example_does_what_it_says():
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(readme_block("import larder\n"), {})
    first, second = out.getvalue().splitlines()
    with larder.Client() as client, client.get("manual") as cache:
        assert first == "%d %d %d (%d, 64)" % (cache.n_ctx, cache.next_pos,
                                               cache.positions(0, 2)[-1], cache.n_rows[0, 2])
        assert second.startswith("['default/") and "default/note" in second
        raises(errors.NotFound, client.get, "note")


@claim
def entries_are_listed_looked_up_and_shown_alike():
    with larder.Client() as client:
        listed = {e.name: e for e in client.ls()}
        assert set(listed) == {"default/manual", "default/small"}
        for name, entry in listed.items():
            assert client.lookup(name) == client.lookup(entry.key) == entry
            shown = client.show(name, tokens=True)
            with client.get(name) as cache:
                assert shown["rows"] == cache.n_rows.tolist()
                assert shown["tokens"] == cache.tokens.tolist()
                assert shown["model_fingerprint"] == cache.model_fingerprint
                assert int(cache.n_rows.sum()) == entry.rows_total
        assert [e.name for e in client.ls(prefix="sm")] == ["default/small"]


@claim
def the_longest_stored_prefix_of_a_prompt_is_found():
    with larder.Client() as client, client.get("manual") as cache:
        for prompt, n in ((cache.prompt([1, 2, 3]), cache.n_ctx),
                          (cache.text + "And?", len(cache.text.encode()))):
            entry, matched = client.lookup_prefix(prompt, policy=client.lookup("manual").policy)
            assert entry.key == cache.key and matched == n


def nearest_even(x):
    """bf16 bits of finite float32."""
    bits = x.view(np.uint32)
    return ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


@claim
def packed_rows_are_the_expanded_ones_before_their_rounding():
    with larder.Client() as client, client.get("small", packed=True) as codes, \
            client.get("small") as wide:
        assert codes.dtype == "int4" and wide.dtype == "bf16"
        for layer in range(wide.n_layers):
            for head in range(wide.n_kv_heads):
                assert (nearest_even(codes.keys_f32(layer, head)) == wide.keys(layer, head)).all()
                assert (nearest_even(codes.values_f32(layer, head)) ==
                        wide.values(layer, head)).all()
                assert (codes.positions(layer, head) == wide.positions(layer, head)).all()


@claim
def views_outlive_the_removed_entry():
    with larder.Client() as client:
        client.put("A short text that is forgotten soon.", "gone", policy="full", wait=True)
        with client.get("gone") as cache:
            keys, copy = cache.keys(29, 2), cache.keys(29, 2).copy()
        client.rm("gone")
    assert (keys == copy).all() and keys.size


@claim
def a_decoder_that_dies_loses_its_lease_and_nothing_else():
    code = ("import larder, time; cache = larder.Client().get('manual'); "
            "print(cache.n_ctx, flush=True); time.sleep(600)")
    with larder.Client() as client, client.get("small") as mine:
        before = client.status()["images"]["leases"]
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as decoder:
            try:
                n_ctx = int(decoder.stdout.readline())
                assert client.status()["images"]["leases"] == before + 1
            finally:
                decoder.kill()
        while client.status()["images"]["leases"] != before:  # the test's limit ends a wait
            time.sleep(0.01)
        assert mine.keys(0, 0).size and len(list(client.ls())) == 2
        with client.get("manual") as cache:
            assert cache.n_ctx == n_ctx


@claim
def errors_of_a_real_daemon_are_the_documented_ones():
    with larder.Client() as client:
        raises(errors.NotFound, client.get, "nothing")
        raises(errors.UnknownModel, client.put, "text", "n", model="other")
        try:
            client.put("Some text.", "n", policy="nonsense", wait=True)
            raise AssertionError("a policy that does not exist was accepted")
        except errors.BadPolicy as why:
            assert "nonsense" in str(why)
        raises(errors.NotFound, client.job, 10 ** 9)


if __name__ == "__main__":
    sys.exit(run_claims())
