"""Everything that runs another program: comparisons for bench.py, reference implementations for tests."""
