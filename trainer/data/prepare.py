"""`farspan data prepare`: documents into a folder of token ids to memory-map, split into train and validation."""

import argparse
import hashlib
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from farspan.errors import DataError
from farspan.trainer.data.output import output_folder
from farspan.trainer.data.pieces import character_start, pieces
from farspan.trainer.data.readers import SKIP_FLAG, DocumentReader
from farspan.trainer.data.source import SPLITS, SplitMeta, SplitWriter, write_synced
from farspan.trainer.data.token_bytes import write_token_bytes
from farspan.trainer.data.tokenizer import BOS_CHOICES, TOKENIZER_FOLDER, Tokenizer, load_tokenizer
from farspan.trainer.data.workers import Part, tokenize

HASH_BYTES = 8
LARGE_PIECE_BYTES = 1 << 24
LARGE_PIECE = "%-12s%s: the tokenizer allows no cut in %d MB, which take up to 150 bytes of memory a byte"

log = logging.getLogger("farspan")
RENAMED = {"--held-out": "--validation-fraction", "--hold-out-ends": "--validation-from-ends"}


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareReport:
    out: Path
    train: SplitMeta
    validation: SplitMeta
    num_without_tokens: int
    """Documents that were left out since they have none."""
    num_skipped: int
    first_skipped: str | None
    files: Mapping[str, int]
    """How many were read, by suffix."""
    duration_s: float

    def summary(self) -> str:
        kinds = sorted(self.files.items(), key=lambda kind: -kind[1])
        lines = [f"{'files':<12}{', '.join(f'{number:,} {kind}' for kind, number in kinds)}"]
        if self.num_skipped:
            lines.append(f"{'skipped':<12}{self.num_skipped:,} unreadable documents, the first: {self.first_skipped}")
        if self.num_without_tokens:
            lines.append(f"{'left out':<12}{self.num_without_tokens:,} documents without any token")
        for name, meta in (("train", self.train), ("validation", self.validation)):
            lines.append(
                f"{name:<12}{meta.num_documents:,} documents, {meta.num_tokens:,} tokens, "
                f"{meta.num_bytes / meta.num_tokens:.2f} bytes per token"
            )
            shares = (f"{int(length):,}: {share:.0%}" for length, share in (meta.long_documents or {}).items())
            lines.append(
                f"{'':<12}median {meta.median_tokens:,}, longest {meta.longest_tokens:,} tokens; share of tokens in "
                f"documents of at least {', '.join(shares)}"
            )
        return "\n".join([*lines, f"{'written':<12}{self.out} in {self.duration_s:.1f} s"])


