"""What a run would need of devices that are not here: memory, arithmetic, communication, and the
speed they allow.
"""
