import numpy as np

from kvfetcher.codec.ladder.klt import block_multiply, fisher_roots, solve_basis


def definite(count, dim, seed):
    factors = np.random.default_rng(seed).normal(size=(count, dim, 2 * dim))
    return factors @ factors.swapaxes(1, 2)


def test_roots_square_to_the_fisher_matrix_with_its_ridge():
    fisher = definite(3, 4, 0)
    root, inverse = fisher_roots(fisher)
    ridge = 0.1 * np.trace(fisher, axis1=1, axis2=2) / 4
    expected = fisher + ridge[:, None, None] * np.eye(4)
    np.testing.assert_allclose(root @ root, expected, rtol=1e-4)
    np.testing.assert_allclose(root @ inverse, np.broadcast_to(np.eye(4), (3, 4, 4)), atol=1e-5)


def test_values_that_nothing_depends_on_get_the_smallest_scale_of_the_others():
    fisher = np.stack([np.zeros((2, 2)), np.eye(2) * 4, np.eye(2) * 9])
    root, _ = fisher_roots(fisher)
    np.testing.assert_allclose(root[0], np.eye(2) * np.sqrt(0.4), rtol=1e-5)


def test_basis_decorrelates_in_the_metric_and_sorts_by_deviation():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(5000, 6)) @ rng.normal(size=(6, 6)) + 3
    roots, _ = fisher_roots(definite(2, 3, 2))
    basis = solve_basis(x.mean(axis=0), np.cov(x.T, bias=True), roots)
    z = block_multiply(roots, (x - basis.mean).T).T @ basis.rows.T
    covariance = np.cov(z.T, bias=True)
    np.testing.assert_allclose(np.sqrt(np.diag(covariance)), basis.sigma, rtol=1e-3)
    off = covariance - np.diag(np.diag(covariance))
    assert np.abs(off).max() < 1e-3 * covariance.max()
    assert np.all(np.diff(basis.sigma) <= 0)
    np.testing.assert_allclose(basis.rows @ basis.rows.T, np.eye(6), atol=1e-5)


def test_equal_statistics_give_equal_bases():
    covariance = definite(1, 6, 3)[0]
    roots, _ = fisher_roots(definite(3, 2, 4))
    a = solve_basis(np.zeros(6), covariance, roots)
    b = solve_basis(np.zeros(6), covariance.copy(), roots)
    np.testing.assert_array_equal(a.rows, b.rows)
