"""Assignments against scipy's."""

import os
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest
import scipy.optimize

from research import sharding
from research.errors import UserError
from research.tasks import matching


def problem(seed=0, layers=3, batch=5, queries=9, objects=9):
    """Returns costs, and masks of no, one, some, many and all objects, not all of them at the beginning."""
    rng = np.random.default_rng(seed)
    cost = rng.normal(size=(layers, batch, queries, objects)).astype(np.float32)
    mask = np.zeros((batch, objects), np.float32)
    for i, count in enumerate([0, 1, 4, 7, objects][:batch]):
        mask[i, rng.permutation(objects)[:count]] = 1
    return cost, mask


def assert_best(found, cost, mask):
    queries = cost.shape[2]
    for layer, b in np.ndindex(cost.shape[:2]):
        (real,) = np.nonzero(mask[b])
        chosen = found[layer, b, real]
        assert len(set(chosen)) == len(real)
        assert (found[layer, b, mask[b] == 0] == queries).all()
        best = cost[layer, b][:, real]
        wanted = best[scipy.optimize.linear_sum_assignment(best)].sum()
        assert best[chosen, np.arange(len(real))].sum() == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("objects", [1, 5, 9])
def test_it_is_the_best_assignment(objects):
    cost, mask = problem(objects=max(objects, 7))
    cost, mask = cost[..., :objects], mask[:, :objects]
    assert_best(np.asarray(jax.jit(matching.assign)(cost, mask)), cost, mask)


@pytest.mark.parametrize("mesh", [False, True])
def test_it_is_found_in_compiled_loops_and_takes_no_gradient(mesh):
    cost, mask = problem()
    chosen_mesh = sharding.make_mesh() if mesh else None

    def step(total, row):
        return total, matching.assign(row, mask, chosen_mesh)

    _, found = jax.jit(lambda rows: jax.lax.scan(step, 0, rows))(np.stack([cost, -cost]))
    assert_best(np.asarray(found[0]), cost, mask)
    assert_best(np.asarray(found[1]), -cost, mask)
    gradient = jax.grad(lambda cost: (cost * matching.assign(cost, mask, chosen_mesh)[:, :, None]).sum())(cost)
    np.testing.assert_array_equal(gradient, np.broadcast_to(np.asarray(found[0])[:, :, None], cost.shape))


def test_costs_that_are_no_numbers_are_avoided():
    cost, mask = problem(objects=3)
    cost[:, :, 2:5] = [[np.nan], [np.inf], [-np.inf]]
    found = np.asarray(matching.assign(cost, mask))
    assert not np.isin(found, [2, 3, 4]).any()
    matching.assign(np.full_like(cost, np.nan), mask)


def test_too_few_queries():
    cost, mask = problem(queries=4, objects=5)
    with pytest.raises(UserError, match="num_queries: 4 cannot stand for up to 5 objects"):
        matching.assign(cost, mask)


def test_every_device_solves_its_own_examples():
    program = """
        import jax, numpy as np
        from jax.sharding import NamedSharding, PartitionSpec as P
        from research import sharding
        from research.tasks import matching

        rng = np.random.default_rng(0)
        cost = rng.normal(size=(2, 8, 6, 5)).astype(np.float32)
        mask = (rng.random((8, 5)) < 0.6).astype(np.float32)
        expected = np.asarray(matching.assign(cost, mask))
        solve, seen = matching._solve, []
        matching._solve = lambda cost, mask: (seen.append(cost.shape[1]), solve(cost, mask))[1]
        mesh = sharding.make_mesh(data=2, fsdp=2)
        placed = jax.device_put(cost, NamedSharding(mesh, P(None, ("data", "fsdp"))))
        found = jax.jit(lambda cost, mask: matching.assign(cost, mask, mesh))(placed, mask)
        np.testing.assert_array_equal(found, expected)
        assert seen == [2] * 4, seen
        """
    env = os.environ | {
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
