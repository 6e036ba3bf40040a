"""Detokenisers: each rule on lines such as their corpora have, and what must not change."""

import pytest

from armd_jax.evaluation import detokenizers

WIKITEXT = [
    (" = Robert Boulter = \n", " = Robert Boulter =\n"),
    (" = = Career = = \n", " == Career ==\n"),
    (" = = = 2000 – 2005 = = = \n", " === 2000 – 2005 ===\n"),
    (" = = = = Sets = = = = \n", " ==== Sets ====\n"),
    ("a guest @-@ starring role in the £ 1 @,@ 500 @.@ 50 play", "a guest-starring role in the £ 1,500.50 play"),
    ("film , television ; that is : yes . No ! Why ? So", "film, television; that is: yes. No! Why? So"),
    ('a role as " Craig " in the episode', 'a role as "Craig" in the episode'),
    ("( born 1982 ) and [ sic ] or { a set }", "(born 1982) and [sic] or {a set}"),
    ("Teddy 's Story of the players ' union", "Teddy's Story of the players' union"),
    ("at 23 ° 30 and N people", "at 23°30 and 1 people"),
    ("Fraser <unk> , Sophie", "Fraser <unk>, Sophie"),
    ("", ""),
]
PTB = [
    ("the company 's board did n't act", "the company's board didn't act"),
    ("its shareholders ' meeting", "its shareholders' meeting"),
    ("rose N N to $ N million from # N up", "rose 1 1 to $1 million from #1 up"),
    ("a 1\\/2 share of <unk> corp", "a 1/2 share of ? corp"),
    ("mr. N is chairman of <unk> n.v.", "mr. 1 is chairman of ? n.v."),
    ("N of them and the last N", "N of them and the last N"),  # at the ends of a line, the rule does not match
]
LM1B = [
    ("see http : / / example.org and https : / / a.org", "see http://example.org and https://a.org"),
    ("It 's what they 've said .", "It's what they've said."),
    ("He left . She stayed ? Yes ! Now , or : never ; and / or", "He left. She stayed? Yes! Now, or: never; and/or"),
    ("Is it true ?", "Is it true?"),
    ("What a day !", "What a day!"),
    ('He said " we won " today', 'He said "we won" today'),
    ("the old one ( or two ) [ sic ] costs $ 5 or £ 3", "the old one (or two) [sic] costs $5 or £3"),
    ('an inch " is not a quote', 'an inch " is not a quote'),
]
PAPERS = [("the ' old ' method ( see [ 3 ] ) costs $ 5 , it works .", "the'old' method (see [3]) costs $5, it works.")]
LAMBADA = [("  “Where?” she asked, and saw the dog \n", '\n"Where?" she asked, and saw the dog')]
RULES = {
    detokenizers.wikitext: WIKITEXT,
    detokenizers.ptb: PTB,
    detokenizers.lm1b: LM1B,
    detokenizers.papers: PAPERS,
    detokenizers.lambada: LAMBADA,
    detokenizers.unchanged: [("Oil , and more \\/", "Oil , and more \\/")],
}
CASES = [(rule, text, expected) for rule, lines in RULES.items() for text, expected in lines]


@pytest.mark.parametrize(
    ("rule", "text", "expected"), CASES, ids=[f"{rule.__name__} {text}" for rule, text, _ in CASES]
)
def test_every_rule(rule, text, expected):
    """On a line that exercises it, together with the text around it."""
    assert rule(text) == expected


@pytest.mark.parametrize(
    ("rule", "text", "expected"), CASES, ids=[f"{rule.__name__} {text}" for rule, text, _ in CASES]
)
def test_what_is_undone_stays_so(rule, text, expected):
    """A second time, a rule finds nothing to do: text that was never tokenised like that is left alone."""
    assert rule(expected) == expected


def test_quotes_of_lm1b_are_closed_once():
    """A second time, the opening apostrophe would be taken for that of a contraction, as in the published rules."""
    assert detokenizers.lm1b("the ' old ' one") == "the 'old' one"


def test_ordinary_text_is_left_alone():
    """Text of the web has nothing that the rules look for."""
    text = "It's \"fine\" (really); isn't it? 1,500.50 / 2 = 750.25: see http://a.org/b.\n"
    for rule in (detokenizers.wikitext, detokenizers.ptb, detokenizers.unchanged):
        assert rule(text) == text
