"""A trained model to compute with: logits, losses and text, on one device or over the ranks of a group.

tokens, documents -> BatchBuilder, as in training -> Transformer -> hidden states `[T, C]` of this rank
-> of all tokens, on every rank -> logits, a chunk of tokens at a time
"""

from collections.abc import Collection, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from farspan.errors import ConfigError, FarspanError, file_errors_reported
from farspan.kernels.backend import KernelRequest, choose_backend
from farspan.kernels.layers.cross_entropy import linear_logits
from farspan.kernels.masks.rows import Rows
from farspan.kernels.merge import accumulation_dtype
from farspan.kernels.planner import Sizes
from farspan.parallel.comm import Unconnected
from farspan.parallel.context_parallel.api import PLANS, ContextParallel
from farspan.parallel.context_parallel.cost_model import Job
from farspan.parallel.layout import Shards
from farspan.paths import expanded_setting
from farspan.trainer.batch import BatchBuilder, LayerAttention, MicroBatch, work_of_layers
from farspan.trainer.data.packing import IGNORED, PackedSequence
from farspan.trainer.hugging_face.convert import is_model, read_model
from farspan.trainer.model.transformer import Transformer
from farspan.trainer.resilience.agreement import all_gather_objects
from farspan.trainer.weights.io import EMBEDDING, Decoder, find_trained_model, read_weights

CHUNK = 1024
"""Tokens whose logits are made at once: 0.5 GB with a vocabulary of 128K."""


