"""`farspan data prepare`: documents into a folder of token ids to memory-map, split into train and validation."""

import argparse
import hashlib
import math
import secrets
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from farspan.errors import DataError
from farspan.trainer.data.readers import DocumentReader
from farspan.trainer.data.source import META_FILE, OFFSETS_FILE, SPLITS, TOKENS_FILE, SplitMeta, SplitWriter
from farspan.trainer.data.tokenizer import Tokenizer, load_tokenizer

HASH_BYTES = 8
RENAMED = {"--held-out": "--validation-fraction", "--hold-out-ends": "--validation-from-ends"}


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareReport:
    out: Path
    train: SplitMeta
    validation: SplitMeta
    num_skipped: int
    duration_s: float

    def summary(self) -> str:
        lines = [
            f"{name:<12}{meta.num_documents:,} documents, {meta.num_tokens:,} tokens, "
            f"{meta.num_bytes / meta.num_tokens:.2f} bytes per token"
            for name, meta in (("train", self.train), ("validation", self.validation))
        ]
        skipped = f", {self.num_skipped:,} unreadable documents skipped" if self.num_skipped else ""
        return "\n".join([*lines, f"{'written':<12}{self.out} in {self.duration_s:.1f} s{skipped}"])


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
) -> PrepareReport:
    """Write `out`/train and `out`/validation from the documents of `paths`, both or neither; raises DataError.

    validation_from_ends: the last fraction of every document instead of a fraction of the documents.
    """
    started_s = time.perf_counter()
    if not 0 < validation_fraction < 1:
        raise DataError(f"--validation-fraction {validation_fraction} must be greater than 0 and less than 1.")
    out = Path(out)
    target = out.resolve()  # `out` may be a link or end in `..`, and the folder is moved in by a rename
    _check_target(target, overwrite)
    reader = DocumentReader(
        paths, suffixes=suffixes, exclude=exclude, text_key=text_key, skip_unreadable=skip_unreadable, omit=target
    )
    partial = target.with_name(f".{target.name}.partial-{secrets.token_hex(4)}")  # hidden, so no reader takes it in
    try:
        train, validation = _write_splits(reader, partial, tokenizer, validation_fraction, validation_from_ends)
        _publish(partial, target, overwrite)
    except OSError as error:
        raise DataError(f"{out} cannot be written: {error.strerror or error}; choose another --out.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    duration_s = time.perf_counter() - started_s
    return PrepareReport(
        out=out, train=train, validation=validation, num_skipped=reader.num_skipped, duration_s=duration_s
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "paths", type=Path, nargs="+", metavar="PATH", help="text, JSONL or parquet file, or folder of them"
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
    parser.add_argument(
        "--skip-unreadable", action="store_true", help="inside folders, skip and count empty or non-UTF-8 documents"
    )
    parser.add_argument("--end-token", metavar="TOKEN", help="end-of-document token of the tokenizer file")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier result in DIR")


class _RenamedFlag(argparse.Action):
    """A flag of earlier versions; `const` is its new name."""

    def __call__(self, parser: argparse.ArgumentParser, *rest: object) -> None:
        parser.error(f"{self.option_strings[0]} was renamed to {self.const}")


def run(args: argparse.Namespace) -> None:
    """Run `farspan data prepare` and print a summary; raises DataError."""
    report = prepare(
        args.paths,
        tokenizer=load_tokenizer(str(args.tokenizer), end_token=args.end_token),
        out=args.out,
        suffixes=args.suffix,
        exclude=args.exclude,
        validation_fraction=args.validation_fraction,
        validation_from_ends=args.validation_from_ends,
        text_key=args.text_key,
        skip_unreadable=args.skip_unreadable,
        overwrite=args.overwrite,
    )
    print(report.summary())


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not overwrite:
        raise DataError(f"{target} exists already; pass another --out, or --overwrite to replace it.")
    ours = {target / split for split in SPLITS}
    ours |= {split / name for split in ours for name in (TOKENS_FILE, OFFSETS_FILE, META_FILE)}
    stranger = next((path for path in target.rglob("*") if path not in ours), None)
    # --overwrite must never be able to delete a corpus.
    if stranger is not None or not target.is_dir():
        raise DataError(f"{stranger or target} is not a result of an earlier prepare; pass another --out.")


def _write_splits(
    reader: DocumentReader, folder: Path, tokenizer: Tokenizer, validation_fraction: float, from_ends: bool
) -> tuple[SplitMeta, SplitMeta]:
    """Write every document to its split; return the metas of train and validation. DataError when one stays empty."""
    lowest, highest = 1.0, 0.0
    with (
        SplitWriter(folder / SPLITS[0], tokenizer=tokenizer) as train,
        SplitWriter(folder / SPLITS[1], tokenizer=tokenizer) as validation,
    ):
        for document in reader:
            if from_ends:
                start = _end_start(document.text, validation_fraction)
                parts = [(train, document.text[:start]), (validation, document.text[start:])]
            else:
                # By content, hashed to a point in [0, 1]: the split does not depend on the order or the company of
                # documents, and is the same on every machine.
                digest = hashlib.blake2b(document.text.encode(), digest_size=HASH_BYTES).digest()
                point = int.from_bytes(digest) / 2 ** (8 * HASH_BYTES)
                lowest, highest = min(lowest, point), max(highest, point)
                parts = [(validation if point < validation_fraction else train, document.text)]
            for split, text in parts:
                if not text:
                    continue
                try:
                    ids = tokenizer.encode(text)
                except DataError as error:
                    raise DataError(f"{document.origin}: {error}") from error
                split.add(ids, num_bytes=len(text.encode()))
        if train.num_documents + validation.num_documents == 0:
            raise DataError(f"No input holds a readable document ({reader.num_skipped} skipped); give other paths.")
        if from_ends and validation.num_documents == 0:
            raise DataError("Documents of a single character have no end to split off; drop --validation-from-ends.")
        if train.num_documents == 0 or validation.num_documents == 0:
            raise DataError(_empty_split(train.num_documents, validation.num_documents, lowest, highest))
        return train.finish(), validation.finish()


def _end_start(text: str, fraction: float) -> int:
    """Return where the last `fraction` of `text` starts: at a line, or else a word, if one starts near.

    Near: the end becomes longer or shorter by a half at most. Both parts get at least one character, unless the text
    has only one.
    """
    wanted = min(max(round(len(text) * (1 - fraction)), 1), max(len(text) - 1, 1))
    reach = min(wanted, len(text) - wanted) // 2
    for is_boundary in (lambda character: character == "\n", str.isspace):
        for distance in range(reach + 1):
            for start in (wanted - distance, wanted + distance):
                if is_boundary(text[start - 1]):
                    return start
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


def _publish(partial: Path, target: Path, overwrite: bool) -> None:
    """Rename `partial` to `target`, keeping an earlier result until the new one is in place; raises OSError."""
    if not (overwrite and target.exists()):
        partial.rename(target)  # fails if another process has made `target` meanwhile
        return
    old = target.with_name(f".{target.name}.old-{secrets.token_hex(4)}")
    target.rename(old)
    try:
        partial.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old)
