"""Build Novella's training and held-out text from four collections of English novels.

Run: ``PYTHONPATH=tools python -m novella.corpus --text DIR --out DIR``
"""

from __future__ import annotations

import argparse
import json
import lzma
import random
import re
import unicodedata
import zlib
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from novella.constants import END_OF_TEXT, HELDOUT_FILE, HELDOUT_INDEX, MIB, TRAIN_FILE

Shingles = NDArray[np.uint64]


@dataclass(frozen=True)
class Limits:
    """What the corpus builder may keep, and when two books count as different."""

    seed: int = 20_251
    shingle_words: int = 8
    sample_one_in: int = 32
    duplicate_share: float = 0.20
    heldout_share: float = 0.02
    heldout_books: int = 24
    heldout_chars: tuple[int, int] = (120_000, 900_000)
    long_paragraph: int = 3_000
    flat_mean: int = 1_500
    train_bytes: int = 46 * MIB
    chunk_chars: int = 24_000_000
    xz_preset: int = 9


@dataclass(frozen=True)
class Collection:
    """One source: its licence, where it comes from, and its rank when two hold the same book."""

    name: str
    licence: str
    source: str
    rank: int


@dataclass
class Book:
    """One cleaned novel."""

    collection: str
    path: str
    text: str
    shingles: Shingles

    @property
    def key(self) -> str:
        """Unique name of the book."""
        return f"{self.collection}/{self.path}"

    @property
    def flat(self) -> bool:
        """Whether the source lost its paragraph breaks."""
        return len(self.text) / (self.text.count("\n\n") + 1) > LIMITS.flat_mean


LIMITS = Limits()
COLLECTIONS = (
    Collection(
        "clic",
        "public domain",
        "birmingham-ccr/corpora @ ae1e53d",
        0,
    ),
    Collection("litbank_original", "public domain", "dbamman/litbank @ 3e50db0", 1),
    Collection(
        "eltec_eng",
        "texts public domain, markup CC BY 4.0",
        "COST-ELTeC/ELTeC-eng @ 3db3b67",
        2,
    ),
    Collection(
        "novels100",
        "public domain",
        "computationalstylistics/100_english_novels @ 143e601",
        3,
    ),
)
PLAIN = str.maketrans(
    {
        **dict.fromkeys("\u2018\u2019\u201a\u201b\u2032\u00b4\u0060\u02bc", "'"),
        **dict.fromkeys("\u201c\u201d\u201e\u201f\u2033\u00ab\u00bb", '"'),
        **dict.fromkeys("\u2010\u2011\u2212", "-"),
        **dict.fromkeys("\u2013\u2015", "\u2014"),
        **dict.fromkeys("\u00a0\u2002\u2003\u2009\u202f\t\x0b\x0c", " "),
        **dict.fromkeys("\u00ad\u200b\u200c\u200d\ufeff\ufffd", ""),
        "\u2026": "...",
        "\u017f": "s",
    }
)
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")
TAGS = re.compile(r"</?[A-Za-z][^<>\n]{0,60}>")
NOTES = re.compile(
    r"\s?\[(?:\d{1,3}|[A-Z*]|\*+|omission|Greek(?: text)?|Music(?: score)?"
    r"|Illustration[^\]]*|(?:Pg|[Pp]age)\.? ?\d+|Footnote[^\]]*)\]"
)
EMPHASIS = re.compile(r"_([^_\n]{1,400}?)_")
DASHES = re.compile(r" ?(?:-{2,}|\u2014) ?| - ")
SPACES = re.compile(r" {2,}")
JUNK_PARAGRAPH = re.compile(
    r"^(?:[\W\d_]*|\[?(?:page|pg)\.? ?\d+\]?|.*(?:project gutenberg|gutenberg-tm|transcriber's note"
    r"|produced by .{0,80}proofread|www\.|http).*)$",
    re.IGNORECASE | re.DOTALL,
)
START_MARK = re.compile(r"\*\*\* ?START OF .{0,200}?\*\*\*", re.DOTALL)
END_MARK = re.compile(r"\*\*\* ?END OF ")
TURN = re.compile(r'(?<=[.!?,\u2014]") (?="[A-Z\'])')
SENTENCE = re.compile(r'(?<=[a-z][.!?]["\']|[a-z]{2}[.!?]) (?=["\']?[A-Z])')
WORD = re.compile(r"[a-z0-9]+")


def unwrap(paragraph: str) -> str:
    """Join the hard-wrapped lines of one paragraph; a hyphen at a line end stays a hyphen."""
    lines = [line.strip() for line in paragraph.split("\n")]
    joined = " ".join(line for line in lines if line)
    return re.sub(r"(?<=[a-z])- (?=[a-z])", "-", joined) if len(lines) > 1 else joined


