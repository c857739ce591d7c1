"""The fault campaign: `python -m benchmarks.faults`; what it does stands in `__main__.py`."""