def prepare(
    paths: Sequence[str | Path],
    *,
    tokenizer: Tokenizer,
    out: str | Path,
    suffixes: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    validation_fraction: float = 0.05,
    validation_from_ends: bool = False,
    text_key: str = "text",
    skip_unreadable: bool = False,
    overwrite: bool = False,
    workers: int = 1,
) -> PrepareReport:
    """Write `out`/train, `out`/validation and `out`/tokenizer from the documents of `paths`, all or nothing.

    validation_from_ends: the last fraction of every document instead of a fraction of the documents. workers: processes
    that tokenize; the files do not depend on it. Raises DataError.
    """
    started_s = time.perf_counter()
    if not 0 < validation_fraction < 1:
        raise DataError(f"--validation-fraction {validation_fraction} must be greater than 0 and less than 1.")
    if workers < 1:
        raise DataError(f"--workers {workers} must be at least 1.")
    out = Path(out)
    target = out.resolve()  # `out` may be a link or end in `..`, and the folder is moved in by a rename
    reader = DocumentReader(
        paths, suffixes=suffixes, exclude=exclude, text_key=text_key, skip_unreadable=skip_unreadable, omit=target
    )
    try:
        with output_folder(target, overwrite=overwrite) as folder:
            train, validation, num_without_tokens = _write_splits(
                reader, folder, tokenizer, validation_fraction, validation_from_ends, workers
            )
            _write_tokenizer(folder / TOKENIZER_FOLDER, tokenizer)
            write_token_bytes(folder, tokenizer)
    except OSError as error:
        raise DataError(f"{out} cannot be written: {error.strerror or error}; choose another --out.") from error
    return PrepareReport(
        out=out,
        train=train,
        validation=validation,
        num_without_tokens=num_without_tokens,
        num_skipped=reader.num_skipped,
        first_skipped=reader.first_skipped,
        files=reader.files,
        duration_s=time.perf_counter() - started_s,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "paths", type=Path, nargs="+", metavar="PATH", help="text, JSONL, JSON or parquet file, or folder of them"
    )
    parser.add_argument(
        "--tokenizer", type=Path, required=True, metavar="bytes|FILE", help="bytes, or a tokenizers JSON file"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to make")
    parser.add_argument("--suffix", nargs="+", action="extend", metavar=".py", help="take only these inside folders")
    parser.add_argument(
        "--exclude", nargs="+", action="extend", default=[], metavar="NAME", help="file and folder names or globs"
    )
    parser.add_argument(
        "--validation-fraction",
        type=float,
        default=0.05,
        metavar="F",
        help="fraction of the documents for validation (0.05)",
    )
    parser.add_argument(
        "--validation-from-ends",
        action="store_true",
        help="the end of every document for validation, as for one long book",
    )
    for old, new in RENAMED.items():
        parser.add_argument(old, nargs="?", action=_RenamedFlag, const=new, help=argparse.SUPPRESS)
    parser.add_argument("--text-key", default="text", metavar="KEY", help="JSONL key or parquet column (text)")
    parser.add_argument(SKIP_FLAG, action="store_true", help="skip and count empty and non-UTF-8 documents")
    parser.add_argument(
        "--end-token", metavar="TOKEN", help="end-of-document token (the eos_token of the files beside the tokenizer)"
    )
    parser.add_argument(
        "--bos",
        choices=BOS_CHOICES,
        default=BOS_CHOICES[0],
        help="begin documents with the beginning-of-sequence token (auto: as the tokenizer does)",
    )
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes that tokenize (1)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier result in DIR")


class _RenamedFlag(argparse.Action):
    """A flag of earlier versions; `const` is its new name."""

    def __call__(self, parser: argparse.ArgumentParser, *rest: object) -> None:
        parser.error(f"{self.option_strings[0]} was renamed to {self.const}")


def run(args: argparse.Namespace) -> None:
    """Run `farspan data prepare` and print a summary; raises DataError."""
    report = prepare(
        args.paths,
        tokenizer=load_tokenizer(str(args.tokenizer), end_token=args.end_token, bos=args.bos),
        out=args.out,
        suffixes=args.suffix,
        exclude=args.exclude,
        validation_fraction=args.validation_fraction,
        validation_from_ends=args.validation_from_ends,
        text_key=args.text_key,
        skip_unreadable=args.skip_unreadable,
        overwrite=args.overwrite,
        workers=args.workers,
    )
    print(report.summary())


def _write_splits(
    reader: DocumentReader,
    folder: Path,
    tokenizer: Tokenizer,
    validation_fraction: float,
    from_ends: bool,
    workers: int,
) -> tuple[SplitMeta, SplitMeta, int]:
    """Write every document to its split; return the metas of train and validation and how many had no tokens.

    Raises DataError when a split stays empty.
    """
    lowest, highest, num_without_tokens = 1.0, 0.0, 0
    start = np.array(tokenizer.start_ids, dtype=np.uint32)
    with (
        SplitWriter(folder / SPLITS[0], tokenizer=tokenizer) as train,
        SplitWriter(folder / SPLITS[1], tokenizer=tokenizer) as validation,
    ):
        parts = _parts(reader, tokenizer, validation_fraction, from_ends)
        # Closed at the end of the block, and with it the workers.
        with closing(tokenize(parts, tokenizer, workers)) as tokenized:
            for part, ids in tokenized:
                writer = (train, validation)[part.split]
                if len(ids):
                    writer.append(ids if writer.is_open else np.append(start, ids))
                if part.document_bytes is None:
                    continue
                if writer.is_open:
                    writer.end_document(part.document_bytes)
                    lowest, highest = min(lowest, part.point), max(highest, part.point)
                else:
                    num_without_tokens += 1
        if train.num_documents + validation.num_documents == 0:
            raise DataError(
                f"No input holds a readable document ({reader.num_skipped} skipped, {num_without_tokens} without "
                "tokens); give other paths."
            )
        if from_ends and validation.num_documents == 0:
            raise DataError("Documents of a single character have no end to split off; drop --validation-from-ends.")
        if train.num_documents == 0 or validation.num_documents == 0:
            raise DataError(_empty_split(train.num_documents, validation.num_documents, lowest, highest))
        return train.finish(), validation.finish(), num_without_tokens


def _parts(reader: DocumentReader, tokenizer: Tokenizer, validation_fraction: float, from_ends: bool) -> Iterator[Part]:
    """Yield the documents in pieces, each with its split."""
    for document in reader:
        point, size = split_point(document.text), len(document.text)
        if from_ends:
            border = _end_start(document.text, validation_fraction)
        else:
            border = 0 if point < validation_fraction else size
        for split, (start, stop) in enumerate(((0, border), (border, size))):
            try:
                for piece in pieces(document.text, start, stop, tokenizer.encode, tokenizer.words):
                    if len(piece.text) > LARGE_PIECE_BYTES:
                        log.warning(LARGE_PIECE, "large piece", document.origin, len(piece.text) / 1e6)
                    yield Part(
                        piece=piece,
                        origin=document.origin,
                        split=split,
                        point=point,
                        document_bytes=stop - start if piece.is_last else None,
                    )
            except DataError as error:
                raise DataError(f"{document.origin}: {error}") from error


def _write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Copy the tokenizer's files, for whoever uses the model that is trained on the tokens."""
    if tokenizer.files:
        folder.mkdir()
    for name, content in tokenizer.files.items():
        write_synced(folder / name, content)


def split_point(text: bytes) -> float:
    """Return the hash of a document as a point in [0, 1]; points below the validation fraction are of that split.

    By content: the split does not depend on the order or the company of documents, and is the same on every machine.
    """
    return int.from_bytes(hashlib.blake2b(text, digest_size=HASH_BYTES).digest()) / 2 ** (8 * HASH_BYTES)


def _end_start(text: bytes, fraction: float) -> int:
    """Return where the last `fraction` of `text` starts: at a line, or else a word, if one starts near.

    Near: the end becomes longer or shorter by a half at most. Both parts get at least one character, unless the text
    has only one.
    """
    last = character_start(text, len(text) - 1)
    wanted = character_start(text, min(max(round(len(text) * (1 - fraction)), 1), last))
    if wanted == 0:
        wanted = len(text[:4].decode(errors="ignore")[0].encode())  # behind the first character
    reach = min(wanted, len(text) - wanted) // 2
    for separator in (b"\n", b" "):
        before = text.rfind(separator, wanted - reach - 1, wanted) + 1
        after = text.find(separator, wanted, wanted + reach) + 1
        if before or after:
            return before if before and (not after or wanted - before <= after - wanted) else after
    return wanted


def _empty_split(num_train: int, num_validation: int, lowest: float, highest: float) -> str:
    """Return the error for an empty split, with a fraction that works where there is one."""
    split = "validation" if num_validation == 0 else "train"
    # A fraction between the points of the documents, rounded inwards: up from the lowest, or down from the highest.
    works = (math.floor(lowest * 1000) + 1 if num_validation == 0 else math.ceil(highest * 1000) - 1) / 1000
    fix = (
        f"pass --validation-fraction {works:g}"
        if lowest < works <= highest and works < 1
        else "give more different documents"
    )
    fix += ", or pass --validation-from-ends, which takes the end of every document"
    return f"None of the {num_train + num_validation} documents falls into the {split} split; {fix}."
