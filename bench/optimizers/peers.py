"""Optimizers of other packages as candidates; each is imported only when built, as it may not be installed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from bench.common.measure import clock
from bench.optimizers import rules
from bench.optimizers.candidate import BuiltCandidate, Candidate, Group, Likeness, adamw, gwt, ptwt

BETAS = (0.9, 0.999)  # some packages have other defaults
REFRESH_GAP = 200  # steps between two projections of GaLore and APOLLO, as published
NEVER = 2**62  # projections are timed separately, so the timed steps must not renew them

# For new random gradients in every step, as in `checks.against_another`.
ADAMW = Likeness(0.999, 0.98, 1.02)
EIGHT_BIT = Likeness(0.99, 0.95, 1.05)
FOUR_BIT = Likeness(0.9, 0.7, 1.3)


def suite(names: Iterable[str], levels: Iterable[int], device: torch.device) -> list[Candidate]:
    """Return the candidates of the named packages, those of the targets first; other rules come with AdamW."""
    on_cpu = device.type == "cpu"
    main = torch.float32 if on_cpu else torch.bfloat16
    chosen: list[Candidate] = []
    for name in PEERS:
        if name in names:
            chosen += PEERS[name](main, list(levels))
            if name in ("torch", "flashoptim") and not on_cpu:
                chosen += PEERS[name](torch.float32, list(levels))
            if on_cpu:
                chosen += _ON_CPU.get(name, lambda levels: [])(list(levels))
    if rules.NAME in names and "torch" not in names:  # so that every run has the step that pages divide by
        chosen.append(adamw(main, fused=True)._replace(peer=rules.NAME))
    return chosen


def _gwt(dtype: torch.dtype, levels: list[int]) -> list[Candidate]:
    ordered = sorted(levels, key=lambda level: (level != 2, level))  # the targets are about level 2
    found = [gwt(level, dtype, limiter=on) for level in ordered for on in (False, True) if level or not on]
    if 2 in levels:
        found += [gwt(2, dtype, limiter=on, extra="clips in the step") for on in (False, True)]
        found.append(gwt(2, dtype, limiter=True, extra="skips bad batches"))
        found.append(gwt(2, dtype, limiter=False, extra="telemetry"))
    if dtype == torch.bfloat16 and 2 in levels:  # options of a 16-bit training run
        kept = (None, torch.bfloat16, torch.int8)
        found += [gwt(2, dtype, limiter=False, moments=moments) for moments in kept[1:]]
        found += [gwt(2, dtype, limiter=False, rule="foam", moments=moments) for moments in kept]
    return found


def _gwt_on_cpu(levels: list[int]) -> list[Candidate]:
    """Return further candidates for the step in C: the folded rule, narrow weights and moments, weight rounding."""
    single, half, other = torch.float32, torch.bfloat16, torch.float16
    found = [gwt(level, single, limiter=False, rule="foam") for level in levels if level]
    if 2 not in levels:
        return found
    found += [gwt(2, dtype, limiter=False, rule="foam", moments=half) for dtype in (single, half)]
    found += [gwt(2, single, limiter=False, moments=moments) for moments in (half, torch.int8)]
    found += [gwt(2, half, limiter=on) for on in (False, True)] + [gwt(2, half, limiter=False, rule="foam")]
    found += [gwt(2, half, limiter=False, rounding=rounding) for rounding in ("stochastic", "split")]
    found += [gwt(2, half, limiter=False, moments=half)]  # rounds to the nearest, as the fused AdamW does
    found += [gwt(2, half, limiter=False, moments=m, rounding="stochastic") for m in (half, torch.int8)]
    return found + [gwt(2, other, limiter=False, rounding=rounding) for rounding in (None, "stochastic")]


def _torch_on_cpu(_: list[int]) -> list[Candidate]:
    """Return the implementation that computes in float32, for each 16-bit dtype of weights."""
    return [adamw(dtype, fused=True) for dtype in (torch.bfloat16, torch.float16)]


def _torch(dtype: torch.dtype, _: list[int]) -> list[Candidate]:
    return [adamw(dtype, fused=True), adamw(dtype, foreach=True), adamw(dtype, foreach=False)]


def _ptwt(dtype: torch.dtype, levels: list[int]) -> list[Candidate]:
    """Return candidates at level 2, the level of the targets, or else at the requested levels."""
    return [ptwt(level, dtype) for level in levels if level == 2 or (level and 2 not in levels)]


def _bitsandbytes(dtype: torch.dtype, _: list[int]) -> list[Candidate]:
    def build(groups: list[Group]) -> Optimizer:
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(groups, betas=BETAS)

    return [_peer("bitsandbytes", "AdamW8bit", dtype, build, EIGHT_BIT, 2.1)]


def _torchao(dtype: torch.dtype, _: list[int]) -> list[Candidate]:
    """Return torchao's optimizers with `bf16_stochastic_round` at its default, off; on, they do more work."""

    def builder(name: str) -> Callable[[list[Group]], Optimizer]:
        def build(groups: list[Group]) -> Optimizer:
            import torchao.optim

            return getattr(torchao.optim, name)(groups, betas=BETAS)

        return build

    kinds = [("AdamW8bit", EIGHT_BIT, 2.1), ("AdamW4bit", FOUR_BIT, 1.1), ("AdamWFp8", EIGHT_BIT, 2.1)]
    return [_peer("torchao", name, dtype, builder(name), likeness, size) for name, likeness, size in kinds]


