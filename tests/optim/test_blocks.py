"""Repeated blocks of models of unknown families: transformed Linears, and reasons for the others."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from gwt_kernels.optim.param_groups import decide

BLOCK = "matrix of a repeated block"
OUTSIDE = "Linear outside of the repeated blocks"


class Members(nn.Module):
    """A module with the given children and bare parameters."""

    def __init__(self, **members: nn.Module | torch.Tensor) -> None:
        super().__init__()
        for name, member in members.items():
            setattr(self, name, member if isinstance(member, nn.Module) else nn.Parameter(member))


class Mixing(Members):
    """A block whose names carry no meaning."""

    def __init__(self, width: int = 16, **more: nn.Module | torch.Tensor) -> None:
        one, other = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        super().__init__(before=nn.LayerNorm(width), one=one, other=other, **more)


class Other(Members):
    """A block of another class, with only its norm in common."""

    def __init__(self, width: int = 16) -> None:
        super().__init__(
            before=nn.LayerNorm(width),
            scan=Members(into=nn.Linear(width, 3 * width), out=nn.Linear(3 * width, width)),
        )


class Plain(nn.Sequential):
    """Two Linears without the marks of a layer."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(nn.Linear(inputs, 24), nn.ReLU(), nn.Linear(24, outputs))


class PredictionHead(Members):
    """A prediction head, of which a detector has many."""

    def __init__(self) -> None:
        super().__init__(layers=nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 4)]))


def transformed(model: nn.Module, level: int = 2) -> set[str]:
    return {decision.name for _, decision in decide(model, level=level) if decision.level}


def reasons(model: nn.Module) -> dict[str, str]:
    return {decision.name: decision.reason for _, decision in decide(model) if len(decision.shape) > 1}


def matrices(*blocks: str, names: str = "one other") -> set[str]:
    return {f"{block}.{name}.weight" for block in blocks for name in names.split()}


@pytest.mark.parametrize(
    "container",
    [
        nn.ModuleList,
        lambda blocks: nn.Sequential(*blocks),
        lambda blocks: nn.ModuleDict({str(i): block for i, block in enumerate(blocks)}),
        lambda blocks: Members(**{str(i): block for i, block in enumerate(blocks)}),
    ],
    ids=["ModuleList", "Sequential", "ModuleDict", "numbered children"],
)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_blocks_need_no_known_names(container: Callable[[list[nn.Module]], nn.Module], count: int) -> None:
    model = Members(
        enter=nn.Linear(8, 16), stack=container([Mixing() for _ in range(count)]), leave=nn.Linear(16, 8)
    )
    assert transformed(model) == matrices(*[f"stack.{i}" for i in range(count)])
    assert reasons(model)["stack.0.one.weight"] == BLOCK
    assert reasons(model)["enter.weight"] == reasons(model)["leave.weight"] == OUTSIDE


def test_blocks_may_be_numbered_within_a_name() -> None:
    model = nn.Sequential(OrderedDict((f"encoder_layer_{i}", Mixing()) for i in range(3)))
    assert transformed(model) == matrices(*[f"encoder_layer_{i}" for i in range(3)])


def test_a_model_that_is_a_list_of_blocks() -> None:
    assert transformed(nn.ModuleList([Mixing(), Mixing()])) == matrices("0", "1")
    assert transformed(nn.Sequential(Mixing(), Mixing(), nn.Linear(16, 8))) == matrices("0", "1")


def test_a_layer_that_occurs_once_in_a_hybrid_is_transformed() -> None:
    model = Members(layers=nn.ModuleList([Mixing(), Mixing(), Other()]))
    scan = matrices("layers.2.scan", names="into out")
    assert transformed(model) == matrices("layers.0", "layers.1") | scan
    in_sequence = Members(layers=nn.Sequential(Mixing(), Mixing(), Other()))  # a sequence of different modules
    assert transformed(in_sequence) == matrices("layers.0", "layers.1")


def test_a_head_in_the_list_of_blocks_is_not_transformed() -> None:
    def one(outputs: int) -> nn.Module:
        return Members(norm=nn.LayerNorm(16), mix=nn.Linear(16, outputs))

    hidden = {"0.mix.weight", "1.mix.weight"}
    assert transformed(nn.Sequential(one(16), one(16), one(64))) == hidden
    assert transformed(nn.ModuleList([one(16), one(16), one(64)])) == hidden
    assert not transformed(nn.Sequential(one(16), one(64)))


