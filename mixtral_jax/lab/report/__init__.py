"""The report of an ablation: one HTML page, Markdown with PNGs, and results.json."""
