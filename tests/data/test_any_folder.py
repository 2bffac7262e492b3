"""Folders of any content: what of them is read, and that all else is named."""

import random

from mixtral_jax.config import ConfigError, DataConfig
from mixtral_jax.data.sources import Source, describe_files, list_source


def write_at_random(root, rng):
    """Writes files, links and folders whose names and kinds have little to do with each other."""
    words = [
        "training",
        "testing",
        "dev",
        "notes",
        "a",
        "b-train",
        "train_sft-00000-of-00002",
        "cache-7",
    ]
    suffixes = [".jsonl", ".JSONL", ".txt", ".json", ".arrow", ".csv", ".md", ".gz", "~", ""]
    for _ in range(rng.randint(2, 7)):
        folder = root / "/".join(rng.choices([".", "train", "test", ".git", "en"], k=2))
        folder.mkdir(parents=True, exist_ok=True)
        name = rng.choice(["", "", ".", "._"]) + rng.choice(words) + rng.choice(suffixes)
        entry = folder / (name + rng.choice(["", "", ".gz", ".ZST"]))
        entry = folder / "dataset_dict.json" if rng.random() < 0.05 else entry
        if entry.exists() or entry.is_symlink():
            continue
        match rng.randrange(10):
            case 0:
                entry.symlink_to(rng.choice(["nowhere", ".", "../train"]))
            case 1:
                entry.mkdir()
                (entry / "inside.jsonl").touch()
            case 2:
                entry.touch()
            case _:
                entry.write_text("content")


def test_every_file_of_a_folder_is_read_once_or_named_or_the_folder_is_refused(tmp_path):
    rng = random.Random(0)
    num_read = 0
    for number in range(150):
        root = tmp_path / f"folder{number}"
        root.mkdir()
        (root / "rows.jsonl").write_text("content")
        write_at_random(root, rng)
        try:
            listing = list_source(Source(str(root)))
        except ConfigError:  # Such as for the training splits of two sets of shards.
            continue
        listing.not_read.pop("missing shards", None)
        named = [path for paths in listing.not_read.values() for path in paths]
        entered = [path for path in root.rglob("*") if not {*named} & {*path.parents}]
        there = [path for path in entered if path in named or not path.is_dir()]
        assert sorted([*listing.files, *named]) == sorted(there)
        (said, *_) = [*describe_files(DataConfig(path=str(root))), ""]
        for reason, paths in listing.not_read.items():
            assert f"{reason}: {len(paths)} (" in said
            # The first file of each suffix is named.
            for suffix in {path.suffix.lower() for path in paths}:
                alike = (path for path in paths if path.suffix.lower() == suffix)
                assert min(path.relative_to(root).as_posix() for path in alike) in said
        num_read += 1
    assert num_read > 100
