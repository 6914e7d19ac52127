"""`nsa-fsa bench` and `nsa-fsa crossover`. What this package publishes is in benchmarks/ of its
repository, which builds on these modules."""
