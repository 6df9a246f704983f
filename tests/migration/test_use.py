"""Migration in use: matching of parameters, a language model that switches without a jump, and refused states."""

from __future__ import annotations

import copy
import math
from itertools import pairwise

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from gwt_kernels import GWTAdamW, gwt_param_groups, migrate
from tests.support.pretraining import TEXT
from tests.support.runs import assert_same_bits, refused

# Matching of parameters -------------------------------------------------------------------------------------


class Tied(nn.Module):
    """Square matrices that differ only in name, tied weights, and a frozen tensor in between."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 8)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.mlp = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.norm = nn.LayerNorm(8)
        self.lm_head = nn.Linear(8, 8, bias=False)
        self.lm_head.weight = self.embed.weight


def adamw(model, *groups, steps=2):
    """Return AdamW after some steps, over groups of parameters or over ``model.parameters()``."""
    optimizer = torch.optim.AdamW(list(groups) or model.parameters(), lr=0.01)
    torch.manual_seed(3)
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.randn_like(p) if p.requires_grad else None
        optimizer.step()
    return optimizer


def assert_each_has_its_own(model, source, optimizer):
    """Raise AssertionError unless every first moment is the block mean of its own parameter's, times 2."""
    assert sum(map(bool, optimizer.state.values())) == sum(p.requires_grad for p in model.parameters())
    for group in optimizer.param_groups:
        for p in group["params"]:
            expected = source.state[p]["exp_avg"]
            if group["level"]:
                expected = expected.view(*p.shape[:-1], -1, 4).mean(-1) * 2
            torch.testing.assert_close(optimizer.state[p]["exp_avg"], expected, rtol=1e-6, atol=1e-8)


def in_two_groups(model):
    decayed = [n for n, p in model.named_parameters() if p.dim() > 1 and p.requires_grad]
    others = [n for n, p in model.named_parameters() if p.dim() == 1 and p.requires_grad]
    of = dict(model.named_parameters())
    return decayed + others, [{"params": [of[n] for n in names]} for names in (decayed, others)]


def test_a_model_names_the_parameters_of_a_single_group():
    model = Tied()
    for source in (adamw(model), adamw(model, {"params": [p for p in model.parameters() if p.requires_grad]})):
        optimizer = GWTAdamW(gwt_param_groups(model))
        optimizer.load_state_dict(migrate(source.state_dict(), optimizer, names=model).state_dict)
        assert_each_has_its_own(model, source, optimizer)


def test_names_in_the_order_of_the_state_for_several_groups():
    model = Tied()
    names, groups = in_two_groups(model)
    source = adamw(model, *groups)
    optimizer = GWTAdamW(gwt_param_groups(model))
    with refused(optimizer, ValueError, "2 groups, of [4, 5]", "names=[...]"):
        migrate(source.state_dict(), optimizer, names=model)
    optimizer.load_state_dict(migrate(source.state_dict(), optimizer, names=names).state_dict)
    assert_each_has_its_own(model, source, optimizer)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_names_in_the_state_lose_the_prefixes_of_wrappers(prefix):
    model = Tied()
    named = [(prefix + name, p) for name, p in reversed(list(model.named_parameters())) if p.requires_grad]
    source = torch.optim.AdamW(named, lr=0.01)
    for _, p in named:
        p.grad = torch.randn_like(p)
    source.step()
    optimizer = GWTAdamW(gwt_param_groups(model))
    optimizer.load_state_dict(migrate(source.state_dict(), optimizer).state_dict)
    assert_each_has_its_own(model, source, optimizer)


def test_a_model_names_the_parameters_of_the_optimizer_too():
    model = Tied()
    source = adamw(model)
    matrices = [p for p in model.mlp.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.requires_grad and not any(p is m for m in matrices)]
    optimizer = GWTAdamW([{"params": others, "level": 0}, {"params": matrices[::-1]}])
    optimizer.load_state_dict(migrate(source.state_dict(), optimizer, names=model).state_dict)
    assert_each_has_its_own(model, source, optimizer)


def test_order_decides_without_names():
    model = Tied().requires_grad_(True)
    source = adamw(model)
    optimizer = GWTAdamW(model.parameters(), level=0)
    optimizer.load_state_dict(migrate(source.state_dict(), optimizer).state_dict)
    assert_each_has_its_own(model, source, optimizer)


