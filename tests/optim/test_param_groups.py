"""gwt_param_groups on the supported model families: exact names, each exactly once, and clear errors."""

from __future__ import annotations

import re

import pytest
import torch
import transformers
from torch import nn

from gwt_kernels.optim.param_groups import Decision, decide, deepest_level, describe, gwt_param_groups

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
EVERY_LAYER = (0, 1)


def on_meta(family: str, **config: object) -> nn.Module:
    """Return the Hugging Face causal LM of a family, with two layers, on the meta device."""
    kind = getattr(transformers, f"{family}Config")
    with torch.device("meta"):
        return getattr(transformers, f"{family}LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM")(
            kind(**config)
        )


def expand(prefix: str, names: str) -> set[str]:
    """Return the names of every layer: expand("h.*.", "a b") is h.0.a, h.0.b, h.1.a, h.1.b."""
    return {prefix.replace("*", str(layer)) + name for layer in EVERY_LAYER for name in names.split()}


def split(groups: list[dict]) -> tuple[set[str], set[str], set[str]]:
    """Split names into (transformed, decayed at level 0, undecayed), for groups made with weight_decay=0.1."""
    found: dict[tuple[bool, bool], set[str]] = {}
    for group in groups:
        assert len(group["params"]) == len(group["param_names"]) > 0
        key = group["level"] > 0, group["weight_decay"] > 0
        assert key not in found
        found[key] = set(group["param_names"])
    assert (True, False) not in found
    return found.get((True, True), set()), found.get((False, True), set()), found.get((False, False), set())


def assert_each_once(model: nn.Module, groups: list[dict]) -> None:
    """Raise AssertionError unless every trainable parameter is in exactly one group, under its own name."""
    grouped = [parameter for group in groups for parameter in group["params"]]
    assert len({id(parameter) for parameter in grouped}) == len(grouped)
    assert {id(p) for p in grouped} == {id(p) for p in model.parameters() if p.requires_grad}
    by_name = dict(model.named_parameters())
    for group in groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            assert by_name[name] is parameter


def check(model: nn.Module, transformed: set[str], decayed: set[str]) -> None:
    """Raise AssertionError unless the groups are exactly these, with the others undecayed at level 0."""
    groups = gwt_param_groups(model, weight_decay=0.1)
    rest = {name for name, _ in model.named_parameters()} - transformed - decayed
    assert split(groups) == (transformed, decayed, rest)
    assert_each_once(model, groups)


ATTENTION = "self_attn.q_proj.weight self_attn.k_proj.weight self_attn.v_proj.weight self_attn.o_proj.weight "
GATED_MLP = "mlp.gate_proj.weight mlp.up_proj.weight mlp.down_proj.weight "
FUSED_EXPERTS = "mlp.experts.gate_up_proj mlp.experts.down_proj "
EMBEDDING_AND_HEAD = {"model.embed_tokens.weight", "lm_head.weight"}


@pytest.mark.parametrize(
    ("family", "extra"),
    [("Llama", {}), ("Qwen2", {}), ("Qwen3", {"head_dim": 8})],
    ids=lambda value: str(value),
)
def test_hugging_face_dense(family: str, extra: dict) -> None:
    model = on_meta(family, **TINY, **extra)
    check(model, expand("model.layers.*.", ATTENTION + GATED_MLP), EMBEDDING_AND_HEAD)


def test_qwen_biases_and_head_norms_are_undecayed() -> None:
    undecayed = split(gwt_param_groups(on_meta("Qwen2", **TINY), weight_decay=0.1))[2]
    assert expand("model.layers.*.self_attn.", "q_proj.bias k_proj.bias v_proj.bias") <= undecayed
    undecayed = split(gwt_param_groups(on_meta("Qwen3", **TINY, head_dim=8), weight_decay=0.1))[2]
    assert expand("model.layers.*.self_attn.", "q_norm.weight k_norm.weight") <= undecayed


