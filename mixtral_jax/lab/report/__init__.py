"""The report of an ablation: one HTML page, Markdown with PNGs, and results.json.

`files` writes them; `page` and `markdown` lay out the same table, pictures and provenance.
"""
