"""Pass a bucket to bucket.c: one call of C per step for any number of tensors."""

from __future__ import annotations

import ctypes
import functools
import math
import struct
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from gwt_kernels.backends.bucket import StepInputs
from gwt_kernels.backends.bucket_validation import check_bucket, check_low_bits, check_scales
from gwt_kernels.backends.cpu.build import library
from gwt_kernels.core.hyper import Hyper, Rounding
from gwt_kernels.core.level import ROW, Level, block_width
from gwt_kernels.core.notes import Notes
from gwt_kernels.core.tensor_step import TensorStep
from gwt_kernels.formats.moments import stored_as
from gwt_kernels.rules import GWT, MATRIX_STAGES, Rule

# In the order of the enums in step.h; formats of moments have their ``c_type`` there.
TYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUNDINGS: tuple[Rounding, ...] = ("nearest", "stochastic", "split")
MAX_LEVEL = 10
PART_OF_ROW = 3
"""Level of the parts, ``2**3`` elements, in which C processes a row that is one block."""
RULES = {"gwt": 0, "adamw": 0, "foam": 1, "lion": 2, "adafactor": 3, "muon": 4, "orthogonal": 5}
"""Rules that C supports, and their numbers in step.h."""

# ``gwt_step`` of step.h, field by field, with the formats of the struct module.
FIELDS = {
    **dict.fromkeys(("p", "g", "m", "v", "low", "m_scales", "v_scales", "norm", "row_sums"), "P"),
    **dict.fromkeys(("row_factors", "col_factors"), "P"),
    **dict.fromkeys(("rows", "width", "block", "columns", "matrix_rows"), "q"),
    **dict.fromkeys(("weights", "coefficients"), "qqq"),
    "key": "Q",
    **dict.fromkeys(("p_type", "g_type", "m_type", "rounding", "level", "rule", "observed"), "i"),
    "step": "I",
    **dict.fromkeys(("beta1", "rest1", "beta2", "rest2", "eps", "keep", "factor", "per_sum", "per_root"), "f"),
    **dict.fromkeys(("gamma", "limit", "step_size"), "f"),
    "full_step": "d",
    "sums": "dddd",
}
STEP = struct.Struct("".join(FIELDS.values()))
_POINTER = struct.Struct("P")
# Parts of it: ``step`` to ``full_step``, which C copies there every step, and ``limit`` to ``sums``, the results.
NUMBERS, RESULTS = struct.Struct("=I12fd"), struct.Struct("=ff5d")
RESULTS_AT = STEP.size - RESULTS.size
ROW_SUMS_AT = _POINTER.size * list(FIELDS).index("row_sums")


@functools.cache
def functions() -> ctypes.CDLL:
    """Return the library, with its functions' signatures set."""
    lib = library()
    pointers = (ctypes.c_void_p,) * 3
    for function in (lib.gwt_update, lib.gwt_sum):
        function.argtypes = (*pointers, ctypes.c_int64, ctypes.c_int64, ctypes.c_int)
        function.restype = ctypes.c_int
    lib.gwt_factored.argtypes = (*pointers, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int)
    lib.gwt_factored.restype = ctypes.c_int
    lib.gwt_lend.argtypes, lib.gwt_lend.restype = (ctypes.c_void_p, ctypes.c_void_p), None
    lib.gwt_lend(*threads_of_pytorch())
    return lib


def threads_of_pytorch() -> tuple[int | None, int | None]:
    """Return the addresses of GOMP_parallel and omp_get_thread_num in PyTorch's OpenMP; None if there is none."""
    try:
        # Resolved in the OpenMP that the library is linked with: GNU, LLVM or Intel.
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        parallel, number = library.GOMP_parallel, library.omp_get_thread_num
    except (OSError, AttributeError):
        return None, None
    return ctypes.cast(parallel, ctypes.c_void_p).value, ctypes.cast(number, ctypes.c_void_p).value


