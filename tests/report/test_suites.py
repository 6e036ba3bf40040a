"""The report's section about suites."""

import typing

from armd_jax.evaluation import suites_results
from armd_jax.evaluation.suites_results import Suites
from armd_jax.names import SuiteProtocol
from armd_jax.report import suites


def test_the_section_has_every_protocol_and_says_what_was_published_for_other_models():
    """The paper's figures are never shown without that they are of other training data and sizes."""
    figures = []
    for protocol in typing.get_args(SuiteProtocol):
        figures.append(
            suites_results.Figure(
                protocol=protocol,
                set="wikitext103",
                split="test",
                published=True,
                source="wikitext103/test.txt",
                records=1,
                words=2,
                bytes=3,
                unknown=4,
                text_tokens=5,
                chunk=8,
                added=0,
                chunks=1,
                dropped=0,
                limited=False,
                bound=False,
                draws=1,
                score=suites_results.counted(16.0, 8),
            )
        )
    html = suites.section(Suites(length=8, documents_apart=False, seed=0, figures=tuple(figures)))
    assert "Protocol sedd" in html and "Protocol mdlm" in html and "chunks of 6 between" in html
    assert html.count("7.39") == 2 and "with &lt;unk&gt; in the text" in html
    assert html.index("Published, for other training data and sizes") < html.index("138.43")
    assert "belong to the protocol of SEDD and RADD (sedd)" in html and "which split of WikiText-2 was taken" in html