def test_parameters_without_a_step_have_no_state():
    model = Tied()
    source = adamw(model)
    del source.state[model.mlp[1].weight]
    optimizer = GWTAdamW(gwt_param_groups(model))
    migration = migrate(source.state_dict(), optimizer, names=model)
    assert "mlp.1.weight" not in {tensor.name for tensor in migration.tensors}
    optimizer.load_state_dict(migration.state_dict)
    assert model.mlp[1].weight not in optimizer.state
    assert len(optimizer.state) == len(migration.tensors) == 8


def test_the_report_counts_parameters_and_bytes():
    model = Tied()
    report = str(migrate(adamw(model).state_dict(), GWTAdamW(gwt_param_groups(model)), names=model))
    assert "AdamW, float32 -> gwt level 2, float32: mlp.0.weight and 2 more\n    exp_avg       exact" in report
    assert "AdamW, float32 -> AdamW, float32: embed.weight and 5 more" in report
    before = 9 * 4 + 2 * 4 * (4 * 64 + 5 * 8)  # a float32 count, and two moments of four matrices and five vectors
    after = 9 * 8 + 2 * 4 * (3 * 16 + 64 + 5 * 8) + 3 * 4
    assert f"state: {before:,} bytes before, {after:,} after" in report


# A language model on real text ------------------------------------------------------------------------------

WARM, AFTER, RATE = 60, 8, 3e-3


class Pretraining:
    """A LLaMA of two layers, trained by AdamW for some steps."""

    def __init__(self) -> None:
        sizes = {"hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 2}
        self.data = torch.tensor(list(TEXT.read_bytes()))
        torch.manual_seed(0)
        self.model = LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes))
        optimizer = self.adamw()
        self.train(optimizer, range(WARM - 5))
        self.losses = self.train(optimizer, range(WARM - 5, WARM), measure=True)
        self.state = copy.deepcopy(optimizer.state_dict())
        self.weights = copy.deepcopy(self.model.state_dict())

    def adamw(self):
        return torch.optim.AdamW(self.model.parameters(), lr=RATE, weight_decay=0.01)

    def gwt(self, level=2, **options):
        groups = gwt_param_groups(self.model, level=level, weight_decay=0.01)
        return GWTAdamW(groups, lr=RATE, **options)

    def batch(self, t, n=16):
        generator = torch.Generator().manual_seed(t)
        starts = torch.randint(0, len(self.data) - 64, (n,), generator=generator)
        return torch.stack([self.data[i : i + 64] for i in starts])

    def loss(self, x):
        return self.model(input_ids=x, labels=x).loss

    def train(self, optimizer, steps, measure=False):
        losses = []
        for t in steps:
            optimizer.zero_grad()
            self.loss(self.batch(t)).backward()
            optimizer.step()
            if measure:
                with torch.no_grad():
                    losses.append(self.loss(self.batch(10**6, 32)).item())
        return losses

    def go_on(self, optimizer, first=WARM, reset=True):
        if reset:
            self.model.load_state_dict(self.weights)
        return self.train(optimizer, range(first, first + AFTER), measure=True)


@pytest.fixture(scope="module")
def pretraining():
    return Pretraining()


@pytest.fixture(scope="module")
def by_adamw(pretraining):
    """Return AdamW's own losses after the switch, and the noise: the largest change between neighbouring steps."""
    optimizer = pretraining.adamw()
    optimizer.load_state_dict(copy.deepcopy(pretraining.state))  # torch shares the tensors
    losses = pretraining.go_on(optimizer)
    return losses, max(abs(b - a) for a, b in pairwise(pretraining.losses + losses))


