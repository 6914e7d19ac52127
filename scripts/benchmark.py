"""`nsa-fsa bench` from a checkout: `python scripts/benchmark.py selected` is `nsa-fsa bench selected`."""

from nsa_fsa.benchmarking.app import app

if __name__ == "__main__":
    app()
