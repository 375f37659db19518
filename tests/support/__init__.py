"""What several test modules share beside conftest.py. No test module imports another."""
