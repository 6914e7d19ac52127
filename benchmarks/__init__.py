"""The benchmarks that this repository publishes: `python -m benchmarks --help`.

suites.yaml says what is measured; `suites` reads it. `inputs` makes what is not plain random
numbers, `operators` has this package's operators, each alone, `peers` the same by others, and
`ablations` the kernels without each part of their design. `floors` knows the least time that
anything could take. `generation` times whole models, and `serving` those that vLLM serves, each in
an `engine` of its own. `tables` and `pictures` show results/, and `pages` writes the tables into
README.md and docs/performance.md.
"""
