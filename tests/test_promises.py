"""The page of promises names tests that exist."""

import pathlib
import re

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
