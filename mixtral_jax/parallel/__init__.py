"""Devices and processes: the mesh and its axes, layout rules, and how processes work together."""
