"""The cluster of these tests is one: two nodes that a job runs on at once, each with a hostname of its own."""

from tests.slurm.conftest import Cluster


def test_a_step_runs_on_both_nodes(cluster: Cluster) -> None:
    printed = cluster.run(["srun", "--nodes=2", "--ntasks-per-node=2", "hostname"]).stdout.split()
    assert sorted(printed) == ["n1", "n1", "n2", "n2"]
