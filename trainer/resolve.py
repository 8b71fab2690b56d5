"""From a configuration to a resolved one: checked against ranks, devices and data, derived values filled in."""

import logging
import shlex
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from farspan.errors import ConfigError, DataError
from farspan.parallel.context_parallel.cost_model import MACHINES, Cost, Job, Machine, compare
from farspan.parallel.context_parallel.strategy import Sizes
from farspan.parallel.mesh import Degrees, Mesh, ParallelConfig
from farspan.parallel.ranks import Ranks, fake_process_group
from farspan.trainer.batch import shards_of_one_document
from farspan.trainer.build import backends_of_layers, parameters_held
from farspan.trainer.config import AUTO, Config
from farspan.trainer.data.source import META_FILE, SPLITS, TokenSource
from farspan.trainer.data.validation import ValidationSet, describe_sets, open_validation_sets
from farspan.trainer.estimate.memory import check_memory
from farspan.trainer.estimate.summary import describe, describe_data
from farspan.trainer.renamed import RENAMED_SPLITS
from farspan.trainer.validate import validate

VOCABULARY_MULTIPLE = 64
"""Matrix products are fastest with a vocabulary that is a multiple of this."""

log = logging.getLogger("farspan")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Resolved:
    """A configuration that can run on this rank, and what follows from it."""

    config: Config
    degrees: Degrees
    device: torch.device
    train_source: TokenSource
    validation_sets: dict[str, ValidationSet]
    reasons: tuple[str, ...]
    """Lines about the choice of the strategy, if it was `auto`."""


def resolve(config: Config, ranks: Ranks) -> Resolved:
    """Check everything that can be checked before ranks meet; raises ConfigError or DataError."""
    degrees = Degrees.resolve(config.parallel, ranks.world_size)
    validate(config, degrees)
    device = choose_device(config, ranks.local_rank)
    train_source, validation_sets = open_all_data(config)
    config = fill_in(config, degrees, device, train_source.vocabulary_size)
    check_memory(config, degrees, device, ranks.local_rank)
    config, reasons = choose_strategy(config, degrees, device.type)
    return Resolved(
        config=config,
        degrees=degrees,
        device=device,
        train_source=train_source,
        validation_sets=validation_sets,
        reasons=tuple(reasons),
    )


def dry_run(config: Config, num_ranks: int) -> None:
    """Print the summary of a run of `config` on `num_ranks` ranks; raises ConfigError as the run would."""
    dry_run_plan(config, num_ranks)
    has_data = Path(config.data.folder).exists()
    log.info("%-12snothing was started%s", "dry run", "" if has_data else f"; {config.data.folder} is not there yet")


def dry_run_plan(config: Config, num_ranks: int) -> None:
    """As `dry_run`, for a run that is about to start elsewhere.

    The steps of `resolve`, but without GPUs, and without data if that is absent: device and vocabulary then are those
    of the configuration.
    """
    degrees = Degrees.resolve(config.parallel, num_ranks)
    validate(config, degrees)
    device = torch.device("cuda" if config.train.device == "cuda" or torch.cuda.is_available() else "cpu")
    has_data = Path(config.data.folder).exists()
    source, validation_sets = open_all_data(config) if has_data else (None, {})
    config, reasons = choose_strategy(config, degrees, device.type)
    config = fill_in(config, degrees, device, source and source.vocabulary_size)
    data = [describe_data(config, source), *describe_sets(validation_sets)] if source else []
    log.info("%s", "\n".join((describe(config, degrees), *data, *reasons)))
    with fake_process_group(num_ranks):
        local = parameters_held(config, Mesh.build(config.parallel, "cpu"))
    log.info("%-12s%s parameters on rank 0 of %d", "sharded", f"{local:,}", num_ranks)


def choose_device(config: Config, local_rank: int) -> torch.device:
    """Return the device of one rank of this machine; raises ConfigError when it has to be a GPU that is not there."""
    asked, num_gpus = config.train.device, torch.cuda.device_count()
    if asked == "cpu" or (asked == "auto" and num_gpus == 0):
        return torch.device("cpu")
    if num_gpus == 0:
        raise ConfigError("train.device='cuda' but torch sees no GPU: set train.device=cpu, or install torch for CUDA.")
    if local_rank >= num_gpus:
        raise ConfigError(
            f"rank {local_rank} of this machine has no GPU, torch sees {num_gpus}: start {num_gpus} ranks per machine, "
            "or set train.device=cpu."
        )
    return torch.device("cuda", local_rank)


def open_all_data(config: Config) -> tuple[TokenSource, dict[str, ValidationSet]]:
    """Return the training documents and the validation sets; raises DataError as `open_data` does."""
    train, validation = open_data(config)
    return train, open_validation_sets(
        config.evaluate.sets,
        train=train,
        own=validation,
        sequence_tokens=config.data.sequence_tokens,
        sequences=config.evaluate.sequences,
        seed=config.evaluate.seed,
    )


