"""From options to tokens: plan, build, run."""
