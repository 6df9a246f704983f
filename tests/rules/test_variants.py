"""Other wavelets, boundaries and uncorrected steps of the optimizer against the published code."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gwt_kernels import GWTAdamW
from tests.optim.test_optimizer import run_golden
from tests.support import golden
from tests.support.runs import (
    assert_same_bits,
    backends,
    checked_step,
    give_gradients,
    parameters,
    parameters_of,
    place,
    results,
    train,
)


@pytest.mark.parametrize("case", golden.variant_cases(res_scaled=True), ids=lambda case: case.name)
def test_golden_vectors_of_variants(case):
    params, norms, state = run_golden(case)
    movement = case.params - case.p0
    np.testing.assert_allclose(params - case.p0, movement, rtol=0, atol=1e-11 * np.abs(movement).max())
    np.testing.assert_allclose(norms, case.limiter_norm, rtol=1e-11, atol=0)
    for name in ("exp_avg", "exp_avg_sq"):
        expected = getattr(case, name)
        np.testing.assert_allclose(state[name].numpy(), expected, rtol=0, atol=1e-11 * np.abs(expected).max())


def test_golden_vectors_of_variants_are_complete():
    cases = golden.variant_cases(res_scaled=True)
    assert [sum(c.rule == rule for c in cases) for rule in ("gwt", "foam")] == [10, 8]
    assert {c.boundary for c in cases} == {"zero", "constant", "symmetric", "reflect", "periodic"}


NOTICED = {
    "adamw2_uncorrected": [{"correct_bias": True}],
    "adamw0_uncorrected_decay": [{"correct_bias": True}],
    "foam2_uncorrected": [{"correct_bias": True}],
    "foam2_res_scale": [{"res_scale": 1.0}, {"res_scale": 0.0}],
    "foam2_res_scale_0": [{"res_scale": 1.0}],
    "adamw2_odd_reflect": [{"boundary": x} for x in ("zero", "constant", "symmetric", "periodic")],
    "adamw2_db2_symmetric": [{"wavelet": "db3"}, {"boundary": "constant"}],
    "adamw1_bior": [{"wavelet": "rbio2.2"}, {"boundary": "periodic"}],
}


@pytest.mark.parametrize("name", NOTICED)
def test_golden_vectors_of_variants_detect_another_option(name):
    case = next(c for c in golden.variant_cases(res_scaled=True) if c.name == name)
    movement = np.abs(case.params - case.p0).max()
    for changed in NOTICED[name]:
        assert np.abs(run_golden(case, **changed)[0] - case.params).max() > 1e-3 * movement, changed


@backends
def test_bias_correction_can_be_turned_off_and_on_in_mid_run(backend, device):
    groups = [{"params": parameters([(4, 8), (3, 5)], place(backend, device)), "level": k} for k in (0, 2)]
    groups.append({"params": parameters([(4, 8)], place(backend, device)), "rule": "foam", "level": 3})
    optimizer = GWTAdamW(groups, lr=0.1, correct_bias=False, backend=backend)
    for t, (first, others) in enumerate(((False, False), (False, True), (True, False), (True, True))):
        for group in optimizer.param_groups:
            group["correct_bias"] = others
        optimizer.param_groups[0]["correct_bias"] = first
        give_gradients(parameters_of(optimizer), seed=t)
        assert checked_step(optimizer) == 5


@backends
def test_the_first_step_without_bias_correction_is_smaller_by_the_correction(backend, device):
    """Check the factor ``sqrt(1 - 0.999) / (1 - 0.9)``, which weight decay does not have."""
    moved = []
    for correct_bias in (True, False):
        p = parameters([(4, 8)], place(backend, device))[0]
        before = p.detach().clone()
        optimizer = GWTAdamW([p], lr=0.1, correct_bias=correct_bias, backend=backend)
        train(optimizer, range(1))
        moved.append((p.detach() - before).double())
    torch.testing.assert_close(moved[0], moved[1] * (0.001**0.5 / 0.1), rtol=1e-3, atol=1e-5)


def test_a_boundary_changed_in_mid_run_applies_to_the_next_step():
    params = [parameters([(3, 13)], dtype=torch.float64) for _ in range(2)]
    runs = [GWTAdamW(own, lr=0.1, norm_growth_limit=None) for own in params]
    for optimizer in runs:
        train(optimizer, range(2))
    assert_same_bits(results(runs[0]), results(runs[1]))
    runs[0].param_groups[0]["boundary"] = "symmetric"
    for optimizer in runs:
        train(optimizer, [2])
    same = torch.isclose(*(own[0] for own in params), rtol=1e-10, atol=0)
    assert same[:, :12].all()
    assert not same[:, 12].any()


@pytest.mark.parametrize("options", [{"wavelet": "bior2.2"}, {"boundary": "reflect"}])
def test_the_literal_algorithm_has_no_telemetry(options):
    with pytest.raises(ValueError, match=r"telemetry=True knows no .*: turn it off, or use wavelet='haar' and"):
        GWTAdamW(parameters([(3, 8)]), telemetry=True, **options)
    optimizer = GWTAdamW(parameters([(3, 8)]), telemetry=True)
    train(optimizer, range(1))
    optimizer.param_groups[0].update(options)
    give_gradients(parameters_of(optimizer), seed=1)
    with pytest.raises(ValueError, match=r"telemetry=True knows no"):
        optimizer.step()
