"""What a program costs: FLOPs, time, memory, traffic, and device time by part."""
