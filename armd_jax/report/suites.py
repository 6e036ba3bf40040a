"""The section of the report about zero-shot suites, with figures that papers report beside them."""

from armd_jax.evaluation import suites_results
from armd_jax.evaluation.results import formatted
from armd_jax.evaluation.suites_results import Suites
from armd_jax.report import markup


def section(found: Suites) -> str:
    """HTML of the tables of every protocol, LAMBADA's last words, and published figures."""
    parts = [markup.heading("Texts that it was not trained on")]
    for protocol in dict.fromkeys(figure.protocol for figure in found.figures):
        parts.append(markup.note(f"Protocol {suites_results.heading(protocol, found)}."))
        rows = [suites_results.cells(figure) for figure in found.figures if figure.protocol == protocol]
        parts.append(markup.table(suites_results.HEADER, rows))
    if found.last_word is not None:
        parts.append(markup.note(suites_results.last_word_line(found.last_word)))
    parts += [markup.note(line) for line in suites_results.notes(found)]
    published = [[name, *(formatted(value, 2) for value in row)] for name, row in suites_results.PUBLISHED.items()]
    parts.append(
        markup.note(
            "Published, for other training data and sizes: models trained on OpenWebText with GPT-2's vocabulary in"
            " rows of 1,024, as Karami & Ghodsi (2026) report them. They belong to the protocol of SEDD and RADD (sedd)"
            " and cannot be compared with figures of mdlm; the papers do not say which split of WikiText-2 was taken."
        )
    )
    parts.append(markup.table(["model", *suites_results.PUBLISHED_SETS], published))
    return "".join(parts)