OPTIONS = {
    "gwt level 1": {"level": 1},
    "gwt level 2": {},
    "gwt level 3, bfloat16": {"level": 3, "state_dtype": torch.bfloat16},
    "foam level 2, int8": {"rule": "foam", "state_dtype": "int8"},
    "foam level 3": {"rule": "foam", "level": 3},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_run_of_adamw_continues_without_a_jump(name, pretraining, by_adamw):
    losses, noise = by_adamw
    optimizer = pretraining.gwt(**OPTIONS[name])
    optimizer.load_state_dict(migrate(pretraining.state, optimizer, names=pretraining.model).state_dict)
    ours = pretraining.go_on(optimizer)
    assert noise < 0.05
    assert max(a - b for a, b in zip(ours, losses, strict=True)) < noise
    assert ours[-1] < pretraining.losses[-1]


def test_a_new_state_jumps(pretraining, by_adamw):
    """Check as a control that without the moments the published rule's first steps undo a good part of the run."""
    losses, noise = by_adamw
    ours = pretraining.go_on(pretraining.gwt())
    assert ours[0] - losses[0] > 10 * noise


def test_a_run_that_changes_level_rule_and_dtype_repeatedly(pretraining, by_adamw):
    losses, noise = by_adamw
    optimizer = pretraining.gwt()
    optimizer.load_state_dict(migrate(pretraining.state, optimizer, names=pretraining.model).state_dict)
    ours = pretraining.losses + pretraining.go_on(optimizer)
    names = ("gwt level 3, bfloat16", "gwt level 1", "foam level 2, int8", "foam level 3")
    for i, options in enumerate(OPTIONS[name] for name in names):
        following = pretraining.gwt(**options)
        following.load_state_dict(migrate(optimizer.state_dict(), following).state_dict)
        optimizer = following
        ours += pretraining.go_on(optimizer, WARM + (i + 1) * AFTER, reset=False)
    assert max(b - a for a, b in pairwise(ours)) < noise
    assert ours[-1] < losses[-1]


# Refused states ---------------------------------------------------------------------------------------------

SECOND = "mlp.1.weight"


def target():
    return GWTAdamW(gwt_param_groups(Tied()))


def saved(**options):
    """Return a valid state with names, of level 1, of matrices large enough for int8."""
    torch.manual_seed(1)
    net = nn.Sequential(*(nn.Linear(128, 128, bias=False) for _ in range(2)))
    optimizer = GWTAdamW(net.named_parameters(), level=1, **options)
    for p in net.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    return copy.deepcopy(optimizer.state_dict())


def wider(**options):
    net = nn.Sequential(*(nn.Linear(128, 128, bias=False) for _ in range(2)))
    return GWTAdamW(net.named_parameters(), level=2, **options)


def odd_rows(**options):
    """Return an optimizer after a step on rows that are no whole blocks."""
    p = nn.Parameter(torch.ones(4, 7))
    p.grad = torch.ones(4, 7)
    optimizer = GWTAdamW([("w", p)], level=2, **options)
    optimizer.step()
    return optimizer


def spoilt(key, value, **options):
    state = saved(**options)
    state["state"][1][key] = value(state["state"][1].get(key)) if callable(value) else value
    return state


def without(key):
    state = saved()
    del state["state"][1][key]
    return state


def option(key, value):
    state = saved()
    state["param_groups"][0][key] = value
    return state


def swapped():
    model = Tied().requires_grad_(True)
    names = [n for n, _ in model.named_parameters()]
    return adamw(model).state_dict(), {"names": [*names[1:], names[0]]}


W = "parameter '1.weight' of shape (128, 128)"
REFUSED = {
    "a model's": (target, lambda: (Tied().state_dict(), {}), ("'state' and 'param_groups'", "embed.weight")),
    "no dict": (target, lambda: ([1, 2], {}), ("'state' and 'param_groups'", "list")),
    "before the first step": (
        target,
        lambda: (adamw(Tied(), steps=0).state_dict(), {"names": Tied()}),
        ("nothing",),
    ),
    "nobody named its parameters": (target, lambda: (adamw(Tied()).state_dict(), {}), ("names=model",)),
    "another model": (target, lambda: (adamw(Tied()).state_dict(), {"names": nn.Linear(2, 2)}), ("11", "has 2")),
    "too few names": (target, lambda: (adamw(Tied()).state_dict(), {"names": ["a", "b"]}), ("2 names", "11")),
    "names in another order": (
        lambda: GWTAdamW(gwt_param_groups(Tied().requires_grad_(True))),
        swapped,
        ("parameter 'mlp.0.weight' of shape (8, 8)", "(8,)", "order"),
    ),
    "a name twice": (wider, lambda: (saved(), {"names": ["a", "a"]}), ("'a'", "several")),
    "another's names": (wider, lambda: (saved(), {"names": ["0.weight", "w"]}), ("'1.weight'", "'0.weight'")),
    "moments of what is frozen here": (
        lambda: GWTAdamW([("0.weight", nn.Parameter(torch.ones(128, 128)))]),
        lambda: (saved(), {}),
        ("'1.weight'", "frozen"),
    ),
    "names on one side": (lambda: GWTAdamW(nn.Linear(4, 4).parameters()), lambda: (saved(), {}), ("names=model",)),
    "other groups without names": (
        lambda: GWTAdamW([{"params": [p], "level": 0} for p in nn.Linear(4, 4).parameters()]),
        lambda: (adamw(nn.Linear(4, 4)).state_dict(), {}),
        ("[2]", "[1, 1]", "names=model"),
    ),
    "a tensor of no group": (wider, lambda: ({**saved(), "state": {0: {}, 7: {}}}, {}), ("['7']", "damaged")),
    "no exp_avg": (wider, lambda: (without("exp_avg"), {}), (W, "exp_avg", "keys=")),
    "no exp_avg_sq": (wider, lambda: (without("exp_avg_sq"), {}), (W, "exp_avg_sq", "damaged")),
    "no step": (wider, lambda: (without("step"), {}), (W, "step", "damaged")),
    "an entry unheard of": (wider, lambda: (spoilt("norm", 1.0), {}), (W, "'norm'", "'limiter_norm'", "None")),
    "another shape": (wider, lambda: (spoilt("exp_avg", lambda x: x[:, :9]), {}), (W, "(128, 9)", "(128, 64)")),
    "another shape of squares": (wider, lambda: (spoilt("exp_avg_sq", lambda x: x[:9]), {}), (W, "(9, 64)")),
    "moments of whole numbers": (wider, lambda: (spoilt("exp_avg", lambda x: x.long()), {}), (W, "int64")),
    "moments of two dtypes": (
        wider,
        lambda: (spoilt("exp_avg", lambda x: x.half()), {}),
        (W, "float16", "float32"),
    ),
    "int8 without scales": (wider, lambda: (spoilt("exp_avg", lambda x: x.to(torch.int8)), {}), (W, "scale")),
    "scales cut short": (
        wider,
        lambda: (spoilt("exp_avg_scale", lambda x: x[:-1], state_dtype="int8"), {}),
        (W, "exp_avg_scale", "(63,)", "(64,)"),
    ),
    "names that are none": (wider, lambda: (option("param_names", 3), {}), ("param_names 3", "damaged")),
    "betas of 1": (wider, lambda: (option("betas", (0.9, 1.0)), {}), ("betas", "1.0")),
    "NaN": (wider, lambda: (spoilt("exp_avg", lambda x: x.fill_(math.nan)), {}), (W, "exp_avg", "finite")),
    "squares below 0": (wider, lambda: (spoilt("exp_avg_sq", lambda x: -x), {}), (W, "exp_avg_sq", "below 0")),
    "a step of NaN": (wider, lambda: (spoilt("step", torch.tensor(math.nan)), {}), (W, "step", "nan")),
    "a norm below 0": (wider, lambda: (spoilt("limiter_norm", torch.tensor(-1.0)), {}), (W, "limiter_norm", "-1")),
    "a level below 0": (wider, lambda: (option("level", -1), {}), ("level", "-1", "damaged")),
    "a level of another state": (wider, lambda: (option("level", 2), {}), ("(128, 64)", "(128, 32)")),
    "an unknown rule": (wider, lambda: (saved(), {"rule": "best"}), ("'best'", "'gwt'")),
    "a wavelet that cannot be left": (wider, lambda: (saved(wavelet="db2"), {}), ("db2 level 1", "gwt level 2")),
    "a boundary that cannot be left": (
        lambda: odd_rows(),
        lambda: (odd_rows(boundary="reflect").state_dict(), {}),
        ("parameter 'w'", "gwt level 2, reflect boundary", "state's wavelet and boundary"),
    ),
    "an unknown boundary": (wider, lambda: (saved(), {"boundary": "edge"}), ("'edge'", "'zero'", "'periodic'")),
    "the folded rule and a boundary": (
        wider,
        lambda: (saved(), {"rule": "foam", "boundary": "reflect"}),
        ("rule='foam'", "boundary 'reflect'"),
    ),
    "a damaged boundary": (wider, lambda: (option("boundary", 3), {}), ("boundary 3", "damaged")),
    "too large for the dtype": (
        lambda: wider(state_dtype=torch.float32),
        lambda: (spoilt("exp_avg_sq", lambda x: x.fill_(1e300), state_dtype=torch.float64), {}),
        (W, "exp_avg_sq", "float32"),
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_bad_state_is_refused_by_name_and_changes_nothing(kind):
    make, source, words = REFUSED[kind]
    optimizer = make()
    state, how = source()
    before = copy.deepcopy(state)
    with refused(optimizer, ValueError, *words):
        migrate(state, optimizer, **how)
    assert_same_bits(copy.deepcopy(state), before)


def test_arguments_of_the_wrong_type():
    with pytest.raises(TypeError, match="must be a GWTAdamW or another of this package, got AdamW"):
        migrate(saved(), adamw(Tied()))
    with pytest.raises(TypeError, match="module or a sequence of names, got str"):
        migrate(saved(), wider(), names="0.weight")


def test_entries_may_be_dropped():
    state = spoilt("note", "anything")
    migration = migrate(state, wider(), keys={"note": None})
    assert_same_bits(migration.state_dict["state"], migrate(saved(), wider()).state_dict["state"])
