"""Costs of a program: FLOPs, time, memory, traffic, and device time by part."""