def test_a_head_with_as_many_classes_as_layers_is_no_router() -> None:
    model = Members(layers=nn.ModuleList([Mixing(), Mixing()]), classifier=nn.Linear(16, 2), enter=nn.Linear(2, 16))
    assert reasons(model)["classifier.weight"] == "output head"


def test_blocks_of_one_class_may_differ_in_width() -> None:
    assert transformed(Members(layers=nn.ModuleList([Mixing(8), Mixing(16)]))) == matrices("layers.0", "layers.1")


def test_a_layer_that_a_pipeline_stage_keeps_alone() -> None:
    model = Members(layers=nn.ModuleList([nn.Identity(), Mixing(), nn.Identity()]))
    assert transformed(model) == matrices("layers.1")


def test_a_block_with_one_matrix_and_a_norm() -> None:
    stack = nn.ModuleList([Members(norm=nn.LayerNorm(16), mix=nn.Linear(16, 16)) for _ in range(3)])
    assert transformed(Members(stack=stack)) == {f"stack.{i}.mix.weight" for i in range(3)}


@pytest.mark.parametrize(
    "model",
    [
        Plain(16, 16),
        nn.Sequential(*[layer for _ in range(4) for layer in (nn.Linear(16, 16), nn.LayerNorm(16), nn.ReLU())]),
        nn.Sequential(Plain(16, 16)),
        nn.Sequential(Plain(48, 16), Plain(16, 48)),
        nn.ModuleList([Plain(48, 16), Plain(16, 48)]),
        nn.ModuleList([nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(3)]),
        Members(q1=Plain(16, 8), q2=Plain(16, 8)),
        nn.ModuleDict({"actor": Plain(16, 8), "critic": Plain(16, 8)}),
        nn.Sequential(Members(enter=nn.Linear(16, 8), norm=nn.LayerNorm(8), leave=nn.Linear(8, 16)), Plain(16, 8)),
    ],
    ids=[
        "Linears in a row",
        "with norms between",
        "one within another",
        "autoencoder",
        "autoencoder in a list",
        "Linear and activation",
        "twins",
        "roles",
        "encoder and head",
    ],
)
def test_mlps_without_repeated_blocks_are_not_transformed(model: nn.Module) -> None:
    assert not transformed(model)
    assert set(reasons(model).values()) == {OUTSIDE}


def test_modules_between_stages_are_not_transformed() -> None:
    def stage(width: int, depth: int) -> nn.Module:
        blocks = nn.ModuleList([Mixing(width) for _ in range(depth)])
        return Members(blocks=blocks, downsample=nn.Linear(2 * width, 2 * width, bias=False))

    model = Members(layers=nn.ModuleList([stage(8, 1), stage(16, 2), stage(32, 1)]))
    assert transformed(model) == matrices(
        "layers.0.blocks.0", "layers.1.blocks.0", "layers.1.blocks.1", "layers.2.blocks.0"
    )


def test_poolers_heads_and_embeddings_of_towers_are_not_transformed() -> None:
    def tower() -> nn.Module:
        return Members(
            embeddings=Members(words=nn.Embedding(32, 8), project=nn.Linear(8, 16)),
            layers=nn.ModuleList([Mixing(), Mixing()]),
            pooler=Members(dense=nn.Linear(16, 16)),
            lm_head=nn.Linear(16, 32),
        )

    model = nn.ModuleList([tower(), tower()])
    assert transformed(model) == matrices(*[f"{i}.layers.{j}" for i in (0, 1) for j in (0, 1)])
    assert reasons(model)["0.pooler.dense.weight"] == "part of a pooler or an embedding"
    assert reasons(model)["0.embeddings.project.weight"] == "part of a pooler or an embedding"
    assert reasons(model)["1.lm_head.weight"] == "output head"


