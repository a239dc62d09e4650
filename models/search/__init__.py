"""Searching layers, precisions, observers and scales."""