def split_long(paragraph: str, limit: int = LIMITS.long_paragraph) -> list[str]:
    """Give a paragraph beyond `limit` breaks: at a change of speaker, then between sentences."""
    if len(paragraph) <= limit:
        return [paragraph]
    pieces: list[str] = []
    for turn in TURN.split(paragraph):
        current = ""
        for sentence in SENTENCE.split(turn):
            if current and len(current) + len(sentence) > limit // 4:
                pieces.append(current)
                current = sentence
            else:
                current = f"{current} {sentence}".strip()
        pieces.append(current)
    return [piece for piece in pieces if piece]


def clean(text: str) -> str:
    """Return a book as plain paragraphs: no licence, notes, page numbers or hard line breaks."""
    if start := START_MARK.search(text):
        text = text[start.end() :]
    if end := END_MARK.search(text):
        text = text[: end.start()]
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = unicodedata.normalize("NFC", text).translate(PLAIN)
    text = text.replace(END_OF_TEXT, " ")
    text = TAGS.sub("", NOTES.sub("", CONTROL.sub("", text)))
    text = EMPHASIS.sub(r"\1", text).replace("_", "")
    kept: list[str] = []
    for block in re.split(r"\n[ ]*\n\s*", text):
        paragraph = SPACES.sub(" ", DASHES.sub("\u2014", unwrap(block))).strip()
        if paragraph and not JUNK_PARAGRAPH.match(paragraph):
            kept.extend(split_long(paragraph))
    return "\n\n".join(kept)


def shingles(text: str, words: int = LIMITS.shingle_words, one_in: int = 1) -> Shingles:
    """Return the sorted unique hashes of every `words`-word run, a fixed 1-in-`one_in` sample."""
    table: dict[str, int] = {}
    tokens = WORD.findall(text.lower())
    for token in set(tokens):
        table[token] = zlib.crc32(token.encode())
    values = np.fromiter((table[token] for token in tokens), dtype=np.uint64, count=len(tokens))
    if len(values) < words:
        return np.empty(0, dtype=np.uint64)
    length = len(values) - words + 1
    mixed = np.zeros(length, dtype=np.uint64)
    for offset in range(words):
        mixed = mixed * np.uint64(0x9E3779B97F4A7C15) + values[offset : offset + length]
        mixed ^= mixed >> np.uint64(29)
    return np.unique(mixed[mixed % np.uint64(one_in) == 0])


def share_of(part: Shingles, whole: Shingles) -> float:
    """Return which share of `part`'s shingles `whole` holds too."""
    if len(part) == 0:
        return 0.0
    return float(np.isin(part, whole, assume_unique=True).mean())


def overlap(one: Shingles, other: Shingles) -> float:
    """Return the shared shingles of two books, as a share of the shorter book."""
    small, large = sorted((one, other), key=len)
    return share_of(small, large)


def drop_duplicates(books: list[Book], limit: float) -> tuple[list[Book], list[tuple[str, str]]]:
    """Keep the first of every group of books that share more than `limit` of their shingles."""
    kept: list[Book] = []
    dropped: list[tuple[str, str]] = []
    for book in books:
        twin = next((k for k in kept if overlap(book.shingles, k.shingles) > limit), None)
        if twin is None:
            kept.append(book)
        else:
            dropped.append((book.key, twin.key))
    return kept, dropped


def pick_heldout(books: list[Book], limits: Limits = LIMITS) -> list[Book]:
    """Choose whole held-out books, spread evenly over the collections, none of them flat."""
    chooser = random.Random(limits.seed)
    low, high = limits.heldout_chars
    names = [collection.name for collection in COLLECTIONS]
    chosen: list[Book] = []
    for number, name in enumerate(names):
        quota = limits.heldout_books * (number + 1) // len(names) - len(chosen)
        fit = [
            b
            for b in books
            if b.collection == name and not b.flat and "Anon" not in b.path and low <= len(b.text) <= high
        ]
        chosen.extend(chooser.sample(sorted(fit, key=lambda b: b.key), min(quota, len(fit))))
    return chosen


def without_leaks(books: list[Book], heldout: list[Book], limit: float) -> list[Book]:
    """Return the training books that share at most `limit` with every held-out book."""
    names = {book.key for book in heldout}
    return [
        book
        for book in books
        if book.key not in names and all(overlap(book.shingles, other.shingles) <= limit for other in heldout)
    ]


def read_one(item: tuple[str, str, str]) -> Book:
    """Clean one raw book (a worker's job)."""
    collection, path, raw = item
    text = clean(raw)
    return Book(collection, path, text, shingles(text, one_in=LIMITS.sample_one_in))


