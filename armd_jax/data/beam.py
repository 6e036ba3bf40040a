"""Parts of a corpus made by an Apache Beam pipeline (extra `beam`): on this machine, or on what its options name."""

import contextlib
import dataclasses
import functools
import io
import re
from collections.abc import Sequence

from armd_jax.data import parts
from armd_jax.errors import UserError


def make_parts(work: parts.Work, workers: int, flags: Sequence[str]) -> None:
    """Makes the parts of a work that are not there yet. All workers must see the text and the place of the parts.

    workers: processes that tokenize one part. flags: Beam's own pipeline options.
    Raises UserError if a part cannot be made, or if there is no Beam.
    """
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise UserError('--beam: to run it, install the extra beam: pip install "armd-jax[beam]"') from error
    work.identity(0, work.corpus())  # says what is wrong with the text or the tokenizer before a pipeline does
    work.tokenizer()
    work = dataclasses.replace(work, out=work.out.absolute())  # workers may be in another folder
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            options = PipelineOptions(list(flags))
            options.get_all_options()  # reads the flags
    except SystemExit as error:
        raise UserError(f"--beam-flag: Beam takes no such options: {' '.join(flags)}") from error
    try:
        with beam.Pipeline(options=options) as pipeline:
            numbers = pipeline | "part numbers" >> beam.Create(range(work.count))
            spread = numbers | "to all workers" >> beam.Reshuffle()
            spread | "make parts" >> beam.Map(functools.partial(_make, work, workers))
    except Exception as error:  # each runner wraps what a step raises in something of its own
        found = re.findall(r"UserError: ([^\n]*)", f"{type(error).__name__}: {error}")
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise UserError(f"the pipeline failed: {found[-1] if found else lines[-1]}") from error


def _make(work: parts.Work, workers: int, number: int) -> int:
    parts.prepare_part(work, number, workers, shown=False)
    return number
