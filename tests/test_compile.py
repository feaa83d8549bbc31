"""The expert kernels of a decode step are compiled for GPUs that are not here."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from helpers import ROOT

pytest.importorskip("triton", reason="kernels need triton")
from registers import count_writes


class Program(NamedTuple):
    """A compiled kernel: bytes of shared memory, those that a thread writes to it in each step, the orders of its products' inputs.

    And how many 16 bytes a thread requests before it waits for the kernel before, and the two numbers of `registers.overwritten`.
    """

    arch: int
    case: str
    shared: int
    room: int
    hopper: bool
    stored: int
    orders: list[str]
    requested: int
    overwritten: int
    decoded: int


def made_by(script: str, folder: Path) -> list[list]:
    """What a script of this folder prints as JSON, run outside the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder)
    command = [sys.executable, str(Path(__file__).parent / script)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> list[Program]:
    """All expert kernels, by one process."""
    return [Program(*one) for one in made_by("compile_experts.py", tmp_path_factory.mktemp("triton"))]


def test_tables_of_many_experts_stay_in_registers(tmp_path: Path) -> None:
    """48 x 512 experts: a program that kept all of them in registers spilled 34 kB a thread, and compiled for 20 seconds."""
    spilled = {(arch, name): size for arch, name, size in made_by("compile_tables.py", tmp_path)}
    assert {(80, "look_ahead"), (90, "run_layer"), (90, "_fetch_kernel")} <= spilled.keys()
    assert not {case: size for case, size in spilled.items() if size > 256}


def test_blocks_ask_for_weights_before_they_wait(tmp_path: Path) -> None:
    """Blocks fit, keep everything in registers, and on Hopper request most of what they read before the kernel before them has ended."""
    made = {(arch, case): rest for arch, case, *rest in made_by("compile_blocks.py", tmp_path)}
    assert {arch for arch, _ in made} == {80, 86, 90}
    assert all(shared <= room and not spilled for shared, room, spilled, _ in made.values())
    for case in ("row 2880", "route 2880", "row 7168", "gated row 2880", "gated row 7168"):
        before, behind = made[90, case][3]
        assert before > 3 * behind > 0, case


def test_the_sampler_stays_in_registers(tmp_path: Path) -> None:
    """Its passes keep 16 sums of 256 tokens a program; all of its kernels compile for Ampere and Hopper and spill nothing."""
    spilled = {(arch, name): size for arch, name, size in made_by("compile_sampling.py", tmp_path)}
    assert {(80, "_sum"), (90, "_sum"), (90, "_pick"), (90, "_survey")} <= spilled.keys()
    assert not any(spilled.values())


def test_kernels_compile_for_gpus_that_are_not_here(programs: list[Program]) -> None:
    """Each tiling fits into the shared memory of its device; Hopper's own products are used on Hopper alone."""
    assert {program.arch for program in programs} == {80, 86, 89, 90}
    too_much = [program for program in programs if program.shared > program.room]
    assert not too_much
    assert all(program.hopper == (program.arch >= 90) for program in programs)


def test_decoded_tiles_stay_in_registers(programs: list[Program]) -> None:
    """Steps of mxfp4 and int4 write nothing to shared memory: a tile that is decoded elsewhere than it is used goes through it."""
    stored = {(program.case, program.arch): program.stored for program in programs}
    for case, arch in itertools.product(("mxfp4 up", "int4 up", "int4 with zeros up"), (80, 90)):
        assert stored[case, arch] == 0, (case, arch)
    assert stored["mxfp4 down", 90] == stored["int4 down", 90] == 0
    assert stored["plain of gpt-oss up", 80] > 0  # turned round on its way to the tensor cores: such stores are seen


def test_products_take_inputs_in_one_order(programs: list[Program]) -> None:
    """Bits depend on the order; before Hopper a compiler chooses it by what a tile was made from, and so could differ by format."""
    found = {(program.case, program.arch): program.orders for program in programs if program.arch < 90}
    assert found["plain up", 80] == ["2"]
    assert not {key: orders for key, orders in found.items() if orders != ["2"]}


def test_no_register_is_written_that_a_product_reads(programs: list[Program]) -> None:
    """Weights that are decoded in registers stay there until Hopper's tensor cores have read them."""
    assert not {program.case: program.overwritten for program in programs if program.overwritten}
    hopper = {program.case: program.decoded for program in programs if program.arch == 90}
    assert all(hopper[case] for case in ("int4 down many", "fp8 down many", "mxfp4 down alone", "awq down"))


@pytest.mark.parametrize(("left", "writes"), [(0, 0), (1, 1)])
def test_writes_are_counted_until_a_product_is_waited_for(left: int, writes: int) -> None:
    """A group of products that may be under way holds four registers of weights for each product."""
    product = "HGMMA.64x16x16.F32.BF16 R24, R92, gdesc[UR8], R24, gsb0"
    lines = [product, f"WARPGROUP.DEPBAR.LE gsb0, 0x{left:x}", "MOV R95, 0x43004300", "MOV R96, R95", "STS [R92], R2"]
    assert count_writes(lines) == writes


def test_down_requests_codes_before_it_waits(programs: list[Program]) -> None:
    """On Hopper one or two steps of 64 outputs by 128 inputs: while what they are multiplied with is still computed."""
    found = {program.case: program.requested for program in programs if program.arch == 90}
    assert {case: found[f"{case} down alone"] for case in ("mxfp4", "int4", "fp8", "nvfp4")} == {
        "mxfp4": 4,
        "int4": 4,
        "fp8": 4,
        "nvfp4": 2,
    }
    assert found["mxfp4 down"] == 4
    assert (
        found["mxfp4 up alone"] == found["plain of gpt-oss up"] == 0
    )  # which slots are read is known only behind the wait
