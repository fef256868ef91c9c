"""Paired benchmarks: ours and the alternative in turn, in one run, on the same machine with the same threads."""
