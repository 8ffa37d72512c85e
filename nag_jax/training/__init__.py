"""Training as pure functions: state, optimizer, averages of the parameters, and one step. The loop is a job."""
