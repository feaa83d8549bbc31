"""The assembly by which kernels decode codes of four and eight bits in registers: texts alone, which `tests/ptx.py` runs on arrays.

`$0` and on are results, two numbers of 16 bits each; behind them come a word of codes and what its numbers take. Must not know records.
"""

import triton.language as tl

_E2M1_PAIRS = (
    "and.b32 t, $4, 0x81C081C0;",
    "shl.b32 t, $4, 4;\nand.b32 t, t, 0x81C081C0;",
    "shf.l.wrap.b32 t, $4, $4, 10;\nand.b32 t, t, 0x81C081C0;",
    "shl.b32 t, $4, 6;\nand.b32 t, t, 0x80C080C0;\nshr.b32 u, $4, 2;\nlop3.b32 t, u, 0x01000100, t, 0xEA;",
)
"""Each pair of E2M1 codes of a word, as two bfloat16 numbers of 2 ** -126."""
_INT4_PAIRS = (
    "lop3.b32 t, $4, m, b, 0xEA;",
    *(f"shr.b32 t, $4, {shift};\nlop3.b32 t, t, m, b, 0xEA;" for shift in (4, 8, 12)),
)
"""Each pair of codes of 0 to 15, with the bits of `b` above them."""
_TINY_INT4_PAIRS = (
    "shl.b32 t, $4, 4;\nand.b32 t, t, 0x00F000F0;",
    "and.b32 t, $4, 0x00F000F0;",
    *(f"shr.b32 t, $4, {shift};\nand.b32 t, t, 0x00F000F0;" for shift in (4, 8)),
)
"""Each pair of them as two bfloat16 numbers of 2 ** -129: subnormal ones go on evenly into the least normal ones."""


def _program(head: str, pairs: tuple[str, ...], makes: tuple[str, ...]) -> tl.constexpr:
    """Assembly that takes each pair out of a word and makes a result of it, `$0` to `$3`."""
    body = [f"{pair}\n{make.format(place)}" for place, (pair, make) in enumerate(zip(pairs, makes, strict=True))]
    return tl.constexpr("\n".join(["{", head, *body, "}"]))


_POWER = ".reg .b32 t, u, k, z;\nmov.b32 k, 0x7E807E80;\nmov.b32 z, 0x80008000;"
E2M1 = _program(_POWER, _E2M1_PAIRS, ("fma.rn.bf16x2 t, t, k, z;\nfma.rn.bf16x2 ${}, t, $5, z;",) * 4)
"""Eight E2M1 codes of a word times a scale: four times two bfloat16 numbers. Adding -0 makes a product of a fused multiply-add, which
devices before sm_90 have too."""
E2M1_ONCE = _program(
    ".reg .b32 t, u, w, z;\nmov.b32 z, 0x80008000;\nprmt.b32 w, $5, 0, $6;\nmad.lo.u32 w, w, 0x80, 0x3F003F00;",
    _E2M1_PAIRS,
    ("fma.rn.bf16x2 ${}, t, w, z;",) * 4,
)
"""The same times an E8M0 scale of the four in `$5`, chosen by `$6`, to which the 2 ** 126 is added that codes lack."""

_TIMES_F32 = """fma.rn.bf16x2 t, t, k, z;
shl.b32 u, t, 16;
and.b32 t, t, 0xFFFF0000;
mov.b32 a, u;
mov.b32 b, t;
mul.rn.f32 a, a, SCALE;
mul.rn.f32 b, b, SCALE;
cvt.rn.bf16x2.f32 ${}, b, a;"""
E2M1_F32 = _program(
    _POWER.replace("\nmov.b32 k", "\n.reg .f32 a, b;\nmov.b32 k"),
    _E2M1_PAIRS,
    tuple(_TIMES_F32.replace("SCALE", scale) for scale in ("$5", "$5", "$6", "$6")),
)
"""The same times two scales in float32, one for the first and one for the second 16 inputs, rounded to bfloat16."""

E2M1_BY_PAIR = _program(
    """.reg .b32 t, u, v, w, j, z;
mov.b32 z, 0x80008000;
add.u32 j, $6, 0x0101;
prmt.b32 v, $5, 0, $6;
mad.lo.u32 v, v, 16, 0x77007700;
prmt.b32 w, $5, 0, j;
mad.lo.u32 w, w, 16, 0x77007700;""",
    _E2M1_PAIRS,
    tuple(
        f"fma.rn.bf16x2 t, t, {scale}, z;\nfma.rn.bf16x2 u, t, $8, z;\nfma.rn.bf16x2 ${{}}, t, $7, u;" for scale in "vvww"
    ),
)  # fmt: skip
"""The same times two E4M3 scales of the four in `$5`, chosen by `$6`, and a factor as a pair of bfloat16 numbers, see `formats.pairs`.

A normal scale above 0 is shifted to where bfloat16 has its bits, and 238 added to its exponent: that is the number times 2 ** 118. A code's
number times a scale has six bits and is exact.
"""