def read_collections(folder: Path, pool: ProcessPoolExecutor) -> list[Book]:
    """Read and clean every book, the preferred copy of a duplicate first."""
    items: list[tuple[str, str, str]] = []
    for collection in COLLECTIONS:
        source = folder / f"{collection.name}.txt.xz"
        if not source.is_file():
            msg = f"missing {source.name} in the text folder: give --text the folder that holds it"
            raise FileNotFoundError(msg)
        with lzma.open(source, "rt", encoding="utf-8") as stream:
            parts = re.split(r"^<\|book\|>[ ]*", stream.read(), flags=re.MULTILINE)[1:]
        for part in parts:
            path, _, raw = part.partition("\n")
            items.append((collection.name, path.strip(), raw))
    books = list(pool.map(read_one, items, chunksize=4))
    rank = {collection.name: collection.rank for collection in COLLECTIONS}
    return sorted(books, key=lambda b: (b.flat, rank[b.collection], b.path))


def compress(text: str) -> bytes:
    """Compress one chunk (a worker's job); xz streams may simply follow one another."""
    return lzma.compress(text.encode("utf-8"), preset=LIMITS.xz_preset)


def write_xz(path: Path, books: list[Book], pool: ProcessPoolExecutor, limit: int) -> list[Book]:
    """Write books until `limit` compressed bytes are full; return those that fitted."""
    groups: list[list[Book]] = [[]]
    for book in books:
        if sum(len(b.text) for b in groups[-1]) > LIMITS.chunk_chars:
            groups.append([])
        groups[-1].append(book)
    texts = ("".join(f"{END_OF_TEXT}{b.text}\n\n" for b in group) for group in groups)
    written: list[Book] = []
    size = 0
    with path.open("wb") as stream:
        for group, blob in zip(groups, pool.map(compress, texts), strict=True):
            if size + len(blob) > limit:
                break
            stream.write(blob)
            size += len(blob)
            written.extend(group)
    return written


def describe(book: Book) -> dict[str, object]:
    """Return a held-out book's entry in heldout.json."""
    source = next(c for c in COLLECTIONS if c.name == book.collection)
    return {
        "id": book.key,
        "opening": book.text.split("\n\n", 1)[0][:80],
        "collection": book.collection,
        "licence": source.licence,
        "source": source.source,
        "chars": len(book.text),
    }


def build(text: Path, out: Path, workers: int, console: Console) -> None:
    """Run the whole pipeline and write train.txt.xz, heldout.txt.xz and heldout.json."""
    out.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(workers) as pool:
        books = read_collections(text, pool)
        console.log(f"{len(books)} books, {sum(len(b.text) for b in books):,} characters")
        kept, dropped = drop_duplicates(books, LIMITS.duplicate_share)
        console.log(f"{len(kept)} books kept, {len(dropped)} duplicates dropped")
        heldout = pick_heldout(kept)
        train = without_leaks(kept, heldout, LIMITS.heldout_share)
        console.log(f"{len(heldout)} held out, {len(kept) - len(heldout) - len(train)} leak a bit")
        structured = [b for b in train if not b.flat]
        flat = [b for b in train if b.flat]
        random.Random(LIMITS.seed).shuffle(structured)
        written = write_xz(out / TRAIN_FILE, structured + flat, pool, LIMITS.train_bytes)
        write_xz(out / HELDOUT_FILE, heldout, pool, LIMITS.train_bytes)
    index = {
        "seed": LIMITS.seed,
        "train_books": len(written),
        "train_chars": sum(len(b.text) for b in written),
        "train_books_left_out": len(train) - len(written),
        "duplicates": [list(pair) for pair in dropped],
        "collections": {
            c.name: {
                "licence": c.licence,
                "source": c.source,
                "train_books": sum(b.collection == c.name for b in written),
                "train_chars": sum(len(b.text) for b in written if b.collection == c.name),
            }
            for c in COLLECTIONS
        },
        "heldout_chars": sum(len(b.text) for b in heldout),
        "heldout": [describe(book) for book in heldout],
    }
    (out / HELDOUT_INDEX).write_text(json.dumps(index, indent=1, ensure_ascii=False) + "\n")
    for name in (TRAIN_FILE, HELDOUT_FILE):
        console.log(f"{name}: {(out / name).stat().st_size / MIB:.2f} MiB")
    console.log(f"{len(written)} training books, {index['train_chars']:,} characters")


def main() -> None:
    """Read the command line and build the corpus."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True, help="folder of the four .txt.xz")
    parser.add_argument("--out", type=Path, required=True, help="where the corpus goes")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    build(options.text, options.out, options.workers, Console(width=110))


if __name__ == "__main__":
    main()