def test_repeated_heads_are_not_transformed_but_layers_within_one_are() -> None:
    detector = Members(layers=nn.ModuleList([Mixing(), Mixing()]))
    detector.boxes = nn.ModuleList([PredictionHead() for _ in range(2)])
    detector.medusa_head = nn.ModuleList([Plain(16, 64) for _ in range(2)])
    detector.mask_head = nn.ModuleList([Mixing() for _ in range(2)])
    detector.flow_head = Members(enter=nn.Linear(8, 16), layers=nn.ModuleList([Mixing(), Mixing()]))
    hidden = matrices("layers.0", "layers.1", "flow_head.layers.0", "flow_head.layers.1")
    assert transformed(detector) == hidden
    left = {name: reason for name, reason in reasons(detector).items() if name not in hidden}
    assert set(left.values()) == {"output head"}
    assert len(left) == 2 * 2 + 2 * 2 + 2 * 2 + 1


def test_attention_heads_are_no_output_heads() -> None:
    def block() -> nn.Module:
        return Mixing(attention=Members(q_head=nn.Linear(16, 16), v_head=nn.Linear(16, 16)))

    names = matrices("h.0.attention", "h.1.attention", names="q_head v_head")
    assert names <= transformed(Members(h=nn.ModuleList([block(), block()])))

    class CausalHead(Members):
        """A head of a multi-head GPT."""

    def many() -> nn.Module:
        heads = [CausalHead(key=nn.Linear(16, 4), query=nn.Linear(16, 4)) for _ in range(4)]
        return Mixing(sa=Members(heads=nn.ModuleList(heads), proj=nn.Linear(16, 16)))

    names = {f"blocks.{i}.sa.heads.{j}.{k}.weight" for i in (0, 1) for j in range(4) for k in ("key", "query")}
    assert names | matrices("blocks.0.sa", names="proj") <= transformed(
        Members(blocks=nn.Sequential(many(), many()))
    )


def test_fused_experts_and_routers_without_names() -> None:
    def block() -> nn.Module:
        mixture = Members(
            choose=nn.Linear(16, 4, bias=False), inner=torch.zeros(4, 16, 24), outer=torch.zeros(4, 24, 16)
        )
        return Mixing(mixture=mixture, latents=torch.zeros(1, 8, 16), table=torch.zeros(9, 16))

    model = Members(layers=nn.ModuleList([block(), block()]))
    mixtures = {f"layers.{i}.mixture.{name}" for i in (0, 1) for name in ("inner", "outer")}
    assert transformed(model) == matrices("layers.0", "layers.1") | mixtures
    assert reasons(model)["layers.0.mixture.inner"] == "expert matrix"
    assert reasons(model)["layers.0.mixture.choose.weight"] == "MoE router"
    assert reasons(model)["layers.0.table"] == "Mixing, not the weight of a Linear"


def test_listed_experts_and_a_router_without_names() -> None:
    def block() -> nn.Module:
        return Mixing(choose=nn.Linear(16, 3), parts=nn.ModuleList([Plain(16, 16) for _ in range(3)]))

    model = Members(layers=nn.ModuleList([block(), block()]))
    parts = {f"layers.{i}.parts.{j}.{k}.weight" for i in (0, 1) for j in range(3) for k in (0, 2)}
    assert transformed(model) == matrices("layers.0", "layers.1") | parts
    assert reasons(model)["layers.1.choose.weight"] == "MoE router"


def test_an_expert_as_wide_as_there_are_experts_is_no_router() -> None:
    def block() -> nn.Module:
        shared = Members(gate_proj=nn.Linear(32, 8), up_proj=nn.Linear(32, 8), down_proj=nn.Linear(8, 32))
        experts = Members(gate_up_proj=torch.zeros(8, 16, 32), down_proj=torch.zeros(8, 32, 8))
        return Mixing(32, mlp=Members(gate=nn.Linear(32, 8), experts=experts, shared_expert=shared))

    model = Members(layers=nn.ModuleList([block(), block()]))
    assert matrices("layers.0.mlp.shared_expert", names="gate_proj up_proj down_proj") <= transformed(model)
    assert [name for name, reason in reasons(model).items() if reason == "MoE router"] == [
        f"layers.{i}.mlp.gate.weight" for i in (0, 1)
    ]