def open_data(config: Config) -> tuple[TokenSource, TokenSource]:
    """Return the training and the validation documents.

    Raises DataError when they cannot be read or used, ConfigError when they do not fill one sequence.
    """
    folder = Path(config.data.folder)
    if (folder / META_FILE).is_file():
        setting = shlex.quote(f"data.folder={folder.parent}")
        raise DataError(f"data.folder={str(folder)!r} is one split of the data: set {setting}.")
    for old, new in RENAMED_SPLITS.items():
        if (folder / old / META_FILE).is_file() and not (folder / new).exists():
            raise DataError(
                f"data.folder={str(folder)!r} has {old}/, which was renamed to {new}/: run "
                f"`{shlex.join(['mv', str(folder / old), str(folder / new)])}`."
            )
    missing = next((f"{split}/{META_FILE}" for split in SPLITS if not (folder / split / META_FILE).is_file()), None)
    if missing is not None:
        state = f"has no {missing}" if folder.exists() else "does not exist"
        raise DataError(f"data.folder={str(folder)!r} {state}: make it with `farspan data prepare`, or name another.")
    sources = TokenSource(folder / SPLITS[0]), TokenSource(folder / SPLITS[1])
    for split, source in zip(SPLITS, sources, strict=True):
        if source.num_tokens == source.num_documents:
            raise DataError(
                f"{folder / split} has documents of one token only, which have nothing to predict; prepare others."
            )
    if sources[0].num_tokens < config.data.sequence_tokens:
        raise ConfigError(
            f"data.sequence_tokens={config.data.sequence_tokens} is more than the {sources[0].num_tokens} tokens of "
            f"{folder / SPLITS[0]}: lower it, or prepare more data."
        )
    if sources[0].vocabulary_size != sources[1].vocabulary_size:
        raise DataError(
            f"{folder} has train/ of {sources[0].vocabulary_size} tokens and validation/ of "
            f"{sources[1].vocabulary_size}: prepare both together."
        )
    return sources


def fill_in(config: Config, degrees: Degrees, device: torch.device, vocabulary_size: int | None) -> Config:
    """Fill in all derived values; `vocabulary_size` is the data's, None if unknown.

    Raises ConfigError when the data has more tokens than the model, or a setting cannot work on `device`.
    """
    model = config.model
    if config.profile.memory and device.type == "cpu":
        raise ConfigError("profile.memory=true records CUDA memory, but the run is on CPUs: set profile.memory=false.")
    if config.train.compile and device.type == "cpu" and not has_cpp_compiler():
        raise ConfigError("train.compile=true needs a C++ compiler on CPUs: install g++, or set train.compile=false.")
    if model.vocabulary_size == 0:
        if vocabulary_size is None:
            raise ConfigError("model.vocabulary_size=0 takes the data's: prepare data.folder first, or give a number.")
        rounded = -(-vocabulary_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
        model = replace(model, vocabulary_size=rounded)
    elif vocabulary_size is not None and vocabulary_size > model.vocabulary_size:
        raise ConfigError(
            f"model.vocabulary_size={model.vocabulary_size} is smaller than the {vocabulary_size} tokens of "
            f"data.folder={str(config.data.folder)!r}: raise it, or set 0 to take the data's."
        )
    backends = set(backends_of_layers(config, device))
    # Layers that need different backends keep `auto`.
    backend = backends.pop() if len(backends) == 1 else config.attention.backend
    return replace(
        config,
        model=model,
        parallel=replace(config.parallel, dp_shard=degrees.dp_shard),
        attention=replace(config.attention, backend=backend),
        train=replace(config.train, device=device.type),
    )


def has_cpp_compiler() -> bool:
    """Return whether torch.compile finds one."""
    # Imported here, as it takes a while.
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except RuntimeError:
        return False
    return True


def choose_strategy(config: Config, degrees: Degrees, device_type: str) -> tuple[Config, list[str]]:
    """Replace parallel.strategy='auto' by the strategy that the cost model finds fastest; return the reasons too.

    Raises ConfigError if no strategy supports the run. All ranks choose the same: nothing is measured.
    """
    if config.parallel.strategy != AUTO:
        return config, []
    costs, unsupported = strategy_costs(config, degrees, device_type)
    if not costs:
        raise ConfigError("parallel.strategy='auto' finds none: " + " ".join(sorted(set(unsupported.values()))))
    lines = [f"{'auto' if n == 0 else '':<12}{name}: {cost}" for n, (name, cost) in enumerate(costs.items())]
    return replace(config, parallel=replace(config.parallel, strategy=next(iter(costs)))), lines


def strategy_costs(config: Config, degrees: Degrees, device_type: str) -> tuple[dict[str, Cost], dict[str, str]]:
    """Return each strategy's cost for one document per sequence, the best first; and why others are unsupported."""
    parallel, head_dim = config.parallel, config.model.head_dim
    mechanisms = config.attention.build_pattern(config.model.layers)
    shards = shards_of_one_document(config, degrees)
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
    """Return the machine for the cost model; ranks of the inner axis, if there is one, share a node."""
    machine = MACHINES[device_type]
    if parallel.context_inner > 1:
        machine = replace(machine, node_ranks=parallel.context_inner)
    if parallel.inner_gbytes_per_s:
        machine = replace(machine, inner_bytes_per_s=1e9 * parallel.inner_gbytes_per_s)
    if parallel.outer_gbytes_per_s:
        machine = replace(machine, outer_bytes_per_s=1e9 * parallel.outer_gbytes_per_s)
    return machine
