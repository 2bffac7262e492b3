"""Files of every format, and rows and files that cannot be read."""

import bz2
import gzip
import lzma
import random

import pyarrow
import pyarrow.parquet
import pytest

from mixtral_jax.config import ConfigError
from mixtral_jax.data.documents import Document, read_documents
from mixtral_jax.data.readers import NOT_LOADED, BadRow, read_file
from tests.data.chat_cases import write_table
from tests.data.text_files import texts, write_file

SAVE = "save the text as UTF-8, or leave the row out"


def bad_rows(path):
    """Reasons by the end of the origin: the file's name and the line."""
    rows = [row for row in read_documents(str(path), "text") if isinstance(row, BadRow)]
    return {row.origin.rpartition("/")[2]: row.reason for row in rows}


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet", ".arrow"])
def test_every_form_gives_the_same_documents(tmp_path, suffix):
    rows = ["one, line", "two\nlines 😀", "x" * 200_000]
    write_file(tmp_path / f"a{suffix}", rows)
    assert texts(tmp_path / f"a{suffix}") == rows


COMPRESSED = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: pyarrow.compress(content, codec="zstd", asbytes=True),
    ".GZ": gzip.compress,
}


@pytest.mark.parametrize("compression", COMPRESSED)
@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".JSON", ".csv", ".parquet", ".arrow"])
def test_every_form_is_read_in_any_case_and_through_any_compression(tmp_path, suffix, compression):
    rows = ["one, line", "two\nlines 😀", "x" * 200_000]
    write_file(tmp_path / f"a{suffix.lower()}", rows)
    content = (tmp_path / f"a{suffix.lower()}").read_bytes()
    (tmp_path / "d").mkdir()
    compress = COMPRESSED[compression]
    # Concatenated parts are one file, as `cat a.gz b.gz` makes it.
    parts = [content[:100], content[100:]]
    (tmp_path / "d" / f"A{suffix}{compression}").write_bytes(b"".join(map(compress, parts)))
    assert texts(tmp_path / "d") == texts(tmp_path / "d" / f"A{suffix}{compression}") == rows


@pytest.mark.parametrize("compression", COMPRESSED)
def test_a_compressed_text_is_one_document(tmp_path, compression):
    text = "first\r\nsecond\n"
    file = tmp_path / f"a.TXT{compression}"
    file.write_bytes(COMPRESSED[compression](text.encode("utf-8-sig")))
    (document,) = read_documents(str(file), "text")
    assert document.text == "first\nsecond\n" and document.category.file_type == ".txt"


@pytest.mark.parametrize(
    "damage", [lambda content: content[: len(content) // 2], lambda _: b"junk!"]
)
@pytest.mark.parametrize("compression", COMPRESSED)
@pytest.mark.parametrize("suffix", [".jsonl", ".txt", ".csv", ".parquet"])
def test_a_damaged_compressed_file_is_a_config_error(tmp_path, suffix, compression, damage):
    content = random.Random(0).randbytes(20_000).hex().encode()
    file = tmp_path / f"a{suffix}{compression}"
    file.write_bytes(damage(COMPRESSED[compression](content)))
    with pytest.raises(ConfigError, match=rf"/a{suffix}{compression}: unreadable .*: mend it"):
        texts(tmp_path)


@pytest.mark.parametrize("compression", COMPRESSED)
def test_what_follows_the_compressed_part_of_a_file_is_not_lost(tmp_path, compression):
    line = b'{"text": "a"}\n'
    (tmp_path / f"a.jsonl{compression}").write_bytes(COMPRESSED[compression](line) + line)
    with pytest.raises(ConfigError, match=rf"/a.jsonl{compression}: unreadable"):
        texts(tmp_path)


@pytest.mark.parametrize(
    "encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"]
)
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".ndjson.gz"])
def test_rows_in_another_encoding_are_refused_with_what_to_do(tmp_path, suffix, encoding):
    content = '{"text": "a"}\n'.encode(encoding)
    (tmp_path / f"a{suffix}").write_bytes(gzip.compress(content) if "gz" in suffix else content)
    name = encoding[:6].upper()
    with pytest.raises(ConfigError, match=rf"it is {name}, not UTF-8: .*, as `iconv -f {name} "):
        texts(tmp_path)


