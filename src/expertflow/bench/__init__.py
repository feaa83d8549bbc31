"""Measuring: the same work under every strategy, one schema of results, reports from result files."""
