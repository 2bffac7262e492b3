"""Files of documents in every format, and the texts that are read from them."""

import json

import pyarrow
import pyarrow.parquet

from mixtral_jax.data.documents import Document, read_documents


def texts(path):
    return [row.text for row in read_documents(str(path), "text") if isinstance(row, Document)]


def write_file(path, rows):
    """Writes rows in the format that the suffix of the file names."""
    table = pyarrow.table({"id": list(range(len(rows))), "text": rows})
    if path.suffix == ".txt":
        path.write_text(*rows)
    elif path.suffix in (".jsonl", ".ndjson"):
        path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps([{"text": row} for row in rows]))
    elif path.suffix == ".csv":
        path.write_text("id,text\n" + "".join(f'{i},"{row}"\n' for i, row in enumerate(rows)))
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        with pyarrow.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
