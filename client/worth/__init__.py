"""What is worth training: measured gains, drift of fresh data, and the decision. Pure; the clock is an argument."""
