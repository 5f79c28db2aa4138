"""Many processes that train as one: their group, their gradients and statistics, and what they must agree on."""