@pytest.mark.parametrize(
    ("family", "extra", "matrices", "routers"),
    [
        ("Mixtral", {"num_local_experts": 4}, "", "mlp.gate.weight"),
        ("Qwen3Moe", {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8}, "", "mlp.gate.weight"),
        (
            "Qwen2Moe",
            {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
            "mlp.shared_expert.gate_proj.weight mlp.shared_expert.up_proj.weight "
            "mlp.shared_expert.down_proj.weight",
            "mlp.gate.weight mlp.shared_expert_gate.weight",
        ),
        ("GptOss", {"num_local_experts": 4}, "", "mlp.router.weight"),
    ],
    ids=["Mixtral", "Qwen3Moe", "Qwen2Moe", "GptOss"],
)
def test_hugging_face_mixture_of_experts(family: str, extra: dict, matrices: str, routers: str) -> None:
    model = on_meta(family, **TINY, **extra)
    assert model.get_parameter("model.layers.0.mlp.experts.down_proj").ndim == 3
    check(
        model,
        expand("model.layers.*.", ATTENTION + FUSED_EXPERTS + matrices),
        EMBEDDING_AND_HEAD | expand("model.layers.*.", routers),
    )


def test_two_dimensional_expert_biases_are_undecayed() -> None:
    model = on_meta("GptOss", **TINY, num_local_experts=4)
    assert model.get_parameter("model.layers.0.mlp.experts.down_proj_bias").ndim == 2
    undecayed = split(gwt_param_groups(model, weight_decay=0.1))[2]
    assert expand("model.layers.*.mlp.experts.", "down_proj_bias gate_up_proj_bias") <= undecayed


def test_hugging_face_gpt2_has_conv1d_and_a_tied_head() -> None:
    model = on_meta("GPT2", vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=16)
    model.tie_weights()
    assert model.lm_head.weight is model.transformer.wte.weight
    matrices = "attn.c_attn.weight attn.c_proj.weight mlp.c_fc.weight mlp.c_proj.weight"
    check(model, expand("transformer.h.*.", matrices), {"transformer.wte.weight", "transformer.wpe.weight"})
    (reason,) = (d.reason for _, d in decide(model) if d.name == "transformer.wte.weight")
    assert reason == "embedding, tied to lm_head.weight"


class Tree(nn.Module):
    """A module with the given children and bare parameters: only its names matter."""

    def __init__(self, **members: nn.Module | torch.Tensor) -> None:
        super().__init__()
        for name, member in members.items():
            setattr(self, name, member if isinstance(member, nn.Module) else nn.Parameter(member))


def linears(names: str, bias: bool = False, width: int = 32) -> Tree:
    return Tree(**{name: nn.Linear(width, width, bias=bias) for name in names.split()})


def nanogpt(head_first: bool = False) -> Tree:
    block = [
        Tree(ln_1=nn.LayerNorm(32), attn=linears("c_attn c_proj", True), mlp=linears("c_fc c_proj", True))
        for _ in EVERY_LAYER
    ]
    head = nn.Linear(32, 64, bias=False)
    trunk = Tree(wte=nn.Embedding(64, 32), wpe=nn.Embedding(16, 32), h=nn.ModuleList(block), ln_f=nn.LayerNorm(32))
    trunk.wte.weight = head.weight
    return Tree(lm_head=head, transformer=trunk) if head_first else Tree(transformer=trunk, lm_head=head)


def torchtitan(moe: bool = False) -> Tree:
    def layer() -> Tree:
        attention = Tree(attention=linears("wq wk wv wo"), attention_norm=nn.RMSNorm(32), ffn_norm=nn.RMSNorm(32))
        if moe:
            attention.moe = Tree(
                router=linears("gate"),
                experts=Tree(**{name: torch.zeros(4, 32, 16) for name in ("w1", "w2", "w3")}),
                shared_experts=linears("w1 w2 w3"),
            )
        else:
            attention.feed_forward = linears("w1 w2 w3")
        return attention

    return Tree(
        tok_embeddings=nn.Embedding(64, 32),
        layers=nn.ModuleDict({str(index): layer() for index in EVERY_LAYER}),
        norm=nn.RMSNorm(32),
        output=nn.Linear(32, 64, bias=False),
    )


@pytest.mark.parametrize("head_first", [False, True])
def test_nanogpt_naming(head_first: bool) -> None:
    matrices = "attn.c_attn.weight attn.c_proj.weight mlp.c_fc.weight mlp.c_proj.weight"
    first_name = "lm_head.weight" if head_first else "transformer.wte.weight"
    check(nanogpt(head_first), expand("transformer.h.*.", matrices), {first_name, "transformer.wpe.weight"})


def test_torchtitan_naming() -> None:
    attention = "attention.wq.weight attention.wk.weight attention.wv.weight attention.wo.weight "
    dense = attention + "feed_forward.w1.weight feed_forward.w2.weight feed_forward.w3.weight"
    outside = {"tok_embeddings.weight", "output.weight"}
    check(torchtitan(), expand("layers.*.", dense), outside)
    experts = "moe.experts.w1 moe.experts.w2 moe.experts.w3 "
    shared = "moe.shared_experts.w1.weight moe.shared_experts.w2.weight moe.shared_experts.w3.weight"
    check(
        torchtitan(moe=True),
        expand("layers.*.", attention + experts + shared),
        outside | expand("layers.*.", "moe.router.gate.weight"),
    )


def test_torch_transformer_layer() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64)
    matrices = {"self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"}
    check(layer, matrices, set())


