"""The matrix on eight ranks; see tests/support/matrix.py."""

from farspan.parallel.context_parallel.strategy import STRATEGIES
from tests.support.matrix import matrix_test

test_equals_one_process = matrix_test(list(STRATEGIES), [8])