INT4 = _program(
    ".reg .b32 t, u, m, b, z;\nmov.b32 z, 0x80008000;\nmov.b32 m, 0x000F000F;\nmov.b32 b, 0x43004300;\nmov.b32 u, 0xBF80BF80;",
    _INT4_PAIRS,
    ("fma.rn.bf16x2 t, $6, u, t;\nfma.rn.bf16x2 ${}, t, $5, z;",) * 4,
)
"""Eight codes of a word less 128 plus a zero point (`$6`), times a scale: `0x4300 | q` is 128 + q in bfloat16, and the difference is exact."""
INT4_ONCE = _program(".reg .b32 t;", _TINY_INT4_PAIRS, ("fma.rn.bf16x2 ${}, t, $5, $6;",) * 4)
"""Eight codes of a word times a scale that has the 2 ** 129 which they lack, less eight scales: rounded once, as the difference's product is."""
INT4_FACTORS = tl.constexpr("""{
.reg .b32 t, k, l, m, z;
mov.b32 k, 0x7F007F00;
mov.b32 l, 0x40804080;
mov.b32 m, 0xC100C100;
mov.b32 z, 0x80008000;
fma.rn.bf16x2 t, $2, k, z;
fma.rn.bf16x2 $0, t, l, z;
fma.rn.bf16x2 $1, $2, m, z;
}""")
"""Both of a scale: times 2 ** 129, and times -8."""
INT4_F16 = _program(
    ".reg .b32 t, m, b;\nmov.b32 m, 0x000F000F;\nmov.b32 b, 0x64006400;",
    _INT4_PAIRS,
    ("sub.rn.f16x2 t, t, $6;\nmul.rn.f16x2 ${}, t, $5;",) * 4,
)
"""The same in float16, where `0x6400 | q` is 1024 + q."""

E4M3_BY_PAIR = tl.constexpr(
    "\n".join(
        [
            "{\n.reg .b32 t, u, z;\nmov.b32 z, 0x80008000;",
            *(
                f"prmt.b32 t, $2, 0, {selected};\nshl.b32 t, t, 4;\nand.b32 t, t, 0x87F087F0;\n"
                f"fma.rn.bf16x2 u, t, $7, z;\nfma.rn.bf16x2 ${place}, t, $3, u;"
                for place, selected in enumerate(("0x9180", "0xB3A2"))
            ),
            "}",
        ]
    )
)
"""Four E4M3 codes of a word times a pair. A code's byte is taken out with its sign spread over the byte above it; shifted, it is the number
times 2 ** -120 in bfloat16, where small codes are subnormal numbers, too."""

_SCALED = """mul.rn.f32 a, a, $3;
mul.rn.f32 b, b, $4;
mul.rn.f32 c, c, $5;
mul.rn.f32 d, d, $6;
cvt.rn.bf16x2.f32 $0, b, a;
cvt.rn.bf16x2.f32 $1, d, c;
}"""
"""Four float32 numbers times a scale each, rounded to bfloat16."""

E4M3 = (
    """{
.reg .b16 p, q, r, s;
.reg .b32 t, u, k;
.reg .f32 a, b, c, d;
mov.b32 k, 0x5C005C00;
shl.b32 t, $2, 8;
and.b32 t, t, 0x80008000;
shl.b32 u, $2, 7;
lop3.b32 t, u, 0x3F803F80, t, 0xEA;
mul.rn.f16x2 t, t, k;
mov.b32 {p, r}, t;
and.b32 t, $2, 0x80008000;
shr.b32 u, $2, 1;
lop3.b32 t, u, 0x3F803F80, t, 0xEA;
mul.rn.f16x2 t, t, k;
mov.b32 {q, s}, t;
cvt.f32.f16 a, p;
cvt.f32.f16 b, q;
cvt.f32.f16 c, r;
cvt.f32.f16 d, s;
"""
    + _SCALED
)
"""Four E4M3 codes of a word times a float32 scale each, rounded to bfloat16: sign and magnitude go where float16 has them, and are the number
times 2 ** -8 there.

Hopper has an instruction for it. The assembler of CUDA 12.8 makes NaN of it where it knows a word to be 0, as behind the last input.
"""

INT8 = (
    """{
.reg .b32 t, k, p, q, r, s;
.reg .f32 a, b, c, d;
mov.b32 k, 0x4B000000;
xor.b32 t, $2, 0x80808080;
prmt.b32 p, t, k, 0x7440;
prmt.b32 q, t, k, 0x7441;
prmt.b32 r, t, k, 0x7442;
prmt.b32 s, t, k, 0x7443;
mov.b32 a, p;
mov.b32 b, q;
mov.b32 c, r;
mov.b32 d, s;
sub.rn.f32 a, a, 0f4B000080;
sub.rn.f32 b, b, 0f4B000080;
sub.rn.f32 c, c, 0f4B000080;
sub.rn.f32 d, d, 0f4B000080;
"""
    + _SCALED
)
"""The same for int8 codes: `0x4B000000 | q + 128` is 2 ** 23 + 128 + q in float32, and the difference is exact."""