def test_a_gate_without_experts_beside_it_is_an_mlp_matrix() -> None:
    check(Tree(mlp=linears("gate up down")), {"mlp.gate.weight", "mlp.up.weight", "mlp.down.weight"}, set())


def test_heads_convolutions_and_bare_parameters_stay_at_level_zero() -> None:
    model = Tree(
        mlp=linears("up"),
        mlp_head=nn.Sequential(nn.Linear(32, 8)),
        patch=nn.Conv2d(3, 32, 4, bias=False),
        cls_token=torch.zeros(1, 1, 32),
        table=nn.LayerNorm((4, 32)),
    )
    check(model, {"mlp.up.weight"}, {"mlp_head.0.weight", "patch.weight", "cls_token"})


def test_a_matrix_that_is_also_an_embedding_is_not_transformed() -> None:
    model = Tree(mlp=linears("up down"), wte=nn.Embedding(32, 32))
    model.mlp.up.weight = model.wte.weight
    check(model, {"mlp.down.weight"}, {"mlp.up.weight"})


def test_frozen_parameters_are_left_out() -> None:
    model = on_meta("Llama", **TINY)
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[0].requires_grad_(False)
    groups = gwt_param_groups(model)
    names = {name for group in groups for name in group["param_names"]}
    assert "model.embed_tokens.weight" not in names
    assert not any(name.startswith("model.layers.0.") for name in names)
    assert_each_once(model, groups)


def test_group_options() -> None:
    groups = gwt_param_groups(nanogpt(), level=3, scale=0.5, weight_decay=0.1)
    keys = {"params", "param_names", "level", "scale", "weight_decay"}
    assert [set(group) - keys for group in groups] == [set(), {"rule"}, {"rule"}]
    assert all(type(group) is dict and keys <= set(group) for group in groups)
    assert [group.get("rule") for group in groups] == [None, "adamw", "adamw"]
    options = [(group["level"], group["scale"], group["weight_decay"]) for group in groups]
    assert options == [(3, 0.5, 0.1), (0, 1.0, 0.1), (0, 1.0, 0.0)]
    without_extras = gwt_param_groups(linears("attn"))
    assert [group["param_names"] for group in without_extras] == [["attn.weight"]]


def test_level_zero_is_plain_adamw_for_all(recwarn: pytest.WarningsRecorder) -> None:
    groups = gwt_param_groups(nanogpt(), level=0)
    assert [group["level"] for group in groups] == [0, 0]
    assert not recwarn.list


def test_a_rule_keeps_its_matrices_apart_at_level_zero_too() -> None:
    groups = gwt_param_groups(nanogpt(), level=0, rule="lion", adamw_lr=0.5)
    assert [(group["level"], group["rule"], group.get("lr")) for group in groups] == [
        (0, "lion", None), (0, "adamw", 0.5), (0, "adamw", 0.5)
    ]  # fmt: skip
    matrices = gwt_param_groups(nanogpt(), level=2)[0]["param_names"]
    assert groups[0]["param_names"] == matrices
    with pytest.raises(ValueError, match="unknown rule 'sgd'"):
        gwt_param_groups(nanogpt(), rule="sgd")
    with pytest.raises(ValueError, match="adamw_lr must be a finite number of at least 0, got -1"):
        gwt_param_groups(nanogpt(), adamw_lr=-1)


