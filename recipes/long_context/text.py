"""Real text: the sources of Python on this machine, a folder, a file, or a data set on the Hub."""

import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from datasets import Dataset, IterableDataset, load_dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

STDLIB = "stdlib"
# Tests repeat themselves; what was installed later is not Python's own.
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
BUILDERS = {".jsonl": "json", ".json": "json", ".txt": "text", ".parquet": "parquet"}
HELD_OUT = 8  # one file in so many
BYTES, END = 256, "<eos>"
DOCUMENTS_AT_ONCE = 64  # read before their tokens are cut into segments
Texts = Dataset | IterableDataset


def load_texts(source: str, split: str = "train") -> Texts:
    """Documents in a column `text`; a data set on the Hub or a file is read as it comes.

    Args:
        source: `"stdlib"`, the sources of Python's standard library on this machine; a folder, of
            which every readable file is one document; a .jsonl, .json, .parquet or .txt file; or
            the name of a data set on the Hub.
        split: of the data set. Of a folder, `"train"` or `"test"`: a file's name decides, so that
            no machine and no seed moves it. A file is all one split.

    Raises:
        ValueError: there is no such source or split, or no text in it.
    """
    path = stdlib_folder() if source == STDLIB else Path(source)
    if path.is_dir():
        return folder_texts(path, split, "*.py" if source == STDLIB else "*")
    if path.is_file():
        if path.suffix not in BUILDERS:
            raise ValueError(
                f"source={source!r} is a file of an unknown kind: use one of {', '.join(BUILDERS)}"
                ", or name its folder."
            )
        texts = load_dataset(
            BUILDERS[path.suffix], data_files=str(path), split="train", streaming=True
        )
    else:
        texts = load_dataset(source, split=split, streaming=True)
    if texts.column_names and "text" not in texts.column_names:
        raise ValueError(
            f"source={source!r} has the columns {texts.column_names} and no column 'text': rename "
            "the one that holds the documents."
        )
    return texts


def name_of(source: str) -> str:
    """What a reader elsewhere may be told of a source: no folder of this machine."""
    if source == STDLIB:
        return "Python standard library"
    return Path(source).name if Path(source).exists() else source


def stdlib_folder() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def folder_texts(folder: Path, split: str, pattern: str) -> Dataset:
    """The readable files of a folder, in the order of their names."""
    if split not in ("train", "test"):
        raise ValueError(
            f"split={split!r} of a folder does not exist: use 'train', or 'test' for the one file "
            f"in {HELD_OUT} that is held out."
        )
    texts = []
    for path in sorted(folder.rglob(pattern)):
        name = path.relative_to(folder)
        if (
            path.is_file()
            and not LEFT_OUT & set(name.parts)
            and is_held_out(name) == (split == "test")
        ):
            texts += readable(path)
    if not texts:
        raise ValueError(
            f"source={str(folder)!r} has no readable text for split={split!r}: name a folder of "
            f"at least some {4 * HELD_OUT} text files."
        )
    return Dataset.from_dict({"text": texts})


def is_held_out(name: Path) -> bool:
    return zlib.crc32(name.as_posix().encode()) % HELD_OUT == 0


def readable(path: Path) -> list[str]:
    """The text of a file, or nothing if it holds none."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return []
    return [text] if text.strip() else []


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE; with 257 tokens it is bytes and an end of document. Every digit is a token.

    Raises:
        ValueError: `vocab_size` has no room for the bytes.
    """
    if vocab_size < BYTES + 1:
        raise ValueError(
            f"vocab_size={vocab_size} has no room for {BYTES} bytes and the end of a document: use "
            f"{BYTES + 1} for bytes alone, or more for byte pairs."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def segments(texts: Texts, tokenizer: PreTrainedTokenizerBase, length: int) -> Texts:
    """Rows of `length` tokens in `input_ids`: documents end to end, each with an end of sequence.

    What is left over of every `DOCUMENTS_AT_ONCE` documents is dropped.
    """

    def cut(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        tokens = [token for ids in encoded(tokenizer, batch["text"]) for token in ids]
        starts = range(0, len(tokens) - length + 1, length)
        return {"input_ids": [tokens[start : start + length] for start in starts]}

    return texts.map(
        cut, batched=True, batch_size=DOCUMENTS_AT_ONCE, remove_columns=texts.column_names
    )


def encoded(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Iterator[list[int]]:
    """Token ids of each document and its end."""
    for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
        yield [*ids, tokenizer.eos_token_id]
