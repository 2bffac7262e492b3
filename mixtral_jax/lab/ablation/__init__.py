"""Ablations: what a file asks for (`definition`), what its runs wrote (`records`), and the answer.

`results` makes a table over seeds with the statistics of `spread`; `findings` puts it into words.
"""
