"""Training in many processes (ranks): their group, sums of gradients and statistics, checks that all agree."""