def _optimi(dtype: torch.dtype, _: list[int]) -> list[Candidate]:
    def builder(options: Group) -> Callable[[list[Group]], Optimizer]:
        def build(groups: list[Group]) -> Optimizer:
            import optimi

            return optimi.AdamW(groups, lr=1e-3, betas=BETAS, eps=1e-8, **options)

        return build

    settings: list[Group] = [{"triton": True}, {"foreach": True}, {"triton": False, "foreach": False}]
    if dtype != torch.float32:  # for these it uses Kahan summation by default
        settings.insert(1, {"triton": True, "kahan_sum": False})
    return [
        _peer("optimi", f"AdamW({_options(options)})", dtype, builder(options), ADAMW, 3 * dtype.itemsize)
        for options in settings
    ]


def _flashoptim(dtype: torch.dtype, _: list[int]) -> list[Candidate]:
    def builder(options: Group) -> Callable[[list[Group]], Optimizer]:
        def build(groups: list[Group]) -> Optimizer:
            from flashoptim import FlashAdamW

            return FlashAdamW(groups, betas=BETAS, **options)

        return build

    bits: list[int | None] = [None] if dtype == torch.float32 else [24, 32, None]
    settings: list[Group] = [{"master_weight_bits": n, "quantize": q} for q in (True, False) for n in bits]
    if dtype == torch.float32:
        settings.append({"master_weight_bits": None, "quantize": False, "fused": False})  # runs on a CPU too
    return [
        _peer(
            *("flashoptim", f"FlashAdamW({_options(options)})", dtype, builder(options)),
            *(
                EIGHT_BIT if options["quantize"] else ADAMW,
                (2.2 if options["quantize"] else 2 * dtype.itemsize) + 2,
            ),
        )
        for options in settings
    ]


def _galore(dtype: torch.dtype, _: list[int]) -> list[Candidate]:
    """Return GaLore with rank a quarter of the hidden size and scale 0.25, as published.

    The projections are random and the step count starts at 1, so that building the optimizer needs no singular
    value decompositions; a step takes equally long with any projection. The 8-bit optimizer passes positional
    arguments whose meaning has changed in later versions of bitsandbytes: the check detects that.
    """

    def builder(name: str) -> Callable[[list[Group]], Optimizer]:
        def build(groups: list[Group]) -> Optimizer:
            import galore_torch
            from galore_torch.galore_projector import GaLoreProjector

            rank = _rank(groups)
            options = {"rank": rank, "update_proj_gap": NEVER, "scale": 0.25, "proj_type": "std"}
            quiet = {"no_deprecation_warning": True} if name == "GaLoreAdamW" else {}
            optimizer = getattr(galore_torch, name)(_low_rank(groups, options), betas=BETAS, **quiet)
            for group in optimizer.param_groups:
                for p in group["params"] if "rank" in group else []:
                    projector = GaLoreProjector(**options)
                    projector.ortho_matrix = _orthonormal(p, rank)
                    optimizer.state[p].update(step=1, projector=projector)
            return optimizer

        return build

    # Projecting a random gradient to a quarter of the directions keeps a quarter of its square; the update is
    # also scaled by 0.25. Embeddings and norms take AdamW's whole step.
    likeness = Likeness(0.3, 0.05, 1.5)
    return [
        _peer("galore", name, dtype, builder(name), likeness, size)
        for name, size in (("GaLoreAdamW", 2 * dtype.itemsize), ("GaLoreAdamW8bit", 3 * dtype.itemsize))
    ]