class LanguageModel:
    """A trained decoder, `farspan.load` makes it; parameters take no gradients.

    Under a group every rank has all parameters, makes the same calls in the same order, with all tokens, and gets the
    same results; each runs the layers for its own share of the tokens.
    """

    def __init__(
        self,
        decoder: Decoder,
        tensors: dict[str, Tensor],
        *,
        device: torch.device,
        dtype: torch.dtype,
        context: ContextParallel,
    ) -> None:
        """tensors: of all parameters and buffers, in any floating-point dtype. context: the ranks of a sequence."""
        self.decoder, self.device, self.dtype, self.context = decoder, device, dtype, context
        self.model = _build(decoder, tensors, device, dtype)
        config, self._mechanisms = decoder.model, decoder.mechanisms()
        requests = {m: KernelRequest.of(m, dtype, config.head_dim, config.head_dim) for m in self._mechanisms}
        self._backends = {m: choose_backend("auto", device, request) for m, request in requests.items()}
        self._layers = lru_cache(PLANS)(self._layers_for)
        # Layouts and strategies that cannot run are refused here.
        self._batch(torch.zeros(1, dtype=torch.int64), None)

    def logits(self, tokens: Tensor | Sequence[int], documents: Sequence[int] | None = None) -> Tensor:
        """Return the logits of the token after each token, `[tokens, vocabulary]`, of all tokens on every rank.

        float32, or float64 for float64, on the model's device. tokens: ids of one sequence, int64 `[tokens]`.
        documents: lengths of what is packed into it, whose sum it has; one document if left out. Raises ValueError for
        others, ConfigError for documents of a length that a mechanism does not take.
        """
        return linear_logits(self._hidden_states(tokens, documents), self.model.head.weight)

    def logits_in_chunks(
        self, tokens: Tensor | Sequence[int], documents: Sequence[int] | None = None, *, chunk: int = CHUNK
    ) -> Iterator[Tensor]:
        """Return the rows of `logits` in turn, `chunk` tokens each: for those that do not fit into memory together.

        The layers run first; ranks exchange nothing between chunks, so that one may stop early.
        """
        parts = self._hidden_states(tokens, documents).split(chunk)  # of [n, C]
        return (linear_logits(hidden, self.model.head.weight) for hidden in parts)

    @torch.no_grad()
    def loss(self, tokens: Tensor | Sequence[int], documents: Sequence[int] | None = None) -> float:
        """Return the mean loss in nats of each token from those before it in its document, as evaluation has it.

        The first token of a document is not predicted. Raises ValueError as `logits` does, and where nothing is left.
        """
        batch = self._batch(_checked(tokens, self.decoder.model.vocabulary_size), documents)
        losses = self.model(batch.tokens, batch.labels, batch.context).losses.double()
        total = torch.stack([losses.sum(), (batch.labels != IGNORED).sum()])
        loss_sum, count = self.context.channel.all_reduce(total, kind="loss").tolist()
        if not count:
            raise ValueError("loss needs a document of two tokens or more: the first one is not predicted")
        return loss_sum / count

    def generate(
        self,
        tokens: Tensor | Sequence[int],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        seed: int | None = None,
        stop: Collection[int] = (),
    ) -> Tensor:
        """Return the tokens that follow, int64 `[new tokens]` on the CPU: at most so many, the last one of `stop`.

        tokens: a prompt of at least one, one document. temperature: 0 takes the most likely token, 1 draws from the
        model's distribution, by `seed` if it is given. Each new token computes the whole sequence again. Raises
        ValueError as `logits` does, ConfigError for a model whose experts choose tokens: those see the future.
        """
        if any(self.decoder.model.expert_layers) and self.decoder.model.experts.choice == "experts":
            raise ConfigError(
                "generate needs the past alone, but model.experts.choice='experts' chooses among all tokens of a "
                "sequence: train with choice='tokens' to generate."
            )
        if temperature < 0:
            raise ValueError(f"temperature is 0 or more; got {temperature}")
        sequence, prompt = _checked(tokens, self.decoder.model.vocabulary_size), len(tokens)
        generator = torch.Generator()
        generator.seed() if seed is None else generator.manual_seed(seed)
        while len(sequence) < prompt + max_new_tokens:
            hidden = self._hidden_states(sequence, None)[-1:]  # [1, C]
            scores = linear_logits(hidden, self.model.head.weight)[0].double().cpu()  # [V]
            new = _chosen(scores, temperature, generator)
            # What the first rank has chosen: others may have rounded otherwise, or drawn by other seeds.
            new = self.context.channel.all_gather(new.to(self.device), kind="token")[0].cpu()
            sequence = torch.cat((sequence, new))
            if int(new) in stop:
                break
        return sequence[prompt:]

    @torch.no_grad()
    def _hidden_states(self, tokens: Tensor | Sequence[int], documents: Sequence[int] | None) -> Tensor:
        """Return what the head reads of all tokens, `[tokens, C]`."""
        batch = self._batch(_checked(tokens, self.decoder.model.vocabulary_size), documents)
        local = self.model.hidden_states(batch.tokens, batch.context)  # [tokens_local, C]
        parts = torch.stack(self.context.channel.all_gather(local, kind="hidden_states"))  # [P, tokens_local, C]
        return self._shards(_rows(len(tokens), documents)).unshard(parts)

    def _batch(self, tokens: Tensor, documents: Sequence[int] | None) -> MicroBatch:
        rows = _rows(len(tokens), documents)
        is_last = rows.document != torch.cat((rows.document[1:], rows.document.new_full((1,), -1)))
        labels = tokens.roll(-1).masked_fill(is_last, IGNORED)
        columns = (column.numpy() for column in (tokens, labels, rows.position, rows.document))
        names = ("tokens", "labels", "position", "document")
        model = self.decoder.model
        batches = BatchBuilder(
            model=model,
            layers=self._layers(len(tokens)),
            layout=self.context.layout,
            device=self.device,
            dtype=self.dtype,
            seed=0,
            expert_channel=Unconnected(0, 1) if any(model.expert_layers) else None,
        )
        return batches.build(PackedSequence(**dict(zip(names, columns, strict=True))))

    def _layers_for(self, tokens: int) -> tuple[LayerAttention, ...]:
        """Return how each layer attends in a sequence of so many tokens; `auto` takes it for one document."""
        shards, model = self._shards(Rows.packed([tokens])), self.decoder.model
        sizes, inner = Sizes.of(self.dtype, model.head_dim, model.head_dim), self.context.channel.inner_size
        jobs = {
            m: Job(mechanism=m, shards=shards, heads=model.heads_of(m), sizes=sizes, inner_size=inner)
            for m in dict.fromkeys(self._mechanisms)
        }
        strategies = {m: self.context.strategy_of(job, self.device) for m, job in jobs.items()}
        return tuple(
            LayerAttention(mechanism=m, strategy=strategies[m], backend=self._backends[m]) for m in self._mechanisms
        )

    def _shards(self, rows: Rows) -> Shards:
        work = partial(work_of_layers, self._mechanisms)
        return Shards.build(rows, layout=self.context.layout, degree=self.context.channel.size, work=work)


