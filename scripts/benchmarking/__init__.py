"""What scripts/benchmark.py is made of: settings, inputs, the implementations timed, the meter, results and pictures."""
