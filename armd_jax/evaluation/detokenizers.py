"""Detokenisers: they undo the tokenisation of evaluation corpora, so that their text looks like the text of the web.

Published zero-shot perplexities are of text that went through such rules before it was encoded; without them they
differ. These have the effect of the rules in the evaluation code of SEDD, RADD and MDLM, which are the same
character by character, because a rule that is better would give figures that nobody can compare. That code has one more
rule for WikiText, which is written between slashes and so matches nothing in ordinary text; it is left out. Each
function takes one record of a corpus, such as a line, and is pure.

Undoing is not exact: a text that had a space before its comma loses it, and `N`, which stands for a number in PTB,
becomes 1. So perplexities per word after it are of a text that differs a little from the corpus.
"""

import re


def wikitext(text: str) -> str:
    """WikiText: ` @-@ `, spaces before punctuation and inside brackets and quotes, headings, ` 's`."""
    text = text.replace("s '", "s'")
    for separator in "-,.":
        text = text.replace(f" @{separator}@ ", separator)
    for mark in ":;.!?,":
        text = text.replace(f" {mark} ", f"{mark} ")
    # Quotes pair up as they come: an apostrophe may be taken for the opening of what the next one closes.
    for opening, closing in ("()", "[]", "{}", '""', "''"):
        first, last = re.escape(opening), re.escape(closing)
        between = re.compile(rf"{first}\s*([^{last}]*?)\s*{last}")
        text = between.sub(lambda found, a=opening, b=closing: f"{a}{found[1]}{b}", text)  # type: ignore[misc]
    for equals in (4, 3, 2):
        text = text.replace(" ".join("=" * equals), "=" * equals)
    for spaced, joined in ((" ° ", "°"), (" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s")):
        text = text.replace(spaced, joined)
    return text


def ptb(text: str) -> str:
    """Penn Treebank: contractions, `\\/`, `N` for a number (becomes 1), `<unk>` (becomes a question mark)."""
    for spaced, joined in ((" 's", "'s"), ("s ' ", "s' "), (" n't", "n't"), (" \n ", "\n"), ("\\/", "/")):
        text = text.replace(spaced, joined)
    text = re.sub("(?<= )N(?= )", "1", text)
    for spaced, joined in (("$ 1", "$1"), ("# 1", "#1"), ("<unk>", "?")):
        text = text.replace(spaced, joined)
    return text


def lm1b(text: str) -> str:
    """One Billion Word: addresses, apostrophes, punctuation, quotes, brackets, currencies."""
    for scheme in ("http", "https"):
        text = text.replace(f"{scheme} : / / ", f"{scheme}://")
    text = re.sub(r" '(?=\w)", "'", text)
    for end in (" ", "$"):
        text = re.sub(rf"( \w+) (\.{end})", lambda found: found[1] + found[2], text)
    for mark in "?!":
        text = text.replace(f" {mark} ", f"{mark} ")
        text = re.sub(rf" \{mark}$", mark, text)
    for mark in ",:;":
        text = text.replace(f" {mark} ", f"{mark} ")
    text = text.replace(" / ", "/")
    for opening, closing in ('""', "''", "()", "[]"):
        first, last = re.escape(opening), re.escape(closing)
        inside = f"[^{first}{last}]+"
        text = re.sub(f"{first} ({inside}) {last}", lambda found: f"{found[0][0]}{found[1]}{found[0][-1]}", text)
    for sign in "$£":
        text = text.replace(f"{sign} ", sign)
    return text


def lambada(text: str) -> str:
    """LAMBADA: straight quotes, and a line feed in front."""
    return "\n" + straight(text)


def straight(text: str) -> str:
    """Straight double quotes, without spaces around the text."""
    return re.sub("[“”]", '"', text).strip()


def papers(text: str) -> str:
    """PubMed and arXiv: as WikiText, and then as One Billion Word."""
    return lm1b(wikitext(text))


def unchanged(text: str) -> str:
    """AG News, which is written as ordinary text."""
    return text
