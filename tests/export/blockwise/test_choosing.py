"""Grids, integers and bits that lose less than others."""

import itertools
import re

import numpy as np
import pytest

from keras_peft.export.blockwise import Group
from keras_peft.export.blockwise import gptq
from keras_peft.export.blockwise import in_4_bits
from keras_peft.export.blockwise import quantize
from keras_peft.export.blockwise import search
from keras_peft.export.blockwise.rounding import round_to


def kernel_and_inputs(inputs=96, outputs=24, rows=400, rank=20):
    """Heavy-tailed weights; inputs that are correlated and of many sizes."""
    rng = np.random.default_rng(0)
    kernel = rng.standard_t(5, size=(inputs, outputs)).astype("float32") / 10
    hidden = rng.normal(size=(rows, rank)) @ rng.normal(size=(rank, inputs))
    x = hidden + rng.normal(size=hidden.shape)
    return kernel, x * rng.lognormal(0, 1, size=inputs)


def of_outputs(stored, kernel, x):
    """The mean square error of the outputs."""
    lost = x @ (stored.kernel().astype("float64") - kernel)
    return np.square(lost).mean()


def weighted(stored, kernel, importance):
    lost = np.square(stored.kernel().astype("float64") - kernel)
    return (lost * importance[:, None]).sum()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("inputs", [96, 70])
def test_each_way_loses_less_than_the_one_before(bits, inputs):
    kernel, x = kernel_and_inputs(inputs)
    gram = x.T @ x / len(x)
    squares = np.diagonal(gram)
    errors = [
        of_outputs(stored, kernel, x)
        for stored in (
            quantize(kernel, bits),
            search(kernel, bits, 32, squares),
            gptq(kernel, gram, bits),
        )
    ]
    assert errors[1] < 0.9 * errors[0]
    # The grids are the same; inputs that are correlated make up for others.
    assert errors[2] < 0.5 * errors[1]


@pytest.mark.parametrize("bits", [4, 8])
def test_the_grid_is_the_best_for_what_it_minimizes(bits):
    kernel, x = kernel_and_inputs(rows=50)
    importance = np.square(x).mean(axis=0)
    found = search(kernel, bits, 32, importance)
    best = weighted(found, kernel, importance)
    assert best < weighted(search(kernel, bits, 32), kernel, importance)
    assert best < weighted(quantize(kernel, bits), kernel, importance)
    # No scale nearby is better, for the levels as they are.
    for factor in (0.998, 1.002):
        moved = found.scales * np.float32(factor)
        near = type(found)(found.values, moved, found.zero_points, bits, 32)
        assert best < weighted(near, kernel, importance)


@pytest.mark.parametrize("make", [search, lambda k, b: gptq(k, np.eye(96), b)])
@pytest.mark.parametrize("bits", [4, 8])
def test_integers_are_those_nearest_on_their_grid(make, bits):
    """Where inputs are uncorrelated, none can make up for another."""
    kernel, _ = kernel_and_inputs()
    found = make(kernel, bits)
    again = round_to(kernel, found.scales, found.zero_points, bits, 32)
    different = found.values != again.values
    # A weight halfway between two levels may go to either.
    assert different.mean() < 1e-3
    assert np.abs(found.kernel() - again.kernel())[different.T].max(
        initial=0
    ) <= np.abs(found.scales).max() * (1 + 1e-5)


def test_what_a_block_can_hold_exactly_is_held():
    rng = np.random.default_rng(0)
    levels = rng.integers(0, 16, size=(64, 5))
    levels[[0, 1, 32, 33]] = [[0], [15], [0], [15]]
    kernel = ((levels - 6) * 0.125).astype("float32")
    assert np.array_equal(search(kernel, 4).kernel(), kernel)


@pytest.mark.parametrize("make", [search, lambda k, b: gptq(k, np.eye(64), b)])
def test_weights_of_zero_stay_zero(make):
    kernel = np.zeros((64, 5), "float32")
    assert not make(kernel, 4).kernel().any()
    kernel[:32] = np.random.default_rng(0).normal(size=(32, 5))
    assert not make(kernel, 4).kernel()[32:].any()


def test_inputs_that_never_came_are_rounded_all_the_same():
    kernel, x = kernel_and_inputs()
    x[:, 40:70] = 0
    squares = np.square(x).mean(axis=0)
    for stored in (
        search(kernel, 4, 32, squares),
        gptq(kernel, x.T @ x / len(x), 4),
    ):
        lost = np.abs(stored.kernel() - kernel)[40:70].mean()
        # As much as any weight that is rounded: half a step at the most.
        assert lost < np.abs(stored.scales).mean() / 2
    nothing = search(kernel, 4, 32, np.zeros(96))
    assert np.array_equal(nothing.kernel(), search(kernel, 4).kernel())


# -- Mixtures ----------------------------------------------------------------


def group(name, loss, small=100, large=180):
    return Group((name,), small, large, loss)


def names(groups):
    return {group.paths[0] for group in groups}


def test_the_cheapest_bytes_go_to_4_bits_first():
    groups = [group("a", 3.0), group("b", 1.0), group("c", 2.0, 1000, 1800)]
    # Per byte, `c` is the cheapest, and alone saves 800.
    assert names(in_4_bits(groups, budget=1400)) == {"c"}
    assert names(in_4_bits(groups, budget=1300)) == {"b", "c"}
    assert names(in_4_bits(groups, budget=1200)) == {"a", "b", "c"}
    assert names(in_4_bits(groups, budget=10**6)) == set()


def test_the_budget_holds_and_no_group_in_4_bits_has_room_at_8():
    rng = np.random.default_rng(0)
    for budget in range(1500, 3000, 100):
        groups = [
            group(str(n), rng.random(), small, 2 * small)
            for n, small in enumerate(rng.integers(50, 150, 15))
        ]
        least = sum(g.bytes_at_4 for g in groups)
        chosen = in_4_bits(groups, budget=max(budget, least))
        size = sum(
            g.bytes_at_4 if g in chosen else g.bytes_at_8 for g in groups
        )
        assert size <= max(budget, least)
        for each in chosen:
            assert size + each.saved > max(budget, least)


def test_losses_add_up_to_the_bound_at_the_most():
    groups = [group(str(n), loss) for n, loss in enumerate([0.5, 0.1, 0.3])]
    for bound, expected in ((0.05, set()), (0.4, {"1", "2"}), (1.0, {*"012"})):
        assert names(in_4_bits(groups, bound=bound)) == expected


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(), "decides. Received: budget=None, bound=None"),
        (dict(budget=1, bound=1.0), "decides"),
        (dict(budget=99), "All layers in 4 bits take 100 bytes"),
    ],
)
def test_a_choice_without_a_measure_is_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        in_4_bits([group("a", 1.0)], **options)


def test_the_same_weights_give_the_same_integers():
    kernel, x = kernel_and_inputs()
    gram = x.T @ x / len(x)
    for one, other in itertools.pairwise(gptq(kernel, gram, 4) for _ in "12"):
        assert np.array_equal(one.values, other.values)
        assert np.array_equal(one.scales, other.scales)
