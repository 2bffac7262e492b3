"""Moving rows between devices: from tokens to the experts they chose, and home again.

`region` opens the one `jax.shard_map`; a transport is a pair of moves inside it, `out` and `home`,
of which there are three; `rows` has the copies and sums on one device that they share. No other
room has collectives of its own. Inside the region M counts this device's tokens, P the places on
the `expert` axis, and R the rows that a device has room for.
"""
