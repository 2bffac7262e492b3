"""Plans a run for devices that are not here: memory, FLOPs, communication, and a bound on speed."""
