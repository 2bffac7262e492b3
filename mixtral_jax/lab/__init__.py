"""The router laboratory: compares training runs, and measures what routers do.

    ablation/   the arms of an ablation file, the metrics of their runs, and a table over seeds
    routing/    what the routers of one model do with a text
    pictures/   draws both
    report/     writes the table and the pictures of an ablation as files

Imports go in this order and never back: ablation and routing know nothing of each other or of
pictures, and pictures know nothing of reports. Training is in `mixtral_jax.runs`.
"""
