"""From a wish to tokens: plan, build, run."""
