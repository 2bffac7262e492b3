"""How other programs name and describe a Mixtral: their tensors, configs and tokenizers.

No other room knows other programs' names. To add a family like Mixtral (with QK-norm, say), after
`model/` can compute it: `parameters` names our parameters and their dimensions, `layouts` names the
tensors that hold them elsewhere, `huggingface` and `mistral` read and write the family's config,
`config_keys` lists its keys, and `architecture` lists which of our config keys these formats can
express.
"""
