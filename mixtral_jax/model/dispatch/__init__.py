"""Moves rows between devices: from tokens to the experts they chose, and home again.

`region` opens the one `jax.shard_map`. A transport is a pair of moves inside it, `out` and `home`;
`transports` lists the three that exist. They share the copies and sums on one device in `rows`. No
other room has collectives of its own. Inside the region, M is the number of this device's tokens, P
the number of places on the `expert` axis, and R the number of rows in a device's receive buffer.
"""
