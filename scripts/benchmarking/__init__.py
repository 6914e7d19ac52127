"""What scripts/benchmark.py is made of: settings and inputs, the implementations timed, the meter, results and their pictures."""