def knows(tensor_steps: Sequence[TensorStep], level: Level, rule: Rule) -> bool:
    """Return whether the step in C supports a bucket: float32 arithmetic, short blocks, tensors in memory.

    It supports GWT-Muon's stages without telemetry. At level 0 with float32 moments they run as PyTorch's
    operators, for the bits of ``torch.optim.Muon``.
    """
    p, g, m, *_ = tensor_steps[0]
    if rule.name in MATRIX_STAGES:
        if level == ROW or any(t.row is not None for t in tensor_steps):
            return False
        if not level and (m is None or m.dtype == torch.float32):
            return False
        if m is not None and p.dtype == torch.float16:
            return False
    return (
        rule.name in RULES
        and (level == ROW or level <= MAX_LEVEL)
        and p.dtype in TYPES
        and g.dtype in TYPES
        and (m is None or stored_as(m.dtype).c_type is not None)
        and all(_has_memory(x) for t in tensor_steps for x in (t.p, t.g))
    )


def _has_memory(x: Tensor) -> bool:
    """Return whether ``x`` has its numbers at its address, unlike fake, wrapper and batched tensors."""
    plain = type(x).__torch_dispatch__ is Tensor.__torch_dispatch__
    return plain and torch._C._has_storage(x) and not x._is_zerotensor()


class Result(NamedTuple):
    """Results of C for one tensor: the update's divisor, step sizes, and sums of squares in double."""

    limit: float
    step_size: float
    full_step: float
    norm: float
    """Sum of squares of ``m / (sqrt(v) + eps)``, if the limiter or :func:`update_sums` needs it."""
    gradients: float
    means: float
    updates: float


def update_sums(tensor_steps: Sequence[TensorStep], *, level: Level, row_sums: Tensor | None = None) -> Tensor:
    """See :meth:`gwt_kernels.backends.runner.Runner.reduce`; arguments are already checked."""
    packed = Packed(tensor_steps, level, GWT, "nearest")
    packed.set_rows(row_sums)
    packed.run(functions().gwt_sum)
    sums = iter(packed.results())
    totals = [next(sums).norm if t.p.numel() else 0.0 for t in tensor_steps]
    return torch.tensor(totals, dtype=torch.float32, device="cpu")


def _check(tensor_steps: Sequence[TensorStep], level: Level) -> None:
    """Validate shapes, dtypes and devices before C writes to the tensors' addresses."""
    params = [t.p for t in tensor_steps]
    exp_avgs: Any = [t.m for t in tensor_steps]
    seconds: Any = [t.v for t in tensor_steps]
    arrays = {"params": params, "grads": [t.g for t in tensor_steps], "exp_avgs": exp_avgs, "exp_avg_sqs": seconds}
    check_bucket({name: tensors for name, tensors in arrays.items() if tensors[0] is not None}, level)
    lows = [t.low for t in tensor_steps if t.low is not None]
    if lows:
        check_low_bits(params, lows)
    scales = [t.scales for t in tensor_steps if t.scales is not None]
    if scales:
        check_scales(exp_avgs, scales, level)


