"""parallel.strategy='auto': the strategy that the cost model finds fastest for this run, and why."""

from collections import Counter
from dataclasses import replace
from functools import partial

from farspan.errors import ConfigError
from farspan.kernels.masks.rows import Rows
from farspan.parallel.context_parallel.cost_model import MACHINES, Cost, Job, Machine, compare
from farspan.parallel.context_parallel.strategy import Sizes
from farspan.parallel.layout import Shards
from farspan.parallel.mesh import Degrees, ParallelConfig
from farspan.trainer.batch import work_of_layers
from farspan.trainer.config import AUTO, Config


def choose_strategy(config: Config, degrees: Degrees, device_type: str) -> tuple[Config, list[str]]:
    """Return the configuration with its strategy chosen if it says `auto`, and lines that say why.

    Raises ConfigError if no strategy takes the run. All ranks choose alike: nothing is measured.
    """
    if config.parallel.strategy != AUTO:
        return config, []
    costs, refusals = strategy_costs(config, degrees, device_type)
    if not costs:
        raise ConfigError("parallel.strategy='auto' finds none: " + " ".join(sorted(set(refusals.values()))))
    lines = [f"{'auto' if n == 0 else '':<12}{name}: {cost}" for n, (name, cost) in enumerate(costs.items())]
    return replace(config, parallel=replace(config.parallel, strategy=next(iter(costs)))), lines


def strategy_costs(config: Config, degrees: Degrees, device_type: str) -> tuple[dict[str, Cost], dict[str, str]]:
    """Return what each strategy would cost, a document filling the sequence, the best first; and why others refuse."""
    parallel, head_dim, mechanisms = config.parallel, config.model.head_dim, config.mechanisms()
    shards = Shards.build(
        Rows.packed([config.data.sequence_tokens]),
        layout=parallel.layout,
        degree=degrees.context,
        work=partial(work_of_layers, mechanisms),
    )
    jobs = {
        mechanism: Job(
            mechanism=mechanism,
            shards=shards,
            heads=config.model.heads_of(mechanism),
            sizes=Sizes.of(config.train.torch_dtype, head_dim, head_dim),
            inner_size=parallel.context_inner,
            grad_comm_dtype=parallel.grad_comm_dtype,
        )
        for mechanism in mechanisms
    }
    layers = [(jobs[mechanism], count) for mechanism, count in Counter(mechanisms).items()]
    return compare(layers, machine_of(parallel, device_type))


def machine_of(parallel: ParallelConfig, device_type: str) -> Machine:
    """Return what times depend on: ranks of the inner axis share a node where there is one."""
    machine = MACHINES[device_type]
    if parallel.context_inner > 1:
        machine = replace(machine, node_ranks=parallel.context_inner)
    if parallel.inner_gbytes_per_s:
        machine = replace(machine, inner_bytes_per_s=1e9 * parallel.inner_gbytes_per_s)
    if parallel.outer_gbytes_per_s:
        machine = replace(machine, outer_bytes_per_s=1e9 * parallel.outer_gbytes_per_s)
    return machine
