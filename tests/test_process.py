"""Threads, forked children, imports, environment."""
