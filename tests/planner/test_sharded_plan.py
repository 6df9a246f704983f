"""A plan on several processes against what PyTorch's engines and the optimizer hold and send."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from gwt_kernels import GWTAdafactor, GWTAdamMini, GWTAdamW
from gwt_kernels.cli import main
from gwt_kernels.mesh import Mesh, mesh_of
from gwt_kernels.optim.base import PlannedOptimizer
from gwt_kernels.optim.state import kept_dims
from gwt_kernels.plan import Plan, plan
from gwt_kernels.plan_sharded import Collective, Held, ShardedPlan, parse_seconds, plan_sharded
from gwt_kernels.planner.mesh import divisions_of_state, lengths_of_parts
from tests.support import meshes

MESHES = [
    Mesh(fsdp=9),  # more processes than most tensors have rows: some hold nothing
    Mesh(dp=2, fsdp=4),
    Mesh(tp=2),
    Mesh(fsdp=3, tp=2),
    Mesh(dp=2),
]


def small(**options: Any) -> Plan:
    return plan(meshes.Small().to(torch.bfloat16), **options)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_every_process_holds_the_planned_bytes(mesh: Mesh) -> None:
    moments = (None, torch.bfloat16)
    found = meshes.on_every_rank(meshes.shares, mesh, *moments)
    for i, each in enumerate(moments):
        sharded = plan_sharded(small(state_dtype=each), mesh, tensor_parallel=meshes.TENSOR_PARALLEL)
        shares = []
        for (_, fsdp, tp), real in found.items():
            share = sharded.held_by(fsdp, tp)
            assert sharded.shapes(fsdp, tp) == real["shapes"]
            assert share.weight_bytes == real["weights"]
            assert share.gradient_bytes == real["gradients"]
            assert share.state_bytes == real["states"][i]
            assert share.adamw_state_bytes == real["adamw"]
            shares.append(share)
        assert sharded.largest == Held(*map(max, zip(*shares, strict=True)))


@pytest.mark.parametrize("mesh", [Mesh(fsdp=4), Mesh(dp=2, fsdp=2), Mesh(fsdp=3, tp=2)], ids=str)
@pytest.mark.parametrize("clip", [False, True], ids=["limited", "clipped"])
def test_planned_collectives_are_those_sent(mesh: Mesh, clip: bool) -> None:
    sharded = plan_sharded(small(), mesh, clip=clip, tensor_parallel=meshes.TENSOR_PARALLEL)
    options = {"max_grad_norm": 1.0} if clip and mesh.tp == 1 else {}
    ((engine, step),) = meshes.on_every_rank(meshes.sent, mesh, options, ranks=[0]).values()
    planned = [(c.kind, c.processes, c.total_bytes) for c in sharded.collectives if not c.engine]
    assert step == (planned if options or not clip else planned[1:])
    for collective in (c for c in sharded.collectives if c.engine):
        same = [c for c in sharded.collectives if c.engine and c[2:4] == collective[2:4]]
        real = [size for kind, n, size in engine if (kind, n) == (collective.kind, collective.processes)]
        assert len(real) == sum(c.calls for c in same)
        assert sum(real) == sum(c.total_bytes for c in same)


@pytest.mark.parametrize("sizes", [[10, 3, 400_000, 9, 2_000_000, 14_000_000, 70, 30_000_000], [3], [600_000] * 90])
def test_buckets_equal_those_of_ddp(sizes: list[int]) -> None:
    model = nn.ParameterList(torch.empty(size, dtype=torch.bfloat16, device="meta") for size in sizes)
    (sent,) = plan_sharded(plan(model, level=0), Mesh(dp=2)).collectives
    buckets, _ = dist._compute_bucket_assignment_by_size(list(reversed(list(model))), [2**20, 25 * 2**20])
    assert (sent.calls, sent.total_bytes) == (len(buckets), 2 * sum(sizes))


def test_time_of_collectives_worked_by_hand() -> None:
    gather = Collective("weights, forward", True, "all-gather", 6, 10, 600)
    assert gather.seconds(100.0, 0.5) == 10 * 3 * 0.5 + 500 / 100
    assert gather._replace(kind="all-reduce").seconds(100.0, 0.5) == 2 * gather.seconds(100.0, 0.5)
    sharded = plan_sharded(small(bandwidth=1e9), Mesh(fsdp=8), clip=True, link_bandwidth=1e6, latency=1e-3)
    assert sharded.collective_seconds == pytest.approx(2 * 2 * 3 * 1e-3 + 2 * (16 + 4 * 4) * 7 / 8 / 1e6, rel=1e-12)
    assert sharded.memory_seconds == sharded.largest.moved_bytes / 1e9
    assert sharded.seconds == sharded.memory_seconds + sharded.collective_seconds
    slow = plan_sharded(small(bandwidth=1e9), Mesh(fsdp=8), host_time=1.0)
    assert slow.seconds == slow.host_seconds == 1.0 * (2 * 6 + 1)  # for all trained tensors, of any size
    unclipped = plan_sharded(small(), Mesh(fsdp=8))
    assert sharded.largest.moved_bytes == unclipped.largest.moved_bytes + unclipped.largest.gradient_bytes
    assert unclipped.seconds is None


def test_plan_of_one_process_is_the_whole_plan() -> None:
    planned = small()
    sharded = plan_sharded(planned, Mesh())
    chosen, adamw = planned.chosen, planned.adamw[0]
    costs = (chosen.state_bytes, chosen.moved_bytes, adamw.state_bytes, adamw.moved_bytes)
    assert sharded.largest == (planned.weight_bytes, planned.gradient_bytes, *costs)
    assert sharded.even_bytes == planned.weight_bytes + planned.gradient_bytes + chosen.state_bytes
    assert sharded.collectives == ()


@pytest.mark.parametrize("options", [{"rule": "foam"}, {"norm_growth_limit": None}, {"level": 0}], ids=str)
def test_only_the_limiter_needs_a_collective(options: dict[str, Any]) -> None:
    sharded = plan_sharded(small(**options), Mesh(fsdp=8))
    assert [c.purpose for c in sharded.collectives if not c.engine] == []
    assert plan_sharded(small(), Mesh(fsdp=8)).collectives[0].total_bytes == 4 * 4


@pytest.mark.parametrize("preset", ["llama_7b", "llama_70b", "llama_405b"])
def test_the_step_s_collective_stays_below_four_kilobytes(preset: str) -> None:
    sharded = plan_sharded(plan(preset), Mesh(fsdp=512, tp=8))
    assert [(c.processes, c.calls) for c in sharded.collectives if not c.engine] == [(4096, 1)]
    assert max(c.total_bytes for c in sharded.collectives if not c.engine) < 4096


def test_split_blocks_are_refused_with_the_level_that_works() -> None:
    message = (
        r"mesh tp=2 divides the columns of model\.layers\.0\.mlp\.down_proj\.weight .*and 23 more.*use level 0"
    )
    with pytest.raises(ValueError, match=message):
        plan_sharded(plan("llama_1b"), Mesh(tp=2))  # 5461 columns
    with pytest.raises(ValueError, match=r"widths of \[344\]; level 4 needs multiples of 16.*use level 3 at most"):
        plan_sharded(plan("llama_60m", level=4), Mesh(tp=4))
    plan_sharded(plan("llama_60m", level=3), Mesh(tp=4))
    plan_sharded(plan("llama_1b", exclude=["down_proj"]), Mesh(tp=2))


@pytest.mark.parametrize(
    ("mesh", "moments", "options", "message"),
    [
        (
            Mesh(fsdp=5, tp=2),
            torch.bfloat16,
            {},
            r"12 rows of embed\.weight are divided by tp and by fsdp into 10 uneven.*float32 moments",
        ),
        (Mesh(fsdp=5, tp=2), None, {"weight_rounding": "stochastic"}, r"uneven.* of bfloat16 weights"),
        (
            Mesh(fsdp=5, tp=2),
            torch.bfloat16,
            {"weight_rounding": "stochastic"},
            r"of bfloat16 moments and bfloat16 weights are undefined: use float32 moments and weight_rounding=None",
        ),
        (Mesh(fsdp=5), torch.int8, {}, r"int8 moments of big\.weight have a scale per 128"),
        (Mesh(tp=2), None, {"wavelet": "db2"}, r"columns of layers\.0\.mlp\.down\.weight.*'db2'"),
    ],
)
def test_the_optimizer_refuses_what_the_plan_refuses(
    mesh: Mesh, moments: torch.dtype | None, options: dict[str, Any], message: str
) -> None:
    model = meshes.Small().to(torch.bfloat16)
    if moments == torch.int8:
        model.add_module("big", nn.Linear(128, 128, bias=False, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=message):
        plan_sharded(plan(model, state_dtype=moments, **options), mesh, tensor_parallel=meshes.TENSOR_PARALLEL)
    for error in meshes.on_every_rank(meshes.refusal, mesh, moments, options, ranks=[0]).values():
        assert re.search(r"random bits depend|int8 moments of|filters of 'db2'", error)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mesh": Mesh(fsdp=0)}, "axis without processes"),
        ({"mesh": Mesh(tp=2)}, "Small has no plan for tensor parallelism"),
        ({"mesh": Mesh(tp=2), "tensor_parallel": {"embed": "diagonal"}}, r"embed\.weight .*'diagonal'.*no rule"),
        ({"mesh": Mesh(), "link_bandwidth": 0.0}, "link_bandwidth"),
        ({"mesh": Mesh(), "latency": -1.0}, "latency"),
        ({"mesh": Mesh(), "host_time": float("nan")}, "host_time"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_sharded(small(), **options)


def test_mesh_and_latency_are_parsed() -> None:
    assert mesh_of(64, "tp=8, dp=2,fsdp=4") == mesh_of(None, "dp=2,fsdp=4,tp=8") == Mesh(2, 4, 8)
    assert mesh_of(64) == Mesh(fsdp=64)
    assert str(Mesh(2, 4, 8)) == "dp=2,fsdp=4,tp=8"
    assert [parse_seconds(text) for text in ("1e-5", "10us", "0.01ms", "0")] == pytest.approx([1e-5] * 3 + [0])
    for text in ("10", "fast", "-1e-5", "10ns", "1e999", ""):
        with pytest.raises(ValueError, match="such as 1e-5 or 10us"):
            parse_seconds(text)


def test_command_prints_tables_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "plan",
        "llama_60m",
        "--world-size",
        "8",
        "--mesh",
        "fsdp=4,tp=2",
        "--bandwidth",
        "1TB/s",
        "--clip",
    ]
    assert main([*arguments, "--link-bandwidth", "25GB/s", "--latency", "5us", "--host-time", "2us"]) == 0
    text = capsys.readouterr().out
    assert (
        "The largest of 8 processes (fsdp=4,tp=2), MiB (times predicted for memory of 1,000.0 GB/s and a host"
        in text
    )
    assert "a host that takes 2.0 us a tensor)" in text
    assert "times predicted for links of 25.0 GB/s and 5.0 us a message" in text
    sharded = plan_sharded(plan("llama_60m", bandwidth=1e12), Mesh(fsdp=4, tp=2), clip=True)
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["sharded"]
    assert found == json.loads(json.dumps(sharded.as_dict()))
    assert found["largest"]["state_bytes"] == sharded.largest.state_bytes
    assert main(["plan", "llama_60m", "--json"]) == 0
    assert "sharded" not in json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--world-size", "0"], "world size 0 is no number of processes"),
        (["--world-size", "8", "--mesh", "fsdp=2,tp=2"], "2 x 2 = 4 processes, but the world size is 8"),
        (["--mesh", "fsdp=2,fsdp=2"], "not understood at 'fsdp=2'"),
        (["--mesh", "pp=2"], "not understood at 'pp=2'"),
        (["--mesh", "fsdp=0"], "not understood at 'fsdp=0'"),
        (["--mesh", "fsdp=2", "--latency", "10"], "latency '10'"),
        (["--mesh", "fsdp=2", "--host-time", "10"], "host time '10'"),
        (["--host-time", "10us"], "--host-time needs --world-size or --mesh"),
        (["--mesh", "fsdp=2", "--link-bandwidth", "50"], "bandwidth '50'"),
        (["--clip"], "--clip needs --world-size or --mesh"),
        (["--level", "4", "--mesh", "tp=4"], "use level 3 at most"),
    ],
)
def test_bad_input_gives_one_sentence_and_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "llama_60m", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert message in captured.err


def test_page_shows_the_output(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text()
    runs = re.findall(r"```console\n\$ gwt-kernels ([^\n]*)\n(.*?)```", page, re.DOTALL)
    assert len(runs) == 2
    for command, shown in runs:
        main(command.split())
        captured = capsys.readouterr()
        printed = captured.out or captured.err
        assert shown == "...\n" + printed[printed.index("The largest of") :] if captured.out else shown == printed


def test_factors_are_divided_along_the_dimensions_that_they_keep():
    p = torch.empty(6, 64, 96, device="meta")
    divided = (("tp", 2), ("fsdp", 0))
    factored, rows = {"rule": "adafactor", "level": 2}, {"rule": "foam", "level": "row"}

    def of(key, p, group, divided):
        return list(divisions_of_state(kept_dims(key, p, group), divided))

    assert of("exp_avg_sq_row", p, factored, divided) == [("fsdp", 0)]
    assert of("exp_avg_sq_col", p, factored, divided) == [("tp", 1), ("fsdp", 0)]
    assert of("exp_avg_sq_row", p[0], factored, (("tp", 1), ("fsdp", 0))) == [("fsdp", 0)]
    assert of("exp_avg_sq_col", p[0], factored, (("tp", 1), ("fsdp", 0))) == [("tp", 0)]
    assert of("exp_avg", p, rows, divided) == of("exp_avg_sq", p, rows, divided) == [("fsdp", 0)]
    for key, x, group in (
        ("exp_avg", p, factored),
        ("exp_avg_sq", p[0, 0], factored),
        ("exp_avg_sq", p[0], {"rule": "gwt", "level": 2}),
    ):
        assert of(key, x, group, divided[1:]) == list(divided[1:])


def equal_on_all(
    mesh: Mesh,
    kind: type[PlannedOptimizer],
    grouping: dict[str, Any],
    options: dict[str, Any],
    ways: dict[str, str] = meshes.TENSOR_PARALLEL,
    wide: str = "",
) -> ShardedPlan:
    """Compare the states and collectives of a plan with those of every process."""
    planned_options = {key: value for key, value in options.items() if key != "max_grad_norm"}
    model = meshes.in_dtypes(meshes.Small(), wide)
    planned = plan(model, **{"rule": kind.rules[0], **grouping, **planned_options})
    sharded = plan_sharded(planned, mesh, clip="max_grad_norm" in options, tensor_parallel=ways)
    found = meshes.on_every_rank(meshes.stepped, mesh, kind, grouping, options, ways, wide)
    for (_, fsdp, tp), (state_bytes, step) in found.items():
        assert sharded.held_by(fsdp, tp).state_bytes == state_bytes
        if fsdp == 0:
            assert step == [(c.kind, c.processes, c.total_bytes) for c in sharded.collectives if not c.engine]
    return sharded


@pytest.mark.parametrize(
    ("mesh", "head_rows", "sums"),
    [
        (Mesh(fsdp=2), None, [("sums over heads", 2, 2 * 4)]),  # one head each of both up
        (Mesh(fsdp=2, tp=2), None, [("sums over heads", 2, 2 * 4)] * 2),
        (Mesh(fsdp=2), 8, [("sums over heads", 2, 2 * 3 * 4)]),  # 24 rows in two parts of 12
        (Mesh(fsdp=3), 8, []),
        (Mesh(dp=2, tp=2), 12, []),
        (Mesh(fsdp=5), 6, [("sums over heads", 5, 2 * 4 * 4)]),
    ],
    ids=str,
)
def test_heads_that_a_mesh_tears_are_whole_and_summed(
    mesh: Mesh, head_rows: int | None, sums: list[tuple[str, int, int]]
) -> None:
    sharded = equal_on_all(mesh, GWTAdamMini, {"level": 1, "exclude": ["down"]}, {"head_rows": head_rows})
    assert [(c.purpose, c.processes, c.total_bytes) for c in sharded.collectives if not c.engine] == sums


def test_heads_of_parts_of_rows() -> None:
    sharded = equal_on_all(Mesh(fsdp=2, tp=2), GWTAdamMini, {"level": 2}, {"head_rows": None})
    purposes = [c.purpose for c in sharded.collectives if not c.engine]
    assert purposes == ["sums over rows", "sums over heads", "sums over heads"]


ROWWISE = {"layers.*.mlp.down": "rowwise"}
"""A plan for tensor parallelism that leaves most parameters to FSDP2."""


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (GWTAdamMini, {"head_rows": None}),
        (GWTAdafactor, {}),
        (GWTAdafactor, {"beta1": None, "weight_rounding": "stochastic"}),
        (GWTAdamW, {}),
    ],
    ids=str,
)
def test_parameters_on_a_part_of_the_mesh_are_summed_apart(
    kind: type[PlannedOptimizer], options: dict[str, Any]
) -> None:
    sharded = equal_on_all(Mesh(fsdp=2, tp=2), kind, {"level": 1}, options, ROWWISE)
    purposes = [c.purpose for c in sharded.collectives if not c.engine]
    assert len(purposes) > len(set(purposes))


def test_sums_are_as_wide_as_the_widest_parameter_that_needs_them() -> None:
    equal_on_all(Mesh(fsdp=2, tp=2), GWTAdamMini, {"level": 1}, {"head_rows": None}, wide="up")
    equal_on_all(Mesh(fsdp=2), GWTAdamW, {"level": 1}, {}, wide="down")


def test_a_gradient_norm_comes_before_sums_over_heads() -> None:
    options = {"head_rows": None, "max_grad_norm": 1.0}
    sharded = equal_on_all(Mesh(fsdp=2), GWTAdamMini, {"level": 1, "exclude": ["down"]}, options)
    assert next(c.purpose for c in sharded.collectives if not c.engine) == "gradient norm, non-finite"


def test_replicas_of_tensor_parallel_layers_add_up_no_gradient_norm() -> None:
    sharded = plan_sharded(small(), Mesh(dp=2, tp=2), clip=True, tensor_parallel=meshes.TENSOR_PARALLEL)
    assert [c.processes for c in sharded.collectives if c.purpose == "gradient norm, non-finite"] == [2]


def test_halves_of_split_weights_are_divided_as_weights_are() -> None:
    sharded = equal_on_all(Mesh(fsdp=5, tp=2), GWTAdamW, {"level": 1}, {"weight_rounding": "split"})
    more = sharded.plan.state_bytes - small(level=1).state_bytes
    assert more == 2 * sum(p.numel() for p, _ in sharded.plan.states.values())
    assert sharded.plan.chosen.moved_bytes - small(level=1).chosen.moved_bytes == 2 * more


def test_sums_over_rows_and_their_moments_are_those_of_the_optimizer() -> None:
    sharded = equal_on_all(Mesh(fsdp=2, tp=2), GWTAdamW, {"level": "row"}, {"rule": "foam"})
    # Rows of ``down`` in both layers: 7, half of 13 rounded up, with two numbers each.
    assert [(c.purpose, c.total_bytes) for c in sharded.collectives if not c.engine] == [
        ("sums over rows", 2 * 7 * 2 * 4)
    ]


@pytest.mark.parametrize("whole", [0, 1, 5, 8, 12, 40])
@pytest.mark.parametrize("n", [1, 2, 3, 5, 7, 12, 13, 64])
def test_lengths_of_parts_are_those_of_chunk(whole: int, n: int) -> None:
    parts = [len(part) for part in torch.zeros(whole).chunk(n)] if whole else [0]
    assert lengths_of_parts(whole, n) == {*parts, *([0] if len(parts) < n else [])}


def test_many_processes_take_no_longer_to_plan(capsys: pytest.CaptureFixture[str]) -> None:
    sharded = plan_sharded(plan("llama_60m"), Mesh(fsdp=2**31 - 1))
    assert sharded.mesh.size == 2**31 - 1
    with pytest.raises(ValueError, match=r"divides the columns of .* into widths of \[1\]"):
        plan_sharded(plan("llama_60m"), Mesh(tp=2**31 - 1))
    for words, flags in (
        ("more than the 2147483647 that ranks can count", ("--world-size", "9" * 20)),
        ("of which each has matrices of its own to count", ("--world-size", "100000", "--rule", "muon")),
    ):
        assert main(["plan", "llama_60m", *flags]) == 2
        said = capsys.readouterr().err
        assert words in said
        assert said.count("\n") == 1
