"""Reads, checks and writes model folders in Hugging Face's format."""
