"""The page of promises names tests that exist."""

import pathlib
import re
import runpy

TESTS = pathlib.Path(__file__).parent


def test_every_promise_has_its_test():
    """Each row of README.md names at least one file of tests, and each named test is defined there."""
    rows = [line for line in (TESTS / "README.md").read_text().splitlines() if line.startswith("| ")]
    rows = [row for row in rows if not row.startswith("| Promise")]
    assert len(rows) > 25
    for row in rows:
        named = re.findall(r"`([\w/]+\.py)(?:::(\w+))?`", row)
        assert named, row
        for file, test in named:
            text = (TESTS / file).read_text()
            assert not test or f"\ndef {test}(" in text, f"{file}::{test}"


def test_every_mutation_fits_the_code():
    """Each break of mutations.py can be made: its text is in the file once, and its tests exist."""
    mutations = runpy.run_path(str(TESTS / "mutations.py"))["MUTATIONS"]
    assert len(mutations) >= 27 and len({one.promise for one in mutations}) == len(mutations)
    for one in mutations:
        assert (TESTS.parent / "armd_jax" / one.file).read_text().count(one.old) == 1, one.promise
        for place in one.tests.split():
            file, _, test = place.partition("::")
            assert not test or f"\ndef {test}(" in (TESTS / file).read_text(), place