class Packed:
    """A bucket as an array of ``gwt_step`` for C, without empty tensors.

    A shard with no columns of rows that other processes share is not empty: it has their moments.
    """

    def __init__(self, tensor_steps: Sequence[TensorStep], level: Level, rule: Rule, rounding: Rounding) -> None:
        _check(tensor_steps, level)
        self.places = [i for i, t in enumerate(tensor_steps) if (t.p if t.rows is None else t.m).numel()]
        self._has_empty = len(self.places) < len(tensor_steps)
        present = [tensor_steps[i] for i in self.places]
        self.lasts = True
        """Whether later steps with the same tensors can reuse it, since none had to be copied."""
        self._level, self._rule = level, rule
        self._is_divided = rule.direction is not None
        self._params = [t.p for t in present]
        self._block_widths = [
            block_width(level, t.p.shape[-1] if t.p.dim() else 1) if t.rows is None else t.rows.length
            for t in present
        ]
        first_rows = [0, *accumulate(math.prod(t.p.shape[:-1]) for t in tensor_steps)]
        self._first_rows = [first_rows[i] for i in self.places]
        self._rows = [(i, t.row) for i, t in enumerate(present) if t.row is not None]  # telemetry
        self._copies: list[tuple[Tensor, Tensor]] = []  # (target of write_back, copy for C)
        self._buffer = bytearray(STEP.size * len(present))
        self._address = (ctypes.c_char * len(self._buffer)).from_buffer(self._buffer) if present else None
        self._pointers = struct.Struct(f"{len(present)}P")
        p, g, m, *_ = tensor_steps[0]
        m_type = 0 if m is None else stored_as(m.dtype).c_type
        assert m_type is not None  # see knows()
        types = [TYPES.index(p.dtype), TYPES.index(g.dtype), m_type]
        parts = PART_OF_ROW if level == ROW else level
        kind = (*types, ROUNDINGS.index(rounding), parts, RULES[rule.name])
        for i, t in enumerate(present):
            self._pack(i * STEP.size, t, kind, self._block_widths[i])
        grads = [self._plain(t.g, False) for t in present]
        limits = [t.limit for t in present]
        self._take(grads, [t.step for t in present], [t.hyper for t in present], limits)

    def set_rows(self, row_sums: Tensor | None) -> None:
        """Set the sums over whole rows of this step: see :class:`gwt_kernels.backends.bucket.StepInputs`."""
        if row_sums is None:
            return
        self._row_sums = row_sums.to(torch.float32).contiguous()
        first, per_row = self._row_sums.data_ptr(), 4 * row_sums.shape[1]
        for i, row in enumerate(self._first_rows):
            struct.pack_into("P", self._buffer, i * STEP.size + ROW_SUMS_AT, first + row * per_row)

    def step_factored(self, factors: bytes) -> None:
        """Take a step of Adafactor of all tensors, with a ``gwt_factors`` of factors.c for each."""
        self.run(functions().gwt_factored, factors)
        self.write_back()

    def renew(self, inputs: StepInputs, divisors: Tensor | None) -> None:
        """Pack gradients and numbers of another step with the same tensors; see ``Runner.apply``."""
        columns: list[Any] = [*inputs[:3]] if divisors is None else [*inputs[:3], divisors.unbind()]
        if self._has_empty:
            columns = [[column[i] for i in self.places] for column in columns]
        self._take(*columns)
        self.set_rows(inputs.row_sums)

    def _take(
        self,
        grads: Sequence[Tensor],
        steps: Sequence[int],
        hypers: Sequence[Hyper],
        limits: Sequence[Tensor | None] = (),
    ) -> None:
        """Pack gradient addresses and a step's numbers: once if all tensors share them, else for each tensor."""
        addresses = tuple(map(Tensor.data_ptr, grads))
        if not all(addresses):
            _check_memory(self._params, grads)
        self._grads = self._pointers.pack(*addresses)
        keys = list(zip(map(id, hypers), steps, self._block_widths, strict=True))
        shared = {
            key: self._numbers(hyper, *key[1:]) for key, hyper in dict(zip(keys, hypers, strict=True)).items()
        }
        blocks = list(shared.values()) if len(shared) == 1 else [shared[key] for key in keys]
        if self._is_divided and any(limit is not None for limit in limits):
            blocks = [
                self._numbers(hyper, step, width, 1.0 if limit is None else float(limit))
                for hyper, step, width, limit in zip(hypers, steps, self._block_widths, limits, strict=True)
            ]
        self._blocks = b"".join(blocks)
        self._stride = NUMBERS.size if len(blocks) > 1 else 0

    def _pack(self, at: int, t: TensorStep, kind: tuple[int, ...], block: int) -> None:
        """Pack the parts of a tensor that are the same in every step."""
        p = self._plain(t.p, True)
        count = p.numel()
        width = p.shape[-1] if p.dim() and (self._level == ROW or p.shape[-1] % block) else count
        rows = count // width if count else t.m.numel()  # without columns
        low = 0 if t.low is None else t.low.data_ptr()
        addresses = [x.data_ptr() for x in (p, *t.moments)]
        if not all(addresses):
            _check_memory([p] * len(addresses), [p, *t.moments])
        p_at, m_at, v_at = (*addresses, 0, 0)[:3]
        m_scales, v_scales = (*(x.data_ptr() for x in t.scales or ()), 0, 0)[:2]
        norm = 0
        if self._is_divided and t.norm is not None and t.hyper.norm_growth_limit is not None:
            norm = self._plain(t.norm, True, torch.float32).data_ptr()
        weights, coefficients = ((0, count, 0), (0, max(count, 1), 0)) if t.span is None else t.span
        numbers = (0,) * 18
        absent = (0,) * 3  # set_rows() sets row sums, factors.c the factors
        STEP.pack_into(
            *(
                self._buffer,
                at,
                p_at,
                0,
                m_at,
                v_at,
                low,
                m_scales,
                v_scales,
                norm,
                *absent,
                rows,
                width,
                block,
                0,
                0,
            ),
            *(*weights, *coefficients, t.key, *kind, t.row is not None, *numbers),
        )

    def _plain(self, x: Tensor, is_written: bool, dtype: torch.dtype | None = None) -> Tensor:
        """Return the tensor, or a contiguous copy in the dtype."""
        if x.is_contiguous() and not x.is_neg() and (dtype is None or x.dtype == dtype):
            return x
        copy = x.resolve_neg().to(dtype or x.dtype).contiguous()
        self._copies.append((x if is_written else copy, copy))
        self.lasts = False
        return copy

    def _numbers(self, hyper: Hyper, step: int, block: int, limit: float = 1.0) -> bytes:
        numbers, gamma = _numbers(hyper, block, self._rule), hyper.norm_growth_limit or 0.0
        corrects = self._rule.corrects_bias
        step_size = hyper.step_size(step, self._rule.is_scaled, corrects) if step else 0.0  # 0: sums only
        return NUMBERS.pack(step & 0xFFFFFFFF, *numbers, gamma, limit, 0.0, step_size)

    def set_params(self, params: Sequence[Tensor]) -> None:
        """Replace the parameters by others of the same shapes; one that is not contiguous ends :attr:`lasts`."""
        self._params = [params[i] for i in self.places]
        self.lasts &= all(p.is_contiguous() and not p.is_neg() for p in self._params)
        for i, address in enumerate(map(Tensor.data_ptr, self._params)):
            _POINTER.pack_into(self._buffer, i * STEP.size, address)

    def release_params(self) -> None:
        """Drop the references to the parameters; :meth:`set_params` sets others before the next step."""
        self._params = []

    def step(self) -> None:
        """Take a step of all tensors."""
        self.run(functions().gwt_update)
        self.write_back()
        for i, row in self._rows:
            notes = Notes(row)
            squares = torch.tensor(self._result(i), dtype=torch.float64, device="cpu")
            notes.squares_of_gradient(squares[-3], squares[-2])
            notes.squares_of_update(squares[-1])
            notes.limit(squares[0])
            notes.close()

    def run(self, function: Any, *more: Any) -> None:
        """Call a function of bucket.c or factors.c on all tensors."""
        count = len(self.places)
        if count and function(
            *(self._address, self._grads, self._blocks, self._stride, count, *more, torch.get_num_threads())
        ):
            raise MemoryError(f"there is no memory for the sums of a step over {count} tensors")

    def write_back(self) -> None:
        """Copy results in copies back, and increment the parameters' autograd versions."""
        increment_version(self._params)
        for x, copy in self._copies:
            if x is not copy:
                x.copy_(copy)

    def results(self) -> list[Result]:
        """Return the results of each tensor."""
        return [self._result(i) for i in range(len(self.places))]

    def _result(self, i: int) -> Result:
        return Result._make(RESULTS.unpack_from(self._buffer, i * STEP.size + RESULTS_AT))