def load(
    folder: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    group: dist.ProcessGroup | None = None,
    strategy: str = "auto",
    layout: str = "zigzag",
) -> LanguageModel:
    """Return the model in `folder`: a run (its newest complete checkpoint), one step in its checkpoints/, weights that
    `farspan import` or `farspan upcycle` wrote, or a Hugging Face model with its config.json and safetensors.

    device: by default the current GPU, or the CPU where there is none. dtype: that it computes in, by default the
    `train.compute_dtype` of the run, or that of the stored weights. group: ranks that share each sequence, which all
    make this call; strategy, layout: how, see docs/strategies.md. Without a group no other rank takes part.
    Raises CheckpointError for a folder that is none of these, or damaged, ConfigError for a model, strategy or device
    that farspan cannot run; of a group on every rank.
    """
    path = Path(expanded_setting("folder", str(folder)))
    if group is None:
        return _load(path, device, dtype, ContextParallel(None))
    model, error = None, None
    try:
        model = _load(path, device, dtype, ContextParallel(group, strategy, layout))
    except FarspanError as raised:
        error = raised
    if problem := next(filter(None, all_gather_objects(error, group)), None):
        raise problem from error
    assert model is not None
    return model


@file_errors_reported()
def _load(
    folder: Path, device: torch.device | str | None, dtype: torch.dtype | None, context: ContextParallel
) -> LanguageModel:
    compute_dtype = dtype
    if is_model(folder):
        decoder, tensors, _ = read_model(folder)
    else:
        trained = find_trained_model(folder)
        decoder, tensors = trained.decoder, read_weights(trained.decoder, trained.weights)
        compute_dtype = dtype or (trained.run and trained.run.train.torch_dtype)
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device={str(device)!r} but torch sees no GPU: leave it out, or install torch for CUDA.")
    if chosen.type == "cuda" and chosen.index is None:
        chosen = torch.device("cuda", torch.cuda.current_device())
    compute_dtype = compute_dtype or tensors[EMBEDDING].dtype
    return LanguageModel(decoder, tensors, device=chosen, dtype=compute_dtype, context=context)


def _build(decoder: Decoder, tensors: dict[str, Tensor], device: torch.device, dtype: torch.dtype) -> Transformer:
    with torch.device("meta"):
        model = Transformer(decoder.model, decoder.mechanisms())
    # Biases of routers stay as exact as in training.
    buffers = {name: accumulation_dtype(dtype) for name, _ in model.named_buffers()}
    state = {name: tensor.to(device, buffers.get(name, dtype)) for name, tensor in tensors.items()}
    model.load_state_dict(state, assign=True)
    if decoder.model.tied_embeddings:
        # Assigned under both of its names.
        model.head.weight = model.embedding.weight
    return model.requires_grad_(False).eval()


def _checked(tokens: Tensor | Sequence[int], vocabulary: int) -> Tensor:
    """Return tokens as int64 `[tokens]` on the CPU; raises ValueError for none, or for others than ids."""
    ids = torch.as_tensor(tokens).cpu()
    if ids.dim() != 1 or not len(ids) or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"tokens are the ids of one sequence, at least one; got {ids.dtype} {list(ids.shape)}")
    ids = ids.long()  # unsigned ones, as files of tokens have, lack most operations
    lowest, highest = (int(x) for x in ids.aminmax())
    if lowest < 0 or highest >= vocabulary:
        wrong = lowest if lowest < 0 else highest
        raise ValueError(f"token {wrong} is outside the model's vocabulary, 0 to {vocabulary - 1}")
    return ids


def _rows(tokens: int, documents: Sequence[int] | None) -> Rows:
    lengths = (tokens,) if documents is None else tuple(map(int, documents))
    if min(lengths, default=0) < 1 or sum(lengths) != tokens:
        raise ValueError(f"documents are lengths that add up to the {tokens} tokens; got {list(lengths)}")
    return Rows.packed(lengths)


def _chosen(scores: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """Return the next token by scores `[V]`, int64 `[1]`."""
    if temperature == 0:
        return scores.argmax(dim=0, keepdim=True)
    return (scores / temperature).softmax(dim=0).multinomial(1, generator=generator)