def test_compiled_and_checkpointed_models_keep_their_names() -> None:
    plain = nanogpt()
    expected = [group["param_names"] for group in gwt_param_groups(plain)]
    compiled = torch.compile(plain, backend="eager")
    assert next(iter(compiled.named_parameters()))[0].startswith("_orig_mod.")
    assert [group["param_names"] for group in gwt_param_groups(compiled)] == expected
    # One block compiled on its own, as torchtitan does.
    plain.transformer.h[0] = torch.compile(plain.transformer.h[0], backend="eager")
    assert [group["param_names"] for group in gwt_param_groups(plain)] == expected
    moe = torchtitan(moe=True)
    expected = [group["param_names"] for group in gwt_param_groups(moe)]
    moe.layers["0"].moe.router.gate = torch.compile(moe.layers["0"].moe.router.gate, backend="eager")
    assert [group["param_names"] for group in gwt_param_groups(moe)] == expected


def test_data_parallel_models_keep_their_names() -> None:
    plain = nanogpt()
    expected = [group["param_names"] for group in gwt_param_groups(plain)]
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(plain)
        assert next(iter(wrapped.named_parameters()))[0].startswith("module.")
        assert [group["param_names"] for group in gwt_param_groups(wrapped)] == expected
        assert [group["param_names"] for group in gwt_param_groups(torch.compile(wrapped))] == expected
    finally:
        torch.distributed.destroy_process_group()


def test_a_model_with_a_child_called_module_keeps_it() -> None:
    names = {d.name for _, d in decide(Tree(module=Tree(mlp=linears("up"))))}
    assert names == {"module.mlp.up.weight"}


def test_include_and_exclude() -> None:
    model = on_meta("Llama", **TINY)
    recipe, outside, undecayed = split(gwt_param_groups(model, weight_decay=0.1))
    chosen = split(
        gwt_param_groups(
            model,
            weight_decay=0.1,
            include=["embed_tokens", re.compile(r"lm_head")],
            exclude=[r"layers\.1\.mlp", "lm_head"],
        )
    )
    dropped = {f"model.layers.1.mlp.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")}
    assert chosen == (
        recipe - dropped | {"model.embed_tokens.weight"},
        outside - {"model.embed_tokens.weight"} | dropped,
        undecayed,
    )


def test_include_leaves_biases_and_norms_of_the_layer_alone() -> None:
    model = on_meta("Qwen2", **TINY)
    assert split(gwt_param_groups(model, weight_decay=0.1, include=["layers"])) == split(
        gwt_param_groups(model, weight_decay=0.1)
    )


def test_patterns_match_every_name_of_a_tied_weight() -> None:
    transformed, _, _ = split(gwt_param_groups(nanogpt(), weight_decay=0.1, include=["lm_head"]))
    assert "transformer.wte.weight" in transformed