def test_low_rank_adapters_are_not_transformed() -> None:
    def adapted() -> nn.Module:
        a, b = nn.Linear(16, 8, bias=False), nn.Linear(8, 16, bias=False)
        return Members(
            base_layer=nn.Linear(16, 16), lora_A=nn.ModuleDict({"default": a}), lora_B=nn.ModuleDict({"default": b})
        )

    model = Members(layers=nn.ModuleList([Mixing(attn=Members(q_proj=adapted())) for _ in range(2)]))
    left = {name for name, reason in reasons(model).items() if reason == "low-rank adapter"}
    assert left == {f"layers.{i}.attn.q_proj.lora_{x}.default.weight" for i in (0, 1) for x in "AB"}
    assert not left & transformed(model)
    assert {d.name for _, d in decide(model, include=[r"lora_A"]) if "included" in d.reason} == {
        name for name in left if "lora_A" in name
    }


def test_convolutions_recurrences_and_single_outputs_are_not_transformed() -> None:
    class Conv1D(Members):
        """A convolution with the class name of GPT-2's Linear."""

    def block() -> nn.Module:
        return Mixing(
            depthwise=nn.Conv1d(16, 16, 4, groups=16),
            pointwise=nn.Conv1d(16, 16, 1),
            named=Conv1D(weight=torch.zeros(16, 16, 4)),
            state=nn.LSTM(16, 16),
            score=nn.Linear(16, 1),
        )

    model = Members(layers=nn.ModuleList([block(), block()]))
    assert transformed(model) == matrices("layers.0", "layers.1")
    found = {name.removeprefix("layers.0."): reason for name, reason in reasons(model).items()}
    assert found["depthwise.weight"] == found["pointwise.weight"] == found["named.weight"] == "convolution"
    assert found["state.weight_hh_l0"] == "LSTM, not the weight of a Linear"
    assert found["score.weight"] == "one output: a score or a gate"


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_parametrized_weights_belong_to_their_linear() -> None:
    model = Members(layers=nn.ModuleList([Mixing(), Mixing()]), enter=nn.Embedding(32, 16))
    for block in model.layers:
        nn.utils.parametrizations.weight_norm(block.one)
        nn.utils.parametrizations.orthogonal(block.other)
    nn.utils.parametrizations.spectral_norm(model.enter)
    assert transformed(model) == {
        f"layers.{i}.{name}"
        for i in (0, 1)
        for name in ("one.parametrizations.weight.original1", "other.parametrizations.weight.original")
    }
    found = reasons(model)
    assert found["layers.0.one.parametrizations.weight.original0"].endswith("a width of 1 holds at most level 0")
    assert found["enter.parametrizations.weight.original"] == "embedding"


def test_narrow_matrices_have_their_own_reason() -> None:
    model = Members(layers=nn.ModuleList([Mixing(narrow=nn.Linear(2, 16)) for _ in range(2)]))
    assert transformed(model) == matrices("layers.0", "layers.1")
    assert reasons(model)["layers.0.narrow.weight"] == f"{BLOCK}, but a width of 2 holds at most level 1"
    assert "layers.0.narrow.weight" in transformed(model, level=1)


def test_wrapped_blocks_count_as_their_class() -> None:
    model = Members(layers=nn.ModuleList([Mixing(), Mixing(), Mixing()]))
    expected = transformed(model)
    model.layers[0] = torch.compile(model.layers[0], backend="eager")
    model.layers[1] = torch.compile(checkpoint_wrapper(model.layers[1]), backend="eager")
    assert transformed(model) == expected == matrices("layers.0", "layers.1", "layers.2")


def test_torch_transformer() -> None:
    model = nn.Transformer(16, 2, 2, 2, 32)
    attention, mlp = "in_proj_weight out_proj.weight", "linear1.weight linear2.weight"
    names = {
        f"{side}.layers.{i}.{name}"
        for i in (0, 1)
        for side, kinds in (("encoder", ["self_attn"]), ("decoder", ["self_attn", "multihead_attn"]))
        for name in [*(f"{kind}.{leaf}" for kind in kinds for leaf in attention.split()), *mlp.split()]
    }
    assert transformed(model) == names


def test_embeddings_of_other_libraries_are_embeddings() -> None:
    class VocabParallelEmbedding(Members):
        """The class name used by tensor-parallel libraries; not an nn.Embedding."""

    model = Members(words=VocabParallelEmbedding(weight=torch.zeros(32, 16)), h=nn.ModuleList([Mixing(), Mixing()]))
    assert reasons(model)["words.weight"] == "embedding"
