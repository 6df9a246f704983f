"""Convert one tensor's moments between levels, rules, wavelets and dtypes, and say what is exact."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gwt_kernels.backends.torch.literal import approximation_width, filter_bank, wavedec
from gwt_kernels.core.hyper import Rule, literal_alone
from gwt_kernels.core.level import ROW, Level, block_width, depth_of
from gwt_kernels.formats.moments import MOMENTS, SCALES, MomentFormat, stored_as, wide
from gwt_kernels.optim.state import head_rows_of, row_shape, row_slots_of
from gwt_kernels.rules import rule_of


class Form(NamedTuple):
    """What the moments of a tensor are averages of, and how they are stored."""

    level: Level
    rule: Rule
    wavelet: str
    boundary: str
    dtype: torch.dtype
    """dtype of ``exp_avg``."""
    head_rows: int | None = 1
    """Rows that share a second moment, under a rule that keeps one for rows; None for all of the tensor's."""

    @property
    def kind(self) -> tuple[Level, Rule, str, str, int | None]:
        """What the moments are averages of."""
        return *self[:4], self.head_rows

    @property
    def slots(self) -> tuple[str, ...]:
        """State entries that hold the moments."""
        return rule_of(self.rule, self.level).slots

    @property
    def row_slots(self) -> tuple[str, ...]:
        """The entries with one number for ``head_rows`` rows, and not for a block."""
        return rule_of(self.rule, self.level).row_slots

    @property
    def stored(self) -> MomentFormat:
        """How the moments are stored: as floating-point numbers, if no format has the dtype."""
        return stored_as(self.dtype)

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        if self.level == 0:
            return f"{'AdamW' if rule_of(self.rule, 0).name == 'adamw' else self.rule}, {dtype}"
        wavelet = "" if self.wavelet == "haar" else f"{self.wavelet} "
        boundary = "" if self.boundary == "zero" else f", {self.boundary} boundary"
        return f"{self.rule} {wavelet}level {self.level}{boundary}, {dtype}"


def form_of(options: Mapping[str, Any], shape: Sequence[int], dtype: torch.dtype) -> Form:
    """Return the form that a group's options give the moments of a tensor.

    Options that make no difference are the same in all forms: rules that are AdamW at level 0, wavelet and boundary
    at level 0, the boundary of rows of whole blocks, and ``head_rows`` if all rows share a second moment.
    """
    level, rule, wavelet, boundary = (options[key] for key in ("level", "rule", "wavelet", "boundary"))
    heads = head_rows_of(options)
    if row_slots_of(options) and (len(shape) < 2 or heads == math.prod(shape[:-1])):
        heads = None
    if not level:
        plain: Any = rule_of(rule, 0).name
        return Form(0, plain, "haar", "zero", dtype, heads)
    width = shape[-1] if shape else 1
    known = "zero" if _is_whole_blocks(width, level, wavelet) else boundary
    return Form(level, rule, wavelet, known, dtype, heads)


def _is_whole_blocks(width: int, level: Level, wavelet: str) -> bool:
    """Return whether the transform of a row never reads beyond its ends."""
    return wavelet == "haar" and width % block_width(level, width) == 0


def convert(
    state: Mapping[str, Tensor], old: Form, new: Form, width: int, factors: tuple[float, float] = (1.0, 1.0)
) -> dict[str, Tensor]:
    """Return the moments of a state in another form, with their scales if they are quantized.

    Let ``mu`` be the running average of the mean of a block of ``2**level`` neighbours: ``exp_avg`` under
    ``rule="foam"`` and at level 0, ``exp_avg / sqrt(2**level)`` under ``rule="gwt"``. At a higher level ``mu`` is
    the mean of its parts, including zeros beyond a row's end. At a lower level only the mean is known, and every
    part gets it: with zero details, the average of least norm that has this mean. ``exp_avg_sq`` is converted alike
    under either rule: a block's coefficient is its sum over ``sqrt(2**level)``, so the expectation of its square is
    the mean of the elements' squares if they are uncorrelated. With another wavelet, or another boundary than
    zeros, ``exp_avg`` is transformed further, and ``exp_avg_sq`` by the squares of the same filter. It is corrected
    for biorthogonal wavelets, whose coefficients of white noise are correlated.

    Args:
        state: ``exp_avg`` and ``exp_avg_sq`` ``[..., nb]``, and their scales if they are quantized.
        old: Form of ``state``.
        new: Form of the result.
        width: Last dimension of the parameter.
        factors: Factors on the two moments.

    Raises:
        ValueError: the new form keeps a moment that the old one does not, or cannot be made from the old wavelet,
            boundary and level.
    """
    if (old, factors) == (new, (1.0, 1.0)):
        return {key: state[key].detach().clone() for key in (*new.slots, *SCALES) if key in state}
    if missing := [key for key in new.slots if key not in old.slots]:
        raise ValueError(
            f"has moments of {old}, which keeps no {missing[0]}: begin with a fresh state, or build the optimizer "
            f"that the state was made with"
        )
    m, v = _decoded(state, old)
    if old.row_slots and old.kind != new.kind:
        v = _spread(v, m, old.level, width)
    moments = _carry(m, v, old, new, width)
    if new.row_slots and old.kind != new.kind:
        moments = moments[0], _gathered(moments[1], new.head_rows)
    return _encoded(moments[0] * factors[0], moments[1] * factors[1], new)