def _apollo(dtype: torch.dtype, _: list[int]) -> list[Candidate]:
    """Return APOLLO (rank a quarter of the hidden size, a scale per channel) and Mini (rank 1, one scale)."""

    def builder(rank: int | None, kind: str, scale: float) -> Callable[[list[Group]], Optimizer]:
        def build(groups: list[Group]) -> Optimizer:
            from apollo_torch import APOLLOAdamW

            options = {
                "rank": rank or _rank(groups),
                "scale": scale,
                "scale_type": kind,
                "proj": "random",
                "proj_type": "std",
                "update_proj_gap": NEVER,
            }
            return APOLLOAdamW(_low_rank(groups, options), betas=BETAS)

        return build

    # The update is the rescaled gradient, by channel or as a whole: it shares only the signs of AdamW's.
    likeness = Likeness(0.3, 0.1, 10.0)
    quarter = _peer("apollo", "APOLLOAdamW", dtype, builder(None, "channel", 1.0), likeness, 2 * dtype.itemsize)
    mini = _peer("apollo", "APOLLOAdamW Mini", dtype, builder(1, "tensor", 128.0), likeness, 2 * dtype.itemsize)
    return [quarter, mini]


def _deepspeed(dtype: torch.dtype, _: list[int]) -> list[Candidate]:
    """Return DeepSpeed's Adam for CPUs, which compiles when it is built."""

    def build(groups: list[Group]) -> Optimizer:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, lr=1e-3, betas=BETAS, eps=1e-8, adamw_mode=True)

    return [_peer("deepspeed", "DeepSpeedCPUAdam", dtype, build, ADAMW, 8)]


PEERS: dict[str, Callable[[torch.dtype, list[int]], list[Candidate]]] = {
    "gwt": _gwt,
    "torch": _torch,
    "ptwt": _ptwt,
    "bitsandbytes": _bitsandbytes,
    "flashoptim": _flashoptim,
    "optimi": _optimi,
    "torchao": _torchao,
    "galore": _galore,
    "apollo": _apollo,
    "deepspeed": _deepspeed,
    rules.NAME: rules.suite,
}


_ON_CPU: dict[str, Callable[[list[int]], list[Candidate]]] = {"gwt": _gwt_on_cpu, "torch": _torch_on_cpu}


def projection_time(built: BuiltCandidate, device: torch.device) -> float | None:
    """Measure the seconds in which GaLore or APOLLO renews all its projections; None for others.

    One tensor of each shape is timed and multiplied by the number of tensors of that shape.
    """
    alike: dict[torch.Size, list[Tensor]] = {}
    for p in built.tensors:
        if "projector" in built.optimizer.state[p]:
            alike.setdefault(p.shape, []).append(p)
    if not alike:
        return None
    total = 0.0
    for tensors in alike.values():
        projector, gradient = built.optimizer.state[tensors[0]]["projector"], torch.randn_like(tensors[0])

        def seconds(step: int, projector: Any = projector, gradient: Tensor = gradient) -> float:
            return clock(lambda: projector.project(gradient, step), device)[0]

        # Projectors renew at multiples of the gap; the first decomposition also initialises a library.
        renewed, plain = (min(seconds(step) for _ in range(2)) for step in (0, 1))
        total += max(0.0, renewed - plain) * len(tensors)
    return total


def _peer(
    package: str,
    name: str,
    dtype: torch.dtype,
    build: Callable[[list[Group]], Optimizer],
    likeness: Likeness,
    state_bytes: float,
) -> Candidate:
    return Candidate(
        f"{package} {name}", dtype, None, False, build, None, package, likeness, state_bytes=state_bytes
    )


def _options(options: Group) -> str:
    return ", ".join(f"{key}={value}" for key, value in options.items())


def _rank(groups: list[Group]) -> int:
    """Return a quarter of the hidden size, which is the smaller side of every matrix of a layer."""
    return max(1, min(min(p.shape) for group in groups if group["transformed"] for p in group["params"]) // 4)


def _low_rank(groups: list[Group], options: Group) -> list[Group]:
    return [group | (options if group["transformed"] else {}) for group in groups]


def _orthonormal(p: Tensor, rank: int) -> Tensor:
    """Return a random projection in GaLore's layout: of a tall matrix's columns, or a wide one's rows."""
    rows, columns = p.shape
    q = torch.linalg.qr(torch.randn(min(rows, columns), rank, device=p.device)).Q.to(p.dtype)
    return q.T.contiguous() if rows >= columns else q.contiguous()
