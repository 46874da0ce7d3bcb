"""Everything that runs another program: comparisons for bench.py, references for tests."""
