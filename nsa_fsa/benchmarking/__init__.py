"""What `nsa-fsa bench` is made of: settings, inputs, the implementations timed, the meter, results and pictures."""
