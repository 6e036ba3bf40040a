"""The result of `armd compile` as JSON and as text, without compiling anything."""

import dataclasses

import pytest

from armd_jax import typed
from armd_jax.compilation.bill import Bill
from armd_jax.compilation.result import CollectiveTotal, CompileResult, Memory, Sampling, Work, as_text
from armd_jax.compilation.roofline import RooflineSeconds
from armd_jax.names import CompiledProgram

WORK = Work(
    collectives=(CollectiveTotal("all-gather", 12, 3 * 2**30, 2**30, True),),
    attention_kernels={"splash_mha_fwd_residuals": 2},
    executed_flops=3e12,
    hbm_traffic_bytes=1e9,
    roofline_seconds=RooflineSeconds(0.25, 0.5, 0.125, 0.0),
    predicted_step_seconds=0.5,
    predicted_mfu=0.25,
    predicted_ar_mfu=0.2,
    unknown_loops=0,
    limiting_term="memory",
    hlo_instructions=5649,
)
BILL = Bill(1000, 10**9, (0.5, 1.0), (1.25, 2.5), 0.5, "a source", 4.0, (5.0, 10.0))
FITTING = CompileResult(
    config="experiments/small.py",
    what="train",
    topology="v5e:2x2",
    slices=2,
    chips=8,
    mesh={"data": 2, "fsdp": 4, "tensor": 1},
    vocab_size=257,
    hbm_bytes=16 * 2**30,
    model_flops=2e12,
    ar_model_flops=1.6e12,
    compile_seconds=1.5,
    memory=Memory(2**30, 2**30, 2**31, 3 * 2**30),
    work=WORK,
    bill=BILL,
)
SHARED_KEYS = ["config", "what", "topology", "slices", "chips", "mesh", "vocab_size", "hbm_bytes"]
SHARED_KEYS += ["predicted_ar_mfu", "bill"]
SHARED_KEYS += [
    "model_flops",
    "ar_model_flops",
    "compile_seconds",
    "fits",
    "argument_bytes",
    "output_bytes",
    "temp_bytes",
    "peak_bytes",
]
SHARED_KEYS += ["collectives", "attention_kernels", "predicted_step_seconds", "predicted_mfu", "limiting_term"]
SHARED_KEYS += ["suggestion"]
WORK_KEYS = ["unknown_loops", "executed_flops", "hbm_traffic_bytes", "roofline_seconds", "hlo_instructions"]


def test_json_of_a_program_that_fits():
    """One flat object: figures of memory and work stand beside the others; a sampler adds its batch and streams."""
    values = FITTING.as_dict()
    assert FITTING.fits and set(values) == {*SHARED_KEYS, *WORK_KEYS}
    assert (values["fits"], values["peak_bytes"], values["limiting_term"]) == (True, 3 * 2**30, "memory")
    assert values["roofline_seconds"] == {"compute": 0.25, "memory": 0.5, "interconnect": 0.125, "network": 0.0}
    gather = {"kind": "all-gather", "count": 12, "bytes": 3 * 2**30, "sent_bytes": 2**30, "between_slices": True}
    assert list(values["collectives"]) == [gather]
    assert values["bill"]["chip_hours"] == (1.25, 2.5) and values["bill"]["cost"] == (5.0, 10.0)
    sampled = dataclasses.replace(FITTING, what="sample", sampling=Sampling(4, 8)).as_dict()
    assert set(sampled) == {*values, "batch", "streams"} and (sampled["batch"], sampled["streams"]) == (4, 8)


def test_json_of_a_program_that_does_not_fit():
    """The keys that a reader always finds are there, without figures of a program that was never made."""
    values = dataclasses.replace(FITTING, work=None, bill=None, suggestion="--topology=v5e:4x4").as_dict()
    assert set(values) == set(SHARED_KEYS)
    assert (values["fits"], values["collectives"], values["attention_kernels"]) == (False, [], {})
    assert values["predicted_step_seconds"] is values["predicted_mfu"] is values["limiting_term"] is None
    assert values["predicted_ar_mfu"] is values["bill"] is None
    assert values["suggestion"] == "--topology=v5e:4x4"


def test_text_of_a_program_that_fits():
    """The same figures, for people."""
    lines = as_text(FITTING).splitlines()
    assert lines[0].startswith("experiments/small.py (train) on v5e:2x2 x 2 slices: 8 chips, mesh data 2 x fsdp 4")
    assert "yes: peak 3.00 GiB of 16.00 GiB per chip" in lines[1]
    assert " ".join(lines[2].split()) == "all-gather between slices 12 times 3.00 GiB, sent 1.00 GiB"
    assert "2.000e+12 of the model's own mathematics, executed 3.000e+12" in lines[4]
    assert "1.600e+12 of an autoregressive model" in lines[5]
    assert "at best 500.00 ms, MFU 25.0% (AR 20.0%), limited by memory; a bound" in " ".join(lines[7].split())
    assert "1,000 steps, 1,000,000,000 tokens: 1.2 to 2.5 chip-hours, 0.1 to 0.3 hours on 8 chips" in lines[8]
    assert "the bound / 50.00% (a source)" in lines[9] and "USD 5 to 10 at USD 4 per chip-hour" in lines[10]


def test_a_figure_that_is_not_known_is_not_printed():
    """With loops that nothing is known of, there is no utilisation and no bill."""
    work = dataclasses.replace(WORK, predicted_mfu=None, predicted_ar_mfu=None, unknown_loops=3)
    text = as_text(dataclasses.replace(FITTING, work=work, bill=None))
    assert "MFU unknown (3 loops count once" in text and "chip-hours" not in text


@pytest.mark.parametrize("what", typed.choices(CompiledProgram))
def test_text_of_a_program_that_does_not_fit_says_what_to_try(what):
    """Each program has its own advice, and for a training step a slice that would do is named."""
    result = dataclasses.replace(FITTING, what=what, work=None, bill=None)
    fits, advice = as_text(result).splitlines()[1:]
    assert "NO: peak 3.00 GiB" in fits and advice.startswith("  try  ")
    suggested = as_text(dataclasses.replace(result, suggestion="--topology=v5e:4x4"))
    assert ("--topology=v5e:4x4" in suggested) == (what == "train")
