"""The result of `armd compile` as JSON and as text, without compiling anything."""

import dataclasses

import pytest

from armd_jax import typed
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
    limiting_term="memory",
    hlo_instructions=5649,
)
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
    compile_seconds=1.5,
    memory=Memory(2**30, 2**30, 2**31, 3 * 2**30),
    work=WORK,
)
SHARED_KEYS = ["config", "what", "topology", "slices", "chips", "mesh", "vocab_size", "hbm_bytes"]
SHARED_KEYS += ["model_flops", "compile_seconds", "fits", "argument_bytes", "output_bytes", "temp_bytes", "peak_bytes"]
SHARED_KEYS += ["collectives", "attention_kernels", "predicted_step_seconds", "predicted_mfu", "limiting_term"]
SHARED_KEYS += ["suggestion"]
WORK_KEYS = ["executed_flops", "hbm_traffic_bytes", "roofline_seconds", "hlo_instructions"]


def test_json_of_a_program_that_fits():
    """One flat object: figures of memory and work stand beside the others; a sampler adds its batch and streams."""
    values = FITTING.as_dict()
    assert FITTING.fits and set(values) == {*SHARED_KEYS, *WORK_KEYS}
    assert (values["fits"], values["peak_bytes"], values["limiting_term"]) == (True, 3 * 2**30, "memory")
    assert values["roofline_seconds"] == {"compute": 0.25, "memory": 0.5, "interconnect": 0.125, "network": 0.0}
    gather = {"kind": "all-gather", "count": 12, "bytes": 3 * 2**30, "sent_bytes": 2**30, "between_slices": True}
    assert list(values["collectives"]) == [gather]
    sampled = dataclasses.replace(FITTING, what="sample", sampling=Sampling(4, 8)).as_dict()
    assert set(sampled) == {*values, "batch", "streams"} and (sampled["batch"], sampled["streams"]) == (4, 8)


def test_json_of_a_program_that_does_not_fit():
    """The keys that a reader always finds are there, without figures of a program that was never made."""
    values = dataclasses.replace(FITTING, work=None, suggestion="--topology=v5e:4x4").as_dict()
    assert set(values) == set(SHARED_KEYS)
    assert (values["fits"], values["collectives"], values["attention_kernels"]) == (False, [], {})
    assert values["predicted_step_seconds"] is values["predicted_mfu"] is values["limiting_term"] is None
    assert values["suggestion"] == "--topology=v5e:4x4"


def test_text_of_a_program_that_fits():
    """The same figures, for people."""
    lines = as_text(FITTING).splitlines()
    assert lines[0].startswith("experiments/small.py (train) on v5e:2x2 x 2 slices: 8 chips, mesh data 2 x fsdp 4")
    assert "yes: peak 3.00 GiB of 16.00 GiB per chip" in lines[1]
    assert " ".join(lines[2].split()) == "all-gather between slices 12 times 3.00 GiB, sent 1.00 GiB"
    assert "500.00 ms, MFU 25.0%, limited by memory" in lines[-2]


@pytest.mark.parametrize("what", typed.choices(CompiledProgram))
def test_text_of_a_program_that_does_not_fit_says_what_to_try(what):
    """Each program has its own advice, and for a training step a slice that would do is named."""
    result = dataclasses.replace(FITTING, what=what, work=None)
    fits, advice = as_text(result).splitlines()[1:]
    assert "NO: peak 3.00 GiB" in fits and advice.startswith("  try  ")
    suggested = as_text(dataclasses.replace(result, suggestion="--topology=v5e:4x4"))
    assert ("--topology=v5e:4x4" in suggested) == (what == "train")
