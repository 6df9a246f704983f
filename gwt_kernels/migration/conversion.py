"""One tensor's moments from one level, rule, wavelet and dtype to another, and what of that is exact."""

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
    """Of ``exp_avg``."""
    head_rows: int | None = 1
    """Rows that share a second moment, under a rule that keeps one for rows; None for all of the tensor's."""

    @property
    def kind(self) -> tuple[Level, Rule, str, str, int | None]:
        """What the moments are averages of."""
        return *self[:4], self.head_rows

    @property
    def slots(self) -> tuple[str, ...]:
        """State entries that hold them."""
        return rule_of(self.rule, self.level).slots

    @property
    def row_slots(self) -> tuple[str, ...]:
        """Those of them that are one number for rows."""
        return rule_of(self.rule, self.level).row_slots

    @property
    def stored(self) -> MomentFormat:
        """How they are stored: as floating-point numbers, where no format has the dtype."""
        return stored_as(self.dtype)

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        if self.level == 0:
            return f"{'AdamW' if rule_of(self.rule, 0).name == 'adamw' else self.rule}, {dtype}"
        wavelet = "" if self.wavelet == "haar" else f"{self.wavelet} "
        boundary = "" if self.boundary == "zero" else f", {self.boundary} boundary"
        return f"{self.rule} {wavelet}level {self.level}{boundary}, {dtype}"


def form_of(options: Mapping[str, Any], shape: Sequence[int], dtype: torch.dtype) -> Form:
    """The form that a group's options give the moments of a tensor.

    In it all rules that are AdamW at level 0, all wavelets and boundaries there are one, and all boundaries of rows
    that are whole blocks. So are all ways to say that all rows of a tensor share a second moment.
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
    """Whether the transform of a row never looks beyond its ends."""
    return wavelet == "haar" and width % block_width(level, width) == 0


def convert(
    state: Mapping[str, Tensor], old: Form, new: Form, width: int, factors: tuple[float, float] = (1.0, 1.0)
) -> dict[str, Tensor]:
    """The moments of a state in another form, with their scales where they are codes.

    With ``mu`` the average that belongs to the mean of a block of ``2**level`` neighbours (``exp_avg`` of
    ``rule="foam"`` and of level 0; ``exp_avg / sqrt(2**level)`` of ``rule="gwt"``), a higher level's ``mu`` is the
    mean of its parts, zeros beyond a row's end among them. A lower level's is unknown but for its mean, and becomes
    that, with the details taken as zero: of all averages with this mean the one of least norm. ``exp_avg_sq`` goes
    the same way under either rule: a block's coefficient is its sum over ``sqrt(2**level)``, so that its square has
    the expectation of the mean of the elements' squares if they are uncorrelated. With another wavelet, or another
    boundary than zeros, ``exp_avg`` is transformed further, and ``exp_avg_sq`` by the squares of the same filter,
    times what a biorthogonal wavelet makes of white noise by correlating it.

    Args:
        state: ``exp_avg`` and ``exp_avg_sq`` ``[..., nb]``, and where they are codes their scales.
        old: Of ``state``.
        new: Wanted.
        width: Last dimension of the parameter.
        factors: On the two moments.

    Raises:
        ValueError: no average of the old form says anything of the new one.
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
    """``||exp_avg / (sqrt(exp_avg_sq) + eps)||``, whose growth the limiter limits."""
    m, v = _decoded(state, form)
    v = _of_rows(v, m) if form.row_slots else v
    return float((m / (v.sqrt() + eps)).nan_to_num().square().sum().sqrt())  # 0 / 0 where eps is 0


def describe(old: Form, new: Form) -> dict[str, str]:
    """For either moment whether :func:`convert` is exact, and the way that it goes."""
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
        assert old.level != ROW != new.level  # of which no wavelet but Haar knows
        further = new.level - old.level
        moments = ((m * (math.sqrt(2**old.level) / _unit(old, width)), bank), (v, squares))
        first, second = (wavedec(x, taps, further, new.boundary)[0] for x, taps in moments)  # type: ignore[arg-type]
        if bank[0] != bank[2][::-1]:  # not orthogonal, so that coefficients are correlated where gradients are not
            second *= _energy(bank[0], new.level) / _energy(bank[0], old.level)
        return first, second
    mean = _resample(m / _unit(old, width), old.level, new.level, width)
    return mean * _unit(new, width), _resample(v, old.level, new.level, width)


def _energy(low: Sequence[float], level: int) -> float:
    """The mean square of white noise after ``level`` low-pass filters, over what each alone would make of it."""
    taps = torch.tensor(low, dtype=torch.float64, device="cpu")
    whole = torch.ones(1, 1, 1, dtype=torch.float64, device="cpu")
    for i in range(level):
        stretched = torch.zeros(1, 1, (len(low) - 1) * 2**i + 1, dtype=torch.float64, device="cpu")
        stretched[..., :: 2**i] = taps
        whole = torch.nn.functional.conv1d(whole, stretched.flip(-1), padding=stretched.shape[-1] - 1)
    return float(whole.square().sum() / taps.square().sum() ** level)


def _unit(form: Form, width: int) -> float:
    """What an approximation coefficient is of the mean of its block."""
    return 1.0 if rule_of(form.rule, form.level).is_of_elements else math.sqrt(block_width(form.level, width))


def _spread(v: Tensor, m: Tensor, level: Level, width: int) -> Tensor:
    """Second moments of rows, ``head_rows`` each, as those of the blocks that ``m`` is of, whose mean they are.

    A block that reaches beyond a row's end has a smaller one, as of fewer elements.
    """
    shares = _resample(torch.ones(max(width, 1), dtype=v.dtype, device=v.device), 0, level, width)
    return (_of_rows(v, m) * (shares / shares.mean())).view(m.shape)


def _of_rows(v: Tensor, m: Tensor) -> Tensor:
    """Second moments of ``head_rows`` rows each as those of the rows of ``m``, ``[..., 1]``."""
    rows = m[..., :1] if m.dim() else m
    return v.reshape(-1, 1).expand(-1, rows.numel() // max(v.numel(), 1)).reshape(rows.shape)


def _gathered(v: Tensor, head_rows: int | None) -> Tensor:
    """The means of second moments of blocks over as many rows."""
    if not v.numel():
        return v.new_zeros(row_shape(v, head_rows))
    rows = v.mean(-1, keepdim=True)
    return rows.reshape(-1, head_rows or rows.numel()).mean(1).view(row_shape(v, head_rows))


def _resample(x: Tensor, old: Level, new: Level, width: int) -> Tensor:
    """Means of the blocks of another level, zeros beyond the ``width`` among them."""
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
    """Both moments in float64; zeros for a second one that the rule does not keep."""
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
