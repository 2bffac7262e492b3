"""The router laboratory: from an ablation file to the runs it asks for, and from what they wrote to
a report.

Leaves training to `train`, and to `cli` which of the runs this process does.
"""
