"""Text generation: a cache, a sampler, two compiled programs, and the loop around them.

`cache` holds keys and values, `sampler` chooses a token from logits, `programs` runs on the
devices, `batch` lays out prompts, `text` turns ids into text that may be shown, and `generator` is
the interface for callers. The model only knows that tokens may attend to a past. Chat templates
belong to `data.chat`; flags belong to `cli`.
"""
