"""Fetching a repository whole: its listing, its files by ranges, and the proof that every byte is the listed one."""
