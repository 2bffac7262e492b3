"""What the routers of a model do with a text.

`analysis` runs the model and gathers the answer. `counts` counts routes on the devices; `figures`
and `specialization` turn counts into figures, each with its value by chance. `tables` prints an
analysis, `analysis_json` keeps one in a file. docs/routing_analysis.md has all formulas.
"""
