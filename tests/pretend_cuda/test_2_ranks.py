"""Training steps on two ranks: nothing costs more than docs/device_costs.md says."""

from tests.support.pretend_cuda.steps_test import steps_test

test_steps = steps_test(2)