@pytest.mark.parametrize("compression", COMPRESSED)
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.txt", "a.json"])
def test_a_file_whose_name_does_not_say_that_it_is_compressed_is_refused(
    tmp_path, name, compression
):
    (tmp_path / name).write_bytes(COMPRESSED[compression](b'{"text": "a"}\n'))
    with pytest.raises(
        ConfigError, match=rf"it is compressed: call it {name}{compression.lower()}\)"
    ):
        texts(tmp_path)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_a_text_in_utf16_is_a_bad_row(tmp_path, encoding):
    (tmp_path / "a.txt").write_bytes("Some text.".encode(encoding))
    assert bad_rows(tmp_path)["a.txt"].startswith("UTF-16, not UTF-8: convert it")


@pytest.mark.parametrize("suffix", [".jsonl", ".txt", ".parquet", ".json", ".jsonl.gz", ".csv.zst"])
def test_a_pointer_of_git_lfs_is_not_taken_for_the_data(tmp_path, suffix):
    (tmp_path / f"a{suffix}").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    )
    with pytest.raises(ConfigError, match="only points to the data: run `git lfs pull`"):
        texts(tmp_path)


def test_arrow_files_of_both_forms_are_read(tmp_path):
    table = pyarrow.table({"text": ["a", "b"]})
    with pyarrow.ipc.new_file(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    assert texts(tmp_path / "a.arrow") == ["a", "b"]


def test_bad_lines_of_jsonl_are_named_and_good_ones_kept(tmp_path):
    lines = [
        b'{"text": "good"}',
        b'{"text": "broken',
        b'{"text": "\xff"}',
        b"",
        b"[1, 2]",
        b'{"title": "t"}',
        b'{"text": 5}',
        b'{"text": "  "}',
        b'{"text": "\\ud800"}',
        b"[" * 100_000,
        b'{"text": "last"}',
    ]
    (tmp_path / "f.jsonl").write_bytes(b"\n".join(lines))
    good = [row for row in read_documents(str(tmp_path), "text") if isinstance(row, Document)]
    assert [row.text for row in good] == ["good", "last"]
    assert good[1].origin.endswith("f.jsonl:11")
    reasons = bad_rows(tmp_path)
    expected = {
        2: "invalid JSON: Unterminated string",
        3: "invalid UTF-8 at byte 10",
        5: "a row must be an object with the field 'text', not a list",
        6: "no field 'text': set data.text_field to a field of the row (title)",
        7: "field 'text' must be text, not a number",
        8: "empty text",
        9: "invalid UTF-8 at character 0",
        10: "invalid JSON",
    }
    assert set(reasons) == {f"f.jsonl:{line}" for line in expected}
    assert all(reasons[f"f.jsonl:{line}"].startswith(reason) for line, reason in expected.items())


def test_bad_rows_of_csv_are_named_by_their_first_line(tmp_path):
    (tmp_path / "f.csv").write_bytes(b'id,text\n1,"two\nlines"\n2\n3,\xff\n4,good\n')
    assert bad_rows(tmp_path) == {
        "f.csv:4": "field 'text' must be text, not null: mend the row, or leave it out",
        "f.csv:5": f"invalid UTF-8 at character 0: {SAVE}",
    }


def test_bad_rows_of_columns_are_named_by_number(tmp_path):
    write_file(tmp_path / "a.parquet", ["good", None, ""])
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "b.parquet")
    assert bad_rows(tmp_path) == {
        "a.parquet:2": "field 'text' must be text, not null: mend the row, or leave it out",
        "a.parquet:3": "empty text: leave the row out",
        "b.parquet:1": "no field 'text': set data.text_field to a field of the row (body)",
    }


def test_json_lines_in_a_json_file_are_read(tmp_path):
    (tmp_path / "a.json").write_bytes(
        b'\xef\xbb\xbf{"text": "first"}\r\n{"text": "\xff"}\n{broken\n{"text": "last"}\n'
    )
    assert texts(tmp_path) == ["first", "last"]
    assert list(bad_rows(tmp_path)) == ["a.json:2", "a.json:3"]


def test_a_broken_list_of_rows_is_not_taken_for_json_lines(tmp_path):
    (tmp_path / "a.json").write_text('[\n{"text": "first"},\n{"text": "last"}\n')
    with pytest.raises(ConfigError, match=r"/a.json: unreadable .json file \(Expecting"):
        texts(tmp_path)


