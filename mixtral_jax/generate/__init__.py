"""Continuing text: a cache, a rule that chooses tokens, two compiled programs, and the loop around
them.

`cache` holds keys and values, `sampler` chooses a token from logits, `programs` is what runs on
devices, `batch` lays prompts out, `text` turns ids into text that may be shown, and `generator` is
what others call. The model knows of none of this but of attending to a past. Templates of chats are
for `data`; flags and files are for others.
"""