@pytest.mark.parametrize(("width", "deepest"), [(0, 0), (1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (8, 3), (9, 4)])
def test_deepest_level(width: int, deepest: int) -> None:
    assert deepest_level(width) == deepest
    if width:
        assert 2**deepest < 2 * width <= 2 ** (deepest + 1)


def test_narrow_matrices_of_the_recipe_fall_to_level_zero() -> None:
    model = Tree(attn=linears("q", width=4), mlp=linears("up", width=5))
    groups = gwt_param_groups(model, level=3)
    assert [(group["level"], group["param_names"]) for group in groups] == [
        (3, ["mlp.up.weight"]),
        (0, ["attn.q.weight"]),
    ]
    reasons = {d.name: d.reason for _, d in decide(model, level=3)}
    assert reasons["attn.q.weight"] == "attention matrix, but a width of 4 holds at most level 2"


def test_including_a_narrow_tensor_is_an_error() -> None:
    model = Tree(mlp=linears("up"), small=nn.Linear(4, 32, bias=False))
    assert len(gwt_param_groups(model, level=2, include=["small"])) == 1
    with pytest.raises(ValueError, match=r"small\.weight .*width of 4 .*level 3.* fits is 2"):
        gwt_param_groups(model, level=3, include=["small"])
    assert len(gwt_param_groups(model, level=3, include=["small"], exclude=["small"])) == 2


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"include": ["q_porj"]}, ValueError, r"include: the pattern 'q_porj' matches no parameter"),
        (
            {"exclude": [r"layers\.9\."]},
            ValueError,
            r"exclude: the pattern .*9.* matches no parameter; names look like 'transformer\.wte\.weight'",
        ),
        (
            {"include": [r"c_fc\.bias"]},
            ValueError,
            r"include: the pattern .* matches no matrix.*c_fc\.bias.*\(32,\)",
        ),
        ({"include": ["("]}, ValueError, r"include: '\(' is not a regular expression"),
        ({"exclude": "lm_head"}, TypeError, r"exclude must be a sequence .* write \['lm_head'\]"),
        ({"level": -1}, ValueError, r"level must be an integer of at least 0, got -1"),
        ({"level": 2.0}, ValueError, r"level must be an integer of at least 0, got 2\.0"),
        ({"level": True}, ValueError, r"level must be an integer of at least 0, got True"),
        ({"scale": 0.0}, ValueError, r"scale must be a finite number above 0, got 0.0"),
        ({"scale": "x"}, TypeError, r"scale must be a real number, got 'x'"),
        ({"scale": torch.ones(2)}, ValueError, r"scale must be one number, got a tensor of shape \(2,\)"),
        ({"weight_decay": None}, TypeError, r"weight_decay must be a real number, got None"),
        ({"adamw_lr": "x"}, TypeError, r"adamw_lr must be a real number, got 'x'"),
        ({"include": 5}, TypeError, r"include must be a sequence of regular expressions, got 5"),
        ({"exclude": [5]}, TypeError, r"exclude must be a sequence of regular expressions, got 5 among them"),
        ({"scale": float("nan")}, ValueError, r"scale must be a finite number above 0, got nan"),
        (
            {"weight_decay": -0.1},
            ValueError,
            r"weight_decay must be a finite number of at least 0, got -0\.1",
        ),
    ],
)
def test_bad_options(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        gwt_param_groups(nanogpt(), **options)


def test_models_without_anything_to_train() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got generator"):
        gwt_param_groups(nanogpt().parameters())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"Identity has no trainable parameter$"):
        gwt_param_groups(nn.Identity())
    with pytest.raises(ValueError, match="Linear has no trainable parameter: all 2 have requires_grad=False"):
        gwt_param_groups(nn.Linear(8, 8).requires_grad_(False))
    with pytest.warns(UserWarning, match=r"nothing to transform in Linear.*include="):
        groups = gwt_param_groups(nn.Linear(8, 8))
    assert [group["param_names"] for group in groups] == [["weight"], ["bias"]]


def test_describe_has_counts_and_reasons() -> None:
    model = nanogpt()
    decided = decide(model, level=2, include=None, exclude=None)
    printed = describe(decision for _, decision in decided).splitlines()
    assert re.split(r"\s{2,}", printed[0]) == ["parameter", "count", "shape", "level", "decay", "reason"]
    rows = {row[0]: row[1:] for row in (re.split(r"\s{2,}", line) for line in printed[1:-2])}
    assert rows["transformer.h.*.attn.c_attn.weight"] == ["2", "(32, 32)", "2", "yes", "attention matrix"]
    assert rows["transformer.h.*.ln_1.bias"] == ["2", "(32,)", "0", "no", "bias"]
    assert sum(int(row[0]) for row in rows.values()) == len(list(model.parameters()))
    assert len({line.index(" yes ") for line in printed if " yes " in line}) == 1
    total = sum(parameter.numel() for parameter in model.parameters())
    assert printed[-2] == f"transformed: 8 tensors, 8,192 elements ({100 * 8192 / total:.1f} %)"


def test_describe_does_not_merge_rows_that_differ() -> None:
    rows = [Decision(f"h.{i}.w", (i, 4), 2, True, "MLP matrix") for i in (1, 2)]
    assert len(describe(rows).splitlines()) == 1 + 2 + 2
