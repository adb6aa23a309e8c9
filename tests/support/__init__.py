"""Helpers that several tests share. Fixtures are in the files conftest.py."""
