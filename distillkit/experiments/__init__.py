"""Whole experiments: settings from YAML, a runner each, results as JSON and Markdown tables."""