def _check_memory(params: Sequence[Tensor], arrays: Sequence[Tensor]) -> None:
    """Raise if the memory of an array that is not empty was freed."""
    for p, x in zip(params, arrays, strict=True):
        if x.numel() and not x.data_ptr():
            raise ValueError(
                f"a tensor of shape {tuple(p.shape)}, its gradient or a moment has no memory: it was freed, so "
                f"bring it back before the step"
            )


def _numbers(hyper: Hyper, block: int, rule: Rule) -> tuple[float, ...]:
    """Return the fields ``beta1`` to ``per_root``."""
    factor, per_block = hyper.signed_factor, 1 / block
    keep = 1 - float(hyper.lr) * hyper.weight_decay
    rest1, rest2 = 1 - hyper.beta1, 1 - hyper.beta2
    if rule.takes_detail_scale:  # means and squares are of the gradient times the factor
        rest2 = rest2 / block if rule.squares else rest2
        return hyper.beta1, rest1, hyper.beta2, rest2, hyper.eps, keep, factor, per_block, hyper.detail_scale
    rest1, rest2, root = rest1 * math.sqrt(block), rest2 * block, math.sqrt(block)
    return hyper.beta1, rest1, hyper.beta2, rest2, hyper.eps, keep, factor, factor / block, 1 / root