def update_norm(state: Mapping[str, Tensor], form: Form, eps: float) -> float:
    """Return ``||exp_avg / (sqrt(exp_avg_sq) + eps)||``, whose growth the limiter limits."""
    m, v = _decoded(state, form)
    v = _of_rows(v, m) if form.row_slots else v
    return float((m / (v.sqrt() + eps)).nan_to_num().square().sum().sqrt())  # 0 / 0 where eps is 0


def describe(old: Form, new: Form) -> dict[str, str]:
    """Return for each moment of either form whether :func:`convert` is exact, and how it converts the moment."""
    raised = depth_of(new.level) >= depth_of(old.level)
    if old.kind == new.kind:
        first = second = "exact"
    elif old._replace(head_rows=new.head_rows).kind == new.kind:
        first, (a, b) = "exact", (old.head_rows, new.head_rows)
        of_whole_heads = b is None or (a is not None and b % a == 0)
        second = "exact: the mean of its heads" if of_whole_heads else "approximate: spread evenly over its rows"
    elif raised:
        first = "exact: " + ("the same average in another unit" if old.level == new.level else "sums of blocks")
        of_elements = rule_of(old.rule, old.level).is_of_elements and not (old.row_slots or new.row_slots)
        if rule_of(new.rule, new.level).is_of_elements and of_elements:
            second = "exact: the mean of its blocks"
        elif new.level == 0 and new.row_slots and not old.row_slots:
            second = "exact: the mean of its rows"
        else:
            what = "as it is" if old.level == new.level else "the mean of its blocks"
            what = (
                "the mean of its rows"
                if new.row_slots
                else "spread evenly over its rows"
                if old.row_slots
                else what
            )
            second = f"approximate: {what}, as if gradients of neighbours were uncorrelated"
    else:
        first = "approximate: spread evenly over each block, whose details nobody kept"
        second = "approximate: spread evenly over each block"
    floats = [form.stored.arithmetic for form in (old, new)]
    if torch.promote_types(*floats) != floats[1] or (new.stored.scales and old != new):
        to = f"rounded to the nearest {str(new.dtype).removeprefix('torch.')}"
        first, second = (to if how == "exact" else f"{how}; {to}" for how in (first, second))
    notes = dict(zip(MOMENTS, (first, second), strict=True))
    dropped = dict.fromkeys(set(old.slots) - set(new.slots), f"dropped: rule={new.rule!r} keeps none")
    return {key: note for key, note in notes.items() if key in new.slots} | dropped


def _carry(m: Tensor, v: Tensor, old: Form, new: Form, width: int) -> tuple[Tensor, Tensor]:
    if old.kind == new.kind:
        return m, v
    if m.numel() == 0 and m.dim():
        none = m.new_zeros(*m.shape[:-1], approximation_width(width, new.level, new.wavelet))
        return none, none
    if any(literal_alone(form.wavelet, form.boundary) for form in (old, new)):
        same = old.wavelet == new.wavelet
        same &= old.boundary == new.boundary or _is_whole_blocks(width, old.level, old.wavelet)
        if old.level and not (same and depth_of(new.level) >= depth_of(old.level)):
            raise ValueError(
                f"has moments of {old}, of which those of {new} cannot be made: build the optimizer with the "
                f"state's wavelet and boundary and at least its level, or begin with a fresh state"
            )
        bank = filter_bank(new.wavelet)
        squares = tuple(tuple(h * h for h in taps) for taps in bank)
        assert old.level != ROW != new.level  # which only Haar has
        further = new.level - old.level
        moments = ((m * (math.sqrt(2**old.level) / _unit(old, width)), bank), (v, squares))
        first, second = (wavedec(x, taps, further, new.boundary)[0] for x, taps in moments)  # type: ignore[arg-type]
        if bank[0] != bank[2][::-1]:  # not orthogonal, so that coefficients are correlated where gradients are not
            second *= _energy(bank[0], new.level) / _energy(bank[0], old.level)
        return first, second
    mean = _resample(m / _unit(old, width), old.level, new.level, width)
    return mean * _unit(new, width), _resample(v, old.level, new.level, width)