@pytest.mark.parametrize("suffix", [".json", ".parquet", ".arrow"])
@pytest.mark.parametrize("content", [b"\xff\xfe{ no such format", b"", b"[" * 100_000])
def test_a_file_that_cannot_be_read_is_a_config_error(tmp_path, suffix, content):
    write_file(tmp_path / "0.txt", ["good"])
    (tmp_path / f"a{suffix}").write_bytes(content)
    with pytest.raises(
        ConfigError, match=rf"/a{suffix}: unreadable {suffix} file \(.+\): mend it"
    ) as error:
        texts(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_a_file_damaged_inside_is_a_config_error(tmp_path, suffix):
    file = tmp_path / f"a{suffix}"
    write_file(file, ["a text of many words " * 1000] * 300)
    content = file.read_bytes()
    file.write_bytes(
        content[: len(content) // 2] + (content[-100:] if suffix == ".parquet" else b"")
    )
    with pytest.raises(ConfigError, match=f"/a{suffix}: unreadable"):
        texts(tmp_path)


def test_a_text_file_of_invalid_utf8_is_one_bad_row(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff no such text")
    assert bad_rows(tmp_path) == {"a.txt": f"invalid UTF-8 at character 0: {SAVE}"}


def test_a_line_of_csv_with_more_cells_than_the_header_is_a_bad_row(tmp_path):
    (tmp_path / "f.csv").write_text('id,text\n1,one, two\n2,"one, two"\n3,three\n')
    assert texts(tmp_path) == ["one, two", "three"]
    (reason,) = bad_rows(tmp_path).values()
    assert reason.startswith("invalid CSV: it has more cells than the header")


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        ('1,good\n2,"never closed\n3,lost\n', 3),
        ('1,"two\nlines"\n2,"a" and more\n', 4),
        ('1,"a \\"quote\\", as other programs write it"\n', 2),
    ],
)
def test_quotes_that_csv_does_not_know_are_refused_by_line(tmp_path, rows, line):
    (tmp_path / "f.csv").write_text(f"id,text\n{rows}")
    with pytest.raises(
        ConfigError, match=rf"f.csv: unreadable .* quotes of the row in line {line}"
    ):
        texts(tmp_path)


@pytest.mark.parametrize(
    "line",
    [
        '{"text": "a", "text": "b"}',
        '{"text": "a", "meta": [{"weight": 0, "weight": 1}]}',
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_an_object_with_two_fields_of_one_name_is_a_bad_row(tmp_path, suffix, line):
    (tmp_path / f"f{suffix}").write_text(f'{line}\n{{"text": "good"}}\n')
    assert texts(tmp_path) == ["good"]
    (reason,) = bad_rows(tmp_path).values()
    assert reason.startswith("invalid JSON: two fields are called '")


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".arrow", ".json"])
def test_a_file_with_two_columns_of_one_name_is_refused(tmp_path, suffix):
    columns = [pyarrow.array([value]) for value in "abc"]
    table = pyarrow.Table.from_arrays(columns, names=["text", "id", "text"])
    if suffix == ".parquet":
        pyarrow.parquet.write_table(table, tmp_path / "f.parquet")
    elif suffix == ".arrow":
        with pyarrow.ipc.new_stream(tmp_path / "f.arrow", table.schema) as writer:
            writer.write_table(table)
    else:
        rows = '[\n{"text": "a", "text": "c"}\n]' if suffix == ".json" else "text,id,text\na,b,c\n"
        (tmp_path / f"f{suffix}").write_text(rows)
    with pytest.raises(ConfigError, match=r"unreadable .* \(two fields are called 'text'\)"):
        texts(tmp_path)


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_columns_that_nobody_needs_are_not_loaded_but_known_to_be_filled(tmp_path, suffix):
    rows = [
        {"text": "a", "full": "x" * 9, "empty": None, "mixed": 1, "nested.list": [{"b": 1}]},
        {"text": "b", "full": "y" * 9, "empty": None, "mixed": None, "nested.list": [{"b": 2}]},
    ]
    file = tmp_path / f"f{suffix}"
    write_table(file, rows)
    first, second = (row.value for row in read_file(file, ["text"]))
    assert first == {
        "text": "a",
        "empty": None,
        **dict.fromkeys(("full", "mixed", "nested.list"), NOT_LOADED),
    }
    assert second == first | {"text": "b", "mixed": None}