def _energy(low: Sequence[float], level: int) -> float:
    """Return the mean square of white noise after ``level`` low-pass filters, over the product of single gains."""
    taps = torch.tensor(low, dtype=torch.float64, device="cpu")
    whole = torch.ones(1, 1, 1, dtype=torch.float64, device="cpu")
    for i in range(level):
        stretched = torch.zeros(1, 1, (len(low) - 1) * 2**i + 1, dtype=torch.float64, device="cpu")
        stretched[..., :: 2**i] = taps
        whole = torch.nn.functional.conv1d(whole, stretched.flip(-1), padding=stretched.shape[-1] - 1)
    return float(whole.square().sum() / taps.square().sum() ** level)


def _unit(form: Form, width: int) -> float:
    """Return the ratio of an approximation coefficient to the mean of its block."""
    return 1.0 if rule_of(form.rule, form.level).is_of_elements else math.sqrt(block_width(form.level, width))


def _spread(v: Tensor, m: Tensor, level: Level, width: int) -> Tensor:
    """Return second moments of ``head_rows`` rows as those of the blocks of ``m``, with the same mean in each row.

    A block that reaches beyond a row's end gets a smaller one, as it has fewer elements.
    """
    shares = _resample(torch.ones(max(width, 1), dtype=v.dtype, device=v.device), 0, level, width)
    return (_of_rows(v, m) * (shares / shares.mean())).view(m.shape)


def _of_rows(v: Tensor, m: Tensor) -> Tensor:
    """Return second moments of ``head_rows`` rows each as one for each row of ``m``: ``[..., 1]``."""
    rows = m[..., :1] if m.dim() else m
    return v.reshape(-1, 1).expand(-1, rows.numel() // max(v.numel(), 1)).reshape(rows.shape)


def _gathered(v: Tensor, head_rows: int | None) -> Tensor:
    """Return the means of the blocks' second moments over ``head_rows`` rows each."""
    if not v.numel():
        return v.new_zeros(row_shape(v, head_rows))
    rows = v.mean(-1, keepdim=True)
    return rows.reshape(-1, head_rows or rows.numel()).mean(1).view(row_shape(v, head_rows))


def _resample(x: Tensor, old: Level, new: Level, width: int) -> Tensor:
    """Return the means of the blocks of another level, including zeros beyond the ``width``."""
    if old == new or not x.dim():
        return x
    sizes = [block_width(level, width) for level in (old, new)]
    if new == ROW:
        return x.sum(-1, keepdim=True) * (sizes[0] / sizes[1])
    if old != ROW and new >= old:
        parts = 2 ** (new - old)
        padded = torch.nn.functional.pad(x, (0, -x.shape[-1] % parts))
        return padded.view(*x.shape[:-1], -1, parts).mean(-1)
    # Zeros beyond the end have no share of the mean: what is spread over the elements keeps the block's sum.
    elements = torch.full((width,), 1.0, dtype=x.dtype, device=x.device)
    share = _resample(elements, 0, new, width)
    whole = _resample(elements, 0, old, width)
    parts = share.numel() if old == ROW else 2 ** (old - new)
    return (x / whole).repeat_interleave(parts, dim=-1)[..., : share.numel()] * share


def _decoded(state: Mapping[str, Tensor], form: Form) -> tuple[Tensor, Tensor]:
    """Return both moments in float64; zeros for a second one that the rule does not keep."""
    stored, slots = form.stored, form.slots
    scales = [state[key] for key in stored.scales_of(slots)]
    m, *rest = stored.decode([state[key].detach() for key in slots], scales, form.level)
    return m.to(torch.float64), (rest[0] if rest else torch.zeros_like(m)).to(torch.float64)


def _encoded(m: Tensor, v: Tensor, form: Form) -> dict[str, Tensor]:
    stored, slots = form.stored, form.slots
    moments = dict(zip(slots, (m, v), strict=False))
    if stored.codec is None:
        dtypes = {key: wide(form.dtype).dtypes[0] if key in form.row_slots else form.dtype for key in slots}
        return {key: x.to(dtypes[key]).contiguous() for key, x in moments.items()}
    values, scales = stored.encode([x.float() for x in moments.values()], None, form.level)
    return dict(zip((*slots, *stored.scales_of(slots)), (*values, *scales), strict=True))
